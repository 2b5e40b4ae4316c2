"""Which matrix products did a trace record, and how near did each come to the roof of the machine."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod

import numpy as np
import polars as pl

from perfmodel.attribution import attributed
from perfmodel.classify import GEMMS, classify
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile
from perfmodel.intervals import THREAD, holders, parents
from perfmodel.launch import call_starts
from perfmodel.physics import COMPUTES_IN, attainable_flops_per_s, ceilings
from perfmodel.readers.ncu import TO_COLLECT
from perfmodel.text import NS_PER_S
from perfmodel.trace import DEVICE_KINDS, Trace

# Operators that multiply matrices -> the places of both factors, and of a summand, among their operands.
PRODUCTS: dict[str, tuple[int, int, int | None]] = {
    "aten::mm": (0, 1, None),
    "aten::addmm": (1, 2, 0),
    "aten::_addmm_activation": (1, 2, 0),
    "aten::bmm": (0, 1, None),
    "aten::baddbmm": (1, 2, 0),
    "aten::linear": (0, 1, 2),
    "aten::matmul": (0, 1, None),
    "aten::_int_mm": (0, 1, None),
    "aten::_scaled_mm": (0, 1, None),
    "aten::_grouped_mm": (0, 1, None),
    "aten::_scaled_grouped_mm": (0, 1, None),
    "aten::_scaled_grouped_mm_v2": (0, 1, None),
}
COUNTS_FROM = pl.Enum(("products inside", "capture"))
TIMED_BY = pl.Enum(("kernels", "operator"))

# Type of an operand as the profiler writes it -> name, bytes of an element, and values that it holds.
_DTYPES = {
    "double": ("fp64", 8, 1),
    "float": ("fp32", 4, 1),
    "c10::BFloat16": ("bf16", 2, 1),
    "c10::Half": ("fp16", 2, 1),
    "c10::Float8_e4m3fn": ("fp8", 1, 1),
    "c10::Float8_e4m3fnuz": ("fp8", 1, 1),
    "c10::Float8_e5m2": ("fp8", 1, 1),
    "c10::Float8_e5m2fnuz": ("fp8", 1, 1),
    "c10::Float4_e2m1fn_x2": ("fp4", 1, 2),
    "signed char": ("int8", 1, 1),
}
_MOST_SIZE, _MOST_DIMS, _MOST = 2**31, 16, 2**63  # of a dim, of dims, of a product's work: more is damage
_RESULT_BYTES = {"fp8": 2, "fp4": 2, "int8": 4}  # of an element of the result, where it is wider than the factors

Dims = list[int]


@dataclass(frozen=True)
class Product:
    """One matrix product by its operands: `batch` products of m x k by k x n, or one whose rows, columns or terms are
    split over `n_experts`. `fixed_bytes` is what moves whatever the split, `expert_bytes` the weights of one expert."""

    m: int
    n: int
    k: int
    batch: int
    n_experts: int | None
    dtype: str | None
    n_flops: int
    fixed_bytes: int | None
    expert_bytes: int | None


def matmuls(trace: Trace, work: pl.DataFrame | None = None) -> pl.DataFrame:
    """Which matrix products did a trace record, how much did each compute and move, and how fast: one row a product.

    Columns `row` (of the operator in EVENTS), `op`, `rank`, `start_ns`, `m`, `n`, `k`, `batch`, `n_experts` (null where
    not grouped), `n_active` (experts with rows) and `counts_from` (where that is known from: the products inside of a
    grouped operator, or the counts that the capture carries), `dtype`, `flops` (2 m n k batch), `bytes` (each operand
    and the result once, weights of active experts only) and `is_upper_bound` (bytes of all experts, since the active
    ones are not known), `n_kernels`, `time_ns`, `timed_by` (its kernels of a GEMM class, or, in a trace without device
    work, the operator), `flops_per_s`, `flops_per_byte`. Of operators inside each other, as linear, matmul and mm, only
    the innermost counts, but a grouped one counts for those inside. Time is null where no kernel is known to be
    of the product: replayed by a graph, launched before the window, or computed on the host beside a device. `work` is
    `attribution.attributed` of the events, if it is known already.
    """
    ops = trace.events.select(
        "kind",
        pl.col("name").alias("op"),
        "inputs",
        *THREAD,
        "start_ns",
        "dur_ns",
        row=pl.int_range(pl.len(), dtype=pl.Int64),
    ).filter(pl.col("kind") == "op", pl.col("inputs").is_not_null())
    products = _outermost_work(ops.join(_described(ops), on=["op", "inputs"], maintain_order="left"))
    counted = _with_active_experts(products, trace)
    n_weights = pl.coalesce("n_active", "n_experts").fill_null(0)
    return (
        counted.with_columns(bytes=pl.col("fixed_bytes") + n_weights * pl.col("expert_bytes"))
        .with_columns(
            is_upper_bound=(pl.col("expert_bytes") > 0)
            & pl.col("n_experts").is_not_null()
            & pl.col("n_active").is_null()
        )
        .join(_times(trace, products, work), on="row", how="left", maintain_order="left")
        .with_columns(pl.col("op").cast(pl.String), **_rates())
        .select(
            *("row", "op", "rank", "start_ns", "m", "n", "k", "batch", "n_experts", "n_active", "counts_from", "dtype"),
            *("flops", "bytes", "is_upper_bound", "n_kernels", "time_ns", "timed_by", "flops_per_s", "flops_per_byte"),
        )
    )


def _rates() -> dict[str, pl.Expr]:
    """How fast was what a row computed, and how much of it for each byte: null without time, without bytes."""
    flops, n_bytes, seconds = pl.col("flops"), pl.col("bytes"), pl.col("time_ns") / NS_PER_S
    return {
        "flops_per_s": pl.when(seconds > 0).then(flops / seconds),
        "flops_per_byte": pl.when(n_bytes > 0).then(flops / n_bytes),
    }


def _described(ops: pl.DataFrame) -> pl.DataFrame:
    """The product that each operator with these operands is: each distinct case is looked at once."""
    cases = ops.select("op", "inputs").unique(maintain_order=True)
    found = [product_of(str(op), str(inputs)) for op, inputs in cases.iter_rows()]
    schema = {name: pl.Int64() for name in Product.__dataclass_fields__} | {"dtype": pl.String()}
    columns = pl.DataFrame([asdict(product) if product else {} for product in found], schema)
    return cases.hstack(columns.rename({"n_flops": "flops"})).filter(pl.col("flops").is_not_null())


def product_of(op: str, inputs: str) -> Product | None:
    """Which matrix product is an operator with these operands (`inputs` of EVENTS); None where it is none we know."""
    name = op.removesuffix("_") if op.removesuffix("_") in PRODUCTS else op
    if name not in PRODUCTS:
        return None
    try:
        dims, types = json.loads(inputs)
    except ValueError:
        return None
    if not isinstance(dims, list) or not isinstance(types, list):
        return None
    first, second, third = PRODUCTS[name]
    a, b = _matrix(dims, first), _matrix(dims, second)
    if a is None or b is None or min(len(a), len(b)) < 2:
        return None
    summand = (_matrix(dims, third) or []) if third is not None else []
    dtype, size, packed = _DTYPES.get(str(types[first]) if len(types) > first else "", (None, 0, 1))
    if name == "aten::linear":
        b = [b[1], b[0]] if len(b) == 2 else b
    a = [*a[:-1], a[-1] * packed]
    b = [*b[:-2], b[-2] * packed, b[-1]]
    bytes_of = (size / packed, _RESULT_BYTES.get(dtype or "", size))
    if "grouped" in name:
        offsets = _matrix(dims, 4 if "scaled" in name else 2)
        found = _grouped(a, b, offsets, dtype, bytes_of)
    else:
        found = _dense(a, b, prod(summand) if summand else 0, dtype, bytes_of)
    if found is None or max(found.n_flops, found.fixed_bytes or 0, found.expert_bytes or 0) >= _MOST:
        return None
    return found


def _matrix(dims: Sequence[object], place: int) -> Dims | None:
    """The dims of one tensor operand; None for a scalar, a list of tensors, or an operand that is not there."""
    found = dims[place] if place < len(dims) else None
    if not isinstance(found, list) or not 0 < len(found) <= _MOST_DIMS:
        return None
    return found if all(type(size) is int and 0 <= size < _MOST_SIZE for size in found) else None


def _dense(a: Dims, b: Dims, n_summed: int, dtype: str | None, bytes_of: tuple[float, float]) -> Product | None:
    m, k, n = a[-2], a[-1], b[-1]
    batch = prod(a[:-2])
    if len(b) == 2:  # the leading dims of the left factor are more rows
        m, batch = m * batch, 1
    elif a[:-2] != b[:-2]:
        return None  # broadcast over a batch: which factor moves how often is not recorded
    if b[-2] != k:
        return None
    moved = bytes_of[0] * batch * (m * k + k * n) + bytes_of[1] * (batch * m * n + n_summed)
    return Product(m, n, k, batch, None, dtype, 2 * m * n * k * batch, round(moved) if dtype else None, 0)


def _grouped(
    a: Dims, b: Dims, offsets: Dims | None, dtype: str | None, bytes_of: tuple[float, float]
) -> Product | None:
    """A grouped product: a factor with three dims has a matrix for each expert, one with two is split among them."""
    (m, k), n = a[-2:], b[-1]
    n_experts = a[0] if len(a) == 3 else b[0] if len(b) == 3 else (offsets or [0])[0]
    if b[-2] != k or not n_experts or max(len(a), len(b)) > 3 or (len(a) == len(b) == 3 and a[0] != b[0]):
        return None
    is_many = (len(a) == 3, len(b) == 3)
    factors = (m * k, k * n)
    if is_many[0] == is_many[1]:  # terms are split, or nothing is: every expert has a result of its own
        n_products = n_experts if is_many[0] else 1
        weights, moved, n_results = 0, n_products * sum(factors), n_experts * m * n
    else:
        n_products = 1
        weights, moved, n_results = factors[is_many[1]], factors[is_many[0]], m * n
    n_flops = 2 * m * n * k * n_products
    if dtype is None:
        return Product(m, n, k, 1, n_experts, None, n_flops, None, None)
    fixed = bytes_of[0] * moved + bytes_of[1] * n_results
    return Product(m, n, k, 1, n_experts, dtype, n_flops, round(fixed), round(bytes_of[0] * weights))


def _outermost_work(products: pl.DataFrame) -> pl.DataFrame:
    """Of products inside each other those that count: the innermost, or the grouped one that holds it. Adds `n_inside`
    and `n_inside_working`, the products inside a grouped one and those of them that had rows."""
    parent = parents(products).fill_null(-1).to_numpy()
    is_grouped = products["n_experts"].is_not_null().to_numpy()
    is_inner = np.ones(len(parent), dtype=bool)
    is_inner[parent[parent >= 0]] = False
    # The outermost grouped product above each one: every turn looks twice as far up.
    above, holder = parent, np.where((parent >= 0) & is_grouped[parent], parent, -1)
    while (above >= 0).any():
        farther = np.where(above >= 0, holder[above], -1)
        holder, above = np.where(farther >= 0, farther, holder), np.where(above >= 0, above[above], -1)
    inside = products.select("flops", place=pl.Series(holder)).filter(pl.Series(is_inner & (holder >= 0)))
    counts = inside.group_by("place").agg(n_inside=pl.len(), n_inside_working=(pl.col("flops") > 0).sum())
    return (
        products.with_columns(place=pl.int_range(pl.len(), dtype=pl.Int64))
        .join(counts, on="place", how="left", maintain_order="left")
        .filter(pl.Series((holder < 0) & (is_grouped | is_inner)))
        .drop("place")
    )


def _with_active_experts(products: pl.DataFrame, trace: Trace) -> pl.DataFrame:
    """Adds `n_active` and `counts_from`. A capture's counts are taken where they fit: as many experts, as many rows."""
    capture = trace.meta.get("perfmodel")
    counts = capture.get("tokens_per_expert") if isinstance(capture, dict) else None
    counts = counts if isinstance(counts, list) and all(type(count) is int for count in counts) else []
    is_inside = pl.col("n_inside").is_between(1, pl.col("n_experts"))
    is_capture = (pl.col("n_experts") == len(counts)) & pl.any_horizontal(pl.col("m", "n") == sum(counts))
    n_active = pl.when(is_inside).then("n_inside_working").when(is_capture).then(sum(count > 0 for count in counts))
    counts_from = pl.when(is_inside).then(pl.lit("products inside")).when(is_capture).then(pl.lit("capture"))
    return products.with_columns(n_active=n_active.cast(pl.Int64), counts_from=counts_from.cast(COUNTS_FROM))


