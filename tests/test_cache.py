"""A cache is used only where its source is unchanged and it is whole, and never is the cause of an error."""

import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import cache
from perfmodel.cache import SUFFIX, read_cached
from perfmodel.errors import InputError
from perfmodel.readers import read_trace
from perfmodel.trace import EVENTS, Trace
from tests.traces_made import complete, events, kernel, launch, pid, write_json, write_nsys

DOCUMENT = {
    "traceEvents": [
        complete("cpu_op", "aten::mm", 1, 9, **{"External id": 3, "Input Dims": [[4, 8], [8, 2]]}),
        complete("cuda_runtime", "cudaLaunchKernel", 2, 5, correlation=9),
        complete("kernel", "gemm", 7.25, 50.5, 0, 7, device=0, stream=7, correlation=9),
    ],
    "distributedInfo": {"rank": 3, "pg_config": [{"ranks": [0, 1], "name": "dp \ud83d"}]},
    "nan": float("nan"),
    "big": 2**80,
    "none": None,
}


class Reader:
    """Counts how often a source was read."""

    def __init__(self, trace: Trace | None = None) -> None:
        self.trace, self.n_reads = trace, 0

    def __call__(self, path: Path) -> Trace:
        self.n_reads += 1
        return self.trace or read_trace(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A trace that was last written long before now, as most are."""
    return aged(write_json(tmp_path / "rank-3.json", DOCUMENT))


def aged(path: Path) -> Path:
    os.utime(path, ns=(10**18, 10**18))
    return path


@pytest.fixture(autouse=True)
def _no_time_is_recent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a test are seconds old, and their ctime cannot be set."""
    monkeypatch.setattr(cache, "RACY_NS", -(10**12))


def only(folder: Path) -> Path:
    (found,) = folder.glob(f"*{SUFFIX}")
    return found


@pytest.mark.parametrize("where", ["beside", "folder"])
def test_a_trace_read_again_comes_from_its_cache_and_is_the_same(source: Path, tmp_path: Path, where: str) -> None:
    place: str | Path = "beside" if where == "beside" else tmp_path / "new" / "folder"
    read = Reader()
    first, again = read_cached(source, place, read), read_cached(source, place, read)
    assert read.n_reads == 1
    assert again.events.schema == EVENTS
    assert again.events.equals(first.events)
    assert [repr(getattr(again, name)) for name in ("source", "n_events", "n_dropped", "n_repaired", "notes")] == [
        repr(getattr(first, name)) for name in ("source", "n_events", "n_dropped", "n_repaired", "notes")
    ]
    assert repr(again.meta) == repr(first.meta)  # NaN does not equal itself
    found = only(tmp_path if where == "beside" else tmp_path / "new" / "folder")
    assert where == "folder" or found.name == "rank-3.json.perfmodel.parquet"


def test_the_front_door_takes_a_cache(source: Path, tmp_path: Path) -> None:
    assert read_trace(source, "beside").events.equals(read_trace(source, cache="beside").events)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["rank-3.json", "rank-3.json.perfmodel.parquet"]


def test_an_error_names_the_file_once_and_leaves_no_cache(tmp_path: Path) -> None:
    path = write_json(tmp_path / "x.json", {"traceEvents": []})
    with pytest.raises(InputError, match=rf"^{path}: found 0 Chrome trace events"):
        read_trace(path, "beside")
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_trace(tmp_path / "absent.json", "beside")
    assert list(tmp_path.iterdir()) == [path]


def test_editing_in_place_with_the_same_size_and_time_is_seen(source: Path) -> None:
    read = Reader()
    read_cached(source, "beside", read)
    before = source.stat()
    text = source.read_text().replace('"dur": 50.5', '"dur": 60.5')
    with source.open("r+") as file:
        file.write(text)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = source.stat()
    assert (before.st_size, before.st_mtime_ns, before.st_ino) == (after.st_size, after.st_mtime_ns, after.st_ino)
    assert read_cached(source, "beside", read).of_kind("kernel")["dur_ns"].to_list() == [60500]
    assert read.n_reads == 2


def test_a_change_that_no_stat_shows_is_seen_where_the_file_was_just_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """git's racy case: written, cached and written again within one tick of the file system's clock."""
    monkeypatch.setattr(cache, "RACY_NS", 2 * 10**9)
    path = tmp_path / "big.bin"
    path.write_bytes(bytes(4 * 2**20))
    old, new = Trace(events(kernel(1)), "kineto", 1), Trace(events(kernel(2)), "kineto", 1)
    read_cached(path, "beside", Reader(old))
    seen = cache._stamp(path)
    with path.open("r+b") as file:
        file.seek(200_000)  # between two sampled blocks
        file.write(b"x")
    unseen = cache._stamp(path)
    assert unseen.sample == seen.sample
    monkeypatch.setattr(cache, "_stamp", lambda _: replace(unseen, files=seen.files))
    read = Reader(new)
    assert read_cached(path, "beside", read).events["start_ns"].to_list() == [2]
    assert read.n_reads == 1


@pytest.mark.parametrize("change", ["copied", "touched", "renamed", "mode"])
def test_the_same_bytes_elsewhere_or_at_another_time_need_no_reading(source: Path, tmp_path: Path, change: str) -> None:
    read, folder = Reader(), tmp_path / "parts"
    read_cached(source, folder, read)
    written = only(folder).stat().st_mtime_ns
    path = source
    if change == "copied":
        path = Path(shutil.copy(source, tmp_path / "copy.json"))
    elif change == "touched":
        source.touch()
    elif change == "mode":
        source.chmod(0o600)
    else:
        path = source.rename(tmp_path / "other.json")
    assert read_cached(path, folder, read).n_events == 3
    assert read.n_reads == 1
    refreshed = only(folder).stat().st_mtime_ns
    assert refreshed > written
    assert read_cached(path, folder, read).n_events == 3
    assert only(folder).stat().st_mtime_ns == refreshed, "the second time its stamp is known"


def test_an_unchanged_stamp_spares_the_digest(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_cached(source, "beside", Reader())
    monkeypatch.setattr(cache, "_digest", lambda _: pytest.fail("digested"))
    read_cached(source, "beside", Reader())


def test_a_truncated_source_is_not_read_from_its_cache(source: Path) -> None:
    whole = read_trace(source, "beside")
    source.write_bytes(source.read_bytes()[:-200])
    aged(source)
    for _ in range(2):  # from the source, then from its own cache
        part = read_trace(source, "beside")
        assert part.n_events < whole.n_events
        assert "cut off" in part.notes[0]


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@settings(max_examples=60)
@given(at=st.floats(0, 1, exclude_max=True), cut=st.booleans())
def test_a_damaged_cache_is_never_used_and_is_written_again(
    at: float, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = aged(write_json(tmp_path_factory.mktemp("damaged") / "x.json", DOCUMENT))
    read = Reader()
    whole = read_cached(source, "beside", read)
    place = only(source.parent)
    data = place.read_bytes()
    damaged = data[: int(at * len(data))] if cut else _flip(data, int(at * len(data)))
    place.write_bytes(damaged)
    assert read_cached(source, "beside", read).events.equals(whole.events)
    assert read.n_reads == 2
    assert place.read_bytes() != damaged
    assert read_cached(source, "beside", read).events.equals(whole.events)
    assert read.n_reads == 2


def _other_program(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pl.DataFrame({"kind": [1]}).write_parquet(place)


def _other_readers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "READER_VERSION", cache.READER_VERSION + 1)


def _other_schema(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {**EVENTS, "kind": pl.Enum([*EVENTS["kind"].categories, "new"])}  # type: ignore[attr-defined]
    monkeypatch.setattr(cache, "EVENTS", pl.Schema(schema))


def _no_parquet(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write_bytes(b"")


def _marked_by_chance(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write_bytes(cache._MARK + b"1")


@pytest.mark.parametrize("foreign", [_other_program, _other_readers, _other_schema, _no_parquet, _marked_by_chance])
def test_a_foreign_cache_is_never_used_and_is_written_again(
    source: Path, monkeypatch: pytest.MonkeyPatch, foreign: Callable[[Path, pytest.MonkeyPatch], None]
) -> None:
    read = Reader()
    read_cached(source, "beside", read)
    foreign(only(source.parent), monkeypatch)
    assert read_cached(source, "beside", read).n_events == 3
    assert read.n_reads == 2
    assert read_cached(source, "beside", read).n_events == 3
    assert read.n_reads == 2


def test_two_files_that_differ_between_sampled_blocks_share_a_place_and_not_a_trace(tmp_path: Path) -> None:
    one, other = tmp_path / "one.bin", tmp_path / "other.bin"
    one.write_bytes(bytes(4 * 2**20))
    other.write_bytes(_flip(one.read_bytes(), 200_000))
    assert cache._stamp(one).sample == cache._stamp(other).sample
    folder = tmp_path / "parts"
    for n, path in enumerate((one, other)):
        read_cached(path, folder, Reader(Trace(events(kernel(n)), "kineto", 1)))
    read = Reader(Trace(events(kernel(0)), "kineto", 1))
    assert read_cached(other, folder, read).events["start_ns"].to_list() == [1]
    assert read_cached(one, folder, read).events["start_ns"].to_list() == [0]
    assert read.n_reads == 1


@pytest.mark.parametrize("side", ["-wal", "-journal"])
def test_the_side_files_of_a_database_belong_to_its_content(tmp_path: Path, side: str) -> None:
    kernels = [(20, 30, 0, 7, 1, pid(5), None, None)]
    path = aged(write_nsys(tmp_path / "x.sqlite", {"KERNEL": kernels}))
    read = Reader(Trace(events(kernel(20)), "nsys", 1))
    for n_reads, content in ((1, None), (2, b"pages"), (3, b"other"), (4, b"")):
        if content is not None:
            (tmp_path / f"x.sqlite{side}").write_bytes(content)
        for _ in range(2):
            read_cached(path, "beside", read)
        assert read.n_reads == n_reads


def test_rows_that_are_only_in_the_write_ahead_log_are_read(tmp_path: Path) -> None:
    path = write_nsys(tmp_path / "x.sqlite", {"KERNEL": [(20, 30, 0, 7, 1, pid(5), None, None)]})
    assert read_trace(path, "beside").events.height == 1
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL SELECT * FROM CUPTI_ACTIVITY_KIND_KERNEL")
        database.commit()
        assert read_trace(path, "beside").events.height == 2
        assert read_trace(path, "beside").events.height == 2


@pytest.mark.parametrize("meta", [{"a": (1,)}, {1: "a"}, {"a": {2: 1}}, {"a": b"x"}, {"a": [Path("x")]}])
def test_what_json_would_not_give_back_is_not_cached(source: Path, meta: dict[Any, Any]) -> None:
    read = Reader(Trace(events(kernel(1)), "kineto", 1, meta=meta))
    for _ in range(2):
        assert read_cached(source, "beside", read).meta == meta
    assert read.n_reads == 2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50)
@given(meta=st.dictionaries(st.text(max_size=4), json_values, max_size=3), notes=st.lists(st.text(), max_size=2))
def test_the_record_survives_exactly(
    meta: dict[str, Any], notes: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("record") / "x"
    path.write_bytes(b"source")
    trace = Trace(events(launch(1, 4), kernel(3, link=4)), "kineto", 7, 2, 1, tuple(notes), meta)
    read_cached(path, "beside", Reader(trace))
    again = read_cached(path, "beside", lambda _: pytest.fail("read again"))
    assert replace(again, events=trace.events) == trace
    assert json.dumps(again.meta) == json.dumps(meta)  # 1, 1.0 and true are equal
    assert again.events.equals(trace.events)


def test_every_shared_trace_can_be_cached_and_is_the_same(shared: Path, tmp_path: Path) -> None:
    for path in sorted((shared / "traces").iterdir()):
        if path.stat().st_size < 500_000:
            first = read_trace(path, tmp_path)
            again = read_cached(path, tmp_path, lambda path: pytest.fail(f"{path.name} was read again"))
            assert again.events.equals(first.events) and repr(again.meta) == repr(first.meta)


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """A longer write fails after as many bytes, those of pytest itself too: only for the time of the block."""
    limits = pytest.importorskip("resource")
    soft, hard = limits.getrlimit(limits.RLIMIT_FSIZE)
    limits.setrlimit(limits.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        limits.setrlimit(limits.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("trouble", ["a file in the way", "full disk", "name too long", "no rename"])
def test_where_no_cache_can_be_written_there_is_none_and_no_error(source: Path, tmp_path: Path, trouble: str) -> None:
    folder: str | Path = tmp_path / "parts"
    limit: AbstractContextManager[None] = nullcontext()
    if trouble == "a file in the way":
        Path(folder).write_text("")
    elif trouble == "full disk":
        limit = files_of_at_most(1000)
    elif trouble == "name too long":
        source, folder = source.rename(tmp_path / ("x" * 240 + ".json")), "beside"
    else:
        Path(folder).mkdir()
        aim = Path(folder) / f"{cache._stamp(source).sample[:32]}{SUFFIX}"
        (aim / "in the way").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with limit:
        found = [read_trace(source, folder).n_events for _ in range(2)]
    assert found == [3, 3]
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in (*before, tmp_path / "parts")] == []


def test_several_writers_at_once_leave_one_sound_cache(source: Path) -> None:
    traces: list[Trace] = []
    threads = [threading.Thread(target=lambda: traces.append(read_trace(source, "beside"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(traces) == 8 and all(trace.events.equals(traces[0].events) for trace in traces)
    assert sorted(p.name for p in source.parent.iterdir()) == [source.name, source.name + SUFFIX]
    read_cached(source, "beside", lambda _: pytest.fail("read again"))


def test_a_source_that_changes_while_it_is_read_is_not_cached(source: Path) -> None:
    def read(path: Path) -> Trace:
        trace = read_trace(path)
        path.write_text(path.read_text() + " ")
        return trace

    read_cached(source, "beside", read)
    assert not list(source.parent.glob(f"*{SUFFIX}"))


def test_a_pipe_is_read_and_not_kept(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    document = json.dumps({"traceEvents": [complete("cpu_op", "a", 1, 1)]})
    writer = threading.Thread(target=lambda: pipe.write_text(document))
    writer.start()
    trace = read_trace(pipe, cache="beside")
    writer.join()
    assert trace.events.height == 1 and list(tmp_path.iterdir()) == [pipe]
