"""How does a trace of the PyTorch profiler (Kineto, Chrome JSON) become EVENTS."""

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, BinaryIO

import msgspec
import polars as pl

from perfmodel.errors import InputError
from perfmodel.readers.api import with_api_kinds
from perfmodel.readers.blocks import BLOCK_BYTES, lenient, read_array
from perfmodel.text import NS_PER_US
from perfmodel.trace import DEVICE_KINDS, EVENTS, MAX_DUR_NS, Trace

# Kineto's categories, today's and those written before torch 1.12. `gpu_user_annotation` is a copy of a host range.
KIND_OF_CATEGORY = {
    "cpu_op": "op",
    "Operator": "op",
    "user_annotation": "range",
    "Runtime": "call",
    "kernel": "kernel",
    "Kernel": "kernel",
    "mtia_ccp_events": "kernel",
    "gpu_memcpy": "copy",
    "Memcpy": "copy",
    "gpu_memset": "set",
    "Memset": "set",
    "graph_replay": "replay",  # ours: what `perfetto.export_perfetto` writes of traces of Nsight Systems
}
# cuda_, hip_, mtia_, xpu_, privateuse1_ ...
_API_CATEGORY = re.compile(r".*_(?:runtime|driver)")

# Below this many microseconds a float64 lies nearer to the decimal it was read from than half a nanosecond.
EXACT_BELOW_US = 2.0**43
_MAX_INT64 = 2**63 - 1
_MAX_US = _MAX_INT64 // NS_PER_US
_QUOTED_NAME = re.compile(
    r'("name"\s*:\s*")(.*?)("\s*(?:,\s*"(?:ph|cat|pid|tid|ts|dur|args|id|s|bp)"\s*:|}\s*$))', re.DOTALL
)
_BARE_QUOTE = re.compile(r'(?<!\\)"')
_MATRIX_PRODUCT = re.compile(
    r"mm\b|mm_|gemm|matmul|linear|einsum|moe|expert", re.I
)  # operators whose operands are kept
_LAST_NUMBER = re.compile(r"(-?\d+)\s*$")

_INPUT_KEYS = ("Input Dims", "Input type")

Whole = int | str | None  # whole numbers that some writers put into strings
Us = int | float | Decimal | None


_NO_TEXT = msgspec.Raw(b"")


class Args(msgspec.Struct, gc=False):
    """The arguments of an event that are kept."""

    correlation: Whole = None
    stream: Whole = None
    device: Whole = None
    bytes: Whole = None
    graph: Whole = msgspec.field(default=None, name="graph id")
    external: Whole = msgspec.field(default=None, name="External id")
    external_old: Whole = msgspec.field(default=None, name="external id")
    dims: msgspec.Raw = msgspec.field(default=_NO_TEXT, name="Input Dims")
    types: msgspec.Raw = msgspec.field(default=_NO_TEXT, name="Input type")


class Event(msgspec.Struct, gc=False):
    """One element of `traceEvents`; `ts` and `dur` in microseconds, as integer where the text has no fraction.

    The decoder never makes a Decimal here; mending an element does.
    """

    ph: str | None = None
    cat: str | None = None
    name: str | None = None
    pid: Whole = None
    tid: Whole = None
    ts: int | float | None = None
    dur: int | float | None = None
    args: Args | None = None


class ExactEvent(Event, gc=False):
    """The same with `ts` as the decimal number of the text: slower, for microseconds since 1970 with decimals."""

    ts: Decimal | None = None  # type: ignore[assignment]


_FAST = msgspec.json.Decoder(list[Event])
_EXACT = msgspec.json.Decoder(list[ExactEvent])
_NO_ARGS = Args()


