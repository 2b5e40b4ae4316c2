"""Measured expert-parallel steps beside what the model says of them, with a machine as the capture's probes saw it.

Nothing is fitted on steps: rates, latency and bandwidth of links come from probes that all ranks took at the same time,
constants are the defaults or those of a latency model that was fitted elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import polars as pl

from perfmodel import ep_steps
from perfmodel.ep_capture import COMMUNICATION, REGROUP, EpCapture, EpWorkload
from perfmodel.hardware import HardwareProfile
from perfmodel.latency import LatencyModel
from perfmodel.physics import Array
from perfmodel.predict import basis_of
from perfmodel.text import NS_PER_S

from . import layer_timeline
from .closed import all_to_all_ns
from .costs import BEFORE, EXPERTS, Layer, link_ns, operator_ns
from .fabric import fabric_of
from .measures import overlap_efficiency
from .overheads import Overheads
from .probed import SLICE_NS, Crowd, crowds, profile_of
from .timeline import LayerTimeline
from .traffic import Traffic, expected_tokens

# One row: a phase of one rank, null `rank` for a collective, which is one for all: from when the last rank is there.
BESIDE = pl.Schema(
    {
        "workload": pl.String(),
        "shape": pl.String(),
        "phase": pl.String(),
        "rank": pl.Int64(),
        "measured_ns": pl.Float64(),
        "predicted_ns": pl.Float64(),
    }
)
LATENCY = "latency"  # of a whole step, among the phases
SHARING = "sharing"  # what waiting for cores adds, which no phase is measured to be


# What an engine does besides, counted in the layer that is run (collectors/ep_layer.py). Hidden values of received rows
# are read or written so often to bring them into the order of experts and back: two gathers; small operators around
# them in each chunk (copy, range, repeat twice, sort, sum, cumulate, convert, two gathers), and around the exchange of
# counts (zero, join, subtract, convert, join, stack, sum, copy to a list, and a sum for each rank).
REGROUP_PASSES, REGROUP_OPERATORS, COUNTS_OPERATORS = 4, 10, 8


@dataclass(frozen=True)
class Predicted:
    """What the model says of one workload: the layer's timeline, and what an engine adds of which that knows nothing:
    `counts_ns`, exchanging how many rows to expect, `regroup_ns[rank]`, sorting received rows by expert and back, and
    `sharing_ns`, what ranks wait for each other's cores; negative where links are faster than the busiest rank's bytes.
    """

    timeline: LayerTimeline
    counts_ns: float
    regroup_ns: Array
    sharing_ns: float = 0.0

    @property
    def latency_ns(self) -> float:
        """The step: all ranks wait for the counts, and for the rank whose regrouping takes longest."""
        return self.timeline.latency_ns + self.counts_ns + float(self.regroup_ns.max()) + self.sharing_ns

    @property
    def compute_ns(self) -> dict[str, Array]:
        """How long each rank is in each phase that is no communication, ns `[rank]`."""
        found: dict[str, Array] = {}
        for span in self.timeline.spans:
            if span.lane == "compute":
                found.setdefault(span.phase, np.zeros_like(self.regroup_ns))[span.gpu] += span.dur_ns
        return {**found, REGROUP: self.regroup_ns} if self.regroup_ns.any() else found


@dataclass(frozen=True)
class Beside:
    """A capture's steps and what the model says of them: `table` (BESIDE), and each prediction by workload."""

    capture: EpCapture
    profile: HardwareProfile
    table: pl.DataFrame
    predicted: dict[str, Predicted]

    @cached_property
    def errors(self) -> pl.DataFrame:
        """By `phase`, the latency last: `n` rows, `median_error_frac` and `p90_error_frac` of |predicted / measured -
        1|, and `median_ratio` of predicted over measured."""
        return errors_of(self.table)

    @cached_property
    def noise(self) -> pl.DataFrame:
        """The same of what even steps say of odd ones: what nobody can predict better from so few steps."""
        return noise_of(self.capture)


