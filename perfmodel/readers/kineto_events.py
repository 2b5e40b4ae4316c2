"""What is kept of one event of Kineto's JSON, and how one that is not strict JSON is mended."""

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import msgspec

from perfmodel.readers.blocks import lenient

_MAX_INT64 = 2**63 - 1
_MAX_INT32 = 2**31 - 1
_QUOTED_NAME = re.compile(
    r'("name"\s*:\s*")(.*?)("\s*(?:,\s*"(?:ph|cat|pid|tid|ts|dur|args|id|s|bp)"\s*:|}\s*$))', re.DOTALL
)
_BARE_QUOTE = re.compile(r'(?<!\\)"')
_LAST_NUMBER = re.compile(r"(-?\d+)\s*$")

NO_TEXT = msgspec.Raw(b"")

Whole = int | str | None  # whole numbers that some writers put into strings


class Args(msgspec.Struct, gc=False):
    """The arguments of an event that are kept, in the order in which Kineto writes them: so they are found soonest."""

    external: Whole = msgspec.field(default=None, name="External id")
    device: Whole = None
    stream: Whole = None
    correlation: Whole = None
    grid: msgspec.Raw = NO_TEXT
    occupancy: Whole | float = msgspec.field(default=None, name="est. achieved occupancy %")
    bytes: Whole = None
    graph: Whole = msgspec.field(default=None, name="graph id")
    types: msgspec.Raw = msgspec.field(default=NO_TEXT, name="Input type")
    dims: msgspec.Raw = msgspec.field(default=NO_TEXT, name="Input Dims")
    collective: msgspec.Raw = msgspec.field(default=NO_TEXT, name="Collective name")
    group: msgspec.Raw = msgspec.field(default=NO_TEXT, name="Process Group Name")
    members: msgspec.Raw = msgspec.field(default=NO_TEXT, name="Process Group Ranks")
    external_old: Whole = msgspec.field(default=None, name="external id")


class Event(msgspec.Struct, gc=False):
    """One element of `traceEvents`; `ts` and `dur` are the text of microseconds, which no float could hold exactly."""

    ph: str | None = None
    cat: str | None = None
    name: str | None = None
    pid: Whole = None
    tid: Whole = None
    ts: msgspec.Raw = NO_TEXT
    dur: msgspec.Raw = NO_TEXT
    args: Args | None = None


decode_events = msgspec.json.Decoder(list[Event]).decode
NO_ARGS = Args()
_RAW_ARGS = ("dims", "types", "grid", "collective", "group", "members")
_FIELDS = dict(zip(Args.__struct_fields__, Args.__struct_encode_fields__, strict=True))


def inputs_of(args: Args) -> str | None:
    """Operand dims and dtypes as JSON text `[dims, dtypes]`; null where none were recorded."""
    dims = bytes(args.dims)
    return (b"[%b,%b]" % (dims, bytes(args.types) or b"[]")).decode("utf-8", "replace") if dims else None


def collective_of(args: Args) -> str:
    """What a collective is, the name of its process group and the ranks in it as JSON text, null what is not said."""
    said = (bytes(raw).decode("utf-8", "replace") or "null" for raw in (args.collective, args.group, args.members))
    return f"[{','.join(said)}]"


def blocks_of(grid: str) -> int | None:
    """How many blocks a grid such as `[8, 2, 1]` has; null where the text is none."""
    try:
        sides = msgspec.json.decode(grid, type=list[int]) if grid else []
    except msgspec.DecodeError:
        return None
    n_blocks = math.prod(sides)
    return n_blocks if len(sides) == 3 and min(sides) > 0 and n_blocks <= _MAX_INT32 else None


def whole(value: Whole, in_text: bool = True) -> int | None:
    """A whole number from a number or a text such as `7` or `0x0`, and with `in_text` `GPU 0`; null without one."""
    if type(value) is int:
        return value if -_MAX_INT64 <= value <= _MAX_INT64 else None
    if not isinstance(value, str):
        return None
    try:
        return whole(int(value, 0))
    except ValueError:
        found = _LAST_NUMBER.search(value) if in_text else None
        return whole(int(found[1])) if found else None


def mended(text: str) -> Event | None:
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
    values: dict[str, Any] = {}
    for name, key in _FIELDS.items():
        if key in args:
            is_raw = name in _RAW_ARGS
            values[name] = msgspec.Raw(json.dumps(args[key], default=str).encode()) if is_raw else _number(args[key])
    return Args(**values)


def _text(value: Any) -> str | None:
    # An escaped half of a surrogate pair is legal JSON and no legal text.
    return None if value is None else str(value).encode("utf-8", "replace").decode()


def _number(value: Any) -> Whole:
    if isinstance(value, Decimal):
        # The bounds stand first: as an integer, 1e999999999 would fill the memory.
        is_whole = value.is_finite() and -_MAX_INT64 < value < _MAX_INT64 and value == int(value)
        return int(value) if is_whole else None
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _us(value: Any) -> msgspec.Raw:
    return msgspec.Raw(str(value).encode()) if isinstance(value, int | str | Decimal) else NO_TEXT