def read_kineto(stream: BinaryIO, block_bytes: int = BLOCK_BYTES) -> Trace:
    """The trace in a stream of Kineto JSON; times are those of the file, from `baseTimeNanoseconds` where it is given.

    Raises InputError when the stream is not a profiler trace or ends early.
    """
    frames: list[pl.DataFrame] = []
    n_events = n_timed = 0

    def take(events: list[Event]) -> None:
        nonlocal n_events, n_timed
        n_events += len(events)
        frame = _timed(events)
        n_timed += frame.height
        frames.append(_usable(frame))

    rest = read_array(stream, _decode, _mended, take, block_bytes)
    if not n_timed:
        raise InputError(
            f"found {n_events} Chrome trace events but none that the PyTorch profiler writes (cpu_op, kernel, "
            "cuda_runtime ...); expected a trace exported by torch.profiler"
        )
    events = _without_zero_starts(pl.concat(frames))
    n_negative = events.filter(pl.col("dur_ns") < 0).height
    rank = pl.lit(rank_of(rest.meta), EVENTS["rank"]).alias("rank")
    events = with_api_kinds(events.with_columns(pl.col("dur_ns").clip(lower_bound=0), rank))
    note = "the array of events is not closed: the writer was stopped, and later events are missing"
    return Trace(
        events,
        "kineto",
        n_events,
        n_dropped=n_timed - events.height,
        n_repaired=rest.n_mended + n_negative,
        notes=(note,) if rest.unclosed else (),
        meta=rest.meta,
    )


def rank_of(meta: Mapping[str, Any]) -> int | None:
    """Which rank of its process group recorded a trace; null where its document does not say."""
    group = meta.get("distributedInfo")
    rank = group.get("rank") if isinstance(group, Mapping) else None
    return rank if type(rank) is int and 0 <= rank < 2**31 else None


def _decode(block: bytes | memoryview) -> list[Event]:
    """The events of a JSON array, with decimal `ts` where a float would not tell the nanosecond."""
    events = _FAST.decode(block)
    if any(type(e.ts) is float and not -EXACT_BELOW_US < e.ts < EXACT_BELOW_US for e in events):
        return list(_EXACT.decode(block))
    return events


def to_ns(us: Iterable[Us]) -> pl.Series:
    """Microseconds as whole nanoseconds, exact for decimals of up to three digits; null where no usable number is.

    Whole and fractional microseconds are scaled apart: below 2**43 the fraction of a float64 is off by less than half
    a nanosecond, while the product of the undivided number with 1000 may round a second time, to the wrong side.
    """
    values = list(us)
    if set(map(type, values)) <= {int, float, type(None)}:
        number = pl.Series(values, dtype=pl.Float64, strict=False)
        largest = number.abs().max()
        if largest is None or (isinstance(largest, float) and largest < EXACT_BELOW_US):
            whole = number.floor()
            return whole.cast(pl.Int64) * NS_PER_US + ((number - whole) * NS_PER_US).round().cast(pl.Int64)
    return pl.Series([_one_to_ns(value) for value in values], dtype=pl.Int64)


def _one_to_ns(us: Us) -> int | None:
    if us is None or not -_MAX_US < us < _MAX_US:
        return None
    return round(us * NS_PER_US)


def _timed(events: list[Event]) -> pl.DataFrame:
    """EVENTS of the timed events of kept categories; start and duration are null or absurd where the file's are."""
    kind_of = {category: _kind(category) for category in {e.cat for e in events}}
    kept = [e for e in events if e.ph == "X" and kind_of[e.cat]]
    args = [e.args or _NO_ARGS for e in kept]
    kinds = [kind_of[e.cat] for e in kept]
    on_device = [kind in DEVICE_KINDS for kind in kinds]
    rows = list(zip(kept, args, on_device, strict=True))
    return pl.DataFrame(
        {
            "kind": kinds,
            "name": [e.name or "unknown" for e in kept],
            "start_ns": to_ns(e.ts for e in kept),
            "dur_ns": to_ns(e.dur for e in kept),
            "process": [None if device else _whole(e.pid) for e, _, device in rows],
            "thread": [None if device else _whole(e.tid) for e, _, device in rows],
            "device": [_whole(e.pid if a.device is None else a.device) if device else None for e, a, device in rows],
            "stream": [_whole(e.tid if a.stream is None else a.stream) if device else None for e, a, device in rows],
            "rank": None,
            "link": [_whole(a.correlation, in_text=False) for a in args],
            "external": [_whole(a.external if a.external is not None else a.external_old) for a in args],
            "bytes": [_whole(a.bytes) if device else None for _, a, device in rows],
            "graph": [_whole(a.graph) if device else None for _, a, device in rows],
            "inputs": [
                _inputs(e.name, a) if kind == "op" else None for e, a, kind in zip(kept, args, kinds, strict=True)
            ],
        },
        schema=EVENTS,
    )


