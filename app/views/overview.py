"""Overview: the shipped measurements against the model, what offloading costs, and a place to drop a trace."""

import loading
import panels
import streamlit as st

from perfmodel import figures, text

st.header("perfmodel")
st.caption("Where MoE time goes, what moving experts off the GPU costs, and whether to believe it.")

captures = loading.shipped()
if captures:
    # One capture is enough for a first look; the other pages have all of them.
    name, (capture, model) = next(iter(captures.items()))
    machine, overall = capture.manifest["machine"], model.errors_["model"]["all"]
    columns = st.columns(4)
    columns[0].metric("Workloads measured", text.count(capture.observations["workload"].n_unique()))
    columns[1].metric("Median error, unseen shapes", text.frac(overall["median_ape_frac"]))
    columns[2].metric("Dense GEMM of that machine", text.flops_per_s(model.roof.flops_per_s))
    columns[3].metric("Memory bandwidth", text.bytes_per_s(model.roof.bytes_per_s))
    left, right = st.columns(2)
    with left:
        loading.chart(
            figures.parity(model.points_, overall),
            f"Predicted against measured latency, capture {name}; median error {text.frac(overall['median_ape_frac'])}",
        )
        st.caption("Every shape was predicted by a model that had not seen it. Capture and machine:")
        loading.literal(f"{name}, {machine.get('cpu_model', 'an unnamed CPU')}, {machine['n_cores']} cores")
    with right:
        panels.default_slowdown()
else:
    st.warning("No shipped capture was found. Make one with: perfmodel collect sweep --out DIR")

st.subheader("Where does my time go?")
loaded = loading.upload_box("overview-upload")
if loaded is not None:
    panels.trace_summary(*loaded)
else:
    st.caption("Drop a profiler trace above to see launch metrics, idle time and the kernels that cost most.")
