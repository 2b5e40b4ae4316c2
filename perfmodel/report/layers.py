"""Text pages about MoE layer passes: of one trace, of the ranks of a run, of runs on more and more GPUs."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from perfmodel import text
from perfmodel.passes import Passes
from perfmodel.passes.ranks import LayerRanks
from perfmodel.report.words import HEADERS, N_TOP, WIDTH, ratio, table, wrapped

_HEADERS = HEADERS | {
    "dur_ns": "duration",
    "idle_ns": "idle",
    "idle_frac": "idle",
    "longest_gap_ns": "longest",
    "n_gaps": "gaps",
    "n_passes": "passes",
    "compute_busy_ns": "compute",
    "communication_busy_ns": "comm.",
    "communication_exposed_ns": "exposed",
    "communication_hidden_frac": "hidden",
    "all_to_all_exposed_ns": "all-to-all exposed",
    "sm_active_frac": "SMs active",
    "n_collectives": "collectives",
    "communication_ns": "in them",
    "wait_ns": "waits",
    "caused_ns": "others wait for it",
    "n_last": "came last",
    "ratio_median": "median",
    "ratio_p95": "p95",
    "delay_max_ns": "longest delay",
}
_PASS = (
    *("dur_ns", "n_kernels", "n_launches", "n_gaps", "longest_gap_ns", "idle_ns", "compute_busy_ns"),
    *("communication_busy_ns", "communication_exposed_ns", "all_to_all_exposed_ns", "sm_active_frac"),
)
_ON_DEVICES = ("n_kernels", "n_launches", "n_gaps", "longest_gap_ns", "sm_active_frac")  # null on a host
_MEMBER = (
    *("n_passes", "dur_ns", "n_kernels", "idle_frac", "compute_busy_ns", "communication_busy_ns"),
    *("communication_exposed_ns", "communication_hidden_frac", "all_to_all_exposed_ns", "sm_active_frac"),
)
_WAITS = ("n_collectives", "communication_ns", "wait_ns", "n_last", "caused_ns")
_COMPARED = {"collectives": "collectives", "passes": "MoE layer passes", "compute": "compute of a step"}


def passes_page(
    found: Passes, name: str, tokens_per_s: float | None = None, n_top: int = N_TOP, width: int = WIDTH
) -> str:
    """How passes were told, the median pass in words, passes, then kernel classes or the parts of a pass on a host."""
    sections = [
        "\n".join([text.shortened(name, width), *_notes(found.notes, width)]),
        pass_words(found, tokens_per_s, width),
    ]
    columns = [column for column in _PASS if found.how != "host" or column not in _ON_DEVICES]
    rows = [
        [_place(row, f"pass {row['pass']}"), *(text.figure(column, row[column]) for column in columns)]
        for row in found.passes.head(n_top).iter_rows(named=True)
    ]
    n = found.passes.height
    title = "passes" if n <= n_top else f"first {n_top} of {text.count(n)} passes"
    sections.append(table(rows, [title, *(_HEADERS[column] for column in columns)], width))
    parts = _parts(found, n_top, width)
    return "\n\n".join([*sections, *([parts] if parts else [])])


def layer_ranks_page(
    found: LayerRanks,
    step: int | None = None,
    tokens_per_s: float | None = None,
    n_top: int = N_TOP,
    width: int = WIDTH,
) -> str:
    """What is known of the ranks, their median passes, straggler statistics, then who waits for whom: in one step, or
    in the steps with most waiting and the worst of them."""
    head = [f"{text.shortened(found.source, width - 20)}: {text.counted(found.members.height, _noun(found))}"]
    head += [wrapped(f"not read: {name}: {why}", width, "", "      ") for name, why in found.failed.items()]
    sections = ["\n".join([*head, *_notes(found.notes, width)])]
    if found.latency_ns is not None:
        words = (
            f"A MoE layer pass takes {text.ns(found.latency_ns)} on its slowest {_noun(found)}, the median over passes"
        )
        sections.append(wrapped(words + _throughput(tokens_per_s, found.members.height) + ".", width))
        slowest = found.members.sort("dur_ns", descending=True, nulls_last=True, maintain_order=True)
        sections.append(_table(slowest, _known(slowest, _MEMBER), "median pass", n_top, width))
    rows = [
        [_COMPARED[what], text.count(one["n"]), ratio(one["ratio_median"]), ratio(one["ratio_p95"]),
         text.ns(one["delay_max_ns"])]
        for what, one in found.stragglers.items() if one["n"]
    ]  # fmt: skip
    if rows:
        sections.append(table(rows, ["slowest over fastest", "compared", "median", "p95", "longest delay"], width))
    if found.waits.is_empty():
        sections.append("Nobody can be told to wait: no collective of several ranks was matched.")
        return "\n\n".join(sections)
    late = found.late.sort("wait_ns", descending=True, maintain_order=True)
    if step is None and late.height > 1:
        sections.append(_steps(late, n_top, width))
    shown = late["step"][0] if step is None else step
    of_step = found.waits.filter(pl.col("step").eq_missing(shown))
    sections.append(wrapped(_who(late.filter(pl.col("step").eq_missing(shown)).row(0, named=True)), width))
    order = of_step.sort("caused_ns", "wait_ns", descending=[True, False], maintain_order=True)
    sections.append(_table(order, _WAITS, _step_words(shown), n_top, width))
    return "\n\n".join(sections)


def scaling_page(rows: Sequence[Mapping[str, Any]], width: int = WIDTH) -> str:
    """Overlap efficiency and throughput of runs on more and more GPUs, against the fewest, and their notes."""
    body = [
        [
            text.counted(row["n_gpus"], "GPU"),
            text.ns(row["latency_ns"]),
            text.frac(row["overlap_efficiency_frac"]),
            text.figure("count", row["tokens_per_s"]),
            text.shortened(row["source"], 40),
        ]
        for row in rows
    ]
    header = ["run", "MoE layer pass", f"O_e = T({rows[0]['n_gpus']}) / T(N)", "tokens/s", "trace"]
    notes = [f"{text.counted(row['n_gpus'], 'GPU')}: {note}" for row in rows for note in row["notes"]]
    return "\n\n".join([table(body, header, width), "\n".join(_notes(notes, width))])


def _notes(notes: Sequence[str], width: int) -> list[str]:
    return [wrapped(f"note: {note}", width, "", "      ") for note in notes]


def _throughput(tokens_per_s: float | None, n_gpus: int) -> str:
    if tokens_per_s is None:
        return ""
    return f": {text.count(tokens_per_s)} tokens/s on {text.counted(n_gpus, 'GPU')}"


def pass_words(found: Passes, tokens_per_s: float | None = None, width: int = WIDTH) -> str:
    """The median pass of MoE layers in a sentence."""
    one = found.medians()
    words = [f"The median pass takes {text.ns(one['dur_ns'])}"]
    if found.how == "host":
        words[0] += ", on the host: there is no device work, so launches and gaps are not known"
    else:
        graph = f" ({text.count(one['n_graph_kernels'])} of them replayed by graphs)" if one["n_graph_kernels"] else ""
        words.append(
            f"it has {text.count(one['n_kernels'])} kernels{graph} from {text.count(one['n_launches'])} launch calls, "
            f"and {text.count(one['n_gaps'])} gaps of {text.ns(one['longest_gap_ns'])} at most"
        )
        words.append(f"devices idle {text.frac(one['idle_frac'])} of the time of passes")
    if one["communication_busy_ns"] or one["communication_hidden_frac"] is not None:
        words.append(
            f"it communicates {text.ns(one['communication_busy_ns'])}, exposed "
            f"{text.ns(one['communication_exposed_ns'])} (all-to-all {text.ns(one['all_to_all_exposed_ns'])}); compute "
            f"hides {text.frac(one['communication_hidden_frac'])} of the communication of all passes"
        )
    else:
        words.append("it does not communicate")
    if one["sm_active_frac"] is not None:
        occupancy = "" if one["occupancy_frac"] is None else f", with {text.frac(one['occupancy_frac'])} of their warps"
        words.append(f"its grids keep at most {text.frac(one['sm_active_frac'])} of the SMs active{occupancy}")
    end = _throughput(tokens_per_s, found.passes.select("rank", "device").n_unique()).removeprefix(": ")
    return wrapped("; ".join([*words, *([end] if end else [])]) + ".", width)


def _parts(found: Passes, n_top: int, width: int) -> str | None:
    """What passes are made of, per pass: kernel classes, or on a host the ranges right within."""
    whole = found.phases if found.how == "host" else found.classes
    if whole.is_empty():
        return None
    name, count = ("name", "n_calls") if found.how == "host" else ("class", "n_kernels")
    n_passes = found.passes.height
    sums = whole.group_by(pl.col(name).cast(pl.String)).agg(pl.sum(count, "time_ns"))
    total_ns = sums["time_ns"].sum() if found.how != "host" else found.passes["dur_ns"].sum()
    sums = sums.sort("time_ns", name, descending=[True, False]).head(n_top)
    body = [
        [what, f"{n / n_passes:,.1f}", text.ns(time_ns / n_passes), text.frac(time_ns / total_ns if total_ns else None)]
        for what, n, time_ns in sums.iter_rows()
    ]
    title = "parts of a pass" if found.how == "host" else "kernel classes of a pass"
    return table(body, [title, _HEADERS.get(count, count), "time", "share"], width)


def _table(rows: pl.DataFrame, columns: Sequence[str], title: str, n_top: int, width: int) -> str:
    body = [
        [_place(row, ""), *(text.figure(name, row[name]) for name in columns)]
        for row in rows.head(n_top).iter_rows(named=True)
    ]
    title = title if rows.height <= n_top else f"{title}, {n_top} of {text.count(rows.height)}"
    return table(body, [title, *(_HEADERS[name] for name in columns)], width)


def _known(rows: pl.DataFrame, columns: Sequence[str]) -> list[str]:
    """The columns in which anything is known."""
    return [name for name in columns if rows[name].count()]


def _steps(late: pl.DataFrame, n_top: int, width: int) -> str:
    body = [
        [
            _step_words(row["step"]), text.ns(row["wait_ns"]), _place(row, ""), text.ns(row["caused_ns"]),
            text.ns(row["busy_longer_ns"]), text.shortened(row["class"] or "", 30), text.ns(row["longer_ns"]),
        ]
        for row in late.head(n_top).iter_rows(named=True)
    ]  # fmt: skip
    title = "steps" if late.height <= n_top else f"{n_top} of {text.count(late.height)} steps"
    return table(body, [title, "waits", "late", "for it", "computes longer", "most in", "longer"], width)


def _who(row: Mapping[str, Any]) -> str:
    """Who waits for whom in a step, and why, in a sentence."""
    if not row["wait_ns"]:
        return f"In {_step_words(row['step'])} nobody waits."
    words = (
        f"In {_step_words(row['step'])} the others wait for {_place(row, '')}: it comes last to "
        f"{text.counted(row['n_last'], 'collective')} and costs them {text.ns(row['caused_ns'])} of "
        f"{text.ns(row['wait_ns'])} waited in all"
    )
    if row["busy_longer_ns"] is None or row["busy_longer_ns"] <= 0:
        return words + "; it does not compute longer than the others, so look at its host, its link or its launches."
    most = "" if row["class"] is None else f", most of it in {row['class']} (+{text.ns(row['longer_ns'])})"
    return f"{words}; it computes {text.ns(row['busy_longer_ns'])} longer than the median of the others{most}."


def _step_words(step: int | None) -> str:
    return "the trace" if step is None else f"step {step}"


def _noun(found: LayerRanks) -> str:
    return "device" if found.members["rank"].null_count() else "rank"


def _place(row: Mapping[str, Any], what: str) -> str:
    """A member (a rank, a device of it) or a pass there, in words; what is null is not said."""
    said = [what] if what else []
    said += [f"rank {row['rank']}"] if row["rank"] is not None else []
    said += [f"device {row['device']}"] if row["device"] is not None else []
    return ", ".join(said) or "host"
