"""What are the most telling facts of a trace, in words: what its time went to, with the number and what to do about it.

A finding is told only where it is true and explains a part of the devices' time that is worth a sentence; the greater
that part, the earlier it comes. Reasons are in docs/decisions/0016-findings.md.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from perfmodel import text
from perfmodel.bound import COPIES_FRAC, copies_frac
from perfmodel.classify import CLASSES, COMMUNICATION
from perfmodel.fusion import SHORT_LENGTHS, fusion_table
from perfmodel.groups import profiler_steps
from perfmodel.hardware import HardwareProfile
from perfmodel.intervals import DEVICE, THREAD, busy_ns, gaps, holders, merged, overlap_ns
from perfmodel.launch import LaunchMetrics, call_starts
from perfmodel.overhead import idle_beside_overhead_ns, profiler_overhead
from perfmodel.trace import DEVICE_KINDS

N_FINDINGS = 3
SIGNIFICANT_FRAC = 0.05  # of the devices' time: what explains less is not worth a sentence
DOMINANT_FRAC = 0.3  # of the devices' time in one class of kernels
MOST_FRAC = 0.5  # of idle time, or of kernels: what holds for fewer is not said of them
NAMED_FRAC = 0.2  # of idle time: what the host did for a smaller part of it is not named
SMALL_KERNEL_NS = 5_000  # about twice the launch of a null kernel (SKIP, arXiv 2504.11750, Table V)
MANY_KERNELS = 50
UNQUEUED_NS = 10_000  # a call and its launch take 2 to 3 us on an idle device (Table V); who waits longer queues
NAME_WIDTH = 60

_CLASS_ADVICE = {
    "gemm": "compare it with the roofline (--hardware) before changing anything: a large product may be at its limit",
    "grouped_gemm": "compare it with the roofline (--hardware); few tokens an expert make it read weights, not compute",
    "attention": "look whether a fused attention kernel is used, and how long the sequences are",
    "elementwise": "fuse it into its neighbours (torch.compile): such kernels only move memory",
    "reduction": "fuse it into its neighbours (torch.compile): such kernels only move memory",
    "copy": "avoid the copies: contiguous layouts and in-place updates need none",
    "other": "these names are unknown to the rules; name them in kernel_classes.toml",
}
_COPY_ADVICE = "copy on a stream of its own while kernels run, or copy less"


@dataclass(frozen=True)
class Finding:
    """One fact of a trace: how much device time it explains, also as a part of the devices' spans, and in words."""

    name: str
    explained_ns: int
    explained_frac: float
    words: str
    advice: str

    def to_json(self) -> dict[str, Any]:
        """The finding as a dict that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class _Scene:
    """What findings look at: events, their device work joined to its calls with the class of kernels, and figures."""

    events: pl.DataFrame
    work: pl.DataFrame
    metrics: LaunchMetrics
    copied: pl.DataFrame
    exposed: pl.DataFrame
    hardware: HardwareProfile | None
    span_ns: int  # of all devices, not 0

    def part(self, time_ns: int) -> str:
        """A time as a part of the devices' spans, in words."""
        return text.frac(time_ns / self.span_ns)

    def finding(self, name: str, explained_ns: int, words: str, advice: str) -> Finding:
        """A finding that explains so much of the devices' spans."""
        return Finding(name, explained_ns, explained_ns / self.span_ns, words, advice)

    @property
    def kernels(self) -> pl.DataFrame:
        """The kernels among the device work."""
        return self.work.filter(pl.col("kind") == "kernel")


def findings(
    events: pl.DataFrame,
    work: pl.DataFrame,
    metrics: LaunchMetrics,
    copied: pl.DataFrame,
    exposed: pl.DataFrame,
    hardware: HardwareProfile | None = None,
    n_most: int = N_FINDINGS,
) -> list[Finding]:
    """What are the most telling facts of a trace: at most `n_most`, those that explain most device time first.

    `work` is `joined_work` with the `class` of kernels, `copied` is `copies.copies` and `exposed` is
    `overlap.exposed_time`; `hardware` says what the link could do. The whole is the sum of the devices' spans; what
    explains less than SIGNIFICANT_FRAC of it is left out, so there may be fewer, or none.
    Parts may overlap: a device that the host keeps waiting for is idle, and may have many small kernels.
    """
    if not metrics.gpu_span_ns:
        return []
    scene = _Scene(events, work, metrics, copied, exposed, hardware, metrics.gpu_span_ns)
    found = (find(scene) for find in _FINDERS)
    told = [finding for finding in found if finding is not None and finding.explained_frac >= SIGNIFICANT_FRAC]
    return sorted(told, key=lambda finding: -finding.explained_ns)[:n_most]


