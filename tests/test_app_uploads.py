"""Files that users bring to the dashboard: what is opened, how it is named, what stays in a session and what goes."""

import gzip
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.app_pages import on_path, opened, ran, shown
from tests.conftest import ROOT
from tests.test_hostile import KERNEL, ROW, TABLE, database, document

PROFILES = ROOT / "traces" / "epyc-zen5-2p-expert-parallel" / "profiles"


@pytest.fixture
def uploads() -> Iterator[Any]:
    with on_path():
        import uploads

        yield uploads


def file(name: str, content: bytes) -> Any:
    return SimpleNamespace(name=name, getbuffer=lambda: memoryview(content))


def uploaded(test: Any, name: str, content: bytes, box: int = 0) -> Any:
    test.file_uploader[box].upload(name, content, "application/json")
    return ran(test)


def names(test: Any) -> list[str]:
    return [button.key for button in test.button if str(button.key).startswith("remove-")]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("../../etc/passwd", "etc/passwd"),
        ("/etc/passwd", "etc/passwd"),
        ("..\\..\\windows\\x.json", "windows/x.json"),
        ("a\0b\n.json", "a_b_.json"),
        ("x" * 5000 + ".json.gz", "x" * 92 + ".json.gz"),
        ("a/" * 3000 + "x.json", "a/" * 7 + "x.json"),
        ("..", "file-0"),
        ("", "file-0"),
        ("ü" * 300 + ".json", "ü" * 47 + ".json"),
    ],
)
def test_names_of_users_are_paths_inside_the_folder_alone(uploads, name: str, kept: str) -> None:
    with uploads.saved([file(name, b"content")]) as folder:
        found = [path for path in folder.rglob("*") if path.is_file()]
        assert [str(path.relative_to(folder)) for path in found] == [kept]
        assert found[0].read_bytes() == b"content"


def test_files_of_one_name_and_of_a_folders_name_are_all_kept(uploads) -> None:
    files = [file("a", b"1"), file("a", b"2"), file("a/b", b"3"), file("c/d", b"4"), file("c", b"5")]
    with uploads.saved(files) as folder:
        kept = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert sorted(kept) == [b"1", b"2", b"3", b"4", b"5"]


def test_the_folder_is_private_and_gone_afterwards_and_no_error_names_it(uploads) -> None:
    with pytest.raises(uploads.InputError) as caught, uploads.saved([file("a.json", b"{}")]) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        uploads.read_trace(folder / "a.json")
    assert not folder.exists()
    assert str(folder.parent) not in str(caught.value)
    assert str(caught.value).startswith("a.json: ")


def test_parquet_reaches_no_reader(uploads) -> None:
    for content in (b"PAR1....", b"....PAR1", b"\xef\xbb\xbf  PAR1...."):
        with pytest.raises(uploads.InputError, match="Parquet"), uploads.saved([file("capture/x.json", content)]):
            pytest.fail("it was written")


def test_an_example_is_open_until_something_is_uploaded_and_what_was_uploaded_can_be_removed(tmp_path: Path) -> None:
    test = opened("trace")
    assert len(test.multiselect(key="open").value) == 1
    uploaded(test, "mine_made.json.gz", gzip.compress(document(KERNEL, KERNEL)))
    assert test.multiselect(key="open").value == []
    assert "mine_made.json.gz: kineto trace, 2 events" in shown(test)
    assert "coverage: 2 kernels" in shown(test)
    (kept,) = names(test)
    uploaded(test, "again_made.json.gz", gzip.compress(document(KERNEL, KERNEL)))
    uploaded(test, "broken_made.json", b'{"traceEvents":[')
    assert "broken_made.json: " in shown(test)
    assert kept in names(test)
    test.button(key=kept).click()
    assert kept not in names(ran(test))


def test_what_was_read_leaves_the_box_and_the_servers_memory(uploads) -> None:
    test = opened("trace")
    removed = []
    context = SimpleNamespace(
        session_id="s", uploaded_file_mgr=SimpleNamespace(remove_file=lambda *which: removed.append(which))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["uploads"], "get_script_run_ctx", lambda: context)
        uploaded(test, "a_made.json", document(KERNEL))
    assert len(removed) == 1
    assert [box.value for box in test.file_uploader] == [[], []]


