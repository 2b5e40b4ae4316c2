"""Files that users bring: traces and captures they upload, or open from a folder that the server allows.

What is uploaded stays in its session: cached under the digest of its content, written only to a folder that nobody else
can read and that is gone when it was read.
"""

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import frame
import streamlit as st

from perfmodel.analysis import Analysis, analyse
from perfmodel.errors import InputError
from perfmodel.readers import read_trace


@dataclass(frozen=True)
class Loaded:
    """A trace that this session has open: the name its user knows, the digest of its content, what it says."""

    name: str
    digest: str
    analysis: Analysis


@contextmanager
def saved(files: Sequence[Any]) -> Iterator[Path]:
    """A private folder with uploaded files under their own names, removed on leaving.

    An InputError that leaves the block says the names that users know, not where the server keeps the files.
    """
    with tempfile.TemporaryDirectory(prefix="perfmodel-") as folder:
        for i, file in enumerate(files):
            inside = PurePosixPath(str(file.name).replace("\\", "/"))
            parts = [part for part in inside.parts if part not in ("/", "..", ".")] or [f"file-{i}"]
            path = Path(folder).joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
        try:
            yield Path(folder)
        except InputError as error:
            raise type(error)(str(error).replace(f"{folder}/", "").replace(folder, "the upload")) from None


@st.cache_data(scope="session", max_entries=8, show_spinner=False)
def _analysed(digest: str, name: str, _file: Any) -> Analysis:
    with saved([_file]) as folder:
        return analyse(read_trace(next(path for path in folder.rglob("*") if path.is_file())))


def loaded() -> list[Loaded]:
    """The traces that this session has open, in the order in which they came."""
    found: list[Loaded] = st.session_state.setdefault("traces", [])
    return found


def choose(key: str) -> list[Loaded]:
    """A box to upload traces; returns all that this session has open, and shows why one could not be read."""
    for file in st.file_uploader(
        "Upload traces: PyTorch profiler .json or Nsight Systems .sqlite, plain or packed (gzip, zip, Zstandard)",
        key=key,
        accept_multiple_files=True,
        help="For files above the limit use the command line: perfmodel analyze TRACE",
    ):
        digest = hashlib.sha256(file.getvalue()).hexdigest()
        if any(one.digest == digest for one in loaded()):
            continue
        try:
            with st.spinner("Reading the trace"):
                loaded().append(Loaded(file.name, digest, _analysed(digest, file.name, file)))
        except InputError as error:
            frame.refused("This file cannot be read as a trace:", error)
    return loaded()
