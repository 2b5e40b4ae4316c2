"""Placement: what it costs to move experts off the device, which ones should go, and files for engines."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import frame
import placement_controls as controls
import placement_parts as parts
import streamlit as st
from placement_controls import Choice, Files

from perfmodel import figures, hardware, report, text
from perfmodel.errors import InputError
from perfmodel.offload import usable_modes
from perfmodel.placing.ask import AUTO, modes, passes_in_words
from perfmodel.placing.curves import FREE_FRAC, curve_rows, most_free
from perfmodel.predict import Prediction

OPENING = Choice(
    *("gh200", "poster", "mmlu-like", "65536", 1, "68.75%", "zero-copy", "grouped-gemm"), None, None, False, 0, 1
)
LINES = ("by access mode", "by batch size")
SIZES = (64, 4096, 65_536)  # of the lines by batch size, beside those that were asked for


def curves_of(
    choice: Choice, by: str, n_tokens: int, frac: float, files: Files
) -> tuple[str, Mapping[str, Sequence[Prediction]]]:
    """The access mode to look at, and curves by label, that of the question first."""
    usable = usable_modes(hardware.hardware(choice.hardware))
    able = [mode for mode in usable if (mode in modes(choice.access) or choice.access == AUTO) and mode != "paged"]
    by_mode = {mode: controls.curve(replaced(choice), mode, n_tokens, files=files) for mode in usable}

    def at(mode: str) -> float:
        nearest: Prediction = min(by_mode[mode], key=lambda p: abs(p.n_offloaded / p.n_experts - frac))
        return nearest.slowdown

    mode = min(able, key=at) if able else choice.access
    if by == LINES[0]:
        return mode, {mode: by_mode[mode]} | by_mode
    asked = [n for sizes in choice.sizes for n in sizes]
    sizes = dict.fromkeys([n_tokens, *asked, *SIZES])
    return mode, {text.counted(n, "token"): controls.curve(replaced(choice), mode, n, files=files) for n in sizes}


def replaced(choice: Choice) -> Choice:
    """The choice without what no curve depends on, so that curves are found again when that changes."""
    return replace(
        choice,
        batch="64",
        n_sequences=1,
        budget="100%",
        access=AUTO,
        host_gib=None,
        is_per_layer=False,
        n_context_tokens=0,
        seed=1,
    )


frame.header("Placement", "What will it cost to move these experts off the GPU, and which ones should go?")
choice, files = controls.choose()
head, which = st.container(), st.container()
left, right = st.columns([3, 2])
with left:
    by = st.segmented_control(
        "Lines", LINES, default=LINES[0], required=True, key="lines", bind="query-params", label_visibility="collapsed"
    )
try:
    questions = choice.sizes
    shape, _, room = controls.room(choice, files)
    resident_frac = room.capacity_bytes / (shape.n_layers * shape.layer_bytes)
    n_offloaded = shape.n_experts - int(resident_frac * shape.n_experts + 1e-9)
    frac = n_offloaded / shape.n_experts
    n_asked = 0
    if len(questions) > 1:
        words = [passes_in_words(sizes) for sizes in questions]
        shown = which.segmented_control(
            "Batch", words, default=words[0], required=True, key="which", bind="query-params"
        )
        n_asked = words.index(shown)
    n_tokens = max(questions[n_asked], key=lambda n: n * questions[n_asked][n])
    if len(questions[n_asked]) > 1:
        which.caption(
            frame.escaped(
                f"Numbers and bars are of passes of {text.counted(n_tokens, 'token')}; policies "
                "place for all passes together."
            )
        )
    mode, curves = curves_of(choice, by, n_tokens, frac, files)
    chosen = controls.point(replaced(choice), mode, n_tokens, frac, files=files)
except InputError as error:
    controls.offered(error)

first = next(iter(curves.values()))
free_of = [label for label in curves if label != "paged"] if by == LINES[0] else [next(iter(curves))]
best, free = most_free({label: curves[label] for label in free_of})[:2]
free_label = f"Free with {best}" if free and by == LINES[0] else "Free to leave"
with head:
    frame.numbers(
        {
            "Slowdown": f"{chosen.slowdown:.2f}x",
            "Latency of a layer": text.ns(chosen.latency_ns),
            "GPU memory freed": text.n_bytes(chosen.offloaded_bytes * shape.n_layers),
            free_label: f"{free} of {shape.n_experts}",
        },
        {
            "Slowdown": "Against all experts on the GPU.",
            "GPU memory freed": "In all layers of the model.",
            free_label: f"Experts of a layer that leave within {text.frac(FREE_FRAC)} of slowdown, by the line that "
            "has most of them: what they take hides under what the device does anyway.",
        },
    )
with left:
    frame.chart(
        figures.slowdown(curves, chosen=chosen, measured=controls.published(choice, n_tokens), free_of=free_of),
        "Slowdown against the offloaded fraction",
        key="slowdown",
    )
with right:
    bars = {"all on GPU": first[0], f"{chosen.n_offloaded} off": chosen}
    frame.chart(figures.parts(bars), "What the time of a layer consists of", key="parts")
    parts.facts(report.prediction_facts(chosen))
with st.expander("What these numbers rest on"):
    parts.facts(report.labelled(str(chosen).split("\n")))

asked = (choice, n_asked)
answer = parts.answer_of(asked, choice == OPENING)
tabs = st.tabs(["Policies", "Memory", "Routing", "Edit & export"], key="tab", bind="query-params")
drawn: tuple[Callable[[], None], ...] = (
    lambda: parts.policies(asked, answer, files),
    lambda: parts.memory(asked, answer, list(room.notes)),
    lambda: parts.routing(choice, files),
    lambda: parts.edit(asked, answer, mode, frac, files),
)
for tab, draw in zip(tabs, drawn, strict=True):
    if tab.open:
        with tab:
            try:
                draw()
            except InputError as error:
                frame.refused("This cannot be computed:", error)

command: list[object] = ["perfmodel", "predict", "--hardware", choice.hardware, "--shape", choice.shape]
command += ["--routing", choice.routing_name, "--tokens", n_tokens, "--offload", f"{frac:g}", "--access", mode]
command += ["--op", choice.op, *(["--model", choice.model] if choice.model else [])]
place_command = shlex.join(["perfmodel", "place", *choice.options(), "--pareto"])
page = "" if answer is None else f"\n\n{report.placing_page(answer, report.WIDTH)}"
frame.computed(command, f"{chosen}\n\nPolicies, and what follows from them:\n\n{place_command}{page}")


def record() -> str:
    """The prediction, and the answer where there is one, as JSON."""
    return json.dumps({"prediction": chosen.to_json(), "placing": answer and report.placing_json(answer)}, indent=2)


def page_of() -> str:
    """The report that `predict --html` and `place --html` write, in one."""
    drawn = [*figures.prediction_figures(curves, chosen), *(figures.placing_figures(answer) if answer else [])]
    words = report.placing_page(answer, report.WIDTH) if answer else str(chosen)
    return figures.html_page(f"Where the experts of {shape.name} should live", words, drawn)


frame.downloads("placement", csv=lambda: curve_rows(curves).write_csv(), json=record, html=page_of)
