"""What does a Chrome-JSON document hold: the elements of `traceEvents` or of a bare array, and its other keys."""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from perfmodel.errors import InputError
from perfmodel.readers.blocks import (
    BLOCK_BYTES,
    MAX_ELEMENT_BYTES,
    Decode,
    Mend,
    Stream,
    T,
    Window,
    fill,
    lenient,
    read_elements,
)

_ARRAY_KEY = re.compile(rb'"traceEvents"\s*:\s*\[')
_MAX_KEYS = 16  # other documents may hold that key too, below others; each is tried, which takes a look at all before
_MAX_TRIED_BYTES = 2 * MAX_ELEMENT_BYTES  # so much is looked at in all
_START = re.compile(rb"(?:%b)?\s*([{\[])" % BOM_UTF8)
_EXPECTED = "expected a PyTorch profiler trace, a JSON document with `traceEvents`"


@dataclass(frozen=True)
class Rest:
    """What the document holds besides its elements: `meta` its other keys as far as they can be read.

    `n_mended` elements and separators were repaired, `n_damaged` places left out; `notes` says so in words.
    """

    meta: dict[str, Any]
    n_mended: int
    n_damaged: int
    notes: tuple[str, ...]


def read_array(
    stream: Stream,
    decode: Decode[T],
    mend: Mend[T],
    take: Callable[[list[T]], None],
    block_bytes: int = BLOCK_BYTES,
) -> Rest:
    """Hand all elements of `traceEvents` (or of a bare array) to `take`, block by block; returns what else there is.

    Damaged documents are read as far as they are sound. Raises InputError when the document is no trace, or when
    it ends before any element is complete.
    """
    window = Window(stream, bytearray(max(block_bytes, 64)))
    fill(window)
    head = _find_array(window)
    window.bare = not head
    first = bytes(window.buffer[window.start : min(window.used, window.start + 40)]).strip()
    read_elements(window, decode, mend, take)
    if window.n_elements == 0 and (window.is_cut_off or window.n_damaged):
        _refuse_broken(first, window.is_cut_off)
    unclosed = window.bare and window.eof and window.buffer[window.start - 1 : window.start] != b"]"
    meta, meta_notes = _meta(head, window)
    notes = (
        *_notes(window, "the array of events is not closed" if unclosed and not window.is_cut_off else None),
        *meta_notes,
    )
    return Rest(meta, window.n_mended, window.n_damaged, notes)


def _find_array(window: Window) -> bytes:
    """The document up to the bracket that opens the events, empty for a bare array; moves `start` behind it."""
    opening = _START.match(window.buffer, 0, window.used)
    if opening and opening[1] == b"[":
        window.start = opening.end()
        return b""
    if opening is None:
        raise InputError("found text that is not JSON; expected a PyTorch profiler trace (JSON, or JSON in gzip)")
    n_tried = tried_bytes = 0  # a key that was tried is no other when more of the document is in memory
    while True:
        keys = list(islice(_ARRAY_KEY.finditer(window.buffer, 0, window.used), _MAX_KEYS))
        for found in keys[n_tried:]:
            head = bytes(window.buffer[opening.start(1) : found.end()])
            n_tried, tried_bytes = n_tried + 1, tried_bytes + len(head)
            if tried_bytes <= _MAX_TRIED_BYTES and _is_head(head):
                window.start = found.end()
                return head
        _refuse_other_documents(bytes(window.buffer[: window.used]), window.eof)
        if window.eof or window.used > MAX_ELEMENT_BYTES:
            break
        window.buffer += bytes(len(window.buffer))
        fill(window)
    if not keys:
        raise InputError(f"found no `traceEvents` in the first {window.used} bytes of JSON; {_EXPECTED}")
    # What stands before the events is damaged, which makes no event wrong.
    window.start = keys[0].end()
    return bytes(window.buffer[opening.start(1) : keys[0].end()])


def _is_head(head: bytes) -> bool:
    try:
        value = lenient(head.decode("utf-8", "replace") + "]}")
    except ValueError:
        return False
    return isinstance(value, dict) and value.get("traceEvents") == []


def _refuse_other_documents(text: bytes, complete: bool) -> None:
    """Say which well-known document without `traceEvents` this is; returns when it may still come."""
    if b'"rocprofiler-sdk-tool"' in text:
        raise InputError(f"found a rocprofv3 JSON file; {_EXPECTED} (record with torch.profiler)")
    if re.search(rb'"nodes"\s*:\s*\[', text) and not _ARRAY_KEY.search(text):
        raise InputError(
            f"found a PyTorch execution trace (`nodes`); {_EXPECTED}, which the profiler exports beside it"
        )
    if not complete:
        return
    try:
        value = lenient(text.decode("utf-8", "replace"))
    except ValueError:
        if _ARRAY_KEY.search(text):
            return
        raise InputError(f"found JSON that is cut off or not valid before any event; {_EXPECTED}") from None
    keys = ", ".join(list(value)[:8]) or "no keys at all"
    raise InputError(f"found JSON with {keys}; {_EXPECTED}")


def _refuse_broken(first: bytes, is_cut_off: bool) -> None:
    begins = f"the first of its events begins with {first.decode('utf-8', 'replace')!r}"
    if is_cut_off and first[:1] in (b"{", b""):
        raise InputError(
            f"the file is cut off: it ends before any event is complete ({begins}). Was the process killed while it "
            "wrote? Record or copy the file again"
        )
    if first[:1] == b"[":
        raise InputError("found an array of arrays, as memory timelines are; expected events, {...}")
    raise InputError(f"not valid JSON: {begins} and none can be read; expected events, {{...}}")


def _notes(window: Window, unclosed: str | None) -> tuple[str, ...]:
    notes = []
    if window.is_cut_off:
        notes.append(
            f"the file is cut off inside its events: {window.n_elements} were read, later ones are missing; "
            "was the process killed while it wrote?"
        )
    if window.n_damaged:
        notes.append(
            f"{window.n_damaged} damaged places among the events ({window.damaged_bytes} bytes) cannot be read and "
            "were left out"
        )
    if unclosed:
        notes.append(f"{unclosed}: the writer was stopped, and later events are missing")
    return tuple(notes)


def _meta(head: bytes, window: Window) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The keys of the document beside its events, and a note where some of them cannot be read."""
    if not head:
        return {}, ("text that is no JSON follows the array of events and was not read",) if _tail(
            window
        ).strip() else ()
    if not window.is_cut_off:
        value = _keys(head + b"]" + _tail(window), window)
        if value is not None:
            return value, ()
    value = _keys(head + b"]}", window)
    if value is None:
        return {}, ("what stands around the events (devices, rank, time base) is damaged and was not read",)
    note = "what stands behind the events (devices, rank, time base) is cut off or damaged and was not read"
    return value, () if window.is_cut_off else (note,)


def _keys(document: bytes, window: Window) -> dict[str, Any] | None:
    """The keys beside the events; what had to be mended to read them counts as one repair."""
    text = document.decode("utf-8", "replace")
    try:
        value: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = lenient(text)
        except ValueError:
            return None
        window.n_mended += 1
    return {key: item for key, item in value.items() if key != "traceEvents"}


def _tail(window: Window) -> bytes:
    """What stands behind the events; more than any profiler writes there is not read."""
    tail = bytes(window.buffer[window.start : window.used])
    while not window.eof and len(tail) <= MAX_ELEMENT_BYTES:
        window.start = window.used = 0
        fill(window)
        tail += bytes(window.buffer[: window.used])
    return tail
