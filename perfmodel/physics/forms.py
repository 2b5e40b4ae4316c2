"""Which form of the physical model a kernel has: tiles on a GPU, one BLAS call per expert on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from . import tiled
from .priors import Prior
from .work import Ceilings, Parts, Work

PYTORCH_KERNEL = "torch.nn.functional.grouped_mm"


@dataclass(frozen=True)
class Form:
    """A form of the model: its constants with priors, and functions of work, ceilings and constants.

    `identified(work)` names the constants that measurements of this work inform; `prepare(work)` does once what does
    not depend on constants; `parts(prepared, roof, constants)` gives the latency by part, ns `[batch]`.
    """

    name: str
    defaults: Any
    priors: dict[str, Prior]
    identified: Callable[[Work], list[str]]
    prepare: Callable[[Work], Any]
    parts: Callable[[Any, Ceilings, Any], Parts]
    kernel: tiled.Kernel | None = None

    def resident_parts(self, work: Work, roof: Ceilings, constants: Any) -> Parts:
        """Latency by part, ns `[batch]`, with every expert in device memory; the parts sum to the latency."""
        return self.parts(self.prepare(work), roof, constants)

    def constants(self, values: dict[str, float]) -> Any:
        """The constants of a saved model; raises ValueError for a name or a value that no fit could have given."""
        known = {field.name for field in fields(self.defaults)}
        if set(values) != known:
            raise ValueError(", ".join(set(values) ^ known))
        for name, value in values.items():
            low, high = self.priors[name].low, self.priors[name].high
            if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
                raise ValueError(name)
        return type(self.defaults)(**values)


def form_of(device: str, kernel: str, compute_capability: str | None = None) -> Form:
    """The form of a kernel on a `gpu` or `cpu`, by what its name and the GPU's compute capability say of it."""
    if device == "cpu":
        return _blas()
    is_sm90 = kernel.startswith(PYTORCH_KERNEL) and (compute_capability or "9.0").startswith("9.")
    return _tiled(tiled.Kernel(sm90_rule=is_sm90, needs_alignment="triton" in kernel.lower()))


def _blas() -> Form:
    raise NotImplementedError


def _tiled(kernel: tiled.Kernel) -> Form:
    return Form(
        "tiled",
        tiled.TiledConstants(),
        tiled.PRIORS,
        lambda work: tiled.identified(work, kernel),
        lambda work: tiled.prepare(work, kernel),
        tiled.resident_parts,
        kernel,
    )
