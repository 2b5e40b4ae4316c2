"""Capture folders made up for tests: their times come from the physical model, not from any machine."""

import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from perfmodel import moe, physics
from perfmodel.capture_lines import content_id
from perfmodel.moe import WEIGHT_BYTES, MoEShape
from perfmodel.physics import BlasConstants, Ceilings
from perfmodel.predict import work_of
from perfmodel.routing import Routing, expected_counts, pattern_shares, sample_choices

ROOF = Ceilings(2e11, 3e10, ())
TRUE_CONSTANTS = BlasConstants(
    eff_compute=0.9,
    eff_memory=0.8,
    pack_passes=0.5,
    call_rows=25.0,
    column_terms=40.0,
    active_ns=3_000.0,
    expert_ns=1_500.0,
    call_ns=15_000.0,
    layer_ns=120_000.0,
    row_passes=6.0,
)
SHAPES = (
    MoEShape("synthetic-a", 8, 2, 512, 1024, dtype="fp32"),
    MoEShape("synthetic-b", 32, 4, 256, 512, dtype="fp32"),
    MoEShape("synthetic-c", 64, 8, 512, 256, dtype="fp32"),
    MoEShape("synthetic-d", 16, 1, 1024, 512, dtype="fp32"),
)
TOKENS = (1, 8, 64, 512)
FORM = physics.form_of("cpu", "synthetic", "fp32", n_threads=2)


def noise(seed: int | np.random.Generator, sd: float, factor: float = 1.0) -> Callable[[], float]:
    """What runs scatter by: normal in the logarithm, about `factor`; of one generator for all that share it."""
    rng = np.random.default_rng(seed)
    return lambda: factor * float(np.exp(rng.normal(0, sd)))


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
                parts = FORM.resident_parts(work, ROOF, TRUE_CONSTANTS)
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


def log_error(a: BlasConstants, b: BlasConstants, name: str) -> float:
    """How far one constant is from another, in log units."""
    return abs(float(np.log(getattr(a, name) / getattr(b, name))))


GPU_CALIBRATION = {
    "bf16_gemm_flops_per_s": 7.0e14,
    "fp8_gemm_flops_per_s": 1.2e15,
    "memory_stream_bytes_per_s": 3.0e12,
    "call_overhead_ns": 9_000.0,
    "launch_overhead_ns": 2_500.0,
    "graph_launch_ns": 4_000.0,
    "graph_kernel_ns": 1_100.0,
    "link_h2d_copy_bytes_per_s": 55e9,
    "link_d2h_copy_bytes_per_s": 54e9,
    "link_h2d_pageable_bytes_per_s": 12e9,
    "link_both_copy_bytes_per_s": 95e9,
    "link_kernel_read_bytes_per_s": 50e9,
    "link_h2d_contended_bytes_per_s": 45e9,
    "host_stream_bytes_per_s": 200e9,
    "host_gemm_flops_per_s": 10e12,
    "host_gemm_contended_flops_per_s": 8e12,
}
GPU_MODES: tuple[dict[str, Any], ...] = (
    {},
    {"launch": "graph"},
    {"access": "zero-copy", "residency": "mapped"},
    {"access": "zero-copy", "residency": "split"},
    {"access": "zero-copy", "residency": "mapped", "launch": "graph"},
    {"access": "copy"},
    {"access": "copy-overlap"},
    {"access": "cpu"},
)
GPU_TOKENS, GPU_RUNS, GPU_STARTED = (1, 64, 4096), 2, 1_790_000_000


