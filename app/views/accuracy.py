"""Predicted vs measured: held-out points only."""

import frame
import loading
import streamlit as st

from perfmodel import figures

frame.header("Predicted vs measured", "Can the model be believed? Every point was predicted without its shape.")
name = st.selectbox("Capture", list(loading.shipped()), key="capture", bind="query-params")
capture, model = loading.shipped()[name]
frame.chart(figures.parity(model.points_, model.errors_["model"]["all"]), "Predicted against measured latency")
