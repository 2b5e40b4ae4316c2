import bz2
import gzip
import io
import json
import lzma
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perfmodel.errors import InputError
from perfmodel.readers import read_trace
from perfmodel.readers.api import api_kind
from perfmodel.readers.document import read_array
from perfmodel.readers.kineto import read_kineto, to_ns
from perfmodel.readers.unpack import zstd
from perfmodel.trace import MAX_DUR_NS, Trace
from tests.traces_made import LAYOUTS, complete, pid, write_json, write_nsys

SMALL = [
    {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "ts": 5, "args": {"name": "python"}},
    complete("cpu_op", "aten::mm", 100.5, 40, **{"External id": 3, "Input Dims": [[4, 8], [8, 2]]}),
    complete("user_annotation", "step", 90, 200),
    complete("gpu_user_annotation", "step", 110, 100, 0, 7),
    complete("python_function", "forward", 95, 100),
    complete("cuda_runtime", "cudaLaunchKernel", 110.001, 5.25, correlation=9, **{"external id": "3"}),
    complete("cuda_runtime", "cudaDeviceSynchronize", 130, 70, correlation=10),
    complete("cuda_runtime", "cudaMalloc", 80, 3, correlation=8),
    complete(
        "kernel", "gemm", 120.125, 50.5, 0, 7, device=0, stream=7, correlation=9, **{"graph id": 4, "External id": 3}
    ),
    complete("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 175, 2, 0, 20, device=0, stream=20, bytes=4096),
    complete("gpu_memset", "Memset (Device)", 180, 1, 0, 7, device=0, stream=7, bytes=64),
    complete("Trace", "PyTorch Profiler", 80, 200, "Spans", "PyTorch Profiler"),
]
HEAD = {"schemaVersion": 1, "deviceProperties": [{"id": 0, "name": "H100"}, {"id": 1, "name": "H100"}]}
TAIL = {"traceName": "x.json", "distributedInfo": {"rank": 0}, "baseTimeNanoseconds": 17 * 10**17}


def read(document: object, block_bytes: int = 128) -> Trace:
    text = document if isinstance(document, str) else json.dumps(document)
    return read_kineto(io.BytesIO(text.encode()), block_bytes)


# --- Kineto: what becomes of each event ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_trace_becomes_events(layout: str) -> None:
    trace = read(LAYOUTS[layout]({**HEAD, "traceEvents": SMALL, **TAIL}))
    assert trace.source == "kineto"
    assert (trace.n_events, trace.n_dropped, trace.n_repaired) == (12, 0, 0)
    assert trace.meta == {**HEAD, **TAIL}
    rows = {(row["kind"], row["name"]): row for row in trace.events.iter_rows(named=True)}
    assert list(rows) == [
        ("op", "aten::mm"),
        ("range", "step"),
        ("launch", "cudaLaunchKernel"),
        ("sync", "cudaDeviceSynchronize"),
        ("call", "cudaMalloc"),
        ("kernel", "gemm"),
        ("copy", "Memcpy HtoD (Pinned -> Device)"),
        ("set", "Memset (Device)"),
    ]
    assert rows["kernel", "gemm"] == {
        "kind": "kernel", "name": "gemm", "start_ns": 120125, "dur_ns": 50500, "process": None, "thread": None,
        "device": 0, "stream": 7, "link": 9, "bytes": None, "graph": 4, "rank": 0, "external": 3, "inputs": None,
        "blocks": None, "occupancy_frac": None, "collective": None,
    }  # fmt: skip
    assert rows["launch", "cudaLaunchKernel"] == {
        "kind": "launch", "name": "cudaLaunchKernel", "start_ns": 110001, "dur_ns": 5250, "process": 1, "thread": 1,
        "device": None, "stream": None, "link": 9, "bytes": None, "graph": None, "rank": 0, "external": 3,
        "inputs": None, "blocks": None, "occupancy_frac": None, "collective": None,
    }  # fmt: skip
    assert rows["copy", "Memcpy HtoD (Pinned -> Device)"]["bytes"] == 4096
    assert rows["op", "aten::mm"]["link"] is None
    assert json.loads(rows["op", "aten::mm"]["inputs"]) == [[[4, 8], [8, 2]], []]
    assert set(trace.events["rank"]) == {0}


def test_grids_occupancies_and_collectives_of_kernels_are_kept() -> None:
    said = {"Collective name": "all_to_allv", "Process Group Name": "3", "Process Group Ranks": "[0, 1, 2]"}
    shapes = [
        {"grid": [8, 2, 3], "est. achieved occupancy %": 12, **said},
        {"grid": [2**31, 1, 1], "est. achieved occupancy %": 101},
        {"grid": "8", "est. achieved occupancy %": "x", "Collective name": "broadcast"},
        {"grid": [8, 0, 1], "est. achieved occupancy %": 10**400},
    ]
    work = [complete("kernel", "k", i, 1, 0, 7, device=0, **shape) for i, shape in enumerate(shapes)]
    found = read({"traceEvents": [*work, complete("cpu_op", "record_param_comms", 9, 1, grid=[1], **said)]}).events
    found = found.sort("start_ns")
    plain = [
        complete("kernel", "k", i, 1, 0, 7, **{"est. achieved occupancy %": x}) for i, x in enumerate((2.5, 0, -1))
    ]
    assert read({"traceEvents": plain}).events["occupancy_frac"].to_list() == [pytest.approx(0.025), 0, None]
    assert found["blocks"].to_list() == [48, None, None, None, None]
    assert found["occupancy_frac"].round(3).to_list() == [pytest.approx(0.12), None, None, None, None]
    whole = '["all_to_allv","3","[0, 1, 2]"]'
    assert found["collective"].to_list() == [whole, None, '["broadcast",null,null]', None, None]


def test_calls_of_moe_modules_are_ranges_and_other_calls_of_python_are_left_out() -> None:
    names = ["nn.Module: Qwen3MoeSparseMoeBlock_0", "nn.Module: Linear_3", "moe.py(7): forward", "nn.Module: Experts"]
    calls = [complete("python_function", name, 10 * i, 5) for i, name in enumerate(names)]
    found = read({"traceEvents": [*calls, *SMALL]}).events
    ranges = found.filter(pl.col("kind") == "range")["name"].cast(pl.String).to_list()
    assert ranges == [names[0], names[3], "step"]


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_events_may_stand_anywhere_in_the_document(place: str) -> None:
    keys = {"first": (SMALL, {**HEAD, **TAIL}), "last": (SMALL, {})}.get(place, (SMALL, TAIL))
    head = {} if place == "first" else {**HEAD, **TAIL} if place == "last" else HEAD
    trace = read({**head, "traceEvents": keys[0], **keys[1]})
    assert trace.n_events == len(SMALL)
    assert trace.meta == {**HEAD, **TAIL}


def test_bare_array_and_bare_array_without_its_end() -> None:
    assert read(SMALL).n_events == len(SMALL)
    assert not read(SMALL).notes
    for ending in ("", ",", ", \n"):
        stopped = read(json.dumps(SMALL)[:-1] + ending)
        assert stopped.n_events == len(SMALL)
        assert "not closed" in stopped.notes[0]


def test_byte_order_mark_and_trailing_comma() -> None:
    text = json.dumps({"traceEvents": SMALL}).replace("}]}", "} , ]}")
    assert read("\ufeff" + text).n_events == len(SMALL)


def test_old_categories_and_strings_for_numbers() -> None:
    trace = read(
        [
            complete("Operator", "aten::mm", 1, 1, **{"external id": 1}),
            complete("Runtime", "hipMemcpyAsync", 2, 1, "12", "-5", correlation="77", stream="0x0", bytes="16"),
            complete("Kernel", "k", 3, 1, "GPU 1", "stream 9", correlation="77"),
            complete("Memcpy", "Memcpy HtoD", 4, 1, 2, 0, stream="0x0", bytes="16", device="2"),
            complete("Memset", "Memset", 5, 1, 2, 0),
        ]
    )
    assert trace.events["kind"].to_list() == ["op", "launch", "kernel", "copy", "set"]
    assert trace.events.select("process", "thread", "device", "stream", "link", "bytes").rows() == [
        (1, 1, None, None, None, None),
        (12, -5, None, None, 77, None),
        (None, None, 1, 9, 77, None),
        (None, None, 2, 0, None, 16),
        (None, None, 2, 0, None, None),
    ]


def test_other_vendors_by_category() -> None:
    trace = read(
        [
            complete("mtia_runtime", "runFunction - job_prep_and_submit_for_execution", 1, 1, correlation=1),
            complete("mtia_ccp_events", "kernel", 2, 1, 0, 1, correlation=1),
            complete("xpu_runtime", "urEnqueueKernelLaunch", 3, 1, correlation=2),
            complete("privateuse1_driver", "whatever", 4, 1),
            complete("cuda_sync", "Stream Sync", 5, 1),
            complete("hpu_op", "whatever", 6, 1),
        ]
    )
    assert trace.events["kind"].to_list() == ["launch", "launch", "call", "call", "kernel"]


def test_a_call_of_unknown_name_is_a_launch_where_device_work_bears_its_link() -> None:
    trace = read(
        [
            complete("privateuse1_runtime", "aclnnMatmul", 1, 1, correlation=1),
            complete("privateuse1_runtime", "aclrtQuery", 2, 1, correlation=2),
            complete("privateuse1_runtime", "aclrtSynchronize", 3, 1, correlation=1),
            complete("kernel", "k", 4, 1, 0, 1, correlation=1),
        ]
    )
    assert trace.events["kind"].to_list() == ["launch", "call", "sync", "kernel"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudaLaunchKernel", "launch"),
        ("cudaLaunchKernelExC", "launch"),
        ("cuLaunchKernelEx", "launch"),
        ("cudaLaunchCooperativeKernel", "launch"),
        ("hipExtModuleLaunchKernel", "launch"),
        ("cudaGraphLaunch", "launch"),
        ("hipMemcpyWithStream", "launch"),
        ("cuMemcpyHtoDAsync_v2", "launch"),
        ("cuMemsetD8Async", "launch"),
        ("zeCommandListAppendMemoryCopy", "launch"),
        ("cudaStreamSynchronize", "sync"),
        ("hipDeviceSynchronize", "sync"),
        ("cudaEventSynchronize", "sync"),
        ("cudaStreamWaitEvent", "call"),
        ("cudaLaunchHostFunc", "call"),
        ("cudaGraphAddMemcpyNode", "call"),
        ("cudaGraphExecMemcpyNodeSetParams", "call"),
        ("cudaEventQuery", "call"),
        ("cudaMalloc", "call"),
    ],
)
def test_what_a_call_does(name: str, kind: str) -> None:
    assert api_kind(name) == kind


