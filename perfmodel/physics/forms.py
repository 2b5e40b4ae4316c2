"""Which form of the physical model a kernel has: tiles on a GPU, one BLAS call per expert on a CPU."""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from perfmodel.hardware import HardwareProfile

from . import blas, tiled
from .priors import Prior
from .work import Array, Ceilings, Parts, Work

PYTORCH_KERNEL = "torch.nn.functional.grouped_mm"
SM90 = r"\b(G?H[128]00|H20)\b"  # how titles of profiles, and drivers, name GPUs of compute capability 9.0


@dataclass(frozen=True)
class Form:
    """A form of the model: its constants with priors, and functions of work, ceilings and constants.

    `identified(work)` names the constants that measurements of this work inform; `prepare(work)` does once what does
    not depend on constants; `parts(prepared, roof, constants)` gives the latency by part, ns `[batch]`;
    `gemm_roofs(work, roof, constants)` the time to compute and to move memory of each grouped GEMM, ns `[batch]`.
    """

    name: str
    defaults: Any
    priors: dict[str, Prior]
    identified: Callable[[Work], list[str]]
    prepare: Callable[[Work], Any]
    parts: Callable[[Any, Ceilings, Any], Parts]
    gemm_roofs: Callable[[Work, Ceilings, Any], list[tuple[Array, Array]]]
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


def form_of(device: str, kernel: str, dtype: str = "bf16", n_threads: int = 1, *, is_sm90: bool = True) -> Form:
    """The form of a kernel on a `gpu` or `cpu`, by what its name says of it; a CPU's depends on dtype and threads.

    PyTorch's tiles are known of its bf16 kernel on SM90; elsewhere the cheapest tile stands for the one it takes.
    """
    if device == "cpu":
        return _blas(dtype, n_threads)
    name = kernel.lower()
    has_rule = name.startswith(PYTORCH_KERNEL) and dtype == "bf16" and is_sm90
    return _tiled(tiled.Kernel(sm90_rule=has_rule, needs_alignment="triton" in name))


def form_for(profile: HardwareProfile, kernel: str, dtype: str) -> Form:
    """The form of a kernel on a machine; a CPU computes with as many threads as its profile has cores."""
    n_cores = profile.first("n_cores_count")
    n_threads = 1 if n_cores is None else int(n_cores[1].value)
    is_sm90 = re.search(SM90, profile.title) is not None
    return form_of(profile.device, kernel, dtype, n_threads, is_sm90=is_sm90)


def _blas(dtype: str, n_threads: int) -> Form:
    return Form(
        "blas",
        blas.FP32_DEFAULTS if dtype == "fp32" else blas.NARROW_DEFAULTS,
        blas.PRIORS,
        blas.identified,
        lambda work: blas.prepare(work, n_threads),
        blas.resident_parts,
        lambda work, roof, c: [
            (one.compute.sum(axis=1), (one.weights + one.activations).sum(axis=1))
            for one in blas.expert_roofs(work, roof, c, n_threads)
        ],
    )


def _tiled(kernel: tiled.Kernel) -> Form:
    return Form(
        "tiled",
        tiled.TiledConstants(),
        tiled.PRIORS,
        lambda work: tiled.identified(work, kernel),
        lambda work: tiled.prepare(work, kernel),
        tiled.resident_parts,
        lambda work, roof, c: tiled.gemm_roofs(tiled.prepare(work, kernel), roof, c),
        kernel,
    )
