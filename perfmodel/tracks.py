"""What is drawn of a trace: its events on the lines of threads and streams, and lines that say what waited for what.

SLICES is the table of everything drawn as a bar: `family` (what kind of line), `rank`, `owner` (the process, or the
device), `line` (the thread, the stream, or the class of kernels), `lane` (0, and further ones for what overlaps
without nesting), `name`, `start_ns`, `dur_ns`; what was recorded also has the other columns of EVENTS.
"""

import polars as pl

from perfmodel.classify import classify
from perfmodel.intervals import DEVICE
from perfmodel.lanes import lanes
from perfmodel.launch import joined_kernels, joined_work
from perfmodel.text import NS_PER_S
from perfmodel.trace import DEVICE_KINDS

# Families of lines in their order on the page. `host` and `stream` hold what was recorded, the others what follows.
FAMILIES = pl.Enum(["host", "stream", "class", "idle", "launch delay", "queueing"])
TRACK = ("rank", "family", "owner", "line", "lane")  # what identifies a line


def slices(events: pl.DataFrame) -> pl.DataFrame:
    """Which bars are drawn of EVENTS, line by line in the order of their starts, those that hold others first.

    Columns: those of SLICES, `class` of kernels, `n_kernels` in a bar of a class, the work an idle gap was `ended_by`,
    `arrow_from` and `arrow_to` (the number of an arrow from a call to the device work it started, null for none). Lines
    that follow from the events: `class` (when any kernel of a class ran), `idle` (gaps between the work of a device),
    `launch delay` (each kernel's wait from the start of its call, none where clocks disagree) and `queueing` (the part
    of it behind the end of the call).
    """
    work = joined_work(events)
    kernels = work.filter(pl.col("kind") == "kernel")
    kernels = kernels.with_columns(classify(kernels["name"]))
    recorded = [_calls(events, work), _work(work, kernels)]
    drawn = pl.concat([*recorded, _classes(kernels), _idle(work), *_waits(kernels)], how="diagonal")
    line = drawn.select("start_ns", "dur_ns", track=pl.struct("family", "rank", "owner", "line").rank("dense"))
    return drawn.with_columns(lanes(line)).sort(*TRACK, "start_ns", pl.col("dur_ns").neg(), maintain_order=True)


def _calls(events: pl.DataFrame, work: pl.DataFrame) -> pl.DataFrame:
    """What the host did; an arrow begins at every call whose work began no earlier."""
    reached = work.filter(pl.col("delay_ns") >= 0)["launch_row"].unique()
    row = pl.int_range(pl.len())
    return (
        events.with_columns(
            family=pl.lit("host", FAMILIES),
            owner="process",
            line="thread",
            arrow_from=pl.when(row.is_in(reached.implode())).then(row + 1),
        )
        .filter(~pl.col("kind").is_in(DEVICE_KINDS))
        .drop("process", "thread", "device", "stream")
    )


def _work(work: pl.DataFrame, kernels: pl.DataFrame) -> pl.DataFrame:
    """What the devices did, with the class of kernels; an arrow ends at what did not begin before its call."""
    class_of = kernels.select("name", "class", "kind").unique()
    return work.join(class_of, on=["name", "kind"], how="left", maintain_order="left").select(
        *("kind", "name", "start_ns", "dur_ns", "rank", "link", "external", "bytes", "graph", "inputs", "class"),
        family=pl.lit("stream", FAMILIES),
        owner="device",
        line="stream",
        arrow_to=pl.when(pl.col("delay_ns") >= 0).then(pl.col("launch_row") + 1),
    )


