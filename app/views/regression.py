"""Regression: a candidate against a baseline and against the model, or one machine alone."""

import json
import re
from collections.abc import Callable
from typing import Any

import frame
import link
import loading
import polars as pl
import sides
import streamlit as st
import uploads

from perfmodel import figures, hardware, regression, report
from perfmodel.capture import Capture
from perfmodel.errors import InputError, NotComparableError
from perfmodel.latency import LatencyModel, shipped_models
from perfmodel.plausible.summary import machine_words
from perfmodel.regression import Comparison, NewMachine

AGAINST, ALONE = "Against a baseline", "One machine alone"
OWN, NO_MODEL, MOST_ALIKE = "the baseline's own", "none", "the one most alike"
OF_ITS_GPU = "its GPU's, where known"
OPENS_WITH = "epyc-zen5-2c-fp32", "epyc-zen4-2c-fp32"  # a newer machine as baseline, an older one to be judged
OPENS_WITH_AXES = ["machine", "software"]
KEPT = ("baseline", "candidate", "axes", "margin", "model", "datasheet", "cell", "capture", "judge", "nominal")
N_LOW = 6  # rows of a table that stand below each other without scrolling
BOXES = {  # of each kind of verdict, with a sign for those who cannot tell colours
    "bad": (st.error, ":material/error:"),
    "mixed": (st.warning, ":material/warning:"),
    "open": (st.info, ":material/help:"),
    "good": (st.success, ":material/check_circle:"),
}


SHOWN = (  # columns of the workloads, those first that a narrow window shows
    *("workload", "verdict", "ratio", "ratio_low", "ratio_high", "expected_ratio", "measured_over_model", "cell"),
    *("baseline_ns", "candidate_ns"),
)


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
    _sides: tuple[sides.Side, sides.Side],
) -> Comparison:
    """The comparison that the controls ask for."""
    baseline, candidate = (one.evidence for one in _sides)
    used, capture = None, baseline.capture
    with uploads.guarded():
        if model == OWN and capture is not None:
            try:
                used = own_model(digests[0], capture)
            except InputError:
                used = None  # then the comparison says why there is none
        elif model not in (OWN, NO_MODEL):
            used = loading.models()[model]
        nominal = None if ceilings == OF_ITS_GPU else hardware.hardware(ceilings)
        return regression.compare(baseline, candidate, margin_frac, axes, used, nominal, with_model=model != NO_MODEL)


@st.cache_data(scope="session", max_entries=16, show_spinner="Judging the machine")
def judged(digest: str, model: str, ceilings: str, _side: sides.Side) -> NewMachine:
    """One machine judged by its capture, as the controls ask."""
    assert _side.evidence.capture is not None
    named = None if model in (MOST_ALIKE, NO_MODEL) else loading.models()[model]
    nominal = None if ceilings == OF_ITS_GPU else hardware.hardware(ceilings)
    with uploads.guarded():
        return regression.new_machine(
            _side.evidence.capture, nominal, named, with_model=model != NO_MODEL, findings=_side.findings
        )


def declare(axes: list[str]) -> None:
    """Take over what differs as declared."""
    st.session_state["axes"] = axes


def judge_by(default: str, model_key: str, ceilings_key: str, *, has_margin: bool) -> tuple[float, str, str]:
    """The box of what a verdict rests on: margin in percent, model, whose nominal ceilings."""
    margin = 3.0
    with st.popover("Judge by", icon=":material/tune:", help="Margin, model and ceilings", width="content"):
        if has_margin:
            margin = st.number_input("Margin, %", 0.1, 100.0, 3.0, 0.5, key="margin", bind="query-params")
        model = st.selectbox("Model", [default, NO_MODEL, *shipped_models()], key=model_key, bind="query-params")
        ceilings = st.selectbox(
            "Datasheet",
            [OF_ITS_GPU, *hardware.names()],
            key=ceilings_key,
            bind="query-params",
            help="Whose nominal ceilings the model is asked about too.",
        )
    return margin, model, ceilings


def options(model: str, default: str, ceilings: str) -> list[str]:
    """What `judge_by` says as options of the command."""
    return [
        *([] if model == default else ["--model", model]),
        *([] if ceilings == OF_ITS_GPU else ["--hardware", ceilings]),
    ]


def upload() -> None:
    """The box to bring captures."""
    with st.popover("Upload", icon=":material/upload:", help="Bring captures of your own", width="content"):
        sides.bring()


