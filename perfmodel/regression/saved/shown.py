"""What saved baselines say, as plain values: in a line of a list, in full, and of one workload."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from perfmodel.errors import InputError
from perfmodel.text import shortened

from .saving import entry_json
from .stored import Amounts, Baseline, Head


def row_of(name: str, head: Head) -> dict[str, Any]:
    """What a baseline is of, how much it holds, and why it last changed; null where its facts do not tell."""
    facts, latest = head.fingerprint, head.occasions[-1]
    return {
        "baseline": name,
        "kind": head.kind,
        "machine": facts.get("machine.gpu_name") or facts.get("machine.cpu_model"),
        "torch": facts.get("software.torch"),
        "kernel": facts.get("kernel"),
        "dtype": facts.get("settings.dtype"),
        "n_workloads": len(head.workloads),
        "n_runs": sum(len(one.runs) for one in head.occasions),
        "n_occasions": len(head.occasions),
        "capture": latest.name,
        "taken": latest.taken,
        "reason": next((entry.reason for entry in reversed(head.history) if entry.reason), None),
    }


def shown(baseline: Baseline) -> dict[str, Any]:
    """All of a baseline but its single runs; workloads costliest first, `time_ns` the geometric mean over runs and
    `spread_frac` their standard deviation (of logarithms), null for a single run."""
    head = baseline.head
    workloads = [{"workload": key, **_times(one)} for key, one in baseline.workloads.items()]
    occasions = [
        {"name": one.name, "digest": one.digest, "taken": one.taken, "n_runs": len(one.runs)}
        | {"may_drift": one.may_drift, "notes": one.notes}
        for one in head.occasions
    ]
    return row_of(baseline.name, head) | {
        "fingerprint": head.fingerprint,
        "occasions": occasions,
        "history": [entry_json(entry) for entry in head.history],
        "workloads": sorted(workloads, key=lambda row: (-row["time_ns"], row["workload"])),
        "n_details": len(baseline.details),
        "n_details_cut": baseline.n_details_cut,
    }


def shown_workload(baseline: Baseline, name: str) -> dict[str, Any]:
    """One workload of a baseline, by its id or its label, with the median of each run; raises InputError for none."""
    found = [key for key, one in baseline.workloads.items() if name in (key, one.label)]
    if not found:
        raise InputError(
            f"baseline {baseline.name} has no workload {shortened(name, 60)!r}; `perfmodel baseline show "
            f"{baseline.name} --json` lists the ids of its {len(baseline.workloads)}"
        )
    kept, occasions = baseline.workloads[found[0]], baseline.occasions
    medians = [
        {"name": occasions[digest].name, "taken": occasions[digest].taken, "run": run, "time_ns": time_ns}
        for digest in occasions
        for run, time_ns in sorted(kept.medians_ns.get(digest, {}).items())
    ]
    return {"baseline": baseline.name, "workload": found[0], **_times(kept), "medians": medians}


def _times(one: Amounts) -> Mapping[str, Any]:
    times = [time_ns for medians in one.medians_ns.values() for time_ns in medians.values()]
    spread_frac = statistics.stdev(map(math.log, times)) if len(times) > 1 else None
    return {
        "label": one.label,
        "time_ns": statistics.geometric_mean(times),
        "spread_frac": spread_frac,
        "n_runs": len(times),
    }
