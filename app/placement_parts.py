"""The tabs of the Placement view: policies, memory, routing, editing a placement and exporting it."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import frame
import numpy as np
import placement_controls as controls
import polars as pl
import streamlit as st
import uploads
from placement_controls import Choice, Files

from perfmodel import figures, report, text
from perfmodel.errors import InputError
from perfmodel.placement import RESIDENT, TIERS, Tiers, place
from perfmodel.placement.export import FORMATS, archive, export
from perfmodel.placement.files import (
    PlacedModel,
    placement_csv,
    placement_json,
    read_placement,
    read_placement_csv,
)
from perfmodel.placement.memory import Memory
from perfmodel.placing import TO_COMPARE
from perfmodel.placing.answers import Answer, trade_off
from perfmodel.placing.ask import handed_over, passes_in_words
from perfmodel.placing.compare import Outcome, evaluated
from perfmodel.placing.question import Question

UPLOAD_MB = 20  # of a placement
N_KEPT = 6  # answers that a session keeps
Asked = tuple[Choice, int]  # a question: what was chosen, and which of its batch sizes


@st.cache_resource(max_entries=4, show_spinner="Comparing policies")
def _at_once(choice: Choice) -> Answer:
    """The answer to the question that the view opens with, which takes a second."""
    found: Answer = controls.case(choice, files={}).answer(choice.sizes[0], is_pareto=True)
    return found


def kept() -> dict[Asked, Answer]:
    """The answers that this session has, the newest last."""
    found: dict[Asked, Answer] = st.session_state.setdefault("placement-answers", {})
    return found


def keep(asked: Asked, answer: Answer) -> None:
    """Keep an answer, and forget the oldest beyond N_KEPT."""
    answers = kept()
    answers.pop(asked, None)
    answers[asked] = answer
    while len(answers) > N_KEPT:
        answers.pop(next(iter(answers)))


def answer_of(asked: Asked, is_opening: bool) -> Answer | None:
    """The answer to a question, if it was computed; that to the opening question is."""
    if is_opening and asked not in kept():
        keep(asked, _at_once(asked[0]))
    return kept().get(asked)


def facts(pairs: list[tuple[str, str]]) -> None:
    """Words and what they say, small, one below the other."""
    for word, what in pairs:
        left, right = st.columns([2, 5])
        left.caption(frame.escaped(word))
        right.caption(frame.escaped(what))


def _with_progress(begin: str, work: Callable[[Callable[[str], None]], Answer]) -> Answer | None:
    """Do long work and say how far it is; None where it cannot be done, which is said."""
    with st.status("Working ...") as status:
        status.update(label=frame.escaped(begin))
        try:
            found = work(lambda words: status.update(label=frame.escaped(words)) if words else None)
        except InputError as error:
            status.update(label="This cannot be computed", state="error", expanded=True)
            frame.literal(error)
            return None
        status.update(label="Done", state="complete", expanded=False)
        return found


def policies(asked: Asked, answer: Answer | None, files: Files) -> None:
    """Policies side by side: a button to compare them, then bars, what to make of it, and the table."""
    choice, n_asked = asked
    if answer is None:
        st.caption(
            "Published policies and the best placement that can be found, judged on steps that none of them has seen. "
            "It takes seconds for small models, up to a minute for the largest."
        )
        if st.button("Compare policies", type="primary", icon=":material/play_arrow:"):
            case = controls.case(choice, files=files)
            found = _with_progress(
                "Drawing the steps ...", lambda told: case.answer(choice.sizes[n_asked], progress=told)
            )
            if found is not None:
                keep(asked, found)
                st.rerun()
        if not kept():
            return
        (old, n_old), answer = list(kept().items())[-1][0], list(kept().values())[-1]
        st.warning("The question has changed since: this is the answer to the one before.", icon=":material/history:")
        frame.literal(" ".join([*old.options(), f"({passes_in_words(old.sizes[n_old])})"]))
    left, right = st.columns([3, 2])
    with left:
        frame.chart(figures.policies(answer.outcomes, answer.best), "The slowdown of each policy", key="policies")
    with right:
        facts([*report.labelled(report.verdict_lines(answer)), ("steps", answer.windows)])
    head, body = report.policy_rows(answer)
    marked = [[f"{row[0]} (taken)" if row[0] == answer.best.policy else row[0], *row[1:]] for row in body]
    frame.words_table(head, marked, "Policies and what they cost, the fastest first")
    if answer.accesses:
        ways = [[name, f"{one.slowdown:.3f}x"] for name, one in answer.accesses.items()]
        frame.words_table(["access, the best placement of each", "slowdown"], ways, "Access modes")


def memory(asked: Asked, answer: Answer | None, notes: list[str]) -> None:
    """GPU memory against slowdown, and how the memory for experts came about."""
    if answer is None:
        st.info("Compare policies first, in the tab Policies: the trade-off is that of the policy that is taken.")
    elif not answer.trade_off:
        st.caption("Slowdown by GPU memory, from as few resident experts as the host has room for to all of them.")
        if st.button("Trace the trade-off", type="primary", icon=":material/play_arrow:"):
            done = answer

            def work(told: Callable[[str], None]) -> Answer:
                return replace(done, trade_off=trade_off(done.question, done.best.policy, told))

            found = _with_progress("Placing with less memory ...", work)
            if found is not None:
                keep(asked, found)
                st.rerun()
    else:
        left, right = st.columns([3, 2])
        with left:
            frame.chart(figures.trade_off_of(answer), "GPU memory for experts against slowdown", key="trade-off")
        with right:
            rows = [
                [text.n_bytes(p.capacity_bytes), f"{p.n_resident}", f"{p.n_offloaded}", f"{p.slowdown:.3f}x"]
                for p in answer.trade_off
            ]
            frame.words_table(["GPU memory", "resident", "offloaded", "slowdown"], rows, "Slowdown by GPU memory")
    facts([("memory", "; ".join(notes))])


def routing(choice: Choice, files: Files) -> None:
    """How the router spreads tokens: use by layer and expert, and how concentrated it is."""
    recorded = controls.recording(choice, files)
    left, right = st.columns([3, 2])
    with left:
        order = st.segmented_control(
            "Experts by", ["rank", "id"], default="rank", required=True, key="order", bind="query-params"
        )
        drawn = figures.routing_map(recorded.shares, recorded.layers.tolist(), is_ranked=order == "rank")
        frame.chart(drawn, "How often each expert of each layer is used", key="routing-map")
    with right:
        frame.chart(
            figures.coverage(recorded.shares), "Share of assignments of the hottest experts", key="routing-coverage"
        )
    frame.literal("; ".join([f"{recorded.name}: {text.counted(len(recorded.loads), 'step')}", *recorded.notes]))


def edit(asked: Asked, answer: Answer | None, mode: str, offload_frac: float, files: Files) -> None:
    """Change where single experts live, see what that costs, and hand the placement to an engine."""
    choice, n_asked = asked
    case = controls.case(choice, files=files)
    access = answer.question.access if answer else (mode if choice.access == "auto" else choice.access)
    question, windows = controls.question(choice, access, n_asked, files=files)
    bases = {"least used leave": None} | ({one.policy: one for one in _choosable(answer)} if answer else {})
    name = st.selectbox(
        "Begin with",
        list(bases),
        index=len(bases) - 1,
        key="begin",
        help="A policy that was compared, or the least used experts of each layer leaving.",
    )
    base = bases[name]
    tier = _least_used_leave(question, offload_frac) if base is None else base.tier
    _editor((asked, name), question, case, tier, windows, name)


def _choosable(answer: Answer) -> list[Outcome]:
    """The outcomes that are placements, ours last."""
    found = [one for one in answer.outcomes if one.policy not in TO_COMPARE]
    return [*(one for one in found if one is not answer.best), answer.best]


def _least_used_leave(question: Question, offload_frac: float) -> Tiers:
    away = place(question.popularity, offload_frac).offloaded
    return np.where(away, question.tiers[1], RESIDENT).astype(np.int8)


@st.fragment
def _editor(key: Any, question: Question, case: Any, base: Tiers, windows: str, name: str) -> None:
    """The table of one layer's experts, and what the placement costs before and after."""
    state = st.session_state.setdefault("placement-edit", {})
    if state.get("key") != key:
        state.clear()
        state.update(key=key, tier=base.copy(), layer=None, turn=state.get("turn", 0) + 1)
    layers = [int(layer) for layer in case.recording.layers]
    left, right = st.columns([2, 3])
    with left:
        layer = st.selectbox("Layer", layers, key="edit-layer", bind="query-params") if len(layers) > 1 else layers[0]
        row = layers.index(layer)
        if state["layer"] != row:  # the table begins with what the layer is now
            state.update(layer=row, turn=state["turn"] + 1, shown=state["tier"][row].copy())
        names = [TIERS[number] for number in question.tiers]
        table = pl.DataFrame(
            {
                "expert": np.arange(question.shape.n_experts),
                "load": question.popularity[row] * 100,
                "tier": [TIERS[number] for number in state["shown"]],
            }
        )
        edited = st.data_editor(
            table,
            key=f"editor-{state['turn']}",
            width="stretch",
            height=360,
            hide_index=True,
            num_rows="fixed",
            disabled=["expert", "load"],
            column_config={
                "load": st.column_config.ProgressColumn(
                    "share of load", format="%.2f%%", min_value=0, max_value=float(question.popularity[row].max() * 100)
                ),
                "tier": st.column_config.SelectboxColumn("tier", options=names, required=True),
            },
            alt="The experts of a layer, what share of its load each has and where it lives",
        )
        chosen = edited["tier"].to_list()
        if len(chosen) == question.shape.n_experts and set(chosen) <= set(names):
            state["tier"][row] = [TIERS.index(word) for word in chosen]
        else:
            st.error("That is no tier of this question; the table was not taken.")
    with right:
        _difference(question, case, base, state, windows, name, layers)


