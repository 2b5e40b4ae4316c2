"""How does a trace of the PyTorch profiler (Kineto, Chrome JSON) become EVENTS."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import polars as pl

from perfmodel.errors import InputError
from perfmodel.readers.api import api_kind
from perfmodel.readers.blocks import BLOCK_BYTES, Stream
from perfmodel.readers.document import read_array
from perfmodel.readers.kineto_events import (
    NO_ARGS,
    NO_TEXT,
    Args,
    Event,
    Whole,
    blocks_of,
    collective_of,
    decode_events,
    inputs_of,
    mended,
    whole,
)
from perfmodel.readers.limits import Limits
from perfmodel.trace import DEVICE_KINDS, EVENTS, MAX_DUR_NS, MAX_RANK, MODULE_PREFIX, Trace, filtered, repeated

# Kineto's categories, today's and those written before torch 1.12. `gpu_user_annotation` is a copy of a host range.
HOST_KIND_OF_CATEGORY = {
    "cpu_op": "op",
    "Operator": "op",
    "user_annotation": "range",
    "Runtime": "call",
    "overhead": "overhead",
    "hpu_op": "call",
    "python_function": "range",
}
DEVICE_KIND_OF_CATEGORY = {
    "kernel": "kernel",
    "Kernel": "kernel",
    "mtia_ccp_events": "kernel",
    "gpu_memcpy": "copy",
    "Memcpy": "copy",
    "gpu_memset": "set",
    "Memset": "set",
    "graph_replay": "replay",  # ours: what `perfetto.export_perfetto` writes of traces of Nsight Systems
}
# Calls of Python are most events of a trace with stacks; of them calls of MoE modules are kept, as ranges.
_PYTHON = "python_function"
_MOE = re.compile(re.escape(MODULE_PREFIX) + ".*(?:moe|expert)", re.I)
# cuda_, hip_, mtia_, xpu_, privateuse1_ ...
_API_CATEGORY = re.compile(r".*_(?:runtime|driver)")

BATCH_ROWS = 2**13  # fewer, larger frames cost less, but keep what they are made of in memory for longer
_NO_PROCESS = -1
# Operators whose operands are kept.
_MATRIX_PRODUCT = re.compile(r"mm\b|mm_|gemm|matmul|linear|einsum|moe|expert", re.I)
_US = pl.Decimal(38, 3)  # microseconds with three decimals: whole nanoseconds underneath


def read_kineto(stream: Stream, block_bytes: int = BLOCK_BYTES, limits: Limits | None = None) -> Trace:
    """The trace in a stream of Kineto JSON; times are those of the file, from `baseTimeNanoseconds` where it is given.

    A damaged document is read as far as it is sound, and `notes` and counts say what is missing. Raises InputError
    when the stream is not a profiler trace, TooLargeError when it has more events than `limits` allow.
    """
    frames: list[pl.DataFrame] = []
    host, device = _Kept(), _Kept()
    kind_of, is_product = _Looked(_kind), _Looked(_is_product)
    n_events = n_timed = n_negative = 0
    refuse_late = limits.clock() if limits is not None else lambda: None

    def flush(kept: _Kept, rows: Callable[[_Kept], pl.DataFrame]) -> None:
        nonlocal n_timed, n_negative
        frame = rows(kept)
        n_timed += frame.height
        usable = _usable(frame)
        n_here = int((usable["dur_ns"] < 0).sum())
        n_negative += n_here
        frames.append(usable.with_columns(pl.col("dur_ns").clip(lower_bound=0)) if n_here else usable)
        kept.clear()

    def take(events: list[Event]) -> None:
        nonlocal n_events
        n_events += len(events)
        if limits is not None:
            refuse_late()
            limits.refuse_events(n_events)
        kept: list[Event] = []
        if _PYTHON not in kind_of:
            kept = [e for e in events if kind_of[e.cat] and e.ph == "X"]
        if _PYTHON in kind_of:  # it was met, here or before; no other trace pays for the look at names
            kept = [
                e
                for e in events
                if (e.cat != _PYTHON or (e.name and MODULE_PREFIX in e.name and _MOE.match(e.name)))
                and kind_of[e.cat]
                and e.ph == "X"
            ]
        _keep_host(host, [e for e in kept if e.cat not in DEVICE_KIND_OF_CATEGORY], kind_of, is_product)
        _keep_device(device, [e for e in kept if e.cat in DEVICE_KIND_OF_CATEGORY], kind_of)
        if len(host.kinds) >= BATCH_ROWS:
            flush(host, _host_rows)
        if len(device.kinds) >= BATCH_ROWS:
            flush(device, _device_rows)

    def mend(event: str) -> Event | None:
        refuse_late()
        return mended(event)

    rest = read_array(stream, decode_events, mend, take, block_bytes)
    flush(host, _host_rows)
    flush(device, _device_rows)
    if not n_timed:
        raise InputError(
            f"found {n_events} Chrome trace events but none that the PyTorch profiler writes (cpu_op, kernel, "
            "cuda_runtime ...); expected a trace exported by torch.profiler"
            + "".join(f"; {note}" for note in rest.notes)
        )
    rank = rank_of(rest.meta)
    ranked = [frame.with_columns(repeated("rank", rank, frame.height)) for frame in frames]
    # Not rechunked: the pieces stay where they are, and the table never stands in memory twice.
    events = _with_launches(_at_true_times(pl.concat(ranked, rechunk=False)))
    return Trace(
        events,
        "kineto",
        n_events,
        n_dropped=n_timed - events.height + rest.n_damaged,
        n_repaired=rest.n_mended + n_negative,
        notes=rest.notes,
        meta=rest.meta,
    )


def rank_of(meta: Mapping[str, Any]) -> int | None:
    """Which rank of its process group recorded a trace; null where its document does not say."""
    group = meta.get("distributedInfo")
    rank = group.get("rank") if isinstance(group, Mapping) else None
    return rank if type(rank) is int and 0 <= rank <= MAX_RANK else None


class _Looked(dict[Any, Any]):
    """What is known of each category, name or text, found when it is met first."""

    def __init__(self, find: Callable[[Any], Any]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, key: Any) -> Any:
        self[key] = found = self._find(key)
        return found


@dataclass
class _Kept:
    """The events of several blocks that become one frame: fewer, larger columns cost less.

    Numbers in `lines` are texts, one a line; nothing here refers to the block that was decoded, whose memory is used
    again.
    """

    kinds: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    ts_lines: list[bytes] = field(default_factory=list)
    dur_lines: list[bytes] = field(default_factory=list)
    wheres: list[Whole] = field(default_factory=list)  # process or device
    lanes: list[Whole] = field(default_factory=list)  # thread or stream
    links: list[Whole] = field(default_factory=list)
    externals: list[Whole] = field(default_factory=list)
    inputs: list[str | None] = field(default_factory=list)
    n_bytes: list[Whole] = field(default_factory=list)
    graphs: list[Whole] = field(default_factory=list)
    collectives: list[str | None] = field(default_factory=list)
    grid_lines: list[bytes] = field(default_factory=list)
    occupancies: list[Whole | float] = field(default_factory=list)

    def clear(self) -> None:
        """Forget all events."""
        for column in vars(self).values():
            column.clear()

    def add(self, kinds: list[str], events: list[Event], args: list[Args]) -> None:
        """Keep what every event has."""
        self.kinds += kinds
        self.names += [e.name or "unknown" for e in events]
        self.ts_lines.append(_lines([e.ts for e in events]))
        self.dur_lines.append(_lines([e.dur for e in events]))
        self.links += [a.correlation for a in args]
        self.externals += [a.external if a.external is not None else a.external_old for a in args]


def _keep_host(kept: _Kept, events: list[Event], kind_of: _Looked, is_product: _Looked) -> None:
    """Keep what ran on the host."""
    if not events:
        return
    args = [e.args or NO_ARGS for e in events]
    kinds = [kind_of[e.cat] for e in events]
    if "call" in kinds:
        kinds = [api_kind(e.name or "") if kind == "call" else kind for e, kind in zip(events, kinds, strict=True)]
    kept.add(kinds, events, args)
    kept.wheres += [e.pid for e in events]
    kept.lanes += [e.tid for e in events]
    kept.inputs += [inputs_of(a) if is_product[e.name] else None for e, a in zip(events, args, strict=True)]


def _keep_device(kept: _Kept, events: list[Event], kind_of: _Looked) -> None:
    """Keep what ran on a device; its number is null where the file names none."""
    if not events:
        return
    args = [e.args or NO_ARGS for e in events]
    kept.add([kind_of[e.cat] for e in events], events, args)
    kept.wheres += [e.pid if a.device is None else a.device for e, a in zip(events, args, strict=True)]
    kept.lanes += [e.tid if a.stream is None else a.stream for e, a in zip(events, args, strict=True)]
    kept.n_bytes += [a.bytes for a in args]
    kept.graphs += [a.graph for a in args]
    kept.grid_lines.append(_lines([a.grid for a in args]))
    kept.occupancies += [a.occupancy for a in args]
    kept.collectives += [collective_of(a) if a.collective is not NO_TEXT else None for a in args]


def _host_rows(kept: _Kept) -> pl.DataFrame:
    process, thread = _whole_numbers(kept.wheres), _whole_numbers(kept.lanes)
    if (process == _NO_PROCESS).any():  # of overhead, whose thread is then 0
        is_known = process != _NO_PROCESS
        process, thread = (pl.select(pl.when(is_known).then(column)).to_series() for column in (process, thread))
    return _rows(kept, process=process, thread=thread, inputs=pl.Series(kept.inputs, dtype=pl.String))


def _device_rows(kept: _Kept) -> pl.DataFrame:
    return _rows(
        kept,
        device=_whole_numbers(kept.wheres),
        stream=_whole_numbers(kept.lanes),
        bytes=_whole_numbers(kept.n_bytes),
        graph=_whole_numbers(kept.graphs),
        blocks=_looked_up(kept.grid_lines, blocks_of, EVENTS["blocks"]),
        collective=pl.Series(kept.collectives, dtype=pl.String),
        occupancy_frac=_fractions(kept.occupancies),
    )


def _rows(kept: _Kept, **columns: pl.Series) -> pl.DataFrame:
    """EVENTS from what is kept and the given columns, else null; times are null or absurd where the file has such."""
    columns |= {
        "kind": pl.Series(kept.kinds, dtype=EVENTS["kind"]),
        "name": pl.Series(kept.names, dtype=pl.String),
        "start_ns": to_ns(kept.ts_lines),
        "dur_ns": to_ns(kept.dur_lines),
        "link": _whole_numbers(kept.links, in_text=False),
        "external": _whole_numbers(kept.externals),
    }
    n_rows = len(kept.kinds)
    return pl.DataFrame(
        [
            columns[name].cast(dtype).alias(name) if name in columns else repeated(name, None, n_rows)
            for name, dtype in EVENTS.items()
        ]
    )


def _lines(texts: Sequence[bytes | msgspec.Raw]) -> bytes:
    """One text a line; a text of several lines, which is no number, becomes one."""
    lines = b"\n".join(texts)
    if lines.count(b"\n") >= len(texts):
        lines = b"\n".join(bytes(text).replace(b"\n", b" ") for text in texts)
    return lines


def _texts(lines: Sequence[bytes]) -> pl.Series:
    """Lines as a column of texts."""
    texts = b"\n".join(lines).decode("utf-8", "replace").split("\n") if lines else []
    return pl.Series(texts, dtype=pl.String)


def _looked_up(lines: Sequence[bytes], find: Callable[[str], Any], dtype: pl.DataType) -> pl.Series:
    """What `find` makes of each line, called once for each distinct one: kernels of a trace share few shapes."""
    text = _texts(lines)
    distinct = text.unique()
    return text.replace_strict(distinct, pl.Series([find(one) for one in distinct], dtype=dtype), return_dtype=dtype)


def to_ns(lines: Sequence[bytes]) -> pl.Series:
    """Microseconds, one a line, as whole nanoseconds, exact for decimals of up to three digits; else null.

    The numbers go from their text to 128-bit decimals without ever being a float, which resolves an absolute time only
    to 250 ns. Numbers that stand in quotes count too.
    """
    text = _texts(lines)
    ns = text.cast(_US, strict=False).to_physical()
    if ns.null_count():
        ns = ns.zip_with(ns.is_not_null(), text.str.strip_chars('" ').cast(_US, strict=False).to_physical())
    return ns.cast(pl.Int64, strict=False)


def _whole_numbers(values: list[Whole], in_text: bool = True) -> pl.Series:
    """A column of whole numbers; those in texts, as some writers have them, are read one by one."""
    try:
        return pl.Series(values, dtype=pl.Int64)
    except (TypeError, OverflowError):
        return pl.Series([whole(value, in_text) for value in values], dtype=pl.Int64)


def _fractions(percents: list[Whole | float]) -> pl.Series:
    """A column of fractions from percentages, null where there is none."""
    try:
        percent = pl.Series(percents, dtype=EVENTS["occupancy_frac"])
    except (TypeError, OverflowError):  # a text, or a number as no percentage is
        numbers = [value if isinstance(value, int | float) and 0 <= value <= 100 else None for value in percents]
        percent = pl.Series(numbers, dtype=EVENTS["occupancy_frac"])
    return pl.select(pl.when(percent.is_between(0, 100)).then(percent / 100)).to_series()


def _kind(category: str | None) -> str | None:
    """The kind of the events of a category, `call` for every API call; null for those that are not kept."""
    if category is None:
        return None
    known = HOST_KIND_OF_CATEGORY.get(category) or DEVICE_KIND_OF_CATEGORY.get(category)
    return known or ("call" if _API_CATEGORY.fullmatch(category) else None)


def _is_product(name: str | None) -> bool:
    return name is not None and _MATRIX_PRODUCT.search(name) is not None


def _usable(events: pl.DataFrame) -> pl.DataFrame:
    """The events with a start, a duration that can be true, and a device where they ran on one."""
    has_device = pl.col("device").is_not_null() | ~pl.col("kind").is_in(DEVICE_KINDS)
    is_usable = pl.col("start_ns").is_not_null() & pl.col("dur_ns").is_between(-MAX_DUR_NS, MAX_DUR_NS) & has_device
    return filtered(events, is_usable)


def _at_true_times(events: pl.DataFrame) -> pl.DataFrame:
    """The events without those more than a week from the others: their start was never recorded (0) or is damaged.

    One of them would make every idle time years long. The others are those of the same process or device, around the
    median of their starts other than 0: ranks that were recorded in different years may stand in one file.
    """
    first, last = events.select(first=pl.min("start_ns"), last=pl.max("start_ns")).row(0)
    if first is None or last - first <= MAX_DUR_NS:
        return events  # a filter that keeps all rows would copy them
    start = pl.col("start_ns")
    middle = pl.when(start != 0).then(start).quantile(0.5, "lower")
    far_ns = (start.cast(pl.Float64) - pl.coalesce(middle.over("process", "device"), middle)).abs()
    return events.filter(far_ns <= MAX_DUR_NS)


def _with_launches(events: pl.DataFrame) -> pl.DataFrame:
    """EVENTS in which a call of a name we do not know is a launch if device work bears its link."""
    linked = events.select("kind", "link", row=pl.int_range(pl.len())).drop_nulls("link")
    calls = linked.filter(pl.col("kind") == "call")
    if calls.is_empty():
        return events
    launches = calls.join(linked.filter(pl.col("kind").is_in(DEVICE_KINDS)), on="link", how="semi")["row"]
    if launches.is_empty():
        return events
    is_launch = pl.int_range(pl.len()).is_in(launches.implode())
    kind = pl.when(is_launch).then(pl.lit("launch", EVENTS["kind"])).otherwise("kind")
    return events.with_columns(kind.alias("kind"))
