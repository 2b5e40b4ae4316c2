import os
import random
import shutil
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from perfmodel.attribution import by_operator
from perfmodel.bound import bound
from perfmodel.errors import InputError
from perfmodel.launch import by_launch_call, launch_metrics
from perfmodel.readers import nsys_tables, read_trace
from perfmodel.readers.nsys import read_nsys, read_nsys_parquet
from perfmodel.trace import MAX_DUR_NS, Trace
from tests.conftest import ROOT
from tests.traces_made import pid, write_nsys

SHARED = ROOT.parent / "shared" / "traces"
REAL = sorted(SHARED.glob("nsysai__*.sqlite")) or [
    pytest.param(Path(), marks=pytest.mark.skip(reason="the traces beside the project are absent"))
]

NAMES = [(1, "void gemm<float>()"), (2, "gemm"), (3, "cudaLaunchKernel_v7000"), (4, "cuLaunchKernelEx"), (5, "layer 1"),
         (6, "cudaDeviceSynchronize_v3020")]  # fmt: skip

Records = Mapping[str, Sequence[Mapping[str, Any]]]

K, R, NVTX = "CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_RUNTIME", "NVTX_EVENTS"
GRAPH = "CUPTI_ACTIVITY_KIND_GRAPH_TRACE"


def export(path: Path, tables: Records) -> Path:
    """An export whose tables have the columns that their first record names, without types, as SQLite allows."""
    with closing(sqlite3.connect(path)) as database:
        for table, records in tables.items():
            columns = list(records[0])
            database.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
            marks = ", ".join("?" * len(columns))
            database.executemany(f"INSERT INTO {table} VALUES ({marks})", [tuple(r.values()) for r in records])
        database.commit()
    return path


def kernel(start: Any, end: Any, **more: Any) -> dict[str, Any]:
    return {"start": start, "end": end, "deviceId": 0, "streamId": 7, "correlationId": 1, "globalPid": pid(1), **more}


def call(start: Any, end: Any, **more: Any) -> dict[str, Any]:
    return {"start": start, "end": end, "correlationId": 1, "globalTid": pid(1, 11), **more}


def test_nsys_tables_become_events(tmp_path: Path) -> None:
    path = write_nsys(
        tmp_path / "run.sqlite",
        {
            "StringIds": NAMES,
            "KERNEL": [
                (120, 170, 0, 7, 9, pid(1), 1, 2),
                (220, 230, 1, 7, 9, pid(2), None, 2),
                (1, 2, 0, 7, 5, pid(1), 99, 98),
            ],
            "RUNTIME": [(100, 105, pid(1, 11), 9, 3), (200, 205, pid(2, 22), 9, 4), (300, 290, pid(1, 11), 10, 6)],
            "MEMCPY": [(40, 50, 0, 8, 11, pid(1), 4096, 1, 1, 2), (60, 70, 0, 8, 12, pid(1), 64, 99, None, None)],
            "MEMSET": [(80, 81, 0, 8, 13, pid(1), 16), (82, None, 0, 8, 14, pid(1), 16)],
            "NVTX_EVENTS": [
                (90, 180, 59, "step", None, pid(1, 11)),
                (95, 99, 60, None, 5, pid(1, 11)),
                (97, None, 34, "mark", None, pid(1, 11)),
            ],
            "META_DATA_EXPORT": [("EXPORT_SCHEMA_VERSION", "3.25.0")],
        },
    )
    trace = read_trace(path)
    assert (trace.source, trace.n_events, trace.n_dropped, trace.n_repaired) == ("nsys", 13, 1, 1)
    assert trace.meta == {"export": {"EXPORT_SCHEMA_VERSION": "3.25.0"}}
    assert [note.split(":")[0] for note in trace.notes] == ["1 records were left out"]
    found = trace.events.select("kind", "name", "start_ns", "dur_ns", "process", "thread", "device", "stream", "bytes")
    assert found.rows() == [
        ("kernel", "void gemm<float>()", 120, 50, 1, None, 0, 7, None),
        ("kernel", "gemm", 220, 10, 2, None, 1, 7, None),
        ("kernel", "unknown", 1, 1, 1, None, 0, 7, None),
        ("launch", "cudaLaunchKernel", 100, 5, 1, 11, None, None, None),
        ("launch", "cuLaunchKernelEx", 200, 5, 2, 22, None, None, None),
        ("sync", "cudaDeviceSynchronize", 300, 0, 1, 11, None, None, None),
        ("copy", "Memcpy HtoD (Pinned -> Device)", 40, 10, 1, None, 0, 8, 4096),
        ("copy", "Memcpy", 60, 10, 1, None, 0, 8, 64),
        ("set", "Memset", 80, 1, 1, None, 0, 8, 16),
        ("range", "step", 90, 90, 1, 11, None, None, None),
        ("range", "layer 1", 95, 4, 1, 11, None, None, None),
    ]
    link = trace.events["link"].to_list()
    assert link[0] == link[3]
    assert link[1] == link[4]
    assert link[0] != link[1]


