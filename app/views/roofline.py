"""Roofline: ceilings of a machine, one slanted for each memory tier, and what was measured under them."""

import json
from dataclasses import replace

import frame
import link
import loading
import polars as pl
import streamlit as st
import uploads

from perfmodel import figures, hardware, report
from perfmodel.capture import per_workload
from perfmodel.errors import InputError
from perfmodel.roofline import Roofline, dtypes_by_time, dtypes_of, only, roofline

ALL = "all"
N_SHOWN = 10  # points of the table

frame.header("Roofline", "How far below what the machine can do is what was measured, and where does that cost most?")


@st.cache_data(max_entries=16, show_spinner=False)
def of_capture(name: str, dtype: str) -> Roofline:
    """What a shipped capture measured in a dtype, under the ceilings that it measured."""
    capture, model = loading.shipped()[name]
    rows = per_workload(capture.observations).filter(pl.col("dtype") == dtype)
    return roofline(model.profile, dtype, observations=rows, model=model if dtype == model.dtype else None)


captures = loading.shipped()
traces = [one for one in uploads.loaded() if one.analysis.products["dtype"].count()]
box = st.container(horizontal=True)
name = box.selectbox(
    "Machine",
    [*captures, *(one for one in hardware.names() if one not in captures)],
    key="machine",
    bind="query-params",
    help="A shipped capture with what it measured, or a profile of the catalogue with its ceilings.",
)
trace = None
if traces:
    number = box.selectbox(
        "Points",
        [None, *range(len(traces))],
        format_func=lambda i: "of the capture" if i is None else traces[i].name,
        key="points_of",
        help="The matrix products of a trace that this session has open, under the ceilings of the machine on the "
        "left: name the one that ran it. A trace is no part of a link.",
    )
    trace = None if number is None else traces[number]
is_measured = trace is None and name in captures
machine = captures[name][1].profile if name in captures else hardware.hardware(name)
if trace is not None:
    dtypes = dtypes_by_time(trace.analysis.products)
elif is_measured:
    dtypes = sorted(captures[name][0].observations["dtype"].unique())
else:
    dtypes = dtypes_of(machine)
dtype = box.selectbox("Type", dtypes, key="dtype", bind="query-params")
try:
    if is_measured:
        found = of_capture(name, dtype)
    else:
        found = roofline(machine, dtype, products=None if trace is None else trace.analysis.products)
except InputError as error:
    frame.refused("This machine has no roof for that type:", error)
    link.end()
ops = sorted(found.points["op"].unique())
op = box.selectbox("Operation", [ALL, *ops], key="op", bind="query-params", disabled=not ops)
found = only(found, op=None if op == ALL else op)
shapes = sorted(found.points["shape"].unique())
shape = box.selectbox(
    "Shape",
    [ALL, *shapes],
    key="shape",
    bind="query-params",
    disabled=not shapes,
    help="Joins the batches of one shape, a line for each routing, and fades all others.",
)
one_shape = None if shape == ALL else shape
[(figure, alt)] = figures.roofline_figures(found, one_shape)
selection = frame.chart(
    figure.update_layout(dragmode="select"),
    alt,
    key=f"chart {name} {trace.digest if trace else ''} {dtype} {op} {shape}",  # rows are those of one choice alone
    on_select="rerun",
    selection_mode=("points", "box"),
)["selection"]["points"]
chosen = sorted({point.get("customdata") for point in selection} & {*range(found.points.height)})
if found.nominal is None:
    frame.literal(f"{report.NO_DATASHEET}.".capitalize())
asked = only(found, shape=one_shape)
below = only(replace(found, points=found.points[chosen])) if chosen else asked
if below.points.is_empty():
    st.caption(
        "Only ceilings are shown. To see points under them choose a capture, or open a trace with recorded shapes "
        "(record_shapes=True) in the Trace view."
    )
else:
    st.header("What is lost below the roof, costliest first", anchor=False)
    st.caption(
        "Of the points chosen in the figure; a double click there shows all."
        if chosen
        else "Click a point of the figure, or draw a box around some, to see these alone."
    )
    frame.literal(report.lost_words(below))
    frame.words_table(report.COSTLIEST_HEADER, report.costliest_rows(below, N_SHOWN), "Points that lose most time")
with st.expander("Ceilings and what they rest on"):
    frame.words_table(report.CEILINGS_HEADER, report.ceiling_rows(found), "Ceilings as reached and nominal")

command = ["perfmodel", "roofline", f"traces/{name}" if is_measured else name, "--dtype", dtype]
command += ["--trace", trace.name] if trace else []
command += ["--model", name] if is_measured and dtype == captures[name][1].dtype else []
command += ["--op", op] if op != ALL else []
command += ["--shape", shape] if one_shape else []
frame.computed(command, report.roofline_page(asked))
frame.downloads(
    "roofline",
    csv=below.points.write_csv,
    json=lambda: json.dumps(report.roofline_json(below), indent=2),
    html=lambda: figures.html_page("Roofline", report.roofline_page(below), figures.roofline_figures(found, one_shape)),
)
