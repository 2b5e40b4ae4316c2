"""The parts of the Trace view: each shows one side of a trace, and computes what it needs when it is opened."""

import json
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import frame
import polars as pl
import streamlit as st
from trace_cache import compared, drawn, fused, grouped, joined, passes, waited, windows
from uploads import Loaded

from perfmodel import bound, figures, fusion, launch, report, text
from perfmodel.analysis import Analysis
from perfmodel.errors import InputError
from perfmodel.groups import GROUPINGS
from perfmodel.perfetto import export_perfetto
from perfmodel.readers.sweeps import PUBLISHED, read_sweeps
from perfmodel.timeline import typical_step, whole_window
from perfmodel.waits import MEMBER

WIDTH = 140  # letters of a line of words on the page
UNBROKEN = 4000  # of sentences, whose lines the page breaks
METRICS = {
    "tklqt_ns": "TKLQT",
    "kernel_time_ns": "Kernel time",
    "gpu_busy_ns": "Device busy time",
    "gpu_idle_ns": "Device idle time",
    "queue_ns": "Queueing",
    "launch_call_ns": "Host time in launch calls",
}


def summary(one: Loaded, traces: list[Loaded]) -> None:
    """What was read, what was found, the numbers that matter, and where device time (or the host's) goes."""
    found, metrics = one.analysis, one.analysis.metrics
    of_layers = passes(one.digest, found)
    if metrics.n_kernels:
        _device_numbers(found)
    else:
        _host_numbers(one)
    if found.findings:
        frame.literal(report.findings_text(found.findings[:3], UNBROKEN))
    left, right = st.columns(2)
    with left:
        if metrics.devices:
            frame.chart(figures.busy(metrics), "Busy and idle time of each device", key="busy")
        elif not isinstance(of_layers, str):
            frame.chart(figures.pass_parts(of_layers), "What the passes of MoE layers are made of", key="passes")
        else:
            title = "Host time by range, with what it contains"
            frame.chart(figures.shares(found.ranges, "name", "time_ns", title), title, key="ranges")
    with right:
        if metrics.n_kernels:
            title = "Kernel time by class"
            frame.chart(figures.shares(found.classes, "class", "time_ns", title), title, key="classes")
        else:
            frame.chart(figures.host_time(found), "The operators that take most time of the host themselves")
    frame.literal(report.coverage_text(found, one.name, WIDTH))
    if len(found.findings) > 3:
        with st.expander("More findings"):
            frame.literal(report.findings_text(found.findings[3:], UNBROKEN))
    _ends("summary", _analyze(one), report.trace_page(found, one.name), found.steps)


def _device_numbers(found: Analysis) -> None:
    metrics = found.metrics
    frame.numbers(
        {
            "Bound": found.bound.label,
            "TKLQT": text.ns(metrics.tklqt_ns),
            "Median launch delay": text.ns(metrics.delay_median_ns),
            "GPU idle": text.frac(metrics.gpu_idle_frac),
            "Average kernel": text.ns(metrics.akd_ns),
            "Inference latency": text.ns(metrics.inference_latency_ns),
        },
        {
            "Bound": found.bound.reason,
            "TKLQT": "Total kernel launch and queueing time: kernel start minus start of its launch call, summed over "
            "kernels. It is not wall time: kernels of one queue wait at the same time.",
            "GPU idle": "Of the time from the first to the last work of each device.",
            "Inference latency": "From the first operator to the end of the last kernel.",
        },
    )