def test_unusable_events_are_dropped_and_counted_and_negative_durations_repaired() -> None:
    week_us = 8 * 24 * 3600 * 10**6
    trace = read(
        [
            complete("cpu_op", "kept", 1, 1),
            complete("cpu_op", "negative", 2, -0.5),
            {"ph": "X", "cat": "cpu_op", "name": "no time", "pid": 1, "tid": 1, "dur": 1},
            {"ph": "X", "cat": "cpu_op", "name": "no duration", "pid": 1, "tid": 1, "ts": 1},
            complete("kernel", "longer than a week", 3, week_us, 0, 7),
            complete("kernel", "nowhere", 3, 1, "Spans", 7),
            {"ph": "B", "cat": "cpu_op", "name": "begin", "pid": 1, "tid": 1, "ts": 1},
        ]
    )
    assert trace.events.select("name", "dur_ns").rows() == [("kept", 1000), ("negative", 0)]
    assert (trace.n_events, trace.n_dropped, trace.n_repaired) == (7, 4, 1)


def test_a_kernel_at_time_zero_is_dropped_only_where_the_clock_is_elsewhere() -> None:
    far = 10**12
    trace = read([complete("kernel", "lost", 0, 1, 0, 7), complete("kernel", "k", far, 1, 0, 7)])
    assert (trace.events["name"].to_list(), trace.n_dropped) == (["k"], 1)
    assert read([complete("kernel", "first", 0, 1, 0, 7), complete("kernel", "k", 3, 1, 0, 7)]).n_dropped == 0
    assert read([complete("kernel", "only", 0, 1, 0, 7)]).n_dropped == 0


