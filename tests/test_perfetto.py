import gzip
import json
import os
import threading
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from perfmodel.classify import class_shares
from perfmodel.errors import InputError
from perfmodel.launch import launch_metrics
from perfmodel.perfetto import ADDED, export_perfetto
from perfmodel.readers import read_trace
from perfmodel.trace import Trace
from perfmodel.tracks import counters, drawing
from tests.traces_made import events, golden_rows, kernel, launch

Json = dict[str, Any]
VIEWER_DEPTH = 512


def exported(trace: Trace, path: Path) -> Json:
    n_slices = export_perfetto(trace, path)
    content = path.read_bytes()
    document = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    assert sum(e["ph"] == "X" for e in document["traceEvents"]) == n_slices
    return document


def viewed_ns(us: float) -> int:
    """Nanoseconds as Perfetto makes them: a float64 of microseconds times 1000, rounded."""
    return round(us * 1000)


def n_dropped(document: Json) -> int:
    """How many slices a viewer drops: those that begin in another and end behind it, or lie too deep."""
    lines = defaultdict(list)
    for e in document["traceEvents"]:
        if e["ph"] == "X":
            start = viewed_ns(e["ts"])
            lines[e["pid"], e["tid"]].append((start, -viewed_ns(e["dur"])))
    dropped = 0
    for line in lines.values():
        is_open: list[int] = []
        for start, negative_dur in sorted(line):
            end = start - negative_dur
            while is_open and is_open[-1] <= start:
                is_open.pop()
            if (is_open and end > is_open[-1]) or len(is_open) >= VIEWER_DEPTH:
                dropped += 1
            else:
                is_open.append(end)
    return dropped


def drawn(document: Json, category: str = ADDED) -> list[tuple[str, str, float, float]]:
    """Line, name, start and duration of the slices of a category."""
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in document["traceEvents"] if e["name"] == "thread_name"}
    return [
        (names[e["pid"], e["tid"]], e["name"], e["ts"], e["dur"])
        for e in document["traceEvents"]
        if e["ph"] == "X" and e["cat"] == category
    ]


WAITING = events(
    {"kind": "op", "name": "aten::mm", "start_ns": 500, "dur_ns": 3000},
    launch(1000, link=7, dur_ns=500),
    launch(2001, link=8, dur_ns=500),
    kernel(4000, 2000, link=7, name="gemm"),
    kernel(5000, 4000, link=8, name="gemm"),  # overlaps the first on its stream
    kernel(12000, 1000, link=99, name="softmax"),  # nobody launched it
    {"kind": "copy", "name": "Memcpy HtoD", "start_ns": 13000, "dur_ns": 1000, "bytes": 8000},
)


def test_lines_that_follow_from_the_events_worked_out_by_hand(tmp_path: Path) -> None:
    document = exported(Trace(WAITING, "kineto", 7), tmp_path / "out.json")
    assert n_dropped(document) == 0
    assert sorted(drawn(document)) == [
        ("class gemm", "gemm", 4, 5),
        ("class reduction", "reduction", 12, 1),
        ("idle", "idle", 9, 3),
        ("launch delay", "gemm", 1, 3),
        ("launch delay, overlapping 1", "gemm", 2.001, 2.999),
        ("queueing", "gemm", 1.5, 2.5),
        ("queueing, overlapping 1", "gemm", 2.501, 2.499),
    ]
    assert sorted(drawn(document, "kernel")) == [
        ("stream 7", "gemm", 4, 2),
        ("stream 7", "softmax", 12, 1),
        ("stream 7, overlapping 1", "gemm", 5, 4),
    ]
    processes = {e["args"]["name"] for e in document["traceEvents"] if e["name"] == "process_name"}
    assert processes == {"process 1", "device 0", "device 0: waiting kernels"}


def test_arrows_lead_from_each_call_to_its_kernels_and_not_back_in_time(tmp_path: Path) -> None:
    early = events(launch(10, link=1), kernel(5, link=1), launch(20, link=2), kernel(30, link=2), kernel(40, link=2))
    document = exported(Trace(early, "kineto", 5), tmp_path / "out.json")
    ends = {key: [e["bind_id"] for e in document["traceEvents"] if e.get(key)] for key in ("flow_out", "flow_in")}
    assert len(ends["flow_out"]) == 1 and ends["flow_in"] == ends["flow_out"] * 2
    assert sum(line.startswith("launch delay") for line, *_ in drawn(document)) == 2


