"""Overview: what is loaded, what offloading costs, whether to believe it, and what the shipped measurements say."""

from collections.abc import Callable

import frame
import loading
import streamlit as st
import uploads

from perfmodel import figures, report, text
from perfmodel.plausible.summary import machine_words
from perfmodel.predict import Prediction

STUDY = ("gh200", "poster", "mmlu-like")  # the GH200 study's setting: machine, model shape, routing
TOKENS = (64, 4096, 65_536, 524_288)
OFFLOADED, OF_TOKENS = 20, 65_536  # the point of that study which is told in words


def time_card() -> None:
    """The traces that this session has open, each with its most telling finding."""
    st.page_link("views/trace.py", label="Where does my time go?", icon=":material/timeline:")
    own = [one for one in uploads.loaded() if not one.is_example]
    for one in own:
        findings = one.analysis.findings
        frame.literal(f"{one.name}: {findings[0].words if findings else 'nothing stands out'}")
    if not own:
        st.caption("No trace is loaded. Drop one of the PyTorch profiler or Nsight Systems on the Trace page.")


def cost_card(curves: dict[str, list[Prediction]]) -> None:
    """One point of the offloading curve in words."""
    st.page_link("views/placement.py", label="What does offloading cost?", icon=":material/move_down:")
    point = curves[f"{text.count(OF_TOKENS)} tokens"][OFFLOADED]
    frame.literal(
        f"{point.slowdown:.2f}x on GH200 with {OFFLOADED} of {point.n_experts} experts read in place, "
        f"{text.count(OF_TOKENS)} tokens"
    )


def regression_card() -> None:
    """What is there to compare."""
    st.page_link("views/regression.py", label="Is it as fast as it should be?", icon=":material/speed:")
    frame.literal(f"{text.counted(len(loading.shipped()), 'capture')} to compare with, or bring your own")


def measurements() -> str:
    """What a shipped capture says: its machine, its numbers and three findings; returns its name."""
    left, right = st.columns([2, 3], gap="large")
    with left:
        name = str(st.selectbox("Measurements", list(loading.shipped()), key="capture", bind="query-params"))
        capture, model = loading.shipped()[name]
        frame.literal("\n".join(machine_words(capture)))
    with right:
        frame.numbers(
            {
                "Workloads measured": text.count(capture.observations["workload"].n_unique()),
                "Dense GEMM": text.flops_per_s(model.roof.flops_per_s),
                "Memory bandwidth": text.bytes_per_s(model.roof.bytes_per_s),
            }
        )
        frame.literal("\n".join(f"{i}. {line}" for i, line in enumerate(report.capture_headlines(capture, model), 1)))
    return name


frame.header("perfmodel", "Where MoE time goes, what moving experts off the GPU costs, and whether to believe it.")
study = {f"{text.count(n)} tokens": loading.curve(*STUDY, n, "zero-copy", "grouped-gemm") for n in TOKENS}
cards: tuple[Callable[[], None], ...] = (time_card, lambda: cost_card(study), regression_card)
for column, card in zip(st.columns(len(cards)), cards, strict=True):
    with column.container(border=True, height="stretch"):
        card()
left, right = st.columns(2, gap="large")
with left:
    frame.chart(
        figures.slowdown(study),
        "Predicted slowdown against the fraction of offloaded experts on GH200, one line per batch size",
    )
    st.caption(
        "Predicted from datasheet and published numbers, not measured by this project: GH200, experts read in place "
        "over C2C, 64 experts, 90 % of tokens on 65 % of experts."
    )
chosen = right.container()  # drawn above the choice that it depends on
name = measurements()
with chosen:
    model = loading.shipped()[name][1]
    frame.chart(
        figures.parity(model.points_, model.errors_["model"]["all"]),
        f"Predicted against measured latency of shapes that the model had not seen, capture {name}",
    )
    st.caption("Every point was predicted by a model that had never seen its shape; one marker for each model shape.")
frame.computed(["perfmodel", "captures", "show", f"traces/{name}"])
