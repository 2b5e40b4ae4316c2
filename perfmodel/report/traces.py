"""The text page about one trace: coverage, findings in words, then tables."""

from collections.abc import Sequence

import polars as pl

from perfmodel import text
from perfmodel.analysis import Analysis
from perfmodel.findings import Finding
from perfmodel.report.words import N_TOP, WIDTH, table, wrapped


def trace_page(found: Analysis, name: str, n_top: int = N_TOP, width: int = WIDTH) -> str:
    """Coverage first, then findings with what to do, launch metrics, devices, classes, kernels and operators."""
    sections = [_coverage(found, name, width)]
    if found.metrics.n_kernels == 0:
        sections.append("No kernels were recorded, so there are no launch metrics.")
    if found.findings:
        sections.append(findings_text(found.findings, width))
    if found.metrics.n_kernels:
        sections.append(_launch_metrics(found))
    if found.metrics.devices:
        sections.append(_devices(found, width))
    by_name = [show(found, n_top, width) for show in (_kernels, _tax, _operators, _ranges)]
    return "\n\n".join([*sections, *(shown for shown in (_classes(found), *by_name) if shown)])


def findings_text(findings: Sequence[Finding], width: int = WIDTH) -> str:
    """Findings as numbered sentences, each with what to do about it."""
    lines = []
    for number, finding in enumerate(findings, 1):
        words = finding.words[0].upper() + finding.words[1:] + "."
        lines.append(wrapped(words, width, f"{number}. ", "   "))
        lines.append(wrapped(finding.advice, width, "   > ", "     "))
    return "\n".join(lines)


def _coverage(found: Analysis, name: str, width: int) -> str:
    trace, m = found.trace, found.metrics
    joined = m.n_kernels_joined / m.n_kernels if m.n_kernels else None
    lines = [
        f"{text.shortened(name, width - 40)}: {trace.source} trace, {text.count(m.n_events)} events",
        f"coverage: {text.count(m.n_kernels)} kernels, {text.count(m.n_kernels_joined)} joined to their launch "
        f"({text.frac(joined)}), {text.count(m.n_kernels_orphan)} orphans, {text.count(m.n_kernels_graph)} graph; "
        f"{trace.n_repaired} events repaired, {trace.n_dropped} dropped",
    ]
    if m.n_kernels:
        by = found.n_kernels_found_by
        unknown = m.n_kernels - sum(by.values())
        parts = [f"{text.count(n)} by {how}" for how, n in by.items()]
        lines.append(f"operators of kernels: {', '.join(parts)}, {text.count(unknown)} unknown")
    return "\n".join([*lines, *(wrapped(f"note: {note}", width, "", "      ") for note in trace.notes)])


def _launch_metrics(found: Analysis) -> str:
    m = found.metrics
    return table(
        [
            ["TKLQT (kernel start - launch start)", text.ns(m.tklqt_ns)],
            ["  of graph kernels", text.ns(m.tklqt_graph_ns)],
            ["  first kernel of each launch", text.ns(m.tklqt_first_kernel_ns)],
            ["average kernel duration", text.ns(m.akd_ns)],
            ["inference latency", text.ns(m.inference_latency_ns)],
        ],
        ["launch metrics", ""],
    )


def _devices(found: Analysis, width: int) -> str:
    rows = [
        [f"device {d.device}" if d.rank is None else f"rank {d.rank}, device {d.device}", text.count(d.n_kernels)]
        + [text.ns(x) for x in (d.kernel_time_ns, d.kernel_busy_ns, d.gpu_busy_ns, d.gpu_span_ns)]
        + [text.frac(d.gpu_idle_frac)]
        for d in found.metrics.devices
    ]
    return table(rows, ["devices", "kernels", "kernel time", "kernel busy", "busy", "span", "idle"], width)


def _classes(found: Analysis) -> str | None:
    return _table(
        found.classes, found.classes.height, {"class": "kernel classes"}, ("n_kernels", "time_ns", "time_frac")
    )


def _kernels(found: Analysis, n_top: int, width: int) -> str | None:
    title = f"costliest {min(n_top, found.kernels.height)} kernels"
    return _table(found.kernels, n_top, {"name": title}, ("n_kernels", "time_ns", "tklqt_ns"), width)


def _tax(found: Analysis, n_top: int, width: int) -> str | None:
    """Kernels by what launching them cost, with the wait of one."""
    taxed = found.kernels.drop_nulls("tklqt_ns").sort("tklqt_ns", "name", descending=[True, False])
    return _table(taxed, n_top, {"name": "kernels by launch tax"}, ("n_kernels", "tklqt_ns", "time_ns"), width)


def _operators(found: Analysis, n_top: int, width: int) -> str | None:
    numbers = ("n_calls", "self_ns", "n_kernels", "kernel_time_ns", "tklqt_ns")
    if not found.metrics.n_kernels:
        return _table(
            found.host_operators,
            n_top,
            {"name": "longest operators (with what they contain)"},
            ("n_calls", "time_ns"),
            width,
        )
    return _table(found.operators, n_top, {"name": "operators, by kernel time"}, numbers, width)


def _ranges(found: Analysis, n_top: int, width: int) -> str | None:
    title = "longest ranges (with what they contain)"
    return _table(found.ranges, n_top, {"name": title}, ("n_calls", "time_ns"), width)


_HEADERS = {
    "n_kernels": "kernels",
    "n_calls": "calls",
    "time_ns": "time",
    "time_frac": "share",
    "tklqt_ns": "TKLQT",
    "self_ns": "host time",
    "kernel_time_ns": "kernel time",
}


def _table(
    rows: pl.DataFrame, n_top: int, title: dict[str, str], numbers: Sequence[str], width: int | None = None
) -> str | None:
    """The first rows of a table with numbers in words by the unit in their name; None where there are none."""
    ((key, header),) = title.items()
    shown = rows.head(n_top).with_columns(pl.col(key).cast(pl.String).str.strip_prefix("void "))
    body = [[str(r[key]), *(_in_words(n, r[n]) for n in numbers)] for r in shown.iter_rows(named=True)]
    return table(body, [header, *(_HEADERS[n] for n in numbers)], width) if body else None


def _in_words(name: str, value: float | None) -> str:
    if name.endswith("_ns"):
        return text.ns(value)
    return text.frac(value) if name.endswith("_frac") else text.count(value)
