"""Files that users bring: traces and captures they upload, or open from a folder that the server allows.

What is uploaded stays in its session: written only to a folder that nobody else can read and that is gone when it was
read, while the session holds what it says. Reading is bounded (`readers.limits`), and few read at a time.
"""

import hashlib
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import frame
import loading
import polars as pl
import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from perfmodel import text
from perfmodel.analysis import Analysis, analyse
from perfmodel.capture import shipped_captures
from perfmodel.ep_capture import shipped_ep_captures
from perfmodel.errors import InputError
from perfmodel.ranks import RankSummary, summarise_ranks
from perfmodel.readers import read_trace
from perfmodel.readers.limits import limits_from, n_reads_from

LIMITS = limits_from(os.environ)
MAX_OPEN = 8  # traces that one session may have uploaded; each is in memory with its tables
ROOT_VARIABLE = "PERFMODEL_TRACE_ROOT"
_MAX_OFFERED = 1000
_MAX_PARTS, _MAX_NAME_BYTES = 8, 100
_PROGRESS_S = 0.2
_PARQUET = b"PAR1"  # at the start and at the end; readers skip a byte order mark and blanks before it
_TRACE_NAME = re.compile(r".+\.(?:json|sqlite)(?:\.(?:gz|zip|zst|bz2|xz))?", re.IGNORECASE)
_READS = threading.BoundedSemaphore(n_reads_from(os.environ))


@dataclass(frozen=True)
class Loaded:
    """A trace that this session has open: the name its user knows, the digest of its content, what it says.

    `ranks` compares the ranks where it came as a folder of them, else null. An example ships with the project, and its
    name is its path in a checkout.
    """

    name: str
    digest: str
    analysis: Analysis
    ranks: RankSummary | None = None
    is_example: bool = False


@contextmanager
def saved(files: Sequence[Any], names: Sequence[str] | None = None) -> Iterator[Path]:
    """A private folder with uploaded files under their own names, or `names`, removed on leaving.

    What no path may have in it is left out of names. An InputError that leaves the block says the names that users
    know, not where the server keeps the files, and every other error is one (see `guarded`). Raises InputError for
    Parquet: damaged files can end the process.
    """
    with tempfile.TemporaryDirectory(prefix="perfmodel-") as folder, _hidden(Path(folder)), guarded():
        for i, file in enumerate(files):
            path = Path(folder).joinpath(*_parts(str(names[i] if names else file.name)) or [f"file-{i}"])
            if path.exists() or any(parent.is_file() for parent in path.parents):
                path = Path(folder) / f"{i}-{path.name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = file.getbuffer()
            begin = bytes(content[:64]).removeprefix(b"\xef\xbb\xbf").lstrip()
            if begin.startswith(_PARQUET) or content[-len(_PARQUET) :] == _PARQUET:
                raise InputError(
                    f"{path.name}: a Parquet file, which is not read from uploads; bring another format, or use the "
                    "command line on your own machine"
                )
            path.write_bytes(content)
        yield Path(folder)


@contextmanager
def saved_file(file: Any, name: str | None = None) -> Iterator[Path]:
    """One uploaded file in a private folder (`saved`), under its own name or `name`."""
    with saved([file], None if name is None else [name]) as folder:
        yield next(path for path in folder.rglob("*") if path.is_file())


def _parts(name: str) -> list[str]:
    """The parts of a relative path that a user gave, without what leads out of a folder or no file system takes."""
    inside = "".join(c if c.isprintable() else "_" for c in name.replace("\\", "/"))
    parts = [part for part in PurePosixPath(inside).parts if part not in ("/", "//", "..", ".")]
    # The end of a name says what is in a file.
    return [part.encode(errors="replace")[-_MAX_NAME_BYTES:].decode(errors="ignore") for part in parts[-_MAX_PARTS:]]


@contextmanager
def _hidden(folder: Path) -> Iterator[None]:
    """No InputError that leaves the block says where a folder of the server is."""
    try:
        yield
    except InputError as error:
        raise type(error)(str(error).replace(f"{folder}/", "").replace(str(folder), "the folder")) from None


@contextmanager
def guarded() -> Iterator[None]:
    """What files break where nobody foresaw it is an InputError that tells its kind; the server's log has all of it.

    It goes around what is computed of uploads: words of libraries might tell of the server.
    """
    try:
        yield
    except InputError:
        raise
    except (Exception, pl.exceptions.PanicException) as error:
        logging.getLogger(__name__).exception("what a user brought failed")
        raise InputError(f"this failed ({type(error).__name__}), which is damage that nobody foresaw") from None


