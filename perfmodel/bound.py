"""Is the host or the device the bound: from the evidence of one trace, and from a sweep over batch sizes.

The rules and their constants are argued in docs/decisions/0009-host-or-device-bound.md.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import polars as pl

from perfmodel import text
from perfmodel.errors import InputError
from perfmodel.intervals import busy_ns
from perfmodel.launch import LaunchMetrics, device_table, joined_work

Label = Literal["host-bound", "device-bound", "mixed"]

COMPUTING = ("kernel", "replay")  # a graph counts as one launch, whether its kernels or only its replays were recorded

# The launch of a null kernel, call start to kernel start, of SKIP (arXiv 2504.11750) Table V: A100 and GH200, the
# lowest and the highest of three machines.
LOWEST_LAUNCH_NS = 2260.5
HIGHEST_LAUNCH_NS = 2771.6

# A plateau of TKLQT reads about 0 in published plots, so it has this floor: about one forward pass of an encoder.
PLATEAU_FLOOR_NS = LOWEST_LAUNCH_NS * 300
# Launch calls of one workload vary by less than 2 over batch sizes (Table V: 2.26 to 2.77 us over machines); queueing
# multiplies TKLQT by ten and more within one doubling of the batch (Fig 6). Any factor from 1 to 30 finds the same.
RULE_FACTOR = 3.0

# A kernel queued if it began this many whole launch overheads after its launch call had returned already.
QUEUE_FACTOR = 3.0
QUEUED_FRAC = 0.5  # of launches; real traces lie below 0.3 or above 0.75, the few others are short
IDLE_FRAC = 0.2  # of the device's span; published sweeps have 0.38 and more before the transition, 0.06 and less after
COPIES_FRAC = 0.5  # of busy time; beyond, the link is the bound and no question of launches
MIN_LAUNCHES = 10

_BATCH = re.compile(r"(?<![a-z0-9])(?:b|bs|bsz|batch|batch[-_ ]?size)[-_ =]?(\d{1,9})(?![0-9a-z])", re.IGNORECASE)
_GPUS = ("b100", "b200", "b300")  # look like batch sizes


@dataclass(frozen=True)
class Bound:
    """What bounds a trace, and the numbers it was concluded from; `label` is null where nothing can be told.

    `reason` says it in a sentence. Null: fractions and median without what they are fractions of.
    """

    label: Label | None
    reason: str
    n_launches: int
    queued_frac: float | None
    queue_limit_ns: float
    delay_median_ns: float | None
    gpu_idle_frac: float | None
    copies_frac: float | None
    graph_frac: float | None

    def to_json(self) -> dict[str, Any]:
        """The record as a dict that JSON can hold, keys in the order of the fields."""
        return asdict(self)


@dataclass(frozen=True)
class Sweep:
    """A sweep over batch sizes: `table` has columns `batch`, `tklqt_ns` and `label`, smallest batch first."""

    table: pl.DataFrame
    transition_batch: int | None
    plateau_ns: float
    rule_factor: float


def bound(
    events: pl.DataFrame,
    work: pl.DataFrame | None = None,
    devices: pl.DataFrame | None = None,
    *,
    launch_floor_ns: float = HIGHEST_LAUNCH_NS,
    queue_factor: float = QUEUE_FACTOR,
    queued_frac: float = QUEUED_FRAC,
    idle_frac: float = IDLE_FRAC,
    min_launches: int = MIN_LAUNCHES,
) -> Bound:
    """Does the device wait for the host or the host for the device: from the launches and idle times of one trace.

    Device-bound: at least `queued_frac` of launches queued, that is their first kernel began more than `queue_factor`
    times `launch_floor_ns` after the call had returned, and devices were idle for less than `idle_frac` of their span.
    Host-bound: neither. Mixed: one of both, as with phases of either kind or two sides that keep pace. A launch counts
    once, however many kernels of a graph it started, and however long it waited: graphs and deep queues have no more
    weight than other launches. Copies and sets are busy time, but no launches. Null: fewer than `min_launches` launches
    of kernels, no time, or copies alone in most of the busy time. Ranks and devices are pooled; `work` and
    `devices` are `joined_work` and `device_table` of the events, if they are known already.
    """
    work = joined_work(events) if work is None else work
    kernels = work.filter(pl.col("kind").is_in(COMPUTING), pl.col("delay_ns").is_not_null())
    launches = kernels.group_by("launch_row").agg(pl.min("delay_ns"), pl.first("launch_dur_ns"))
    limit_ns = queue_factor * launch_floor_ns
    queue = pl.col("delay_ns") - pl.col("launch_dur_ns")
    queued, median = launches.select((queue > limit_ns).mean().alias("queued"), pl.median("delay_ns")).row(0)
    devices = device_table(work) if devices is None else devices
    busy, span = devices.select(pl.sum("gpu_busy_ns", "gpu_span_ns")).row(0)
    idle, copies = 1 - busy / span if span else None, copies_frac(work, busy)
    label: Label | None = None
    if launches.height < min_launches:
        reason = f"{launches.height} launches of kernels are too few to tell; expected at least {min_launches}"
    elif idle is None or copies is None:
        reason = "device work took no time"
    elif copies > COPIES_FRAC:
        reason = f"{text.frac(copies)} of busy time is copies and sets without a kernel: the link is the bound"
    else:
        is_queued, is_idle = queued >= queued_frac, idle >= idle_frac
        label = "mixed" if is_queued == is_idle else "device-bound" if is_queued else "host-bound"
        reason = (
            f"{text.frac(queued)} of {text.count(launches.height)} launches waited more than {text.ns(limit_ns)} after "
            f"their call had returned (many: {text.frac(queued_frac)}), and devices were idle {text.frac(idle)} of "
            f"their span (much: {text.frac(idle_frac)})"
        )
    graph = kernels["is_graph"].mean()
    return Bound(
        label=label,
        reason=reason,
        n_launches=launches.height,
        queued_frac=queued,
        queue_limit_ns=limit_ns,
        delay_median_ns=median,
        gpu_idle_frac=idle,
        copies_frac=copies,
        graph_frac=graph if isinstance(graph, float) else None,
    )


def copies_frac(work: pl.DataFrame, gpu_busy_ns: int) -> float | None:
    """Which part of the devices' busy time is copies and sets without a kernel; null where they were never busy."""
    computing = busy_ns(work.filter(pl.col("kind").is_in(COMPUTING)))
    return 1 - int(computing["busy_ns"].sum()) / gpu_busy_ns if gpu_busy_ns else None


