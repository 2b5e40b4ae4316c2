"""The text page about one trace: coverage, findings in words, then tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import polars as pl

from perfmodel import text
from perfmodel.analysis import Analysis
from perfmodel.findings import Finding
from perfmodel.intervals import DEVICE
from perfmodel.report.words import HEADERS, N_TOP, WIDTH, table, wrapped

_GROUP_NUMBERS = (
    *("n_launches", "n_kernels", "tklqt_ns", "delay_median_ns", "queue_ns", "kernel_time_ns", "gpu_busy_ns"),
    *("gpu_idle_frac", "inference_latency_ns"),
)
_NO_KEYS = ("n_calls", "start_ns", "dur_ns")  # columns that say more of a group, not which one it is
_BESIDE_COMPUTING = (
    *("copy_busy_ns", "copy_exposed_ns", "communication_busy_ns", "communication_exposed_ns"),
    *("gap_ns", "launch_ns", "sync_ns", "neither_ns"),
)


def trace_page(found: Analysis, name: str, n_top: int = N_TOP, width: int = WIDTH) -> str:
    """Coverage first, then findings with what to do, launch metrics, and tables of what cost most."""
    sections = [coverage_text(found, name, width)]
    if found.metrics.n_kernels == 0:
        sections.append("No kernels were recorded, so there are no launch metrics.")
    if found.findings:
        sections.append(findings_text(found.findings, width))
    if found.metrics.n_kernels:
        sections.append(_launch_metrics(found, width))
    if found.groups is not None:
        sections.append(_groups(found.groups, f"by {found.by}", n_top, width))
    if found.metrics.devices:
        sections.append(_devices(found, width))
        sections.append(_overlap(found, width))
    if found.steps.height > 1 and found.by != "step":
        sections.append(_groups(found.steps, "steps", n_top, width))
    return "\n\n".join([*sections, *(shown for shown in _tables(found, n_top, width) if shown)])


def findings_text(findings: Sequence[Finding], width: int = WIDTH) -> str:
    """Findings as numbered sentences, each with what to do about it."""
    lines = []
    for number, finding in enumerate(findings, 1):
        words = finding.words[0].upper() + finding.words[1:] + "."
        lines.append(wrapped(words, width, f"{number}. ", "   "))
        lines.append(wrapped(finding.advice, width, "   > ", "     "))
    return "\n".join(lines)


def coverage_text(found: Analysis, name: str, width: int = WIDTH) -> str:
    """What was read and what could be joined, repaired, dropped; then what a reader of the numbers must know."""
    trace, m = found.trace, found.metrics
    damage = f"{text.counted(trace.n_repaired, 'event')} repaired, {text.count(trace.n_dropped)} dropped"
    lines = [
        f"{text.shortened(name, width - 40)}: {trace.source} trace, {text.count(m.n_events)} events",
        f"coverage: no kernels were recorded; {damage}",
    ]
    if m.n_kernels:
        lines[-1] = (
            f"coverage: {text.count(m.n_kernels)} kernels, {text.count(m.n_kernels_joined)} joined to their launch "
            f"({text.frac(m.n_kernels_joined / m.n_kernels)}), {text.count(m.n_kernels_orphan)} orphans, "
            f"{text.count(m.n_kernels_graph)} graph; {damage}"
        )
        by = found.n_kernels_found_by
        unknown = m.n_kernels - sum(by.values())
        parts = [f"{text.count(n)} by {how}" for how, n in by.items()]
        lines.append(f"operators of kernels: {', '.join(parts)}, {text.count(unknown)} unknown")
    notes = [*trace.notes]
    if m.n_negative_delays:
        started = text.counted(m.n_negative_delays, "kernel")
        notes.append(f"{started} started before the launch call: host and device clocks disagree")
    return "\n".join([*lines, *(wrapped(f"note: {note}", width, "", "      ") for note in notes)])


def _launch_metrics(found: Analysis, width: int) -> str:
    m = found.metrics
    rows = [
        ["TKLQT (kernel start - launch start)", text.ns(m.tklqt_ns)],
        ["  of graph kernels", text.ns(m.tklqt_graph_ns)],
        ["  first kernel of each launch", text.ns(m.tklqt_first_kernel_ns)],
        ["launch delay, median", text.ns(m.delay_median_ns)],
        ["launch delay, 99th percentile", text.ns(m.delay_p99_ns)],
        [f"queueing after the call returned ({text.counted(m.n_queued, 'kernel')})", text.ns(m.queue_ns)],
        [f"host time in {text.counted(m.n_launches, 'launch call')}", text.ns(m.launch_call_ns)],
        ["average kernel duration", text.ns(m.akd_ns)],
        ["inference latency", text.ns(m.inference_latency_ns)],
    ]
    words = f"{found.bound.label or 'host-bound or device-bound cannot be told'}: {found.bound.reason}"
    return table(rows, ["launch metrics", ""], width) + "\n" + wrapped(words, width)


def _devices(found: Analysis, width: int) -> str:
    each = [asdict(device) for device in found.metrics.devices]
    numbers = [name for name in each[0] if name not in DEVICE]
    rows = [[place(DEVICE, device), *(text.figure(name, device[name]) for name in numbers)] for device in each]
    return table(rows, ["devices", *(HEADERS[name] for name in numbers)], width)


def _overlap(found: Analysis, width: int) -> str:
    """What each device did beside computing, how much of it showed, and what the host did in its gaps."""
    both = found.exposed.join(found.gaps, on=DEVICE, how="full", nulls_equal=True, coalesce=True)
    rows = [
        [place(DEVICE, row), *(text.figure(name, row[name]) for name in _BESIDE_COMPUTING)]
        for row in both.sort(DEVICE).iter_rows(named=True)
    ]
    return table(rows, ["beside computing", *(HEADERS[name] for name in _BESIDE_COMPUTING)], width)


def _groups(groups: pl.DataFrame, title: str, n_top: int, width: int) -> str:
    """Launch metrics of groups, in their own order; what belongs to none of them is a row that says so."""
    keys = [key for key in groups.columns[: groups.columns.index("n_launches")] if key not in _NO_KEYS]
    rows = [
        [place(keys, row), *(text.figure(n, row[n]) for n in _GROUP_NUMBERS)]
        for row in groups.head(n_top).iter_rows(named=True)
    ]
    more = f"\n... and {text.count(groups.height - n_top)} more" if groups.height > n_top else ""
    return table(rows, [title, *(HEADERS[n] for n in _GROUP_NUMBERS)], width) + more


def place(keys: Sequence[str], row: Mapping[str, object]) -> str:
    """The keys of a group in words: the name of a range or step alone, else every number with its kind."""
    if "name" in keys:
        rank = "" if row["rank"] is None else f"rank {row['rank']} "
        return rank + ("(elsewhere)" if row["name"] is None else str(row["name"]))
    words = [f"{key} {'unknown' if row[key] is None else row[key]}" for key in keys]
    return ", ".join(word for word in words if word != "rank unknown") or "rank unknown"


def _tables(found: Analysis, n_top: int, width: int) -> list[str | None]:
    """What cost most, by class, kernel, call, operator, range and matrix product; None where there is nothing."""
    host = () if found.metrics.n_kernels else (("operators", found.host_operators),)
    taxed = found.kernels.drop_nulls("tklqt_ns").sort("tklqt_ns", "name", descending=[True, False])
    wanted = [
        (f"costliest {min(n_top, found.kernels.height)} kernels", found.kernels, ("n_kernels", "time_ns", "tklqt_ns")),
        ("kernels by launch tax", taxed, ("n_kernels", "tklqt_ns", "tklqt_frac", "mean_delay_ns")),
        ("launch calls", found.launch_calls, ("n_launches", "time_ns", "mean_ns", "n_kernels")),
    ]
    if found.metrics.n_kernels:
        numbers = ("n_calls", "self_ns", "n_kernels", "kernel_time_ns", "tklqt_ns")
        wanted.append(("operators, by kernel time", found.operators, numbers))
    for title, rows in (("ranges", found.ranges), *host):
        wanted.append((f"longest {title} (with what they contain)", rows, ("n_calls", "time_ns")))
    counted = found.counted
    routes = found.copies.with_columns(name=_route())
    wanted.append(("copies and sets", routes, ("n_copies", "bytes", "bytes_per_s", "time_ns", "exposed_ns")))
    overhead = found.profiler_overhead
    title = f"overhead that the profiler recorded ({text.ns(int(overhead['time_ns'].sum()))})"
    of_driver = pl.when("is_driver").then(pl.lit(" (driver)")).otherwise(pl.lit(""))
    wanted.append((title, overhead.with_columns(pl.col("name") + of_driver), ("n_calls", "time_ns", "idle_ns")))
    return [
        _table(found.classes, found.classes.height, "class", "kernel classes", ("n_kernels", "time_ns", "time_frac")),
        *(_table(rows, n_top, "name", title, numbers, width) for title, rows, numbers in wanted),
        _points(found.products, "matrix products", n_top, width),
        None if counted is None else _points(counted, "kernels counted by Nsight Compute", n_top, width),
    ]


def _route() -> pl.Expr:
    """The route of a copy in words: `copy HtoD (Pinned -> Device)`."""
    memories = pl.format(" ({} -> {})", "from_memory", "to_memory").fill_null("")
    return pl.concat_str("kind", pl.format(" {}", "direction").fill_null(""), memories)


def _points(points: pl.DataFrame, title: str, n_top: int, width: int) -> str | None:
    """Points of a roofline, with what a roof bounds them where the machine is known."""
    numbers = ["n_products", "time_ns", "flops_per_s", "flops_per_byte"]
    numbers += ["roof_frac"] if "roof_frac" in points.columns else []
    body = []
    for row in points.head(n_top).iter_rows(named=True):
        roof = [row["bound"] or "n/a"] if "bound" in row else []
        body.append([_product(row), *(text.figure(n, row[n]) for n in numbers), *roof])
    header = [title, *(HEADERS[n] for n in numbers), *(["bound by"] if "bound" in points.columns else [])]
    return table(body, header, width) if body else None


def _product(row: dict[str, object]) -> str:
    """A matrix product in words, such as `aten::mm 32 x 4096 x 1024 bf16`."""
    dtype = f" {row['dtype']}" if row["dtype"] else ""
    if "m" not in row:
        return f"{row['op']}{dtype}"
    batch = f"{row['batch']} of " if row["batch"] != 1 else ""
    experts = f", {row['n_experts']} experts" if row["n_experts"] else ""
    return f"{row['op']} {batch}{row['m']} x {row['n']} x {row['k']}{dtype}{experts}"


def _table(
    rows: pl.DataFrame, n_top: int, key: str, title: str, numbers: Sequence[str], width: int | None = None
) -> str | None:
    """The first rows of a table with numbers in words by the unit in their name; None where there are none."""
    shown = rows.head(n_top).with_columns(pl.col(key).cast(pl.String).str.strip_prefix("void "))
    body = [[str(r[key]), *(text.figure(n, r[n]) for n in numbers)] for r in shown.iter_rows(named=True)]
    return table(body, [title, *(HEADERS[n] for n in numbers)], width) if body else None
