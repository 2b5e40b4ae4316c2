"""How many layers can the latency model evaluate in a second, and how long does a fit take?

    python benchmarks/predict.py [--repeats 5] [--experts 128] [--batch 4096] [--table PATH]

One core: threads of numerical libraries are set to one. Rates are medians over the repeats, each beside a floor taken
in the same run: one pass of numpy over as many numbers as the work has.

    resident layers       latencies of layers whose sums over experts are known, each with its own routing and sizes
    placements            latencies of placements of one layer from costs by expert (a tier for every expert)
    placements, in full   the same by the formulas themselves: what costs by expert save
    fit, 2,000 rows       constants, residual, intervals, of the kernel with most rows in an aiconfigurator table
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np
from threadpoolctl import threadpool_limits

from perfmodel import physics
from perfmodel.hardware import hardware
from perfmodel.hf_config import resolve
from perfmodel.offload import Device, placement_costs, placement_parts
from perfmodel.physics import Counts, Work
from perfmodel.physics.forms import PYTORCH_KERNEL
from perfmodel.placement import COPIED, IN_PLACE, NEAR_DATA, ON_HOST, RESIDENT
from perfmodel.predict import work_of
from perfmodel.routing import routing

LAYERS = 20_000
MIXES = {
    "zero-copy": (RESIDENT, IN_PLACE),
    "copy": (RESIDENT, COPIED),
    "copy-overlap+cpu": (RESIDENT, COPIED, ON_HOST),
    "copy-overlap+cpu+near-data": (RESIDENT, COPIED, ON_HOST, NEAR_DATA),
}


def main() -> None:
    """Time everything that was asked for and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4096, help="placements evaluated at once")
    parser.add_argument("--table", help="an aiconfigurator moe_perf table to fit")
    asked = parser.parse_args()
    with threadpool_limits(1):
        run(asked)


def run(asked: argparse.Namespace) -> None:
    """The timings, one after another."""
    rng = np.random.default_rng(0)
    layers = made_up_layers(rng, asked.experts)
    form = physics.form_of("gpu", PYTORCH_KERNEL)
    roof = physics.ceilings(hardware("gh200"), "bf16")
    prepared = form.prepare(layers)
    floor = rate(lambda: np.sqrt(layers.k).sum(), LAYERS, asked.repeats)
    own = rate(lambda: form.parts(prepared, roof, form.defaults), LAYERS, asked.repeats)
    say("resident layers", own, floor)

    shape = resolve("qwen3-30b-a3b" if asked.experts == 128 else "poster")
    shares = routing("power-law:1.2", shape.n_experts, shape.top_k, 4096)
    work = work_of(shape, replace(shares, counts=shares.counts[:1]), "grouped-gemm")
    for access, tiers in MIXES.items():
        profile = hardware("trimoe" if NEAR_DATA in tiers else "gh200")
        device = Device(profile, physics.ceilings(profile, "bf16"), form, form.defaults)
        costs = placement_costs(work, tiers, device, 1, serial=access == "copy")
        tier = rng.integers(0, len(tiers), (asked.batch, shape.n_experts)).astype(np.int8)
        offloaded, by_expert = (tier > 0).astype(np.float32), costs.blocks[0].values[0].astype(np.float32)
        floor = rate(lambda offloaded=offloaded, by=by_expert: offloaded @ by, asked.batch, asked.repeats)
        found = rate(partial(costs.placements_ns, tier), asked.batch, asked.repeats)
        say(f"placements, {access}", found, floor)
        few = np.array(tiers, dtype=np.int8)[tier[:64]]
        full = rate(partial(placement_parts, repeated(work, len(few)), few, access, device), len(few), asked.repeats)
        say(f"placements, {access}, in full", full, floor)
    fit(asked.table)


def made_up_layers(rng: np.random.Generator, n_experts: int) -> Work:
    """Layers that differ in routing and sizes; made up."""
    rows = rng.integers(0, 500, (LAYERS, n_experts)).astype(np.float64)
    one, index = np.ones(LAYERS), np.arange(LAYERS, dtype=np.int64)
    hidden, inter = (rng.integers(4, 40, LAYERS) * 128.0 for _ in range(2))
    return Work(
        counts=Counts(rows),
        routing_of=index,
        item_of=index,
        k=np.column_stack([hidden, inter]),
        n=np.column_stack([2 * inter, hidden]),
        layer=one,
        router=one,
        eager=0 * one,
        n_tokens=rows.sum(axis=1) / 8,
        hidden=hidden,
        inter=inter,
        n_experts=n_experts * one,
        weight_bytes=2.0,
        activation_bytes=2.0,
    )


def repeated(work: Work, n: int) -> Work:
    """The single layer of a work, n times."""
    index = np.arange(n, dtype=np.int64)
    columns = {
        name: np.repeat(value, n, axis=0)
        for name, value in vars(work).items()
        if isinstance(value, np.ndarray) and name != "item_of"
    }
    return Work(**{**vars(work), **columns, "item_of": index})


def rate(job: Callable[[], object], n: int, repeats: int) -> float:
    """How many of n things a job does in a second, the median of the repeats after one that is not counted."""
    job()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        job()
        seconds.append(time.perf_counter() - began)
    return n / median(seconds)


def say(what: str, per_s: float, floor_per_s: float) -> None:
    """One line: the rate, and how much slower it is than the floor of the same run."""
    print(f"{what:49} {per_s / 1e6:8.2f} M/s   floor {floor_per_s / 1e6:8.2f} M/s, {floor_per_s / per_s:5.1f} times")


def fit(table: str | None) -> None:
    """How long a fit on 2,000 rows takes: those of a table, or made-up times of the model's own."""
    from perfmodel.latency import LatencyModel
    from perfmodel.sources import read_sources

    if table is None:
        print(f"{'fit':49} not timed: give --table")
        return
    source = max(read_sources([table]), key=lambda one: one.observations.height)
    rows = np.sort(np.random.default_rng(0).choice(source.observations.height, 2000, replace=False))
    began = time.perf_counter()
    LatencyModel(source.profile, source.dtype, source.kernel).fit(source.observations[rows])
    print(f"{'fit, 2,000 rows':49} {time.perf_counter() - began:8.2f} s     {source.kernel}")


if __name__ == "__main__":
    main()
