"""FlashMoE's published latencies: what one calibrated number for each system explains, and what it does not.

Makes docs/flashmoe.md. A `Hypothesis` says where the time that the model does not have goes, with one free number; it
is calibrated on the row with 4096 tokens of each system and predicts all others. Times are ns.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq

from perfmodel.hardware import Quantity, hardware
from perfmodel.moe import MoEShape, layer_flops
from perfmodel.physics import PEAK_GEMM_FRAC
from perfmodel.predict import basis_of
from perfmodel.schedule import layer_timeline
from perfmodel.schedule.costs import Layer
from perfmodel.schedule.fabric import fabric_of
from perfmodel.schedule.measures import overlap_efficiency
from perfmodel.schedule.overheads import DEFAULTS, Overheads
from perfmodel.schedule.timeline import LayerTimeline
from perfmodel.schedule.traffic import traffic_of
from perfmodel.text import NS_PER_S

FOLDER = Path(__file__).parents[2] / "data" / "published"
LATENCY, FACTS = (FOLDER / f"flashmoe_{name}.csv" for name in ("latency", "facts"))
MACHINE = "h100-sxm"
SHAPE = MoEShape(
    name="flashmoe-layer",
    n_experts=32,
    top_k=2,
    hidden=2048,
    inter=2048,
    n_gemms=2,
    dtype="fp16",
    source="arXiv 2506.04667 section 4: plain experts, H = I = 2048, top-2",
)
ROUTING = "uniform"  # not published
CAPACITY_FACTOR = 1.0  # arXiv 2506.04667 section 4
NS_PER_MS = 1e6
# Dense; half of the 989 that the data sheet of the H100 SXM states with sparsity. FlashMoE's code multiplies fp32 with
# the TF32 instruction of tensor cores (osayamenja/FlashMoE, mmaConfig.cuh).
TF32_PEAK_FLOPS_PER_S = 494.7e12


class Setting(NamedTuple):
    """One measured setting: GPUs, and tokens on each."""

    n_gpus: int
    tokens_per_gpu: int


FITTED_ON = Setting(8, 4096)


@dataclass(frozen=True)
class System:
    """One published system: under which of SCHEDULES it is modelled, in which precision it was measured, with what is
    known of its overheads, on which row it is calibrated, at which rate its GEMMs would run (null: the machine's for
    the precision), and whether each expert has its even share of the rows instead of those that are drawn."""

    schedule: str
    dtype: str
    overheads: Overheads
    fitted_on: Setting
    gemm_flops_per_s: float | None = None
    is_even: bool = False


@dataclass(frozen=True)
class Hypothesis:
    """Where the time goes that the model does not have: `words`, the unit of its one number (`ns`, `factor`,
    `bytes_per_s`, `flops_per_s`), and between which values it is looked for."""

    words: str
    unit: str
    low: float
    high: float


FUSED = "flashmoe"
SCHEDULE_OF = {
    FUSED: "fused",
    "comet": "chunked",
    "fastermoe": "bulk",
    "megatron-cutlass": "bulk",
    "megatron-te": "bulk",
}
BASELINES = tuple(name for name in SCHEDULE_OF if name != FUSED)
BULK = tuple(name for name, schedule in SCHEDULE_OF.items() if schedule == "bulk")  # those published at 8 GPUs

BASELINE_HYPOTHESES = {
    "launch": Hypothesis("the host needs longer for each launch", "ns", 1e2, 1e8),
    "start": Hypothesis("each of the two collectives starts later", "ns", 1e0, 1e9),
    "work": Hypothesis("all work of phases takes longer by a factor", "factor", 1e-2, 1e4),
    "all-to-all": Hypothesis("the all-to-all is slower", "bytes_per_s", 1e7, 1e12),
    "all-gather": Hypothesis("tokens go to all GPUs, and that is slower", "bytes_per_s", 1e7, 1e13),
    "all rows": Hypothesis("each GPU computes the rows of all, by a factor", "factor", 1e-2, 1e4),
}
FUSED_HYPOTHESES = {
    "rate": Hypothesis("the GEMMs of the experts", "flops_per_s", 1e12, 1e16),
    "drawn": Hypothesis("the same, of rows drawn and none dropped", "flops_per_s", 1e12, 1e16),
    "link": Hypothesis("the links", "bytes_per_s", 1e9, 1e13),
    "launch": Hypothesis("the launch of the kernel", "ns", 1e2, 1e9),
}


Latencies = Mapping[str, Mapping[Setting, float]]  # ns by system and setting


@cache
def published(path: Path = LATENCY) -> Latencies:
    """Published latencies of one layer's forward pass, ns, by system and setting."""
    found: dict[str, dict[Setting, float]] = {}
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            at = Setting(int(row["n_gpus"]), int(row["tokens_per_gpu"]))
            found.setdefault(row["system"], {})[at] = float(row["forward_ms"]) * NS_PER_MS
    return found


