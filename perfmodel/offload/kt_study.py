"""ktransformers' table of placement strategies: does the model rank them as they were measured, and why.

Makes docs/ktransformers.md. Throughput while decoding, one token a step; what the publication leaves open is a
`Setting`. One number is fitted: the time of a token outside its experts, on FITTED_ON. Times are ns.
"""

import csv
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr

from perfmodel.hardware import HardwareProfile, load_profile
from perfmodel.moe import MoEShape
from perfmodel.physics import Array, total
from perfmodel.placement import POLICIES, RESIDENT, Problem
from perfmodel.predict import basis_of, work_of
from perfmodel.routing import Counts, Routing, Shares, pattern_shares, synthetic_counts, synthetic_steps
from perfmodel.text import NS_PER_S

from .constants import ASSUMED
from .modes import offload_parts

FOLDER = Path(__file__).parent.parent / "data" / "published"
TABLE, MACHINE = FOLDER / "ktransformers_policy.csv", FOLDER / "ktransformers_machine.toml"
SHAPE = MoEShape(
    name="qwen3-next-80b-a3b",
    n_experts=512,
    top_k=10,
    hidden=2048,
    inter=512,
    n_layers=48,
    n_shared_experts=1,
    dtype="fp8",
    source="Qwen/Qwen3-Next-80B-A3B-Instruct-FP8 config.json",
)
STRATEGIES = ("random", "uniform", "front-loading", "frequency")  # those that are decided once
FITTED_ON = (1.0, "uniform")  # all experts on the GPU, where no strategy matters
RANDOM_SEED = 42  # of ktransformers' `random`; its generator is another, so the experts are others
N_STEPS, SEED = 16, 0  # tokens drawn


@dataclass(frozen=True)
class Setting:
    """What the publication leaves open: how unevenly experts are used (`layered` or a pattern, in each layer in an
    order of its own), how many sockets compute, and a factor on what a layer waits for its CPU part."""

    words: str
    routing: str = "layered"
    n_sockets: int = 1
    waiting_factor: float = 1.0


BASE = Setting("as assumed throughout")
SETTINGS = (
    BASE,
    Setting("every expert used alike", "uniform"),
    *(Setting(f"power law, exponent {e:g}", f"power-law:{e:g}") for e in (0.3, 0.5, 0.8, 1.0, 1.5)),
    Setting("two sockets", n_sockets=2),
    Setting("waiting twice as long", waiting_factor=2.0),
    Setting("no waiting for the CPU's part", waiting_factor=0.0),
)


@cache
def published() -> dict[str, Array]:
    """Published tokens per second by column, `[fraction]`: `gpu_experts_frac` and, by strategy, the static ones and
    `dynamic`."""
    with TABLE.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = {key: key.removesuffix("_tokens_per_s").replace("_", "-") for key in rows[0]}
    names["gpu_experts_frac"] = "gpu_experts_frac"
    return {name: np.array([float(row[key]) for row in rows]) for key, name in names.items()}


def fractions() -> Array:
    """Fractions of experts on the GPU at which strategies differ, `[fraction]`: all but the fitted last one."""
    return published()["gpu_experts_frac"][:-1]


def cells() -> Array:
    """Published tokens per second, `[fraction, strategy]`, in the order of `fractions` and STRATEGIES."""
    return np.stack([published()[name][:-1] for name in STRATEGIES], axis=1)


def machine(n_sockets: int = 1) -> HardwareProfile:
    """The machine of the publication with one CPU, or several whose memory and computing add up."""
    profile = load_profile(MACHINE)
    scaled = {
        key: replace(quantity, value=quantity.value * n_sockets) if key.startswith("host_") else quantity
        for key, quantity in profile.quantities.items()
    }
    return replace(profile, quantities=scaled)


def shares_of(pattern: str) -> Shares:
    """Long-run shares of experts, `[layer, expert]`, made up: each layer has an order of its own."""
    if pattern == "layered":
        shares: Shares = synthetic_steps(pattern, 1, SHAPE.n_layers, SHAPE.n_experts, SEED)[0]
        return shares
    rng = np.random.default_rng(SEED)
    shares = np.tile(pattern_shares(pattern, SHAPE.n_experts), (SHAPE.n_layers, 1))
    return np.asarray(rng.permuted(shares, axis=1))


