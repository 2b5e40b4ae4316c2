"""Schedules: bulk, chunked and fused expert-parallel layers, predicted; measured beside predicted; maps of experts."""

import json
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import frame
import polars as pl
import streamlit as st

from perfmodel import figures, hardware, moe, report, text
from perfmodel.balance import Comparison, compare, predicted_times, steps_of
from perfmodel.ep_capture import load_ep_capture, shipped_ep_captures
from perfmodel.errors import InputError
from perfmodel.hf_config import resolve
from perfmodel.model_memory import model_memory
from perfmodel.offload import ACCESS_MODES
from perfmodel.placement.staircase import spread_speeds
from perfmodel.predict import basis_of
from perfmodel.routing import PATTERNS, Recording
from perfmodel.schedule import DEFAULTS
from perfmodel.schedule.asked import memory_notes, possible_schedules, question_of
from perfmodel.schedule.captured import Beside, set_beside, summary
from perfmodel.schedule.curves import BATCHES, EXPONENT, EXPONENTS, TOKENS, Curve, curve_of, point
from perfmodel.schedule.drawn import scheduled
from perfmodel.schedule.pictured import Picture, picture
from perfmodel.schedule.question import Question
from perfmodel.schedule.what_if import cited

N_DRAWN = 4  # GPUs in the picture unless all are asked for
MANY_GPUS = 32  # from here on a simulation takes about a second, and curves are drawn when asked for
CAPACITY = {"to the fullest": 0.0, "none": None, "1": 1.0, "1.25": 1.25, "1.5": 1.5, "2": 2.0}
N_STEPS, N_WINDOW = 24, 16  # of a routing over steps, and those of them that maps are made from
BY_RANK = ("uniform", "power-law", "zipf")  # whose experts are in the same order of popularity


class Ask(NamedTuple):
    """What the controls say: the key of what is cached, which holds nothing that a user brought."""

    model: str
    hardware: str
    n_gpus: int
    gpus_per_node: int | None
    n_tokens: int
    routing: str
    offload_frac: float
    access: str
    n_chunks: int
    capacity_factor: float | None

    @property
    def command(self) -> list[object]:
        """The command that gives the same numbers."""
        words: list[object] = ["perfmodel", "schedule", "--shape", self.model, "--hardware", self.hardware]
        words += ["--gpus", self.n_gpus, "--tokens", self.n_tokens, "--routing", self.routing]
        words += ["--gpus-per-node", self.gpus_per_node] if self.gpus_per_node else []
        words += ["--offload", self.offload_frac, "--access", self.access] if self.offload_frac else []
        words += ["--chunks", self.n_chunks] if self.n_chunks != DEFAULTS["chunked"].n_chunks else []
        if self.capacity_factor != DEFAULTS["bulk"].capacity_factor:
            words += ["--capacity-factor", "none" if self.capacity_factor is None else self.capacity_factor]
        return [*words, "--curves"]


@st.cache_resource(max_entries=256, show_spinner=False)
def asked(ask: Ask) -> Question:
    """The question that the controls ask."""
    overheads = {
        **DEFAULTS,
        "bulk": replace(DEFAULTS["bulk"], capacity_factor=ask.capacity_factor),
        "chunked": replace(DEFAULTS["chunked"], n_chunks=ask.n_chunks),
    }
    return question_of(
        hardware.hardware(ask.hardware),
        ask.model,
        ask.routing,
        ask.n_gpus,
        ask.n_tokens,
        gpus_per_node=ask.gpus_per_node,
        offload_frac=ask.offload_frac,
        access=ask.access,
        overheads=overheads,
    )


@st.cache_resource(max_entries=64, show_spinner="Simulating the layer")
def pictured(ask: Ask) -> Picture:
    """Its schedules side by side."""
    question = asked(ask)
    return picture(question, ask.routing, possible_schedules(question.profile))


@st.cache_data(max_entries=8192, show_spinner=False)
def point_of(ask: Ask, along: str, value: float) -> dict[str, float]:
    """One point of a curve."""
    question = asked(ask)
    return point(question, along, value, possible_schedules(question.profile))


@st.cache_resource(show_spinner="Reading the capture and predicting its steps")
def measured(name: str) -> Beside:
    """A shipped capture of an expert-parallel layer beside its prediction."""
    return set_beside(load_ep_capture(next(path for path in shipped_ep_captures() if path.name == name)))


def machines() -> list[str]:
    """Shipped profiles whose GPUs reach each other."""
    keys = ("peer_link_all_to_all_bytes_per_s", "peer_link_peak_bytes_per_s")
    return [name for name in hardware.names() if hardware.hardware(name).first(*keys)]


