"""What is drawn of a trace: its events on the lines of threads and streams, and lines that say what waited for what.

A line (a track) has `rank`, `family` (what kind of line), `owner` (the process, or the device), `line` (the thread, the
stream, or the class of kernels) and `lane` (0, and further ones for what overlaps without nesting).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import polars as pl

from perfmodel.classify import classify
from perfmodel.intervals import DEVICE
from perfmodel.lanes import lanes
from perfmodel.launch import joined_kernels, joined_work
from perfmodel.text import NS_PER_S
from perfmodel.trace import DEVICE_KINDS, EVENTS

# Families of lines in their order on the page. `host` and `stream` hold what was recorded, the others what follows.
FAMILIES = pl.Enum(["host", "stream", "class", "idle", "launch delay", "queueing"])
TRACK = ("rank", "family", "owner", "line", "lane")  # what identifies a line
SHEET_ROWS = 2**17  # bars that are filled in at once: a table in many pieces is put together anew for each

_LINE = ("rank", "owner", "line")  # identifies a line of a family, all lanes together
_FILLED = (
    *("kind", "name", "start_ns", "dur_ns", "link", "external", "bytes", "graph", "inputs"),
    *("blocks", "occupancy_frac", "collective"),
)


@dataclass(frozen=True)
class Drawing:
    """The lines and bars drawn of `events`, as narrow as can be, for there are more bars than events.

    `tracks` has a row for each line, with the columns TRACK. `bars` is a table for each of FAMILIES, line by line in
    the order of starts, those that hold others first: `track` is the row of its line, `row` that of its event.
    """

    events: pl.DataFrame
    tracks: pl.DataFrame
    bars: Mapping[str, pl.DataFrame]

    def slices(self, n_rows: int = SHEET_ROWS) -> Iterator[pl.DataFrame]:
        """The bars, at most `n_rows` of one family at a time: `track`, `name`, `start_ns`, `dur_ns` and what else is
        known of them: `kind` and other columns of EVENTS of what was recorded, `class` of kernels, `n_kernels` in a
        bar of a class, the work an idle gap was `ended_by`, `arrow_from` and `arrow_to` (the number of an arrow from a
        call to the device work it started, null for none)."""
        for bars in self.bars.values():
            for sheet in bars.iter_slices(n_rows):
                if "row" in sheet.columns:
                    columns = [self.events[name].gather(sheet["row"]) for name in _FILLED]
                    yield sheet.drop("row").with_columns(columns)
                else:
                    yield sheet


def drawing(events: pl.DataFrame) -> Drawing:
    """Which bars are drawn of EVENTS, on which lines.

    Lines that follow from the events: `class` (when any kernel of a class ran), `idle` (gaps between the work of a
    device), `launch delay` (each kernel's wait from the start of its call, none where clocks disagree) and `queueing`
    (the part of it behind the end of the call).
    """
    work = joined_work(events)
    work = work.select("kind", "name", "rank", "device", "stream", "start_ns", "dur_ns", *_CALL, _class_of(work))
    tracks: list[pl.DataFrame] = []
    bars = {}
    for family, draw in _DRAWN.items():
        found, lines = _placed(draw(events, work))
        bars[family] = found.with_columns(pl.col("track") + sum(table.height for table in tracks))
        tracks.append(lines.with_columns(family=pl.lit(family, FAMILIES)).select(TRACK))
    return Drawing(events, pl.concat(tracks), bars)


_CALL = ("launch_row", "launch_start_ns", "launch_dur_ns", "delay_ns")


def _class_of(work: pl.DataFrame) -> pl.Expr:
    return pl.when(pl.col("kind") == "kernel").then(classify(work["name"])).alias("class")


def _placed(bars: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The bars of one family in their order with their `track`, without what follows from it and from their `row`; and
    the lines, a row for each track."""
    lines = bars.select(_LINE).unique().sort(_LINE).with_row_index("track")
    named = bars.lazy().join(lines.lazy(), on=_LINE, how="left", nulls_equal=True, maintain_order="left")
    line = named.select("track").collect()["track"]  # lazily, so that the columns of the keys are not copied
    order = lanes(bars.select("start_ns", "dur_ns", line.alias("track")))
    line = line.gather(order["row"])
    begins = (line != line.shift()) | (order["lane"] != order["lane"].shift())
    begins = begins.fill_null(value=True)
    tracks = lines.drop("track")[line.filter(begins)].with_columns(order["lane"].filter(begins))
    known = ("start_ns", "dur_ns") if "row" in bars.columns else ()
    bars = bars.drop(*_LINE, *known)[order["row"]]
    return bars.with_columns(track=begins.cum_sum().cast(pl.UInt32) - 1), tracks


def _calls(events: pl.DataFrame, work: pl.DataFrame) -> pl.DataFrame:
    """What the host did; an arrow begins at every call whose work began no earlier."""
    reached = work.filter(pl.col("delay_ns") >= 0)["launch_row"].unique()
    rows = _rows_of(events, on_device=False)
    number = pl.col("row") + 1
    return pl.DataFrame(
        {name: events[column].gather(rows) for name, column in _HOST.items()} | {"row": rows}
    ).with_columns(arrow_from=pl.when(pl.col("row").is_in(reached.cast(pl.UInt32).implode())).then(number))


_HOST = {"rank": "rank", "owner": "process", "line": "thread", "start_ns": "start_ns", "dur_ns": "dur_ns"}


def _work(events: pl.DataFrame, work: pl.DataFrame) -> pl.DataFrame:
    """What the devices did, with the class of kernels; an arrow ends at what did not begin before its call."""
    number = pl.col("launch_row").cast(pl.UInt32) + 1
    return work.select(
        *("rank", "start_ns", "dur_ns", "class"),
        _rows_of(events, on_device=True),
        owner="device",
        line="stream",
        arrow_to=pl.when(pl.col("delay_ns") >= 0).then(number),
    )


def _rows_of(events: pl.DataFrame, on_device: bool) -> pl.Series:
    """The rows of EVENTS of device work, or of all others."""
    is_work = events["kind"].is_in(pl.Series(DEVICE_KINDS, dtype=EVENTS["kind"]).implode())
    return (is_work if on_device else ~is_work).arg_true().alias("row")


def _classes(_: pl.DataFrame, work: pl.DataFrame) -> pl.DataFrame:
    """When any kernel of a class ran on a device: touching and overlapping ones as one bar, with their number."""
    kernels = work.filter(pl.col("kind") == "kernel")
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
            owner="device",
            line=pl.col("class").to_physical().cast(pl.Int64),
            name=pl.col("class").cast(pl.Categorical),
            dur_ns=pl.col("end_ns") - pl.col("start_ns"),
        )
    )


