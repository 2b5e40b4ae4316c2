"""The text page about a folder of ranks: who was read, who holds up the others, figures of each rank."""

import polars as pl

from perfmodel import text
from perfmodel.ranks import RankSummary, spread, straggler
from perfmodel.report.words import HEADERS, N_TOP, WIDTH, table, wrapped

NOTEWORTHY_FRAC = 0.05  # so much above the median a rank's compute time is worth a sentence
_COLUMNS = (
    *("n_kernels", "compute_time_ns", "communication_time_ns", "gpu_busy_ns", "gpu_span_ns", "gpu_idle_frac"),
    *("tklqt_ns", "inference_latency_ns"),
)
# Words for `ranks.COMPARED`, which stand in rows.
_FIGURES = HEADERS | {
    "compute_time_ns": "kernel time of computation",
    "communication_time_ns": "kernel time of communication",
    "communication_frac": "share of communication",
}


def ranks_page(found: RankSummary, n_top: int = N_TOP, width: int = WIDTH) -> str:
    """Coverage first, then the rank that the others wait for, the slowest ranks, how far ranks differ, classes."""
    sections = [_coverage(found, width), wrapped(_finding(found.ranks), width)]
    slowest = found.ranks.sort("compute_time_ns", "rank", descending=[True, False]).head(n_top)
    body = [
        [f"rank {row['rank']}", *(text.figure(name, row[name]) for name in _COLUMNS)]
        for row in slowest.iter_rows(named=True)
    ]
    title = "ranks" if found.ranks.height <= n_top else f"slowest {n_top} of {text.count(found.ranks.height)} ranks"
    sections.append(table(body, [title, *(HEADERS[name] for name in _COLUMNS)], width))
    sections.append(_spread(found.ranks, width))
    if not found.classes.is_empty():
        sections.append(_classes(found.classes, width))
    return "\n\n".join(sections)


def _coverage(found: RankSummary, width: int) -> str:
    ranks = found.ranks
    n_kernels, n_joined = (int(ranks[name].sum()) for name in ("n_kernels", "n_kernels_joined"))
    lines = [
        f"{text.shortened(found.folder, width - 40)}: {text.counted(ranks.height, 'rank')}, "
        f"{text.counted(len(found.failed), 'file')} not read, {text.count(int(ranks['n_events'].sum()))} events",
        f"coverage: {text.count(n_kernels)} kernels, {text.count(n_joined)} joined to their launch "
        f"({text.frac(n_joined / n_kernels if n_kernels else None)}); {ranks['n_repaired'].sum()} events repaired, "
        f"{ranks['n_dropped'].sum()} dropped",
    ]
    lines += [wrapped(f"not read: {name}: {why}", width, "", "      ") for name, why in found.failed.items()]
    return "\n".join([*lines, *(wrapped(f"note: {note}", width, "", "      ") for note in found.notes)])


def _finding(ranks: pl.DataFrame) -> str:
    """Which rank the others wait for, if any, in a sentence."""
    slow = straggler(ranks)
    if slow is None:
        return "No rank can be told to hold up the others: there is one, or the ranks computed nothing."
    if slow.excess_frac < NOTEWORTHY_FRAC:
        return (
            f"Ranks compute equally long: the longest, rank {slow.rank}, is {text.frac(slow.excess_frac)} above the "
            f"median of {text.ns(slow.median_compute_time_ns)}."
        )
    return (
        f"Rank {slow.rank} holds up the others: it computes {text.ns(slow.compute_time_ns)}, "
        f"{text.frac(slow.excess_frac)} more than the median rank ({text.ns(slow.median_compute_time_ns)}); balance "
        "its share of the work, or look at its machine."
    )


def _spread(ranks: pl.DataFrame, width: int) -> str:
    body = [
        [
            _FIGURES[row["figure"]],
            *(text.figure(row["figure"], row[name]) for name in ("least", "median", "most")),
            *(f"rank {row[name]}" for name in ("least_rank", "most_rank")),
            text.frac(row["excess_frac"]),
        ]
        for row in spread(ranks).iter_rows(named=True)
    ]
    return table(body, ["spread over ranks", "least", "median", "most", "least", "most", "above median"], width)


def _classes(classes: pl.DataFrame, width: int) -> str:
    """Kernel time of each class, summed over ranks."""
    sums = (
        classes.group_by("class").agg(pl.sum("n_kernels", "time_ns")).sort("time_ns", "class", descending=[True, False])
    )
    total_ns = int(sums["time_ns"].sum())
    body = [
        [str(name), text.count(n_kernels), text.ns(time_ns), text.frac(time_ns / total_ns if total_ns else None)]
        for name, n_kernels, time_ns in sums.iter_rows()
    ]
    return table(body, ["kernel classes", "kernels", "time", "share"], width)