@cache
def _drawn(pattern: str) -> Counts:
    """Experts that N_STEPS tokens select, `[step, layer, expert]` 0 or 1."""
    steps = np.broadcast_to(shares_of(pattern), (N_STEPS, SHAPE.n_layers, SHAPE.n_experts))
    return synthetic_counts(steps, 1, SHAPE.top_k, SEED)


def on_cpu(strategy: str, gpu_frac: float, setting: Setting = BASE) -> NDArray[np.bool_]:
    """Which experts a strategy leaves to the CPU, `[layer, expert]`; as many are kept as ktransformers would, the
    fraction of all layers' experts rounded down."""
    shares = shares_of(setting.routing)
    n_kept = int(gpu_frac * shares.size + 1e-9)
    problem = Problem(shares, np.ones(shares.shape), n_kept, seed=RANDOM_SEED)
    return np.asarray(POLICIES[strategy](problem) != RESIDENT)


def moe_ns(offloaded: NDArray[np.bool_], setting: Setting = BASE) -> float:
    """Time of all MoE layers of a token, the mean over drawn ones, with the experts of `offloaded[layer, expert]` on
    the CPU (model 7.4)."""
    counts = _drawn(setting.routing).reshape(-1, SHAPE.n_experts)
    work = work_of(SHAPE, Routing(setting.routing, counts, 1, SHAPE.top_k), "moe-layer")
    device = basis_of(machine(setting.n_sockets), SHAPE, None).device
    waiting = {name: getattr(ASSUMED, name) * setting.waiting_factor for name in ("merge_ns", "counts_ns")}
    device = replace(device, offload=replace(ASSUMED, **waiting))
    parts, _ = offload_parts(work, np.tile(offloaded, (N_STEPS, 1)), "cpu", device)
    return float(total(parts).sum()) / N_STEPS


def other_ns(setting: Setting = BASE) -> float:
    """Time of a token outside its routed experts and their router: what is left of the measured time in FITTED_ON."""
    frac, strategy = FITTED_ON
    measured = published()[strategy][published()["gpu_experts_frac"] == frac][0]
    return float(NS_PER_S / measured) - moe_ns(on_cpu(strategy, frac, setting), setting)


@cache
def predicted(setting: Setting = BASE) -> Array:
    """Tokens per second, `[fraction, strategy]`, in the order of `fractions` and STRATEGIES."""
    rest = other_ns(setting)
    found = [[moe_ns(on_cpu(name, frac, setting), setting) for name in STRATEGIES] for frac in fractions()]
    return np.asarray(NS_PER_S / (np.array(found) + rest))


def cpu_part(strategy: str, gpu_frac: float, setting: Setting = BASE) -> tuple[float, float]:
    """In how many layers of a token the CPU has something to compute, and how many experts in all of them."""
    active = (_drawn(setting.routing) > 0) & on_cpu(strategy, gpu_frac, setting)
    return float(active.any(axis=2).sum()) / N_STEPS, float(active.sum()) / N_STEPS


@dataclass(frozen=True)
class Agreement:
    """How a prediction compares with the publication: rank correlations over all cells, Kendall's within one fraction
    (the mean over those at which strategies differ), the mean of |predicted / measured - 1|, and the fractions at which
    frequency is before front-loading and that before both others."""

    spearman: float
    kendall: float
    kendall_within: float
    error_frac: float
    ordered: tuple[float, ...]


def agreement(setting: Setting = BASE) -> Agreement:
    """The comparison over the static strategies at all fractions but the fitted one."""
    found, measured = predicted(setting), cells()
    within = [kendalltau(p, m).statistic for p, m in zip(found[1:], measured[1:], strict=True)]
    return Agreement(
        spearman=float(spearmanr(found, measured, axis=None).statistic),
        kendall=float(kendalltau(found, measured).statistic),
        kendall_within=float(np.mean(within)),
        error_frac=float(np.abs(found / measured - 1).mean()),
        ordered=tuple(float(f) for f, row in zip(fractions(), found, strict=True) if is_ordered(row)),
    )


def is_ordered(row: Array) -> bool:
    """Whether frequency is before front-loading and that before random and uniform, `row[strategy]`."""
    random, uniform, front, frequency = row
    return bool(frequency > front > max(random, uniform))