def _gpu_workloads() -> list[dict[str, Any]]:
    """The lines of workloads.jsonl: of each shape, dtype and batch a layer in every mode, and its two bare GEMMs."""
    found = []
    for name, dtype in (("olmoe", "bf16"), ("olmoe", "fp8"), ("qwen3-30b-a3b", "bf16"), ("mixtral-8x7b", "bf16")):
        made = replace(moe.shape(name), dtype=dtype)
        cold = list(range(made.n_experts // 2, made.n_experts))  # shares of a power law fall with the expert
        for n_tokens in GPU_TOKENS:
            shares = pattern_shares("power-law:1.2", made.n_experts)
            counts = np.bincount(sample_choices(shares, n_tokens, made.top_k, 7).ravel(), minlength=made.n_experts)
            layer = {
                "op": "moe_layer",
                "shape": name,
                **{key: getattr(made, key) for key in ("n_experts", "top_k", "hidden", "inter", "n_gemms")},
                **{"gemm_k": None, "gemm_n": None, "dtype": dtype, "device": "cuda", "n_tokens": n_tokens},
                **{"routing": "power-law:1.2", "seed": 7, "tokens_per_expert": counts.tolist()},
                **{"access": "resident", "offload_frac": 0.0},
            }
            for mode in GPU_MODES:
                offload = {"offload_frac": 0.5, "offloaded": cold, "order": "ascending"} if "access" in mode else {}
                found.append({**layer, **mode, **offload})
            found += [{**layer, "op": "grouped_gemm", "gemm_k": k, "gemm_n": n} for k, n in made.gemms]
    return [
        {"workload": content_id(line), **line, "study": "offload" if "offloaded" in line else "dense"} for line in found
    ]


def _gpu_time_ns(w: dict[str, Any]) -> float:
    """A made-up time: roofs at rates below those of GPU_CALIBRATION, the link in series, a floor for each launch."""
    weights = w["gemm_k"] * w["gemm_n"] if w["gemm_k"] else w["n_gemms"] * w["hidden"] * w["inter"]
    per_expert = weights * WEIGHT_BYTES[w["dtype"]]
    active = {i for i, n in enumerate(w["tokens_per_expert"]) if n > 0}
    n_gone = len(active & set(w.get("offloaded", ())))
    flops = 2.0 * w["n_tokens"] * w["top_k"] * weights
    here_s = max(flops / 4e14, (len(active) - n_gone) * per_expert / 2.4e12)
    floor_ns = (6_000.0 if w.get("launch") else 15_000.0) * (3 if w["op"] == "moe_layer" else 1)
    return floor_ns + (here_s + n_gone * per_expert / 45e9) * 1e9


def write_gpu_capture(path: Path) -> Path:
    """A sound capture of a made-up machine with an H100: every access mode, eager and graph, bf16 and fp8, two runs."""
    (path / "profiles").mkdir(parents=True)
    rng = np.random.default_rng(11)
    lines, planned = [], _gpu_workloads()
    for run in range(GPU_RUNS):
        for order, w in enumerate(planned):
            times = [max(1, round(_gpu_time_ns(w) * float(np.exp(rng.normal(0, 0.01))))) for _ in range(5)]
            started = GPU_STARTED + 1000 * run + order
            lines.append({"workload": w["workload"], "run": run, "times_ns": times, "started": started, "order": order})
    numbers = {
        key: {"value": value, "spread_frac": 0.01, "n": 5, "how": "made up for a test"}
        for key, value in GPU_CALIBRATION.items()
    }
    manifest = {
        "schema": 1,
        "created": "2026-01-01",
        "collector": "synthetic",
        "settings": {"device": "cuda", "dtype": "bfloat16", "threads": 4, "quick": False, "runs": GPU_RUNS, "seed": 0}
        | {"timing": {"error_frac": 0.02}},
        "machine": {"cpu_model": "synthetic CPU", "n_cores": 16, "gpu_name": "NVIDIA H100 80GB HBM3"}
        | {"pcie_gen_max": "5", "pcie_width_max": "16"}
        | {"under_load": {"sm_clock_mhz": 1700, "power_watts": 690.0, "clock_reasons": ["power cap"]}},
        "software": {"torch": "0", "cublas": "13.1.0.3"},
        "capabilities": {"mapped": None, "system": "the machine is not coherent"},
        "calibration": numbers,
        "kernel": "synthetic",
        "n_workloads": len(planned),
        "runs": [
            {"run": run, "started": GPU_STARTED + 1000 * run, "finished": GPU_STARTED + 1000 * run + 900}
            | {"n_resumed": 0, "n_left_out": 0, "n_disturbed": 0}
            for run in range(GPU_RUNS)
        ],
    }
    probed = [
        {
            "probe": "synthetic",
            "params": {"n_bytes": 1 << 30},
            "run": run,
            "quantity": key,
            "value": value * (1 + run / 100),
        }
        | {"unit": "ns" if key.endswith("_ns") else key[-11:].lstrip("_"), "times_ns": [1.0, 1.1, 1.2]}
        | {"spread_frac": 0.01, "n": 3, "how": "made up for a test", "took_s": 0.1}
        for run in range(GPU_RUNS)
        for key, value in GPU_CALIBRATION.items()
    ]
    left_out = [{"probe": "system read", "params": {"n_bytes": 1}, "run": 0, "reason": "the machine is not coherent"}]
    (path / "capture.json").write_text(json.dumps(manifest))
    for name, rows in {
        "workloads": planned,
        "observations": lines,
        "calibration": probed,
        "left_out": left_out,
    }.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trace = {
        "traceEvents": [{"cat": "kernel", "name": "k"}, {"cat": "user_annotation", "name": "perfmodel::moe_layer"}]
    }
    with gzip.open(path / "profiles" / "moe_layer-made-up.trace.json.gz", "wt") as file:
        json.dump(trace, file)
    return path