def _times(trace: Trace, products: pl.DataFrame, work: pl.DataFrame | None) -> pl.DataFrame:
    """How long each product took: `row`, `n_kernels`, `time_ns`, `timed_by`."""
    if trace.of_kind(*DEVICE_KINDS).is_empty():
        by_operator = pl.lit("operator", TIMED_BY)
        return products.select("row", n_kernels=pl.lit(0, pl.Int64), time_ns="dur_ns", timed_by=by_operator)
    work = attributed(trace.events) if work is None else work
    kernels = work.filter(pl.col("kind") == "kernel", ~pl.col("is_graph").fill_null(True))
    kernels = kernels.filter(classify(kernels["name"]).cast(pl.String).is_in(GEMMS))
    around = products["row"].gather(holders(products, call_starts(kernels))["innermost"])
    of_kernel = pl.coalesce(around, "operator_row")  # an operator that is no product has no row among the products
    times = kernels.group_by(row=of_kernel).agg(n_kernels=pl.len().cast(pl.Int64), time_ns=pl.sum("dur_ns"))
    found = products.select("row").join(times, on="row", how="left", maintain_order="left")
    is_timed = pl.col("time_ns").is_not_null()
    return found.with_columns(
        pl.col("n_kernels").fill_null(0), timed_by=pl.when(is_timed).then(pl.lit("kernels")).cast(TIMED_BY)
    )