def _classes(kernels: pl.DataFrame) -> pl.DataFrame:
    """When any kernel of a class ran on a device: touching and overlapping ones as one bar, with their number."""
    begins = pl.col("start_ns") > _covered_until(*DEVICE, "class")
    return (
        kernels.sort(*DEVICE, "class", "start_ns")
        .with_columns(end_ns=pl.col("start_ns") + pl.col("dur_ns"))
        .with_columns(bar=begins.fill_null(True).cum_sum())
        .group_by(*DEVICE, "class", "bar")
        .agg(pl.min("start_ns"), pl.max("end_ns"), n_kernels=pl.len().cast(pl.Int64))
        .select(
            "rank",
            "start_ns",
            "n_kernels",
            "class",
            family=pl.lit("class", FAMILIES),
            owner="device",
            line=pl.col("class").to_physical().cast(pl.Int64),
            name=pl.col("class").cast(pl.Categorical),
            dur_ns=pl.col("end_ns") - pl.col("start_ns"),
        )
    )


def _idle(work: pl.DataFrame) -> pl.DataFrame:
    """The gaps of each device between its first and its last work, with the name of what ended them."""
    return (
        work.sort(*DEVICE, "start_ns")
        .with_columns(end_ns=pl.col("start_ns") + pl.col("dur_ns"))
        .with_columns(idle_from=_covered_until(*DEVICE))
        .filter(pl.col("start_ns") > pl.col("idle_from"))
        .select(
            "rank",
            family=pl.lit("idle", FAMILIES),
            owner="device",
            name=pl.lit("idle", pl.Categorical),
            start_ns="idle_from",
            dur_ns=pl.col("start_ns") - pl.col("idle_from"),
            ended_by="name",
        )
    )


def _covered_until(*keys: str) -> pl.Expr:
    """Until when earlier work of the same keys went on; null for the first."""
    return pl.col("end_ns").cum_max().shift(1).over(*keys)


def _waits(kernels: pl.DataFrame) -> list[pl.DataFrame]:
    """From the start of its call to each kernel, and from the end of its call where that came first."""
    called, returned = pl.col("launch_start_ns"), pl.col("launch_start_ns") + pl.col("launch_dur_ns")
    waits = {
        "launch delay": (called, pl.col("start_ns") >= called),
        "queueing": (returned, pl.col("start_ns") > returned),
    }
    return [
        kernels.filter(is_drawn).select(
            "rank",
            "name",
            family=pl.lit(family, FAMILIES),
            owner="device",
            start_ns=since,
            dur_ns=pl.col("start_ns") - since,
        )
        for family, (since, is_drawn) in waits.items()
    ]


def counters(events: pl.DataFrame) -> pl.DataFrame:
    """How many kernels waited behind their call, and how fast copies were, on each device at each moment of change.

    Columns `rank`, `device`, `name` of the counter, `at_ns`, `value` (a count; bytes per second, summed over copies
    that run at once). A value holds until the next row of its counter.
    """
    kernels = joined_kernels(events)
    returned = pl.col("launch_start_ns") + pl.col("launch_dur_ns")
    queued = kernels.filter(pl.col("start_ns") > returned).select(
        *DEVICE, since_ns=returned, until_ns="start_ns", amount=pl.lit(1, pl.Int64), name=pl.lit("kernels in queue")
    )
    copies = events.filter((pl.col("kind") == "copy") & (pl.col("bytes") > 0) & (pl.col("dur_ns") > 0)).select(
        *DEVICE,
        since_ns="start_ns",
        until_ns=pl.col("start_ns") + pl.col("dur_ns"),
        amount=(pl.col("bytes") * NS_PER_S / pl.col("dur_ns")).round().cast(pl.Int64),
        name=pl.lit("copies in bytes per second"),
    )
    steps = pl.concat([queued, copies])
    keys = (*DEVICE, "name", "at_ns")
    return (
        pl.concat(
            [
                steps.select(*DEVICE, "name", "amount", at_ns="since_ns"),
                steps.select(*DEVICE, "name", -pl.col("amount"), at_ns="until_ns"),
            ]
        )
        .group_by(keys)
        .agg(pl.sum("amount"))
        .filter(pl.col("amount") != 0)
        .sort(keys)
        .select(*keys, value=pl.col("amount").cum_sum().over(*DEVICE, "name"))
    )