def choose() -> Ask:
    """The controls."""
    a, b, c, d, e = st.columns([3, 3, 2, 2, 3])
    models, able = moe.names(), machines()
    model = a.selectbox("Model", models, index=models.index("olmoe"), key="model", bind="query-params")
    machine = b.selectbox("Hardware", able, index=able.index("h100-sxm"), key="hardware", bind="query-params")
    shares = [n for n in (1, 2, 4, 8, 16, 32, 64) if resolve(model).n_experts % n == 0]
    n_gpus = c.selectbox("GPUs", shares, index=shares.index(8), key="gpus", bind="query-params")
    nodes = [0, *(n for n in shares if n < n_gpus)]
    per_node = d.selectbox(
        "GPUs in a node",
        nodes,
        key="node",
        bind="query-params",
        format_func=lambda n: str(n) if n else "default",
    )
    n_tokens = e.select_slider(
        "Tokens on each GPU", BATCHES, 4096, key="tokens", bind="query-params", format_func=text.count
    )
    a, b, c, d, e = st.columns([3, 3, 2, 2, 3])
    pattern = a.selectbox(
        "Routing", list(PATTERNS), index=list(PATTERNS).index("power-law"), key="routing", bind="query-params",
        help="How popular experts are; perfmodel list names the patterns.",
    )  # fmt: skip
    routing = pattern
    if PATTERNS[pattern].arguments:
        one = PATTERNS[pattern].arguments[0]
        default = 0.5 if pattern == "power-law" else float(one.default)
        value = b.number_input(
            "Its first parameter", float(one.least), float(one.most), default, 0.1,
            key=f"{pattern}-{one.name}", bind="query-params",
            help="An exponent of 0 is even; for other patterns see docs/routing.md.",
        )  # fmt: skip
        routing = f"{pattern}:{value:g}"
    capacity = c.selectbox(
        "Padding of bulk", list(CAPACITY), key="capacity", bind="query-params",
        help="Capacity of an expert: of the fullest, none, or a multiple of the even share, which drops the rest.",
    )  # fmt: skip
    n_chunks = d.selectbox("Chunks", (2, 4, 8, 16), index=1, key="chunks", bind="query-params")
    with e:
        left, right = st.columns(2)
    offloaded = left.slider("Offloaded", 0, 100, 0, 5, format="%d %%", key="offload", bind="query-params")
    access = right.selectbox(
        "Access", ACCESS_MODES, key="access", bind="query-params", disabled=not offloaded,
        help="How experts outside device memory are used.",
    )  # fmt: skip
    return Ask(
        model, machine, n_gpus, per_node or None, n_tokens, routing, offloaded / 100, access, n_chunks,
        CAPACITY[capacity],
    )  # fmt: skip


def show_picture(ask: Ask, found: Picture) -> Any:
    """What is fastest and why, where the time goes, who does what when; returns the place for curves between them."""
    best, last = found.ranked[0], found.ranked[-1]
    by_name = {one.schedule: one for one in found.breakdowns}
    notes = memory_notes(found.question, model_memory(ask.model), "offload them, or take more GPUs")
    frame.numbers(
        {
            "Fastest": f"{best.schedule}, {text.ns(best.latency_ns)}",
            f"Beside {last.schedule}": f"{last.latency_ns / best.latency_ns:.2f}x as fast",
            "Communication hidden": text.frac(by_name[best.schedule].hidden_frac),
            "Slowest GPU": f"GPU {by_name[best.schedule].gpu}",
            "Most loaded GPU": f"{found.max_over_mean:.2f}x the mean",
            "Memory": "does not fit" if notes else "fits",
        },
        {
            "Slowest GPU": "The one that computes longest under the fastest schedule: the bars show its time.",
            "Memory": "Of weights, workspace and staging, with what is offloaded left out; no KV cache is counted.",
        },
    )
    frame.literal("\n".join([f"{report.fastest_words(found)} {report.why_words(found)}", *notes]))
    left, right = st.columns([3, 2])
    with left:
        frame.chart(figures.stacked(found), f"Where the time goes. {report.fastest_words(found)}", key="bars")
    with right:
        head = ["", *(one.schedule for one in found.timelines)]
        frame.words_table(head, report.schedule_facts(found), "Schedules beside each other")
    between = st.container()
    has_all = ask.n_gpus <= N_DRAWN or st.toggle("Draw all GPUs", key="all", bind="query-params")
    panels = [scheduled(one) for one in found.timelines]
    figure = figures.gantt(panels, "Who does what when", n_most=figures.MAX_GPUS if has_all else N_DRAWN)
    frame.chart(figure, "What each GPU does when, by schedule", key="gantt")
    return between


