"""Predicted vs measured: held-out points only, whether intervals hold, and where the model must not be trusted."""

import json
from collections.abc import Callable

import frame
import loading
import polars as pl
import streamlit as st

from perfmodel import figures, report, text
from perfmodel.capture import fitted_rows, per_workload
from perfmodel.evaluation import coverage_by_level, held_out_points
from perfmodel.latency import COVERAGE

frame.header(
    "Predicted vs measured", "Can the model be believed? Every point was predicted by a model that never saw its shape."
)


@st.cache_data(max_entries=16, show_spinner=False)
def held_out(name: str) -> pl.DataFrame:
    """The held-out points of a model, with the widths of its intervals where its measurements ship."""
    model, rows = loading.models()[name], None
    if name in loading.shipped():
        rows, _ = fitted_rows(per_workload(loading.shipped()[name][0].observations), model.dtype)
    return held_out_points(model, rows)


name = st.selectbox(
    "Model",
    list(loading.models()),
    key="model",
    bind="query-params",
    help="One model for each machine, kernel and type; those of H100 rest on published tables, the others on captures "
    "that ship.",
)
model, table = loading.models()[name], held_out(name)
errors = model.errors_["model"]["all"]
by_level = coverage_by_level(table)
stated = by_level.filter(pl.col("stated_frac") == COVERAGE)
covered = stated.select(pl.sum("n_covered") / pl.sum("n")).item() if stated.height else None
frame.numbers(
    {
        "Median error": text.frac(errors["median_ape_frac"]),
        "9 in 10 below": text.frac(errors["p90_ape_frac"]),
        "Worst": text.frac(errors["worst_ape_frac"]),
        "Roofline alone, median": text.frac(model.errors_["roofline_only"]["all"]["median_ape_frac"]),
        "A 90 % interval holds": text.frac(covered),
    },
    {
        "Roofline alone, median": "The roofline times one fitted factor: what a model must beat.",
        "A 90 % interval holds": "Share of points inside an interval made from the errors of all other shapes; "
        "anomalies count as outside.",
    },
)
drawn = figures.accuracy_figures(table, errors)
frame.chart(*drawn[0])
for column, (figure, alt) in zip(st.columns(len(drawn) - 1), drawn[1:], strict=True):
    with column:
        frame.chart(figure, alt)
if table.height < errors["n"]:
    frame.literal(
        f"{text.count(table.height)} of {text.count(errors['n'])} held-out points are drawn, chosen at random; errors "
        "in numbers are of all."
    )
for_shapes, for_machines = st.tabs(["Errors by shape", "All machines"])
with for_shapes:
    frame.words_table(report.SHAPES_HEADER, report.shape_rows(model), "Held-out errors of each shape beside baselines")
with for_machines:
    frame.words_table(
        report.MODELS_HEADER, report.models_rows(loading.models()), "Held-out errors of every shipped model"
    )
    st.caption("Kernels, types and machines are never pooled. docs/accuracy.md holds out routings and batches as well.")
st.header("Where not to trust it", anchor=False)
frame.words_table(report.LIMITS_HEADER, report.limits(model), "Where this model must not be trusted")

rows: dict[str, Callable[[], str]] = {"csv": table.write_csv, "json": lambda: json.dumps(table.to_dicts())}
page = f"{report.fit_page(model)}\n\n{report.limits_page(model)}"
if name in loading.shipped():
    frame.computed(["perfmodel", "fit", f"traces/{name}", "--out", "model.json", "--html", "model.html"], page)
else:
    frame.computed(["perfmodel", "evaluate", name, "TABLE.parquet", "--html", "errors.html"], page)
frame.downloads("accuracy", **rows, html=lambda: figures.html_page(f"The latency model {name}", page, drawn))