def _inputs(name: str | None, args: Args) -> str | None:
    """The operand dims and dtypes of a matrix product as JSON text `[dims, dtypes]`; null for other operators."""
    if not name or not bytes(args.dims) or not _MATRIX_PRODUCT.search(name):
        return None
    return f"[{bytes(args.dims).decode()},{bytes(args.types).decode() or '[]'}]"


def _kind(category: str | None) -> str | None:
    if category is None:
        return None
    return KIND_OF_CATEGORY.get(category) or ("call" if _API_CATEGORY.fullmatch(category) else None)


def _whole(value: Whole, in_text: bool = True) -> int | None:
    """A whole number from a number or a text such as `7` or `0x0`, and with `in_text` `GPU 0`; null without one."""
    if type(value) is int:
        return value if -_MAX_INT64 <= value <= _MAX_INT64 else None
    if not isinstance(value, str):
        return None
    try:
        return _whole(int(value, 0))
    except ValueError:
        found = _LAST_NUMBER.search(value) if in_text else None
        return _whole(int(found[1])) if found else None


def _usable(events: pl.DataFrame) -> pl.DataFrame:
    """The events with a start, a duration that can be true, and a device where they ran on one."""
    has_device = pl.col("device").is_not_null() | ~pl.col("kind").is_in(DEVICE_KINDS)
    return events.filter(
        pl.col("start_ns").is_not_null() & pl.col("dur_ns").is_between(-MAX_DUR_NS, MAX_DUR_NS) & has_device
    )


def _without_zero_starts(events: pl.DataFrame) -> pl.DataFrame:
    """The events without those at time 0 in a trace whose clock stands far from 0: their start was never recorded."""
    others = events.filter(pl.col("start_ns") != 0)
    is_far = not others.is_empty() and not (others["start_ns"] <= MAX_DUR_NS).any()
    return others if is_far else events


def _mended(text: str) -> Event | None:
    """The event in a text that is not strict JSON (quotes in names, control characters, NaN ...) or has odd types."""
    try:
        value = lenient(text, Decimal)
    except ValueError:
        try:
            quoted = _QUOTED_NAME.sub(lambda m: m[1] + _BARE_QUOTE.sub(r"\"", m[2]) + m[3], text, count=1)
            value = lenient(quoted, Decimal)
        except ValueError:
            return None
    if not isinstance(value, dict):
        return None
    args = value.get("args")
    args = args if isinstance(args, dict) else {}
    return Event(
        ph=_text(value.get("ph")),
        cat=_text(value.get("cat")),
        name=_text(value.get("name")),
        pid=_number(value.get("pid")),
        tid=_number(value.get("tid")),
        ts=_us(value.get("ts")),
        dur=_us(value.get("dur")),
        args=_mended_args(args),
    )


def _mended_args(args: Mapping[str, Any]) -> Args:
    numbers = {
        field: _number(args.get(key))
        for field, key in zip(Args.__struct_fields__, Args.__struct_encode_fields__, strict=True)
        if field not in ("dims", "types")
    }
    dims, types = (msgspec.Raw(msgspec.json.encode(args[key])) if key in args else _NO_TEXT for key in _INPUT_KEYS)
    return Args(**numbers, dims=dims, types=types)


def _text(value: Any) -> str | None:
    # An escaped half of a surrogate pair is legal JSON and no legal text.
    return None if value is None else str(value).encode("utf-8", "replace").decode()


def _number(value: Any) -> Whole:
    if isinstance(value, Decimal):
        return int(value) if value.is_finite() and value == int(value) else None
    return value if isinstance(value, int | str) else None


def _us(value: Any) -> Any:
    try:
        us = Decimal(value) if isinstance(value, int | str | Decimal) else Decimal("NaN")
    except ArithmeticError:
        return None
    return us if us.is_finite() else None