def test_nothing_uploaded_is_written_to_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    test = opened("trace")
    uploaded(test, "a_made.sqlite", database(tmp_path / "x.sqlite", TABLE.format(""), ROW).read_bytes())
    assert names(test)
    assert [path.name for path in tmp_path.rglob("*")] == ["x.sqlite"]


def test_a_folder_of_ranks_is_one_trace(uploads) -> None:
    folder = next(path for path in sorted(PROFILES.iterdir()) if path.is_dir())
    test = opened("trace", open="[]")
    files = [(f"run/{path.name}", path.read_bytes(), "application/gzip") for path in sorted(folder.iterdir())]
    test.file_uploader[1].set_value(files)
    ran(test)
    (one,) = test.session_state["uploaded"]
    assert one.name == "run"
    assert one.ranks.ranks["rank"].to_list() == [0, 1]
    assert one.analysis.trace.events["rank"].n_unique() == 2
    assert one.analysis.trace.meta["folder"] == one.ranks.folder == "run"  # not where the server kept it


def test_a_session_holds_so_many_traces_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    test = opened("trace")
    monkeypatch.setattr(sys.modules["uploads"], "MAX_OPEN", 1)
    uploaded(test, "a_made.json", document(KERNEL))
    uploaded(test, "b_made.json", document(KERNEL, KERNEL))
    assert "remove one first" in shown(test)
    assert len(names(test)) == 1


def test_the_servers_folder_offers_traces_and_ranks_but_nothing_outside(uploads, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "ranks", root / "linked", outside, root / ".hidden"):
        folder.mkdir(parents=True)
        for rank in range(2):
            (folder / f"rank-{rank}.json").write_bytes(document(KERNEL))
    (root / "words.txt").write_text("no trace")
    (root / "linked" / "rank-2.json").symlink_to(outside / "rank-0.json")
    (root / "elsewhere").symlink_to(outside)
    (root / "inside.json").symlink_to(root / "ranks" / "rank-0.json")
    (root / "gone.json").symlink_to(root / "nothing.json")
    found = [str(path.relative_to(root)) for path in uploads._traces_below(root)]
    assert found == [
        *("inside.json", "linked/rank-0.json", "linked/rank-1.json"),
        *("ranks", "ranks/rank-0.json", "ranks/rank-1.json"),
    ]


def test_a_trace_of_the_servers_folder_opens_from_a_link_and_no_path_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_made.json").write_bytes(document(KERNEL, KERNEL, KERNEL))
    monkeypatch.setenv("PERFMODEL_TRACE_ROOT", str(tmp_path))
    with on_path():
        import uploads
    uploads.offered.clear()
    try:
        assert "a_made.json: kineto trace, 3 events" in shown(opened("trace", open="a_made.json"))
        test = opened("trace", open=str(tmp_path / "a_made.json"))
        assert not any(str(tmp_path) in name for name in test.multiselect(key="open").value)
    finally:
        uploads.offered.clear()


def test_so_many_read_at_a_time_and_others_wait(uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_READS", threading.BoundedSemaphore(1))
    said = threading.Event()
    box = SimpleNamespace(info=lambda words: said.set())
    order = []

    def wait() -> None:
        with uploads._turn(box):
            order.append("second")

    with uploads._turn(box):
        other = threading.Thread(target=wait)
        other.start()
        assert said.wait(5)
        order.append("first")
    other.join(5)
    assert order == ["first", "second"]


def test_a_defect_of_a_reader_tells_its_kind_alone(uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    test = opened("trace")

    def defective(*_: object, **__: object) -> None:
        raise RuntimeError("/srv/secret")

    monkeypatch.setattr(sys.modules["uploads"], "read_trace", defective)
    uploaded(test, "a_made.json", document(KERNEL))
    assert "RuntimeError" in shown(test)
    assert "secret" not in shown(test)