def test_kernels_of_a_class_that_touch_are_one_bar(tmp_path: Path) -> None:
    touching = events(*(kernel(start, 1000, name="gemm") for start in (1000, 2000, 5000)))
    bars = drawn(exported(Trace(touching, "kineto", 3), tmp_path / "out.json"))
    assert [bar for bar in bars if bar[0] == "class gemm"] == [
        ("class gemm", "gemm", 1, 2),
        ("class gemm", "gemm", 5, 1),
    ]


def test_no_line_has_the_number_0_which_a_viewer_takes_for_none(tmp_path: Path) -> None:
    rows = [{"kind": "op", "start_ns": start, "process": start, "thread": start} for start in (0, 1)]
    document = exported(Trace(events(*rows, kernel(5)), "kineto", 3), tmp_path / "out.json")
    places = [(e["pid"], e["tid"]) for e in document["traceEvents"] if e["ph"] == "X"]
    assert len(set(places)) == 4  # two threads, a stream, and the line of its class
    assert min(number for place in places for number in place) == 1


def test_a_moment_at_which_a_counter_stays_the_same_is_no_row() -> None:
    waiting = events(launch(1, link=1), launch(9, link=2), kernel(10, link=1), kernel(15, link=2))
    assert counters(waiting).select("at_ns", "value").rows() == [(2, 1), (15, 0)]


def test_counters_hold_until_the_next_row() -> None:
    table = counters(WAITING).select("name", "at_ns", "value")
    assert table.rows() == [
        ("copies in bytes per second", 13000, 8_000_000_000),
        ("copies in bytes per second", 14000, 0),
        ("kernels in queue", 1500, 1),
        ("kernels in queue", 2501, 2),
        ("kernels in queue", 4000, 1),
        ("kernels in queue", 5000, 0),
    ]


@pytest.mark.parametrize("name", ['say "q"', "tail\\", "a\\\\b", "new\nline\t\x01", "ünï 🚀 \u2028", "</script>{}[],"])
def test_names_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    exported(Trace(events({"kind": "op", "name": name, "start_ns": 1}, kernel(5, name=name)), "kineto", 2), path)
    assert set(read_trace(path).events["name"]) == {name}
    assert b'\\"' not in path.read_bytes().replace(b'\\"q\\"', b"")  # Perfetto takes `\\"` for an escaped quote


def test_graph_replays_come_back(tmp_path: Path) -> None:
    replay = {"kind": "replay", "name": "graph", "start_ns": 7000, "dur_ns": 9000, "device": 0, "stream": 7, "link": 1}
    export_perfetto(Trace(events(launch(10, link=1), replay), "nsys", 2), tmp_path / "out.json")
    assert read_trace(tmp_path / "out.json").of_kind("replay").select("name", "start_ns", "dur_ns", "link").rows() == [
        ("graph", 7000, 9000, 1)
    ]


def test_ranks_stay_apart(tmp_path: Path) -> None:
    ranks = events(
        *(launch(at, link=link, rank=rank) for at, link, rank in ((1, 1, 0), (2, 2, 1))),
        *(kernel(at, 5, link=link, rank=rank) for at, link, rank in ((11, 1, 0), (12, 2, 1))),
    )
    document = exported(Trace(ranks, "kineto", 4), tmp_path / "out.json")
    processes = [e["args"]["name"] for e in document["traceEvents"] if e["name"] == "process_name"]
    assert processes == [
        f"rank {r} {what}" for r in (0, 1) for what in ("process 1", "device 0", "device 0: waiting kernels")
    ]
    assert len({e["pid"] for e in document["traceEvents"]}) == 6
    back = launch_metrics(read_trace(tmp_path / "out.json"))
    assert (back.tklqt_ns, len(back.devices), back.n_kernels_joined) == (20, 2, 2)


def test_times_that_a_viewer_could_not_hold_count_from_the_first_event(tmp_path: Path) -> None:
    epoch = 1_700_000_000_000_000_000
    late = Trace(events(launch(epoch + 1, link=1), kernel(epoch + 8, 3, link=1)), "kineto", 2)
    document = exported(late, tmp_path / "out.json")
    assert document["baseTimeNanoseconds"] == epoch + 1
    assert sorted(e["ts"] for e in document["traceEvents"] if e.get("cat") in ("kernel", "cuda_runtime")) == [0, 0.007]
    whole = Trace(events(launch(epoch, link=1, dur_ns=1000), kernel(epoch + 8000, 3000, link=1)), "kineto", 2)
    assert "baseTimeNanoseconds" not in exported(whole, tmp_path / "out.json")
    before = Trace(events(kernel(-5, 3), kernel(10, 1)), "kineto", 2, meta={"baseTimeNanoseconds": 100})
    assert exported(before, tmp_path / "out.json")["baseTimeNanoseconds"] == 95


