"""Trace: where the time of a profile goes, part by part."""

import frame
import link
import streamlit as st
import trace_parts
import uploads

from perfmodel.errors import InputError

frame.header("Trace", "Where does my time go: what cost most, and what did the device or the others wait for?")
traces = uploads.choose("trace-upload")
if not traces:
    st.info("No trace is open. Upload one, or choose an example on the left.")
    link.end()
one = traces[-1]
if len(traces) > 1:
    chosen = st.selectbox(
        "Trace",
        range(len(traces)),
        index=len(traces) - 1,
        format_func=lambda i: traces[i].name,
        key="which",
        bind="query-params",
    )
    one = traces[chosen or 0]
if one.is_example:
    st.caption("This is an example that comes with the project; open a trace of your own to see where its time goes.")
part = st.segmented_control(
    "Part",
    list(trace_parts.PARTS),
    default="Summary",
    required=True,
    key="part",
    bind="query-params",
    label_visibility="collapsed",
)
try:
    with uploads.guarded():
        trace_parts.PARTS[part or "Summary"](one, traces)
except InputError as error:
    frame.refused("This part cannot be shown:", error)
trace_parts.whole(one)
