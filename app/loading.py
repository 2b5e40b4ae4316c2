"""The one place that loads and caches. Uploads stay in their session and are keyed by content, never by table."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import streamlit as st

from perfmodel import hardware, hf_config
from perfmodel.analysis import Analysis, analyse
from perfmodel.capture import Capture, load_capture, shipped_captures
from perfmodel.errors import InputError
from perfmodel.latency import LatencyModel, load_model, shipped_models
from perfmodel.predict import Prediction, slowdown_curve
from perfmodel.readers import read_trace
from perfmodel.routing import routing


def literal(words: object) -> None:
    """Show words that may come from a file exactly as they are: no Markdown, no HTML."""
    st.text(str(words))


@st.cache_resource(show_spinner="Reading the shipped captures")
def shipped() -> dict[str, tuple[Capture, LatencyModel]]:
    """The project's captures with the model fitted on each, by name."""
    return {
        path.name: (load_capture(path), load_model(path.name))
        for path in shipped_captures()
        if path.name in shipped_models()
    }


@st.cache_data(scope="session", max_entries=4, show_spinner="Reading the trace")
def _analysed_upload(digest: str, name: str, _content: bytes) -> Analysis:
    with tempfile.TemporaryDirectory(prefix="perfmodel-") as folder:
        path = Path(folder) / f"{digest[:12]}{Path(name).suffix}"
        path.write_bytes(_content)
        try:
            return analyse(read_trace(path))
        except InputError as error:  # says the name the user knows, not where the server keeps it
            raise InputError(str(error).replace(str(path), name)) from None


def upload_box(key: str) -> tuple[str, Analysis] | None:
    """An upload box for one trace; returns its name and what it says, or None with the reason shown."""
    upload = st.file_uploader(
        "Upload a trace: PyTorch profiler .json or Nsight Systems .sqlite, plain or packed (gzip, zip, Zstandard)",
        key=key,
        help="Up to 500 MB. For larger files use the command line: perfmodel analyze TRACE",
    )
    if upload is None:
        return None
    content = upload.getvalue()
    try:
        return upload.name, _analysed_upload(hashlib.sha256(content).hexdigest(), upload.name, content)
    except InputError as error:
        st.error("This file cannot be read as a trace:")
        literal(error)
        return None


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


def chart(figure: Any, alt: str) -> None:
    """Show a figure at full width with words for those who cannot see it."""
    st.plotly_chart(figure, width="stretch", alt=alt)
