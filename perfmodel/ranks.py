"""How do the ranks of one run compare, and which one holds up the others: figures of each rank, never its events.

Each rank is read where a worker runs, so thousands of ranks fit on a cluster; what comes back is small.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl

from perfmodel.classify import COMMUNICATION, KERNEL_CLASS, class_shares, rules_before_shipped
from perfmodel.errors import InputError, about
from perfmodel.launch import launch_metrics
from perfmodel.readers.folder import (
    figures_of_files,
    find_ranks,
    ignored_note,
    read_or_why,
    recorded_rank,
    resolve_ranks,
    time_base_ns,
    time_origin_ns,
)
from perfmodel.workers import PROCESSES, Progress

RANKS = pl.Schema(
    {
        "rank": pl.Int32(),
        "file": pl.String(),
        "source": pl.String(),
        "n_events": pl.Int64(),
        "n_dropped": pl.Int64(),
        "n_repaired": pl.Int64(),
        "n_kernels": pl.Int64(),
        "n_kernels_joined": pl.Int64(),
        "n_kernels_orphan": pl.Int64(),
        "n_kernels_graph": pl.Int64(),
        "tklqt_ns": pl.Int64(),
        "akd_ns": pl.Float64(),
        "kernel_time_ns": pl.Int64(),
        "communication_time_ns": pl.Int64(),
        "compute_time_ns": pl.Int64(),
        "communication_frac": pl.Float64(),
        "kernel_busy_ns": pl.Int64(),
        "gpu_busy_ns": pl.Int64(),
        "gpu_span_ns": pl.Int64(),
        "gpu_idle_frac": pl.Float64(),
        "inference_latency_ns": pl.Int64(),
        "start_ns": pl.Int64(),
        "end_ns": pl.Int64(),
    }
)
CLASSES_OF_RANKS = pl.Schema(
    {
        "rank": pl.Int32(),
        "class": KERNEL_CLASS,
        "n_kernels": pl.Int64(),
        "time_ns": pl.Int64(),
        "time_frac": pl.Float64(),
    }
)
# What ranks are compared by.
COMPARED = (
    "compute_time_ns",
    "communication_time_ns",
    "communication_frac",
    "kernel_time_ns",
    "gpu_busy_ns",
    "gpu_span_ns",
    "gpu_idle_frac",
    "tklqt_ns",
    "akd_ns",
    "n_kernels",
)
_SPREAD = pl.Schema(
    {
        "figure": pl.String(),
        **dict.fromkeys(("least", "median", "most"), pl.Float64()),
        **dict.fromkeys(("least_rank", "most_rank"), pl.Int32()),
        "excess_frac": pl.Float64(),
    }
)
_TASK = "perfmodel.ranks:summary_of_file"


@dataclass(frozen=True)
class RankSummary:
    """What is known of the ranks in a folder.

    `ranks` is the table RANKS, a row for each rank in order; `classes` CLASSES_OF_RANKS, the share of each kernel class
    in its rank; `failed` names the files that could not be read, each with why; `ignored` the files that are no traces.
    `time_origin_ns` is the moment, in ns since 1970, from which `start_ns` and `end_ns` count; null where ranks share
    no clock. `launch` holds the launch metrics of each rank as JSON, in the order of `ranks`.
    """

    folder: str
    ranks: pl.DataFrame
    classes: pl.DataFrame
    launch: tuple[dict[str, Any], ...]
    failed: dict[str, str]
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    time_origin_ns: int | None

    def to_json(self) -> dict[str, Any]:
        """The summary with its spread and straggler as a dict that JSON can hold."""
        found = straggler(self.ranks)
        return {
            "folder": self.folder,
            "ranks": [
                {**row, "launch": metrics} for row, metrics in zip(self.ranks.to_dicts(), self.launch, strict=True)
            ],
            "classes": self.classes.to_dicts(),
            "spread": spread(self.ranks).to_dicts(),
            "straggler": asdict(found) if found else None,
            "failed": dict(self.failed),
            "ignored": list(self.ignored),
            "notes": list(self.notes),
            "time_origin_ns": self.time_origin_ns,
        }


@dataclass(frozen=True)
class Straggler:
    """The rank that computes longest, and by how much it exceeds the median of all ranks."""

    rank: int
    compute_time_ns: int
    median_compute_time_ns: float
    excess_frac: float


def summarise_ranks(
    folder: str | Path,
    cache: str | Path | None = None,
    backend: str = PROCESSES,
    n_workers: int | None = None,
    scheduler: str | None = None,
    progress: Progress = lambda _: None,
    rules: str | None = None,
) -> RankSummary:
    """How do the ranks in a folder compare: launch metrics, kernel classes and coverage of each, read by workers.

    Workers (see `workers.run_on_all`) keep what they read in `cache`, "beside" or a folder that they all see, so a run
    that was stopped goes on where it was. `rules` is the text of rules for kernel classes, which workers try before the
    shipped ones (`classify.read_rules`). A file that cannot be read is reported in `failed`. Raises InputError where
    none can be read, and what `run_on_all` and `read_rules` raise.
    """
    folder = Path(folder)
    if rules is not None:
        rules_before_shipped(rules)
    with about(folder):
        if not folder.is_dir():
            raise InputError("not a folder; expected one with a trace for each rank")
        files, ignored = find_ranks(folder)
        named = {str(file.relative_to(folder)): file for file in files}
        more = () if rules is None else (rules,)
        read, failed = figures_of_files(_TASK, named, cache, more, backend, n_workers, scheduler, progress)
        return _summary(str(folder), read, failed, ignored)


def summary_of_file(file: str, cache: str | None, rules: str | None = None) -> dict[str, Any] | str:
    """The figures of one rank, for a worker; the sentence that says why there are none, where it cannot be read."""
    trace = read_or_why(Path(file), cache)
    if isinstance(trace, str):
        return trace
    end = pl.col("start_ns") + pl.col("dur_ns")
    first, last = trace.events.select(first=pl.min("start_ns"), last=end.max()).row(0)
    return {
        "rank": recorded_rank(trace),
        "source": trace.source,
        "n_dropped": trace.n_dropped,
        "n_repaired": trace.n_repaired,
        "notes": list(trace.notes),
        "launch": launch_metrics(trace).to_json(),
        "classes": class_shares(trace.events, None if rules is None else rules_before_shipped(rules)).to_dicts(),
        "time_base_ns": time_base_ns(trace),
        "first_ns": first,
        "last_ns": last,
    }


def spread(ranks: pl.DataFrame) -> pl.DataFrame:
    """How far apart are the ranks: one row for each of COMPARED that any rank has, from the table RANKS.

    Columns `figure` (with its unit), `least`, `median`, `most`, `least_rank`, `most_rank` (the first of equals) and
    `excess_frac`, by how much the most exceeds the median; null where the median is 0.
    """
    rows = []
    for figure in COMPARED:
        known = ranks.select("rank", value=pl.col(figure).cast(pl.Float64)).drop_nulls().sort("value", "rank")
        if known.is_empty():
            continue
        most = known["value"][-1]
        middle = known.select(pl.median("value")).item()
        rows.append(
            {
                "figure": figure,
                "least": known["value"][0],
                "median": middle,
                "most": most,
                "least_rank": known["rank"][0],
                "most_rank": known.filter(pl.col("value") == most)["rank"][0],
                "excess_frac": most / middle - 1 if middle else None,
            }
        )
    return pl.DataFrame(rows, schema=_SPREAD)


def straggler(ranks: pl.DataFrame) -> Straggler | None:
    """Which rank do the others wait for: the one whose kernels outside communication take longest, from RANKS.

    All ranks of a synchronous step take equally long, because the faster ones wait inside their collectives; so neither
    span nor busy time tells the slow one. Null with fewer than two ranks or where the median rank computes nothing.
    """
    row = spread(ranks).filter(pl.col("figure") == "compute_time_ns")
    if ranks.height < 2 or row.is_empty() or not row["median"][0]:
        return None
    return Straggler(row["most_rank"][0], int(row["most"][0]), row["median"][0], row["excess_frac"][0])


def _summary(folder: str, read: dict[str, dict[str, Any]], failed: dict[str, str], ignored: list[str]) -> RankSummary:
    names, found = list(read), list(read.values())
    numbers, notes = resolve_ranks(names, [one["rank"] for one in found])
    origin = time_origin_ns([one["time_base_ns"] for one in found], [one["first_ns"] for one in found])
    order = sorted(range(len(names)), key=lambda i: numbers[i])
    rows = [_row(numbers[i], names[i], found[i], origin) for i in order]
    classes = [{"rank": numbers[i], **share} for i in order for share in found[i]["classes"]]
    by_rank = [f"rank {numbers[i]}: {note}" for i in order for note in found[i]["notes"]]
    return RankSummary(
        folder,
        pl.DataFrame(rows, schema=RANKS),
        pl.DataFrame(classes, schema=CLASSES_OF_RANKS),
        tuple(found[i]["launch"] for i in order),
        failed,
        tuple(ignored),
        (*ignored_note(ignored), *notes, *by_rank),
        origin,
    )


def _row(rank: int, name: str, one: dict[str, Any], origin: int | None) -> dict[str, Any]:
    """A row of RANKS."""
    launch = one["launch"]
    communication = sum(share["time_ns"] for share in one["classes"] if share["class"] in COMMUNICATION)
    total = launch["kernel_time_ns"]
    own = {name: launch[name] for name in RANKS if name in launch}
    shift = None if origin is None or one["first_ns"] is None else one["time_base_ns"] - origin
    return {
        **own,
        "rank": rank,
        "file": name,
        "source": one["source"],
        "n_dropped": one["n_dropped"],
        "n_repaired": one["n_repaired"],
        "communication_time_ns": communication,
        "compute_time_ns": total - communication,
        "communication_frac": communication / total if total else None,
        "start_ns": None if shift is None else one["first_ns"] + shift,
        "end_ns": None if shift is None else one["last_ns"] + shift,
    }
