"""TriMoE beside its baselines on one workload, and which of the published figures come out where.

Everything is a prediction under stated assumptions; nothing was measured, and nothing is tuned to a published figure.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.moe import MoEShape
from perfmodel.physics import Array
from perfmodel.placement import RESIDENT
from perfmodel.text import NS_PER_S

from .prediction import CLASSES, Accuracy, accuracy, classify
from .simulate import Outcome, System, Workload, simulate, workload
from .steps import FAMILY, steps_of
from .systems import BASELINES, LADDER, NO_AMX, TRIMOE, fitted_bounds

N_BEFORE = 8  # steps before the timed ones, from which popularity is known
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the near-data rates, which are assumed


@dataclass(frozen=True)
class Published:
    """A published figure as a range; one end is null where only a bound is stated."""

    words: str
    low: float | None
    high: float | None

    def judged(self, value: float | None) -> str:
        """Whether a value of ours lies in the range, below or above; n/a for null."""
        if value is None:
            return "n/a"
        if self.low is not None and value < self.low:
            return "below"
        return "above" if self.high is not None and value > self.high else "inside"


# arXiv 2603.01058, headline figures over its three models and batches of 256 to 768. A factor or share that is given as
# one number counts as met within 10 % of it.
NEAR_FRAC = 0.1
SPEEDUP = Published("2.12x to 2.83x", 2.12, 2.83)
OVERHEAD = Published("under 3.3 %", None, 0.033)
UTILISATION = Published("76.2 %", 0.762 * (1 - NEAR_FRAC), 0.762 * (1 + NEAR_FRAC))
MIGRATIONS = Published("78 %", 0.78 * (1 - NEAR_FRAC), 0.78 * (1 + NEAR_FRAC))
FACTORS = {
    name: Published(f"{factor}x", factor * (1 - NEAR_FRAC), factor * (1 + NEAR_FRAC))
    for name, factor in (("+ AMX CPU", 1.75), ("+ refinement", 1.28), ("+ relayout", 1.16))
}
MODELS = ("deepseek-v2", "qwen3-235b-a22b", "glm-4.5-air")
BATCHES = (256, 512, 768)


@dataclass(frozen=True, eq=False)
class Comparison:
    """TriMoE on a workload beside the baselines, and the ladder of its parts (empty where not asked for)."""

    work: Workload
    system: Outcome
    baselines: tuple[Outcome, ...]
    ladder: tuple[Outcome, ...]
    no_amx: Outcome | None
    accuracy: Accuracy | None

    @property
    def best(self) -> Outcome:
        """The fastest baseline."""
        return min(self.baselines, key=lambda one: one.step_ns)

    @property
    def speedup(self) -> float:
        """How many times as fast as the best baseline the system is."""
        return min(self.speedups.values())

    @property
    def speedups(self) -> dict[str, float]:
        """How many times as fast as each baseline the system is, by the baseline's name."""
        return {one.system.name: one.step_ns / self.system.step_ns for one in self.baselines}

    @property
    def factors(self) -> dict[str, float]:
        """How many times as fast each part of TriMoE makes what is without it, by the names of FACTORS; empty without a
        ladder."""
        steps = zip(FACTORS, self.ladder, self.ladder[1:], strict=False)
        return {name: before.step_ns / after.step_ns for name, before, after in steps}

    @property
    def utilisation_frac(self) -> float:
        """The mean over the units of how long each computes."""
        return float(np.mean(list(self.system.utilisation.values())))

    @property
    def utilisation_with_reads_frac(self) -> float:
        """The same with the time that memory modules serve reads of the others."""
        used = self.system.utilisation | ({"ndp": self.system.dimm_busy_frac} if "ndp" in self.system.units else {})
        return float(np.mean(list(used.values())))

    @property
    def bottleneck(self) -> str:
        """The unit that is the slowest in most layers."""
        shares = self.system.bottleneck_frac
        return max(shares, key=lambda unit: shares[unit])

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain values, units in the keys."""
        rows = [*self.baselines, *self.ladder, *([self.no_amx] if self.no_amx else [])]
        return {
            "shape": self.work.shape.name,
            "hardware": self.work.profile.name,
            "n_steps": len(self.work.steps),
            "n_layers_simulated": self.work.steps.shape[1],
            "n_slots": self.work.n_slots,
            "bounds": asdict(self.work.bounds),
            "step_ns": self.system.step_ns,
            "best_baseline": self.best.system.name,
            "speedup": self.speedup,
            "speedup_over": self.speedups,
            "published_speedup": [SPEEDUP.low, SPEEDUP.high],
            "systems": {row.system.name: _row(row) for row in (*rows, self.system)},
            "factors": self.factors,
            "utilisation_frac": self.utilisation_frac,
            "utilisation_with_reads_frac": self.utilisation_with_reads_frac,
            "bottleneck": self.bottleneck,
            "overhead_frac": self.system.overhead_frac,
            "accuracy": None if self.accuracy is None else asdict(self.accuracy),
        }


def _row(one: Outcome) -> dict[str, Any]:
    return {
        "step_ns": one.step_ns,
        "utilisation": one.utilisation,
        "bottleneck_frac": one.bottleneck_frac,
        "overhead_frac": one.overhead_frac,
        "n_moves": one.n_moves,
        "migration_frac": one.migration_frac,
    }


def compare(
    work: Workload, system: System = TRIMOE, *, has_ladder: bool = True, has_fitted_bounds: bool = True
) -> Comparison:
    """A system (TriMoE, or with parts left out) beside the baselines on a workload; with the ladder of TriMoE's parts
    and its predictor's accuracy unless that is not asked for.

    The bound between cold and warm experts is the one under which the steps before are shortest (`fitted_bounds`), or
    else that of the workload.
    """
    if has_fitted_bounds:
        work = replace(work, bounds=fitted_bounds(work))
    baselines = tuple(simulate(work, one) for one in BASELINES)
    if not has_ladder:
        return Comparison(work, simulate(work, system), baselines, (), None, None)
    ladder = tuple(simulate(work, one) for one in LADDER)
    whole = ladder[-1] if system is TRIMOE else simulate(work, system)
    loads = np.concatenate([work.before, work.steps])
    judged = accuracy(loads, work.bounds, work.new_frac) if len(loads) > 2 else None
    return Comparison(work, whole, baselines, ladder, simulate(work, NO_AMX), judged)


def sensitivity(
    work: Workload,
    pairs: Iterable[tuple[float, float]],
    system: System = TRIMOE,
    *,
    has_fitted_bounds: bool = True,
) -> list[Comparison]:
    """The comparison with near-data bandwidth and FLOP/s of the workload scaled further, by each pair of factors."""
    found = []
    for reading, computing in pairs:
        o = work.options
        options = replace(
            o,
            ndp_reading_scale=o.ndp_reading_scale * reading,
            ndp_computing_scale=o.ndp_computing_scale * computing,
        )
        scaled = replace(work, options=options)
        found.append(compare(scaled, system, has_ladder=False, has_fitted_bounds=has_fitted_bounds))
    return found


def made_workload(
    profile: HardwareProfile,
    shape: MoEShape,
    n_tokens: int,
    *,
    source: str = FAMILY,
    n_steps: int = 32,
    n_layers: int = 8,
    budget_bytes: float | None = None,
    n_slots: int | None = None,
    seed: int = 0,
) -> Workload:
    """A workload of `n_steps` timed steps under a routing (`steps_of`), after N_BEFORE that tell popularity.

    Of a model's layers `n_layers` stand for all. A file of few steps gives a third of them to what comes before. Raises
    InputError for a file of a single step of counts that cannot be told apart in time.
    """
    recording = steps_of(source, shape, n_tokens, n_steps + N_BEFORE, n_layers, seed)
    n_found = len(recording.loads)
    if n_found < 2:
        raise InputError(f"routing {source!r} has {n_found} step, expected at least 2: one before and one to be timed")
    n_before = N_BEFORE if n_found == n_steps + N_BEFORE else min(N_BEFORE, max(n_found // 3, 1))
    return workload(profile, shape, recording, n_before, budget_bytes=budget_bytes, n_slots=n_slots)


def class_statistics(work: Workload) -> dict[str, tuple[float, float]]:
    """For each class of experts, by the bounds of the workload, the share of experts and of tokens in timed steps."""
    classes = classify(work.steps, work.bounds)
    total = work.steps.sum()
    return {
        name: (float((classes == number).mean()), float(work.steps[classes == number].sum() / total))
        for number, name in enumerate(CLASSES)
    }


def gpu_utilisation_frac(work: Workload, n_tokens: int) -> float:
    """What of the GPU's nominal peak one resident expert of so many tokens reaches."""
    cost = alone_ns(work, n_tokens, is_resident=True)[RESIDENT]
    flops = 2.0 * n_tokens * sum(k * n for k, n in work.shape.gemms)
    return float(flops / (cost / NS_PER_S) / work.profile["bf16_peak_flops_per_s"])


def alone_ns(work: Workload, n_tokens: int, *, is_resident: bool = False, is_striped: bool = False) -> Array:
    """What one expert of so many tokens costs in each domain, ns `[domain]`, by where its weights are."""
    one = np.ones((1, 1))
    machine = replace(work, before=one[None] * n_tokens, steps=one[None] * n_tokens).machine(TRIMOE)
    costs = machine.costs(one * n_tokens, one == is_resident, one == is_striped, np.zeros((1, 1), dtype=np.int64))
    return np.asarray(costs.cost_ns[0, 0])