@cache
def facts(quantity: str) -> Mapping[str, float]:
    """A published figure by system, as published (per cent as fractions)."""
    with FACTS.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["quantity"] == quantity]
    return {row["system"]: float(row["value"]) * (0.01 if row["unit"] == "%" else 1) for row in rows}


@cache
def systems() -> Mapping[str, System]:
    """The systems of the latency table by name."""
    found = {}
    for name in published():
        schedule = SCHEDULE_OF[name]
        # FasterMoE's launches are not published: the default of the schedule stands for them.
        n_launches = int(facts("launches_per_layer").get(name, DEFAULTS[schedule].n_launches))
        known = replace(DEFAULTS[schedule], n_launches=n_launches, capacity_factor=CAPACITY_FACTOR)
        found[name] = System(schedule, "fp16", known, FITTED_ON)
    found["comet"] = replace(found["comet"], fitted_on=Setting(4, 4096))  # not published at 8 GPUs
    # The fused schedule leaves capacity aside. A factor of 1 leaves no expert more than its even share, and of drawn
    # uniform rows hardly less: in tiles it is the even share, so that is what experts get.
    tf32 = TF32_PEAK_FLOPS_PER_S * PEAK_GEMM_FRAC
    return found | {FUSED: replace(found[FUSED], dtype="fp32", gemm_flops_per_s=tf32, is_even=True)}


def hypotheses(system: str) -> Mapping[str, Hypothesis]:
    """The hypotheses on a system by name."""
    return FUSED_HYPOTHESES if system == FUSED else BASELINE_HYPOTHESES


@cache
def layer_at(
    at: Setting,
    dtype: str,
    machine: str = MACHINE,
    n_experts: int = SHAPE.n_experts,
    routing: str = ROUTING,
    is_even: bool = False,
) -> Layer:
    """The published layer at a setting; with `is_even` every expert has as many rows of each GPU."""
    shape, profile = replace(SHAPE, dtype=dtype, n_experts=n_experts), hardware(machine)
    traffic = traffic_of(routing, shape, at.n_gpus, at.tokens_per_gpu)
    if is_even:
        traffic = replace(traffic, rows=np.full_like(traffic.rows, traffic.rows.mean()))
    return Layer(basis_of(profile, shape, None), shape, traffic, fabric_of(profile, at.n_gpus))


def timeline(
    system: str,
    at: Setting,
    hypothesis: str | None = None,
    value: float = 0.0,
    machine: str = MACHINE,
    n_experts: int = SHAPE.n_experts,
) -> LayerTimeline:
    """A system's layer at a setting under a hypothesis and its number (null: as the model has it)."""
    known = systems()[system]
    if hypothesis == "all rows":
        at = Setting(1, at.n_gpus * at.tokens_per_gpu)
    is_even, overheads = known.is_even and hypothesis != "drawn", known.overheads
    layer = layer_at(at, known.dtype, machine, n_experts, is_even=is_even)
    if known.gemm_flops_per_s is not None:
        layer = _at_gemm_rate(layer, value if hypothesis in ("rate", "drawn") else known.gemm_flops_per_s)
    if hypothesis == "launch":
        overheads = replace(overheads, host_launch_ns=value)
    elif hypothesis == "start":
        overheads = replace(overheads, collective_ns=value)
    elif hypothesis in ("work", "all rows"):
        overheads = replace(overheads, work_factor=value)
    elif hypothesis in ("all-to-all", "link"):
        layer = _at_link_rate(layer, value)
    elif hypothesis == "all-gather":
        # Every GPU gets all tokens of the others, where an all-to-all brings it top-k / n_gpus rows of each.
        layer = _at_link_rate(layer, value * SHAPE.top_k / at.n_gpus)
    return layer_timeline(layer, known.schedule, overheads)