def _host_numbers(one: Loaded) -> None:
    found = one.analysis
    first, last = whole_window(found.trace.events) if found.trace.events.height else (0, 0)
    of_layers = passes(one.digest, found)
    median = None if isinstance(of_layers, str) else text.ns(of_layers.medians()["dur_ns"])
    ranks = found.trace.events["rank"].drop_nulls().n_unique()
    frame.numbers(
        {
            "From first to last event": text.ns(last - first),
            "Operator calls": text.count(int(found.host_operators["n_calls"].sum())),
            "Named ranges": text.count(int(found.ranges["n_calls"].sum())),
            "Ranks": text.count(ranks) if ranks else None,
            "Median MoE layer pass": median,
        }
    )
    st.caption("No kernels were recorded: times are those of the host, and there are no launch delays.")
    if not isinstance(of_layers, str):
        frame.literal(report.pass_words(of_layers, width=UNBROKEN))
    by_step, _ = waited(one.digest, found)
    late = by_step.group_by(MEMBER).agg(pl.sum("wait_ns", "caused_ns")).sort("caused_ns", descending=True)
    if late.height > 1 and late["caused_ns"][0]:
        frame.literal(
            f"The others wait for rank {late['rank'][0]} in collectives: it costs them "
            f"{text.ns(late['caused_ns'][0])} of {text.ns(int(late['wait_ns'].sum()))} waited in all."
        )


def step(one: Loaded, traces: list[Loaded]) -> None:
    """One step, or the whole trace, as lines of threads and streams."""
    found = one.analysis
    if found.trace.events.is_empty():
        st.info("This trace has no events, so there is nothing to draw.")
        return
    steps = windows(one.digest, found)
    left, right = st.columns([2, 3])
    with left:
        row = _chosen_step(steps)
    start, end = right.slider(
        "Part of it, in per cent",
        0.0,
        100.0,
        (0.0, 100.0),
        step=0.5,
        key="window",
        bind="query-params",
        help="A shorter part shows short events one by one.",
    )
    if row is None:
        title, (first_ns, last_ns) = "The whole trace", whole_window(found.trace.events)
    else:
        rank = "" if row["rank"] is None else f"rank {row['rank']} "
        first_ns, last_ns = row["start_ns"], row["end_ns"]
        title = f"{rank}{row['name']} ({text.ns(last_ns - first_ns)})"
    length_ns = last_ns - first_ns
    start_ns = first_ns + int(length_ns * min(start, 99.5) / 100)
    end_ns = max(first_ns + int(length_ns * end / 100), start_ns + 1)
    shown = drawn(one.digest, start_ns, end_ns, found)
    frame.chart(figures.lines_and_bars(shown, title), "What every thread and stream did, from left to right")
    frame.literal("\n".join(shown.notes) or "Every event of the window is a bar of its own.")
    if found.metrics.n_kernels_joined:
        st.caption(
            "Arrows run from the start of a launch call to the start of its kernel: the longest delay in each twelfth "
            "of the window. Steep: the kernel began at once. Flat: it queued behind others."
        )
    _ends("bars", _analyze(one, "--html", "report.html"), "", shown.bars)


def _chosen_step(steps: pl.DataFrame) -> dict[str, Any] | None:
    """The step that the user chose, by its number; null for the whole trace."""
    if steps.is_empty():
        st.caption("No steps: a trace has them where the profiler marks them, or where an outermost range repeats.")
        return None
    if st.session_state.get("step", 0) >= steps.height:  # of a trace that had more of them
        del st.session_state["step"]
    number, every = st.columns([2, 1], vertical_alignment="bottom")
    chosen = number.number_input(
        "Step, counted from 0",
        0,
        steps.height - 1,
        typical_step(steps),
        key="step",
        bind="query-params",
        help="Steps are ProfilerStep ranges, else the outermost range that repeats. "
        "The step of median length comes first.",
    )
    whole_trace = every.toggle("Whole trace", key="whole", bind="query-params")
    return None if whole_trace else steps.row(int(chosen), named=True)