def is_device_bound(tklqt_ns: float, plateau_ns: float, rule_factor: float = RULE_FACTOR) -> bool:
    """Do kernels queue behind a busy device: is TKLQT above `rule_factor` times its host-bound plateau (with floor)."""
    return tklqt_ns > rule_factor * max(plateau_ns, PLATEAU_FLOOR_NS)


def batch_in_name(name: str) -> int | None:
    """Which batch size does the name of a file tell, as `bert-b8.json`, `bs_16` or `batch=32` do; null where it tells
    none, or several. Names of GPUs (`b200`) are none."""
    told = [match for match in _BATCH.finditer(name) if match[0].lower() not in _GPUS]
    found = {int(match[1]) for match in told} - {0}
    return found.pop() if len(found) == 1 else None


def transition_batch(batches: Sequence[int], tklqt_ns: Sequence[float], rule_factor: float = RULE_FACTOR) -> int | None:
    """From which batch size on is the device the bound: the first whose TKLQT leaves the plateau of the smallest one.

    The paper (section V-B) marks this point by eye; the rule is ours. Null when no batch leaves the plateau. The sweep
    must begin host-bound: a sweep that begins with a full queue shows no plateau. Raises InputError on unequal lengths
    or an empty sweep.
    """
    return sweep(batches, tklqt_ns, rule_factor).transition_batch


def sweep(batches: Sequence[int], metrics: Sequence[LaunchMetrics | float], rule_factor: float = RULE_FACTOR) -> Sweep:
    """Which batch sizes of a sweep are host-bound and which device-bound, by the rule of `is_device_bound`.

    `metrics` are those of one trace for each batch size, or their TKLQT in ns, as published. Of a trace the first
    kernel of each launch counts, for the others of a graph wait for each other, not for their launch. The smallest
    batch is the plateau and host-bound by definition. Raises as `transition_batch`, on a batch size given twice, and on
    a trace without launches of kernels, such as one of the CPU alone.
    """
    if len(batches) != len(metrics) or not batches:
        raise InputError(
            f"found {len(batches)} batch sizes and {len(metrics)} values of TKLQT; expected as many, not 0"
        )
    for batch, m in zip(batches, metrics, strict=True):
        if isinstance(m, LaunchMetrics) and not m.n_kernels_joined and not m.tklqt_first_kernel_ns:
            raise InputError(
                f"the trace of batch size {batch} holds no kernel whose launch is known, so it has no TKLQT; expected "
                "traces of a GPU with CUDA calls and kernels"
            )
    tklqt_ns = [float(m.tklqt_first_kernel_ns if isinstance(m, LaunchMetrics) else m) for m in metrics]
    repeated = [str(batch) for batch, n in Counter(batches).items() if n > 1]
    if repeated:
        raise InputError(f"found the batch size {repeated[0]} more than once; expected one value of TKLQT for each")
    if min(batches) < 1 or not all(map(math.isfinite, tklqt_ns)):
        raise InputError("found a batch size below 1 or a TKLQT that is no number; expected numbers in every row")
    rows = sorted(zip(batches, tklqt_ns, strict=True))
    plateau_ns = rows[0][1]
    labels = ["device-bound" if is_device_bound(t, plateau_ns, rule_factor) else "host-bound" for _, t in rows]
    table = pl.DataFrame(
        {"batch": [batch for batch, _ in rows], "tklqt_ns": [t for _, t in rows], "label": labels},
        schema={"batch": pl.Int64, "tklqt_ns": pl.Float64, "label": pl.String},
    )
    first = table.filter(pl.col("label") == "device-bound")["batch"].to_list()[:1]
    return Sweep(table, first[0] if first else None, plateau_ns, rule_factor)
