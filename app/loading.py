"""The one place that loads and caches what comes with the project: captures, models, the catalogue.

These caches are shared by all sessions, for what they hold is the same for all and never changes.
"""

import streamlit as st

from perfmodel import hardware, hf_config, text
from perfmodel.capture import Capture, load_capture, shipped_captures
from perfmodel.ep_capture import load_ep_capture, shipped_ep_captures
from perfmodel.latency import LatencyModel, load_model, shipped_models
from perfmodel.predict import Prediction, slowdown_curve
from perfmodel.regression import Evidence, of_capture
from perfmodel.routing import routing


@st.cache_resource(show_spinner="Reading the shipped captures")
def shipped() -> dict[str, tuple[Capture, LatencyModel]]:
    """The project's captures with the model fitted on each, by name."""
    return {
        path.name: (load_capture(path), load_model(path.name))
        for path in shipped_captures()
        if path.name in shipped_models()
    }


@st.cache_resource(show_spinner="Reading the shipped captures")
def sides() -> dict[str, Evidence]:
    """The project's captures as sides of a comparison, by name."""
    return {name: of_capture(capture) for name, (capture, _) in shipped().items()}


@st.cache_resource(show_spinner="Reading the shipped models")
def models() -> dict[str, LatencyModel]:
    """Every model that comes with the project, of its own captures first, then of published tables."""
    own = {name: model for name, (_, model) in shipped().items()}
    return own | {name: load_model(name) for name in shipped_models() if name not in own}


@st.cache_data(show_spinner=False)
def example_words() -> dict[str, str]:
    """What the workloads of expert-parallel captures are, by the path of a profile, whose own name is a digest."""
    captures = [load_ep_capture(path) for path in shipped_ep_captures()]
    return {
        f"traces/{capture.name}/profiles/{one.workload}": f"{capture.n_ranks} ranks: {one.shape}, "
        f"{text.counted(one.tokens_per_gpu, 'token')} on each, {one.routing}, {one.way}"
        for capture in captures
        for one in capture.workloads
    }


@st.cache_data(max_entries=256, show_spinner=False)
def curve(
    hardware_name: str, shape_name: str, routing_name: str, n_tokens: int, access: str, op: str
) -> list[Prediction]:
    """Predictions along the offloaded fraction for catalogue names."""
    shape = hf_config.resolve(shape_name)
    batch = routing(routing_name, shape.n_experts, shape.top_k, n_tokens)
    return slowdown_curve(hardware.hardware(hardware_name), shape, batch, access, op=op)


def offload_machines() -> list[str]:
    """The hardware profiles that have a second memory tier."""
    return [
        n for n in hardware.names() if hardware.hardware(n).first("link_peak_bytes_per_s", "link_h2d_copy_bytes_per_s")
    ]
