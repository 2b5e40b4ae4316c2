"""How is a huge JSON array of objects decoded in bounded memory: blocks cut where one element ends and the next begins.

The cut is a guess: inside `args` a nested array can look the same. A wrong cut leaves unbalanced brackets on both
sides, so it cannot decode to something wrong; such a block is decoded one element at a time, slower and always right.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, TypeVar

import msgspec

from perfmodel.errors import InputError

T = TypeVar("T")
Decode = Callable[[bytes | memoryview], list[T]]
Mend = Callable[[str], T | None]

BLOCK_BYTES = 5 * 2**20
MAX_NESTED = 16  # so many things that look like a boundary may a broken element hold
MAX_ELEMENT_BYTES = 64 * 2**20  # an element that does not end within this is broken, not long
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_BOUNDARY = re.compile(rb'}\s*(,)\s*{\s*"(?:ph|name|cat|pid)"\s*:')
_ANY_BOUNDARY = re.compile(rb'}\s*(,)\s*{\s*"')  # for writers that sort keys; more often a nested array
_ARRAY_KEY = re.compile(rb'"traceEvents"\s*:\s*\[')
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[{}\[\]]', re.DOTALL)  # a string may reach beyond what is in memory
_BETWEEN = re.compile(rb"[\s,]*")
_LAST = re.compile(rb"}[\s,]*]")
_DEPTH = {b"{": 1, b"[": 1, b"}": -1, b"]": -1}
_START = re.compile(rb"(?:\xef\xbb\xbf)?\s*([{\[])")
_LONE_BACKSLASH = re.compile(r'\\(?!["\\/bfnrt]|u[0-9a-fA-F]{4})')


@dataclass(frozen=True)
class Rest:
    """What the document holds besides its events: `meta` its other keys, `n_mended` elements that only decoded after
    mending, `unclosed` whether a bare array lacked its closing bracket, which the Chrome format allows."""

    meta: dict[str, Any]
    n_mended: int
    unclosed: bool


@dataclass
class _Window:
    """The part of the document in memory: `buffer[start:used]` is not decoded yet; `eof` says no more can be read."""

    stream: BinaryIO
    buffer: bytearray
    start: int = 0
    used: int = 0
    eof: bool = False
    n_elements: int = 0
    n_mended: int = 0


def read_array(
    stream: BinaryIO,
    decode: Decode[T],
    mend: Mend[T],
    take: Callable[[list[T]], None],
    block_bytes: int = BLOCK_BYTES,
) -> Rest:
    """Hand all elements of `traceEvents` (or of a bare array) to `take`, block by block; returns what else there is.

    `decode` turns the bytes of a JSON array into elements; `mend` turns the text of one element that did not decode
    into an element, or None. Raises InputError when the document is no trace, is cut off, or cannot be mended.
    """
    window = _Window(stream, bytearray(max(block_bytes, 64)))
    _fill(window)
    head = _find_array(window)
    bare = not head
    done = False
    while not done:
        elements, done = _next_block(window, decode, mend, bare)
        window.n_elements += len(elements)
        take(elements)
        if not done:
            _advance(window, grow=not elements)
    tail = bytes(window.buffer[window.start : window.used]) + (b"" if window.eof else stream.read())
    unclosed = bare and window.start == window.used and window.buffer[window.start - 1 : window.start] != b"]"
    return Rest(_meta(head, tail, window.n_elements), window.n_mended, unclosed)


def lenient(text: str, parse_float: Callable[[str], Any] = float) -> Any:
    """The JSON value of a text that may hold control characters, lone backslashes, NaN or Infinity.

    Raises ValueError when that is not enough.
    """
    try:
        try:
            return json.loads(text, strict=False, parse_float=parse_float)
        except ValueError:
            return json.loads(_LONE_BACKSLASH.sub(r"\\\\", text), strict=False, parse_float=parse_float)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _fill(window: _Window) -> None:
    with memoryview(window.buffer) as view:
        while window.used < len(view):
            n_read = window.stream.readinto(view[window.used :])  # type: ignore[attr-defined]
            if not n_read:
                window.eof = True
                return
            window.used += n_read


def _advance(window: _Window, grow: bool) -> None:
    """Move what is not decoded to the front, behind one spare byte for a bracket, and read on."""
    rest = window.buffer[window.start : window.used]
    if grow:
        window.buffer = bytearray(2 * len(window.buffer))
    window.buffer[1 : 1 + len(rest)] = rest
    window.start, window.used = 1, 1 + len(rest)
    _fill(window)


def _find_array(window: _Window) -> bytes:
    """The document up to the bracket that opens the events, empty for a bare array; moves `start` behind it."""
    opening = _START.match(window.buffer, 0, window.used)
    if opening and opening[1] == b"[":
        window.start = opening.end()
        return b""
    if opening is None:
        raise InputError("found text that is not JSON; expected a PyTorch profiler trace (JSON, or JSON in gzip)")
    while True:
        for found in _ARRAY_KEY.finditer(window.buffer, 0, window.used):
            head = bytes(window.buffer[opening.start(1) : found.end()])
            if _is_head(head):
                window.start = found.end()
                return head
        if window.eof or len(window.buffer) < 2 * BLOCK_BYTES:
            _refuse_other_documents(bytes(window.buffer[: window.used]), window.eof)
        window.buffer += bytes(len(window.buffer))
        _fill(window)


def _is_head(head: bytes) -> bool:
    try:
        value = lenient(head.decode("utf-8", "replace") + "]}")
    except ValueError:
        return False
    return isinstance(value, dict) and value.get("traceEvents") == []


def _refuse_other_documents(text: bytes, complete: bool) -> None:
    """Say which well-known document without `traceEvents` this is; returns when it may still come."""
    expected = "expected a PyTorch profiler trace, a JSON document with `traceEvents`"
    if b'"rocprofiler-sdk-tool"' in text:
        raise InputError(f"found a rocprofv3 JSON file; {expected} (record with torch.profiler)")
    if re.search(rb'"nodes"\s*:\s*\[', text):
        raise InputError(f"found a PyTorch execution trace (`nodes`); {expected}, which the profiler exports beside it")
    if not complete:
        return
    try:
        value = lenient(text.decode("utf-8", "replace"))
    except ValueError:
        raise InputError(f"found JSON that is cut off or not valid before any event; {expected}") from None
    keys = ", ".join(list(value)[:8]) or "no keys at all"
    raise InputError(f"found JSON with {keys}; {expected}")


def _next_block(window: _Window, decode: Decode[T], mend: Mend[T], bare: bool) -> tuple[list[T], bool]:
    """The elements up to the last boundary in memory and whether the array ended there; `start` moves behind them."""
    buffer, start = window.buffer, window.start
    cut = _last_boundary(buffer, start, window.used)
    if cut is None:
        return _one_by_one(window, decode, mend, bare)
    before = buffer[start - 1]
    buffer[start - 1], buffer[cut] = b"[]"
    try:
        with memoryview(buffer) as view:
            elements = decode(view[start - 1 : cut + 1])
    except UNDECODABLE:
        buffer[start - 1], buffer[cut] = before, ord(",")
        return _one_by_one(window, decode, mend, bare)
    window.start = cut + 1
    return elements, False


def _last_boundary(buffer: bytearray, start: int, used: int) -> int | None:
    """Where is the comma of the last boundary between elements, searched from the end backwards."""
    for boundary in (_BOUNDARY, _ANY_BOUNDARY):
        reach = 2**14
        found, from_byte = None, used
        while found is None and from_byte > start:
            from_byte = max(start, used - reach)
            for found in boundary.finditer(buffer, from_byte, used):  # noqa: B007
                pass
            reach *= 8
        if found:
            return found.start(1)
    return None


def _one_by_one(window: _Window, decode: Decode[T], mend: Mend[T], bare: bool) -> tuple[list[T], bool]:
    """The complete elements in memory, each decoded alone, and whether the array ended; `start` moves behind them."""
    buffer, used = window.buffer, window.used
    elements: list[T] = []
    cut: int | None = -1  # where the next boundary ends an element, None when there is none in memory
    while True:
        between = _BETWEEN.match(buffer, window.start, used)
        at = between.end() if between else window.start
        n_before = window.n_elements + len(elements)
        if at < used and buffer[at] == ord("]"):
            window.start = at + 1
            return elements, True
        if at == used and bare and window.eof and n_before:
            window.start = used
            return elements, True
        if cut is not None and cut <= at:
            boundary = _BOUNDARY.search(buffer, at, used)
            cut = boundary.start() + 1 if boundary else None
        for end in _possible_ends(buffer, at, used, cut):
            found = _decode_alone(bytes(buffer[at:end]), decode, mend)
            if found is not None:
                break
        else:
            _refuse_broken(window, at, n_before)
            return elements, False
        window.n_mended += found[1]
        window.start = end
        elements += found[0]


def _possible_ends(buffer: bytearray, at: int, used: int, cut: int | None) -> Iterator[int]:
    """Where may the element that begins at `at` end: at the next boundary `cut`, or where its brackets close.

    Quotes that are not escaped hide brackets; then at one of the boundaries behind, or before a `]`.
    """
    if cut is not None:
        yield cut
    closing = _closing(buffer, at, used)
    if closing:
        yield closing
    for boundary in islice(_BOUNDARY.finditer(buffer, at, used), 1, MAX_NESTED):
        yield boundary.start() + 1
    for last in islice(_LAST.finditer(buffer, at, used), MAX_NESTED):
        yield last.start() + 1


def _closing(buffer: bytearray, at: int, used: int) -> int | None:
    """Behind which byte are all brackets opened since `at` closed again; None when not in memory."""
    depth = 0
    for token in _TOKEN.finditer(buffer, at, used):
        depth += _DEPTH.get(token[0], 0)
        if depth <= 0:
            return token.end()
    return None


def _decode_alone(text: bytes, decode: Decode[T], mend: Mend[T]) -> tuple[list[T], bool] | None:
    """The element in a text, and whether it had to be mended; None when there is none.

    There may be more than one: the next element begins with a key that the boundary does not know.
    """
    if not text.startswith(b"{"):
        return None
    try:
        return decode(b"[" + text + b"]"), False
    except UNDECODABLE:
        element = mend(text.decode("utf-8", "replace"))
    return None if element is None else ([element], True)


def _refuse_broken(window: _Window, at: int, n_before: int) -> None:
    """Raise when the element at `at` can never decode; return when reading on may complete it."""
    text = bytes(window.buffer[at : min(at + 40, window.used)]).decode("utf-8", "replace")
    if text and not text.startswith("{"):
        raise InputError(f"element {n_before} of the events begins with {text!r}; expected an event, {{...}}")
    closed = _closing(window.buffer, at, window.used) is not None
    if not window.eof and not closed and window.used - at < MAX_ELEMENT_BYTES:
        return
    if closed or not window.eof:
        raise InputError(f"not valid JSON: event {n_before}, which begins with {text!r}, cannot be read")
    raise InputError(
        f"the file is cut off: it ends inside the events, after {n_before} complete ones; expected the closing `]`. "
        "Was the process killed while it wrote? Record or copy the file again"
    )


def _meta(head: bytes, tail: bytes, n_elements: int) -> dict[str, Any]:
    """The keys of the document beside its events; raises InputError when it does not close."""
    if not head:
        if tail.strip():
            raise InputError(f"not valid JSON: found {tail.strip()[:40]!r} behind the array of events")
        return {}
    try:
        value: dict[str, Any] = lenient((head + b"]" + tail).decode("utf-8", "replace"))
    except ValueError:
        raise InputError(
            f"the file is cut off or not valid JSON behind its {n_elements} events; expected the rest of the "
            "document and a closing `}`. Record or copy it again"
        ) from None
    return {key: item for key, item in value.items() if key != "traceEvents"}