def against() -> None:
    """A candidate against its baseline."""
    controls = st.container(horizontal=True, vertical_alignment="bottom")  # what has no room goes to the next line
    names = [*sides.sides(), *sides.traces()]
    opens = [names.index(name) if name in names else 0 for name in OPENS_WITH]
    chosen: dict[str, Any] = {"bind": "query-params", "on_change": declare, "args": ([],)}  # none yet of another pair
    baseline = controls.selectbox("Baseline", names, opens[0], key="baseline", **chosen)
    candidate = controls.selectbox("Candidate", names, opens[1], key="candidate", **chosen)
    if "axes" not in st.session_state and not {"baseline", "candidate", "axes"} & set(st.query_params):
        declare(OPENS_WITH_AXES)
    axes = controls.multiselect(
        "May differ",
        list(dict.fromkeys((*regression.AXES, *regression.AXIS_WORDS))),
        key="axes",
        bind="query-params",
        help="Declared axes of change: what you mean to test. Sides that differ in anything else are not compared.",
    )
    with controls:
        margin, model, ceilings = judge_by(OWN, "model", "datasheet", has_margin=True)
        upload()
    try:
        pair = sides.chosen(baseline), sides.chosen(candidate)
    except InputError as error:
        frame.refused("This cannot be compared:", error)
        link.end()
    digests = (pair[0].digest, pair[1].digest)
    try:
        result = compared(digests, margin / 100, tuple(axes), model, ceilings, pair)
    except NotComparableError as error:
        not_comparable(error, pair, axes)
        link.end()
    except InputError as error:
        frame.refused("This cannot be judged:", error)
        link.end()
    verdict(result)
    table = result.table()
    workloads(table, has_cells=result.model is not None)
    changed(result)
    folders = [sides.folder(name, one) for name, one in zip((baseline, candidate), pair, strict=True)]
    said = [*(word for axis in axes for word in ("--axis", axis)), *options(model, OWN, ceilings)]
    page = report.check_page(result)
    frame.computed(["perfmodel", "check", *folders, "--margin", f"{margin:g}%", *said], page)
    failures = regression.DEFAULT_FAILURES
    reports: dict[str, Callable[[], str]] = {
        "junit.xml": lambda: report.check_junit(result, failures),
        "md": lambda: report.check_markdown(result, failures),
        "json": lambda: report.check_json(result, failures),
        "csv": table.write_csv,
        "html": lambda: figures.html_page(
            f"{result.candidate} against {result.baseline}", page, figures.check_figures(result)
        ),
    }
    frame.downloads("check", **reports)


def not_comparable(error: InputError, pair: tuple[sides.Side, sides.Side], axes: list[str]) -> None:
    """Why two sides are not compared, and what to do about it."""
    frame.refused("These two are not compared:", error)
    one, other = (side.evidence for side in pair)
    differing = [axis for axis in regression.axes_of(regression.differences(one, other).keys()) if axis not in axes]
    if one.kind != other.kind:
        frame.literal("Captures are compared with captures, and traces with traces: choose another pair.")
    elif one.workloads.keys().isdisjoint(other.workloads):
        frame.literal("No workload was measured in both, so that there is nothing to compare: choose another pair.")
    elif differing:
        frame.literal(f"They differ in {' and '.join(differing)}. If that is what you mean to test, declare it.")
        st.button("Declare what differs", on_click=declare, args=([*axes, *differing],), type="primary")


def say(kind: str, words: str) -> None:
    """A verdict in a box, what it comes to in bold."""
    box, icon = BOXES[kind]
    first = re.split("[.,;:]", words)[0]
    box(f"**{frame.escaped(first)}**{frame.escaped(words.removeprefix(first))}", icon=icon)


def verdict(found: Comparison) -> None:
    """Both answers: in words, in numbers, and workload by workload."""
    overall, failures = found.overall, found.failures()
    kind, words = report.conclusion(found)
    say("bad" if failures else kind, words)
    answers = {
        "Check": "fails" if failures else "cannot tell" if kind == "open" else "passes",
        "Time against the baseline": f"{overall.verdict.ratio:.2f}x",
        **({"Model expects": f"{overall.expected_ratio:.2f}x"} if overall.expected_ratio else {}),
        **({"Time against the model": f"{overall.expectation.ratio:.2f}x"} if overall.expectation else {}),
        **({f"Time against {found.datasheet}": f"{overall.datasheet.ratio:.2f}x"} if overall.datasheet else {}),
        **({"Most of it in": overall.part} if overall.part else {}),
        "Workloads compared": f"{len(found.each)}",
    }
    ends = f"1, for {' and '.join(failures)}" if failures else "0"
    interval = f"90 % interval {overall.verdict.ratio_low:.2f} to {overall.verdict.ratio_high:.2f}"
    frame.numbers(
        answers,
        {
            "Check": f"What the command below ends with: {ends}.",
            "Time against the baseline": f"Geometric mean over the workloads; {interval}.",
            "Model expects": "Candidate over baseline, from the calibrated rates of both machines alone.",
            "Time against the model": "Measured over what the model expects of the candidate as it was calibrated.",
        },
    )
    drawn = figures.check_figures(found)
    # Without a model the parts stand beside, which tell more than few workloads.
    left, right = st.columns([3, 2] if found.model else [2, 3]) if len(drawn) > 1 else (st.container(), st.container())
    heights = [figure.layout.height for figure, _ in drawn]
    below = right if sum(heights[1:]) < 1.2 * heights[0] else st.container()  # where there is room for all
    for i, (place, (figure, alt)) in enumerate(zip((left, right, below), drawn, strict=False)):
        with place:
            frame.chart(figure, alt, key=f"check-{i}")
    for remark in report.remarks(found):
        frame.literal(remark)
    if found.no_model and found.model is None:
        frame.literal(f"The second question stays open: {found.no_model}")


