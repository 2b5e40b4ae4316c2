"""The GH200 study (ISC 2026 poster): which mechanisms agree with its two slowdowns, and what would tell them apart.

Makes docs/gh200-study.md. Everything here is a prediction under stated constants; nothing was measured. Times are ns.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from io import StringIO
from pathlib import Path

import numpy as np

from perfmodel import moe
from perfmodel.hardware import hardware
from perfmodel.moe import MoEShape
from perfmodel.placement import place
from perfmodel.predict import Basis, Prediction, basis_of, predict_placement
from perfmodel.routing import Routing, expected_counts, read_shares, routing, routing_keys

from .constants import ASSUMED, OffloadConstants

MACHINE, SHAPE, PATTERN = "gh200", "poster", "mmlu-like"
WITHIN_FRAC = 0.05  # an answer this near to a published slowdown agrees with it: they are given to two digits


@dataclass(frozen=True)
class Point:
    """One published slowdown: a fraction of experts offloaded, least used first, in a batch of rows."""

    offload_frac: float
    n_tokens: int
    slowdown: float


# ISC 2026 poster on GH200 grouped GEMM with experts in CPU memory, headline results under routing of MMLU.
PUBLISHED = (Point(0.3125, 65_536, 1.5), Point(0.5, 524_288, 1.4))


@dataclass(frozen=True)
class Mechanism:
    """A way in which offloaded experts may have cost what they did: an access mode with constants, in words."""

    words: str
    access: str
    constants: OffloadConstants = ASSUMED
    residency: str | None = None
    scaled: tuple[str, ...] = ("link_eff",)  # its rates, which `best_rate` lets free


MECHANISMS = (
    Mechanism("read in place, again for some later blocks of rows (the defaults)", "zero-copy"),
    Mechanism("the same in two launches, one for each memory", "zero-copy", residency="split"),
    Mechanism("read in place, once (perfect reuse)", "zero-copy", replace(ASSUMED, reread_frac=0.0)),
    Mechanism("read in place, again for every block (no reuse)", "zero-copy", replace(ASSUMED, reread_frac=1.0)),
    Mechanism("copied, then computed", "copy", scaled=("copy_eff",)),
    Mechanism("copied while others are computed", "copy-overlap", scaled=("copy_eff",)),
    Mechanism("cached in the memory that is left, least recently used out", "paged", scaled=("copy_eff",)),
    Mechanism("computed by the CPU", "cpu", scaled=("host_eff_compute", "host_eff_memory")),
)
REREAD, REUSE, COPY = MECHANISMS[0], MECHANISMS[2], MECHANISMS[4]


@cache
def _setting(shape: str) -> tuple[MoEShape, Basis]:
    made = moe.shape(shape)
    return made, basis_of(hardware(MACHINE), made, None)


@cache
def _batch(n_experts: int, top_k: int, n_tokens: int) -> Routing:
    return routing(PATTERN, n_experts, top_k, n_tokens)


def predicted(
    point: Point,
    mechanism: Mechanism = REREAD,
    *,
    shape: str = SHAPE,
    batch: Routing | None = None,
    policy: str = "ascending",
) -> Prediction:
    """The prediction at a point under a mechanism, for the bare grouped GEMMs of a catalogue shape."""
    made, basis = _setting(shape)
    batch = batch or _batch(made.n_experts, made.top_k, point.n_tokens)
    device = replace(basis.device, offload=mechanism.constants, residency=mechanism.residency, shares=batch.popularity)
    placement = place(batch.popularity, point.offload_frac, policy)
    return predict_placement(replace(basis, device=device), made, batch, placement, mechanism.access)


def slowdowns(mechanism: Mechanism, *, shape: str = SHAPE) -> tuple[float, float]:
    """The slowdowns at both published points."""
    first, second = (predicted(point, mechanism, shape=shape).slowdown for point in PUBLISHED)
    return first, second


def agrees(found: Sequence[float]) -> bool:
    """Whether both slowdowns are within WITHIN_FRAC of the published ones."""
    return all(_is_near(s, p) for s, p in zip(found, PUBLISHED, strict=True))


def _is_near(slowdown: float, point: Point) -> bool:
    return abs(slowdown / point.slowdown - 1) <= WITHIN_FRAC


def best_rate(mechanism: Mechanism) -> tuple[float, float] | None:
    """The factor on a mechanism's rates with which it meets the first published point exactly, and the slowdown it then
    has at the second; null where no factor from 1/30 to 30 does."""

    def at(factor: float) -> Mechanism:
        scaled = {name: getattr(mechanism.constants, name) * factor for name in mechanism.scaled}
        return replace(mechanism, constants=replace(mechanism.constants, **scaled))

    low, high = np.log(1 / 30), np.log(30.0)
    first = PUBLISHED[0]
    if not predicted(first, at(np.exp(low))).slowdown >= first.slowdown >= predicted(first, at(np.exp(high))).slowdown:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        is_slow = predicted(first, at(np.exp(middle))).slowdown > first.slowdown
        low, high = (middle, high) if is_slow else (low, middle)
    factor = float(np.exp((low + high) / 2))
    return factor, predicted(PUBLISHED[1], at(factor)).slowdown


REREAD_FRACS = tuple(round(0.05 * i, 2) for i in range(21))
REREAD_ROWS = (128.0, 256.0, 512.0)
OVERLAPS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)
LINK_EFFS = (0.8, 0.9, 1.0, 1.1)


def settings_that_agree() -> tuple[list[OffloadConstants], int]:
    """Of a grid of constants of reading in place, those that agree with both points, and how many there are in all."""
    grid = [
        replace(ASSUMED, reread_frac=frac, reread_rows=rows, link_overlap_frac=overlap, link_eff=eff)
        for frac in REREAD_FRACS
        for rows in REREAD_ROWS
        for overlap in OVERLAPS
        for eff in LINK_EFFS
    ]
    n_settings = len(grid)
    for point in PUBLISHED:  # most fail at the first
        grid = [one for one in grid if _is_near(predicted(point, replace(REREAD, constants=one)).slowdown, point)]
    return grid, n_settings


BATCHES = tuple(4**i for i in range(5, 12))


def slowdowns_by_batch(mechanism: Mechanism, offload_frac: float) -> list[float]:
    """The slowdown at each of BATCHES with a fraction of experts offloaded."""
    return [predicted(Point(offload_frac, n, 1.0), mechanism).slowdown for n in BATCHES]


ONE_EXPERT_ROWS = (1, 64, 256, 1024, 4096, 16_384, 65_536)


def one_expert(mechanism: Mechanism | None, rows: Iterable[int] = ONE_EXPERT_ROWS) -> list[float]:
    """Latency against rows on one expert while the others are idle, ns, that expert offloaded; null: all resident."""
    made = moe.shape(SHAPE)
    found = []
    for n in rows:
        counts = np.zeros((1, made.n_experts), dtype=np.int64)
        counts[0, 0] = n
        batch = Routing("one expert", counts, n, 1)
        frac = 0.0 if mechanism is None else 1 / made.n_experts
        point = Point(frac, n, 1.0)
        found.append(predicted(point, mechanism or REREAD, batch=batch, policy="descending").latency_ns)
    return found


def slope_ns_per_row(mechanism: Mechanism | None) -> float:
    """How much one more row on the only busy, offloaded expert costs when it has many."""
    low, high = one_expert(mechanism, (32_768, 65_536))
    return (high - low) / 32_768


def measured_routing(path: str | Path, model: str = "olmoe-1b-7b") -> list[dict[str, object]]:
    """Both slowdowns for each domain and layer of measured routing counts, `MODEL__DOMAIN` in an .npz, of a shape with
    as many experts as the study's reading; one row each, with the share of the rows that offloaded experts receive."""
    found: list[dict[str, object]] = []
    for key in sorted(routing_keys(str(path))):
        if key.partition("__")[0] != model:
            continue
        shares = read_shares(f"{path}#{key}")
        for layer in range(len(shares)):
            row: dict[str, object] = {"model": model, "domain": key.partition("__")[2], "layer": layer}
            own = shares[layer : layer + 1]
            for number, point in enumerate(PUBLISHED, 1):
                batch = Routing(key, expected_counts(own, point.n_tokens, 1), point.n_tokens, 1, own)
                gone = place(batch.popularity, point.offload_frac).offloaded
                row[f"cold_share_{number}"] = float(own[gone].sum())
                row[f"slowdown_{number}"] = predicted(point, batch=batch).slowdown
            found.append(row)
    return found


def to_csv(rows: Sequence[dict[str, object]]) -> str:
    """Rows as CSV, numbers with four significant digits."""
    out = StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return out.getvalue()