def launches(one: Loaded, traces: list[Loaded]) -> None:
    """Launch metrics as a whole and of groups, the distribution of delays, and what the host did in idle gaps."""
    found = one.analysis
    if not found.metrics.n_kernels:
        st.info("No kernels were recorded, so there are no launches to look at. Open a trace of a GPU.")
        return
    left, right = st.columns(2)
    by = left.selectbox("Group by", GROUPINGS, index=GROUPINGS.index("stream"), key="by", bind="query-params")
    metric = right.selectbox("Show", list(METRICS), format_func=METRICS.__getitem__, key="metric", bind="query-params")
    table = grouped(one.digest, by, found)
    words = METRICS[metric]
    left, right = st.columns(2)
    with left:
        frame.chart(figures.groups(table, by, metric, words), "A launch metric of each group", key="groups")
    with right:
        counts = launch.delay_counts(joined(one.digest, found))
        frame.chart(figures.delays(counts), "The distribution of launch delays", key="delays")
    frame.rows(table, "Launch metrics of each group; times in microseconds")
    left, right = st.columns(2)
    with left:
        if found.gaps["launch_ns"].count():
            frame.chart(figures.idle_reasons(found.gaps), "What the host did while devices were idle", key="gaps")
    with right:
        st.caption("Launch calls")
        frame.rows(found.launch_calls, "Launch calls and what they cost the host")
    _ends("launches", _analyze(one, "--by", by), "", table)


def kernels(one: Loaded, traces: list[Loaded]) -> None:
    """Kernel time and launch tax by kernel, by class and by operator; on a host its operators and ranges."""
    found = one.analysis
    left, right = st.columns(2)
    if found.metrics.n_kernels:
        with left:
            title = "Device time by kernel"
            frame.chart(figures.shares(found.kernels, "name", "time_ns", title), title, key="kernels")
        with right:
            title = "Launch tax: TKLQT by kernel"
            if found.metrics.n_kernels_joined:
                frame.chart(figures.shares(found.kernels, "name", "tklqt_ns", title), title, key="tax")
            else:
                st.info("No kernel could be joined to its launch call, so no launch tax is known.")
        st.caption("Kernels, costliest first")
        frame.rows(found.kernels, "Kernels, costliest first; times in microseconds", height=300)
        st.caption("Operators, by time of the kernels that they launched")
    else:
        with left:
            frame.chart(figures.host_time(found), "The operators that take most time of the host themselves")
        with right:
            title = "Host time by range, with what it contains"
            frame.chart(figures.shares(found.ranges, "name", "time_ns", title), title, key="ranges")
        st.caption("Operators, by time of the host without what they call")
    frame.rows(found.operators, "Operators; times in microseconds", height=300)
    table = found.kernels if found.metrics.n_kernels else found.operators
    _ends("kernels", _analyze(one, "--json"), "", table)


def chains(one: Loaded, traces: list[Loaded]) -> None:
    """Which chains of kernels always run together, and what fusing them would save at best."""
    found = one.analysis
    if not found.metrics.n_kernels:
        st.info("No kernels were recorded, so there are no chains of kernels to fuse. Open a trace of a GPU.")
        return
    left, right = st.columns(2)
    length = left.select_slider("Kernels in a chain", fusion.SHORT_LENGTHS, key="length", bind="query-params")
    threshold = right.slider(
        "Least proximity score",
        0.1,
        1.0,
        1.0,
        step=0.1,
        key="score",
        bind="query-params",
        help="How often the chain follows when its first kernel runs; 1 is always.",
    )
    by_length, listed = fused(one.digest, length, threshold, found)
    frame.chart(figures.fusion(by_length), "Ideal speed-up by chain length")
    st.caption(
        "Ideal: every launch costs the same, and fusing changes nothing else. It says most where the host is the bound."
    )
    label = found.bound.label or "not known to be bound by either"
    frame.literal(f"This trace is {label}: {found.bound.reason}.")
    words = [[" -> ".join(text.shortened(name, 40) for name in row["names"]), row["n_chains"], row["score"]]
             for row in listed.head(frame.N_ROWS).iter_rows(named=True)]  # fmt: skip
    schema = {"chain": pl.String, "times": pl.Int64, "score": pl.Float64}
    shown = pl.DataFrame(words, schema=schema, orient="row")
    frame.rows(shown, "Chains of kernels, most frequent first")
    command = ["perfmodel", "fusion", one.name, "--lengths", length, "--threshold", f"{threshold:g}"]
    _ends("fusion", command, report.fusion_page(by_length, listed, one.name), by_length)