def test_a_start_more_than_a_week_from_the_others_is_damaged() -> None:
    now = 1712195495502094
    starts = [now, now + 7 * 24 * 3600 * 10**6, now + 7 * 24 * 3600 * 10**6 + 1, 5, 0, -3, 9 * 10**15]
    trace = read([complete("kernel", "k", ts, 1, 0, 7) for ts in (now - 1, now - 1, now, now, *starts)])
    assert trace.events["start_ns"].to_list() == [ts * 1000 for ts in (now - 1, now - 1, now, now, *starts[:2])]
    assert (trace.n_events, trace.n_dropped) == (11, 5)
    of_two_years = [complete("kernel", "k", ts, 1, device, 7) for ts, device in ((0, 0), (9, 0), (now, 1), (now, 1))]
    assert read(of_two_years).n_dropped == 0


@pytest.mark.parametrize("block_bytes", [64, 2**18])
def test_what_is_no_object_among_the_events_costs_no_event(block_bytes: int) -> None:
    events = [complete("cpu_op", str(i), i, 1) for i in range(9)]
    mixed = [None, *events[:4], 3.5, "a, {}", *events[4:], [], True]
    trace = read_kineto(io.BytesIO(json.dumps({"traceEvents": mixed, "x": 1}).encode()), block_bytes)
    assert trace.events["name"].to_list() == list("012345678")
    assert (trace.n_dropped, trace.meta) == (5, {"x": 1})
    assert trace.notes == ("5 damaged places among the events (20 bytes) cannot be read and were left out",)


