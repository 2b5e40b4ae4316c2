"""Roofline: ceilings of a machine, one slanted for each memory tier, and what was measured under them."""

import frame
import loading
import streamlit as st

from perfmodel import figures, roofline
from perfmodel.capture import fitted_rows, per_workload

frame.header("Roofline", "How far below what the machine can do is what was measured?")
name = st.selectbox("Capture", list(loading.shipped()), key="capture", bind="query-params")
capture, model = loading.shipped()[name]
measured, _ = fitted_rows(per_workload(capture.observations), model.dtype)
points = roofline.points(measured, model.profile)
frame.chart(figures.roofline(model.profile, model.dtype, points), f"Roofline of {name} with what was measured")