def _difference(
    question: Question, case: Any, base: Tiers, state: dict[str, Any], windows: str, name: str, layers: list[int]
) -> None:
    tier = state["tier"].copy()
    before = evaluated(question, name, base, None)
    after = before if np.array_equal(tier, base) else evaluated(question, "edited", tier, None)
    used = int((tier == RESIDENT).sum()) * question.shape.expert_bytes
    fits = Memory(question.size_bytes, question.budgets, len(question.tiers)).fits(_positions(question, tier))
    frame.numbers(
        {
            "Before": f"{before.slowdown:.3f}x",
            "After": f"{after.slowdown:.3f}x",
            f"GPU memory of {text.n_bytes(question.capacity_bytes)}": text.n_bytes(used),
        }
    )
    frame.literal("\n".join(report.change_lines(question, before, after, layers)))
    policy = name.replace(" ", "-") if after is before else "edited"
    placed = handed_over(question, case.recording, case.memory, tier, policy, outcome=after, windows=windows)
    if not fits:
        st.error("This placement does not fit the memory: move experts off the GPU, or raise the budget.")
    else:
        _export(question, case, placed)
    _import(state, placed)


def _positions(question: Question, tier: Tiers) -> Tiers:
    position = np.zeros(len(TIERS), dtype=np.int8)
    position[list(question.tiers)] = np.arange(len(question.tiers))
    return np.asarray(position[tier])


