"""What may be judged: captures that come with the project, captures and saved baselines that users bring, open traces.

What is brought stays in its session, as what it says; its files are gone when it was read.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import frame
import loading
import streamlit as st
import uploads

from perfmodel import regression
from perfmodel.errors import InputError
from perfmodel.plausible import Finding, check_capture
from perfmodel.regression import Evidence
from perfmodel.regression.saved.stored import is_baseline
from perfmodel.trace import Trace

UPLOADED, TRACE = "uploaded: ", "trace: "


@dataclass(frozen=True)
class Side:
    """What may be a baseline or a candidate, with the digest of its content.

    `findings` are those of an uploaded capture's folder, null for all else: what ships has its folder still, and saved
    baselines and traces are nothing that a machine is judged by alone.
    """

    digest: str
    evidence: Evidence
    findings: list[Finding] | None = None


def sides() -> dict[str, Side]:
    """The captures and saved baselines that may be compared, by name: what ships, then what this session brought."""
    return _shipped() | brought()


def machines() -> dict[str, Side]:
    """The captures, by which a machine may be judged without a baseline."""
    return _shipped() | {name: one for name, one in brought().items() if one.findings is not None}


def _shipped() -> dict[str, Side]:
    return {name: Side(f"shipped-{name}", one) for name, one in loading.sides().items()}


def brought() -> dict[str, Side]:
    """The captures and saved baselines that this session has open."""
    found: dict[str, Side] = st.session_state.setdefault("captures", {})
    return found


def traces() -> dict[str, uploads.Loaded]:
    """The traces that this session has open, which may be sides too."""
    found: dict[str, uploads.Loaded] = {}
    for one in uploads.loaded():
        name = f"{TRACE}{one.name}"
        found[f"{name} ({one.digest[:6]})" if name in found else name] = one
    return found


@st.cache_resource(scope="session", max_entries=uploads.MAX_OPEN, show_spinner="Finding the steps of the trace")
def _of_trace(digest: str, _trace: Trace, name: str) -> Evidence:
    """A trace as one side."""
    with uploads.guarded():
        return regression.of_trace(_trace, name)


def chosen(name: str) -> Side:
    """What was chosen as a side; raises InputError for a trace that cannot be one."""
    one = traces().get(name)
    return sides()[name] if one is None else Side(one.digest, _of_trace(one.digest, one.analysis.trace, one.name))


def folder(name: str, side: Side) -> str:
    """A side as it is called on the command line."""
    return f"traces/{name}" if name in loading.sides() else side.evidence.name


def bring() -> None:
    """Boxes to upload captures and saved baselines as a folder or packed, and what they gave; shows why one could not
    be read."""
    n_before = st.session_state.setdefault("n_captures", 0)
    suffix = f"-{n_before}" if n_before else ""  # a box of another key is empty
    whole = st.file_uploader(
        "The folder of a capture or baseline", key=f"capture-folder{suffix}", accept_multiple_files="directory"
    )
    packed = st.file_uploader("Or packed as .zip", key=f"capture-zip{suffix}", accept_multiple_files=True)
    st.caption(
        "What `perfmodel collect` made, or a baseline that `perfmodel baseline save` keeps; choose it afterwards. It "
        "stays in this session: a copied link does not hold it. Traces that the view Trace has open may be chosen too."
    )
    if whole or packed:
        refused = [_take(files) for files in (list(whole or ()), *([one] for one in packed or ())) if files]
        st.session_state["refused captures"] = [why for why in refused if why]
        uploads.let_go([*(whole or ()), *(packed or ())])
        st.session_state["n_captures"] += 1
        st.rerun()
    for why in st.session_state.get("refused captures", ()):
        frame.refused("This cannot be read as a capture:", why)
    for name, one in brought().items():
        with st.container(horizontal=True, vertical_alignment="center"):
            if st.button("Remove", key=f"remove-{one.digest}", icon=":material/close:"):
                del brought()[name]
                st.rerun()
            frame.literal(name.removeprefix(UPLOADED))
    # A box that closes while the browser still sends a file loses it without a word.
    if not brought():
        st.caption("Leave this open until it says what was read.")


def _take(files: list[Any]) -> str | None:
    """Read uploaded captures into this session; returns why they cannot be, null where they could."""
    digest = hashlib.sha256(b"".join(file.name.encode() + file.getvalue() for file in files)).hexdigest()
    if any(known.digest.startswith(digest) for known in brought().values()):
        return None
    try:
        if len(brought()) >= uploads.MAX_OPEN:
            raise InputError(f"{uploads.MAX_OPEN} captures are open, the most of one session; remove one first")
        with st.spinner("Reading the capture"), uploads.saved(files) as place:
            for i, one in enumerate(_read(place, digest)):
                name = f"{UPLOADED}{one.evidence.name}"
                name += f" ({digest[:6]}{f'-{i}' if i else ''})" if name in brought() else ""
                brought()[name] = one
    except InputError as error:
        return str(error)
    return None


def _read(place: Path, digest: str) -> list[Side]:
    """The captures and saved baselines in a folder of what was uploaded."""
    folders = regression.folders_below(place)
    archives = sorted(path for path in place.rglob("*.zip") if path.is_file()) if not folders else []
    for i, archive in enumerate(archives):
        folders += regression.unpack_sides(archive, place / f"unpacked-{i}")
    if not folders:
        raise InputError(
            "found no capture.json of a capture and no baseline.json of a saved baseline; upload the folder with all "
            "its files, or a zip archive of it; traces are opened in the view Trace"
        )
    found = []
    for i, one in enumerate(folders):
        regression.refuse_large(one)
        evidence = regression.evidence(one)
        found.append(Side(f"{digest}-{i}", evidence, None if is_baseline(one) else check_capture(one)))
    return found
