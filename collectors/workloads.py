"""One point of a measurement: its shape, batch, routing and placement, with an id made of its content.

Needs no torch. A workload has the same id on every machine, and its token counts are part of it.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfmodel import moe
from perfmodel.errors import InputError
from perfmodel.moe import ACTIVATION_BYTES, WEIGHT_BYTES, MoEShape
from perfmodel.routing import Shares, expected_counts, layer_shares, pattern_shares, sample_choices
from perfmodel.text import short_name

OPS = ("grouped_gemm", "moe_layer")
# Where the weights of offloaded experts are and who reads them (docs/captures.md); `resident`: nothing is offloaded.
ACCESS_MODES = ("resident", "zero-copy", "copy", "copy-overlap", "cpu")
# How zero-copy sees one layer in two memories: one tensor whose pages lie in both, one launch for each memory, or
# plain system memory on a coherent machine.
RESIDENCIES = ("mapped", "split", "system")
ORDERS = ("ascending", "descending", "random")  # routing probability of the experts that are offloaded first
WIDTH_STEP = 16  # grouped GEMM wants rows of a multiple of 16 bytes; 16 elements serve every dtype
GRID_SHAPE = re.compile(r"e(\d{1,4})-k(\d{1,3})-h(\d{1,6})-i(\d{1,6})")
MAX_DRAWN = 1 << 20  # tokens x experts above which a batch is dealt out from its expected counts


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
        return short_name(self.content)

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
    def gemm_flops(self) -> float:
        """FLOPs of the grouped GEMMs of one call."""
        if self.gemm_k is not None and self.gemm_n is not None:
            return moe.gemm_flops(self.n_tokens * self.top_k, self.gemm_k, self.gemm_n)
        return moe.layer_flops(self.moe_shape, self.n_tokens)

    @property
    def activation_bytes(self) -> float:
        """Upper estimate of the bytes of activations alive in one call."""
        rows, element = self.n_tokens * self.top_k, ACTIVATION_BYTES.get(self.dtype, 2.0)
        if self.gemm_k is not None and self.gemm_n is not None:
            return rows * (self.gemm_k + self.gemm_n) * element
        return rows * (3 * self.hidden + 2 * self.n_gemms * self.inter) * element

    def to_line(self) -> dict[str, object]:
        """The line of workloads.jsonl."""
        return {"workload": self.id, **self.content}

    @staticmethod
    def from_line(line: Mapping[str, Any]) -> "Workload":
        """The workload of a line of workloads.jsonl; what else the line says is left aside."""
        values = {field.name: line[field.name] for field in fields(Workload) if field.name in line}
        for key in ("tokens_per_expert", "offloaded"):
            values[key] = None if values.get(key) is None else tuple(values[key])
        return Workload(**values)


def scaled_shape(name: str, dtype: str) -> MoEShape:
    """The shape `MODEL`, `MODEL/DIVISOR` or `eE-kK-hH-iI`, such as `e64-k8-h2048-i1024`, a gated shape of its own.

    A divisor takes catalogue widths over it, to the nearest multiple of 16; experts, top-k and number of GEMMs stay
    those of the model. Raises InputError on an unknown model or bad numbers.
    """
    if found := GRID_SHAPE.fullmatch(name):
        n_experts, top_k, hidden, inter = map(int, found.groups())
        if hidden % WIDTH_STEP or inter % WIDTH_STEP:
            raise InputError(f"shape {name!r}: widths {hidden} and {inter} must be multiples of {WIDTH_STEP}")
        return MoEShape(name, n_experts, top_k, hidden, inter, dtype=dtype)
    model, _, words = name.partition("/")
    base = moe.shape(model)
    if words and (not words.isdecimal() or int(words) < 1):
        raise InputError(f"shape {name!r}: the divisor is {words!r}, expected a whole number of at least 1")
    divisor = int(words) if words else 1

    def width(full: int) -> int:
        return max(WIDTH_STEP, round(full / divisor / WIDTH_STEP) * WIDTH_STEP)

    return replace(base, name=name, hidden=width(base.hidden), inter=width(base.inter), dtype=dtype, n_layers=1)


def choices(workload: Workload, shares: Shares | None = None) -> NDArray[np.int64]:
    """Experts each token selects, `[token, top_k]`; `shares` are those of a routing file, for its workloads only.

    Drawn at random, but for batches so large that draws agree with their expected counts: those are dealt out.
    """
    n_tokens, n_experts, top_k = workload.n_tokens, workload.n_experts, workload.top_k
    if workload.routing == "uniform":  # balanced: consecutive experts, round and round
        flat = np.arange(n_tokens * top_k, dtype=np.int64) % n_experts
        return flat.reshape(n_tokens, top_k)
    if shares is None:
        shares = pattern_shares(workload.routing, n_experts)
    if n_tokens * n_experts <= MAX_DRAWN:
        return sample_choices(shares, n_tokens, top_k, workload.seed)
    # Column by column, so that no token meets an expert twice: an expert has at most n_tokens rows.
    dealt = np.repeat(np.arange(n_experts, dtype=np.int64), expected_counts(shares, n_tokens, top_k)[0])
    return np.ascontiguousarray(dealt.reshape(top_k, n_tokens).T)


def routing_name(source: str) -> str:
    """How a routing file is called in a capture: its file name, key and layer, never its folder."""
    file, sign, rest = source.partition("#")
    if not sign:
        file, sign, rest = source.partition("@")
    return f"file:{Path(file).name}{sign}{rest}"


def file_shares(sources: Sequence[str]) -> dict[str, Shares]:
    """Shares `[1, expert]` of routing files `FILE[#KEY][@LAYER]`, by the routing's name in the capture."""
    return {routing_name(source): layer_shares(source) for source in sources}


