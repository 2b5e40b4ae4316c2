"""Observations and models made up for tests: times are those of the physical model under known constants, with noise
that depends on the seed alone; nothing here was measured."""

from functools import cache
from typing import Any

import numpy as np
import polars as pl

from perfmodel.hardware import HardwareProfile, Quantity
from perfmodel.latency import LatencyModel, work_of
from perfmodel.moe_perf import MOE_PERF
from perfmodel.physics import TiledConstants, ceilings, form_for, total

MADE_UP_KERNEL = "synthetic/1.0/made_up_kernel/bf16"
# (hidden, inter, experts, top-k)
MADE_UP_SIZES = ((1024, 512, 16, 2), (2048, 768, 32, 4), (2048, 1024, 64, 8), (4096, 1536, 8, 2), (1536, 384, 64, 6))
MADE_UP_ROUTINGS = ("balanced", "power_law_1.01", "power_law_1.2")
MADE_UP_TOKENS = tuple(2**i for i in range(14))
TRUE = TiledConstants(eff_compute=0.7, eff_memory=0.85, tile_overhead_rows=60.0, layer_ns=30_000.0, row_passes=6.0)


def made_up_machine(name: str = "synthetic-gpu", device: str = "gpu", **values: float) -> HardwareProfile:
    """A machine with made-up rates; `values` are put in their place or added."""
    rates = {"bf16_gemm_flops_per_s": 6e14, "memory_stream_bytes_per_s": 2.5e12, "memory_capacity_bytes": 8e10}
    known = {k: Quantity(v, "assumed", "made up for tests") for k, v in {**rates, **values}.items()}
    return HardwareProfile(name, name, device, known)


def made_up_observations(
    sizes: tuple[tuple[int, int, int, int], ...] = MADE_UP_SIZES,
    tokens: tuple[int, ...] = MADE_UP_TOKENS,
    routings: tuple[str, ...] = MADE_UP_ROUTINGS,
    noise_frac: float = 0.03,
    seed: int = 0,
    **columns: Any,
) -> pl.DataFrame:
    """Rows as `read_moe_perf` gives them, without kernel, machine and tp."""
    rows = [
        {
            "workload": f"{hidden}-{inter}-{n_experts}-{n_tokens}-{routing}",
            "op": "fused_moe",
            "shape": f"h{hidden}-i{inter}-k{top_k}-e{n_experts}",
            **{"n_experts": n_experts, "top_k": top_k, "hidden": hidden, "inter": inter, "n_gemms": 3},
            **{"dtype": "bf16", "device": "cuda", "n_tokens": n_tokens, "routing": routing},
            **{"access": "resident", "offload_frac": 0.0, "launch": "graph"},
        }
        | columns
        for hidden, inter, n_experts, top_k in sizes
        for routing in routings
        for n_tokens in tokens
    ]
    schema = pl.Schema({k: v for k, v in MOE_PERF.items() if k not in ("kernel", "machine", "tp")})
    table = pl.DataFrame(rows).match_to_schema(schema, missing_columns="insert")
    work = work_of(table)
    profile = made_up_machine()
    parts = form_for(profile, MADE_UP_KERNEL, "bf16").resident_parts(work, ceilings(profile, "bf16"), TRUE)
    noise = np.exp(np.random.default_rng(seed).normal(0.0, noise_frac, table.height))
    return table.with_columns(time_ns=pl.Series(work.mean(total(parts)) * noise))


def new_model(**changes: Any) -> LatencyModel:
    """A model of the made-up kernel that was not fitted yet."""
    return LatencyModel(**{"profile": made_up_machine(), "dtype": "bf16", "kernel": MADE_UP_KERNEL} | changes)


@cache
def made_up_model() -> LatencyModel:
    """A model fitted to the made-up observations; tests must not change it."""
    return new_model().fit(made_up_observations())


def spoiled(observations: pl.DataFrame, is_spoiled: pl.Expr) -> pl.DataFrame:
    """The observations with some times a hundred times what they were."""
    return observations.with_columns(time_ns=pl.when(is_spoiled).then(100 * pl.col("time_ns")).otherwise("time_ns"))