# --- Kineto: exact times ---------------------------------------------------------------------------------------------


@given(st.integers(min_value=0, max_value=2**43 * 1000 - 1))
@example(4458676416788066)  # a product with 1000 in floating point rounds this to another nanosecond
@example(2**42 * 1000 + 20)
def test_relative_microseconds_are_exact(ns: int) -> None:
    text = f"{ns // 1000}.{ns % 1000:03d}".encode()
    assert to_ns([text, b"%d" % (ns // 1000), b"", b'"%s"' % text]).to_list() == [ns, ns // 1000 * 1000, None, ns]


@given(st.integers(min_value=1, max_value=2**61), st.lists(st.integers(min_value=0, max_value=MAX_DUR_NS), max_size=4))
def test_microseconds_of_any_size_are_exact_from_the_text(first: int, later: list[int]) -> None:
    times = [first, *(first + t for t in later)]
    body = ",".join(
        f'{{"ph":"X","cat":"cpu_op","name":"a","pid":1,"tid":1,"ts":{t // 1000}.{t % 1000:03d},"dur":1.001}}'
        for t in times
    )
    assert read(f"[{body}]").events["start_ns"].to_list() == times


def test_epoch_microseconds_without_decimals_stay_integers() -> None:
    trace = read([complete("cpu_op", "a", 1712195495502094, 1), complete("cpu_op", "b", 1712195495502095.0, 1)])
    assert trace.events["start_ns"].to_list() == [1712195495502094000, 1712195495502095000]


# --- Kineto: blocks --------------------------------------------------------------------------------------------------

HOSTILE = st.sampled_from(
    ['}, {"ph":', '"}],"', "\\", "]}", '{"name": "x"}, {"cat": 1}', "ünï\n\t", "", '"traceEvents": [']
)
WORD = st.one_of(HOSTILE, st.text(max_size=12))
VALUE = st.recursive(
    st.one_of(WORD, st.integers(-9, 9), st.none(), st.floats(allow_nan=False, allow_infinity=False)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["name", "cat", "ph", "pid", "x"]), inner, max_size=3),
    ),
    max_leaves=8,
)
EVENT = st.fixed_dictionaries(
    {"ph": st.sampled_from("XiM")}, optional={"name": WORD, "cat": WORD, "args": VALUE, "ts": st.integers()}
)
META = st.dictionaries(st.one_of(WORD, st.sampled_from(["deviceProperties", "INFO"])), VALUE, max_size=3)


@settings(max_examples=400)
@given(st.lists(EVENT, max_size=12), st.tuples(META, META), st.sampled_from(["bare", *LAYOUTS]), st.integers(64, 700))
def test_blocks_give_what_reading_the_whole_document_gives(
    elements: list[dict], around: tuple[dict, dict], layout: str, block_bytes: int
) -> None:
    head, tail = around
    document = {**{k: v for k, v in head.items() if k not in tail}, "traceEvents": elements, **tail}
    bare = layout == "bare"
    text = json.dumps(elements) if bare else LAYOUTS[layout](document)
    whole = json.loads(text)
    found: list[dict] = []
    rest = read_array(io.BytesIO(text.encode()), msgspec.json.decode, lambda text: None, found.extend, block_bytes)
    assert found == (whole if bare else whole["traceEvents"])
    assert rest.meta == ({} if bare else {k: v for k, v in whole.items() if k != "traceEvents"})
    assert rest.notes == ()
    assert (rest.n_mended, rest.n_damaged) == (0, 0)


def test_what_stands_behind_the_events_is_read_however_long_it_is() -> None:
    tail = {"names": ["x" * 100] * 100, "last": 1}
    assert read({"traceEvents": [complete("cpu_op", "a", 0, 1)], **tail}).meta == tail


def test_mended_keys_beside_the_events_count_as_one_repair() -> None:
    trace = read('{"traceEvents": [' + json.dumps(complete("cpu_op", "a", 0, 1)) + '], "a": "tab\there", "b": "C:\\q"}')
    assert trace.meta == {"a": "tab\there", "b": "C:\\q"}
    assert (trace.n_repaired, trace.notes) == (1, ())


def test_an_event_larger_than_a_block_is_read_whole() -> None:
    long = complete("cpu_op", "n" * 5160, 1, 1, shapes=[{"name": "a"}, {"name": "b"}] * 500)
    trace = read([complete("cpu_op", "a", 0, 1), long, complete("cpu_op", "b", 3, 1)], block_bytes=100)
    assert [len(name) for name in trace.events["name"]] == [1, 5160, 1]


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        ('{"ph": "X", "cat": "cpu_op", "name": "moe "q"", "pid": 1, "tid": 1,\n "ts": 1, "dur": 1}', 'moe "q"'),
        ('{"ph": "X", "cat": "cpu_op", "name": "odd " quote", "pid": 1, "tid": 1, "ts": 1, "dur": 1}', 'odd " quote'),
        ('{"name": "a"b"c", "ph": "X", "cat": "cpu_op", "ts": 1, "dur": 1}', 'a"b"c'),
        ('{"ph": "X", "cat": "cpu_op", "ts": 1, "dur": 1, "name": "last "one""}', 'last "one"'),
        ('{"ph": "X", "cat": "cpu_op", "name": "C:\\path\\q.py", "ts": 1, "dur": 1}', "C:\\path\\q.py"),
        ('{"ph": "X", "cat": "cpu_op", "name": "tab\there\x01", "ts": 1, "dur": 1}', "tab\there\x01"),
        (
            '{"ph": "X", "cat": "cpu_op", "name": "nan", "ts": 1, "dur": 1, "args": {"GB/s": NaN, "x": -Infinity}}',
            "nan",
        ),
        (
            '{"ph": "X", "cat": "cpu_op", "name": "float id", "ts": "1", "dur": 1.0, "args": {"correlation": 3.0}}',
            "float id",
        ),
        (
            '{"ph": "X", "cat": "cpu_op", "name": "a " b", "ts": 1, "dur": 1, "args": [{"pid": 1}, {"pid": 2}]}',
            'a " b',
        ),
        (
            '{"ph": "X", "cat": "cpu_op", "name": "huge id", "ts": 1, "dur": 1, "args": {"correlation": 1e999999999}}',
            "huge id",
        ),
        ('{"ph": "X", "cat": "cpu_op", "name": 17, "ts": 1, "dur": 1, "args": [1]}', "17"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_events_that_are_not_strict_json_are_mended(broken: str, name: str, place: int) -> None:
    good = [json.dumps(complete("cpu_op", f"good {i}", 1, 1)) for i in range(2)]
    good.insert(place, broken)
    for text in ('{"traceEvents": [' + ", \n".join(good) + '], "traceName": "x"}', "[" + ",".join(good) + "]"):
        trace = read(text)
        assert trace.events["name"].to_list()[place] == name
        assert trace.events["start_ns"].to_list() == [1000, 1000, 1000]
        assert (trace.n_events, trace.n_dropped, trace.n_repaired) == (3, 0, 1)


def test_bytes_that_are_not_utf8_are_replaced() -> None:
    text = json.dumps({"traceEvents": [complete("cpu_op", "caf@", 1, 1)]}).encode().replace(b"@", b"\xe9")
    assert read_kineto(io.BytesIO(text)).events["name"].to_list() == ["caf\ufffd"]


def test_log_lines_behind_the_events_may_hold_lone_backslashes() -> None:
    assert read('{"traceEvents": [' + json.dumps(SMALL[1]) + '], "INFO": ["C:\\q"]}').meta == {"INFO": ["C:\\q"]}


# --- files and refusals ----------------------------------------------------------------------------------------------


def test_gzip_is_known_by_its_content(tmp_path: Path) -> None:
    for name, packed in (("a.json", False), ("a.json.gz", True), ("gzip_without_suffix.json", True), ("plain", False)):
        assert read_trace(write_json(tmp_path / name, {"traceEvents": SMALL}, packed)).n_events == len(SMALL)


def test_gzip_of_several_parts_is_read_to_its_end(tmp_path: Path) -> None:
    text = json.dumps({"traceEvents": SMALL}).encode()
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(text[:300]) + gzip.compress(text[300:]))
    assert read_trace(str(path)).n_events == len(SMALL)


GOOD = json.dumps({"schemaVersion": 1, "traceEvents": SMALL * 40, "traceName": "x"})
BAD = {
    "empty.json": (b"", "an empty file"),
    "blank.json": (b" \n ", "not JSON"),
    "words.json": (b"hello", "begins with b'hello'"),
    "picture.png": (b"\x89PNG\r\n\x1a\n", "expected a PyTorch profiler trace"),
    "pointer.json": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "zipped.json": (b"PK\x03\x04rest", "a zip archive"),
    "first half.json": (GOOD[:90].encode(), "cut off"),
    "damaged.gz": (gzip.compress(GOOD.encode())[:-8] + bytes(8), "gzip data is damaged"),
    "nothing in it.gz": (gzip.compress(b""), "an empty file"),
    "cut between.json": (GOOD[: GOOD.index("}, {") + 2].encode(), "cut off inside its events: 1 were read"),
    "head only.json": (b'{"schemaVersion": 1, "devi', "cut off or not valid before any event"),
    "broken.json": (b'{"traceEvents": [{"ph": "X", "dur": }]}', "none can be read"),
    "empty events.json": (b'{"traceEvents": []}', "found 0 Chrome trace events"),
    "empty array.json": (b"[]", "found 0 Chrome trace events"),
    "chrome.json": (b'{"traceEvents": [{"ph": "X", "cat": "v8", "name": "a", "ts": 1, "dur": 1}]}', "torch.profiler"),
    "memory.json": (b'[[1, 2], [3]]', "as memory timelines are"),
    "memory.html": (b"<html></html>", "a page of HTML"),
    "snapshot.pickle": (b"\x80\x05\x95", "a Python pickle"),
    "counters.csv": (b'"ID","Process ID","Process Name"', "--ncu FILE"),
    "numbers.json": (b'{"traceEvents": [1, 2]}', "expected events"),
    "other.json": (b'{"scores": [1], "model": "x"}', "found JSON with scores, model"),
    "nested.json": (b'{"run": {"traceEvents": []}}', "found JSON with run"),
    "execution.json": (b'{"schema": "1.1.1", "nodes": [{"id": 1}]}', "execution trace"),
    "rocprof.json": (b'{"rocprofiler-sdk-tool": [{}]}', "rocprofv3"),
    "report.ncu-rep": (b"NVR\x00", "Nsight Compute"),
    "damaged.sqlite": (b"SQLite format 3\0" + b"\xff" * 2000, "SQLite cannot read it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_sentence(tmp_path: Path, name: str) -> None:
    content, words = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        read_trace(path)
    assert words in str(refusal.value)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_trace(tmp_path / "none.json")
    with pytest.raises(InputError, match="a folder without traces"):
        read_trace(tmp_path)


# --- damage ----------------------------------------------------------------------------------------------------------

WHOLE = read(GOOD)


def is_prefix_by_kind(part: Trace, whole: Trace) -> bool:
    """Do the events of a trace begin like those of another, on the host and on the devices."""
    for on_device in (True, False):
        found, expected = (
            t.events.filter(pl.col("device").is_not_null() == on_device).drop("rank") for t in (part, whole)
        )
        if not found.equals(expected.head(found.height)):
            return False
    return True


@settings(max_examples=60)
@given(st.integers(0, len(GOOD) - 1), st.integers(64, 3000))
def test_a_document_cut_anywhere_is_read_to_the_cut(length: int, block_bytes: int) -> None:
    n_complete = GOOD[:length].count('"ph"') - 1  # the event that the cut goes through may be complete but for a brace
    if n_complete < 2:
        return
    part = read(GOOD[:length], block_bytes)
    assert part.n_events - n_complete in (0, 1)
    assert is_prefix_by_kind(part, WHOLE)
    assert len(part.notes) == 1
    assert part.n_dropped == 0


@pytest.mark.parametrize("block_bytes", [64, 700, 10**6])
@pytest.mark.parametrize("at", [1, 30, 478])
def test_an_event_damaged_beyond_mending_is_left_out_and_counted(at: int, block_bytes: int) -> None:
    elements = [json.dumps(e) for e in SMALL * 40]
    elements[at] = elements[at].replace('"ph"', '"ph', 1).replace(":", "", 2)
    trace = read('{"traceEvents": [' + ", ".join(elements) + '], "traceName": "x"}', block_bytes)
    assert (trace.n_events, trace.n_dropped, trace.n_repaired) == (479, 1, 0)
    assert "1 damaged places" in trace.notes[0]
    assert trace.meta == {"traceName": "x"}


@pytest.mark.parametrize("block_bytes", [64, 700, 10**6])
def test_separators_that_damage_has_changed_lose_no_event(block_bytes: int) -> None:
    text = json.dumps({"traceEvents": SMALL * 40, "traceName": "x"})
    places = [text.index('}, {"ph"', from_byte) for from_byte in (400, 9000, 40_000)]
    for place, instead in zip(reversed(places), ("}] {", "} {", "},, {"), strict=True):
        text = text[:place] + instead + text[place + 4 :]
    trace = read(text, block_bytes)
    assert (trace.n_events, trace.n_dropped, trace.n_repaired, trace.notes) == (480, 0, 3, ())
    assert trace.events.drop("rank").equals(WHOLE.events.drop("rank"))


def test_what_stands_around_the_events_may_be_damaged() -> None:
    body = '"traceEvents": ' + json.dumps(SMALL)
    tail = read('{"a": 1, ' + body + ', "distributedInfo": {"rank": }}')
    assert (tail.n_events, tail.meta, len(tail.notes)) == (len(SMALL), {"a": 1}, 1)
    head = read('{"a": ?1, ' + body + ', "b": 2}')
    assert (head.n_events, head.meta, len(head.notes)) == (len(SMALL), {}, 1)
    behind = read(json.dumps(SMALL) + " x")
    assert (behind.n_events, len(behind.notes)) == (len(SMALL), 1)


def test_packed_files_that_are_cut_off_give_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "half.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": SMALL * 4000}).encode(), compresslevel=0)[:-200_000])
    trace = read_trace(path)
    assert 40_000 < trace.n_events < 47_900
    assert ["cut off inside its events" in trace.notes[0], "lacks its last part" in trace.notes[1]] == [True, True]
    path.write_bytes(gzip.compress(GOOD.encode())[:-4])
    assert "could not be checked" in read_trace(path).notes[0]


