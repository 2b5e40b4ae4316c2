"""Text pages about saved baselines, and the command that takes an improvement over into one."""

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from perfmodel import text
from perfmodel.report.words import table

if TYPE_CHECKING:  # these bring scipy and scikit-learn, which reading a trace does not need
    from perfmodel.regression import Comparison

DEFAULT_STORE = "baselines"
N_SHOWN, N_ENDS = 20, 10  # workloads of a page; of a longer list both ends
N_VALUE, N_REASON, N_COMMAND = 40, 80, 1000  # characters of a fact, of a reason in a table, of a command


def _held(row: Mapping[str, Any]) -> str:
    """How much a baseline holds, in words."""
    runs, occasions = text.counted(row["n_runs"], "run"), text.counted(row["n_occasions"], "occasion")
    return f"{text.counted(row['n_workloads'], 'workload')}, {runs} on {occasions}"


def baselines_page(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each baseline of a store: of what, how much of it, when it was taken, why it last changed."""
    header = ["baseline", "machine", "torch", "workloads", "runs", "occasions", "latest", "taken", "last reason"]
    keys = ["path", "machine", "torch", "n_workloads", "n_runs", "n_occasions", "capture", "taken", "reason"]
    body = [[_word(row[key], N_REASON if key == "path" else N_VALUE) for key in keys] for row in rows]
    return table(body, header)


def baseline_page(shown: Mapping[str, Any]) -> str:
    """What a baseline holds: of what it is, its occasions, its history, and its costliest workloads."""
    facts = [
        f"{name} {_word(shown[name], N_REASON)}" for name in ("machine", "torch", "kernel", "dtype") if shown[name]
    ]
    lines = [f"{shown['baseline']}: {_held(shown)}", "  " + ", ".join(facts)] if facts else [_held(shown)]
    if shown["n_details"]:
        cut = f", {text.count(shown['n_details_cut'])} that cost less were not kept" if shown["n_details_cut"] else ""
        lines.append(f"  {text.counted(shown['n_details'], 'detail')} of a step{cut}")
    occasions = [
        [one["taken"] or "", one["name"], text.count(one["n_runs"]), "short, may drift" if one["may_drift"] else ""]
        for one in shown["occasions"]
    ]
    history = [
        [one["taken"] or "", one["event"], one["name"], _ratio(one), _word(one["reason"], N_REASON)]
        for one in shown["history"]
    ]
    rows = [
        [
            one["label"],
            text.ns(one["time_ns"]),
            text.frac(one["spread_frac"]),
            text.count(one["n_runs"]),
            one["workload"],
        ]
        for one in shown["workloads"]
    ]
    page = table(rows[:N_SHOWN], ["workload", "time", "spread of runs", "runs", "id"])
    if len(rows) > N_SHOWN:
        page += f"\n... and {len(rows) - N_SHOWN} more"
    return "\n\n".join(
        [
            "\n".join(lines),
            table(occasions, ["occasion", "capture", "runs", ""]),
            table(history, ["taken", "what", "capture", "new over old", "reason"]),
            page,
        ]
    )


def baseline_workload_page(shown: Mapping[str, Any]) -> str:
    """One workload of a baseline with the median of each of its runs."""
    rows = [[one["taken"] or "", one["name"], str(one["run"]), text.ns(one["time_ns"])] for one in shown["medians"]]
    spread = "" if shown["spread_frac"] is None else f", runs spread by {text.frac(shown['spread_frac'])}"
    head = f"{shown['label']} ({shown['workload']})\n{text.ns(shown['time_ns'])} in {shown['baseline']}{spread}"
    return f"{head}\n\n" + table(rows, ["occasion", "capture", "run", "median"])


def saving_page(found: Mapping[str, Any], store: str) -> str:
    """What is done to a baseline: which one, and where it was compared what changes, workloads slowest first."""
    entry = found["entry"]
    lines = [f"{entry['event']}: baseline {found['baseline']} of store {store}: {_held(found)}"]
    if found["replaced"]:
        lines.append(f"takes the place of {found['replaced']}, whose history it goes on with")
    if entry["event"] != "saved" and (found["n_new"] or found["n_unmeasured"]):
        lines.append(f"{found['n_new']} workloads are new, {found['n_unmeasured']} were not measured")
    if entry["ratio"] is not None:
        lines.append(
            f"{_ratio(entry)} the time over {text.counted(len(found['rows']), 'workload')}: geometric mean "
            f"{text.ns(entry['old_ns'])} before, {text.ns(entry['new_ns'])} now"
        )
    blocks = ["\n".join(lines)]
    rows = [[r["label"], text.ns(r["old_ns"]), text.ns(r["new_ns"]), f"{r['ratio']:.3f}x"] for r in found["rows"]]
    if len(rows) > N_SHOWN:
        rows[N_ENDS:-N_ENDS] = [[f"... {len(rows) - 2 * N_ENDS} between", "", "", ""]]
    if rows:
        blocks.append(table(rows, ["workload", "old", "new", "new over old"]))
    if entry["changed"]:
        changed = [[key, _word(old), _word(new)] for key, (old, new) in sorted(entry["changed"].items())]
        blocks.append(table(changed, ["what changed", "old", "new"]))
    return "\n\n".join(blocks)


def _ratio(entry: Mapping[str, Any]) -> str:
    if entry["ratio"] is None:
        return ""
    if entry["ratio_low"] is None:
        return f"{entry['ratio']:.3f}x"
    return f"{entry['ratio']:.3f}x ({entry['ratio_low']:.3f} to {entry['ratio_high']:.3f})"


def _word(value: object, n_most: int = N_VALUE) -> str:
    return "" if value is None else text.shortened(str(value), n_most)


def update_command(comparison: "Comparison", store: str, candidate: str) -> str | None:
    """The command that takes an improvement over into the baseline it was found against; null where nothing is faster,
    and where facts differ, for then the change was meant to be tested."""
    if comparison.changes or not any(case.verdict.verdict == "improved" for case in comparison.cases):
        return None
    place = [] if store == DEFAULT_STORE else ["--store", store]
    return shlex.join(["perfmodel", "baseline", "update", candidate, *place]) + ' --reason "..."'


def update_words(comparison: "Comparison") -> str | None:
    """How to take an improvement over: a sentence, and the command as a block of its own; null where there is none."""
    if comparison.update_command is None:
        return None
    command = text.shortened(comparison.update_command, N_COMMAND)
    return f"Faster than the saved baseline; to take it over, with a reason:\n\n    {command}"
