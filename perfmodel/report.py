"""Text pages for people: what a trace, a fit, a comparison or a schedule says, as words and plain tables."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars as pl

from perfmodel import classify, launch, text
from perfmodel.trace import Trace

if TYPE_CHECKING:  # these bring scipy and scikit-learn, which reading a trace does not need
    from perfmodel.latency import Errors, LatencyModel
    from perfmodel.regression import Verdict
    from perfmodel.schedule import LayerSchedule

N_TOP = 10
NAME_WIDTH = 60


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Aligned columns, the first to the left and all others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def _short(name: str) -> str:
    shown = "".join(c if c.isprintable() else "?" for c in name)
    return shown if len(shown) <= NAME_WIDTH else shown[: NAME_WIDTH - 1] + "…"


def trace_page(trace: Trace, name: str) -> str:
    """Coverage first, then findings in words, launch metrics, busy time, kernel classes and the costliest kernels."""
    m = launch.launch_metrics(trace)
    sections = [_coverage(trace, m, name)]
    if m.n_kernels == 0:
        sections.append("No kernels were recorded, so there are no launch metrics.")
        return "\n\n".join([*sections, *_host_tables(trace)])
    sections.append("\n".join(f"- {finding}" for finding in findings(trace, m)))
    sections.append(
        table(
            [
                ["TKLQT (kernel start - launch start)", text.ns(m.tklqt_ns)],
                ["  of graph kernels", text.ns(m.tklqt_graph_ns)],
                ["  first kernel of each launch", text.ns(m.tklqt_first_kernel_ns)],
                ["average kernel duration", text.ns(m.akd_ns)],
                ["inference latency", text.ns(m.inference_latency_ns)],
            ],
            ["launch metrics", ""],
        )
    )
    sections.append(
        table(
            [
                [f"device {d.device}", text.count(d.n_kernels)]
                + [text.ns(x) for x in (d.kernel_time_ns, d.kernel_busy_ns, d.gpu_busy_ns, d.gpu_span_ns)]
                + [text.frac(d.gpu_idle_frac)]
                for d in m.devices
            ],
            ["devices", "kernels", "kernel time", "kernel busy", "busy", "span", "idle"],
        )
    )
    classes = classify.class_shares(trace.events)
    sections.append(
        table(
            [
                [row["class"], text.count(row["n_kernels"]), text.ns(row["time_ns"]), text.frac(row["time_frac"])]
                for row in classes.iter_rows(named=True)
            ],
            ["kernel classes", "kernels", "time", "share"],
        )
    )
    kernels = launch.by_kernel(trace.events).head(N_TOP)
    sections.append(
        table(
            [
                [_short(r["name"]), text.count(r["n_kernels"]), text.ns(r["time_ns"]), text.ns(r["tklqt_ns"])]
                for r in kernels.with_columns(pl.col("name").cast(pl.String)).iter_rows(named=True)
            ],
            [f"costliest {min(N_TOP, kernels.height)} kernels", "kernels", "time", "TKLQT"],
        )
    )
    return "\n\n".join([*sections, *_host_tables(trace)])


def _host_tables(trace: Trace) -> list[str]:
    """The longest named ranges and operators of the host, as far as there are any."""
    tables = []
    for kind, title in (("range", "ranges"), ("op", "operators")):
        rows = launch.by_host_name(trace.events, kind).head(N_TOP)
        body = [
            [_short(r["name"]), text.count(r["n_calls"]), text.ns(r["time_ns"])] for r in rows.iter_rows(named=True)
        ]
        tables += [table(body, [f"longest {title} (with what they contain)", "calls", "time"])] if body else []
    return tables


def _coverage(trace: Trace, m: launch.LaunchMetrics, name: str) -> str:
    joined = m.n_kernels_joined / m.n_kernels if m.n_kernels else None
    lines = [
        f"{_short(name)}: {trace.source} trace, {text.count(m.n_events)} events",
        f"coverage: {text.count(m.n_kernels)} kernels, {text.count(m.n_kernels_joined)} joined to their launch "
        f"({text.frac(joined)}), {text.count(m.n_kernels_orphan)} orphans, {text.count(m.n_kernels_graph)} graph; "
        f"{trace.n_repaired} events repaired, {trace.n_dropped} dropped",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in trace.notes)])


def findings(trace: Trace, m: launch.LaunchMetrics) -> list[str]:
    """The most telling facts of a trace with kernels, in words, at most five."""
    found = []
    if m.gpu_idle_frac is not None:
        found.append(f"devices were idle {text.frac(m.gpu_idle_frac)} of the time between their first and last work")
    copying_ns = m.gpu_busy_ns - m.kernel_busy_ns
    if copying_ns > 0.1 * m.gpu_busy_ns:
        found.append(f"{text.frac(copying_ns / m.gpu_busy_ns)} of busy time is copies and sets alone, without a kernel")
    top = classify.class_shares(trace.events).row(0, named=True)
    found.append(
        f"{text.frac(top['time_frac'])} of kernel time is {top['class']} ({text.count(top['n_kernels'])} kernels)"
    )
    if m.n_kernels_joined and m.akd_ns:
        mean_wait = m.tklqt_ns / m.n_kernels_joined
        relation = "longer than" if mean_wait > m.akd_ns else "shorter than"
        found.append(
            f"a kernel began {text.ns(mean_wait)} after its launch call, {relation} the {text.ns(m.akd_ns)} it ran"
        )
    negative = launch.n_negative_delays(trace.events)
    if negative:
        found.append(
            f"{text.count(negative)} kernels started before their launch call: host and device clocks disagree"
        )
    elif m.n_kernels_orphan:
        found.append(
            f"{text.frac(m.n_kernels_orphan / m.n_kernels)} of kernels have no launch call in the trace: they count as "
            "busy time and in no launch metric"
        )
    return found


def fusion_page(table_by_length: pl.DataFrame, chains: pl.DataFrame, name: str) -> str:
    """Ideal speed-up by chain length, then the most frequent chains of the shortest length."""
    body = [
        [
            str(r["length"]),
            *(text.count(r[key]) for key in ("n_unique_chains", "n_fused", "n_launches")),
            "n/a" if r["ideal_speedup"] is None else f"{r['ideal_speedup']:.3f}x",
        ]
        for r in table_by_length.iter_rows(named=True)
    ]
    header = ["chain length", "chains", "fused (PS = 1)", "launches left", "ideal speed-up"]
    listed = [
        [" -> ".join(_short(n) for n in r["names"]), text.count(r["n_chains"]), f"{r['score']:.2f}"]
        for r in chains.head(N_TOP).iter_rows(named=True)
    ]
    title = f"{_short(name)}: what fusing kernels would save at best, where the host is the bound"
    return "\n\n".join([title, table(body, header), table(listed, ["most frequent chains", "times", "score"])])


def fit_page(model: "LatencyModel", errors: dict[str, dict[str, "Errors"]]) -> str:
    """Held-out error by shape beside the baselines, then the constants."""
    shapes = [s for s in errors["model"] if s != "all"]

    def row(shape: str) -> list[str]:
        e = errors["model"][shape]
        others = [text.frac(errors[who][shape].median_ape_frac) for who in ("roofline_only", "constant")]
        return [
            shape,
            str(e.n),
            *(text.frac(x) for x in (e.median_ape_frac, e.p90_ape_frac, e.worst_ape_frac)),
            *others,
        ]

    header = ["held-out shape", "n", "median", "p90", "worst", "roofline only", "constant"]
    constants = [[name, f"{value:.4g}"] for name, value in vars(model.constants_).items()]
    half_width = 100 * math.expm1(model.log_half_width_)
    return "\n\n".join(
        [
            f"fitted on {model.n_observations_} workloads of {model.profile.name}, {model.dtype}, {model.kernel}",
            "absolute error of each shape, predicted without its data; last two columns: medians of the baselines\n"
            + table([row(s) for s in [*shapes, "all"]], header),
            table(constants, ["constant", "value"]),
            ("" if half_width < 100 else "NOT TO BE TRUSTED: held-out errors are too large; was the machine busy?\n")
            + f"90 % interval: +{half_width:.0f} % / -{100 * (1 - 1 / (1 + half_width / 100)):.0f} %",
        ]
    )


def check_page(verdicts: "Sequence[Verdict]") -> str:
    """The overall verdict, a count of each, and the workloads that moved most."""
    overall, *each = verdicts
    counts = {name: sum(v.verdict == name for v in each) for name in dict.fromkeys(v.verdict for v in each)}
    moved = [v for v in each if v.verdict in ("regressed", "suspect", "improved")] or each[:5]

    def row(v: "Verdict") -> list[str]:
        more = f"{v.n_more_runs} more runs" if v.n_more_runs else ""
        return [v.label, f"{v.ratio:.3f}x", f"{v.ratio_low:.3f} to {v.ratio_high:.3f}", v.verdict, more]

    shown = moved[:20]
    lines = [
        f"{overall.verdict}: candidate takes {overall.ratio:.3f}x the baseline's time over all workloads "
        f"(90 % interval {overall.ratio_low:.3f} to {overall.ratio_high:.3f}, "
        f"{overall.n_runs_baseline} and {overall.n_runs_candidate} runs)",
        f"{len(each)} workloads: " + ", ".join(f"{n} {name}" for name, n in counts.items()),
    ]
    if "suspect" in (overall.verdict, *counts):
        lines.append("suspect: one side has a single run, so the spread between runs is assumed; collect with --runs 5")
    more = f"\n... and {len(moved) - len(shown)} more" if len(moved) > len(shown) else ""
    return (
        "\n".join(lines) + "\n\n" + table([row(v) for v in shown], ["workload", "ratio", "90 %", "verdict", ""]) + more
    )


def schedule_page(rows: "Sequence[LayerSchedule]") -> str:
    """Latency of each schedule and its phases."""
    phases = list(rows[0].phases)
    body = [
        [
            r.schedule,
            text.ns(r.latency_ns),
            *(text.ns(r.phases[p]) for p in phases),
            f"{rows[0].latency_ns / r.latency_ns:.2f}x",
        ]
        for r in rows
    ]
    return table(body, ["schedule", "latency", *phases, f"against {rows[0].schedule}"])