def zipped(content: bytes, *names: str) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, content)
    return target.getvalue()


@pytest.mark.parametrize(
    "pack",
    [
        zstd.compress,
        bz2.compress,
        lzma.compress,
        lambda content: zipped(content, "run/", "__MACOSX/._trace.json", "run/trace.json"),
        lambda content: zipped(gzip.compress(content), "trace.json.gz"),
        lambda content: gzip.compress(zstd.compress(content)),
        lambda content: zstd.compress(content[:99]) + zstd.compress(content[99:]),
        lambda content: gzip.compress(content) + bytes(512),
    ],
    ids=["zstd", "bzip2", "xz", "zip", "gzip in zip", "zstd in gzip", "two frames", "padded"],
)
def test_packings_are_known_by_their_content(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "trace.bin"
    path.write_bytes(pack(GOOD.encode()))
    trace = read_trace(path)
    assert trace.events.equals(WHOLE.events)
    assert trace.notes == ()
    database = write_nsys(tmp_path / "a.sqlite", {"KERNEL": [(1, 2, 0, 7, 9, pid(1), None, None)]})
    path.write_bytes(pack(database.read_bytes()))
    assert read_trace(path).events.height == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (zipped(b"{}", "a.json", "b.json"), "holds 2 files (a.json, b.json)"),
        (zipped(b"{}"), "holds 0 files (nothing)"),
        (zipped(GOOD.encode(), "a.json")[:-30], "cannot be unpacked"),
        (zstd.compress(b"x")[:4] + b"\xff" * 40, "Zstandard data is damaged"),
        (lzma.compress(GOOD.encode())[:-40] + bytes(40), "xz data is damaged"),
        (gzip.compress(gzip.compress(gzip.compress(gzip.compress(b"{}")))), "packed more than"),
    ],
    # Not of their bytes: gzip writes the time, and processes that share the tests must agree on their names.
    ids=["two files", "no file", "zip cut", "zstd damaged", "xz damaged", "packed four times"],
)
def test_packings_that_cannot_be_read(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "trace.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(words)):
        read_trace(path)


def test_times_of_mended_events_are_exact_too() -> None:
    broken = '{"ph": "X", "cat": "cpu_op", "name": "a "b"", "pid": 1, "tid": 1, "ts": 1712195495502094.657, "dur": 1}'
    assert read(f"[{broken}]").events["start_ns"].to_list() == [1712195495502094657]


def test_half_a_surrogate_pair_in_a_name_is_text(tmp_path: Path) -> None:
    path = tmp_path / "synthetic.json"
    path.write_text(
        '{"traceEvents":[{"ph":"X","cat":"kernel","name":"\\ud800k","pid":0,"tid":7,"ts":1,"dur":2,"args":{}}]}'
    )
    assert read_trace(path).events["name"].cast(pl.String).to_list() == ["?k"]


def test_text_correlations_that_only_end_alike_do_not_join(tmp_path: Path) -> None:
    call = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 1, "tid": 1, "ts": 1, "dur": 1}
    kernel = {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": 3, "dur": 1}
    rows = [{**call, "args": {"correlation": "a-7"}}, {**kernel, "args": {"correlation": "b-7"}}]
    path = tmp_path / "synthetic.json"
    path.write_text(json.dumps({"traceEvents": rows}))
    assert read_trace(path).events["link"].to_list() == [None, None]
