"""Which workloads a sweep measures: a grid of shapes, batch sizes, routings and operations, or the points of a file.

Needs no torch.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from perfmodel import moe
from perfmodel.errors import InputError
from perfmodel.moe import MoEShape
from perfmodel.routing import Shares

from .workloads import Workload, file_shares, scaled_shape, workload

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float8_e4m3fn": "fp8"}  # torch name -> name in captures
DEVICES = ("cpu", "cuda")
ROUTINGS = ("uniform", "power-law:1.2", "mmlu-like")

# Catalogue models at 1/divisor of their widths: experts, top-k and the ratio of widths stay. One fp32 layer takes 17 to
# 354 MB; mixtral-8x22b/6 is there because wide experts reach the compute roof.
CPU_SHAPES = (
    "mixtral-8x7b/8",
    "olmoe/4",
    "qwen3-30b-a3b/4",
    "deepseek-v2/8",
    "deepseek-v3/14",
    "glm-4.5-air/8",
    "gpt-oss-120b/6",
    "llama-4-scout/10",
    "mixtral-8x22b/6",
)
QUICK_CPU_SHAPES = CPU_SHAPES[:4]
CPU_TOKENS, QUICK_CPU_TOKENS = (1, 4, 16, 64, 256, 1024), (1, 16, 256)
CUDA_TOKENS, QUICK_CUDA_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536), (1, 64, 4096)
QUICK_CUDA_SHAPES = ("olmoe", "qwen3-30b-a3b", "deepseek-v2-lite", "mixtral-8x7b")


@dataclass(frozen=True)
class Request:
    """What the user asked to sweep, defaults filled in; `routing_files` are `FILE[#KEY][@LAYER]`."""

    device: str
    dtype: str
    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    routings: tuple[str, ...] = ROUTINGS
    routing_files: tuple[str, ...] = ()
    seed: int = 0
    points: tuple["PlannedPoint", ...] = ()  # measured instead of the grid, in this order


@dataclass(frozen=True)
class PlannedPoint:
    """One resident point of a file: the layer, the grouped GEMM (K, N) or null for all of it, and its batch."""

    shape: MoEShape
    gemm: tuple[int, int] | None
    n_tokens: int
    routing: str
    launch: str | None


@dataclass(frozen=True)
class Plan:
    """The workloads of a sweep in canonical order, and a sentence for each group that does not fit in memory."""

    workloads: tuple[Workload, ...]
    skipped: tuple[str, ...]


def default_shapes(device: str, quick: bool) -> tuple[str, ...]:
    """The shapes a sweep takes when none are named."""
    if device == "cpu":
        return QUICK_CPU_SHAPES if quick else CPU_SHAPES
    # `poster` is a reading of an unpublished shape, not a model.
    return QUICK_CUDA_SHAPES if quick else tuple(name for name in moe.names() if name != "poster")


def default_tokens(device: str, quick: bool) -> tuple[int, ...]:
    """The batch sizes a sweep takes when none are named."""
    if device == "cpu":
        return QUICK_CPU_TOKENS if quick else CPU_TOKENS
    return QUICK_CUDA_TOKENS if quick else CUDA_TOKENS


def _ops(shape: MoEShape, with_down: bool) -> Iterator[tuple[str, tuple[int, int] | None]]:
    gate_up, down = shape.gemms
    yield "grouped_gemm", gate_up
    if with_down:
        yield "grouped_gemm", down
    yield "moe_layer", None


def _of_shape(request: Request, shape: MoEShape, files: Mapping[str, Shares]) -> Iterator[Workload]:
    routings = [*request.routings, *(name for name, shares in files.items() if shares.shape[1] == shape.n_experts)]
    for n_tokens in request.tokens:
        # One token selects top-k experts once each under every routing: measured once.
        for routing in routings if n_tokens > 1 else routings[:1]:
            for op, gemm in _ops(shape, with_down=routing == routings[0]):
                yield workload(shape, op, gemm, n_tokens, routing, request.device, request.seed, files)


def plan(request: Request, memory_limit_bytes: float | None) -> Plan:
    """The workloads of a request; those whose weights and activations exceed the limit are left out, saying so.

    Raises InputError when nothing is left, on unknown names, and when a routing file matches no shape.
    """
    files = file_shares(request.routing_files)
    if request.points:
        return _of_points(request, memory_limit_bytes, files)
    shapes = [scaled_shape(name, DTYPES[request.dtype]) for name in request.shapes]
    for name, shares in files.items():
        if all(shape.n_experts != shares.shape[1] for shape in shapes):
            raise InputError(f"routing {name} is for {shares.shape[1]} experts, and no shape here has that many")
    kept: list[Workload] = []
    skipped: list[str] = []
    for shape in shapes:
        left_out = set()
        for one in _of_shape(request, shape, files):
            needed = shape.layer_bytes + one.activation_bytes
            if memory_limit_bytes is not None and needed > memory_limit_bytes:
                left_out.add(one.n_tokens)
            else:
                kept.append(one)
        if left_out:
            skipped.append(f"{shape.name} with {', '.join(map(str, sorted(left_out)))} tokens does not fit in memory")
    if not kept:
        raise InputError(f"nothing to measure: {'; '.join(skipped)}")
    return Plan(tuple(kept), tuple(skipped))


def read_points(path: str | Path) -> tuple[PlannedPoint, ...]:
    """The points of a file that `perfmodel design --out` writes: one JSON object a line (docs/captures.md).

    Raises InputError naming the first line that is none, and where points have several dtypes.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the points of {str(path)!r} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(_point(json.loads(line)))
        except (ValueError, KeyError, TypeError, InputError) as error:
            raise InputError(f"{Path(path).name}, line {number}, is no point of a plan: {error!r}") from None
    dtypes = sorted({point.shape.dtype for point in found})
    if len(dtypes) != 1:
        raise InputError(f"{Path(path).name} has points of {len(dtypes)} dtypes, expected one")
    return tuple(found)