def timeline_with_room(system: str, at: Setting, capacity_factor: float) -> LayerTimeline:
    """A system's layer at a setting with another capacity factor than the published one."""
    known = systems()[system]
    overheads = replace(known.overheads, capacity_factor=capacity_factor)
    return layer_timeline(layer_at(at, known.dtype), known.schedule, overheads)


def calibrated(system: str, hypothesis: str, latencies: Latencies | None = None) -> float | None:
    """The number of a hypothesis with which a system's row of 4096 tokens comes out; null where none does.

    No other row of `latencies` (null: the published ones) is looked at.
    """
    return needed(system, hypothesis, systems()[system].fitted_on, latencies)


def needed(system: str, hypothesis: str, at: Setting, latencies: Latencies | None = None) -> float | None:
    """The number of a hypothesis with which one row of a system comes out; null where none does."""
    return _solved(system, hypothesis, at, (latencies or published())[system][at])


@cache
def _solved(system: str, hypothesis: str, at: Setting, target_ns: float) -> float | None:
    known = hypotheses(system)[hypothesis]
    # Latencies are about linear in times and factors, and in what a byte or FLOP takes. Fused ones have jumps of some
    # 0.1 %, where tasks change their order.
    is_rate = known.unit.endswith("per_s")
    low, high = (1 / known.high, 1 / known.low) if is_rate else (known.low, known.high)

    def excess(x: float) -> float:
        return timeline(system, at, hypothesis, 1 / x if is_rate else x).latency_ns - target_ns

    if excess(low) * excess(high) > 0:
        return None
    found = float(brentq(excess, low, high, xtol=1e-9 * low, rtol=1e-6))
    return 1 / found if is_rate else found


@cache
def predicted(system: str, hypothesis: str, at: Setting) -> LayerTimeline | None:
    """A system's layer under a hypothesis that is calibrated on its row of 4096 tokens; null where none calibrates."""
    value = calibrated(system, hypothesis)
    return None if value is None else timeline(system, at, hypothesis, value)


def error_frac(system: str, hypothesis: str, at: Setting) -> float | None:
    """Predicted over published latency, less 1; null where the hypothesis cannot be calibrated."""
    found = predicted(system, hypothesis, at)
    return None if found is None else found.latency_ns / published()[system][at] - 1


def predicted_efficiency(system: str, hypothesis: str, n_gpus: int, tokens_per_gpu: int = 8192) -> float | None:
    """Overlap efficiency T(2) / T(n_gpus) under a calibrated hypothesis; null where it cannot be calibrated."""
    two, more = (predicted(system, hypothesis, Setting(n, tokens_per_gpu)) for n in (2, n_gpus))
    return overlap_efficiency(two.latency_ns, more.latency_ns) if two and more else None


def expert_flops_per_s(latency_ns: float, tokens_per_gpu: int) -> float:
    """The rate at which each GPU computes the rows of its experts, were that all of a latency; under even routing."""
    return layer_flops(SHAPE, tokens_per_gpu) / latency_ns * NS_PER_S


def _at_link_rate(layer: Layer, bytes_per_s: float) -> Layer:
    inside = replace(layer.fabric.inside, bytes_per_s=bytes_per_s)
    return replace(layer, fabric=replace(layer.fabric, inside=inside))


def _at_gemm_rate(layer: Layer, flops_per_s: float) -> Layer:
    profile = layer.basis.device.profile
    known = {**profile.quantities, "fp32_gemm_flops_per_s": Quantity(flops_per_s, "assumed", "calibrated")}
    return replace(layer, basis=basis_of(replace(profile, quantities=known), layer.shape, None))
