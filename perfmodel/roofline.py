"""Ceilings of a machine per memory tier, ridge points, where measured work stands under them, and what that costs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from perfmodel.capture_lines import RESIDENT
from perfmodel.errors import InputError
from perfmodel.hardware import HardwareProfile, hardware, names, profile_name
from perfmodel.latency import LatencyModel, work_of
from perfmodel.matmuls import points_on_roof
from perfmodel.moe import WEIGHT_BYTES
from perfmodel.physics import (
    COMPUTES_IN,
    PEAK_GEMM_FRAC,
    PEAK_STREAM_FRAC,
    Array,
    Work,
    ceilings,
    ideal_work,
    transferred_ceilings,
)
from perfmodel.text import NS_PER_S

DEVICE_MEMORY, IN_PLACE, COPY, HOST = "device memory", "host link, read in place", "host link, copy", "host memory"
# Tier name -> the quantities that give its bandwidth, best evidence first; that of device memory is `ceilings`'.
TIERS: dict[str, tuple[str, ...]] = {
    IN_PLACE: ("link_kernel_read_bytes_per_s",),
    COPY: ("link_h2d_copy_bytes_per_s", "link_peak_bytes_per_s"),
    HOST: ("host_stream_bytes_per_s", "host_peak_bytes_per_s"),
}
NOMINAL: dict[str, str] = {
    DEVICE_MEMORY: "memory_peak_bytes_per_s",
    COPY: "link_peak_bytes_per_s",
    HOST: "host_peak_bytes_per_s",
}
# Access mode of a capture -> the tiers that weights of offloaded experts cross, the link first; experts that the host
# computes stand under another roof.
CROSSED = {"zero-copy": (IN_PLACE, HOST), "copy": (COPY, HOST), "copy-overlap": (COPY, HOST)}
# What takes time above the least that a roof allows, as the latency model's parts have it: column of POINTS -> words.
LOST_TO: dict[str, str] = {
    "fixed_ns": "fixed cost of calls and experts",
    "around_ns": "routing and moving rows around the GEMMs",
    "gemms_ns": "GEMMs below the ceilings (few rows per expert, padding)",
    "unexplained_ns": "what the model does not explain",
}
POINTS = pl.Schema(
    {
        "op": pl.String(),
        "shape": pl.String(),
        "gemm": pl.String(),
        "n_tokens": pl.Int64(),
        "routing": pl.String(),
        "access": pl.String(),
        "rows_per_active_expert": pl.Float64(),
        "tier": pl.String(),
        "flops_per_byte": pl.Float64(),
        "flops_per_s": pl.Float64(),
        "roof_frac": pl.Float64(),
        "bound": pl.String(),
        "time_ns": pl.Float64(),
        "time_frac": pl.Float64(),
        "lost_ns": pl.Float64(),
        **{name: pl.Float64() for name in LOST_TO},
        "why": pl.String(),
    }
)


DTYPES = ("bf16", "fp16", "fp8", "fp32")


@dataclass(frozen=True)
class Tier:
    """One slanted ceiling: bandwidth of a memory tier, what it rests on, and the ridge point in FLOP per byte."""

    name: str
    bytes_per_s: float
    kind: str
    ridge_flops_per_byte: float


@dataclass(frozen=True)
class Roof:
    """Ceilings of one sort: the compute rate with what it rests on, and the tiers, fastest first."""

    flops_per_s: float
    kind: str
    tiers: tuple[Tier, ...]


@dataclass(frozen=True, eq=False)
class Roofline:
    """The roofline of a machine for a dtype: what large GEMMs and streams `reached`, the `nominal` peaks (null where no
    datasheet of this machine is known), and `points` under it (POINTS), of which `n_left_out` have no roof here."""

    title: str
    dtype: str
    reached: Roof
    nominal: Roof | None
    points: pl.DataFrame
    n_left_out: int = 0


def tiers(profile: HardwareProfile, dtype: str) -> list[Tier]:
    """The slanted ceilings of a machine, fastest first (Williams, Waterman, Patterson, CACM 2009)."""
    roof = ceilings(profile, dtype)
    peak = roof.flops_per_s
    found = {name: profile.first(*keys) for name, keys in TIERS.items()}
    rows = [Tier(name, q[1].value, q[1].kind, peak / q[1].value) for name, q in found.items() if q is not None]
    kind = _kind(profile, roof.from_keys[1], PEAK_STREAM_FRAC)
    rows.append(Tier(DEVICE_MEMORY, roof.bytes_per_s, kind, peak / roof.bytes_per_s))
    return sorted(rows, key=lambda tier: -tier.bytes_per_s)


def _kind(profile: HardwareProfile, key: str, share: float) -> str:
    """What a ceiling of `physics.ceilings` rests on: a share of the nominal peak is an assumption, and says so."""
    kind = profile.quantities[key].kind
    return f"assumed: {share:.0%} of {kind}" if "_peak_" in key else kind


def reached_roof(profile: HardwareProfile, dtype: str) -> Roof:
    """What large GEMMs and streams reach on a machine; raises InputError where it has no rate for the dtype."""
    if dtype not in WEIGHT_BYTES:
        raise InputError(f"no roof is known for {dtype!r}; known types: {', '.join(WEIGHT_BYTES)}")
    roof = ceilings(profile, dtype)
    kind = _kind(profile, roof.from_keys[0], PEAK_GEMM_FRAC)
    computes_in = roof.from_keys[0].partition("_")[0]
    kind += "" if computes_in == dtype else f", computing in {computes_in}"
    return Roof(roof.flops_per_s, kind, tuple(tiers(profile, dtype)))


def nominal_roof(profile: HardwareProfile, dtype: str) -> Roof | None:
    """The nominal peaks of a machine, of its own profile or of the shipped one of the GPU that its title names; null
    where neither has one for the dtype. A GPU's name does not say what host it is in, a slice (MIG) is no whole."""
    own = [profile]
    shipped = profile_name(profile.title)
    if shipped in names() and "MIG" not in profile.title:
        own.append(hardware(str(shipped)))
    for one in own:
        peak = one.first(*(f"{name}_peak_flops_per_s" for name in COMPUTES_IN.get(dtype, COMPUTES_IN["bf16"])))
        if peak is not None:
            flops = peak[1].value
            keys = NOMINAL if one is profile else {name: key for name, key in NOMINAL.items() if name != HOST}
            found = {name: one.quantities[key] for name, key in keys.items() if key in one.quantities}
            rows = [Tier(name, q.value, q.kind, flops / q.value) for name, q in found.items()]
            return Roof(flops, peak[1].kind, tuple(sorted(rows, key=lambda tier: -tier.bytes_per_s)))
    return None


