"""Trace: where the time of a profile goes, part by part."""

import frame
import streamlit as st
import trace_cache
import trace_parts
import uploads

frame.header(
    "Where does my time go?", "Open a profile: what could be joined, what the device waited for, what cost most."
)
opened = uploads.choose("trace-upload")
traces = opened or [trace_cache.example()]
one = traces[-1]
if len(traces) > 1:
    chosen = st.selectbox(
        "Trace", range(len(traces)), index=len(traces) - 1, format_func=lambda i: traces[i].name, key="which"
    )
    one = traces[chosen or 0]
if not opened or getattr(one, "is_example", False):
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
trace_parts.PARTS[part or "Summary"](one, traces)
trace_parts.whole(one)