def both_curves(ask: Ask) -> list[Curve]:
    """Speed-ups against batch and skew, each point simulated once; those that are left out show progress."""
    plain = ask._replace(routing="uniform") if ask.routing.partition(":")[0] in BY_RANK else ask
    asks = {TOKENS: ask._replace(n_tokens=BATCHES[0]), EXPONENT: plain}
    bar, n_all = st.progress(0.0, "Simulating other batches and skews"), len(BATCHES) + len(EXPONENTS)
    done = 0

    def find(along: str, value: float) -> dict[str, float]:
        nonlocal done
        found = point_of(asks[along], along, value)
        done += 1
        bar.progress(done / n_all, "Simulating other batches and skews")
        return found

    found = [curve_of(along, at, partial(find, along)) for along, at in ((TOKENS, BATCHES), (EXPONENT, EXPONENTS))]
    bar.empty()
    return found


def show_curves(ask: Ask, found: list[Curve]) -> None:
    """Both curves side by side, with where the fastest schedule changes in words."""
    pattern, _, value = ask.routing.partition(":")
    skew = {"uniform": 0.0, "power-law": float(value or 1)}.get(pattern)
    for column, curve, chosen in zip(st.columns(2), found, (float(ask.n_tokens), skew), strict=True):
        with column:
            words = report.stretch_words(curve)
            frame.chart(
                figures.speedup(curve, chosen), f"Speed-up over {curve.base}. {words}", key=f"curve-{curve.along}"
            )
            frame.literal(words)


def predicted_tab() -> None:
    """Any layer: what each schedule of it costs."""
    ask = choose()
    try:
        found = pictured(ask)
    except InputError as error:
        frame.refused("This layer cannot be simulated:", error)
        return
    with show_picture(ask, found):
        is_small = ask.n_gpus < MANY_GPUS
        drawn = is_small or st.toggle("Simulate other batches and skews (a minute)", key="curves", bind="query-params")
        curves = both_curves(ask) if drawn else []
        if curves:
            show_curves(ask, curves)
    question = found.question
    reasons = "\n".join(f"- {one}" for one in cited(question, [one.schedule for one in found.timelines]))
    words = f"{report.schedule_head(found)}\n\n{report.pictured_page(found, curves)}\n\n{reasons}"
    frame.computed(ask.command, words)
    content = {"pictured": found.to_json(), "curves": {one.along: one.to_json() for one in curves}}
    table = [
        {"schedule": one.schedule, "gpu": one.gpu, **{f"{k}_ns": v for k, v in one.parts.items()}}
        for one in found.breakdowns
    ]
    frame.downloads(
        "schedules",
        csv=pl.DataFrame(table, infer_schema_length=None).write_csv,
        json=lambda: json.dumps(content, indent=1),
        html=lambda: figures.html_page("Expert-parallel schedules", words, figures.schedule_figures(found, curves)),
    )


def measured_tab() -> None:
    """Shipped captures: what ranks did, beside what the model says of it."""
    names = [path.name for path in shipped_ep_captures()]
    a, b, c, d, e = st.columns([3, 3, 2, 2, 2])
    name = a.selectbox("Capture", names, key="capture", bind="query-params")
    found = measured(name)
    those = list(found.capture.measured)
    shape = b.selectbox("Shape", list(dict.fromkeys(one.shape for one in those)), key="shape", bind="query-params")
    those = [one for one in those if one.shape == shape]
    sizes = list(dict.fromkeys(one.tokens_per_gpu for one in those))
    n_tokens = c.selectbox("Tokens of a rank", sizes, key="rank-tokens", bind="query-params")
    those = [one for one in those if one.tokens_per_gpu == n_tokens]
    routings = list(dict.fromkeys(one.routing for one in those))
    routing = d.selectbox("Routing of tokens", routings, key="rank-routing", bind="query-params")
    ways = {one.way: one for one in those if one.routing == routing}
    one = ways[e.selectbox("Schedule", list(ways), key="way", bind="query-params")]
    number = found.capture.measured.index(one) + 1
    facts = summary(found).row(number - 1, named=True)
    frame.numbers(
        {
            "Measured step": text.ns(facts["measured_ns"]),
            "Predicted": text.ns(facts["predicted_ns"]),
            "Error": f"{100 * facts['error_frac']:+.0f} %",
            "Communication exposed": text.frac(facts["exposed_frac"]),
            "Beside bulk": None if facts["faster_than_bulk"] is None else f"{facts['faster_than_bulk']:.2f}x as fast",
        },
        {"Communication exposed": "Share of ranks' time in a collective under which they compute nothing, measured."},
    )
    frame.literal(report.miss_words(found, one))
    (gantt, gantt_alt), (bars, bars_alt) = figures.phase_figures([(found, one)])
    frame.chart(gantt, gantt_alt, key="steps")
    left, right = st.columns([3, 2])
    with left:
        frame.chart(bars, bars_alt, key="phases")
    with right:
        head, body = report.error_rows(found)
        table = pl.DataFrame(body, schema=dict.fromkeys(head, pl.String), orient="row")
        st.caption("Errors over all workloads of this capture")
        frame.rows(table, "Errors of the model over all workloads of the capture", 35 * (len(body) + 1) + 3)
    words = report.workload_page(found, one)
    frame.computed(["perfmodel", "phases", f"traces/{name}", "--workload", number], words)
    frame.downloads(
        f"{name}-{number}",
        csv=found.table.filter(workload=one.workload).write_csv,
        json=lambda: json.dumps(report.phases_json([found], [one]), indent=1, default=str),
        html=lambda: figures.html_page(
            "Expert-parallel layers, measured and predicted", words, figures.phase_figures([(found, one)])
        ),
    )


