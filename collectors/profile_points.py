"""Which points of a plan are profiled, how their ranges and files are called, what else may hold the device's tracing.

Needs no torch.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from perfmodel.errors import InputError

from . import store
from .workloads import ACCESS_MODES, RESIDENCIES, Workload

N_STEPS = 2
DECODE_TOKENS, PREFILL_TOKENS = 4, 256

MOST = {"quick": 2, "standard": 12, "full": 12}  # profiles of a preset
N_EAGER, N_GRAPH = 5, 3  # batch sizes of the curve of launch delays, launched by the host and replayed
# A capture folder stays below 2 MB, and its tables need most of the rest.
PROFILES_BYTES = 1_000_000
# Bytes of one step in a packed trace: fitted to two CPU profiles (64 experts 60 kB, 8 experts 16 kB, two steps), where
# each expert is an operator of its own; on CUDA a guess on the safe side, about 30 operators and their kernels.
CPU_STEP_BYTES, CPU_EXPERT_BYTES = 4_000, 410
CUDA_STEP_BYTES, CUDA_OFFLOADED_BYTES, GRAPH_FACTOR = 10_000, 200, 4

# Libraries that CUDA and NVTX load into a process when told so, and the sign of a running nsys.
INJECTORS = ("CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID")


def _extras(workload: Workload) -> list[str]:
    """What tells a workload from the plain one of its shape: nothing for resident weights, launched by the host."""
    extras = []
    if workload.access != "resident":
        where = [workload.access, *filter(None, [workload.residency]), f"{workload.offload_frac:.0%}"]
        extras.append("access=" + ":".join([*where, *filter(None, [workload.order])]))
    if workload.launch is not None:
        extras.append(f"launch={workload.launch}")
    if workload.dtype == "fp8":
        extras.append("dtype=fp8")
    if workload.gemm_k is not None:
        extras.append(f"gemm={workload.gemm_k}x{workload.gemm_n}")
    return extras


def range_name(workload: Workload) -> str:
    """The outer range of a step; arguments of a range do not reach the trace, so they are in the name.

    A resident layer launched by the host has the name it always had, so that captures of all ages compare; other
    workloads add `access=`, `launch=`, `dtype=` and `gemm=`.
    """
    plain = f"perfmodel::{workload.op}|shape={workload.shape}|tokens={workload.n_tokens}|routing={workload.routing}"
    return "|".join([plain, *_extras(workload)])


def file_name(workload: Workload) -> str:
    """`OP-SHAPE-TOKENS-ROUTING.trace.json.gz` with signs that files dislike turned to dashes, extras before the dot."""
    extras = [extra.partition("=")[2] for extra in _extras(workload)]
    parts = (workload.op, workload.shape, str(workload.n_tokens), workload.routing, *extras)
    return re.sub(r"[^\w.-]+", "-", "-".join(parts)) + ".trace.json.gz"


def profile_bytes(workload: Workload) -> int:
    """About how many bytes the packed profile of a workload takes."""
    if workload.device == "cpu":
        return N_STEPS * (CPU_STEP_BYTES + CPU_EXPERT_BYTES * workload.n_experts)
    step = CUDA_STEP_BYTES + CUDA_OFFLOADED_BYTES * len(workload.offloaded or ())
    return N_STEPS * step * (GRAPH_FACTOR if workload.launch == "graph" else 1)


def chosen_points(workloads: Sequence[Workload], preset: str = "quick") -> list[Workload]:
    """The points to profile, most telling first, those launched by the host before those replayed from a graph.

    Always a decode-like and a prefill-like MoE layer: skewed where planned, few tokens of about 64 experts, many of
    few. `standard` and `full` add one layer over the whole range of batch sizes, by the host and from a graph, and one
    workload of each access mode, as far as they are planned and fit in PROFILES_BYTES. Empty when nothing of it is
    planned; raises InputError on another preset.
    """
    if preset not in MOST:
        raise InputError(f"the preset is {preset!r}, expected one of {', '.join(MOST)}")
    layers = [w for w in workloads if w.op == "moe_layer"]
    plain = [w for w in layers if w.access == "resident" and w.launch is None]
    wanted: list[Workload] = []
    skewed = [w for w in plain if w.routing.startswith("power-law")] or plain
    if skewed:
        wanted.append(min(skewed, key=lambda w: (abs(w.n_tokens - DECODE_TOKENS), abs(w.n_experts - 64))))
        wanted.append(min(skewed, key=lambda w: (abs(w.n_tokens - PREFILL_TOKENS), w.n_experts)))
    if preset != "quick":
        replayed = [w for w in layers if w.access == "resident" and w.launch == "graph"]
        eager, graph = _curves(plain, replayed, wanted)
        like = next(iter([*eager, *graph]), None)
        wanted += [*eager, *_one_of_each_mode(workloads, like), *graph]
    kept: list[Workload] = []
    for workload in wanted:
        is_small = sum(map(profile_bytes, [*kept, workload])) <= PROFILES_BYTES
        if workload not in kept and len(kept) < MOST[preset] and (is_small or len(kept) < MOST["quick"]):
            kept.append(workload)
    return sorted(kept, key=lambda w: w.launch is not None)


def points_of(folder: Path) -> list[Workload]:
    """The points of a capture to profile: chosen among those that were measured, before that among all."""
    planned = [Workload.from_line(line) for line in store.read_workloads(folder)]
    measured = {point["workload"] for point in store.points(folder)}
    preset = store.read_capture(folder)["settings"]["preset"]
    return chosen_points([w for w in planned if w.id in measured] or planned, preset)


def _curves(
    plain: Sequence[Workload], replayed: Sequence[Workload], first: Sequence[Workload]
) -> tuple[list[Workload], list[Workload]]:
    """The batch sizes of one layer: of the kind with most of them, then with graphs, then that of the first choice."""
    kinds = list(dict.fromkeys((w.shape, w.dtype) for w in [*first, *plain, *replayed]))
    if not kinds:
        return [], []

    def of(kind: tuple[str, str], workloads: Sequence[Workload]) -> list[Workload]:
        return [w for w in workloads if (w.shape, w.dtype) == kind]

    def worth(kind: tuple[str, str]) -> tuple[int, bool]:
        return min(len({w.n_tokens for w in of(kind, plain)}), N_EAGER), bool(of(kind, replayed))

    best = max(kinds, key=worth)
    routing = first[0].routing if first else None
    return _spread(of(best, plain), N_EAGER, routing), _spread(of(best, replayed), N_GRAPH, routing)


def _spread(workloads: Sequence[Workload], n_most: int, routing: str | None) -> list[Workload]:
    """Some batch sizes, the smallest and the largest among them and the rest evenly between, one workload of each.

    Of the given routing where there is one: a single token has the same counts in all, and is planned for one.
    """
    sizes = {w.n_tokens: w for w in sorted(workloads, key=lambda w: w.routing == routing)}
    ordered = [sizes[n] for n in sorted(sizes)]
    if len(ordered) <= n_most:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (n_most - 1))] for i in range(n_most)]


def _one_of_each_mode(workloads: Sequence[Workload], like: Workload | None) -> list[Workload]:
    """For each planned access mode the workload that is most like a layer, half of it offloaded, in decoding."""

    def strangeness(w: Workload) -> tuple[object, ...]:
        is_other = like is not None and (w.shape, w.dtype) != (like.shape, like.dtype)
        residency = RESIDENCIES.index(w.residency) if w.residency in RESIDENCIES else len(RESIDENCIES)
        is_small = w.n_tokens < DECODE_TOKENS
        far = abs(w.n_tokens - DECODE_TOKENS)
        return w.op != "moe_layer", w.launch is not None, is_other, residency, abs(w.offload_frac - 0.5), is_small, far

    modes = [[w for w in workloads if w.access == access] for access in ACCESS_MODES if access != "resident"]
    return [min(mode, key=strangeness) for mode in modes if mode]


def in_the_way(environ: Mapping[str, str]) -> str | None:
    """A sentence when variables say that another profiler is loaded into this process; null when none does.

    CUDA's activity tracing has one subscriber: with another one there, torch's profiler records no kernel, silently.
    """
    found = [name for name in INJECTORS if environ.get(name)]
    if not found:
        return None
    return (
        f"{' and '.join(found)} {'is' if len(found) == 1 else 'are'} set: another profiler is loaded into this process "
        "and may hold the device's tracing, of which there is one"
    )