def dtypes_of(profile: HardwareProfile) -> list[str]:
    """The dtypes for which a machine has a compute rate of its own, that of most models first."""
    return [name for name in DTYPES if profile.first(f"{name}_gemm_flops_per_s", f"{name}_peak_flops_per_s")]


def roofline(
    profile: HardwareProfile,
    dtype: str,
    *,
    observations: pl.DataFrame | None = None,
    products: pl.DataFrame | None = None,
    model: LatencyModel | None = None,
) -> Roofline:
    """The roofline of a machine with what was measured under it: `observations` of that dtype (one row a workload), or
    `products` of a trace (`Analysis.products`), of which those of another dtype are left out.

    `model` says why observations stand below the roof. Raises InputError where the machine has no rate for the dtype.
    """
    reached = reached_roof(profile, dtype)
    found, n_given = pl.DataFrame(schema=POINTS), 0
    if observations is not None:
        found, n_given = points(observations, profile, model), observations.height
    elif products is not None:
        found, n_given = product_points(products.filter(pl.col("dtype") == dtype), profile), products.height
    return Roofline(profile.title, dtype, reached, nominal_roof(profile, dtype), found, n_given - found.height)


def points(observations: pl.DataFrame, profile: HardwareProfile, model: LatencyModel | None = None) -> pl.DataFrame:
    """Where each observation stands (POINTS): its intensity in FLOP per byte of the `tier` whose roof is lowest for it,
    achieved rate, share of the lowest roof above it, whether that is compute or memory, its share of the time of all,
    and `lost_ns`, the time above what the roof allows; with a `model` also what took it (LOST_TO, which sum to it where
    they are known), most of it `why`.

    Device memory moves active resident weights and activations (copied weights too, which are read again there), the
    link and host memory the weights of active offloaded experts. FLOPs and bytes are those of the grouped GEMMs; the
    time of a whole layer holds more, so its rate reads low. Left out are experts that the host computes, and those
    behind a link whose rate is not known. Raises InputError for another dtype than the model's, or kind of device.
    """
    rates = {tier.name: tier.bytes_per_s for tier in tiers(profile, observations["dtype"][0])}
    crossed = {access: _crossed(access, rates) for access in CROSSED}
    known = [RESIDENT, *(access for access, over in crossed.items() if over)]
    rows = observations.filter(pl.col("access").is_in(known) | (pl.col("offload_frac") == 0))
    if rows.is_empty():
        return pl.DataFrame(schema=POINTS)
    work = work_of(rows)
    flops, weight_bytes = (work.mean(x) for x in ideal_work(work))
    moved = work.mean(work.activation_bytes * work.n_rows * (work.k + work.n).sum(axis=1))
    away_bytes = weight_bytes * _offloaded_frac(rows)
    access = rows["access"].to_numpy()
    n_bytes = {DEVICE_MEMORY: weight_bytes + moved - np.where(access == "zero-copy", away_bytes, 0.0)}
    for mode, over in crossed.items():
        for name in over:
            n_bytes[name] = n_bytes.get(name, 0.0) + np.where(access == mode, away_bytes, 0.0)
    intensity = {name: flops / np.maximum(moving, 1e-12) for name, moving in n_bytes.items()}
    names_ = list(intensity)
    roofs = np.stack([intensity[name] * rates[name] for name in names_])
    lowest = roofs.argmin(axis=0)
    peak = ceilings(profile, rows["dtype"][0]).flops_per_s
    attainable = np.minimum(peak, roofs.min(axis=0))
    time_ns = rows["time_ns"].to_numpy()
    table = rows.select(
        pl.col("op").cast(pl.String),
        *("shape", "n_tokens", "routing", "access"),
        gemm=pl.format("{} x {}", "gemm_k", "gemm_n"),
        rows_per_active_expert=pl.Series(work.mean(work.n_rows / work.n_active)),
        tier=pl.Series([names_[i] for i in lowest]),
        flops_per_byte=pl.Series(np.stack([intensity[name] for name in names_])[lowest, np.arange(len(lowest))]),
        flops_per_s=pl.Series(flops / time_ns * NS_PER_S),
        roof_frac=pl.Series(flops / time_ns * NS_PER_S / attainable),
        bound=pl.Series(np.where(attainable < peak, "memory", "compute")),
        time_ns=pl.Series(time_ns),
    )
    if model is not None:
        table = table.with_columns(**_above(rows, work, flops / attainable * NS_PER_S, model, profile))
    return _with_lost(table)