def layer_of(workload: EpWorkload, profile: HardwareProfile, model: LatencyModel | None = None) -> Layer:
    """The layer that a workload ran, on ranks of a profile."""
    rows, gpu_of = np.array(workload.rows, dtype=np.float64), np.array(workload.gpu_of, dtype=np.int64)
    n_ranks = len(rows)
    between = np.array([np.bincount(gpu_of, own, n_ranks) for own in rows], dtype=np.float64)
    traffic = Traffic(
        rows=rows,
        tokens=expected_tokens(between, workload.tokens_per_gpu, workload.top_k),
        gpu_of=gpu_of,
        expert_of=np.arange(workload.n_experts),
        n_tokens=np.full(n_ranks, workload.tokens_per_gpu),
        top_k=workload.top_k,
    )
    shape = workload.moe_shape
    return Layer(basis_of(profile, shape, model), shape, traffic, fabric_of(profile, n_ranks))


def predict_step(
    layer: Layer,
    schedule: str,
    n_chunks: int,
    n_counts: int = 0,
    *,
    regroups: bool = False,
    shared: Sequence[Crowd] = (),
) -> Predicted:
    """What the model says of a step whose ranks exchange counts of rows `n_counts` times, and may regroup rows;
    `shared` are the ranks that share cores.

    The probe's latency holds what starting a collective takes. Rows are sent as they are, and CPU ranks launch nothing.
    """
    overheads = Overheads(n_launches=0, host_launch_ns=0.0, collective_ns=0.0, n_chunks=n_chunks)
    n_ranks, small_ns = layer.traffic.n_gpus, operator_ns(layer)
    one = all_to_all_ns(layer, np.zeros((n_ranks,) * 2), overheads)
    one += (COUNTS_OPERATORS + n_ranks) * small_ns * max((crowd.per_core for crowd in shared), default=1.0)
    regroup = np.zeros(n_ranks)
    if regroups:
        moved = REGROUP_PASSES * layer.traffic.received.sum(axis=1) * layer.row_bytes
        regroup += moved / layer.basis.device.roof.bytes_per_s * NS_PER_S + REGROUP_OPERATORS * small_ns * n_chunks
    found = Predicted(layer_timeline(layer, schedule, overheads), n_counts * one, regroup)
    if not shared:
        return found
    return replace(found, sharing_ns=sharing_ns(layer, found.compute_ns, shared))


def on_cores_ns(work_ns: Array, at_once: float) -> float:
    """When ranks with this much work each, ns `[rank]`, are all done on cores for `at_once` of them: those that are
    not done share the cores evenly, and no rank uses more than its own."""
    n_left = np.arange(len(work_ns), 0, -1)
    return float((np.diff(np.sort(work_ns), prepend=0.0) * np.maximum(1.0, n_left / at_once)).sum())


def sharing_ns(layer: Layer, compute: dict[str, Array], shared: Sequence[Crowd]) -> float:
    """What sharing cores adds to a step, each of whose parts between two collectives lasts until the last rank is done,
    while its collectives move bytes by the same cores."""
    n_ranks = layer.traffic.n_gpus

    def done_ns(work_ns: Array) -> float:
        return max(float(work_ns.max()), *(on_cores_ns(work_ns[list(one.ranks)], one.at_once) for one in shared))

    parts = [BEFORE, (*EXPERTS, REGROUP), ("reduce",)]
    work = [np.asarray(sum(compute.get(name, np.zeros(n_ranks)) for name in part)) for part in parts]
    added = sum(done_ns(one) - float(one.max()) for one in work)
    # The probe's ranks were all as busy: a rank's own bytes take as much less time as it had more than its own cores.
    away = layer.traffic.rows_between * (1 - np.eye(n_ranks))
    moved = (away.sum(axis=0) + away.sum(axis=1)) / 2 * layer.row_bytes * layer.fabric.inside.ns_per_byte
    for one in shared:
        moved[list(one.ranks)] /= one.per_core
    return added + 2 * (done_ns(moved) - float(link_ns(layer, layer.traffic.rows_between).max()))


