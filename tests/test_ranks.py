"""A folder of ranks: which files, which ranks, one time for all, links kept apart; the same figures whoever reads."""

import gzip
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import ranks as ranks_module
from perfmodel.cache import SUFFIX
from perfmodel.errors import InputError
from perfmodel.launch import joined_kernels, launch_metrics
from perfmodel.ranks import RankSummary, spread, straggler, summarise_ranks
from perfmodel.readers import read_trace
from perfmodel.readers.folder import find_ranks, n_workers_for, read_ranks, resolve_ranks, time_base_ns
from perfmodel.trace import Trace
from tests.traces_made import complete, events, kernel, pid, write_json, write_nsys

BASE_NS = 17 * 10**17
NCCL = "ncclDevKernel_AllReduce_Sum_f16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


def write_rank(folder: Path, rank: int, name: str = "", compute_us: float = 50, **head: Any) -> Path:
    """A rank that launches a GEMM and a collective; every rank uses the same ids, and its base is rank seconds late."""
    document = {
        "distributedInfo": {"rank": rank, "world_size": 4},
        "baseTimeNanoseconds": BASE_NS + rank * 10**9,
        "deviceProperties": [{"id": 0, "name": "H100"}],
        **head,
        "traceEvents": [
            complete("cpu_op", "aten::mm", 1, 9, **{"External id": 3}),
            complete("cuda_runtime", "cudaLaunchKernel", 2, 5, correlation=9, **{"External id": 3}),
            complete("cuda_runtime", "cudaLaunchKernel", 8, 5, correlation=10),
            complete("kernel", "sm90_xmma_gemm_f16", 10 + rank, compute_us, 0, 7, device=0, stream=7, correlation=9),
            complete("kernel", NCCL, 200, 100 - compute_us, 0, 8, device=0, stream=8, correlation=10),
        ],
    }
    return write_json(folder / (name or f"rank-{rank}.json"), {k: v for k, v in document.items() if v is not None})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four ranks, of which rank 1 is cut off in its first event, and rank 3 computes longest."""
    path = tmp_path / "run"
    path.mkdir()
    for rank in range(4):
        write_rank(path, rank, compute_us=80 if rank == 3 else 50)
    bad = path / "rank-1.json"
    content = bad.read_bytes()
    bad.write_bytes(content[: content.index(b'"ph"') + 20])
    return path


def same(one: RankSummary, other: RankSummary) -> bool:
    tables = [(one.ranks, other.ranks), (one.classes, other.classes)]
    return all(a.equals(b) for a, b in tables) and json.dumps(one.to_json()) == json.dumps(other.to_json())


# --- which files, which ranks ----------------------------------------------------------------------------------------


def names_of(folder: Path) -> tuple[list[str], list[str]]:
    files, ignored = find_ranks(folder)
    return [str(file.relative_to(folder)) for file in files], ignored


def test_traces_are_found_in_the_order_of_their_numbers_and_other_files_are_named(tmp_path: Path) -> None:
    for rank in (10, 9):
        write_rank(tmp_path, rank)
    write_json(tmp_path / "rank-2.trace.json.gz", {"traceEvents": []}, packed=True)
    write_json(tmp_path / "rank-9.json.gz", {"traceEvents": []}, packed=True)  # the same trace, packed
    (tmp_path / "rank-3.sqlite").write_bytes(b"SQLite format 3\0")
    (tmp_path / "rank-4.json.gz").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "rank-5.pt.trace.json.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    write_json(tmp_path / "manifest.json", {"ranks": 3})
    for name in ("notes.txt", f"rank-9.json{SUFFIX}", ".hidden.json", "logs.tar.gz"):
        (tmp_path / name).write_text("")
    write_rank((tmp_path / "warm-up").mkdir() or tmp_path / "warm-up", 0)
    (tmp_path / "rank-6.json").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "rank-7.json")
    found, ignored = names_of(tmp_path)
    assert found == [
        "rank-2.trace.json.gz", "rank-3.sqlite", "rank-4.json.gz", "rank-5.pt.trace.json.zst", "rank-9.json",
        "rank-10.json",
    ]  # fmt: skip
    assert ignored == [
        "logs.tar.gz",
        "manifest.json",
        "notes.txt",
        "rank-6.json",
        "rank-7.json",
        "rank-9.json.gz",
        "warm-up",
    ]


def test_subfolders_of_machines_count_where_the_folder_holds_no_trace(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {})
    for node in (10, 2):
        (tmp_path / f"node{node}").mkdir()
        write_rank(tmp_path / f"node{node}", node)
    assert names_of(tmp_path) == (["node2/rank-2.json", "node10/rank-10.json"], ["manifest.json"])


def test_a_subfolder_that_cannot_be_opened_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for node in (0, 1):
        (tmp_path / f"node{node}").mkdir()
        write_rank(tmp_path / f"node{node}", node)
    closed, iterdir = tmp_path / "node1", Path.iterdir

    def refusing(folder: Path) -> Any:
        if folder == closed:
            raise PermissionError(13, "Permission denied", str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", refusing)
    assert names_of(tmp_path) == (["node0/rank-0.json"], ["node1"])


@pytest.mark.parametrize(("present", "found"), [((), "nothing"), (("a.txt", "b.json"), "a.txt, b.json")])
def test_a_folder_without_traces_is_refused(tmp_path: Path, present: tuple[str, ...], found: str) -> None:
    for name in present:
        (tmp_path / name).write_text("{}")
    for refused in (read_trace, summarise_ranks):
        with pytest.raises(InputError, match=rf"^{tmp_path}: a folder without traces \(found {found}\)"):
            refused(tmp_path)


@pytest.mark.parametrize(
    ("names", "recorded", "ranks", "notes"),
    [
        (("a.json", "b.json"), (1, 0), [1, 0], ()),
        (("rank-3.json", "rank12.Apr_03.1102.pt.trace.json"), (None, None), [3, 12], ()),
        (("global_rank_5_local_rank_1.json", "local_rank_2_rank_6.json"), (None, None), [5, 6], ()),
        (("node0/x-rank0.json", "node1/x-rank1.json"), (None, None), [0, 1], ()),
        (("nsys_0_report.sqlite", "nsys_1_report.sqlite"), (None, None), [0, 1], ()),
        (("TP-1.trace.json", "TP-2.trace.json"), (None, None), [1, 2], ()),
        (("rank-7.json", "b.json"), (None, 2), [7, 2], ()),
        # A process id and a time are no ranks.
        (("host_4711.1700.json", "host_4712.1700.json"), (None, None), [0, 1], ("no file says its rank",)),
        (("a_0_0.json", "a_1_1.json"), (None, None), [0, 1], ("no file says its rank",)),
        (("frank1.json", "frank2x.json"), (None, None), [0, 1], ("no file says its rank",)),
        (("x.json",), (None,), [0], ("x.json does not say its rank; it is counted as rank 0",)),
        (("rank-4.json", "x.json"), (None, None), [4, 5], ("x.json does not say its rank",)),
        (("rank-0.json", "rank-1.json"), (0, 0), [0, 1], ("several files recorded the same rank",)),
        (("a.json", "b.json", "c.json"), (3, 3, 1), [3, 4, 1], ("b.json says rank 3, as another file does",)),
        (("rank-1.2.json", "rank-1.3.json"), (1, 1), [1, 2], ("rank-1.3.json says rank 1, as another file",)),
    ],
)  # fmt: skip
def test_ranks_come_from_the_files_then_their_names_then_their_order(
    names: tuple[str, ...], recorded: tuple[int | None, ...], ranks: list[int], notes: tuple[str, ...]
) -> None:
    found, said = resolve_ranks(names, recorded)
    assert found == ranks
    assert len(said) == len(notes) and all(want in line for want, line in zip(notes, said, strict=True)), said


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["x", "rank-1", "rank-2", "y 3", "y 4", "rank99999999999"]), st.none() | st.integers(0, 3)
        ),
        min_size=1,
    )
)
def test_ranks_are_always_distinct_and_first_claims_hold(files: list[tuple[str, int | None]]) -> None:
    found, notes = resolve_ranks([f"{i}/{name}.json" for i, (name, _) in enumerate(files)], [r for _, r in files])
    assert len(set(found)) == len(files) and all(0 <= rank < 2**31 for rank in found)
    if files[0][1] is not None and not notes:
        assert found == [r if r is not None else found[i] for i, (_, r) in enumerate(files)]


# --- one Trace of all ranks ------------------------------------------------------------------------------------------


def test_the_front_door_reads_a_folder_as_one_trace(folder: Path) -> None:
    write_json(folder / "manifest.json", {})
    trace = read_trace(folder)
    assert trace.source == "kineto"
    assert (trace.n_events, trace.n_dropped, trace.n_repaired) == (15, 0, 0)
    assert trace.notes[0] == "not read: manifest.json"
    assert trace.notes[1].startswith("rank-1.json is left out: ") and "cut off" in trace.notes[1]
    assert trace.meta["time_origin_ns"] == BASE_NS
    assert trace.meta["deviceProperties"] == [{"id": 0, "name": "H100"}]
    assert [(one["rank"], one["file"], one["time_base_ns"]) for one in trace.meta["ranks"]] == [
        (rank, f"rank-{rank}.json", BASE_NS + rank * 10**9) for rank in (0, 2, 3)
    ]
    assert trace.meta["ranks"][1]["meta"]["distributedInfo"]["rank"] == 2
    kernels = trace.of_kind("kernel").filter(pl.col("stream") == 7)
    assert kernels.select("rank", "start_ns").rows() == [(r, r * 10**9 + 10_000 + r * 1000) for r in (0, 2, 3)]


@pytest.mark.parametrize("backend", ["loky", "sequential"])
def test_links_stay_within_their_rank(folder: Path, backend: str) -> None:
    trace = read_ranks(folder, backend=backend, n_workers=2)
    joined = joined_kernels(trace.events)
    assert joined["link"].n_unique() == joined.height == 6
    whole, delay_ns = launch_metrics(trace), 0
    for rank in (0, 2, 3):
        alone = launch_metrics(read_trace(folder / f"rank-{rank}.json"))
        delay_ns += alone.tklqt_ns
    assert (whole.n_kernels_joined, whole.tklqt_ns) == (6, delay_ns)
    externals = trace.events.drop_nulls("external").group_by("external").agg(pl.col("rank").n_unique(), pl.len())
    assert externals.select("rank", "len").rows() == [(1, 2)] * 3


ids = st.none() | st.integers(-3, 3) | st.sampled_from([2**62, 2**63 - 1, -(2**63), 2**41])


@settings(max_examples=80)
@given(st.lists(st.lists(st.tuples(ids, ids), min_size=1, max_size=6), min_size=1, max_size=4))
def test_ids_are_equal_where_rank_and_id_were(all_ranks: list[list[tuple[int | None, int | None]]]) -> None:
    from perfmodel.readers.folder import _as_rank

    next_free: dict[str, int] = {}
    frames = [
        _as_rank(events(*(kernel(1, link=link, external=external) for link, external in rows)), rank, 5, next_free)
        for rank, rows in enumerate(all_ranks)
    ]
    table = pl.concat(frames)
    assert table["start_ns"].unique().to_list() == [6]
    for place, column in enumerate(("link", "external")):
        before = [None if row[place] is None else (r, row[place]) for r, rows in enumerate(all_ranks) for row in rows]
        after = table[column].to_list()
        assert [a is None for a in after] == [b is None for b in before]
        assert len({(a, b) for a, b in zip(after, before, strict=True)}) == len(set(after)) == len(set(before))


def test_ranks_of_both_vendors_share_a_clock(tmp_path: Path) -> None:
    write_rank(tmp_path, 0)
    path = write_nsys(tmp_path / "rank-1.sqlite", {"KERNEL": [(20, 30, 0, 7, 1, pid(5), None, None)]})
    assert read_trace(tmp_path).meta["time_origin_ns"] is None
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE TARGET_INFO_SESSION_START_TIME (utcEpochNs INT)")
        database.execute("INSERT INTO TARGET_INFO_SESSION_START_TIME VALUES (?)", (BASE_NS - 500,))
        database.commit()
    trace = read_trace(tmp_path)
    assert trace.source == "kineto+nsys"
    assert trace.meta["time_origin_ns"] == BASE_NS - 500
    firsts = trace.events.group_by("rank").agg(pl.min("start_ns")).sort("rank")
    assert firsts.rows() == [(0, 1500), (1, 20)]


def test_without_a_common_clock_times_stay_as_they_are_and_a_note_says_so(tmp_path: Path) -> None:
    write_rank(tmp_path, 0)
    write_rank(tmp_path, 1, baseTimeNanoseconds=None)
    trace = read_trace(tmp_path)
    assert trace.meta["time_origin_ns"] is None
    assert any(note.startswith("rank 1: the file does not say when its times begin") for note in trace.notes)
    assert trace.of_kind("op")["start_ns"].to_list() == [1000, 1000]
    summary = summarise_ranks(tmp_path, backend="sequential")
    assert summary.time_origin_ns is None and summary.ranks["start_ns"].null_count() == 2


@pytest.mark.parametrize(
    ("starts", "meta", "base"),
    [
        ((5,), {"baseTimeNanoseconds": BASE_NS}, BASE_NS),
        ((5,), {"session_start_ns": BASE_NS}, BASE_NS),
        ((5,), {"baseTimeNanoseconds": str(BASE_NS)}, None),
        ((5,), {"baseTimeNanoseconds": True}, None),
        ((5,), {"baseTimeNanoseconds": 0}, None),
        ((5,), {"baseTimeNanoseconds": 10**30}, None),
        ((BASE_NS,), {}, 0),
        ((BASE_NS,), {"baseTimeNanoseconds": 0}, 0),
        ((5, BASE_NS), {}, None),
        ((5, 2**62), {"baseTimeNanoseconds": BASE_NS}, None),  # the sum would overflow
        ((), {"baseTimeNanoseconds": BASE_NS}, None),
    ],
)
def test_the_base_of_times_is_known_or_null(starts: tuple[int, ...], meta: dict[str, Any], base: int | None) -> None:
    assert time_base_ns(Trace(events(*map(kernel, starts)), "kineto", 1, meta=meta)) == base


def test_notes_of_ranks_name_their_ranks(tmp_path: Path) -> None:
    for rank in range(3):
        text = json.dumps([complete("kernel", "k", rank, 1, 0, 7, device=0, stream=7, correlation=1)])
        write_json(tmp_path / f"rank-{rank}.json", text[:-1] if rank else text)
    (note,) = [note for note in read_trace(tmp_path).notes if "not closed" in note]
    assert note.startswith("rank 1, 2: the array of events is not closed")


def test_two_real_ranks_keep_their_launches_and_their_distance_in_time(shared: Path, tmp_path: Path) -> None:
    sources = [shared / "traces" / f"hta__trace_filter__sampled_rank-{rank}.json.gz" for rank in (0, 1)]
    alone = [read_trace(shutil.copy(source, tmp_path)) for source in sources]
    trace = read_ranks(tmp_path, backend="sequential")
    assert trace.events.height == sum(one.events.height for one in alone)
    first = min(one.events["start_ns"].min() for one in alone)  # type: ignore[type-var]
    for rank, one in enumerate(alone):
        mine = trace.events.filter(pl.col("rank") == rank)
        assert (mine["start_ns"] + first).equals(one.events["start_ns"])
        assert launch_metrics(replace(trace, events=mine)).tklqt_ns == launch_metrics(one).tklqt_ns
    assert launch_metrics(trace).n_kernels_joined == sum(launch_metrics(one).n_kernels_joined for one in alone)
    summary = summarise_ranks(tmp_path, backend="sequential")
    assert summary.ranks["tklqt_ns"].to_list() == [launch_metrics(one).tklqt_ns for one in alone]
    assert summary.ranks["start_ns"].to_list() == [0, 192_000]
    found = straggler(summary.ranks)
    assert found is not None and found.rank == 1  # which waits least in its collectives


# --- figures of all ranks --------------------------------------------------------------------------------------------


def test_figures_of_each_rank_their_spread_and_the_straggler(folder: Path) -> None:
    summary = summarise_ranks(folder, backend="sequential")
    table = summary.ranks.select("rank", "n_events", "n_kernels_joined", "compute_time_ns", "communication_time_ns")
    assert table.rows() == [(0, 5, 2, 50_000, 50_000), (2, 5, 2, 50_000, 50_000), (3, 5, 2, 80_000, 20_000)]
    assert summary.ranks["communication_frac"].to_list() == [0.5, 0.5, 0.2]
    assert summary.ranks["start_ns"].to_list() == [rank * 10**9 + 1000 for rank in (0, 2, 3)]
    assert summary.ranks["end_ns"].to_list() == [250_000, 2 * 10**9 + 250_000, 3 * 10**9 + 220_000]
    assert summary.classes.filter(pl.col("rank") == 3).select("class", "n_kernels", "time_ns").rows() == [
        ("gemm", 1, 80_000), ("collective", 1, 20_000)
    ]  # fmt: skip
    assert list(summary.failed) == ["rank-1.json"] and "cut off" in summary.failed["rank-1.json"]
    assert [one["n_kernels"] for one in summary.launch] == [2, 2, 2]
    rows = {row["figure"]: row for row in spread(summary.ranks).iter_rows(named=True)}
    assert rows["compute_time_ns"] == {
        "figure": "compute_time_ns", "least": 50_000, "median": 50_000, "most": 80_000, "least_rank": 0,
        "most_rank": 3, "excess_frac": pytest.approx(0.6),
    }  # fmt: skip
    assert (rows["kernel_time_ns"]["most_rank"], rows["kernel_time_ns"]["excess_frac"]) == (0, 0)
    found = straggler(summary.ranks)
    assert found is not None
    assert (found.rank, found.compute_time_ns, found.median_compute_time_ns) == (3, 80_000, 50_000)
    assert found.excess_frac == pytest.approx(0.6)
    assert json.loads(json.dumps(summary.to_json(), allow_nan=False))["straggler"]["rank"] == 3


def test_a_rank_that_is_cut_off_counts_as_far_as_it_goes(tmp_path: Path) -> None:
    for rank in range(2):
        path = write_rank(tmp_path, rank)
    path.write_bytes(path.read_bytes()[:-150])
    summary = summarise_ranks(tmp_path, backend="sequential")
    whole, part = summary.ranks["n_events"].to_list()
    assert 0 < part < whole
    assert not summary.failed
    assert any("rank 1: " in note and "cut off inside its events" in note for note in summary.notes)
    assert any("rank 1: " in note and "cut off inside its events" in note for note in read_trace(tmp_path).notes)


def test_ranks_without_kernels_have_no_straggler_and_null_figures(tmp_path: Path) -> None:
    for rank in range(2):
        write_json(tmp_path / f"rank-{rank}.json", [complete("cpu_op", "aten::mm", 1, 9)])
    summary = summarise_ranks(tmp_path, backend="sequential")
    assert straggler(summary.ranks) is None
    assert summary.ranks["communication_frac"].null_count() == 2
    assert "akd_ns" not in spread(summary.ranks)["figure"].to_list()
    assert spread(summary.ranks).filter(pl.col("figure") == "n_kernels")["excess_frac"].to_list() == [None]


def test_one_rank_is_no_straggler(tmp_path: Path) -> None:
    write_rank(tmp_path, 0)
    assert straggler(summarise_ranks(tmp_path, backend="sequential").ranks) is None


def _pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")


def _no_trace(path: Path) -> None:
    path.write_text('[{"ph": "X", "name": "a"}]')


def _cut_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(path.read_bytes())[:100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [(_pointer, "Git LFS pointer"), (_no_trace, "none that the PyTorch profiler writes"), (_cut_gzip, "cut off")],
)
def test_a_bad_rank_is_reported_and_all_bad_ones_are_an_error(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    paths = [write_rank(tmp_path, rank) for rank in range(2)]
    damage(paths[1])
    assert words in summarise_ranks(tmp_path, backend="sequential").failed["rank-1.json"]
    assert any(words in note for note in read_trace(tmp_path).notes)
    damage(paths[0])
    for refused in (read_trace, lambda path: summarise_ranks(path, backend="sequential")):
        with pytest.raises(InputError, match=rf"^{tmp_path}: none of its 2 traces can be read; rank-0.json: .*{words}"):
            refused(tmp_path)


def test_a_defect_of_a_reader_costs_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import perfmodel.readers

    for rank in range(2):
        write_rank(tmp_path, rank)

    def defective(path: Path, *_: object) -> Trace:
        return 1 / 0 if "rank-1" in path.name else real(path)  # type: ignore[return-value]

    real = perfmodel.readers.read_trace
    monkeypatch.setattr(perfmodel.readers, "read_trace", defective)
    assert "ZeroDivisionError" in summarise_ranks(tmp_path, backend="sequential").failed["rank-1.json"]


def test_more_processes_than_pay_are_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("joblib.cpu_count", lambda: 8)
    files = [write_rank(tmp_path, rank) for rank in range(3)]
    assert n_workers_for(files, "loky", None) == 1
    for file in files:
        with file.open("ab") as stream:
            stream.truncate(2**30)
    assert n_workers_for(files, "loky", None) == 3
    assert (n_workers_for(files, "loky", 2), n_workers_for(files, "loky", 10**6)) == (2, 3)
    assert n_workers_for(files, "dask", None) is None
    assert n_workers_for(files, "sequential", 4) == 1


# --- the same, whoever reads and whoever dies ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["threading", "loky", "dask"])
def test_every_backend_has_the_result_of_one_process_though_a_worker_dies(
    folder: Path, tmp_path: Path, backend: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = summarise_ranks(folder, backend="sequential")
    address = request.getfixturevalue("scheduler") if backend == "dask" else None
    parts = tmp_path / "parts"
    parts.mkdir()
    if backend != "threading":
        monkeypatch.setattr(ranks_module, "_TASK", "tests.ranks_made:summary_killed_once")
    found = summarise_ranks(folder, parts, backend, 2, address)
    assert (parts / "killed").exists() == (backend != "threading")
    assert same(found, expected)
    assert len(list(parts.glob(f"*{SUFFIX}"))) == 3
    whole = read_ranks(folder, parts, backend, 2, address)
    assert whole.events.equals(read_ranks(folder, backend="sequential").events)


def test_a_run_that_was_stopped_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    summarise_ranks(folder, tmp_path / "parts", backend="sequential")
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    write_rank(folder, 5)
    summary = summarise_ranks(folder, tmp_path / "parts", backend="sequential")
    assert summary.ranks["rank"].to_list() == [0, 2, 3, 5]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert len(list((tmp_path / "parts").iterdir())) == 4


def test_a_cluster_needs_a_folder_that_its_workers_see(folder: Path) -> None:
    with pytest.raises(InputError, match="reading on dask needs a cache folder"):
        read_ranks(folder, backend="dask", scheduler="tcp://127.0.0.1:1")
