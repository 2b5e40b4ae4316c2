"""Trace: upload a profile, see coverage, launch metrics, busy time and kernel classes."""

import loading
import panels
import streamlit as st

st.header("Trace")
st.caption("Launch metrics of a PyTorch-profiler or Nsight Systems trace, with what could and could not be joined.")
loaded = loading.upload_box("trace-upload")
if loaded is None:
    st.info("Nothing is uploaded yet. On the command line: perfmodel analyze TRACE")
else:
    panels.trace_summary(*loaded)