def gap_causes(events: pl.DataFrame, work: pl.DataFrame) -> pl.DataFrame:
    """Why was each device idle: one row for each gap between its first and last work, with what ended it.

    Columns `rank`, `device`, `start_ns`, `dur_ns`, `ended_by` (the first work after it), `late_ns` (the part before the
    host began the call for that work), `launching_ns` (from that call on, if it began in the gap), `waiting_ns` (all of
    it, if the call had begun before the gap: the work waited for something else); null where that call is not in the
    trace. `host_name` is what the calling thread was in, innermost, in the middle of the late part; null for nothing
    that was recorded, or no late part. (`overlap.idle_gaps` asks instead in which calls the host was.)
    """
    first_work = work.sort(pl.col("launch_start_ns").is_null()).unique([*DEVICE, "start_ns"], keep="first")
    columns = [*DEVICE, "name", "launch_start_ns", "launch_process", "launch_thread"]
    ended = gaps(work).with_columns(end_ns=pl.col("start_ns") + pl.col("dur_ns")).join(
        first_work.select(*columns, end_ns="start_ns"), on=[*DEVICE, "end_ns"], how="left", nulls_equal=True
    )  # fmt: skip
    called, start, dur = pl.col("launch_start_ns"), pl.col("start_ns"), pl.col("dur_ns")
    late = (called - start).clip(0, dur)
    parts = ended.with_columns(
        late_ns=late,
        launching_ns=pl.when(called >= start).then(dur - late).when(called < start).then(0),
        waiting_ns=pl.when(called < start).then(dur).when(called >= start).then(0),
    )
    host = events.select("kind", "name", *THREAD, "start_ns", "dur_ns").filter(~pl.col("kind").is_in(DEVICE_KINDS))
    host = host.filter(~pl.col("name").is_in(profiler_steps(events).implode()))  # a step holds all, so it says nothing
    middle_of_late = call_starts(parts).with_columns(parts.select(at_ns=start + pl.col("late_ns").fill_null(0) // 2))
    inner = holders(host, middle_of_late)["innermost"]
    return parts.select(
        *DEVICE,
        "start_ns",
        "dur_ns",
        ended_by="name",
        late_ns="late_ns",
        launching_ns="launching_ns",
        waiting_ns="waiting_ns",
        host_name=pl.when(pl.col("late_ns") > 0).then(host["name"].gather(inner)),
    )


def _idle(scene: _Scene) -> Finding | None:
    table = gap_causes(scene.events, scene.work)
    idle_ns = int(table["dur_ns"].sum())
    if not idle_ns:
        return None
    late_ns, launching_ns, waiting_ns = (int(table[c].sum()) for c in ("late_ns", "launching_ns", "waiting_ns"))
    words = (
        f"devices stood idle for {scene.part(idle_ns)} of their time, {text.ns(idle_ns)} in "
        f"{text.counted(table.height, 'gap')}"
    )
    if late_ns + launching_ns >= MOST_FRAC * idle_ns:
        host, host_ns = _most(table.filter(pl.col("late_ns") > 0), "host_name", "late_ns")
        words += (
            f"; for {text.frac((late_ns + launching_ns) / idle_ns)} of that the host had not launched the next work"
        )
        if host_ns < NAMED_FRAC * idle_ns:
            return scene.finding("host_bound", idle_ns, words, _host_advice(None))
        where = f"longest in {text.shortened(host, NAME_WIDTH)}" if host else "longest between recorded calls"
        words += f", {where} ({text.frac(host_ns / idle_ns)})"
        return scene.finding("host_bound", idle_ns, words, _host_advice(host))
    if waiting_ns >= MOST_FRAC * idle_ns:
        words += f"; for {text.frac(waiting_ns / idle_ns)} of that the next work had been launched and waited"
        advice = "it waited for another stream, a copy, an event or another rank: see `perfmodel export`"
        return scene.finding("launched_but_waiting", idle_ns, words, advice)
    return scene.finding("idle", idle_ns, words, "see what ends the gaps on the idle lines of `perfmodel export`")


def _most(table: pl.DataFrame, name: str, weight: str) -> tuple[str | None, int]:
    """The name with the greatest sum of weights, null counting as a name, and that sum."""
    sums = table.group_by(pl.col(name).cast(pl.String)).agg(pl.sum(weight)).sort(weight, name, descending=[True, False])
    return (sums[name][0], int(sums[weight][0])) if sums.height else (None, 0)


def _host_advice(host: str | None) -> str:
    waits = ("Synchronize", "aten::item", "_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
    if host and "DataLoader" in host:
        return "load data ahead of need: more DataLoader workers, pinned memory, prefetching"
    if host and (any(word in host for word in waits) or host.startswith(("cudaMemcpy", "hipMemcpy", "aten::copy_"))):
        return "the host waits for the device: take .item(), .cpu() and synchronisations out of the loop"
    return "launch less or earlier: fuse (`perfmodel fusion`, torch.compile), replay a CUDA graph, or enlarge the batch"


def _queue(scene: _Scene) -> Finding | None:
    since = pl.col("launch_start_ns") + pl.max_horizontal(pl.col("launch_dur_ns"), pl.lit(UNQUEUED_NS))
    queued = scene.kernels.filter((pl.col("start_ns") > since) & ~pl.col("is_graph")).select(
        *DEVICE, start_ns=since, dur_ns=pl.col("start_ns") - since
    )
    if queued.is_empty() or not scene.metrics.gpu_busy_ns:
        return None
    queued_ns = int(overlap_ns(merged(scene.work), queued).sum())
    mean_ns = int(queued["dur_ns"].sum()) / queued.height
    copying_frac = copies_frac(scene.work, scene.metrics.gpu_busy_ns) or 0
    is_copying = copying_frac > COPIES_FRAC
    behind = f"copies and sets ({text.frac(copying_frac)} of busy time)" if is_copying else "a busy device"
    words = (
        f"the device is the bound for {scene.part(queued_ns)} of its time: "
        f"{text.counted(queued.height, 'launched kernel')} queued behind {behind}, {text.ns(mean_ns)} each on "
        f"average, which makes TKLQT {text.ns(scene.metrics.tklqt_non_graph_ns)}"
    )
    words += " outside graphs" if scene.metrics.n_kernels_graph else ""
    if is_copying:
        advice = "neither launches nor kernels are the bound: copy less, or meanwhile"
        return scene.finding("link_bound", queued_ns, words, advice)
    advice = "launch cost is hidden here; only faster or fewer kernels help"
    return scene.finding("device_bound", queued_ns, words, advice)


def _copies(scene: _Scene) -> Finding | None:
    table = scene.copied.filter(pl.col("kind") == "copy")
    exposed_ns = int(scene.exposed["copy_exposed_ns"].sum())
    if table.is_empty():
        words = f"kernels that only copy took {text.ns(exposed_ns)} in which nothing was computed"
        return scene.finding("exposed_copies", exposed_ns, words, _COPY_ADVICE) if exposed_ns else None
    top = table.sort("exposed_ns", "time_ns", descending=True).row(0, named=True)
    memories = f" ({top['from_memory']} -> {top['to_memory']})" if top["from_memory"] and top["to_memory"] else ""
    words = (
        f"copies took {text.ns(exposed_ns)} in which nothing was computed, mostly {top['direction'] or 'copies'}"
        f"{memories}: {text.count(top['n_copies'])} of {text.n_bytes(top['bytes'])} in all"
    )
    if top["bytes_per_s"]:
        words += f" at {text.bytes_per_s(top['bytes_per_s'])}{_against_link(scene, top['direction'])}"
    advice = _COPY_ADVICE
    if "Pageable" in memories:
        advice = "pin the host memory: pageable copies are slow and block the host"
    return scene.finding("exposed_copies", exposed_ns, words, advice)


def _against_link(scene: _Scene, direction: str | None) -> str:
    """What the link of the given machine can do in the direction of a copy; nothing where that is not known."""
    way = {"HtoD": "h2d", "DtoH": "d2h"}.get(direction or "")
    if scene.hardware is None or way is None:
        return ""
    found = scene.hardware.first(f"link_{way}_copy_bytes_per_s", "link_peak_bytes_per_s")
    return f", where the link of {scene.hardware.name} does {text.bytes_per_s(found[1].value)}" if found else ""


def _communication(scene: _Scene) -> Finding | None:
    sums = scene.exposed.select(pl.sum("communication_busy_ns", "communication_exposed_ns"))
    busy, exposed_ns = (int(value) for value in sums.row(0))
    if not busy:
        return None
    words = (
        f"communication between devices took {text.ns(busy)}, of which {text.ns(exposed_ns)} lay beside no computation "
        f"({text.frac(1 - exposed_ns / busy)} hidden)"
    )
    advice = "overlap it with computation, move fewer bytes, or balance ranks"
    return scene.finding("exposed_communication", exposed_ns, words, advice)


def _dominant_class(scene: _Scene) -> Finding | None:
    by_class = busy_ns(scene.kernels.with_columns(pl.col("class").to_physical()), [*DEVICE, "class"])
    if by_class.is_empty():
        return None
    sums = by_class.group_by("class").agg(pl.sum("busy_ns")).sort("busy_ns", "class", descending=[True, False])
    name, spent_ns = CLASSES[sums["class"][0]], int(sums["busy_ns"][0])
    if spent_ns < DOMINANT_FRAC * scene.span_ns or name in COMMUNICATION:
        return None
    chosen = scene.kernels.filter(pl.col("class").cast(pl.String) == name)
    top, top_ns = _most(chosen, "name", "dur_ns")
    top_name = text.shortened(str(top).removeprefix("void "), NAME_WIDTH)
    words = (
        f"{name} kernels filled {scene.part(spent_ns)} of the devices' time ("
        f"{text.counted(chosen.height, 'kernel')}, {text.ns(spent_ns)}), "
        f"{text.frac(top_ns / int(chosen['dur_ns'].sum()))} of it in {top_name}"
    )
    return scene.finding("dominant_class", spent_ns, words, _CLASS_ADVICE[name])


def _small_kernels(scene: _Scene) -> Finding | None:
    n_kernels = scene.metrics.n_kernels
    is_small = (pl.col("dur_ns") < SMALL_KERNEL_NS) & ~pl.col("is_graph").fill_null(value=False)
    n_small = scene.kernels.filter(is_small).height
    idle_ns = scene.span_ns - scene.metrics.gpu_busy_ns
    if n_kernels < MANY_KERNELS or n_small < MOST_FRAC * n_kernels or not idle_ns:
        return None
    table = fusion_table(scene.events, SHORT_LENGTHS).drop_nulls("ideal_speedup").sort("ideal_speedup")
    if table.is_empty():
        return None
    best = table.row(-1, named=True)
    words = (
        f"{text.frac(n_small / n_kernels)} of {text.counted(n_kernels, 'kernel')} ran shorter than "
        f"{text.ns(SMALL_KERNEL_NS)}; fusing chains of {best['length']} that always repeat would leave "
        f"{text.count(best['n_launches'])} launches, {best['ideal_speedup']:.2f}x at best where the host is the bound"
    )
    advice = "`perfmodel fusion` lists the chains; torch.compile or a CUDA graph removes their launches"
    return scene.finding("small_kernels", round(idle_ns * (1 - 1 / best["ideal_speedup"])), words, advice)


def _graphs(scene: _Scene) -> Finding | None:
    replayed = scene.kernels.filter("is_graph")
    if replayed.height < MOST_FRAC * scene.metrics.n_kernels or replayed.is_empty():
        return None
    words = (
        f"{text.frac(replayed.height / scene.metrics.n_kernels)} of kernels were replayed by "
        f"{text.counted(replayed['launch_row'].n_unique(), 'graph launch call')}: they share a call, so TKLQT "
        f"({text.ns(scene.metrics.tklqt_graph_ns)} of theirs) says when they ran, not what launching cost"
    )
    replayed_ns = int(busy_ns(replayed)["busy_ns"].sum())
    return scene.finding("graphs", replayed_ns, words, "judge launches by the first kernel of each launch")


def _replays(scene: _Scene) -> Finding | None:
    replays = scene.work.filter(pl.col("kind") == "replay")
    if replays.is_empty():
        return None
    hidden_ns = int(busy_ns(replays)["busy_ns"].sum())
    words = (
        f"{text.counted(replays.height, 'CUDA graph replay')} filled {scene.part(hidden_ns)} of the devices' time and "
        f"{text.ns(hidden_ns)} with kernels that were not recorded, so classes and kernel times leave them out"
    )
    return scene.finding("hidden_graphs", hidden_ns, words, "record with `nsys profile --cuda-graph-trace=node`")


def _overhead(scene: _Scene) -> Finding | None:
    table = profiler_overhead(scene.events, scene.work)
    if table.is_empty():
        return None
    idle_ns = idle_beside_overhead_ns(scene.events, scene.work)
    top = table.sort("idle_ns", "name", descending=[True, False]).row(0, named=True)
    whose = "the driver" if top["is_driver"] else "the profiler"
    words = (
        f"for {scene.part(idle_ns)} of their time devices stood idle while overhead was recorded ({text.ns(idle_ns)}), "
        f"most of it of {whose}: {text.shortened(top['name'], NAME_WIDTH)}"
    )
    advice = "it would not be there unwatched: record few steps after warm-up, in less detail"
    if top["is_driver"]:
        advice = "run what is measured once before (CUDA_MODULE_LOADING=EAGER loads it all)"
    return scene.finding("overhead", idle_ns, words, advice)


_FINDERS: tuple[Callable[[_Scene], Finding | None], ...] = (
    _idle,
    _queue,
    _copies,
    _communication,
    _dominant_class,
    _small_kernels,
    _graphs,
    _replays,
    _overhead,
)