def _crossed(access: str, rates: Mapping[str, float]) -> tuple[str, ...]:
    """The tiers that offloaded weights cross, of those known; none where the rate of the link is not. A machine that
    knows no rate of reading in place has that of copies for it."""
    link, host = CROSSED[access]
    link = link if link in rates else COPY
    return tuple(name for name in (link, host) if name in rates) if link in rates else ()


def _offloaded_frac(rows: pl.DataFrame) -> Array:
    """The share of each observation's active experts that lies in host memory, `[row]`; 0 where counts are unknown."""
    counts = pl.col("tokens_per_expert")
    away = counts.list.gather(pl.col("offloaded").fill_null(pl.lit([], pl.List(pl.Int64))))
    n_active = [one.list.eval((pl.element() > 0).cast(pl.Int64)).list.sum() for one in (away, counts)]
    return np.asarray(rows.select((n_active[0] / n_active[1]).fill_null(0.0)).to_series().to_numpy(), dtype=np.float64)


def _above(
    rows: pl.DataFrame, work: Work, least_ns: Array, model: LatencyModel, profile: HardwareProfile
) -> dict[str, pl.Series]:
    """What takes time above the roof (the columns of LOST_TO), by the parts of the model and what they leave of the
    measurement; null where experts are offloaded."""
    is_here = profile.own_quantities == model.profile.own_quantities
    roof = model.roof if is_here else transferred_ceilings(profile, model.dtype, model.profile)
    parts = model.form.resident_parts(model.work(rows, None if is_here else profile), roof, model.constants_)
    none = np.zeros(len(work.item_of))

    def part(*which: str) -> Array:
        return work.mean(np.add.reduce([none, *(parts[name] for name in which if name in parts)]))

    time_ns = rows["time_ns"].to_numpy()
    columns = np.stack(
        [
            part("overhead", "launch"),
            part("permute", "combine", "router"),
            np.maximum(part("compute", "memory") - least_ns, 0.0),
            np.maximum(time_ns - part(*parts), 0.0),
        ]
    )
    # Where the model expects more time than was measured its parts are more than what was lost: their shares stand.
    lost_ns = np.maximum(time_ns - least_ns, 0.0)
    columns *= np.minimum(lost_ns / np.maximum(columns.sum(axis=0), 1e-12), 1.0)
    is_resident = (rows["access"] == RESIDENT).to_numpy()
    return {
        name: pl.Series(np.where(is_resident, values, np.nan)).fill_nan(None)
        for name, values in zip(LOST_TO, columns, strict=True)
    }


