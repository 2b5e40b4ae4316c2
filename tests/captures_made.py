"""Capture folders made up for tests: their times come from the physical model, not from any machine."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from perfmodel import physics
from perfmodel.moe import MoEShape
from perfmodel.physics import Ceilings, Constants
from perfmodel.predict import work_of
from perfmodel.routing import Routing, expected_counts, pattern_shares

ROOF = Ceilings(2e11, 3e10, ())
TRUE_CONSTANTS = Constants(
    eff_compute=0.9,
    eff_memory=0.8,
    tile_overhead_rows=25.0,
    column_overhead=40.0,
    pack_passes=0.5,
    smooth_p=3.0,
    overlap_frac=0.0,
    call_ns=15_000.0,
    expert_ns=3_000.0,
    layer_ns=120_000.0,
    row_passes=6.0,
    token_passes=3.0,
)
SHAPES = (
    MoEShape("synthetic-a", 8, 2, 512, 1024, dtype="fp32"),
    MoEShape("synthetic-b", 32, 4, 256, 512, dtype="fp32"),
    MoEShape("synthetic-c", 64, 8, 512, 256, dtype="fp32"),
    MoEShape("synthetic-d", 16, 1, 1024, 512, dtype="fp32"),
)
TOKENS = (1, 8, 64, 512)


def write_synthetic_capture(
    path: Path,
    n_runs: int = 5,
    noise: Callable[[], float] = lambda: 1.0,
    machine: dict[str, Any] | None = None,
    shapes: tuple[MoEShape, ...] = SHAPES,
) -> Path:
    """A capture folder whose times are the model's own under TRUE_CONSTANTS, times `noise()` for each run."""
    path.mkdir(parents=True)
    workloads, times = [], {}
    for shape in shapes:
        for n_tokens in TOKENS:
            for pattern in ("uniform", "power-law:1.2"):
                counts = expected_counts(pattern_shares(pattern, shape.n_experts), n_tokens, shape.top_k)
                work = work_of(shape, Routing(pattern, counts, n_tokens, shape.top_k), "moe-layer")
                row = {
                    "op": "moe_layer",
                    "shape": shape.name,
                    **{k: getattr(shape, k) for k in ("n_experts", "top_k", "hidden", "inter", "n_gemms")},
                    "gemm_k": None,
                    "gemm_n": None,
                    "dtype": "fp32",
                    "device": "cpu",
                    "n_tokens": n_tokens,
                    "routing": pattern,
                    "seed": 0,
                    "tokens_per_expert": counts[0].tolist(),
                    "access": "resident",
                    "offload_frac": 0.0,
                }
                key = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:12]
                workloads.append({"workload": key, **row})
                parts = physics.resident_parts(work, ROOF, TRUE_CONSTANTS, physics.FORMS["cpu"])
                times[key] = float(physics.total(parts)[0])
    calibration = {
        "fp32_gemm_flops_per_s": {"value": ROOF.flops_per_s, "spread_frac": 0.01, "n": 5, "how": "made up for a test"},
        "memory_stream_bytes_per_s": {
            "value": ROOF.bytes_per_s,
            "spread_frac": 0.01,
            "n": 5,
            "how": "made up for a test",
        },
    }
    manifest = {
        "schema": 1,
        "created": "2026-01-01",
        "collector": "synthetic",
        "settings": {"device": "cpu", "dtype": "float32", "threads": 2, "quick": True, "runs": n_runs, "seed": 0},
        "machine": {"cpu_model": "synthetic CPU", "n_cores": 2} | (machine or {}),
        "software": {"torch": "0"},
        "calibration": calibration,
        "kernel": "synthetic",
        "n_workloads": len(workloads),
    }
    (path / "capture.json").write_text(json.dumps(manifest))
    (path / "workloads.jsonl").write_text("".join(json.dumps(row) + "\n" for row in workloads))
    with (path / "observations.jsonl").open("w") as file:
        for run in range(n_runs):
            for key, time_ns in times.items():
                measured = max(1, round(time_ns * noise()))
                file.write(json.dumps({"workload": key, "run": run, "times_ns": [measured] * 3}) + "\n")
    return path


def log_error(a: Constants, b: Constants, name: str) -> float:
    """How far one constant is from another, in log units."""
    return abs(float(np.log(getattr(a, name) / getattr(b, name))))
