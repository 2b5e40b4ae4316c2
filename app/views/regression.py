"""Regression: a candidate against a baseline, and against the model."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frame
import link
import loading
import polars as pl
import streamlit as st
import uploads

from perfmodel import figures, regression, report
from perfmodel.capture import Capture, fingerprint_differences, load_capture
from perfmodel.capture_lines import MANIFEST
from perfmodel.errors import InputError, NotComparableError
from perfmodel.latency import LatencyModel, shipped_models
from perfmodel.regression import Comparison

OWN, NO_MODEL = "the baseline's own", "none"
OPENS_WITH = "epyc-zen5-2c-fp32", "epyc-zen4-2c-fp32"  # a newer machine as baseline, an older one to be judged
OPENS_WITH_AXES = ["machine", "software"]
UPLOADED = "uploaded: "


def brought() -> dict[str, tuple[str, Capture]]:
    """The captures that this session has open, by name, each with the digest of its content."""
    found: dict[str, tuple[str, Capture]] = st.session_state.setdefault("captures", {})
    return found


def bring() -> None:
    """Boxes to upload captures as a folder or packed; shows why one could not be read."""
    folder = st.file_uploader("A capture folder", key="capture-folder", accept_multiple_files="directory")
    packed = st.file_uploader("Or captures packed as .zip", key="capture-zip", accept_multiple_files=True)
    st.caption(
        "What `perfmodel collect` made; choose it as baseline or candidate afterwards. It stays in this session: "
        "a copied link does not hold it."
    )
    for files in (list(folder or ()), *([one] for one in packed or ())):
        digest = hashlib.sha256(b"".join(file.name.encode() + file.getvalue() for file in files)).hexdigest()
        if not files or any(known.startswith(digest) for known, _ in brought().values()):
            continue
        try:
            if len(brought()) >= uploads.MAX_OPEN:
                raise InputError(
                    f"{uploads.MAX_OPEN} captures are open, the most of one session; reload the page to begin anew"
                )
            with st.spinner("Reading the capture"), uploads.saved(files) as place:
                for capture in read(place):
                    name = f"{UPLOADED}{capture.name}"
                    name += f" ({digest[:6]})" if name in brought() else ""
                    brought()[name] = (f"{digest}-{capture.digest}", capture)
        except InputError as error:
            frame.refused("This cannot be read as a capture:", error)
    # A box that closes while the browser still sends a file loses it without a word.
    if brought():
        frame.literal("\n".join(["Read:", *(name.removeprefix(UPLOADED) for name in brought())]))
    else:
        st.caption("Leave this open until it says what was read.")


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
    digests: tuple[str, str], margin_frac: float, axes: tuple[str, ...], model: str, _sides: tuple[Capture, Capture]
) -> Comparison:
    """The comparison that the controls ask for."""
    used = None
    with uploads.guarded():
        if model == OWN:
            try:
                used = own_model(digests[0], _sides[0])
            except InputError:
                used = None  # then the comparison says why there is none
        elif model != NO_MODEL:
            used = loading.models()[model]
        a, b = (regression.of_capture(side) for side in _sides)
        return regression.compare(a, b, margin_frac, axes, used, with_model=model != NO_MODEL)


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
    if found.no_model and found.model is None:
        frame.literal(f"The second question stays open: {found.no_model}")


def changed(found: Comparison) -> None:
    """What differs between the sides, and which calibrated rate moved."""
    st.header("What changed", anchor=False)
    rates = [report.quantity_cells(moved) for moved in found.quantities if moved.moved is not None]
    frame.words_table(report.QUANTITY_HEADER, rates, "Calibrated rates and overheads of both sides")
    facts = [
        [change.key, str(change.baseline), str(change.candidate), "declared" if change.is_declared else ""]
        for change in found.changes
    ]
    if facts:
        frame.words_table(("fact", "baseline", "candidate", "axis"), facts, "Facts in which the captures differ")
    else:
        st.caption("Machine, software, kernel and settings are the same.")


frame.header("Regression", "Is this machine, driver or build as fast as it was, and as it should be?")
first, second, third, fourth, fifth, sixth = st.columns([2.5, 2.5, 1.3, 3.3, 2.3, 1.6], vertical_alignment="bottom")
with sixth.popover("Upload", icon=":material/upload:", help="Bring captures of your own", width="stretch"):
    bring()
shipped = {name: (f"shipped-{name}", capture) for name, (capture, _) in loading.shipped().items()}
captures = shipped | brought()
names = list(captures)
opens = [names.index(name) if name in names else 0 for name in OPENS_WITH]
chosen: dict[str, Any] = {"bind": "query-params", "on_change": declare, "args": ([],)}  # none yet of another pair
baseline = first.selectbox("Baseline", names, opens[0], key="baseline", **chosen)
candidate = second.selectbox("Candidate", names, opens[1], key="candidate", **chosen)
margin = third.number_input("Margin, %", 0.1, 100.0, 3.0, 0.5, key="margin", bind="query-params")
if "axes" not in st.session_state and not {"baseline", "candidate", "axes"} & set(st.query_params):
    declare(OPENS_WITH_AXES)
axes = fourth.multiselect(
    "May differ",
    regression.AXES,
    key="axes",
    bind="query-params",
    help="Declared axes of change: what you mean to test. Captures that differ in anything else are not compared.",
)
model = fifth.selectbox("Model", [OWN, NO_MODEL, *shipped_models()], key="model", bind="query-params")
digests = captures[baseline][0], captures[candidate][0]
sides = captures[baseline][1], captures[candidate][1]
try:
    result = compared(digests, margin / 100, tuple(axes), model, sides)
except NotComparableError as error:
    frame.refused("These captures are not compared:", error)
    differing = sorted({key.partition(".")[0] for key in fingerprint_differences(*sides)} - set(axes))
    if set(sides[0].observations["workload"]).isdisjoint(sides[1].observations["workload"]):
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
folders = [f"traces/{name}" if name in shipped else captures[name][1].name for name in (baseline, candidate)]
options = [word for axis in axes for word in ("--axis", axis)]
options += [] if model == OWN else ["--model", model]
frame.computed(["perfmodel", "check", *folders, "--margin", f"{margin:g}%", *options], report.check_page(result))
failures = regression.DEFAULT_FAILURES
reports: dict[str, Callable[[], str]] = {
    "junit.xml": lambda: report.check_junit(result, failures),
    "md": lambda: report.check_markdown(result, failures),
    "json": lambda: json.dumps(result.to_json(), indent=2),
    "csv": table.write_csv,
    "html": lambda: figures.html_page(
        f"{result.candidate} against {result.baseline}", report.check_page(result), figures.check_figures(result)
    ),
}
frame.downloads("check", **reports)
