"""How near to the best is a placement that is searched for, and how long do the search and the policies take?

    python benchmarks/placement.py [--repeats 3] [--layers 61] [--experts 256] [--only made-up real policies]

One core: threads of numerical libraries are set to one. Times are medians over the repeats, each beside a floor taken
in the same run: one sort of all experts by one number.

    made-up     the search over three tiers, costs drawn from several distributions, tiers one after another or side by
                side: its certificate (how much better any placement could be) and time at 10, 40 and 80 % of the memory
    real        the same with costs of the latency model, deepseek-v3 on a gh200 with made-up routing, one step
    policies    static policies, EPLB with 288 slots on 32 GPUs, and dispatch of steps to device and host
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import numpy as np
from threadpoolctl import threadpool_limits

from perfmodel import moe, physics
from perfmodel.hardware import hardware
from perfmodel.offload import Device, placement_costs
from perfmodel.physics.forms import PYTORCH_KERNEL
from perfmodel.placement import COPIED, IN_PLACE, ON_HOST, POLICIES, RESIDENT, Problem
from perfmodel.placement.costs import Costs, additive, parallel
from perfmodel.placement.dispatch import DISPATCHES, PUBLISHED_COSTS
from perfmodel.placement.eplb import rebalance
from perfmodel.placement.memory import Budget
from perfmodel.placement.optimal import minimise
from perfmodel.predict import work_of
from perfmodel.routing import Routing, synthetic_counts, synthetic_steps

MAX_GAP_FRAC, MAX_S = 1e-3, 0.5  # what the search is to reach
MEMORY_FRACS = (0.1, 0.4, 0.8)
MIXES = {"in place": (RESIDENT, IN_PLACE), "copied, on host": (RESIDENT, COPIED, ON_HOST)}
N_ROWS = 512  # of a dispatch: layers in steps


def main() -> None:
    """Time everything that was asked for and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256, help="of made-up costs and policies")
    parser.add_argument("--only", nargs="+", choices=["made-up", "real", "policies"])
    asked = parser.parse_args()
    wanted = asked.only or ["made-up", "real", "policies"]
    with threadpool_limits(1):
        cases = [*(made_up(asked) if "made-up" in wanted else ()), *(real(asked) if "real" in wanted else ())]
        if cases:
            search(cases, asked.repeats)
        if "policies" in wanted:
            policies(asked)


def made_up(asked: argparse.Namespace) -> Iterator[tuple[str, Costs]]:
    """Costs of no machine."""
    rng = np.random.default_rng(0)
    shape = (asked.layers, asked.experts, 3)
    uneven = rng.lognormal(8, 1, shape)
    uneven[:, :, 0] *= 0.1
    tokens = rng.permuted(np.tile(512 / np.arange(1.0, asked.experts + 1), (asked.layers, 1)), axis=1)
    by_tokens = 1e3 * np.stack([5 + 0.1 * tokens, np.where(tokens > 0.5, 40.0, 0.0), 8 + 3 * tokens], axis=2)
    for name, cost in (("log-normal", uneven), ("uniform", rng.uniform(1e3, 1e5, shape)), ("by tokens", by_tokens)):
        yield f"made up, {name}, one after another", additive(cost)
        yield f"made up, {name}, side by side", parallel(cost)


def real(asked: argparse.Namespace) -> Iterator[tuple[str, Costs]]:
    """Costs of the latency model."""
    shape, profile, form = moe.shape("deepseek-v3"), hardware("gh200"), physics.form_of("gpu", PYTORCH_KERNEL)
    device = Device(profile, physics.ceilings(profile, "bf16"), form, form.defaults)
    shares = synthetic_steps("layered", 1, asked.layers, shape.n_experts, 0)
    for n_tokens in (64, 4096):
        counts = synthetic_counts(shares, n_tokens, shape.top_k, 0)[0]
        work = work_of(shape, Routing("layered", counts, n_tokens, shape.top_k), "moe-layer")
        for name, tiers in MIXES.items():
            yield f"{shape.name}, {name}, {n_tokens:,} tokens", placement_costs(work, tiers, device, asked.layers)


def search(cases: list[tuple[str, Costs]], repeats: int) -> None:
    """Certificate and time of the search, and in how many cases both are good enough."""
    n_met = 0
    print(f"{'search':44}{'memory':>8}{'gap':>10}{'time s':>9}{'floors':>9}   gap <= {MAX_GAP_FRAC:.1%} in {MAX_S:g} s")
    for name, costs in cases:
        size = np.full((costs.n_layers, costs.n_experts), float(2**24))
        floor_s = seconds(partial(np.argsort, costs.blocks[0].values[:, :, 0], axis=None), repeats)
        for frac in MEMORY_FRACS:
            job = partial(minimise, costs, size, (Budget((0,), frac * float(size.sum())),))
            gap, took = job().gap_frac, seconds(job, repeats)
            is_met = gap <= MAX_GAP_FRAC and took <= MAX_S
            n_met += is_met
            print(f"{name:44}{frac:8.0%}{gap:10.4%}{took:9.3f}{took / floor_s:9,.0f}   {'yes' if is_met else 'no'}")
    print(f"{n_met} of {len(cases) * len(MEMORY_FRACS)} meet both\n")


def policies(asked: argparse.Namespace) -> None:
    """How many placements of all layers, or dispatches of one layer, are made in a second."""
    rng = np.random.default_rng(0)
    load = synthetic_steps("layered", 1, asked.layers, asked.experts, 0)[0]
    floor_s = seconds(partial(np.argsort, load, axis=None), asked.repeats)
    print(f"{'policy':44}{'ms':>8}{'floors':>9}")
    problem = Problem(load, np.full(load.shape, float(2**24)), 0.4 * load.size * 2**24)
    for name, policy in POLICIES.items():
        say(f"{name}, {asked.layers} layers", seconds(partial(policy, problem), asked.repeats), floor_s)
    n_slots = asked.experts + 32
    took = seconds(partial(rebalance, load, n_slots, 8, 4, 32), asked.repeats)
    say(f"EPLB, {asked.layers} layers, {n_slots} slots", took, floor_s)
    tokens = rng.poisson(2.0, (N_ROWS, asked.experts))
    floor_s = seconds(partial(np.argsort, tokens, axis=1), asked.repeats)
    steps = PUBLISHED_COSTS["hybrimoe"].steps(tokens, rng.random(tokens.shape) < 0.4)
    for name, dispatch in DISPATCHES.items():
        took = seconds(partial(dispatch, steps), asked.repeats)
        say(f"dispatch {name}, {N_ROWS} rows", took, floor_s, f"{N_ROWS / took:12,.0f} rows/s")


def seconds(job: Callable[[], object], repeats: int) -> float:
    """How long a job takes, the median of the repeats after one that is not counted."""
    job()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        job()
        found.append(time.perf_counter() - began)
    return median(found)


def say(what: str, took_s: float, floor_s: float, more: str = "") -> None:
    """One line: the time, and how many times the floor of the same run it is."""
    print(f"{what:44}{took_s * 1e3:8.2f}{took_s / floor_s:9.1f}{more}")


if __name__ == "__main__":
    main()