def loaded() -> list[Loaded]:
    """The traces that this session has open, in the order in which they came."""
    return [*_uploaded(), *st.session_state.get("opened", {}).values()]


def choose(key: str) -> list[Loaded]:
    """Boxes to upload traces or open those of the server; returns all that this session has open.

    Until something else is open, that is an example. Shows why a trace could not be read.
    """
    at_server, from_user = st.columns(2)
    n_before = st.session_state.setdefault("n_uploads", 0)
    suffix = f"-{n_before}" if n_before else ""  # a box of another key is empty, and closed
    with from_user, st.popover("Upload traces", icon=":material/upload:", width="stretch", key=f"upload{suffix}"):
        _upload(key, suffix)
    with at_server:
        _open(offered())
    for one in _uploaded():
        with st.container(horizontal=True, vertical_alignment="center"):
            if st.button("Remove", key=f"remove-{one.digest[:16]}", icon=":material/close:"):
                _uploaded().remove(one)
                st.rerun()
            frame.literal(one.name)
    for name, why in st.session_state.get("refused", ()):
        frame.refused("This cannot be read as a trace:", why if name in why else f"{name}: {why}")
    return loaded()


def _uploaded() -> list[Loaded]:
    found: list[Loaded] = st.session_state.setdefault("uploaded", [])
    return found


def _upload(key: str, suffix: str) -> None:
    """The boxes for files and for a folder of ranks; what was read leaves them, and the server's memory."""
    files = st.file_uploader(
        "PyTorch profiler .json or Nsight Systems .sqlite, plain or packed (gzip, zip, Zstandard, bzip2, xz)",
        key=f"{key}{suffix}",
        accept_multiple_files=True,
        help="For files above the limit use the command line: perfmodel analyze TRACE",
    )
    ranks = st.file_uploader(
        "A folder with one trace for each rank, which are read as one",
        key=f"{key}-ranks{suffix}",
        accept_multiple_files="directory",
    )
    if not files and not ranks:
        return
    st.session_state["refused"] = refused = []
    traces = [("/".join(_parts(str(file.name))) or "unnamed", [file], False) for file in files]
    if ranks:
        traces.append((next(iter(_parts(str(ranks[0].name))), "unnamed"), ranks, True))
    for name, group, is_folder in traces:
        try:
            _add(name, group, is_folder)
        except InputError as error:
            refused.append((name, str(error)))
    let_go((*files, *ranks))
    st.session_state["n_uploads"] += 1
    if _uploaded():
        st.session_state["open"] = [name for name in st.session_state.get("open", ()) if not _is_example(name)]
    st.rerun()


def let_go(files: Sequence[Any]) -> None:
    """Free the server's memory of uploaded files that were read; their box needs another key afterwards."""
    context = get_script_run_ctx()
    if context is not None:
        manager: Any = context.uploaded_file_mgr
        for file in files:
            manager.remove_file(context.session_id, file.file_id)


def _add(name: str, files: Sequence[Any], is_folder: bool) -> None:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.getbuffer()).digest())
        digest.update(str(file.name).encode(errors="replace") if is_folder else b"")
    if any(one.digest == digest.hexdigest() for one in _uploaded()):
        return
    if len(_uploaded()) >= MAX_OPEN:
        raise InputError(f"{text.count(MAX_OPEN)} traces are open, the most of one session; remove one first")
    with saved(files) if is_folder else saved_file(files[0]) as path:
        analysis, ranks = _read(path, name)
    _uploaded().append(Loaded(name, digest.hexdigest(), analysis, ranks))


def _read(path: Path, name: str) -> tuple[Analysis, RankSummary | None]:
    """What a trace says, and how its ranks compare where it is a folder of them; shows how far reading is.

    Raises InputError, for defects of readers too: what they say might tell of the server.
    """
    box = st.empty()
    with _turn(box), guarded():
        bar = box.progress(0.0, text="Reading")
        limits = replace(LIMITS, progress=_shown_on(bar))
        try:
            if not path.is_dir():
                trace, ranks = read_trace(path, limits=limits), None
            else:
                with tempfile.TemporaryDirectory(prefix="perfmodel-") as parts:  # what is read once is compared too
                    trace = read_trace(path, parts, limits)
                    ranks = replace(summarise_ranks(path, parts, "sequential"), folder=name)
                trace = replace(trace, meta={**trace.meta, "folder": name})
            bar.progress(1.0, text="Analysing")
            return analyse(trace), ranks
        finally:
            box.empty()


