"""Predicted vs measured: held-out points only, error by shape beside the baselines, and the machine's roofline."""

import math

import loading
import polars as pl
import streamlit as st

from perfmodel import figures, roofline, text
from perfmodel.capture import fitted_rows, per_workload

st.header("Predicted vs measured")
st.caption("Every point was predicted by a model that had never seen its shape.")
captures = loading.shipped()
if not captures:
    st.warning("No shipped capture was found. Make one with: perfmodel collect sweep --out DIR")
    st.stop()
name = st.selectbox("Capture", list(captures))
capture, model = captures[name]
left, right = st.columns(2)
with left:
    loading.chart(figures.parity(model.points_, model.errors_["model"]["all"]), "Predicted against measured latency")
with right:
    measured, _ = fitted_rows(per_workload(capture.observations), model.dtype)
    points = roofline.points(measured, model.profile)
    loading.chart(figures.roofline(model.profile, model.dtype, points), "Roofline of the measured machine")
if model.typical_half_width_ is not None:
    factor = math.exp(model.typical_half_width_)
    st.caption(f"A prediction's 90 % interval is typically a factor of {factor:.2f} either way.")
table = pl.DataFrame(
    [
        {"shape": shape, "points": errors["n"], "median error": text.frac(errors["median_ape_frac"])}
        | {"p90 error": text.frac(errors["p90_ape_frac"]), "worst": text.frac(errors["worst_ape_frac"])}
        | {
            f"{who} (median)": text.frac(model.errors_[key][shape]["median_ape_frac"])
            for who, key in (("roofline only", "roofline_only"), ("constant", "constant"))
        }
        for shape, errors in model.errors_["model"].items()
    ]
)
st.dataframe(table, width="stretch", hide_index=True)
with st.expander("How this was computed"):
    st.code(f"perfmodel fit traces/{name} --out model.json", language=None)