def test_grids_are_kept_and_the_multiprocessors_of_gpus(tmp_path: Path) -> None:
    grids = [{"gridX": 8, "gridY": 2, "gridZ": 3}, {"gridX": 2**30, "gridY": 4, "gridZ": 1}, {"gridX": 0, "gridY": 1}]
    kernels = [kernel(9 * i, 9 * i + 1, **{"gridZ": 1, **grid}) for i, grid in enumerate(grids)]
    kernels = [{key: one[key] for key in kernels[0]} for one in kernels]
    gpus = [{"id": 0, "name": "H100", "smCount": 132}, {"id": 1, "name": "H100", "smCount": 114}]
    trace = read_trace(export(tmp_path / "run.sqlite", {K: kernels, R: [call(1, 2)], "TARGET_INFO_GPU": gpus}))
    assert trace.events["blocks"].to_list() == [48, None, None, None]
    assert trace.meta["sm_counts"] == {"0": 132, "1": 114}


def test_device_work_without_a_process(tmp_path: Path) -> None:
    """Exports of other tools leave out globalPid: one caller can be meant, two cannot."""
    work = {c: v for c, v in kernel(5, 6).items() if c != "globalPid"}
    one = read_trace(export(tmp_path / "one.sqlite", {K: [work], R: [call(1, 2)]}))
    assert one.events["link"].n_unique() == 1
    calls = [call(1, 2), call(1, 2, globalTid=pid(2, 1))]
    two = read_trace(export(tmp_path / "two.sqlite", {K: [work], R: calls}))
    assert two.events.filter(pl.col("kind") == "kernel")["link"].to_list() == [None]
    assert "1 records of device work name no process" in two.notes[0]


def test_databases_without_cuda_activity(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"without CUDA activity .found TARGET_INFO_SYSTEM_ENV.*--trace=cuda"):
        read_trace(write_nsys(tmp_path / "cpu.sqlite", {"TARGET_INFO_SYSTEM_ENV": [("a", "b")]}))
    with pytest.raises(InputError, match="no complete CUDA call or kernel"):
        read_trace(write_nsys(tmp_path / "nothing.sqlite", {"KERNEL": [], "RUNTIME": []}))
    with pytest.raises(InputError, match=rf"table {K} has no column start .it has a, b"):
        read_trace(export(tmp_path / "foreign.sqlite", {K: [{"a": 1, "b": 2}]}))


