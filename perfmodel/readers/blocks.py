"""How is a huge JSON array of objects decoded in bounded memory: blocks cut where one element ends and the next begins.

The cut is a guess: inside `args` a nested array can look the same. A wrong cut leaves unbalanced brackets on both
sides, so it cannot decode to something wrong; such a block is decoded in smaller pieces and at last one element at a
time, slower and always right. Elements that are damaged beyond mending are left out and counted.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader, RawIOBase
from itertools import islice
from typing import Any, TypeVar

import msgspec

from perfmodel.errors import InputError

T = TypeVar("T")
Decode = Callable[[bytes | memoryview], list[T]]
Mend = Callable[[str], T | None]
Stream = BufferedReader | RawIOBase

BLOCK_BYTES = 2**18  # a block with all that is made of it fits in a second-level cache
LEAST_BYTES = 4096  # pieces of a block that did not decode are not cut smaller than this
MAX_NESTED = 16  # so many things that look like a boundary may a broken element hold
MAX_ELEMENT_BYTES = 64 * 2**20  # an element that does not end within this is broken, not long
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_BOUNDARY = re.compile(rb'}\s*(,)\s*{\s*"(?:ph|name|cat|pid)"\s*:')
_ANY_BOUNDARY = re.compile(rb'}\s*(,)\s*{\s*["}]')  # for writers that sort keys; more often a nested array
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*(?:"|\\?\Z)|[{}\[\]]', re.DOTALL)  # a string may reach beyond what is in memory
_OUTSIDE = re.compile(rb"[\s,:+\-.0-9eEtruefalsnNIity]*")  # true, false, null, NaN, Infinity, 1e9
_BETWEEN = re.compile(rb"[\s,]*")
_NO_ELEMENT = re.compile(rb'(?:null|true|false|-?[0-9][-+.0-9eE]*|"(?:[^"\\]|\\.)*"|\[\s*\])(?=\s*[,\]])', re.DOTALL)
_LAST = re.compile(rb"}[\s,]*]")
_BEHIND = {  # what may follow the array: other keys or the end of a document, nothing behind a bare array
    False: re.compile(rb'\s*(?:,\s*"|})'),
    True: re.compile(rb"\s*\Z"),
}
_DEPTH = {b"{": 1, b"[": 1, b"}": -1, b"]": -1}
_LONE_BACKSLASH = re.compile(r'\\(?!["\\/bfnrt]|u[0-9a-fA-F]{4})')


@dataclass
class Window:
    """The part of the document in memory: `buffer[start:used]` is not decoded yet; `eof` says no more can be read.

    Counts what was met: elements, those that only decoded after mending (separators that were no single comma too),
    damaged places that were left out and their bytes; `is_cut_off` where the document ends inside the array.
    """

    stream: Stream
    buffer: bytearray
    bare: bool = False
    start: int = 0
    used: int = 0
    eof: bool = False
    reach: int = BLOCK_BYTES  # how much to decode at once: less after a failure, more after each success
    behind_element: bool = False  # `start` stands behind an element, before its comma
    n_elements: int = 0
    n_mended: int = 0
    n_damaged: int = 0
    damaged_bytes: int = 0
    is_cut_off: bool = False


def read_elements(window: Window, decode: Decode[T], mend: Mend[T], take: Callable[[list[T]], None]) -> None:
    """Hand all elements of the array in which the window stands to `take`, block by block; `start` ends behind it.

    `decode` turns the bytes of a JSON array into elements; `mend` turns the text of one element that did not decode
    into an element, or None.
    """
    done = False
    while not done:
        before = window.start
        elements, done = _next_block(window, decode, mend)
        window.n_elements += len(elements)
        take(elements)
        stuck = window.start == before
        if not done and (stuck or window.used - window.start < len(window.buffer) // 2):
            _advance(window, grow=stuck)


def fill(window: Window) -> None:
    """Read until the buffer is full or the stream ends."""
    with memoryview(window.buffer) as view:
        while window.used < len(view):
            n_read = window.stream.readinto(view[window.used :])
            if not n_read:
                window.eof = True
                return
            window.used += n_read


def lenient(text: str, parse_float: Callable[[str], Any] = float) -> Any:
    """The JSON value of a text that may hold control characters, lone backslashes, NaN or Infinity.

    Raises ValueError when that is not enough.
    """
    try:
        try:
            return json.loads(text, strict=False, parse_float=parse_float, parse_constant=parse_float)
        except ValueError:
            text = _LONE_BACKSLASH.sub(r"\\\\", text)
            return json.loads(text, strict=False, parse_float=parse_float, parse_constant=parse_float)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ArithmeticError:
        raise ValueError("a number beyond all bounds") from None


def _advance(window: Window, grow: bool) -> None:
    """Move what is not decoded to the front, behind one spare byte for a bracket, and read on."""
    rest = window.buffer[window.start : window.used]
    if grow and not window.eof and len(rest) > len(window.buffer) // 2:
        window.buffer = bytearray(2 * len(window.buffer))
    window.buffer[1 : 1 + len(rest)] = rest
    window.start, window.used = 1, 1 + len(rest)
    fill(window)


def _next_block(window: Window, decode: Decode[T], mend: Mend[T]) -> tuple[list[T], bool]:
    """The elements up to some boundary in memory and whether the array ended; `start` moves behind them."""
    _skip_comma(window)
    buffer, start = window.buffer, window.start
    cut = _last_boundary(buffer, start, min(window.used, start + window.reach))
    if cut is None or window.behind_element:
        return _one_by_one(window, decode, mend, start + window.reach)
    elements = _decode_between(buffer, start, cut, decode)
    if elements is None:
        window.reach = max((cut - start) // 8, LEAST_BYTES)
        return (
            _next_block(window, decode, mend) if cut - start > LEAST_BYTES else _one_by_one(window, decode, mend, cut)
        )
    window.start = cut + 1
    window.reach = min(4 * window.reach, max(len(buffer), BLOCK_BYTES))
    return elements, False


def _decode_between(buffer: bytearray, start: int, cut: int, decode: Decode[T]) -> list[T] | None:
    """The elements from `start` to the comma at `cut`, decoded in place between borrowed brackets; None if broken."""
    before = buffer[start - 1]
    buffer[start - 1], buffer[cut] = b"[]"
    try:
        with memoryview(buffer) as view:
            return decode(view[start - 1 : cut + 1])
    except UNDECODABLE:
        return None
    finally:
        buffer[start - 1], buffer[cut] = before, ord(",")


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


def _skip_comma(window: Window) -> None:
    """Move behind the comma that follows an element, where it is in memory; what else stands there waits."""
    between = _BETWEEN.match(window.buffer, window.start, window.used)
    if window.behind_element and between and between[0].count(b",") == 1 and between.end() < window.used:
        window.start, window.behind_element = between.end(), window.buffer[between.end()] == ord("]")


def _one_by_one(window: Window, decode: Decode[T], mend: Mend[T], until: int) -> tuple[list[T], bool]:
    """The complete elements that begin before `until`, each decoded alone, and whether the array ended."""
    buffer, used = window.buffer, window.used
    elements: list[T] = []
    boundary = _BOUNDARY.search(buffer, window.start, used)
    while window.start < until:
        if not _at_element(window):
            return elements, False
        at = window.start
        if at == used:
            window.is_cut_off = window.eof and not window.bare
            return elements, window.eof
        if buffer[at] == ord("]"):
            ended = _ended(window)
            if ended is not None:
                return elements, ended
            continue
        if no_element := _NO_ELEMENT.match(buffer, at, used):
            window.n_damaged += 1
            window.damaged_bytes += no_element.end() - at
            window.start, window.behind_element = no_element.end(), True
            continue
        if boundary and boundary.start() < at:  # else it is still the next one: not searched again for every element
            boundary = _BOUNDARY.search(buffer, at, used)
        for end in _possible_ends(buffer, at, used, boundary):
            found = _decode_alone(bytes(buffer[at:end]), decode, mend)
            if found is not None:
                break
        else:
            if not _left_out(window, at):
                return elements, window.eof
            continue
        window.n_mended += found[1]
        window.start, window.behind_element = end, True
        elements += found[0]
    return elements, False


def _at_element(window: Window) -> bool:
    """Move to where the next element or the end of the array stands; False where reading on must tell."""
    between = _BETWEEN.match(window.buffer, window.start, window.used)
    at = between.end() if between else window.start
    if at == window.used and not window.eof:
        if at - window.start > MAX_ELEMENT_BYTES:
            raise InputError(f"found {at - window.start} bytes of blanks or commas among events; expected events")
        return False
    commas = window.buffer.count(b",", window.start, at)
    is_end = at == window.used or window.buffer[at] == ord("]")
    window.n_mended += commas > 0 if is_end else commas != int(window.behind_element)
    window.start, window.behind_element = at, window.behind_element and is_end
    return True


def _ended(window: Window) -> bool | None:
    """Is the `]` at `start` the end of the array: True and behind it, False where reading on must tell, else null.

    A bracket that damage has put there is passed over.
    """
    at = window.start
    if not window.eof and window.used - at < LEAST_BYTES:
        return False
    if _BEHIND[window.bare].match(window.buffer, at + 1, window.used) or window.buffer[at + 1 : window.used].isspace():
        window.start = at + 1
        return True
    between = _BETWEEN.match(window.buffer, at + 1, window.used)
    if between and window.buffer[between.end() : between.end() + 1] == b"{":
        window.n_mended += 1
        window.start, window.behind_element = between.end(), False
        return None
    if at + 1 == window.used:
        window.start = window.used
        return True
    return None if _left_out(window, at) else window.eof


def _possible_ends(buffer: bytearray, at: int, used: int, boundary: re.Match[bytes] | None) -> Iterator[int]:
    """Where may the element that begins at `at` end: at the next `boundary`, or where its brackets close.

    Quotes that are not escaped hide brackets; then at one of the boundaries behind, or before a `]`.
    """
    if boundary:
        yield boundary.start() + 1
    closing = _closing(buffer, at, used)
    if closing:
        yield closing
    for later in islice(_BOUNDARY.finditer(buffer, at, used), 1, MAX_NESTED):
        yield later.start() + 1
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


def _may_go_on(buffer: bytearray, at: int, used: int) -> bool:
    """Is what begins at `at` sound as far as it is in memory: nothing but numbers and words of JSON outside strings."""
    behind, depth = at, 0
    for token in _TOKEN.finditer(buffer, at, used):
        if not _OUTSIDE.fullmatch(buffer, behind, token.start()):
            return False
        behind = token.end()
        depth += _DEPTH.get(token[0], 0)
        if depth <= 0:
            return False
    return _OUTSIDE.fullmatch(buffer, behind, used) is not None


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


def _left_out(window: Window, at: int) -> bool:
    """Pass over what cannot be read at `at`, up to the next boundary or the end of the array, and count it.

    False where reading on may complete it, and where the document ends inside it: nothing more can be read then.
    """
    buffer, used = window.buffer, window.used
    boundary = _BOUNDARY.search(buffer, at + 1, used)
    may_read_on = not window.eof and used - at < MAX_ELEMENT_BYTES
    if may_read_on and (boundary is None or _may_go_on(buffer, at, used)):
        return False
    if boundary:
        behind = boundary.start(1) + 1
    else:
        ends = (m.end() - 1 for m in _LAST.finditer(buffer, at, used))
        behind = next((e for e in ends if _BEHIND[window.bare].match(buffer, e + 1, used)), used)
    window.is_cut_off = behind == used and window.eof
    window.n_damaged += not window.is_cut_off
    window.damaged_bytes += behind - at
    window.start, window.behind_element = behind, False
    return behind < used