def _idle(_: pl.DataFrame, work: pl.DataFrame) -> pl.DataFrame:
    """The gaps of each device between its first and its last work, with the name of what ended them."""
    return (
        work.sort(*DEVICE, "start_ns")
        .with_columns(end_ns=pl.col("start_ns") + pl.col("dur_ns"))
        .with_columns(idle_from=_covered_until(*DEVICE))
        .filter(pl.col("start_ns") > pl.col("idle_from"))
        .select(
            "rank",
            owner="device",
            line=pl.lit(None, pl.Int64),
            name=pl.lit("idle", pl.Categorical),
            start_ns="idle_from",
            dur_ns=pl.col("start_ns") - pl.col("idle_from"),
            ended_by="name",
        )
    )


def _covered_until(*keys: str) -> pl.Expr:
    """Until when earlier work of the same keys went on; null for the first."""
    return pl.col("end_ns").cum_max().shift(1).over(*keys)


def _delays(_: pl.DataFrame, work: pl.DataFrame) -> pl.DataFrame:
    """From the start of its call to each kernel."""
    called = pl.col("launch_start_ns")
    return _waits(work, called, pl.col("start_ns") >= called)


def _queueing(_: pl.DataFrame, work: pl.DataFrame) -> pl.DataFrame:
    """From the end of its call to each kernel that began later."""
    returned = pl.col("launch_start_ns") + pl.col("launch_dur_ns")
    return _waits(work, returned, pl.col("start_ns") > returned)


def _waits(work: pl.DataFrame, since: pl.Expr, is_drawn: pl.Expr) -> pl.DataFrame:
    return work.filter((pl.col("kind") == "kernel") & is_drawn).select(
        "rank",
        "name",
        owner="device",
        line=pl.lit(None, pl.Int64),
        start_ns=since,
        dur_ns=pl.col("start_ns") - since,
    )


_DRAWN = {
    "host": _calls,
    "stream": _work,
    "class": _classes,
    "idle": _idle,
    "launch delay": _delays,
    "queueing": _queueing,
}


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
    copies = (
        events.filter((pl.col("kind") == "copy") & (pl.col("bytes") > 0) & (pl.col("dur_ns") > 0))
        .select(
            *DEVICE,
            since_ns="start_ns",
            until_ns=pl.col("start_ns") + pl.col("dur_ns"),
            amount=(pl.col("bytes") * NS_PER_S / pl.col("dur_ns")).round().cast(pl.Int64, strict=False),
            name=pl.lit("copies in bytes per second"),
        )
        .drop_nulls("amount")
    )  # no copy is faster than a counter can say
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