def workloads(table: pl.DataFrame, *, has_cells: bool) -> None:
    """The workloads one by one, all or those of one cell where a model put them into cells."""
    cell = st.pills("Workloads", regression.CELLS, key="cell", bind="query-params") if has_cells else None
    shown = table if cell is None else table.filter(pl.col("cell") == cell)
    frame.rows(
        shown.select(SHOWN).with_columns(pl.col(pl.Float64).round(3)),
        "Workloads, slowest against the baseline first",
        height=260 if shown.height > N_LOW else None,
    )


def changed(found: Comparison) -> None:
    """What differs between the sides, and which calibrated rate moved."""
    st.header("What changed", anchor=False)
    for line in report.changed_lines(found):
        frame.literal(line)
    for one in report.changed_tables(found):
        if one.title.lower() != one.head[0].lower():
            frame.literal(one.title)
        frame.words_table(one.head, one.rows, one.title)
    if not found.changes:
        st.caption("Machine, software, kernel and settings are the same.")


def alone() -> None:
    """One machine, judged by its capture without a baseline."""
    controls = st.container(horizontal=True, vertical_alignment="bottom")
    machines = sides.machines()
    wanted = st.session_state.get("candidate")
    opens = list(machines).index(wanted if wanted in machines else OPENS_WITH[1])
    name = controls.selectbox("Capture of the machine", list(machines), opens, key="capture", bind="query-params")
    with controls:
        _, model, ceilings = judge_by(MOST_ALIKE, "judge", "nominal", has_margin=False)
        upload()
    side = machines[name]
    try:
        found = judged(side.digest, model, ceilings, side)
    except InputError as error:
        frame.refused("This cannot be judged:", error)
        link.end()
    state(found)
    assert side.evidence.capture is not None
    page = report.new_machine_page(found, machine_words(side.evidence.capture))
    command = ["perfmodel", "check", "--new-machine", sides.folder(name, side), *options(model, MOST_ALIKE, ceilings)]
    frame.computed(command, page)
    reports: dict[str, Callable[[], str]] = {
        "junit.xml": lambda: report.new_machine_junit(found),
        "md": lambda: report.new_machine_markdown(found),
        "json": lambda: json.dumps(found.to_json(), indent=2) + "\n",
        "html": lambda: figures.html_page(f"New machine: {found.capture}", page, figures.new_machine_figures(found)),
    }
    frame.downloads("new-machine", **reports)


def state(found: NewMachine) -> None:
    """What a machine comes to: the verdict, what deserves a look, what it reaches, and all that was asked."""
    wrong, healthy, not_judged = (found.of(one) for one in (regression.LOOK_AT, regression.HEALTHY, regression.OPEN))
    kind = "mixed" if wrong else "good" if healthy else "open"
    say(kind, report.new_machine_verdict(found))
    frame.numbers(
        {
            "Deserve a look": f"{len(wrong)}",
            "Healthy": f"{len(healthy)}",
            "Not judged": f"{len(not_judged)}",
            "Runs that a check needs": None if found.n_runs_wanted is None else f"{found.n_runs_wanted}",
        },
        {"Runs that a check needs": "Of each side, to tell a change of 3 % over all workloads from none."},
    )
    drawn = figures.new_machine_figures(found)
    left, right = st.columns([3, 2]) if wrong and drawn else (st.container(), st.container())
    with right:
        for item in wrong:
            with st.container(border=True):
                frame.literal(f"{item.name}: {item.words}")
                for step in item.next_steps:
                    frame.literal(f"\u2192 {step}")
    for i, (figure, alt) in enumerate(drawn):
        with left if i == 0 else st.container():
            frame.chart(figure, alt, key=f"machine-{i}")
    st.header("All that was asked", anchor=False)
    rows = [(item.name, item.verdict, item.section, item.words) for item in (*wrong, *not_judged, *healthy)]
    frame.words_table(("item", "verdict", "section", "what was found"), rows, "Items of the machine")
    frame.literal(report.judge_line(found))
    frame.literal(report.runs_line(found))


for kept in KEPT:  # the other way to judge does not show its controls, and must not lose what they say
    if kept in st.session_state:
        st.session_state[kept] = st.session_state[kept]
title, way = st.columns([3, 2], vertical_alignment="bottom")
with title:
    frame.header("Regression", "Is this machine, driver or build as fast as it was, and as it should be?")
with way, st.container(horizontal=True, horizontal_alignment="right"):
    asked = st.segmented_control(
        "Judge",
        [AGAINST, ALONE],
        default=AGAINST,
        required=True,
        key="way",
        bind="query-params",
        label_visibility="collapsed",
    )
if asked == ALONE:
    alone()
else:
    against()