def _point(line: dict[str, Any]) -> PlannedPoint:
    n_experts, top_k, hidden, inter, n_gemms = (
        int(line[key]) for key in ("n_experts", "top_k", "hidden", "inter", "n_gemms")
    )
    shape = MoEShape(str(line["shape"]), n_experts, top_k, hidden, inter, n_gemms, dtype=str(line["dtype"]))
    is_layer = line["op"] == "moe_layer"
    gemm = None if is_layer else (int(line["gemm_k"]), int(line["gemm_n"]))
    if not is_layer and (line["op"] != "grouped_gemm" or gemm not in shape.gemms):
        raise InputError(f"op {line['op']!r} of {gemm}, expected moe_layer, or grouped_gemm of {shape.gemms}")
    launch = line.get("launch")
    if launch not in (None, "graph"):
        raise InputError(f"launch {launch!r}, expected graph or none")
    return PlannedPoint(shape, gemm, int(line["n_tokens"]), str(line["routing"]), launch)


def _of_points(request: Request, memory_limit_bytes: float | None, files: Mapping[str, Shares]) -> Plan:
    kept: dict[str, Workload] = {}
    skipped = []
    for point in request.points:
        op = "moe_layer" if point.gemm is None else "grouped_gemm"
        one = workload(point.shape, op, point.gemm, point.n_tokens, point.routing, request.device, request.seed, files)
        one = replace(one, launch=point.launch)
        if memory_limit_bytes is not None and point.shape.layer_bytes + one.activation_bytes > memory_limit_bytes:
            skipped.append(f"{point.shape.name} with {point.n_tokens} tokens does not fit in memory")
        else:
            kept.setdefault(one.id, one)
    if not kept:
        raise InputError(f"nothing to measure: {'; '.join(skipped)}")
    return Plan(tuple(kept.values()), tuple(skipped))


def run_order(workloads: Sequence[Workload], seed: int, run: int, block: int | None = None) -> list[Workload]:
    """The order of a run: a shuffle of its own, so that drift of the machine does not line up with a shape.

    With `block`, only neighbours are shuffled, that many at a time: the order still tells what comes first.
    """
    rng, size = np.random.default_rng((seed, run)), block or len(workloads)
    blocks = [workloads[first : first + size] for first in range(0, len(workloads), size)]
    return [part[i] for part in blocks for i in rng.permutation(len(part))]