@st.cache_resource(max_entries=4, show_spinner="Drawing the routing of all steps")
def steps(model: str, routing: str, n_tokens: int) -> Recording:
    """The routing that maps are made from, which is the same for all GPUs."""
    return steps_of(routing, resolve(model), n_tokens, N_STEPS)


@st.cache_resource(max_entries=32, show_spinner="Making maps of experts and judging them")
def maps(
    model: str, machine: str, routing: str, n_gpus: int, n_tokens: int, spread_frac: float
) -> tuple[Comparison, str, dict[str, Any]]:
    """What each policy makes of the routing: the comparison, its page, its JSON."""
    shape = resolve(model)
    recording = steps(model, routing, n_tokens)
    basis = basis_of(hardware.hardware(machine), shape, None)
    speeds = spread_speeds(n_gpus, spread_frac)
    staircase, by_rows = predicted_times(basis, shape, speeds, recording)
    found = compare(recording.loads, staircase, n_model_layers=shape.n_layers, n_window=N_WINDOW, by_rows=by_rows)
    told = (staircase, recording, shape.name, f"no fitted model on {machine}")
    return found, report.balance_page(found, *told), report.balance_json(found, *told)


def maps_tab() -> None:
    """Which GPU should hold which expert, so that none is waited for."""
    a, b, c, d, e, f = st.columns([3, 2, 3, 2, 2, 3])
    models, able = moe.names(), machines()
    model = a.selectbox("Model of the experts", models, models.index("olmoe"), key="map-model", bind="query-params")
    machine = b.selectbox("GPU", able, able.index("h100-sxm"), key="map-hardware", bind="query-params")
    routing = c.selectbox(
        "Routing over steps", ("layered", "temporal", "skewed-temporal", "power-law", "uniform"), key="map-routing",
        bind="query-params", help="The first three differ by layer; temporal ones have experts that come and go.",
    )  # fmt: skip
    shares = [n for n in (2, 4, 8, 16, 32) if resolve(model).n_experts % n == 0]
    n_gpus = d.selectbox("GPUs of a layer", shares, shares.index(8), key="map-gpus", bind="query-params")
    n_tokens = e.selectbox("Tokens of a step", (256, 1024, 4096, 16384), 2, key="map-tokens", bind="query-params")
    spread = f.slider("Fastest GPU faster by", 0, 30, 0, 5, format="%d %%", key="map-spread", bind="query-params")
    try:
        found, page, content = maps(model, machine, routing, n_gpus, n_tokens, spread / 100)
    except InputError as error:
        frame.refused("Experts cannot be mapped like this:", error)
        return
    frame.literal(
        f"{found.outcomes[found.best].policy} is best. Routed experts alone; a step waits for its slowest GPU."
    )
    for column, (figure, alt) in zip(st.columns(2), figures.balance_figures(found), strict=True):
        with column:
            frame.chart(figure, alt)
    words = ["perfmodel", "balance", "--routing", routing, "--shape", model, "--gpus", n_gpus, "--tokens", n_tokens]
    words += ["--steps", N_STEPS, "--window", N_WINDOW, "--hardware", machine]
    words += ["--spread", f"{spread}%"] if spread else []
    frame.computed(words, page)
    frame.downloads(
        "expert-maps",
        json=lambda: json.dumps(content, indent=1),
        html=lambda: figures.html_page("Experts over GPUs", page, figures.balance_figures(found)),
    )


frame.header("Schedules", "Which schedule of an expert-parallel layer is fastest, and why?")
tabs = st.tabs(["Predicted", "Measured", "Expert maps"], key="tab", bind="query-params")
for tab, show in zip(tabs, (predicted_tab, measured_tab, maps_tab), strict=True):
    if tab.open:
        with tab:
            show()