def test_a_trace_without_device_work_or_events_is_written(tmp_path: Path) -> None:
    assert n_dropped(exported(Trace(events({"kind": "op", "start_ns": 0}), "kineto", 1), tmp_path / "a.json")) == 0
    assert exported(Trace(events(kernel(1)).clear(), "kineto", 0), tmp_path / "b.json")["traceEvents"] == []


def test_a_file_that_cannot_be_written_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        export_perfetto(Trace(WAITING, "kineto", 7), tmp_path / "nowhere" / "out.json.gz")
    exported(Trace(WAITING, "kineto", 7), tmp_path / "out.json.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json.gz"]


# --- real traces -----------------------------------------------------------------------------------------------------

KEPT = ["kind", "name", "start_ns", "dur_ns", "device", "stream", "link", "external", "bytes", "graph", "inputs"]
KEPT += ["blocks", "occupancy_frac", "collective"]
FILES = [*golden_rows("kineto_golden.csv"), *golden_rows("nsys_golden.csv")]


def as_text(table: pl.DataFrame) -> pl.DataFrame:
    return table.select(pl.col(KEPT).exclude(pl.Categorical), pl.col(pl.Categorical).cast(pl.String)).select(KEPT)


@pytest.mark.parametrize("row", FILES, ids=lambda row: row["file"])
def test_a_real_trace_comes_back_exactly_and_nothing_is_dropped(
    row: dict[str, str], shared: Path, tmp_path: Path
) -> None:
    trace = read_trace(shared / "traces" / row["file"])
    document = exported(trace, tmp_path / "out.json.gz")
    assert n_dropped(document) == 0
    back = read_trace(tmp_path / "out.json.gz")
    shift_ns = document.get("baseTimeNanoseconds", 0) - trace.meta.get("baseTimeNanoseconds", 0)
    before = trace.events.with_columns(pl.col("start_ns") - shift_ns)
    assert as_text(before).sort(KEPT).equals(as_text(back.events).sort(KEPT))
    assert (back.n_dropped, back.n_repaired) == (0, 0)
    first, second = launch_metrics(trace).to_json(), launch_metrics(back).to_json()
    assert {k: v for k, v in first.items() if k not in ("source", "n_events")} == {
        k: v for k, v in second.items() if k not in ("source", "n_events")
    }


@pytest.mark.parametrize("row", golden_rows("kineto_golden.csv")[::4], ids=lambda row: row["file"])
def test_added_lines_add_up_to_the_metrics(row: dict[str, str], shared: Path) -> None:
    trace = read_trace(shared / "traces" / row["file"])
    metrics, bars = launch_metrics(trace), drawing(trace.events)
    table = pl.concat(bars.slices(1000), how="diagonal")
    table = table.with_columns(family=bars.tracks["family"].gather(table["track"]))
    length = Counter(dict(table.group_by("family").agg(pl.sum("dur_ns")).iter_rows()))
    assert length["launch delay"] == metrics.tklqt_ns
    assert length["idle"] == (metrics.gpu_span_ns or 0) - metrics.gpu_busy_ns
    by_class = dict(
        table.filter(family="class").group_by(pl.col("name").cast(pl.String)).agg(pl.sum("n_kernels")).iter_rows()
    )
    assert by_class == dict(class_shares(trace.events).select(pl.col("class").cast(pl.String), "n_kernels").iter_rows())
    assert table.filter(pl.col("kind").is_not_null()).height == trace.events.height


# --- what lies under the name already --------------------------------------------------------------------------------


def test_a_pipe_is_written_to_and_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe.json", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    export_perfetto(Trace(events(kernel(10, 5)), "kineto", 1), pipe)
    reader.join()
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
    assert json.loads(read[0])["traceEvents"]


def test_a_link_stays_and_leads_to_the_new_file(tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    exported(Trace(events(kernel(10, 5)), "kineto", 1), link)
    assert link.is_symlink() and json.loads(target.read_text())["traceEvents"]


@pytest.mark.parametrize("name", [".", "..", "x" * 256, "no/such/folder.json"])
def test_a_name_that_cannot_be_written_is_one_sentence_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    before = set(tmp_path.parent.iterdir())
    with pytest.raises(InputError, match="cannot write"):
        export_perfetto(Trace(events(kernel(10, 5)), "kineto", 1), tmp_path / name)
    assert not list(tmp_path.iterdir()) and set(tmp_path.parent.iterdir()) == before
    exported(Trace(events(kernel(10, 5)), "kineto", 1), tmp_path / ("x" * 255))