def _export(question: Question, case: Any, placed: PlacedModel) -> None:
    """The placement as files: our own, and those of serving engines with what to know of them."""
    form = st.selectbox(
        "Export for", list(FORMATS), index=list(FORMATS).index("sglang"), key="format", bind="query-params"
    )
    with st.container(horizontal=True):
        st.download_button(
            "Placement JSON", lambda: placement_json(placed), "placement.json", on_click="ignore", key="placement-json"
        )
        st.download_button(
            "Placement CSV", lambda: placement_csv(placed), "placement.csv", on_click="ignore", key="placement-csv"
        )
        try:
            if len(placed.layers) != question.shape.n_layers:
                raise InputError(
                    f"an engine needs all {question.shape.n_layers} layers, {case.recording.name} has "
                    f"{len(placed.layers)}; the JSON and CSV files hold those"
                )
            made = export(form, placed, question.popularity, "placement")
        except InputError as error:
            made = None
            refusal = error
        if made is not None:
            file, content = archive(made, "placement")
            st.download_button(
                "Export for the engine", content, file, type="primary", on_click="ignore", key="export-engine"
            )
    if made is None:
        frame.refused("This cannot be exported:", refusal)
        return
    if made.flags:
        st.code("\n".join(made.flags), language=None, wrap_lines=True)
    kept_words = [] if made.rounding is None else [made.rounding.words()]
    frame.literal("\n".join(dict.fromkeys([*made.warnings, *kept_words])))


def _import(state: dict[str, Any], placed: PlacedModel) -> None:
    """A placement from a file takes the place of the one that is edited."""
    with st.expander("Take a placement from a file"):
        file = st.file_uploader(
            "Placement .json, or .csv of layer, expert and tier",
            key="placement-upload",
            type=["json", "csv"],
            max_upload_size=UPLOAD_MB,
        )
        if file is None:
            return
        digest = hashlib.sha256(file.getvalue()).hexdigest()
        if state.get("taken") == digest:
            st.caption("Taken.")
            return
        try:
            found = _read(file, placed)
        except InputError as error:
            frame.refused("This placement cannot be taken:", error)
            return
        state.update(tier=found.placement.tier.astype(np.int8), layer=None, taken=digest)
        st.rerun()


def _read(file: Any, placed: PlacedModel) -> PlacedModel:
    with uploads.saved_file(file) as path:
        found = read_placement_csv(path, placed) if path.suffix == ".csv" else read_placement(path)
    if found.layers != placed.layers or found.shape.n_experts != placed.shape.n_experts:
        raise InputError(
            f"{file.name} places {len(found.layers)} layers of {found.shape.n_experts} experts, the question has "
            f"{len(placed.layers)} of {placed.shape.n_experts}, or other layers of the model"
        )
    return found
