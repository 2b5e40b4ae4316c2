"""A question about an expert-parallel layer from plain names and numbers, and whether the model fits where it asks."""

from collections.abc import Mapping

from perfmodel import hf_config, text
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.latency import LatencyModel
from perfmodel.model_memory import ModelMemory
from perfmodel.placement.balance import ExpertMap

from .alternatives import fitting_frac
from .overheads import DEFAULTS, SCHEDULES, Overheads
from .question import Question
from .traffic import layer_shares_of, map_layer_of


def possible_schedules(profile: HardwareProfile) -> tuple[str, ...]:
    """The schedules that a machine can have: the fused one needs a GPU whose number of multiprocessors is known."""
    has_fused = profile.device == "gpu" and profile.first("n_cores_count") is not None
    return SCHEDULES if has_fused else tuple(name for name in SCHEDULES if name != "fused")


def question_of(
    profile: HardwareProfile,
    shape: str,
    routing: str,
    n_gpus: int,
    tokens_per_gpu: int,
    *,
    layer: int = 0,
    model: LatencyModel | None = None,
    expert_map: ExpertMap | None = None,
    gpus_per_node: int | None = None,
    gpus_per_host: int | None = None,
    offload_frac: float = 0.0,
    access: str = "zero-copy",
    overheads: Mapping[str, Overheads] = DEFAULTS,
) -> Question:
    """The question about a catalogue model or config.json (`shape`) under a routing pattern or file; raises InputError
    for names and numbers that do not do."""
    known = hf_config.resolve(shape)
    return Question(
        profile,
        known,
        layer_shares_of(routing, known, layer),
        n_gpus,
        tokens_per_gpu,
        model,
        expert_map,
        0 if expert_map is None else map_layer_of(expert_map, n_gpus, layer),
        gpus_per_node,
        gpus_per_host,
        offload_frac,
        access,
        overheads=dict(overheads),
    )


def memory_notes(question: Question, memory: ModelMemory, remedy: str) -> list[str]:
    """Where a question is hypothetical, in words: more of each GPU's experts than it offloads would have to leave
    device memory, and `remedy` says how they would. Empty where it fits, and where the machine's memory is not
    known."""
    if "memory_capacity_bytes" not in question.profile.quantities:
        return []
    try:
        least = fitting_frac(question, memory)
    except InputError as error:
        return [f"hypothetical: {error}"]
    if question.offload_frac >= least:
        return []
    return [
        f"hypothetical: {text.frac(least)} of each GPU's experts do not fit in device memory beside the rest of the "
        f"model; {remedy}"
    ]