def test_an_export_is_not_changed_by_reading(tmp_path: Path) -> None:
    path = write_nsys(tmp_path / "a.sqlite", {"KERNEL": [(1, 2, 0, 7, 9, pid(1), None, None)]})
    before = path.read_bytes()
    read_trace(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.sqlite"]


# --- what differs between versions -----------------------------------------------------------------------------------


def test_tables_of_a_later_version_are_found_and_count_once(tmp_path: Path) -> None:
    older = [kernel(1, 3), kernel(5, 6, correlationId=2)]
    newer = [{**record, "graphId": 4} for record in [*older, kernel(8, 9)]]
    trace = read_trace(export(tmp_path / "a.sqlite", {K: older, f"{K}_V3": newer, f"{R}_V2": [call(0, 1)]}))
    assert trace.events.select("kind", "start_ns").rows() == [("kernel", 1), ("kernel", 5), ("kernel", 8), ("call", 0)]
    alone = read_trace(export(tmp_path / "b.sqlite", {"CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL_V2": older}))
    assert alone.events.height == 2
    with pytest.raises(InputError, match="without CUDA activity"):
        read_trace(export(tmp_path / "c.sqlite", {f"{K}_VIEW": older}))


@pytest.mark.parametrize("table", ["TARGET_INFO_GPU", "TARGET_INFO_CUDA_GPU"])
def test_what_an_export_says_of_itself(tmp_path: Path, table: str) -> None:
    about = {
        table: [{"name": "H100"}, {"name": "A100"}],
        "TARGET_INFO_SESSION_START_TIME": [{"utcEpochNs": 1_779_782_330_176_752_435}],
        "META_DATA_CAPTURE": [{"name": "MODE", "value": None}],
    }
    meta = read_trace(export(tmp_path / "a.sqlite", {K: [kernel(1, 2)], **about})).meta
    assert meta == {"gpus": ["H100", "A100"], "session_start_ns": 1_779_782_330_176_752_435, "capture": {"MODE": ""}}


def test_the_graph_of_a_kernel_without_a_column_for_it(tmp_path: Path) -> None:
    nodes = [kernel(1, 2, graphNodeId=5 << 32 | 3), kernel(3, 4, graphNodeId=None)]
    trace = read_trace(export(tmp_path / "a.sqlite", {K: nodes}))
    assert trace.events["graph"].to_list() == [5, None]


def test_devices_that_processes_number_for_themselves(tmp_path: Path) -> None:
    """Two processes that each see one GPU as their device 0 run on two GPUs."""
    gpus = [{"gpuId": 0, "cudaId": 0, "pid": 1}, {"gpuId": 3, "cudaId": 0, "pid": 2}]
    work = [kernel(0, 10), kernel(0, 10, globalPid=pid(2)), kernel(0, 1, deviceId=7, globalPid=pid(2))]
    trace = read_trace(export(tmp_path / "a.sqlite", {K: work, R: [call(0, 1)], "TARGET_INFO_CUDA_DEVICE": gpus}))
    assert trace.events["device"].to_list() == [0, 3, 7, None]
    assert launch_metrics(trace).gpu_busy_ns == 21


@pytest.mark.parametrize(
    ("kind", "source", "target", "name"),
    [
        (1, 0, 2, "Memcpy HtoD (Pageable -> Device)"),
        (2, 2, 1, "Memcpy DtoH (Device -> Pinned)"),
        (8, 2, 4, "Memcpy DtoD (Device -> Managed)"),
        (10, 2, 2, "Memcpy PtoP (Device -> Device)"),
        (11, 4, 4, "Memcpy HtoD (Managed -> Managed)"),
        (11, None, None, "Memcpy HtoD (Managed -> Managed)"),
        (12, None, None, "Memcpy DtoH (Managed -> Managed)"),
        (13, 7, 7, "Memcpy DtoD (Managed -> Managed)"),
        (1, None, 2, "Memcpy HtoD"),
        (77, 1, 2, "Memcpy  (Pinned -> Device)"),
    ],
)
def test_copies_are_named_by_direction_and_memory(
    tmp_path: Path, kind: int, source: int | None, target: int | None, name: str
) -> None:
    copy = kernel(1, 2, bytes=8, copyKind=kind, srcKind=source, dstKind=target)
    trace = read_trace(export(tmp_path / "a.sqlite", {K: [kernel(0, 1)], "CUPTI_ACTIVITY_KIND_MEMCPY": [copy]}))
    assert trace.of_kind("copy")["name"].cast(pl.String).to_list() == [name]


# --- graphs and ranges -----------------------------------------------------------------------------------------------


def test_a_graph_replay_is_busy_time_and_no_kernel(tmp_path: Path) -> None:
    tables = {
        "StringIds": [(1, "cudaGraphLaunch_v10000")],
        "KERNEL": [(0, 10, 0, 7, 1, pid(1), None, None)],
        "RUNTIME": [(15, 18, pid(1, 11), 2, 1)],
        "GRAPH_TRACE": [(20, 60, 0, 7, 2, pid(1), 3), (100, 140, 0, 7, 9, pid(1), None)],
    }
    trace = read_trace(write_nsys(tmp_path / "graph.sqlite", tables))
    replays = trace.of_kind("replay")
    assert replays.select("name", "start_ns", "dur_ns", "device", "graph").rows() == [
        ("CUDA graph 3", 20, 40, 0, 3),
        ("CUDA graph", 100, 40, 0, None),
    ]
    assert replays["link"][0] == trace.of_kind("launch")["link"].item()
    metrics = launch_metrics(trace)
    assert (metrics.n_kernels, metrics.kernel_busy_ns, metrics.gpu_busy_ns, metrics.gpu_span_ns) == (1, 10, 90, 140)
    assert (metrics.tklqt_ns, metrics.n_kernels_joined) == (0, 0)
    assert "2 CUDA graph replays" in trace.notes[0]
    assert "--cuda-graph-trace=node" in trace.notes[0]
    assert read_trace(write_nsys(tmp_path / "no.sqlite", {**tables, "GRAPH_TRACE": []})).notes == ()


def test_a_graph_counts_as_one_launch_whether_its_kernels_or_its_replays_were_recorded(tmp_path: Path) -> None:
    """Twenty replays of two kernels each, back to back, launched well ahead of the device."""
    names = [{"id": 1, "value": "cudaGraphLaunch_v10000"}]
    calls = [call(i, i + 1, correlationId=i, nameId=1) for i in range(20)]
    nodes = [kernel(100_000 * (i + 1) + at, 100_000 * (i + 1) + at + 50_000, correlationId=i)
             for i in range(20) for at in (0, 50_000)]  # fmt: skip
    whole = [kernel(100_000 * (i + 1), 100_000 * (i + 2), correlationId=i) for i in range(20)]
    found = [
        read_trace(export(tmp_path / f"{table}.sqlite", {"StringIds": names, R: calls, table: work})).events
        for table, work in ((K, nodes), (GRAPH, whole))
    ]
    by_node, by_graph = (bound(events) for events in found)
    assert by_node == by_graph
    assert (by_graph.label, by_graph.n_launches, by_graph.copies_frac) == ("device-bound", 20, 0)
    calls_table, operators = by_launch_call(found[1]), by_operator(found[1])
    assert calls_table.select("n_launches", "n_kernels", "n_copies", "n_without_work").rows() == [(20, 0, 0, 0)]
    assert operators["copy_time_ns"].sum() == 0


def test_ranges_of_all_domains_by_text_or_registered_string(tmp_path: Path) -> None:
    def nvtx(start: int, end: int | None, kind: int | None, **more: Any) -> dict[str, Any]:
        record = {"start": start, "end": end, "eventType": kind, "text": None, "textId": None, "domainId": 0}
        return {**record, "globalTid": pid(1, 11), "endGlobalTid": None, **more}

    records = [
        nvtx(0, 10, 59, text="step"),
        nvtx(1, 9, 59, textId=5, domainId=3),
        nvtx(2, 8, 60, text="across", endGlobalTid=pid(1, 12)),
        nvtx(2, 8, 60, text="within", endGlobalTid=pid(1, 11)),
        nvtx(2, 7, 60, text="end unknown", endGlobalTid=0),
        nvtx(3, None, 59, text="open"),
        nvtx(90, None, 60, text="open after all else"),
        nvtx(4, None, 34, text="mark"),
        nvtx(0, None, 75, text="a domain", domainId=3),
        nvtx(5, 6, 70, text="imported"),
    ]
    names = [{"id": i, "value": name} for i, name in NAMES]
    trace = read_trace(export(tmp_path / "a.sqlite", {"StringIds": names, K: [kernel(1, 50)], NVTX: records}))
    assert trace.of_kind("range").select("name", "start_ns", "dur_ns", "process", "thread").rows() == [
        ("step", 0, 10, 1, 11),
        ("layer 1", 1, 8, 1, 11),
        ("across", 2, 6, 1, None),
        ("within", 2, 6, 1, 11),
        ("end unknown", 2, 5, 1, 11),
        ("open", 3, 87, 1, 11),
        ("open after all else", 90, 0, 1, 11),
        ("imported", 5, 1, 1, 11),
    ]
    assert (trace.n_events, trace.n_dropped, trace.n_repaired) == (11, 0, 2)
    assert trace.notes == ("2 NVTX ranges never ended; they are taken to last until the last event",)


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_value_that_a_table_forbids_is_no_damage(tmp_path: Path) -> None:
    path = export(tmp_path / "a.sqlite", {K: [kernel(1, 3, graphId=1), kernel(4, 9, graphId=None)]})
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA writable_schema = ON")
        forbid = "UPDATE sqlite_master SET sql = replace(sql, 'graphId', 'graphId INTEGER NOT NULL')"
        assert database.execute(f"{forbid} WHERE name = '{K}' AND sql LIKE '%graphId%'").rowcount == 1
        database.commit()
    with closing(sqlite3.connect(path)) as database:
        assert "NULL value in" in database.execute("PRAGMA quick_check").fetchone()[0]
    assert read_trace(path).events["dur_ns"].to_list() == [2, 5]


def test_text_and_fractions_in_the_place_of_numbers(tmp_path: Path) -> None:
    records = [
        kernel(1, 3),
        kernel("2", 5),
        kernel(4, "x"),
        kernel(6.0, 7.5),
        kernel(8, 9, deviceId="0"),
        kernel(10, 11, streamId=b"7", correlationId="1"),
    ]
    trace = read_trace(export(tmp_path / "a.sqlite", {K: records, R: [call(0, 1)]}))
    kernels = trace.of_kind("kernel")
    assert kernels.select("start_ns", "dur_ns", "stream").rows() == [(1, 2, 7), (6, 1, 7), (10, 1, None)]
    assert kernels["link"].to_list()[2] is None
    assert (trace.n_events, trace.n_dropped) == (7, 3)
    assert "3 records were left out" in trace.notes[0]


@pytest.mark.parametrize(
    "damaged",
    [
        kernel(5, 5 + MAX_DUR_NS + 1),
        kernel(5, 5 - MAX_DUR_NS - 1),
        kernel(-(2**63), 2**63 - 1),
        kernel(-(2**63), -(2**63)),
        kernel(2**62, 2**62 + 5),
        kernel(10 * MAX_DUR_NS, 10 * MAX_DUR_NS + 5),
        kernel(1e300, 1e300),
        kernel(None, 4),
        kernel(4, None),
    ],
)
def test_impossible_times_are_left_out_and_counted(tmp_path: Path, damaged: dict[str, Any]) -> None:
    good = [kernel(-7, 1), kernel(5, 6), kernel(7, 7 + MAX_DUR_NS)]
    trace = read_trace(export(tmp_path / "a.sqlite", {K: [*good, damaged]}))
    assert trace.events.select("start_ns", "dur_ns").rows() == [(-7, 8), (5, 1), (7, MAX_DUR_NS)]
    assert trace.n_dropped == 1
    assert "times that cannot be true" in trace.notes[0]


def test_exports_in_the_time_of_day_are_whole(tmp_path: Path) -> None:
    now = 1_779_782_330_176_752_435
    trace = read_trace(export(tmp_path / "a.sqlite", {K: [kernel(now, now + 5), kernel(now + 7, now + 8)]}))
    assert (trace.events["start_ns"].to_list(), trace.n_dropped) == ([now, now + 7], 0)


def test_a_correlation_id_that_cannot_be_true_joins_nothing(tmp_path: Path) -> None:
    """Id 2**32 of the first process would be id 0 of the second."""
    work = [kernel(5, 6, correlationId=2**32), kernel(5, 6, correlationId=-1), kernel(5, 6, correlationId=0)]
    calls = [call(1, 2, correlationId=0), call(1, 2, correlationId=0, globalTid=pid(2, 1))]
    links = read_trace(export(tmp_path / "a.sqlite", {K: work, R: calls})).events["link"].to_list()
    assert links == [None, None, 0, 0, 2**32]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    export(path, {K: [kernel(1, 2, shortName=1), kernel(3, 4, shortName=2)], "StringIds": [{"id": 1, "value": "k"}]})
    with closing(sqlite3.connect(path)) as database:
        database.execute("INSERT INTO StringIds VALUES (2, CAST(X'61FF' AS TEXT))")
        database.commit()
    assert read_trace(path).events["name"].cast(pl.String).to_list() == ["k", "a\ufffd"]


@pytest.mark.parametrize("source", REAL[-2:])
@pytest.mark.parametrize("check_whole_bytes", [0, 2**29])
def test_an_overwritten_page_is_refused_or_does_not_matter(
    tmp_path: Path, source: Path, check_whole_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nsys_tables, "CHECK_WHOLE_BYTES", check_whole_bytes)
    good, truth = source.read_bytes(), read_trace(source)
    dice = random.Random(7)
    outcomes = {"refused": 0, "same": 0}
    for _ in range(40):
        page = dice.randrange(len(good) // 4096) * 4096
        filled = dice.choice([bytes(4096), b"\xff" * 4096, dice.randbytes(4096)])
        path = tmp_path / "damaged.sqlite"
        path.write_bytes(good[:page] + filled + good[page + 4096 :])
        try:
            trace = read_trace(path)
        except InputError as refusal:
            assert "\n" not in str(refusal)
            outcomes["refused"] += 1
        else:
            assert trace.events.equals(truth.events)
            outcomes["same"] += 1
    assert outcomes["refused"] > 5


# --- piece by piece ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", REAL, ids=lambda path: path.stem)
def test_tables_are_read_in_pieces_as_they_are_in_one(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = read_trace(source)
    monkeypatch.setattr(nsys_tables, "PIECE_ROWS", 97)
    found = read_trace(source)
    assert same(found, truth)
    assert len({column.n_chunks() for column in found.events}) == 1  # else Polars copies it whole to filter it


def test_rows_with_missing_numbers_tables_without_any_and_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nsys_tables, "PIECE_ROWS", 4)
    path = export(tmp_path / "a.sqlite", {K: [kernel(at, at + 1) for at in range(40)]})
    with closing(sqlite3.connect(path)) as database:
        database.execute(f"DELETE FROM {K} WHERE start BETWEEN 5 AND 25 OR start % 3 = 0")
        database.execute(f"UPDATE {K} SET rowid = -9 WHERE start = 1")
        database.execute(f"UPDATE {K} SET rowid = 9223372036854775807 WHERE start = 2")
        database.execute(f"CREATE VIEW CUPTI_ACTIVITY_KIND_MEMCPY AS SELECT * FROM {K}")
        database.execute(f"CREATE TABLE {NVTX} (start PRIMARY KEY, end, eventType, rowid) WITHOUT ROWID")
        database.execute(f"INSERT INTO {NVTX} SELECT start, end, 59, 1 FROM {K}")
        database.commit()
    starts = {at for at in range(40) if not 5 <= at <= 25 and at % 3}
    events = read_trace(path).events
    for kind in ("kernel", "copy", "range"):
        found = events.filter(pl.col("kind") == kind)["start_ns"].to_list()
        assert len(found) == len(starts) and set(found) == starts


def test_links_do_not_depend_on_the_order_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsys_tables, "PIECE_ROWS", 2)
    calls = [call(1, 2, correlationId=5, globalTid=pid(process, 1)) for process in (3, 1, 2)]
    work = [kernel(5, 6, correlationId=5, globalPid=pid(process)) for process in (2, 1, 3)]
    events = read_trace(export(tmp_path / "a.sqlite", {K: work, R: calls})).events
    assert events["link"].to_list() == [2**32 + 5, 5, 2**33 + 5, 2**33 + 5, 5, 2**32 + 5]


# --- Parquet and reports ---------------------------------------------------------------------------------------------


def as_parquet(source: Path, folder: Path) -> Path:
    """The tables of an export as `nsys export --type parquetdir` writes them: a file each, the same names."""
    types = {"INTEGER": pl.Int64, "TEXT": pl.String, "REAL": pl.Float64}
    folder.mkdir()
    with closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as database:
        for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            columns = {c: types[t or "INTEGER"] for _, c, t, *_ in database.execute(f"PRAGMA table_info({table})")}
            rows = database.execute(f"SELECT * FROM {table}").fetchall()
            pl.DataFrame(rows, schema=columns, orient="row").write_parquet(folder / f"{table}.parquet")
    return folder


def same(one: Trace, other: Trace) -> bool:
    return one.events.equals(other.events) and replace(one, events=other.events) == other


@pytest.mark.parametrize("source", REAL, ids=lambda path: path.stem)
def test_a_parquet_folder_reads_as_the_sqlite_file_does(tmp_path: Path, source: Path) -> None:
    folder = as_parquet(source, tmp_path / "run_pqtdir")
    from_folder, from_file = read_trace(folder), read_trace(source)
    assert same(from_folder, from_file)
    assert launch_metrics(from_folder) == launch_metrics(from_file)


def test_types_that_parquet_may_hold(tmp_path: Path) -> None:
    high = 200 << 56 | pid(1) & ~(255 << 56)  # more than an Int64 holds
    strings = pl.DataFrame({"id": [1], "value": [b"gemm\xff"]}, schema={"id": pl.UInt32, "value": pl.Binary})
    work = pl.DataFrame(
        {"start": [1.0], "end": [3], "deviceId": [0], "globalPid": [high], "shortName": [1], "streamId": ["7"]},
        schema_overrides={"globalPid": pl.UInt64, "end": pl.UInt64, "deviceId": pl.Int16},
    )
    calls = pl.DataFrame({"start": [0], "end": [1], "globalTid": [high | 5]}, schema_overrides={"globalTid": pl.UInt64})
    for table, frame in ((K, work), (R, calls), ("StringIds", strings)):
        frame.write_parquet(tmp_path / f"{table}.parquet")
    trace = read_nsys_parquet(tmp_path)
    assert trace.events.select("name", "start_ns", "dur_ns", "process", "thread", "stream").rows() == [
        ("gemm\ufffd", 1, 2, 1, None, None),
        ("unknown", 0, 1, 1, 5, None),
    ]


def test_a_damaged_parquet_file_is_refused_by_name(tmp_path: Path) -> None:
    pl.DataFrame({"start": [1], "end": [2], "deviceId": [0]}).write_parquet(tmp_path / f"{K}.parquet")
    whole = (tmp_path / f"{K}.parquet").read_bytes()
    for damaged in (whole[:-20], b"PAR1", whole[:40] + b"\xff" * 40 + whole[80:]):
        (tmp_path / f"{K}.parquet").write_bytes(damaged)
        with pytest.raises(InputError, match=f"{K}.parquet cannot be read"):
            read_trace(tmp_path)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "my run.nsys-rep"
    path.write_bytes(b"\x00\x01binary")
    return path


def fake_nsys(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "nsys").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nsys").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_report_is_exported_where_nsys_is(tmp_path: Path, report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = export(tmp_path / "made.sqlite", {K: [kernel(1, 3)]})
    script = f'[ "$1 $2 $3" = "export --type sqlite" ] && [ "$8" = "{report}" ] && cp "{made}" "$7"'
    fake_nsys(tmp_path / "bin", script, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    assert same(read_trace(report), read_nsys(made))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_report_whose_export_fails(tmp_path: Path, report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nsys(tmp_path / "bin", "echo 'first line' >&2; echo 'the report is newer than I am' >&2; exit 3", monkeypatch)
    with pytest.raises(InputError, match=r"could not export \(the report is newer than I am\); try `nsys export"):
        read_trace(report)


def test_a_report_where_nsys_is_not(tmp_path: Path, report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"`nsys export --type sqlite --output 'my run.sqlite' 'my run.nsys-rep'`"):
        read_trace(report)


def test_an_export_beside_the_report_is_read_unless_it_is_older(
    tmp_path: Path, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    beside = export(tmp_path / "my run.sqlite", {K: [kernel(1, 3)]})
    os.utime(report, ns=(10**18, 10**18))
    trace = read_trace(report)
    assert trace.events.height == 1
    assert trace.notes == ("read from my run.sqlite, the export beside the report",)
    os.utime(beside, ns=(10**18 - 1, 10**18 - 1))
    with pytest.raises(InputError, match="not on PATH"):
        read_trace(report)


def test_an_export_that_bears_the_name_of_a_report(tmp_path: Path) -> None:
    made = export(tmp_path / "made.sqlite", {K: [kernel(1, 3)]})
    shutil.copy(made, tmp_path / "run.nsys-rep")
    assert read_trace(tmp_path / "run.nsys-rep").events.height == 1
