"""How does a trace become a file that ui.perfetto.dev opens: Chrome JSON, with lines added that say what waited.

What is drawn is decided in `tracks`; what follows from the events has the category `perfmodel`, which no reader of
traces takes for an event. The traps of the format are told in docs/decisions/0015-perfetto.md.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec
import polars as pl
from isal import igzip

from perfmodel.classify import CLASSES
from perfmodel.errors import InputError
from perfmodel.text import NS_PER_US
from perfmodel.trace import Trace
from perfmodel.tracks import counters, drawing

ADDED = "perfmodel"
BLOCK_ROWS = 2**13  # what one block becomes is twenty times as large as its rows
MAX_VIEWED_NS = 2**42 * NS_PER_US  # up to here a float64 of microseconds times 1000 rounds to the right nanosecond
MAX_ID = 2**31 - 1

_CATEGORIES = {
    "op": "cpu_op",
    "range": "user_annotation",
    "launch": "cuda_runtime",
    "sync": "cuda_runtime",
    "call": "cuda_runtime",
    "kernel": "kernel",
    "copy": "gpu_memcpy",
    "set": "gpu_memset",
    "replay": "graph_replay",
    "overhead": "overhead",
}
_KEPT_META = ("deviceProperties", "distributedInfo")
# A viewer shows lines by process: those of a host process, of a device, and those on which kernels wait for a device.
_SHOWN_WITH = {"host": 0, "stream": 1, "class": 1, "idle": 1, "launch delay": 2, "queueing": 2}
_PROCESS = ("rank", "shown_with", "owner")


def export_perfetto(trace: Trace, path: str | Path) -> int:
    """Write a trace for ui.perfetto.dev, in gzip where the name ends in `.gz`; returns how many slices were written.

    Slices that overlap without nesting lie on further lines, since a viewer drops them. Reading the file back gives the
    same events, links and launch metrics; devices of several ranks get numbers of their own. Times stay as they are
    unless a viewer could not hold them to the nanosecond; then they count from the first event, and
    `baseTimeNanoseconds` takes up the difference. The file appears when it is complete. Raises InputError when it
    cannot be written.
    """
    drawn, zero_ns = drawing(trace.events), _zero_ns(trace.events)
    tracks = _tracks(drawn.tracks)
    numbers = tracks.sort("track").select("pid", "tid", "device_number", stream="line")
    devices = tracks.filter(family="stream").unique(["rank", "owner"]).select("rank", "pid", "tid", device="owner")
    texts = {"name": _by_code(_names(trace.events), _quoted), "inputs": _by_code(trace.events["inputs"], _inputs_text)}
    texts["collective"] = _by_code(trace.events["collective"], _collective_text)
    texts["ended_by"] = texts["name"]
    with _written(Path(path)) as file:
        file.write(_head(trace, zero_ns))
        file.write(",\n".join(_metadata(tracks)).encode())
        for sheet in drawn.slices():
            for block in sheet.iter_slices(BLOCK_ROWS):
                said = {name: text.gather(block[name].to_physical()) for name, text in texts.items() if name in block}
                placed = pl.concat([block.with_columns(**said), numbers[block["track"]]], how="horizontal")
                _write_rows(file, placed.select(_slice_text(placed.columns, zero_ns)))
        counted = counters(trace.events).join(devices, on=["rank", "device"], nulls_equal=True, maintain_order="left")
        for block in counted.iter_slices(BLOCK_ROWS):
            _write_rows(file, block.select(_counter_text(zero_ns)))
        file.write(b"\n]}\n")
    return sum(bars.height for bars in drawn.bars.values())


def _write_rows(file: IO[bytes], text: pl.DataFrame) -> None:
    file.write(b",\n" + text.to_series().str.join(",\n").item().encode())


def _names(events: pl.DataFrame) -> pl.Series:
    """All names that a bar can have."""
    added = pl.Series(["idle", *CLASSES], dtype=events.schema["name"])
    return pl.concat([events["name"].unique(), added])


def _by_code(column: pl.Series, write: Callable[[str], str]) -> pl.Series:
    """What `write` makes of each distinct text of a column, at the place that is the code of the text."""
    distinct = column.drop_nulls().unique()
    codes = distinct.to_physical()
    written = pl.Series([write(text) for text in distinct.cast(pl.String)], dtype=pl.String)
    return pl.Series([None], dtype=pl.String).new_from_index(0, 1 + max(codes, default=0)).scatter(codes, written)


def _zero_ns(events: pl.DataFrame) -> int:
    """Which moment is time 0 of the file: 0, or the first event where a viewer cannot hold the times as they are."""
    start, end = pl.col("start_ns"), pl.col("start_ns") + pl.col("dur_ns")
    is_finer = ((start % NS_PER_US != 0) | (end % NS_PER_US != 0)).any()
    first, last, finer = events.select(start.min(), end.max().alias("last"), is_finer.alias("finer")).row(0)
    return int(first) if first is not None and (first < 0 or (last >= MAX_VIEWED_NS and finer)) else 0


def _tracks(drawn: pl.DataFrame) -> pl.DataFrame:
    """Which process and thread number of the viewer, and which names, has each line; `track` is its row in `drawn`.

    Host processes and threads keep their numbers where no other line has them, so that they read back as they were.
    """
    n_ranks = drawn["rank"].n_unique()
    tracks = (
        drawn.with_row_index("track")
        .with_columns(shown_with=pl.col("family").replace_strict(_SHOWN_WITH, return_dtype=pl.Int64))
        .sort("rank", "shown_with", "owner", "family", "line", "lane")
    )
    processes = tracks.select(_PROCESS).unique(maintain_order=True)
    is_host = pl.col("shown_with") == 0
    is_own = is_host & pl.col("owner").is_between(1, MAX_ID) & pl.struct("owner", "shown_with").is_unique()
    processes = processes.with_columns(pid=_numbers(is_own, pl.col("owner"))).with_columns(
        process_name=_process_name(n_ranks), process_index=pl.int_range(pl.len())
    )
    tracks = tracks.join(processes, on=_PROCESS, nulls_equal=True, maintain_order="left")
    device = pl.struct("rank", "owner").rank("dense").over(~is_host) - 1 if n_ranks > 1 else pl.col("owner")
    is_own = is_host & (pl.col("lane") == 0) & pl.col("line").is_between(1, MAX_ID)
    return tracks.with_columns(
        tid=_numbers(is_own, pl.col("line")),
        thread_name=_thread_name(),
        thread_index=pl.int_range(pl.len()),
        device_number=pl.when(~is_host).then(device).cast(pl.Int64),
    )


def _numbers(keeps: pl.Expr, own: pl.Expr) -> pl.Expr:
    """`own` where it is kept, elsewhere a number that is above all kept ones."""
    kept = pl.when(keeps.fill_null(False)).then(own)
    return kept.fill_null(kept.max().fill_null(0) + 1 + pl.int_range(pl.len()))


def _process_name(n_ranks: int) -> pl.Expr:
    rank = pl.when(pl.col("rank").is_not_null() | (n_ranks > 1)).then(
        pl.format("rank {} ", pl.col("rank").cast(pl.String).fill_null("unknown"))
    )
    owner = pl.col("owner").cast(pl.String).fill_null("unknown")
    what = (
        pl.when(pl.col("shown_with") == 0)
        .then(pl.format("process {}", owner))
        .when(pl.col("shown_with") == 1)
        .then(pl.format("device {}", owner))
        .otherwise(pl.format("device {}: waiting kernels", owner))
    )
    return pl.concat_str(rank.fill_null(""), what)


def _thread_name() -> pl.Expr:
    line = pl.col("line").cast(pl.String).fill_null("unknown")
    family = pl.col("family").cast(pl.String)
    what = (
        pl.when(pl.col("family") == "host")
        .then(pl.format("thread {}", line))
        .when(pl.col("family") == "stream")
        .then(pl.format("stream {}", line))
        .when(pl.col("family") == "class")
        .then(pl.format("class {}", pl.col("line").replace_strict(range(len(CLASSES)), CLASSES, default=None)))
        .otherwise(family)
    )
    return pl.when(pl.col("lane") > 0).then(pl.format("{}, overlapping {}", what, pl.col("lane"))).otherwise(what)


def _head(trace: Trace, zero_ns: int) -> bytes:
    """The document up to its events: what is known of devices and ranks, and when time 0 is."""
    kept = {key: trace.meta[key] for key in _KEPT_META if key in trace.meta}
    base_ns = trace.meta.get("baseTimeNanoseconds")
    base_ns = base_ns if isinstance(base_ns, int) else 0
    base = {"baseTimeNanoseconds": base_ns + zero_ns} if base_ns + zero_ns else {}
    document = msgspec.json.encode({"schemaVersion": 1, **kept, **base})  # writes NaN as null
    return document[:-1] + b',"traceEvents":[\n'


def _metadata(tracks: pl.DataFrame) -> list[str]:
    """The names of processes and lines, and their order, for viewers that heed it."""

    def named(what: str, value: Any, key: str, pid: int, tid: int) -> str:
        return json.dumps({"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {key: value}})

    lines = []
    for row in tracks.unique("pid", maintain_order=True).iter_rows(named=True):
        lines.append(named("process_name", row["process_name"], "name", row["pid"], row["tid"]))
        lines.append(named("process_sort_index", row["process_index"], "sort_index", row["pid"], row["tid"]))
    for row in tracks.iter_rows(named=True):
        lines.append(named("thread_name", row["thread_name"], "name", row["pid"], row["tid"]))
        lines.append(named("thread_sort_index", row["thread_index"], "sort_index", row["pid"], row["tid"]))
    return lines


def _slice_text(columns: Sequence[str], zero_ns: int) -> pl.Expr:
    """One slice as the JSON of a complete event, with what a reader needs to find its event again."""
    arrows = {"arrow_from": ',"bind_id":%s,"flow_out":true', "arrow_to": ',"bind_id":%s,"flow_in":true'}
    is_recorded, on_device = "kind" in columns, "arrow_to" in columns
    category = pl.col("kind").cast(pl.String).replace_strict(_CATEGORIES) if is_recorded else pl.lit(ADDED)
    arguments = {
        "correlation": "link",
        **({"device": "device_number", "stream": "stream"} if on_device else {}),
        "External id": "external",
        "bytes": "bytes",
        "graph id": "graph",
        "class": "class",
        "kernels": "n_kernels",
        "ended by": "ended_by",
    }
    said = [_said(f',"{key}":%s', column) for key, column in arguments.items() if column in columns]
    said += [pl.col(column).fill_null("") for column in ("inputs", "collective") if column in columns]
    if "blocks" in columns:
        percent = (100.0 * pl.col("occupancy_frac").cast(pl.Float64)).round(3)
        said += [_filled(',"grid":[%s,1,1]', pl.col("blocks")).fill_null("")]
        said += [_filled(',"est. achieved occupancy %":%s', percent).fill_null("")]
    return _filled(
        '{"ph":"X","cat":"%s","name":%s,"pid":%s,"tid":%s,"ts":%s,"dur":%s%s,"args":{%s}}',
        category,
        pl.col("name"),
        pl.col("pid"),
        pl.col("tid"),
        _us(pl.col("start_ns") - zero_ns),
        _us(pl.col("dur_ns")),
        pl.concat_str([pl.lit(""), *(_said(text, column) for column, text in arrows.items() if column in columns)]),
        pl.concat_str([pl.lit(""), *said]).str.strip_prefix(","),
    )


def _said(template: str, column: str) -> pl.Expr:
    """A text with the value of a column in it, or nothing where that is null."""
    value = pl.format('"{}"', pl.col(column)) if column == "class" else pl.col(column)
    return _filled(template, value).fill_null("")


def _counter_text(zero_ns: int) -> pl.Expr:
    """One row of a counter as JSON."""
    return _filled(
        '{"ph":"C","cat":"%s","name":%s,"pid":%s,"tid":%s,"ts":%s,"args":{"value":%s}}',
        pl.lit(ADDED),
        pl.format('"{}"', "name"),
        pl.col("pid"),
        pl.col("tid"),
        _us(pl.col("at_ns") - zero_ns),
        pl.col("value"),
    )


def _filled(template: str, *values: pl.Expr) -> pl.Expr:
    """A text with a value in place of each `%s`; null where any value is."""
    before, *others = (pl.lit(part) for part in template.split("%s"))
    return pl.concat_str(before, *(part for pair in zip(values, others, strict=True) for part in pair))


def _us(time_ns: pl.Expr) -> pl.Expr:
    """A time that is not negative as microseconds: whole ones without decimals, others with three, from integers."""
    fraction = (time_ns % NS_PER_US).cast(pl.String).str.zfill(3)
    whole = (time_ns // NS_PER_US).cast(pl.String)
    return pl.when(time_ns % NS_PER_US == 0).then(whole).otherwise(pl.format("{}.{}", whole, fraction))


def _quoted(text: str) -> str:
    """A text as JSON that Perfetto reads: no character in halves, and no backslash before the closing quote."""
    return json.dumps(text, ensure_ascii=False).replace("\\\\", "\\u005c")


def _inputs_text(inputs: str) -> str:
    """The dims and types of operands, `[dims, types]`, under the names that the profiler gives them."""
    dims, types = msgspec.json.decode(inputs, type=tuple[msgspec.Raw, msgspec.Raw])
    return f',"Input Dims":{bytes(dims).decode()},"Input type":{bytes(types).decode()}'


def _collective_text(collective: str) -> str:
    """What a collective is and between whom, `[name, group, ranks]`, under the names that the profiler gives them."""
    found = msgspec.json.decode(collective, type=tuple[msgspec.Raw, msgspec.Raw, msgspec.Raw])
    keys = ("Collective name", "Process Group Name", "Process Group Ranks")
    said = [f'"{key}":{bytes(raw).decode()}' for key, raw in zip(keys, found, strict=True) if bytes(raw) != b"null"]
    return "".join(f",{one}" for one in said)


@contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name when it was written to the end; packed where the name ends in `.gz`.

    A link stays one, and leads to the new file. What is there and no file, a pipe or a device, is written to as it is,
    lest it be replaced.
    """
    try:
        target = path.resolve()
        in_place = target.exists() and not target.is_file()
        beside = target if in_place else target.parent / f".perfmodel-{os.getpid()}-{secrets.token_hex(4)}.tmp"
        try:
            if path.suffix == ".gz":
                with igzip.open(beside, "wb", compresslevel=2) as packed:  # type: ignore[no-untyped-call]
                    yield packed
            else:
                with beside.open("wb") as plain:
                    yield plain
            if not in_place:
                beside.replace(target)
        finally:
            if not in_place:
                beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