def shares_of(routing: str, n_experts: int, files: Mapping[str, Shares]) -> Shares:
    """Long-run shares `[1, expert]` of a routing, of a file or a pattern."""
    return files[routing] if routing in files else pattern_shares(routing, n_experts)


def offloaded_experts(shares: Shares, frac: float, order: str, seed: int) -> tuple[int, ...]:
    """The ids of the experts to offload first, sorted: the least probable (`ascending`), the most, or any of them."""
    n_experts = shares.shape[1]
    n_offloaded = round(frac * n_experts)
    if order == "random":
        ranked = np.random.default_rng(seed).permutation(n_experts)
    else:
        ranked = np.argsort(shares[0] if order == "ascending" else -shares[0], kind="stable")
    return tuple(sorted(ranked[:n_offloaded].tolist()))


def workload_seed(shape: MoEShape, n_tokens: int, routing: str, seed: int) -> int:
    """The seed of a draw: the same for all operations of a shape, batch size and routing, so that parts compare."""
    content = f"{shape.name}|{shape.n_experts}|{shape.top_k}|{n_tokens}|{routing}|{seed}"
    return int(hashlib.sha256(content.encode()).hexdigest()[:7], 16)


@cache
def _counts(draw: Workload, shares: bytes | None) -> tuple[int, ...]:
    array = None if shares is None else np.frombuffer(shares).reshape(1, -1)
    return tuple(np.bincount(choices(draw, array).ravel(), minlength=draw.n_experts).tolist())


def workload(
    shape: MoEShape, op: str, gemm: tuple[int, int] | None, n_tokens: int, routing: str, device: str,
    seed: int, files: Mapping[str, Shares],
) -> Workload:  # fmt: skip
    """A resident workload with its counts drawn; `gemm` is (K, N) of a single grouped GEMM, null for a whole layer."""
    draw_seed = workload_seed(shape, n_tokens, routing, seed)
    # Operations, dtypes and widths of one batch share their draw.
    draw = Workload("", "", shape.n_experts, shape.top_k, 0, 0, 3, None, None, "", "", n_tokens, routing, draw_seed, ())
    shares = files.get(routing)
    gemm_k, gemm_n = gemm or (None, None)
    counts = _counts(draw, None if shares is None else shares.tobytes())
    return Workload(
        op, shape.name, shape.n_experts, shape.top_k, shape.hidden, shape.inter, shape.n_gemms,
        gemm_k, gemm_n, shape.dtype, device, n_tokens, routing, draw_seed, counts,
    )  # fmt: skip


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
    Offloaded experts are where they are, so there only copies rotate. A call that reads twice as much by itself has
    pushed out its own first weights: one copy serves, and the largest layers leave memory for activations.
    """
    if workload.touched_bytes >= 2 * cold_bytes:
        return 1, 1
    n_shifts = 1 if workload.offloaded else max(1, workload.n_experts // span(workload.tokens_per_expert))
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