def set_beside(capture: EpCapture, model: LatencyModel | None = None) -> Beside:
    """Every measured workload of a capture beside the model's prediction; raises InputError where probes are missing or
    the model is of another kind of device."""
    profile = profile_of(capture)
    shared = crowds(capture)
    phase, chunk = pl.col("phase"), pl.col("chunk")
    engine = capture.steps.group_by("workload").agg(
        n_counts=chunk.filter(phase == "counts").n_unique(), regroups=(phase == REGROUP).any()
    )
    does = engine.rows_by_key("workload", named=True, unique=True)
    predicted = {
        one.workload: predict_step(
            layer_of(one, profile, model), one.schedule, one.n_chunks, shared=shared, **does.get(one.workload, {})
        )
        for one in capture.measured
    }
    said = [row for one in capture.measured for row in _said(one, predicted[one.workload])]
    schema = {name: dtype for name, dtype in BESIDE.items() if name != "measured_ns"}
    on = ["workload", "phase", "rank"]
    table = pl.DataFrame(said, schema=schema, orient="row").join(
        _measured(capture), on=on, how="left", nulls_equal=True, maintain_order="left"
    )
    return Beside(capture, profile, table.select(list(BESIDE)), predicted)


def errors_of(table: pl.DataFrame) -> pl.DataFrame:
    """`Beside.errors` of some rows of BESIDE; rows that were not measured, or took no time, are not among them."""
    ratio = pl.col("predicted_ns") / pl.col("measured_ns")
    error = (ratio - 1).abs()
    return (
        table.filter(pl.col("measured_ns") > 0)
        .group_by("phase", maintain_order=True)
        .agg(
            n=pl.len(),
            median_error_frac=error.median(),
            p90_error_frac=error.quantile(0.9, "linear"),
            median_ratio=ratio.median(),
        )
    )


def noise_of(capture: EpCapture) -> pl.DataFrame:
    """`errors_of` for a prediction of each workload's odd steps that is its even steps; empty where it has one step."""
    half = pl.col("step") % 2
    even, odd = (
        _measured(replace(capture, steps=capture.steps.filter(half == n), ends=capture.ends.filter(half == n)))
        for n in (0, 1)
    )
    both = odd.join(even.rename({"measured_ns": "predicted_ns"}), on=["workload", "phase", "rank"], nulls_equal=True)
    return errors_of(both)


def summary(beside: Beside) -> pl.DataFrame:
    """One row for each measured workload, in order: what it is, steps, latency measured (median, p10, p90) and
    predicted, `error_frac` (signed), what ranks do in a step as shares of it summed over ranks and steps
    (`compute_frac`, `exposed_frac` of communication, `idle_frac`), `hidden_frac` of the communication, how many ranks
    compute at once (`n_computing`, null where none does), and for chunked workloads how many times faster than the same
    in bulk, measured and predicted (null without)."""
    capture, predicted = beside.capture, beside.predicted
    names = ("shape", "tokens_per_gpu", "routing", "schedule", "n_chunks")
    ids = [one.workload for one in capture.measured]
    gains = ep_steps.against_bulk(capture)
    bulk = {one.twin: predicted[one.workload].latency_ns for one in capture.measured if one.schedule == "bulk"}
    said = [predicted[name].latency_ns for name in ids]
    expected = [
        bulk[one.twin] / ns if one.workload in gains else None for one, ns in zip(capture.measured, said, strict=True)
    ]
    sums = ep_steps.overlaps(capture).group_by("workload").agg(pl.col("^.*_ns$").sum())
    done, moved = pl.col("span_ns"), pl.col("communication_ns")
    shares = sums.select(
        "workload",
        compute_frac=pl.col("compute_ns") / done,
        exposed_frac=pl.col("exposed_ns") / done,
        idle_frac=pl.col("idle_ns") / done,
        hidden_frac=pl.when(moved > 0).then(pl.col("hidden_ns") / moved),
    )
    what = pl.DataFrame({"workload": ids, **{name: [getattr(one, name) for one in capture.measured] for name in names}})
    took = ep_steps.latencies(capture).rename({"latency_ns": "measured_ns"})
    return (
        what.join(took, on="workload", maintain_order="left")
        .with_columns(pl.Series("predicted_ns", said, pl.Float64))
        .with_columns(error_frac=pl.col("predicted_ns") / pl.col("measured_ns") - 1)
        .join(shares, on="workload", maintain_order="left")
        .join(ep_steps.ranks_computing(capture), on="workload", how="left", maintain_order="left")
        .with_columns(
            pl.Series("faster_than_bulk", [gains.get(name) for name in ids], pl.Float64),
            pl.Series("predicted_faster_than_bulk", expected, pl.Float64),
        )
    )