@contextmanager
def _turn(box: Any) -> Iterator[None]:
    """Few traces are read at a time, so that many sessions do not take many times the memory."""
    while not _READS.acquire(timeout=_PROGRESS_S):
        box.info("Waiting: others are reading traces on this server.")  # a session that has ended stops here
    try:
        yield
    finally:
        _READS.release()


def _shown_on(bar: Any) -> Callable[[int, int], None]:
    """A function that shows how much of a file was read, not too often."""
    last = 0.0

    def show(n_bytes: int, size_bytes: int) -> None:
        nonlocal last
        if time.monotonic() - last > _PROGRESS_S:
            last = time.monotonic()
            part = min(n_bytes / max(size_bytes, 1), 1.0)
            bar.progress(part, text=f"Reading: {text.n_bytes(n_bytes)} of {text.n_bytes(size_bytes)}")

    return show


@st.cache_data(ttl=60, show_spinner=False)
def offered() -> dict[str, Path]:
    """What the server offers to open, files and folders of ranks, by name: its trace folder's first, then examples."""
    found = {}
    if root := os.environ.get(ROOT_VARIABLE):
        found = {str(path.relative_to(root)): path for path in _traces_below(Path(root))}
    for capture in (*shipped_ep_captures(), *shipped_captures()):  # ranks of a MoE layer have more to show
        for path in sorted((capture / "profiles").glob("*")):
            found[f"traces/{capture.name}/profiles/{path.name}"] = path
    return found


def _traces_below(root: Path) -> list[Path]:
    """Traces and folders of several in a folder of the server; nothing that links lead out of it to."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        here = [Path(folder) / name for name in sorted(names) if _TRACE_NAME.fullmatch(name)]
        files = [path for path in here if path.is_file() and _is_inside(path, root)]
        is_ranks = len(files) > 1 and files == here and folder != str(root) and _is_inside(Path(folder), root)
        found += [*([Path(folder)] if is_ranks else ()), *files]
        if len(found) > _MAX_OFFERED:
            break
    return found[:_MAX_OFFERED]


def _is_inside(path: Path, root: Path) -> bool:
    """Whether neither a path nor what lies in that folder is a link that leads out of another folder."""
    inside = [path, *(path.iterdir() if path.is_dir() else ())]
    return all(one.resolve().is_relative_to(root.resolve()) for one in inside)


def _said(name: str) -> str:
    """What an offer is called: an example by its workload, all others by their path."""
    words = name.removeprefix("traces/").replace("/profiles/", ": ").removesuffix(".trace.json.gz")
    return loading.example_words().get(name, words) if _is_example(name) else name


def _is_example(name: str) -> bool:
    return offered().get(name, Path()).parent.parent in (*shipped_ep_captures(), *shipped_captures())


def _open(offers: dict[str, Path]) -> None:
    """The box of what the server offers; what is chosen there stands in the link."""
    opened: dict[str, Loaded] = st.session_state.setdefault("opened", {})
    if "open" not in st.session_state and "open" not in st.query_params:  # a view's first run, not from a link
        first = [name for name in offers if _is_example(name)][:1]
        st.session_state["open"] = [name for name in st.session_state.get("was_open", first) if name in offers]
    chosen = st.multiselect(
        "Open traces of this server",
        list(offers),
        key="open",
        bind="query-params",
        max_selections=MAX_OPEN,
        label_visibility="collapsed",
        placeholder="Open examples and traces of this server",
        format_func=_said,
    )
    st.session_state["was_open"] = chosen
    for name in set(opened) - set(chosen):
        del opened[name]
    for name in chosen:
        if name not in opened:
            try:
                if _is_example(name):
                    opened[name] = _example(name, offers[name])
                elif _is_inside(offers[name], Path(os.environ[ROOT_VARIABLE])):  # still, for the list is a minute old
                    opened[name] = _of_server(name, offers[name])
                else:
                    raise InputError(f"{name} leads out of the folder of traces")
            except InputError as error:
                frame.refused("This cannot be read as a trace:", error)


@st.cache_resource(max_entries=64, show_spinner=False)
def _example(name: str, _path: Path) -> Loaded:
    return replace(_of_server(name, _path), is_example=True)


def _of_server(name: str, path: Path) -> Loaded:
    digest = hashlib.sha256()
    with _hidden(path.parent), guarded():
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file():  # a pipe would never end
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        return Loaded(name, digest.hexdigest(), *_read(path, name))