def launch_points(launches: pl.DataFrame) -> pl.DataFrame:
    """Where does each kernel that Nsight Compute counted stand: `read_ncu`'s rows as points of a roofline.

    Columns `op` (its name), `dtype` (in which most of its FLOPs ran), `flops`, `bytes` (of device memory, both ways),
    `time_ns`, `flops_per_s`, `flops_per_byte`. Kernels without FLOPs are left out, as are those not counted.
    Raises InputError where FLOPs, bytes or durations were collected for none.
    """
    needed = ("flops", "dram_bytes", "duration_ns")
    counted = launches.drop_nulls(needed)
    if counted.is_empty():
        missing = [name for name in needed if launches[name].count() == 0] or needed
        raise InputError(f"no kernel of the Nsight Compute table has all of {', '.join(missing)}; {TO_COLLECT}")
    points = counted.select(pl.col("name").alias("op"), "dtype", "flops", bytes="dram_bytes", time_ns="duration_ns")
    return points.filter(pl.all_horizontal(pl.col("flops", "bytes", "time_ns") > 0)).with_columns(**_rates())


def alike(points: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """Which points of a roofline cost most, those that agree in `keys` taken together: longest time first.

    Columns `keys`, `flops`, `bytes` (null where those of any are) and `time_ns` in all, `n_products`, and the rates
    that follow, as in `matmuls`.
    """
    n_bytes = pl.when(pl.col("bytes").is_not_null().all()).then(pl.sum("bytes"))
    return (
        points.group_by(keys)
        .agg(pl.sum("flops"), n_bytes.alias("bytes"), pl.sum("time_ns"), n_products=pl.len().cast(pl.Int64))
        .with_columns(**_rates())
        .sort("time_ns", *keys, descending=[True, *(False for _ in keys)], nulls_last=True)
    )


def points_on_roof(products: pl.DataFrame, profile: HardwareProfile) -> pl.DataFrame:
    """How near did each product come to the roof of a machine: `matmuls` or `launch_points` and what bounds each row.

    Adds `attainable_flops_per_s` (the roofline at its intensity, Williams, Waterman, Patterson, CACM 2009, with the
    ceilings of `physics.ceilings`: what large products and streams reach, not the nominal peak), `roof_frac` (achieved
    of attainable; above 1 where operands came from a cache, or a product beat the ceiling) and `bound` (compute or
    memory); null where the type has no roof of its own or the profile does not know it.
    """
    roofs = []
    for dtype in products["dtype"].unique().drop_nulls():
        try:
            roof = ceilings(profile, dtype) if dtype in COMPUTES_IN else None
        except InputError:
            roof = None
        if roof is not None:
            roofs.append((dtype, roof.flops_per_s, roof.bytes_per_s))
    schema = {"dtype": pl.String, "roof_flops_per_s": pl.Float64, "roof_bytes_per_s": pl.Float64}
    found = products.join(pl.DataFrame(roofs, schema, orient="row"), on="dtype", how="left", maintain_order="left")
    intensity, peak, stream = (found[c].to_numpy() for c in ("flops_per_byte", "roof_flops_per_s", "roof_bytes_per_s"))
    attainable = pl.Series(attainable_flops_per_s(intensity, peak, stream), dtype=pl.Float64).fill_nan(None)
    is_memory = pl.col("attainable_flops_per_s") < pl.col("roof_flops_per_s")
    return (
        found.with_columns(attainable_flops_per_s=attainable)
        .with_columns(
            roof_frac=pl.col("flops_per_s") / pl.col("attainable_flops_per_s"),
            bound=pl.when(is_memory).then(pl.lit("memory")).when(is_memory.is_not_null()).then(pl.lit("compute")),
        )
        .drop("roof_flops_per_s", "roof_bytes_per_s")
    )