def product_points(products: pl.DataFrame, profile: HardwareProfile) -> pl.DataFrame:
    """Where matrix products of a trace stand (POINTS) under the roof of the machine that ran it, alike ones together;
    those whose bytes or roof are not known are left out. `shape` is m x n x k, with the batch or the experts."""
    found = points_on_roof(products, profile).filter(pl.col("roof_frac").is_not_null(), pl.col("flops") > 0)
    sizes = pl.format("{} x {} x {}", "m", "n", "k")
    experts = pl.format("{}, {} experts", sizes, "n_experts")
    batch = pl.when(pl.col("batch") > 1).then(pl.format("{} x ({})", "batch", sizes)).otherwise(sizes)
    return _with_lost(
        found.select(
            pl.col("op").cast(pl.String),
            *("flops_per_byte", "flops_per_s", "roof_frac", "bound"),
            pl.col("time_ns").cast(pl.Float64),
            shape=pl.coalesce(experts, batch),
            tier=pl.lit(DEVICE_MEMORY),
        )
    )


def _with_lost(table: pl.DataFrame) -> pl.DataFrame:
    """Adds shares of time and lost times; columns as POINTS has them, null where they are unknown."""
    lost = pl.col("time_ns") * (1 - pl.col("roof_frac")).clip(lower_bound=0.0)
    table = table.with_columns(time_frac=pl.col("time_ns") / pl.col("time_ns").sum(), lost_ns=lost)
    table = table.match_to_schema(POINTS, missing_columns="insert").select(list(POINTS))
    largest = pl.max_horizontal(list(LOST_TO))
    is_lost = (pl.col("lost_ns") > 0) & (largest > 0)
    why = pl.coalesce(pl.when(is_lost & (pl.col(name) == largest)).then(pl.lit(name)) for name in LOST_TO)
    return table.with_columns(why=why)


def only(found: Roofline, op: str | None = None, shape: str | None = None) -> Roofline:
    """The same roofline with the points of one operation, one shape, or both alone; shares of time are among these.

    Raises InputError, with what there is, where nothing was measured of them.
    """
    points = found.points
    for column, wanted in (("op", op), ("shape", shape)):
        if wanted is not None:
            words = points[column].unique().sort()
            if wanted not in words:
                raise InputError(f"nothing was measured of {column} {wanted!r}; there are {', '.join(words) or 'none'}")
            points = points.filter(pl.col(column) == wanted)
    return replace(found, points=points.with_columns(time_frac=pl.col("time_ns") / pl.col("time_ns").sum()))


def costliest(points: pl.DataFrame) -> pl.DataFrame:
    """The points below their roof, most lost time first."""
    return points.filter(pl.col("lost_ns") > 0).sort("lost_ns", descending=True, maintain_order=True)


def lost_frac(points: pl.DataFrame) -> float | None:
    """Which share of the time of all points lies above what their roofs allow; null without points."""
    total = float(points["time_ns"].to_numpy().sum())
    return float(points["lost_ns"].to_numpy().sum()) / total if total else None


def lost_to(points: pl.DataFrame) -> dict[str, float]:
    """What the time above the roof went to, by the columns of LOST_TO: shares of what was lost where that is known."""
    sums = {name: float(points[name].drop_nulls().to_numpy().sum()) for name in LOST_TO}
    total = sum(sums.values())
    return {name: value / total for name, value in sums.items()} if total else {}


def dtypes_by_time(products: pl.DataFrame) -> list[str]:
    """The dtypes of a trace's products, that in which most of their time went first; raises InputError without any."""
    known = products.drop_nulls("dtype")
    if known.is_empty():
        raise InputError("the trace recorded no matrix product with sizes; profile with record_shapes=True")
    by_time = known.group_by("dtype").agg(pl.sum("time_ns")).sort("time_ns", "dtype", descending=[True, False])
    return by_time["dtype"].to_list()
