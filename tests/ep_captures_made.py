"""Captures of expert-parallel layers made up for tests: hand-set times, or the model's own; nothing was measured."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perfmodel.ep_capture import EpCapture, EpWorkload, load_ep_capture
from perfmodel.schedule.captured import layer_of, predict_step
from perfmodel.schedule.probed import profile_of

GEMM_FLOPS_PER_S, STREAM_BYTES_PER_S, ALPHA_NS, LINK_BYTES_PER_S = 4e10, 1e10, 50_000.0, 2e9
SIZES = (1_000, 10_000, 100_000, 1_000_000)  # bytes that a rank has for each other one

# One step by hand, (phase, chunk, start, duration) in ns: rank 1 comes 90 ns late to dispatch and 800 late to combine.
BULK = {
    0: (0, 3650, [("gate", 0, 0, 100), ("permute", 0, 100, 50), ("counts", 0, 150, 150), ("dispatch", 0, 310, 590),
                  ("gemm1", 0, 900, 1000), ("activation", 0, 1900, 100), ("gemm2", 0, 2000, 500),
                  ("combine", 0, 2500, 1000), ("reduce", 0, 3500, 100)]),
    1: (20, 3700, [("gate", 0, 20, 120), ("permute", 0, 140, 60), ("counts", 0, 200, 100), ("dispatch", 0, 400, 500),
                   ("gemm1", 0, 900, 1500), ("activation", 0, 2400, 100), ("gemm2", 0, 2500, 800),
                   ("combine", 0, 3300, 200), ("reduce", 0, 3500, 100)]),
}  # fmt: skip
# The same in two chunks: the second dispatch, and the first combine, go on while experts compute.
CHUNKED = {
    0: (0, 2100, [("gate", 0, 0, 100), ("dispatch", 0, 100, 200), ("dispatch", 1, 110, 590), ("gemm1", 0, 300, 300),
                  ("combine", 0, 600, 600), ("gemm1", 1, 800, 300), ("combine", 1, 1100, 900)]),
    1: (0, 2000, [("gate", 0, 0, 100), ("dispatch", 0, 100, 200), ("dispatch", 1, 110, 590), ("gemm1", 0, 300, 500),
                  ("combine", 0, 800, 400), ("gemm1", 1, 800, 700), ("combine", 1, 1500, 400)]),
}  # fmt: skip


def workload_line(name: str, n_ranks: int = 2, **changes: Any) -> dict[str, Any]:
    """A made-up layer of 4 experts, 10 tokens a rank."""
    line: dict[str, Any] = {
        "workload": name, "shape": "made-up-a", "n_experts": 4, "top_k": 2, "hidden": 64, "inter": 32, "n_gemms": 3,
        "dtype": "fp32", "tokens_per_gpu": 10, "routing": "uniform", "schedule": "bulk", "n_chunks": 1,
        "gpu_of": [expert * n_ranks // 4 for expert in range(4)], "rows": [[3, 2, 5, 10], [6, 4, 8, 2]][:n_ranks],
    }  # fmt: skip
    return line | changes


def probe_lines(n_ranks: int) -> list[dict[str, Any]]:
    """Probes of a machine of round numbers."""
    lines: list[dict[str, Any]] = []
    for rank in range(n_ranks):
        of_rank = {"rank": rank, "times": 3}
        large = {"k": 512, "n": 512, "rows": 512}
        for value, params in ((GEMM_FLOPS_PER_S, large), (1e9, large | {"rows": 8}), (9e10, large | {"alone": True})):
            lines.append({"probe": "gemm", "params": params, "unit": "flops_per_s", "value": value, **of_rank})
        lines.append({"probe": "stream", "params": {}, "unit": "bytes_per_s", "value": STREAM_BYTES_PER_S, **of_rank})
        lines += [
            {"probe": "all_to_all", "params": {"bytes": size}, "unit": "ns", **of_rank,
             "value": ALPHA_NS + size * (n_ranks - 1) / LINK_BYTES_PER_S * 1e9}
            for size in SIZES
        ]  # fmt: skip
    return lines


def manifest(n_ranks: int, n_cores: int | None = 4) -> dict[str, Any]:
    """The manifest of a made-up capture."""
    told = {"n_ranks": n_ranks, "backend": "gloo", "device": "cpu", "dtype": "float32", "threads": 1, "seed": 0}
    clock = [{"rank": rank, "offset_ns": 0, "error_ns": 15 * rank} for rank in range(n_ranks)]
    return {
        "schema": 1, "kind": "expert-parallel", "created": "2026-01-01", "collector": "made up",
        "settings": told, "machine": {"cpu_model": "made up", "n_cores": n_cores}, "software": {},
        "kernel": "made up", "clock": clock,
    }  # fmt: skip


def write_files(path: Path, told: Any, workloads: Sequence[Any], steps: Sequence[Any], probes: Sequence[Any]) -> Path:
    """A folder of these contents."""
    path.mkdir(parents=True, exist_ok=True)
    for name, lines in (("workloads.jsonl", workloads), ("steps.jsonl", steps), ("probes.jsonl", probes)):
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "expert_parallel.json").write_text(json.dumps(told))
    return path


def write_by_hand_made(path: Path) -> Path:
    """A bulk and a chunked workload of two ranks, three equal steps each, the last of which is 100 ns longer."""
    workloads = [workload_line("b1"), workload_line("c2", schedule="chunked", n_chunks=2)]
    steps = []
    for name, ranks in (("b1", BULK), ("c2", CHUNKED)):
        for step in range(3):
            at = 1_000_000 * (step + 1) + (500_000 if name == "c2" else 0)
            for rank, (start, end, phases) in ranks.items():
                moved = [[phase, chunk, at + begin, dur] for phase, chunk, begin, dur in phases]
                line = {"workload": name, "step": step, "rank": rank, "start_ns": at + start, "phases": moved}
                steps.append(line | {"end_ns": at + end + 100 * (step == 2)})
    return write_files(path, manifest(2), workloads, steps, probe_lines(2))


def write_model_made(
    path: Path, shapes: Sequence[dict[str, Any]], n_ranks: int = 4, factor: float = 1.0, n_cores: int | None = 4
) -> EpCapture:
    """A capture whose times are `factor` times the model's own, in bulk and in two chunks of each shape."""
    generator = np.random.default_rng(0)
    lines = []
    for at, changes in enumerate(shapes):
        line = workload_line(f"w{at}", n_ranks, gpu_of=[0] * 4, rows=[[10, 10, 0, 0]] * n_ranks) | changes
        n_experts, n_tokens = line["n_experts"], line["tokens_per_gpu"]
        rows = np.zeros((n_ranks, n_experts), dtype=int)
        for rank in range(n_ranks):
            for _ in range(n_tokens):
                rows[rank, generator.choice(n_experts, line["top_k"], replace=False)] += 1
        line |= {"rows": rows.tolist(), "gpu_of": [expert * n_ranks // n_experts for expert in range(n_experts)]}
        lines += [line, line | {"workload": f"w{at}c", "schedule": "chunked", "n_chunks": 2}]
    nothing = [
        {"workload": line["workload"], "step": 0, "rank": rank, "start_ns": 0, "end_ns": 1, "phases": []}
        for line in lines
        for rank in range(n_ranks)
    ]
    told, probes = manifest(n_ranks, n_cores), probe_lines(n_ranks)
    profile = profile_of(load_ep_capture(write_files(path, told, lines, nothing, probes)))
    steps = []
    for line in lines:
        workload = EpWorkload(**line)
        found = predict_step(layer_of(workload, profile), workload.schedule, workload.n_chunks)
        for rank in range(n_ranks):
            spans = [one for one in found.timeline.spans if one.gpu == rank and one.lane != "receive"]
            phases = [(one.phase, one.piece, one.start_ns * factor, one.dur_ns * factor) for one in spans]
            end = found.timeline.end_ns[rank] * factor
            whole = [[phase, chunk, int(start), int(dur)] for phase, chunk, start, dur in phases]
            steps.append({"workload": line["workload"], "step": 0, "rank": rank, "start_ns": 0, "end_ns": int(end) + 1})
            steps[-1]["phases"] = whole
    return load_ep_capture(write_files(path, told, lines, steps, probes))