def with_factors(table: pl.DataFrame) -> pl.DataFrame:
    """Rows of BESIDE with one factor for each phase that was fitted on all other shapes: the median of measured over
    predicted there. How much of an error is the same everywhere, judged on shapes that the factor has not seen; empty
    for a single shape."""
    known = table.filter(pl.col("measured_ns") > 0, pl.col("predicted_ns") > 0)
    parts = []
    for (shape,), rows in known.group_by("shape", maintain_order=True):
        others = known.filter(pl.col("shape") != shape)
        factors = others.group_by("phase").agg(factor=(pl.col("measured_ns") / pl.col("predicted_ns")).median())
        judged = rows.join(factors, on="phase", maintain_order="left")
        parts.append(judged.with_columns(predicted_ns=pl.col("predicted_ns") * pl.col("factor")).select(list(BESIDE)))
    return pl.concat(parts) if parts else pl.DataFrame(schema=BESIDE)


def last_at_combine(beside: Beside) -> pl.DataFrame:
    """Whom do the others wait for: for each workload in bulk with unequal ranks `predicted_rank`, whose experts are
    predicted to take longest, by how much (`predicted_skew_ns`), and the same measured (the rank that is last most
    often, its `last_frac`, the median skew)."""
    capture = beside.capture
    found = ep_steps.waits(capture).filter(pl.col("phase") == "combine").sort("last_frac", descending=True)
    ranks = found.group_by("workload", maintain_order=True).agg(
        measured_rank=pl.col("rank").first(), last_frac=pl.col("last_frac").first()
    )
    gathered = ep_steps.collectives(capture).filter(pl.col("phase") == "combine")
    skews = gathered.group_by("workload").agg(measured_skew_ns=pl.col("skew_ns").median())
    rows = []
    for one in capture.measured:
        times = beside.predicted[one.workload].compute_ns
        experts = np.asarray(sum(times[name] for name in (REGROUP, *EXPERTS) if name in times))
        if one.schedule == "bulk" and experts.ndim and experts.max() > experts.min():
            rows.append((one.workload, int(experts.argmax()), float(experts.max() - experts.min())))
    schema = {"workload": pl.String, "predicted_rank": pl.Int64, "predicted_skew_ns": pl.Float64}
    table = pl.DataFrame(rows, schema=schema, orient="row")
    return table.join(ranks, on="workload", maintain_order="left").join(skews, on="workload", maintain_order="left")


def late_collectives(beside: Beside) -> pl.DataFrame:
    """How often do collectives in bulk wait for more than bytes: by `phase`, `n` of all steps, `late_frac` that end
    more than half a time slice after the prediction, and of the others the median `prompt_ratio` of predicted over
    measured (null without)."""
    bulk = [one.workload for one in beside.capture.measured if one.schedule == "bulk"]
    said = beside.table.filter(pl.col("workload").is_in(bulk)).select("workload", "phase", "predicted_ns")
    phase, took, expected = pl.col("phase"), pl.col("transfer_ns"), pl.col("predicted_ns")
    each = ep_steps.collectives(beside.capture).with_columns(phase.cast(pl.String)).filter(took > 0)
    is_late = took > expected + SLICE_NS / 2
    return (
        each.join(said, on=["workload", "phase"])
        .group_by("phase")
        .agg(n=pl.len(), late_frac=is_late.mean(), prompt_ratio=(expected / took).filter(~is_late).median())
        .sort(phase.replace_strict({name: at for at, name in enumerate(COMMUNICATION)}))
    )


