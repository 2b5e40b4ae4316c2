"""The recording that a name says: a pattern to be drawn, or a file; with what its user knows beyond the name."""

from dataclasses import dataclass, replace
from pathlib import Path

from perfmodel.errors import InputError
from perfmodel.moe import MoEShape

from .files import read_recording
from .recording import Recording
from .steps import is_drawn, synthetic_recording


@dataclass(frozen=True)
class Hints:
    """What the person says of a recording beyond its name; null for nothing. `n_model_layers` counts dense ones too."""

    shape: MoEShape | None = None
    top_k: int | None = None
    n_steps: int = 16
    step_tokens: int = 512
    kind: str | None = None
    phase: str | None = None
    n_model_layers: int | None = None


def recording_of(name: str, hints: Hints) -> Recording:
    """The recording in a file or folder, or one drawn from a pattern; raises InputError where it contradicts a hint."""
    shape = hints.shape
    if shape is not None and hints.top_k not in (None, shape.top_k):
        raise InputError(f"--top-k is {hints.top_k}, but {shape.name} says {shape.top_k}")
    if is_drawn(name):
        if shape is None:
            raise InputError(f"routing {name!r} is a pattern: give --shape for its layers, experts and top-k")
        return synthetic_recording(name, hints.n_steps, shape.n_layers, shape.n_experts, hints.step_tokens, shape.top_k)
    top_k = hints.top_k or (None if shape is None else shape.top_k)
    found = read_recording(
        name,
        n_experts=None if shape is None else shape.n_experts,
        top_k=top_k,
        n_layers=hints.n_model_layers,
        step_tokens=hints.step_tokens,
        kind=hints.kind,
        phase=hints.phase,
    )
    if found.top_k not in (None, top_k) and top_k is not None:
        raise InputError(f"--top-k is {top_k}, but {found.name} says {found.top_k}")
    file = name.partition("#")[0].rpartition("@")[0] or name.partition("#")[0]
    return replace(found, name=f"{Path(file).name}{name[len(file) :]}", top_k=found.top_k or top_k)
