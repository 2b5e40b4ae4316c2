"""Text pages about chains of kernels, and about two or more traces side by side."""

import polars as pl

from perfmodel import text
from perfmodel.bound import PLATEAU_FLOOR_NS, Sweep
from perfmodel.diff import TraceDiff
from perfmodel.report.words import HEADERS, N_TOP, WIDTH, ratio, table, wrapped

# Words for `diff.SUMS` and `diff.MEANS`, which stand in rows.
_METRICS = HEADERS | {
    "n_kernels_joined": "joined to their launch",
    "n_kernels_orphan": "orphans",
    "n_kernels_graph": "from graphs",
    "tklqt_graph_ns": "TKLQT of graph kernels",
    "tklqt_first_kernel_ns": "TKLQT, first kernel of each launch",
    "kernel_busy_ns": "kernels busy",
    "gpu_busy_ns": "devices busy",
    "gpu_span_ns": "devices from first to last work",
    "inference_latency_ns": "inference latency",
    "gpu_idle_frac": "devices idle",
}


def sweep_page(found: Sweep) -> str:
    """TKLQT of each batch size against the smallest, and from which one on the device is the bound."""
    rows = [
        [
            str(r["batch"]),
            text.ns(r["tklqt_ns"]),
            ratio(r["tklqt_ns"] / found.plateau_ns if found.plateau_ns else None),
            r["label"],
        ]
        for r in found.table.iter_rows(named=True)
    ]
    rule = (
        f"TKLQT above {found.rule_factor:g} times that of the smallest batch, or {found.rule_factor:g} times "
        f"{text.ns(PLATEAU_FLOOR_NS)} where that is more"
    )
    if found.transition_batch is None:
        verdict = f"no batch size is device-bound: none has a {rule}"
    else:
        verdict = f"device-bound from batch {text.count(found.transition_batch)} on: the first with a {rule}"
    return table(rows, ["batch", "TKLQT", "of the smallest", "bound"]) + f"\n\n{verdict}"


def fusion_page(table_by_length: pl.DataFrame, chains: pl.DataFrame, name: str, width: int = WIDTH) -> str:
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
        [_chain(r["names"], width), text.count(r["n_chains"]), f"{r['score']:.2f}"]
        for r in chains.head(N_TOP).iter_rows(named=True)
    ]
    title = f"{text.shortened(name, width)}: what fusing kernels would save at best, where the host is the bound"
    return "\n\n".join([title, table(body, header), table(listed, ["most frequent chains", "times", "score"], width)])


def _chain(names: list[str], width: int) -> str:
    """The kernels of a chain, each as long as the line allows."""
    each = max((width - 20) // len(names) - 4, 12)
    return " -> ".join(text.shortened(name, each) for name in names)


def diff_page(found: TraceDiff, names: tuple[str, str], n_top: int = N_TOP, width: int = WIDTH) -> str:
    """Launch metrics side by side, then the kernel classes and operators whose time changed most."""
    a, b = (text.shortened(name, (width - 10) // 2) for name in names)
    unit = "per step" if found.per_step else "in all"
    title = wrapped(f"a: {a}, b: {b}; changes and ratios {unit}", width)
    steps = f"steps: {text.count(found.n_steps_a)} in a, {text.count(found.n_steps_b)} in b"
    if not found.per_step:
        steps += "; without steps in both, traces of different length differ in every sum"
    sections = [f"{title}\n{steps}"]
    rows = [
        [_METRICS[r["metric"]], *(text.figure(r["metric"], r[side]) for side in "ab"), ratio(r["ratio"])]
        for r in found.metrics.iter_rows(named=True)
    ]
    if found.classes.is_empty():
        sections.append("No kernels were recorded in either, so there are no launch metrics.")
        sections.append(_changes(found.operators, "name", "calls", "self_ns", "operators, by host time", n_top, width))
        return "\n\n".join(sections)
    sections.append(table(rows, ["launch metrics", "a", "b", "b / a"], width))
    sections.append(_changes(found.classes, "class", "kernels", "time_ns", "kernel classes", n_top, width))
    title = "operators, by kernel time"
    sections.append(_changes(found.operators, "name", "kernels", "kernel_time_ns", title, n_top, width))
    return "\n\n".join(sections)


def _changes(changes: pl.DataFrame, key: str, counted: str, time: str, title: str, n_top: int, width: int) -> str:
    """The rows that changed most, what a side does not have as a dash, and a row that sums what is not shown."""
    numbers = [f"n_{counted}_a", f"n_{counted}_b", f"{time}_a", f"{time}_b", "change_ns"]
    shown, rest = changes.head(n_top), changes[n_top:].select(numbers).sum()

    def row(name: str, r: dict[str, float | None], of: float | None) -> list[str]:
        counts = ("-" if r[n] is None else text.count(r[n]) for n in numbers[:2])
        times = ("-" if r[n] is None else text.ns(r[n]) for n in numbers[2:4])
        change = float(r["change_ns"] or 0)
        return [
            name,
            *counts,
            *times,
            f"{'+' if change > 0 else ''}{text.ns(change)}",
            "-" if of is None else ratio(of),
        ]

    rows = [row(str(r[key]), r, r["ratio"]) for r in shown.iter_rows(named=True)]
    if changes.height > n_top:
        rows.append(row(f"({changes.height - n_top} more)", rest.row(0, named=True), None))
    header = [title, f"{counted} a", f"{counted} b", "time a", "time b", "change", "b / a"]
    return table(rows, header, width)
