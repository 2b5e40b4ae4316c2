"""Mutations of real traces: whatever is done to a file, reading it gives right numbers with a note, or one sentence.

`PERFMODEL_FUZZ_CASES=10000 pytest tests/test_fuzz.py` runs as many cases; without it a few hundred.
"""

import gzip
import io
import json
import os
import re
import time
from collections import Counter
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perfmodel.errors import InputError
from perfmodel.readers import read_trace
from perfmodel.readers.kineto import read_kineto
from perfmodel.trace import MAX_DUR_NS, Trace
from tests.conftest import ROOT

N_CASES = int(os.environ.get("PERFMODEL_FUZZ_CASES", "300"))
SLOWEST_S = 20.0  # far above what any case takes: what is above hangs
SHARED = ROOT.parent / "shared" / "traces"
FILES = (
    *sorted((ROOT / "traces").glob("*/profiles/*.json.gz")),
    *(
        SHARED / name
        for name in (
            "hta__base__base.json.gz",
            "hta__amd_trace__mi250_minitoy_train_ROCm6_2_kineto.json.gz",
            "hta__simple_add__benchmark_result_493459_1694039959_trace.json.gz",
            "hta__ns_resolution_trace__rank-0.Apr_03_18_51_38.1102.pt.trace.json.gz",
            "tracelens__b200__eager_trace.json.gz",
            "tracelens__vllm_decode_full__graph_execution.json.gz",
            "tracelens__h100__gaunernst_bert-small-uncased__1016001.json.gz",
        )
        if (SHARED / name).is_file()
    ),
)
MANY = settings(max_examples=N_CASES, suppress_health_check=list(HealthCheck), derandomize=N_CASES < 1000)

HOST = {"cpu_op": "op", "Operator": "op", "user_annotation": "range", "overhead": "overhead"}
DEVICE = {"kernel": "kernel", "Kernel": "kernel", "gpu_memcpy": "copy", "Memcpy": "copy", "gpu_memset": "set",
          "Memset": "set", "mtia_ccp_events": "kernel"}  # fmt: skip
API = re.compile(r"Runtime|.*_(?:runtime|driver)")
Row = tuple[Any, ...]


