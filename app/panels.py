"""Panels that more than one view shows."""

import loading
import polars as pl
import streamlit as st

from perfmodel import figures, report, text
from perfmodel.analysis import Analysis

DEFAULT_TOKENS = (64, 4096, 65_536, 524_288)


def default_slowdown() -> None:
    """The slowdown curve a newcomer sees first: the GH200 study's setting, one line a batch size."""
    curves = {
        f"{text.count(n)} tokens": loading.curve("gh200", "poster", "mmlu-like", n, "zero-copy", "grouped-gemm")
        for n in DEFAULT_TOKENS
    }
    loading.chart(
        figures.slowdown(curves),
        "Predicted slowdown against the fraction of offloaded experts on GH200, one line per batch size",
    )
    st.caption(
        "Predicted from datasheet and published numbers: GH200, zero-copy over C2C, 64 experts, 90 % of tokens on "
        "65 % of experts. Not measured by this project; the Offload page lets you change everything."
    )


def trace_summary(name: str, found: Analysis) -> None:
    """Coverage, launch metrics, findings and the busiest kernel classes of one trace."""
    metrics = found.metrics
    loading.literal(f"{name}: {metrics.source} trace, {text.count(metrics.n_events)} events")
    first = st.columns(4)
    first[0].metric(
        "TKLQT", text.ns(metrics.tklqt_ns), help="Sum of kernel start minus launch-call start; not wall time."
    )
    first[1].metric("Average kernel", text.ns(metrics.akd_ns))
    first[2].metric("GPU idle", text.frac(metrics.gpu_idle_frac))
    first[3].metric("Inference latency", text.ns(metrics.inference_latency_ns))
    second = st.columns(4)
    second[0].metric("Kernels", text.count(metrics.n_kernels))
    second[1].metric("joined to a launch", text.count(metrics.n_kernels_joined))
    second[2].metric(
        "orphans", text.count(metrics.n_kernels_orphan), help="Launched before the window; busy time only."
    )
    second[3].metric("from graphs", text.count(metrics.n_kernels_graph))
    for note in found.trace.notes:
        loading.literal(f"Note: {note}")
    if metrics.n_kernels == 0:
        st.info("This trace holds no kernels: nothing was recorded on a device.")
        return
    loading.literal(report.findings_text(found.findings))
    left, right = st.columns(2)
    with left:
        loading.chart(figures.busy(metrics), "Busy and idle time per device")
    with right:
        loading.chart(
            figures.shares(found.classes, "class", "time_ns", "Kernel time by class"), "Kernel time by class of kernel"
        )
    kernels = found.kernels.head(200)
    st.dataframe(kernels.with_columns(pl.col("name").cast(pl.String)), width="stretch", height=300)
