"""Which workloads a sweep measures: shapes, batch sizes, routings and operations, each with an id made of its content.

Needs no torch. A workload has the same id on every machine, and its token counts are part of it.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perfmodel import moe
from perfmodel.errors import InputError
from perfmodel.moe import WEIGHT_BYTES, MoEShape
from perfmodel.routing import PATTERNS, Shares, pattern_shares, read_shares, sample_choices

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float8_e4m3fn": "fp8"}  # torch name -> name in captures
DEVICES = ("cpu", "cuda")
OPS = ("grouped_gemm", "moe_layer")
# Where the weights of offloaded experts are and who reads them (docs/captures.md); `resident`: nothing is offloaded.
ACCESS_MODES = ("resident", "zero-copy", "copy", "copy-overlap", "cpu")
# How zero-copy sees one layer in two memories: one tensor whose pages lie in both, one launch for each memory, or
# plain system memory on a coherent machine.
RESIDENCIES = ("mapped", "split", "system")
ORDERS = ("ascending", "descending", "random")  # routing probability of the experts that are offloaded first
ROUTINGS = ("uniform", "power-law:1.2", "mmlu-like")
WIDTH_STEP = 16  # grouped GEMM wants rows of a multiple of 16 bytes; 16 elements serve every dtype

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
class Workload:
    """One planned point; `tokens_per_expert` sums to n_tokens x top_k, `gemm_k` and `gemm_n` are null for a layer.

    `offloaded` are the ids of the experts in host memory, null when all are resident, then in ascending or another
    `order` of routing probability; `residency` says how zero-copy was realised; `launch` is `graph` when calls are
    replayed from a CUDA graph, null when each is launched by the host.
    """

    op: str
    shape: str
    n_experts: int
    top_k: int
    hidden: int
    inter: int
    n_gemms: int
    gemm_k: int | None
    gemm_n: int | None
    dtype: str
    device: str
    n_tokens: int
    routing: str
    seed: int
    tokens_per_expert: tuple[int, ...]
    access: str = "resident"
    offload_frac: float = 0.0
    # Null for what does not apply, and then no part of the id: ids of older captures stay what they were.
    offloaded: tuple[int, ...] | None = None
    order: str | None = None
    residency: str | None = None
    launch: str | None = None

    @property
    def content(self) -> dict[str, object]:
        """The fields that make the workload what it is: all but the null ones that came after the first captures."""
        later = ("offloaded", "order", "residency", "launch")
        return {key: value for key, value in asdict(self).items() if key not in later or value is not None}

    @property
    def id(self) -> str:
        """12 hexadecimal digits of the content: equal workloads have equal ids, on any machine."""
        content = json.dumps(self.content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @property
    def moe_shape(self) -> MoEShape:
        """The layer this workload belongs to."""
        return MoEShape(self.shape, self.n_experts, self.top_k, self.hidden, self.inter, self.n_gemms, dtype=self.dtype)

    @property
    def touched_bytes(self) -> float:
        """Weight bytes one call reads: those of the experts that receive tokens."""
        per_expert = self.moe_shape.expert_bytes
        if self.gemm_k is not None and self.gemm_n is not None:
            per_expert = self.gemm_k * self.gemm_n * WEIGHT_BYTES[self.dtype]
        return sum(count > 0 for count in self.tokens_per_expert) * per_expert

    @property
    def activation_bytes(self) -> float:
        """Upper estimate of the bytes of activations alive in one call."""
        rows = self.n_tokens * self.top_k
        return rows * (3 * self.hidden + 2 * self.n_gemms * self.inter) * WEIGHT_BYTES[self.dtype]

    def to_line(self) -> dict[str, object]:
        """The line of workloads.jsonl."""
        return {"workload": self.id, **self.content}


@dataclass(frozen=True)
class Request:
    """What the user asked to sweep, defaults filled in; `routing_file` is `FILE` or `FILE#KEY`."""

    device: str
    dtype: str
    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    routings: tuple[str, ...] = ROUTINGS
    routing_file: str | None = None
    seed: int = 0


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


def scaled_shape(name: str, dtype: str) -> MoEShape:
    """The shape `MODEL` or `MODEL/DIVISOR`: catalogue widths over the divisor, to the nearest multiple of 16.

    Experts, top-k and number of GEMMs stay those of the model. Raises InputError on an unknown model or bad divisor.
    """
    model, _, words = name.partition("/")
    base = moe.shape(model)
    if words and (not words.isdecimal() or int(words) < 1):
        raise InputError(f"shape {name!r}: the divisor is {words!r}, expected a whole number of at least 1")
    divisor = int(words) if words else 1

    def width(full: int) -> int:
        return max(WIDTH_STEP, round(full / divisor / WIDTH_STEP) * WIDTH_STEP)

    return replace(base, name=name, hidden=width(base.hidden), inter=width(base.inter), dtype=dtype, n_layers=1)


def choices(workload: Workload, shares: Shares | None = None) -> NDArray[np.int64]:
    """Experts each token selects, `[token, top_k]`; `shares` are those of the routing file, for its workloads only."""
    n_tokens, n_experts, top_k = workload.n_tokens, workload.n_experts, workload.top_k
    if workload.routing == "uniform":  # balanced: consecutive experts, round and round
        flat = np.arange(n_tokens * top_k, dtype=np.int64) % n_experts
        return flat.reshape(n_tokens, top_k)
    if shares is None:
        shares = pattern_shares(workload.routing, n_experts)
    return sample_choices(shares, n_tokens, top_k, workload.seed)


def routing_name(source: str) -> str:
    """How a routing file is called in a capture: its file name and key, never its folder."""
    file, _, key = source.partition("#")
    return f"file:{Path(file).name}" + (f"#{key}" if key else "")


def file_shares(source: str | None) -> Shares | None:
    """Shares of the first layer of a routing file, `[1, expert]`, or None without a file."""
    return None if source is None else read_shares(source)[:1]


def workload_seed(shape: MoEShape, n_tokens: int, routing: str, seed: int) -> int:
    """The seed of a draw: the same for all operations of a shape, batch size and routing, so that parts compare."""
    content = f"{shape.name}|{shape.n_experts}|{shape.top_k}|{n_tokens}|{routing}|{seed}"
    return int(hashlib.sha256(content.encode()).hexdigest()[:7], 16)


def _ops(shape: MoEShape, with_down: bool) -> Iterator[tuple[str, int | None, int | None]]:
    gate_up, down = shape.gemms
    yield "grouped_gemm", *gate_up
    if with_down:
        yield "grouped_gemm", *down
    yield "moe_layer", None, None


def _of_shape(request: Request, shape: MoEShape, shares: Shares | None) -> Iterator[Workload]:
    routings = list(request.routings)
    if request.routing_file is not None and shares is not None and shares.shape[1] == shape.n_experts:
        routings.append(routing_name(request.routing_file))
    for n_tokens in request.tokens:
        # One token selects top-k experts once each under every routing: measured once.
        for routing in routings if n_tokens > 1 else routings[:1]:
            seed = workload_seed(shape, n_tokens, routing, request.seed)
            for op, gemm_k, gemm_n in _ops(shape, with_down=routing == routings[0]):
                empty = Workload(
                    op, shape.name, shape.n_experts, shape.top_k, shape.hidden, shape.inter, shape.n_gemms,
                    gemm_k, gemm_n, shape.dtype, request.device, n_tokens, routing, seed, (),
                )  # fmt: skip
                drawn = choices(empty, None if routing.partition(":")[0] in PATTERNS else shares)
                counts = np.bincount(drawn.ravel(), minlength=shape.n_experts)
                yield replace(empty, tokens_per_expert=tuple(counts.tolist()))


def plan(request: Request, memory_limit_bytes: float | None) -> Plan:
    """The workloads of a request; those whose weights and activations exceed the limit are left out, saying so.

    Raises InputError when nothing is left, on unknown names, and when the routing file matches no shape.
    """
    shares = file_shares(request.routing_file)
    shapes = [scaled_shape(name, DTYPES[request.dtype]) for name in request.shapes]
    if shares is not None and all(shape.n_experts != shares.shape[1] for shape in shapes):
        raise InputError(f"the routing file is for {shares.shape[1]} experts, and no shape of the sweep has that many")
    kept: list[Workload] = []
    skipped: list[str] = []
    for shape in shapes:
        left_out = set()
        for workload in _of_shape(request, shape, shares):
            needed = shape.layer_bytes + workload.activation_bytes
            if memory_limit_bytes is not None and needed > memory_limit_bytes:
                left_out.add(workload.n_tokens)
            else:
                kept.append(workload)
        if left_out:
            skipped.append(f"{shape.name} with {', '.join(map(str, sorted(left_out)))} tokens does not fit in memory")
    if not kept:
        raise InputError(f"nothing to measure: {'; '.join(skipped)}")
    return Plan(tuple(kept), tuple(skipped))


def run_order(workloads: Sequence[Workload], seed: int, run: int) -> list[Workload]:
    """The order of a run: a shuffle of its own, so that drift of the machine does not line up with a shape."""
    return [workloads[i] for i in np.random.default_rng((seed, run)).permutation(len(workloads))]


def span(counts: Sequence[int]) -> int:
    """How many neighbouring experts, counted around the circle, hold all tokens."""
    active = np.flatnonzero(counts)
    if not len(active):
        return 0
    gaps = np.diff(np.append(active, active[0] + len(counts)))
    return len(counts) - int(gaps.max()) + 1


def rotation(workload: Workload, cold_bytes: float, max_copies: int) -> tuple[int, int]:
    """Weight copies and shifts within a copy, so that calls read `cold_bytes` of weights before any is read again.

    Shifting the experts by the span of the active ones reaches fresh weights in the same copy; copies do the rest.
    """
    n_shifts = max(1, workload.n_experts // span(workload.tokens_per_expert))
    n_positions = int(-(-cold_bytes // workload.touched_bytes)) + 1
    n_copies = max(1, min(max_copies, -(-n_positions // n_shifts)))
    return n_copies, min(n_shifts, -(-n_positions // n_copies))


def pool_bytes(workloads: Sequence[Workload], cold_bytes: float, limit_bytes: float) -> int:
    """Size of the one weight buffer all workloads view: what the neediest rotation takes, at most the limit."""
    needed = 0.0
    for workload in workloads:
        layer_bytes = workload.moe_shape.layer_bytes
        most = max(1, int(limit_bytes // layer_bytes))
        needed = max(needed, rotation(workload, cold_bytes, most)[0] * layer_bytes)
    return int(needed)