def copies(one: Loaded, traces: list[Loaded]) -> None:
    """What was copied and communicated, how fast, and how much of it compute did not hide."""
    found = one.analysis
    if not found.metrics.devices:
        st.info("No device work was recorded, so there are no copies to look at. Open a trace of a GPU.")
        return
    beside = found.exposed.select(pl.sum("copy_busy_ns") + pl.sum("communication_busy_ns")).item()
    if beside:
        frame.chart(figures.exposed(found.exposed), "Copies and communication, hidden under compute and exposed")
    else:
        st.info("The devices neither copied nor communicated.")
    frame.rows(found.exposed, "Copies and communication of each device; times in microseconds")
    if found.copies.height:
        st.caption("Copies and sets by direction and kind of memory")
        frame.rows(found.copies, "Copies and sets; times in microseconds, rates in bytes per second")
    _ends("copies", _analyze(one, "--json"), "", found.copies)


def ranks_and_layers(one: Loaded, traces: list[Loaded]) -> None:
    """How ranks compare, who waits for whom, and what passes of MoE layers are made of."""
    found = one.analysis
    words = []
    of_ranks = one.ranks
    if of_ranks is not None and of_ranks.ranks["n_kernels"].sum():
        for figure, alt in figures.ranks_figures(of_ranks):
            frame.chart(figure, alt, key="ranks")
        page = report.ranks_page(of_ranks)
        frame.literal(page.split("\n\n")[1])
        frame.rows(of_ranks.ranks, "Figures of each rank; times in microseconds")
        words.append(f"{shlex.join(['perfmodel', 'analyze', one.name])}\n\n{page}")
    by_step, notes = waited(one.digest, found)
    of_layers = passes(one.digest, found)
    if by_step.select(*MEMBER).unique().height > 1:
        frame.chart(figures.waits(by_step), "How long each rank waited for others in collectives, and others for it")
        if notes:
            frame.literal("\n".join(notes))
    if isinstance(of_layers, str):
        frame.literal(f"Passes of MoE layers: {of_layers}.")
    else:
        frame.literal(report.pass_words(of_layers, width=UNBROKEN))
        frame.chart(figures.pass_parts(of_layers), "What the passes of MoE layers are made of")
        frame.literal("\n".join(of_layers.notes))
        frame.rows(of_layers.passes, "Passes of MoE layers; times in microseconds")
        words.append(report.passes_page(of_layers, one.name))
    table = by_step if isinstance(of_layers, str) else of_layers.passes
    _ends("layers", ["perfmodel", "layers", one.name], "\n\n".join(reversed(words)), table)


def pairs(one: Loaded, traces: list[Loaded]) -> None:
    """What changed from one trace to another, by kernel class and operator."""
    others = [other for other in traces if other.digest != one.digest]
    if not others:
        st.info("Open a second trace above to compare it with this one: before and after a change, say.")
        return
    i = st.selectbox(
        "Compare with", range(len(others)), format_func=lambda i: others[i].name, key="other", bind="query-params"
    )
    other = others[i or 0]
    found = compared(one.digest, other.digest, one.analysis, other.analysis)
    frame.literal(f"a: {one.name}\nb: {other.name}")
    for column, (figure, alt) in zip(st.columns(2), figures.diff_figures(found), strict=False):
        with column:
            frame.chart(figure, alt)
    page = report.diff_page(found, (one.name, other.name))
    frame.rows(found.metrics, "Launch metrics of both; times in microseconds")
    _ends("diff", ["perfmodel", "diff", one.name, other.name], page, found.operators)