def overlap_efficiencies(captures: Sequence[EpCapture]) -> pl.DataFrame:
    """O_e = T(2) / T(N) (arXiv 2506.04667 Fig 11) of the workloads that captures of 2 and of more ranks share: what
    they are (`shape`, `tokens_per_gpu`, `routing`, `way`), by which rows are sorted, `capture` and `workload` of the
    larger one, `n_ranks`, both latencies (`latency_2_ranks_ns`, `latency_ns`) and `overlap_efficiency`."""
    two: dict[tuple[object, ...], float] = {}
    several: list[tuple[tuple[object, ...], EpCapture, EpWorkload, float]] = []
    for capture in captures:
        took = dict(ep_steps.latencies(capture).select("workload", "latency_ns").iter_rows())
        for one in capture.measured:
            key = (*one.moved, one.way)
            if capture.n_ranks == 2:
                two[key] = took[one.workload]
            elif capture.n_ranks > 2:
                several.append((key, capture, one, took[one.workload]))
    rows = []
    for key, capture, one, ns in several:
        if key in two:
            what = (one.shape, one.tokens_per_gpu, one.routing, one.way, capture.name, one.workload, capture.n_ranks)
            rows.append((*what, two[key], ns, overlap_efficiency(two[key], ns)))
    schema = {
        **{"shape": pl.String, "tokens_per_gpu": pl.Int64, "routing": pl.String, "way": pl.String},
        **{"capture": pl.String, "workload": pl.String, "n_ranks": pl.Int64},
        **{"latency_2_ranks_ns": pl.Float64, "latency_ns": pl.Float64, "overlap_efficiency": pl.Float64},
    }
    return pl.DataFrame(rows, schema=schema, orient="row").sort("shape", "tokens_per_gpu", "routing", "way", "n_ranks")


def _said(one: EpWorkload, found: Predicted) -> list[tuple[str, str, str, int | None, float]]:
    """The prediction as rows of BESIDE."""
    here = (one.workload, one.shape)
    rows: list[tuple[str, str, str, int | None, float]] = [
        (*here, phase, rank, float(time_ns))
        for phase, times in found.compute_ns.items()
        for rank, time_ns in enumerate(times)
    ]
    collectives = {"counts": found.counts_ns, **{name: found.timeline.phases.get(name) for name in COMMUNICATION[1:]}}
    collectives[SHARING] = found.sharing_ns
    rows += [(*here, phase, None, time_ns) for phase, time_ns in collectives.items() if time_ns]
    return [*rows, (*here, LATENCY, None, found.latency_ns)]


def _measured(capture: EpCapture) -> pl.DataFrame:
    """Medians over steps as `workload`, `phase`, `rank`, `measured_ns`: phases of ranks, transfers, latencies."""
    phase = pl.col("phase").cast(pl.String)
    ranks = ep_steps.phase_times(capture).filter(~phase.is_in(COMMUNICATION))
    moved = ep_steps.collectives(capture).group_by("workload", "step", "phase").agg(pl.col("transfer_ns").sum())
    transfers = moved.group_by("workload", "phase").agg(measured_ns=pl.col("transfer_ns").median())
    none = pl.lit(None, pl.Int64).alias("rank")
    whole = ep_steps.latencies(capture).select("workload", pl.lit(LATENCY).alias("phase"), none, "latency_ns")
    return pl.concat(
        [
            ranks.select("workload", phase, "rank", measured_ns="time_ns"),
            transfers.select("workload", phase, none, "measured_ns"),
            whole.rename({"latency_ns": "measured_ns"}),
        ]
    )