def sample(path: Path, n_events: int = 90) -> str:
    """A few events from several places of a real trace, in its own layout: its text with most events cut out."""
    text = gzip.decompress(path.read_bytes()).decode()
    begin = re.search(r'"traceEvents"\s*:\s*\[', text)
    assert begin
    _, end = json.JSONDecoder().raw_decode(text, begin.end() - 1)
    body = text[begin.end() : end - 1]
    cuts = [m.start() + 1 for m in re.finditer(r'}\s*,\s*{\s*"(?:ph|name|cat|pid)"\s*:', body)]
    stride = max(1, len(cuts) // n_events)
    spans = [(0, cuts[0]), *((cuts[i], cuts[i + 1]) for i in range(0, len(cuts) - 1, stride)), (cuts[-1], len(body))]
    kernels = re.finditer(r'"cat"\s*:\s*"(?:kernel|gpu_memcpy)"', body)
    spans += [
        (max(c for c in cuts if c < k.start()), min(c for c in cuts if c > k.start())) for k in islice(kernels, 9)
    ]
    tail = text[end - 1 :]
    return (
        text[: begin.end()] + "".join(body[a:b] for a, b in sorted(set(spans))) + (tail if len(tail) < 20_000 else "]}")
    )


SAMPLES = {path.name: sample(path) for path in FILES}


# --- a slow and obvious reader ---------------------------------------------------------------------------------------


def whole(value: Any, in_text: bool = True) -> int | None:
    if isinstance(value, Decimal):
        value = int(value) if value.is_finite() and -(2**63) < value < 2**63 and value == int(value) else None
    if isinstance(value, str):
        try:
            value = int(value, 0)
        except ValueError:
            found = re.search(r"(-?\d+)\s*$", value) if in_text else None
            value = int(found[1]) if found else None
    return value if type(value) is int and -(2**63) < value < 2**63 else None


def nanoseconds(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | str | Decimal):
        return None
    try:
        us = Decimal(value)
    except ArithmeticError:
        return None
    ns = round(us * 1000) if us.is_finite() and -(10**34) < us < 10**34 else None
    return ns if ns is not None and abs(ns) < 2**63 else None


def expected_rows(elements: list[Any]) -> tuple[list[Row], int]:
    """The rows that the events of a valid document must give, and how many timed events are unusable."""
    rows, places, n_unusable = [], [], 0
    for e in elements:
        args = e.get("args") if isinstance(e.get("args"), dict) else {}
        cat = e.get("cat") if isinstance(e.get("cat"), str) else ""
        on_device, is_api = cat in DEVICE, bool(API.fullmatch(cat))
        if e.get("ph") != "X" or not (on_device or is_api or cat in HOST):
            continue
        start, dur = nanoseconds(e.get("ts")), nanoseconds(e.get("dur"))
        # What is no whole number and no text counts as not given.
        is_given = isinstance(args.get("device"), str) or whole(args.get("device")) is not None
        device = whole(args["device"] if is_given else e.get("pid")) if on_device else None
        if start is None or dur is None or abs(dur) > MAX_DUR_NS or (on_device and device is None):
            n_unusable += 1
            continue
        kind = DEVICE.get(cat) or ("call" if is_api else HOST[cat])
        name = e.get("name")
        name = "unknown" if name in (None, "") else str(name)
        places.append((device, None if on_device else whole(e.get("pid"))))
        rows.append((kind, name, start, max(dur, 0), device, whole(args.get("correlation"), in_text=False)))
    starts = [r[2] for r in rows]
    if not rows or max(starts) - min(starts) <= MAX_DUR_NS:
        return rows, n_unusable
    near = []
    for row, place in zip(rows, places, strict=True):
        same = [r[2] for r, other in zip(rows, places, strict=True) if other == place and r[2] != 0]
        recorded = sorted(same or [start for start in starts if start != 0])
        if abs(float(row[2]) - float(recorded[(len(recorded) - 1) // 2])) <= MAX_DUR_NS:
            near.append(row)
    return near, n_unusable + len(rows) - len(near)


def rows_of(trace: Trace) -> list[Row]:
    kind = pl.col("kind").cast(pl.String).replace({"launch": "call", "sync": "call"})
    return trace.events.select(kind, pl.col("name").cast(pl.String), "start_ns", "dur_ns", "device", "link").rows()


def parsed(text: str) -> list[Any] | None:
    """The events of a document that is JSON as Python reads it; None for any other."""
    try:
        value = json.loads(text, parse_float=Decimal, parse_constant=Decimal)
        elements = value["traceEvents"] if isinstance(value, dict) else value
    except (ValueError, KeyError, RecursionError, ArithmeticError):
        return None
    return elements if isinstance(elements, list) and all(isinstance(e, dict) for e in elements) else None


def check(text: str, original: list[Row], n_touched: int, block_bytes: int) -> None:
    """Reading a mutated document gives the rows of the slow reader; where it is no JSON, those of undamaged events."""
    began = time.perf_counter()
    content = text.encode("utf-8", "surrogatepass")
    elements = parsed(content.decode("utf-8", "replace"))
    try:
        trace = read_kineto(io.BytesIO(content), block_bytes)
    except InputError as error:
        assert "\n" not in str(error)
        if elements is not None and text.count('"traceEvents"') == 1:
            assert not expected_rows(elements)[0], f"refused: {error}"
        return
    finally:
        assert time.perf_counter() - began < SLOWEST_S
    found = Counter(rows_of(trace))
    if elements is not None and text.count('"traceEvents"') == 1:
        expected, n_unusable = expected_rows(elements)
        assert found == Counter(expected)
        assert (trace.n_events, trace.n_dropped) == (len(elements), n_unusable)
        return
    n_unknown = (found - Counter(original)).total()
    n_missing = (Counter(original) - found).total()
    is_noted = bool(trace.notes or trace.n_repaired or trace.n_dropped)
    assert n_unknown <= n_touched
    assert n_missing <= n_unknown or is_noted
    is_cut_off = any(
        "cut off" in note or "not closed" in note or "no JSON" in note or "around" in note for note in trace.notes
    )
    assert n_missing <= n_touched or is_cut_off


# --- bytes -----------------------------------------------------------------------------------------------------------

HOSTILE = [
    *("", '"', "\\", "}", "{", "]", "[", ",", ", ", "}, {", '}, {"ph": ', '"}],', '"traceEvents": [', "//", "'"),
    *("\x00", "\x07", "\n", "é", "\ud800", "null", "NaN", "-", "1" * 400, "e99", "e9999999", "e99999999999999999999"),
]
MUTATION = st.tuples(
    st.sampled_from(["replace", "insert", "delete", "repeat", "cut"]),
    st.floats(0, 1),
    st.integers(1, 60),
    st.sampled_from(HOSTILE),
)


def mutated(text: str, how: str, place: float, length: int, payload: str) -> tuple[str, int, int]:
    """The text after one mutation, and the span of the original that it touched."""
    at = int(place * (len(text) - 1))
    if how == "cut":
        return text[:at], at, len(text)
    if how == "insert":
        return text[:at] + payload + text[at:], at, at
    middle = {"replace": payload, "delete": "", "repeat": text[at : at + length] * 2}[how]
    return text[:at] + middle + text[at + length :], at, at + length


@MANY
@given(st.sampled_from(sorted(SAMPLES)), st.lists(MUTATION, min_size=1, max_size=3), st.sampled_from([64, 900, 2**19]))
def test_mutated_bytes(name: str, mutations: list[Any], block_bytes: int) -> None:
    text = SAMPLES[name]
    original = expected_rows(parsed(text) or [])[0]
    n_touched = 0
    for mutation in mutations:
        before = text
        text, start, end = mutated(text, *mutation)
        # Each element that the span reaches into, and its neighbours: what is damaged can look like a part of them.
        n_touched += before.count('"ph"', max(0, start - 3), end + 3) + 2
    check(text, original, n_touched, block_bytes)


@MANY
@given(
    st.sampled_from(sorted(SAMPLES)), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=3)
)
def test_mutated_packed_bytes(
    tmp_path_factory: pytest.TempPathFactory, name: str, flips: list[tuple[float, int]]
) -> None:
    text = SAMPLES[name]
    content = bytearray(gzip.compress(text.encode(), mtime=0))
    for place, value in flips:
        content[int(place * (len(content) - 1))] = value
    path = tmp_path_factory.getbasetemp() / "mutated.json.gz"
    path.write_bytes(content)
    try:
        trace = read_trace(path)
    except InputError as error:
        assert "\n" not in str(error)
        return
    original = Counter(expected_rows(parsed(text) or [])[0])
    assert Counter(rows_of(trace)) == original or trace.notes


# --- events and fields -----------------------------------------------------------------------------------------------

ARGS = ["correlation", "device", "stream", "External id", "Input Dims"]
FIELDS = ["ph", "cat", "name", "pid", "tid", "ts", "dur", "args", "x", *ARGS]
VALUE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**65), 2**65),
    st.integers(-5, 5),
    st.decimals(-(10**13), 10**13, places=3).map(float),
    st.sampled_from(
        [0, -1, 1e300, float("nan"), float("inf"), 2**63, 2**53 + 1, "GPU 3", "0x1f", "7", "stream 7", "", "abc"]
    ),
    st.sampled_from(["kernel", "cpu_op", "cuda_runtime", "Kernel", "X", "B", "1.5", " 2 ", "1712195495502094.657"]),
    st.text(max_size=8),
    st.lists(st.dictionaries(st.sampled_from(["name", "ph", "pid", "cat"]), st.integers(), min_size=1), max_size=4),
    st.dictionaries(st.sampled_from(FIELDS), st.integers(0, 9), max_size=3),
)
CHANGE = st.tuples(
    st.floats(0, 1), st.sampled_from(["set", "remove", "drop", "double", "swap"]), st.sampled_from(FIELDS), VALUE
)


def changed(elements: list[Any], place: float, how: str, field: str, value: Any) -> None:
    if not elements:
        return
    at = int(place * (len(elements) - 1))
    event = elements[at]
    owner = event.get("args") if field in ARGS else event
    if how == "drop":
        del elements[at]
    elif how == "double":
        elements.insert(at, dict(event))
    elif how == "swap":
        elements[at], elements[-1] = elements[-1], event
    elif how == "remove" and isinstance(owner, dict):
        owner.pop(field, None)
    elif isinstance(owner, dict):
        owner[field] = value


@MANY
@given(
    st.sampled_from(sorted(SAMPLES)),
    st.lists(CHANGE, min_size=1, max_size=6),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.sampled_from([64, 900, 2**19]),
)
def test_mutated_events(name: str, changes: list[Any], indent: int | None, sort_keys: bool, block_bytes: int) -> None:
    document = json.loads(SAMPLES[name])
    for change in changes:
        changed(document["traceEvents"], *change)
    text = json.dumps(document, indent=indent, sort_keys=sort_keys)
    check(text, [], 0, block_bytes)
