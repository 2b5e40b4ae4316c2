"""Observations with offloaded experts, made up for tests: their times are the model's own under stated constants, times
noise. No machine was measured."""

from dataclasses import replace

import numpy as np
import polars as pl

from perfmodel import moe
from perfmodel.capture import OBSERVATIONS
from perfmodel.hardware import HardwareProfile, Quantity
from perfmodel.latency import LatencyModel
from perfmodel.latency.work import work_of
from perfmodel.offload import Device, OffloadConstants, offload_parts
from perfmodel.offload.fitted import Way
from perfmodel.physics import PYTORCH_KERNEL, TiledConstants, total
from perfmodel.placement import place
from perfmodel.routing import routing

RATES = {
    "bf16_gemm_flops_per_s": 7.0e14,
    "memory_stream_bytes_per_s": 3.0e12,
    "link_h2d_copy_bytes_per_s": 55e9,
    "link_d2h_copy_bytes_per_s": 54e9,
    "link_kernel_read_bytes_per_s": 50e9,
    "host_stream_bytes_per_s": 200e9,
    "host_gemm_flops_per_s": 10e12,
}
MACHINE = HardwareProfile(
    "synthetic",
    "made up for a test, as an H100",
    "gpu",
    {k: Quantity(v, "measured", "made up") for k, v in RATES.items()},
)
SHAPES = ("olmoe", "poster", "mixtral-8x7b", "qwen3-30b-a3b")
TOKENS, FRACS = (16, 1024, 16384, 262_144), (1 / 8, 5 / 16, 1 / 2, 1.0)
WAYS = (
    Way("zero-copy", "mapped"),
    Way("zero-copy", "split"),
    Way("copy"),
    Way("copy-overlap"),
    Way("cpu"),
)
# What the fit is told of resident experts is wrong on purpose: no fitted model is exact.
TRUE_RESIDENT = TiledConstants(eff_compute=1.0, eff_memory=0.95)
BELIEVED_RESIDENT = replace(TRUE_RESIDENT, eff_compute=0.92, eff_memory=1.0, tile_overhead_rows=90.0)


def synthetic_model() -> LatencyModel:
    """A latency model of the made-up machine whose resident constants are somewhat wrong."""
    model = LatencyModel(MACHINE, "bf16", PYTORCH_KERNEL)
    model.constants_, model.tiles_ = BELIEVED_RESIDENT, None
    return model


def synthetic_observations(
    truth: dict[Way, OffloadConstants], noise: float = 0.02, *, with_resident: bool = True
) -> pl.DataFrame:
    """One row per workload: of each shape and batch the gate-and-up GEMM and the layer, by way and fraction."""
    rows = [row for name in SHAPES for n_tokens in TOKENS for row in _workloads(name, n_tokens, tuple(truth))]
    table = pl.DataFrame([{**dict.fromkeys(OBSERVATIONS), **row} for row in rows], schema=OBSERVATIONS)
    model = synthetic_model()
    rng = np.random.default_rng(3)
    found = []
    for (access, residency), group in table.group_by("access", "residency", maintain_order=True):
        way = Way(str(access), None if residency is None else str(residency))
        work = work_of(group)
        off = np.zeros(work.rows.shape, dtype=bool)
        for i, experts in enumerate(group["offloaded"].to_list()):
            off[i, experts or []] = True
        o = truth.get(way, OffloadConstants())
        device = Device(MACHINE, model.roof, model.form, TRUE_RESIDENT, o, residency=way.residency)
        parts, _ = offload_parts(work, off, "copy" if access == "resident" else way.access, device)
        found.append(group.with_columns(time_ns=total(parts) * np.exp(rng.normal(0, noise, group.height))))
    made = pl.concat(found)
    return made if with_resident else made.filter(pl.col("access") != "resident")


def _workloads(name: str, n_tokens: int, ways: tuple[Way, ...]) -> list[dict[str, object]]:
    shape = moe.shape(name)
    batch = routing("mmlu-like", shape.n_experts, shape.top_k, n_tokens)
    k, n = shape.gemms[0]
    found: list[dict[str, object]] = []
    for op, gemm in (("grouped_gemm", {"gemm_k": k, "gemm_n": n}), ("moe_layer", {})):
        base = {
            "op": op,
            "shape": name,
            **{key: getattr(shape, key) for key in ("n_experts", "top_k", "hidden", "inter", "n_gemms")},
            **gemm,
            **{"dtype": "bf16", "device": "cuda", "n_tokens": n_tokens, "routing": "mmlu-like"},
            **{
                "tokens_per_expert": batch.counts[0].tolist(),
                "access": "resident",
                "offload_frac": 0.0,
                "time_ns": 1.0,
            },
        }
        found.append({**base, "launch": "graph"})
        for way in ways:
            for frac in FRACS:
                gone = np.flatnonzero(place(batch.popularity, frac).offloaded[0]).tolist()
                launch = "graph" if way.access == "zero-copy" else None
                mode = {"access": way.access, "residency": way.residency, "launch": launch}
                found.append({**base, **mode, "offload_frac": len(gone) / shape.n_experts, "offloaded": gone})
    return found
