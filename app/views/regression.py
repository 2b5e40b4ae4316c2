"""Regression: a candidate against a baseline, and against the model."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frame
import link
import loading
import polars as pl
import streamlit as st
import uploads

from perfmodel import figures, hardware, regression, report
from perfmodel.capture import Capture, load_capture
from perfmodel.capture_lines import MANIFEST
from perfmodel.errors import InputError, NotComparableError
from perfmodel.latency import LatencyModel, shipped_models
from perfmodel.regression import Comparison, Evidence
from perfmodel.trace import Trace

OWN, NO_MODEL = "the baseline's own", "none"
OF_ITS_GPU = "its GPU's, where known"
OPENS_WITH = "epyc-zen5-2c-fp32", "epyc-zen4-2c-fp32"  # a newer machine as baseline, an older one to be judged
OPENS_WITH_AXES = ["machine", "software"]
UPLOADED, TRACE = "uploaded: ", "trace: "
Sides = dict[str, tuple[str, Evidence]]  # by name, each with the digest of its content


def sides() -> Sides:
    """All that may be a baseline or a candidate: what comes with the project, then what this session has open."""
    return {name: (f"shipped-{name}", one) for name, one in loading.sides().items()} | brought()


def brought() -> Sides:
    """The captures that this session has open."""
    found: Sides = st.session_state.setdefault("captures", {})
    return found


def traces() -> dict[str, uploads.Loaded]:
    """The traces that this session has open, which may be sides too."""
    found: dict[str, uploads.Loaded] = {}
    for one in uploads.loaded():
        name = f"{TRACE}{one.name}"
        found[f"{name} ({one.digest[:6]})" if name in found else name] = one
    return found


@st.cache_resource(scope="session", max_entries=uploads.MAX_OPEN, show_spinner="Finding the steps of the trace")
def of_trace(digest: str, _trace: Trace, name: str) -> Evidence:
    """A trace as one side."""
    with uploads.guarded():
        return regression.of_trace(_trace, name)


def chosen_side(name: str) -> tuple[str, Evidence]:
    """What was chosen as a side, with the digest of its content."""
    one = traces().get(name)
    return sides()[name] if one is None else (one.digest, of_trace(one.digest, one.analysis.trace, one.name))


def bring() -> None:
    """Boxes to upload captures as a folder or packed, and what they gave; shows why one could not be read."""
    n_before = st.session_state.setdefault("n_captures", 0)
    suffix = f"-{n_before}" if n_before else ""  # a box of another key is empty
    folder = st.file_uploader("A capture folder", key=f"capture-folder{suffix}", accept_multiple_files="directory")
    packed = st.file_uploader("Or captures packed as .zip", key=f"capture-zip{suffix}", accept_multiple_files=True)
    st.caption(
        "What `perfmodel collect` made; choose it as baseline or candidate afterwards. It stays in this session: "
        "a copied link does not hold it. Traces that the view Trace has open may be chosen too."
    )
    if folder or packed:
        refused = [take(files) for files in (list(folder or ()), *([one] for one in packed or ())) if files]
        st.session_state["refused captures"] = [why for why in refused if why]
        uploads.let_go([*(folder or ()), *(packed or ())])
        st.session_state["n_captures"] += 1
        st.rerun()
    for why in st.session_state.get("refused captures", ()):
        frame.refused("This cannot be read as a capture:", why)
    for name, (digest, _) in brought().items():
        with st.container(horizontal=True, vertical_alignment="center"):
            if st.button("Remove", key=f"remove-{digest}", icon=":material/close:"):
                del brought()[name]
                st.rerun()
            frame.literal(name.removeprefix(UPLOADED))
    # A box that closes while the browser still sends a file loses it without a word.
    if not brought():
        st.caption("Leave this open until it says what was read.")


def take(files: list[Any]) -> str | None:
    """Read uploaded captures into this session; returns why they cannot be, null where they could."""
    digest = hashlib.sha256(b"".join(file.name.encode() + file.getvalue() for file in files)).hexdigest()
    if any(known.startswith(digest) for known, _ in brought().values()):
        return None
    try:
        if len(brought()) >= uploads.MAX_OPEN:
            raise InputError(f"{uploads.MAX_OPEN} captures are open, the most of one session; remove one first")
        with st.spinner("Reading the capture"), uploads.saved(files) as place:
            for capture in read(place):
                name = f"{UPLOADED}{capture.name}"
                name += f" ({digest[:6]})" if name in brought() else ""
                brought()[name] = (f"{digest}-{capture.digest}", regression.of_capture(capture))
    except InputError as error:
        return str(error)
    return None


def read(place: Path) -> list[Capture]:
    """The captures in a folder of what was uploaded."""
    folders = [file.parent for file in sorted(place.rglob(MANIFEST))]
    archives = sorted(path for path in place.rglob("*.zip") if path.is_file()) if not folders else []
    for i, archive in enumerate(archives):
        folders += regression.unpack_captures(archive, place / f"unpacked-{i}")
    if not folders:
        raise InputError(f"found no {MANIFEST}; upload the capture folder with all its files, or a zip archive of it")
    for folder in folders:
        regression.refuse_large(folder)
    return [load_capture(folder) for folder in folders]


@st.cache_resource(scope="session", max_entries=8, show_spinner="Fitting a model to the baseline")
def own_model(digest: str, _capture: Capture) -> LatencyModel:
    """The model of a baseline, fitted once a session where none is shipped."""
    with uploads.guarded():
        return regression.model_for(_capture)


@st.cache_data(scope="session", max_entries=32, show_spinner="Comparing")
def compared(
    digests: tuple[str, str],
    margin_frac: float,
    axes: tuple[str, ...],
    model: str,
    ceilings: str,
    _sides: tuple[Evidence, Evidence],
) -> Comparison:
    """The comparison that the controls ask for."""
    used, capture = None, _sides[0].capture
    with uploads.guarded():
        if model == OWN and capture is not None:
            try:
                used = own_model(digests[0], capture)
            except InputError:
                used = None  # then the comparison says why there is none
        elif model not in (OWN, NO_MODEL):
            used = loading.models()[model]
        nominal = None if ceilings == OF_ITS_GPU else hardware.hardware(ceilings)
        return regression.compare(*_sides, margin_frac, axes, used, nominal, with_model=model != NO_MODEL)


def declare(axes: list[str]) -> None:
    """Take over what differs as declared."""
    st.session_state["axes"] = axes


def verdict(found: Comparison) -> None:
    """Both answers: in words, in numbers, and workload by workload."""
    kind, words = report.conclusion(found)
    boxes = {"bad": st.error, "mixed": st.warning, "open": st.info, "good": st.success}
    boxes[kind](words)  # sentences of the project, no name from a file in them
    overall = found.overall
    answers = {
        "Time against the baseline": f"{overall.verdict.ratio:.2f}x",
        "Model expects": None if overall.expected_ratio is None else f"{overall.expected_ratio:.2f}x",
        "Time against the model": None if overall.expectation is None else f"{overall.expectation.ratio:.2f}x",
        **({f"Time against {found.datasheet}": f"{overall.datasheet.ratio:.2f}x"} if overall.datasheet else {}),
        "Workloads compared": f"{len(found.each)}",
    }
    interval = f"90 % interval {overall.verdict.ratio_low:.2f} to {overall.verdict.ratio_high:.2f}"
    frame.numbers(
        answers,
        {
            "Time against the baseline": f"Geometric mean over the workloads; {interval}.",
            "Model expects": "Candidate over baseline, from the calibrated rates of both machines alone.",
            "Time against the model": "Measured over what the model expects of the candidate as it was calibrated.",
        },
    )
    drawn = figures.check_figures(found)
    places = [*st.columns([3, 2][: len(drawn)]), *(st.container() for _ in drawn[2:])]
    for i, (place, (figure, alt)) in enumerate(zip(places, drawn, strict=True)):
        with place:
            frame.chart(figure, alt, key=f"check-{i}")
    for remark in report.remarks(found):
        frame.literal(remark)
    if found.no_model and found.model is None:
        frame.literal(f"The second question stays open: {found.no_model}")


def changed(found: Comparison) -> None:
    """What differs between the sides, and which calibrated rate moved."""
    st.header("What changed", anchor=False)
    for line in report.changed_lines(found):
        frame.literal(line)
    for one in report.changed_tables(found):
        frame.literal(one.title)
        frame.words_table(one.head, one.rows, one.title)
    if not found.changes:
        st.caption("Machine, software, kernel and settings are the same.")


frame.header("Regression", "Is this machine, driver or build as fast as it was, and as it should be?")
first, second, third, fourth, fifth = st.columns([3, 3, 3, 1.8, 1.8], vertical_alignment="bottom")
with fifth.popover("Upload", icon=":material/upload:", help="Bring captures of your own", width="stretch"):
    bring()
names = [*sides(), *traces()]
opens = [names.index(name) if name in names else 0 for name in OPENS_WITH]
chosen: dict[str, Any] = {"bind": "query-params", "on_change": declare, "args": ([],)}  # none yet of another pair
baseline = first.selectbox("Baseline", names, opens[0], key="baseline", **chosen)
candidate = second.selectbox("Candidate", names, opens[1], key="candidate", **chosen)
if "axes" not in st.session_state and not {"baseline", "candidate", "axes"} & set(st.query_params):
    declare(OPENS_WITH_AXES)
axes = third.multiselect(
    "May differ",
    list(dict.fromkeys((*regression.AXES, *regression.AXIS_WORDS))),
    key="axes",
    bind="query-params",
    help="Declared axes of change: what you mean to test. Sides that differ in anything else are not compared.",
)
with fourth.popover("Judge by", icon=":material/tune:", help="Margin, model and ceilings", width="stretch"):
    margin = st.number_input("Margin, %", 0.1, 100.0, 3.0, 0.5, key="margin", bind="query-params")
    model = st.selectbox("Model", [OWN, NO_MODEL, *shipped_models()], key="model", bind="query-params")
    ceilings = st.selectbox(
        "Datasheet",
        [OF_ITS_GPU, *hardware.names()],
        key="datasheet",
        bind="query-params",
        help="Whose nominal ceilings the model is asked about too.",
    )
try:
    one, other = chosen_side(baseline), chosen_side(candidate)
except InputError as error:
    frame.refused("This cannot be compared:", error)
    link.end()
digests, pair = (one[0], other[0]), (one[1], other[1])
try:
    result = compared(digests, margin / 100, tuple(axes), model, ceilings, pair)
except NotComparableError as error:
    frame.refused("These two are not compared:", error)
    differing = sorted({key.partition(".")[0] for key in regression.differences(*pair)} - set(axes))
    if pair[0].kind != pair[1].kind:
        frame.literal("Captures are compared with captures, and traces with traces: choose another pair.")
    elif pair[0].workloads.keys().isdisjoint(pair[1].workloads):
        frame.literal("No workload was measured in both, so that there is nothing to compare: choose another pair.")
    elif differing:
        frame.literal(f"They differ in {' and '.join(differing)}. If that is what you mean to test, declare it.")
        st.button("Declare what differs", on_click=declare, args=([*axes, *differing],), type="primary")
    link.end()
except InputError as error:
    frame.refused("This cannot be judged:", error)
    link.end()
verdict(result)
table = result.table()
cell = st.pills("Workloads", regression.CELLS, key="cell", bind="query-params")
shown = table if cell is None else table.filter(pl.col("cell") == cell)
frame.rows(
    shown.drop("against_model", "n_more_runs").with_columns(pl.col(pl.Float64).round(3)),
    "Workloads, slowest against the baseline first",
    height=260,
)
changed(result)
shipped = loading.sides()
folders = [
    f"traces/{name}" if name in shipped else one.name for name, one in zip((baseline, candidate), pair, strict=True)
]
options = [word for axis in axes for word in ("--axis", axis)]
options += [] if model == OWN else ["--model", model]
options += [] if ceilings == OF_ITS_GPU else ["--hardware", ceilings]
frame.computed(["perfmodel", "check", *folders, "--margin", f"{margin:g}%", *options], report.check_page(result))
failures = regression.DEFAULT_FAILURES
reports: dict[str, Callable[[], str]] = {
    "junit.xml": lambda: report.check_junit(result, failures),
    "md": lambda: report.check_markdown(result, failures),
    "json": lambda: report.check_json(result, failures),
    "csv": table.write_csv,
    "html": lambda: figures.html_page(
        f"{result.candidate} against {result.baseline}", report.check_page(result), figures.check_figures(result)
    ),
}
frame.downloads("check", **reports)
