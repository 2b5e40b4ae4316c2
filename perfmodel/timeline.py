"""What was every thread and stream doing in a window of a trace, in no more bars than a picture can show.

Where there are more events than that, short neighbours on one line become one bar, which says how many it stands for
and for how long its line was busy with them; no time is lost or counted twice.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from perfmodel import text
from perfmodel.classify import classify
from perfmodel.errors import InputError
from perfmodel.groups import steps
from perfmodel.intervals import PROCESS, THREAD, holders, parents
from perfmodel.launch import call_starts, joined_work
from perfmodel.trace import BACKEND_PREFIX, DEVICE_KINDS, plain_name

MAX_BARS = 2000
MAX_DEPTH = 5  # of ranges and operators within one another
MAX_THREADS = 6
MAX_STREAMS = 12
N_DELAYS = 12

# Families of lines from top to bottom: ranges and operators, what the same thread called, what devices ran.
FAMILIES = pl.Enum(["host", "calls", "stream"])
LINE = ("rank", "family", "owner", "line", "lane")
_MOST_LINES = MAX_THREADS * (MAX_DEPTH + 1) + MAX_STREAMS
_WHAT = {
    "op": "operator",
    "range": "range",
    "launch": "launch call",
    "sync": "call that waits",
    "copy": "copy or set",
    "set": "copy or set",
    "replay": "graph replay",
}


@dataclass(frozen=True)
class Timeline:
    """The window of a trace from `start_ns` to `end_ns` as lines and bars.

    `lines` has a row for each line from top to bottom: `rank`, `family` (FAMILIES), `owner` (the process, or the
    device), `line` (the thread, or the stream) and `lane` (how deep ranges and operators lie in each other, else 0).
    `bars` has a row for each bar: `row` (of `lines`), `start_ns`, `end_ns` (both within the window), `what` (the class
    of a kernel, else a word for its kind; of several that which takes most time), `name` (null where the bar stands for
    several events), `n_events` and `busy_ns`, for how long its line was busy with them and with no earlier one: the
    `busy_ns` of a line add up to the union of its events. `delays` has some of the longest launch delays of the window,
    spread over it: `from_row`, `from_ns` (start of the call), `to_row`, `to_ns` (start of the kernel), `delay_ns` and
    `name`. Bars shorter than `grain_ns` were taken together; 0 where none were. `notes` say what is not shown as it is.
    """

    start_ns: int
    end_ns: int
    lines: pl.DataFrame
    bars: pl.DataFrame
    delays: pl.DataFrame
    grain_ns: int
    notes: tuple[str, ...]


def step_windows(events: pl.DataFrame, work: pl.DataFrame | None = None) -> pl.DataFrame:
    """Which windows show one step each: columns `rank`, `name`, `start_ns`, `end_ns`, in the order of `groups.steps`.

    A window ends when the last work launched in its step has ended, or with its step where that is later. Empty where
    the trace has no steps. `work` is `joined_work` of the events, if it is known already.
    """
    found = steps(events).with_columns(end_ns=pl.col("start_ns") + pl.col("dur_ns"))
    work = joined_work(events) if work is None else work
    launched = work.filter(pl.col("launch_row").is_not_null())
    last = (
        launched.select(ended_ns=pl.col("start_ns") + pl.col("dur_ns"))
        .with_columns(step=holders(found, call_starts(launched), PROCESS)["innermost"])
        .drop_nulls()
        .group_by("step")
        .agg(pl.max("ended_ns"))
    )
    return (
        found.with_columns(step=pl.int_range(pl.len()))
        .join(last, on="step", how="left", maintain_order="left")
        .select("rank", "name", "start_ns", end_ns=pl.max_horizontal("end_ns", "ended_ns"))
    )


def typical_step(windows: pl.DataFrame) -> int:
    """Which row of `step_windows` has the step of median length, the longer of two."""
    length = (windows["end_ns"] - windows["start_ns"]).arg_sort()
    return int(length[len(length) // 2])


def whole_window(events: pl.DataFrame) -> tuple[int, int]:
    """From when to when did anything happen; raises InputError on a trace without events."""
    if events.is_empty():
        raise InputError("the trace has no events, so there is nothing to draw")
    first, last = events.select(pl.min("start_ns"), last=(pl.col("start_ns") + pl.col("dur_ns")).max()).row(0)
    return int(first), max(int(last), int(first) + 1)


def timeline(
    events: pl.DataFrame,
    start_ns: int,
    end_ns: int,
    work: pl.DataFrame | None = None,
    max_bars: int = MAX_BARS,
) -> Timeline:
    """What did every thread and stream do between two moments: what began before or ended after is cut there.

    Of many threads those are shown that launched most, of many streams the busiest. `work` is `joined_work` of the
    events, if it is known already. Raises InputError on a window without time, or too few bars for the lines.
    """
    if end_ns <= start_ns:
        raise InputError(f"an empty window: start {start_ns} ns is not before end {end_ns} ns")
    if max_bars < _MOST_LINES:
        raise InputError(f"found a limit of {max_bars} bars, expected at least {_MOST_LINES}, one for each line")
    notes: list[str] = []
    seen = _in_window(events, start_ns, end_ns)
    seen = pl.concat([_on_threads(seen, notes), _on_streams(seen, notes)])
    lines = seen.select(LINE).unique().sort(pl.col("family") == "stream", "rank", "owner", "line", "family", "lane")
    lines = lines.with_row_index("row")
    seen = seen.join(lines, on=LINE, nulls_equal=True).drop(LINE)
    bars, grain_ns = _bars(seen, start_ns, end_ns, max_bars)
    if grain_ns:
        notes.append(
            f"{text.count(seen.height)} events are drawn as {text.count(bars.height)} bars: neighbours shorter than "
            f"{text.ns(grain_ns)} are taken together; a shorter window shows them one by one"
        )
    work = joined_work(events) if work is None else work
    delays = _delays(work, lines, start_ns, end_ns)
    return Timeline(start_ns, end_ns, lines.drop("row"), bars, delays, grain_ns, tuple(notes))


def _in_window(events: pl.DataFrame, start_ns: int, end_ns: int) -> pl.DataFrame:
    """The events that are drawn, as far as they lie in the window."""
    end = pl.col("start_ns") + pl.col("dur_ns")
    inside = (pl.col("start_ns") < end_ns) & ((end > start_ns) | (pl.col("start_ns") >= start_ns))
    columns = events.select("kind", "name", *THREAD, "device", "stream", "start_ns", "dur_ns")
    return columns.filter(inside & pl.col("kind").is_in([*_WHAT, "kernel"])).with_columns(
        start_ns=pl.max_horizontal("start_ns", pl.lit(start_ns)),
        dur_ns=pl.min_horizontal(end, pl.lit(end_ns)) - pl.max_horizontal("start_ns", pl.lit(start_ns)),
    )


def _on_threads(seen: pl.DataFrame, notes: list[str]) -> pl.DataFrame:
    """What the host did: ranges and operators as deep as they lie in each other, and calls on a line of their own."""
    host = seen.filter(~pl.col("kind").is_in(DEVICE_KINDS))
    nested = host.filter(pl.col("kind").is_in(["op", "range"]))
    nested = nested.with_columns(lane=_depth(nested))
    n_deep = int((nested["lane"] >= MAX_DEPTH).sum())
    if n_deep:
        notes.append(f"not drawn: {text.count(n_deep)} of the ranges and operators, in more than {MAX_DEPTH} others")
    calls = host.filter(pl.col("kind").is_in(["launch", "sync"])).with_columns(lane=pl.lit(0, pl.Int64))
    shown = pl.concat([nested.filter(pl.col("lane") < MAX_DEPTH), calls])
    used_ns = pl.col("dur_ns").filter(pl.col("lane") == 0).sum()
    by_thread = shown.group_by(THREAD).agg(n_launches=(pl.col("kind") == "launch").sum(), used_ns=used_ns)
    kept = by_thread.sort("n_launches", "used_ns", *THREAD, descending=[True, True, False, False, False])
    if kept.height > MAX_THREADS:
        notes.append(f"{MAX_THREADS} of {text.count(kept.height)} threads are drawn: those that launch or do most")
    is_call = pl.col("kind").is_in(["launch", "sync"])
    communicates = plain_name().str.contains(BACKEND_PREFIX)
    kind = pl.col("kind").cast(pl.String).replace_strict(_WHAT, return_dtype=pl.String)
    return shown.join(kept.head(MAX_THREADS), on=THREAD, how="semi", nulls_equal=True).select(
        "rank",
        pl.when(is_call).then(pl.lit("calls", FAMILIES)).otherwise(pl.lit("host", FAMILIES)).alias("family"),
        "lane",
        "start_ns",
        "dur_ns",
        owner="process",
        line="thread",
        what=pl.when(communicates).then(pl.lit("communication of the host")).otherwise(kind),
        name=plain_name(),
    )


def _depth(nested: pl.DataFrame) -> pl.Series:
    """In how many others lies each range or operator of its thread, MAX_DEPTH where in more."""
    parent = parents(nested).fill_null(-1).to_numpy()
    depth, above = np.zeros(len(parent), np.int64), parent
    for _ in range(MAX_DEPTH):
        depth += above >= 0
        above = np.where(above >= 0, parent[above], -1) if len(parent) else above
    return pl.Series("lane", depth, dtype=pl.Int64)


def _on_streams(seen: pl.DataFrame, notes: list[str]) -> pl.DataFrame:
    """What the devices did, a line for each stream, the busiest of many."""
    keys = ["rank", "device", "stream"]
    work = seen.filter(pl.col("kind").is_in(DEVICE_KINDS))
    kept = work.group_by(keys).agg(pl.sum("dur_ns")).sort("dur_ns", *keys, descending=[True, False, False, False])
    if kept.height > MAX_STREAMS:
        notes.append(f"{MAX_STREAMS} of {text.count(kept.height)} streams are drawn: those that are busiest")
    work = work.join(kept.head(MAX_STREAMS), on=keys, how="semi", nulls_equal=True)
    kind = pl.col("kind").cast(pl.String).replace_strict(_WHAT, default=None, return_dtype=pl.String)
    return work.select(
        "rank",
        pl.lit("stream", FAMILIES).alias("family"),
        pl.lit(0, pl.Int64).alias("lane"),
        "start_ns",
        "dur_ns",
        owner="device",
        line="stream",
        what=pl.coalesce(kind, classify(work["name"]).cast(pl.String)),
        name=pl.col("name").cast(pl.String),
    )


def _bars(seen: pl.DataFrame, start_ns: int, end_ns: int, max_bars: int) -> tuple[pl.DataFrame, int]:
    """At most `max_bars` bars, and below which length events were taken together: those that begin on one line in the
    same stretch of that length. The next longer event begins behind them, so bars cover each other only where events
    do."""
    seen = seen.sort("row", "start_ns", "dur_ns", descending=[False, False, True], maintain_order=True)
    end = pl.col("start_ns") + pl.col("dur_ns")
    earlier = end.cum_max().shift(1).over("row")
    seen = seen.with_columns(
        end_ns=end,
        busy_ns=(end - pl.max_horizontal("start_ns", earlier)).clip(lower_bound=0),
        event=pl.int_range(pl.len()),
    )
    grain_ns, bar = 0, pl.col("event")
    if seen.height > max_bars:
        grain_ns = max((end_ns - start_ns) // (8 * max_bars), 1)  # shorter ones could not be seen
        while True:
            is_short = pl.col("dur_ns") < grain_ns
            stretch = -1 - (pl.col("start_ns") - start_ns) // grain_ns  # negative: no event has such a number
            bar = pl.when(is_short).then(stretch).otherwise(pl.col("event"))
            if seen.select(pl.struct("row", bar).n_unique()).item() <= max_bars:
                break
            grain_ns *= 2
    seen = seen.with_columns(bar=bar)
    by_what = seen.group_by("row", "bar", "what").agg(pl.sum("dur_ns"))
    what = by_what.sort("dur_ns", "what", descending=[True, False]).group_by("row", "bar").agg(pl.first("what"))
    bars = seen.group_by("row", "bar").agg(
        pl.min("start_ns"),
        pl.max("end_ns"),
        pl.when(pl.len() == 1).then(pl.first("name")).alias("name"),
        n_events=pl.len().cast(pl.Int64),
        busy_ns=pl.sum("busy_ns"),
    )
    columns = ("row", "start_ns", "end_ns", "what", "name", "n_events", "busy_ns")
    return bars.join(what, on=["row", "bar"]).sort("row", "start_ns", "bar").select(columns), grain_ns


def _delays(work: pl.DataFrame, lines: pl.DataFrame, start_ns: int, end_ns: int) -> pl.DataFrame:
    """The longest delay of each of N_DELAYS equal parts of the window, of launches whose first kernel began in it."""
    launches = work.filter(pl.col("kind").is_in(["kernel", "replay"]), pl.col("launch_start_ns") >= start_ns)
    first = launches.sort("delay_ns", "start_ns").unique("launch_row", keep="first", maintain_order=True)
    first = first.filter(pl.col("start_ns") < end_ns, pl.col("delay_ns") > 0)
    part = (first["launch_start_ns"] - start_ns).to_numpy() * N_DELAYS // (end_ns - start_ns)
    longest = first.with_columns(part=pl.Series(part, dtype=pl.Int64)).unique("part", keep="last", maintain_order=True)
    callers = lines.filter(pl.col("family") == "calls").select(
        "rank", launch_process="owner", launch_thread="line", from_row="row"
    )
    streams = lines.filter(pl.col("family") == "stream").select("rank", device="owner", stream="line", to_row="row")
    return (
        longest.join(callers, on=["rank", "launch_process", "launch_thread"], nulls_equal=True)
        .join(streams, on=["rank", "device", "stream"], nulls_equal=True)
        .sort("launch_start_ns")
        .select(
            "from_row",
            "to_row",
            "delay_ns",
            from_ns="launch_start_ns",
            to_ns="start_ns",
            name=pl.col("name").cast(pl.String),
        )
    )
