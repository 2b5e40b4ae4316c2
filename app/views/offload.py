"""Offload: choose a machine, a model, routing and batch; see what moving experts off the device costs."""

import loading
import streamlit as st

from perfmodel import figures, hardware, hf_config, moe, offload, predict, routing, text
from perfmodel.errors import InputError

st.header("Offload")
st.caption("What it costs to keep a fraction of each layer's experts in host memory, least used first.")
first = st.columns(4)
machines = loading.offload_machines()
machine = first[0].selectbox("Hardware", machines, index=machines.index("gh200"))
shape_name = first[1].selectbox("Model shape", moe.names(), index=moe.names().index("poster"))
pattern = first[2].selectbox("Routing", sorted(routing.PATTERNS))
exponent = first[3].slider("Power-law exponent", 0.0, 2.5, 1.0, 0.1, disabled=pattern != "power-law")
second = st.columns(4)
sizes = [2**i for i in range(21)]
n_tokens = second[0].select_slider("Tokens in the batch", sizes, value=65_536, format_func=text.count)
offloaded = second[1].slider("Offloaded fraction", 0.0, 1.0, 0.3125, 1 / 32)
modes = offload.usable_modes(hardware.hardware(machine))
access = second[2].selectbox("Access mode", modes)
op = second[3].selectbox("What is timed", predict.OPS)
routing_name = f"power-law:{exponent:g}" if pattern == "power-law" else pattern

try:
    curves = {mode: loading.curve(machine, shape_name, routing_name, n_tokens, mode, op) for mode in modes}
except InputError as error:
    st.error("These settings cannot be predicted:")
    loading.literal(error)
    st.stop()
curve = curves.pop(access)
chosen = min(curve, key=lambda p: abs(p.n_offloaded / p.n_experts - offloaded))
numbers = st.columns(4)
numbers[0].metric("Slowdown", f"{chosen.slowdown:.2f}x")
numbers[1].metric("Latency per layer", text.ns(chosen.latency_ns))
numbers[2].metric("Device memory saved per layer", text.n_bytes(chosen.offloaded_bytes))
numbers[3].metric("Bottleneck", chosen.bottleneck)
left, right = st.columns(2)
with left:
    figure = figures.slowdown({f"{access} (chosen)": curve} | curves)
    figure.add_vline(x=chosen.n_offloaded / chosen.n_experts, line={"color": "grey", "dash": "dot"})
    loading.chart(figure, "Slowdown against offloaded fraction for each access mode")
with right:
    loading.chart(figures.parts({"all resident": curve[0], "offloaded": chosen}), "Parts of the latency")
    shape = hf_config.resolve(shape_name)
    counts = routing.routing(routing_name, shape.n_experts, shape.top_k, n_tokens).counts
    loading.chart(figures.coverage(*routing.coverage_curve(counts)), "Share of tokens against share of experts")
with st.expander("How this was computed"):
    st.code(
        f"perfmodel predict --hardware {machine} --shape {shape_name} --routing {routing_name} --tokens {n_tokens} "
        f"--offload {chosen.n_offloaded / chosen.n_experts:g} --access {access} --op {op}",
        language=None,
    )
    loading.literal(str(chosen))