def batches(one: Loaded, traces: list[Loaded]) -> None:
    """From which batch size on the device is the bound, over the traces that are open; else a published sweep."""
    with_kernels = [each for each in traces if each.analysis.metrics.n_kernels_joined]
    if len(with_kernels) < 2:
        st.info(
            "Open traces of at least two batch sizes above to see TKLQT against batch size. "
            "Until then: BERT on a GH200, read off figure 6 of arXiv 2504.11750."
        )
        batch_sizes, metrics = read_sweeps(PUBLISHED)[""]
        found = bound.sweep(batch_sizes, metrics)
        command: list[object] = ["perfmodel", "sweep", f"perfmodel/data/published/{PUBLISHED.name}"]
    else:
        guessed = pl.DataFrame(
            {
                "trace": [each.name for each in with_kernels],
                "batch": [bound.batch_in_name(each.name) for each in with_kernels],
            },
            schema={"trace": pl.String, "batch": pl.Int64},
        )
        st.caption("The batch size of each trace; guessed from its name where that tells one.")
        edited = st.data_editor(
            guessed,
            key="batches " + " ".join(each.digest for each in with_kernels),
            disabled=["trace"],
            hide_index=True,
            column_config={"batch": st.column_config.NumberColumn("batch", min_value=1, step=1)},
        )
        known = [(batch, each) for batch, each in zip(edited["batch"], with_kernels, strict=True) if batch]
        if len(known) < 2:
            st.info("Give the batch size of at least two traces in the table.")
            return
        try:
            found = bound.sweep([int(batch) for batch, _ in known], [each.analysis.metrics for _, each in known])
        except InputError as error:
            frame.refused("These batch sizes make no sweep:", error)
            return
        command = ["perfmodel", "sweep", *(f"{batch}={each.name}" for batch, each in known)]
    frame.chart(figures.sweep(found), "TKLQT against batch size, with the transition marked")
    _ends("sweep", command, report.sweep_page(found), found.table)


def whole(one: Loaded) -> None:
    """Downloads of the whole trace: everything as JSON, a report, and a file for a viewer of traces."""
    st.caption("All of this trace: every table, a report that works offline, and a file for ui.perfetto.dev:")
    frame.downloads(
        "trace",
        json=lambda: json.dumps(one.analysis.to_json(), indent=1, allow_nan=False),
        html=lambda: _page(one),
        **{"perfetto.json.gz": lambda: _perfetto(one.analysis)},
    )


def _page(one: Loaded) -> str:
    words = report.trace_page(one.analysis, one.name)
    return figures.html_page(f"Trace: {one.name}", words, figures.trace_figures(one.analysis))


def _perfetto(found: Analysis) -> bytes:
    with tempfile.TemporaryDirectory(prefix="perfmodel-") as folder:
        path = Path(folder) / "trace.json.gz"
        export_perfetto(found.trace, path)
        return path.read_bytes()


def _analyze(one: Loaded, *options: str) -> list[object]:
    """The command that says the same of a trace; a folder of ranks is one trace only where groups are asked for."""
    groups = ["--by", "rank"] if one.ranks is not None and "--by" not in options else []
    return ["perfmodel", "analyze", one.name, *groups, *options]


def _ends(name: str, command: list[object], words: str, table: pl.DataFrame) -> None:
    """How a part was computed, and its table to download."""
    frame.computed(command, words)
    st.caption("The table of this part:")
    plain = table.with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))
    contents: dict[str, Callable[[], str]] = {"json": plain.write_json}
    if not any(dtype.is_nested() for dtype in plain.schema.values()):
        contents["csv"] = plain.write_csv
    frame.downloads(f"trace-{name}", **contents)


PARTS = {
    "Summary": summary,
    "Timeline": step,
    "Launches": launches,
    "Kernels": kernels,
    "Fusion": chains,
    "Copies": copies,
    "Ranks and layers": ranks_and_layers,
    "Compare": pairs,
    "Batch sizes": batches,
}
