"""What is saved of one side of a comparison, and a saved baseline as a side again."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from perfmodel.capture import CALIBRATIONS, LEFT_OUT_TABLE, SEEN_ONCE, Capture, observations_of
from perfmodel.capture_lines import SCHEMA, Calibrated
from perfmodel.errors import InputError, about
from perfmodel.regression.evidence import CAPTURE, Evidence, Measured, Run
from perfmodel.text import short_name

from .stored import (
    MAX_SECONDS,
    STORE_SCHEMA,
    Amounts,
    Baseline,
    Kept,
    Occasion,
    Planned,
    RunLine,
    read,
)

Numbers = Callable[[Amounts], dict[tuple[str, int], int]]  # by the digest of an occasion and its own number of a run
MAX_DETAILS = 200  # of each kind that are kept, the costliest
MAD_TO_SD = 1.4826  # median absolute deviation of a normal distribution as its standard deviation


def load(folder: str | Path) -> Evidence:
    """The saved baseline in a folder as a side of a comparison; raises InputError where it is damaged."""
    return side_of(read(folder), Path(folder))


def occasion_of(side: Evidence) -> Occasion:
    """A capture or a set of traces as one occasion of a baseline; raises InputError for a side of several."""
    if len({run.occasion for run in side.runs}) != 1:
        raise InputError(f"{side.name!r} consists of several occasions; save each of them by itself")
    manifest: Mapping[str, Any] = {} if side.capture is None else side.capture.manifest
    machine = manifest.get("machine") or {}
    return Occasion(
        digest=_digest(side),
        name=side.name if side.capture is None else side.capture.name,
        runs=[RunLine(run=one.run, started=one.started, finished=one.finished) for one in side.runs],
        taken=_taken(side, manifest),
        may_drift=side.may_drift,
        notes=list(side.notes),
        collector=manifest.get("collector"),
        settings=dict(manifest.get("settings") or {}),
        capabilities=dict(manifest.get("capabilities") or {}),
        seen={key: machine[key] for key in SEEN_ONCE if machine.get(key) is not None},
        calibration=msgspec.convert(manifest.get("calibration") or {}, dict[str, Calibrated]),
    )


def _digest(side: Evidence) -> str:
    if side.capture is not None:
        return side.capture.digest
    times = [{key: dict(one.run_ns) for key, one in of.items()} for of in (side.workloads, side.details)]
    return short_name({"kind": side.kind, "fingerprint": dict(side.fingerprint), "times": times})


def _taken(side: Evidence, manifest: Mapping[str, Any]) -> str | None:
    """The date of the collection: as the capture says, else that of the first run, null where neither tells."""
    started = [run.started for run in side.runs if run.started is not None and 0 <= run.started < MAX_SECONDS]
    first = datetime.fromtimestamp(min(started), UTC).date().isoformat() if started else None
    created = manifest.get("created")
    return created[:10] if isinstance(created, str) else first


def workloads_of(side: Evidence, digest: str) -> dict[str, Kept]:
    """The workloads of a side as they are saved, their medians under the digest of the occasion."""
    lines: dict[str, Planned] = {}
    if side.capture is not None:
        rows = side.capture.observations.unique("workload", maintain_order=True)
        fields = Planned.__struct_fields__
        lines = {row["workload"]: Planned(**{key: row[key] for key in fields}) for row in rows.iter_rows(named=True)}
    return {
        key: Kept(schema_version=STORE_SCHEMA, workload=key, line=lines.get(key), **_amounts(one, digest))
        for key, one in side.workloads.items()
    }


def details_of(side: Evidence, digest: str) -> dict[str, Amounts]:
    """The details of a side as they are saved."""
    return {key: Amounts(**_amounts(one, digest)) for key, one in side.details.items()}


def _amounts(one: Measured, digest: str) -> dict[str, Any]:
    log_se = {} if one.log_se is None else {digest: one.log_se}
    return {
        "label": one.label,
        "medians_ns": {digest: dict(one.run_ns)},
        "log_se": log_se,
        "facts": dict(one.facts),
    }


def joined(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Workloads or details of both, with the medians of the occasions of both; what else is told, the other tells."""
    found = dict(first)
    for key, one in other.items():
        found[key] = one
        if key in first:
            both = {name: {**getattr(first[key], name), **getattr(one, name)} for name in ("medians_ns", "log_se")}
            found[key] = msgspec.structs.replace(one, **both)
    return found


def costliest(details: Mapping[str, Amounts]) -> dict[str, Amounts]:
    """The MAX_DETAILS largest details of each kind (`kind` of their facts), by name."""
    by_kind: dict[str, list[tuple[float, str]]] = {}
    for key, one in details.items():
        values = [value for runs in one.medians_ns.values() for value in runs.values()]
        by_kind.setdefault(str(one.facts.get("kind")), []).append((-max(values, default=0.0), key))
    kept = {key for ranked in by_kind.values() for _, key in sorted(ranked)[:MAX_DETAILS]}
    return {key: one for key, one in details.items() if key in kept}


def side_of(baseline: Baseline, folder: Path) -> Evidence:
    """A saved baseline as a side of a comparison, its runs numbered through the occasions.

    Of several occasions the calibrated numbers are pooled to the middle one. A baseline of a single capture has that
    capture's name and digest, so that a model of it is found. Raises InputError for a workload that contradicts itself.
    """
    head = baseline.head
    runs, numbers = _numbered(baseline)
    notes = [note for occasion in head.occasions for note in occasion.notes] + cut_words(baseline)
    is_whole = any(all(run.run in numbers(one).values() for one in baseline.workloads.values()) for run in runs)
    if len(head.occasions) > 1 and not is_whole:
        runs, numbers = _paired(baseline)
        notes.append(
            f"no run measured all workloads of baseline {baseline.name}, of which parts were updated: runs of its "
            "parts count as one by their place, so that all together can be judged"
        )
    workloads = {key: _measured(key, one, numbers(one)) for key, one in sorted(baseline.workloads.items())}
    return Evidence(
        name=baseline.name,
        kind=head.kind,
        fingerprint=head.fingerprint,
        workloads=workloads,
        runs=runs,
        may_drift=any(one.may_drift for one in head.occasions),
        details={key: _measured(key, one, numbers(one)) for key, one in sorted(baseline.details.items())},
        capture=_capture(baseline, folder, workloads, runs) if head.kind == CAPTURE else None,
        notes=tuple(dict.fromkeys(notes)),
    )


def cut_words(baseline: Baseline) -> list[str]:
    """That details were cut, as a sentence; none where all are there."""
    n = baseline.n_details_cut
    return [f"{n} details of baseline {baseline.name} that cost less were not kept"] if n else []


def _numbered(baseline: Baseline) -> tuple[tuple[Run, ...], Numbers]:
    """The runs of all occasions one after the other, and for a workload the number of each run that measured it."""
    of: dict[tuple[str, int], Run] = {}
    for i, occasion in enumerate(baseline.head.occasions):
        offset = 0 if i == 0 else max(run.run for run in of.values()) + 1
        for line in occasion.runs:
            of[occasion.digest, line.run] = Run(line.run + offset, i, line.started, line.finished)

    def numbers(one: Amounts) -> dict[tuple[str, int], int]:
        return {(digest, run): of[digest, run].run for digest, medians in one.medians_ns.items() for run in medians}

    return tuple(of.values()), numbers


def _paired(baseline: Baseline) -> tuple[tuple[Run, ...], Numbers]:
    """The same where parts were measured on other occasions: the first occasion of each workload counts as the first,
    and of its runs the first as the first. When such runs were is not known."""
    places = {one.digest: [run.run for run in one.runs] for one in baseline.head.occasions}
    n_most = max(map(len, places.values()))

    def numbers(one: Amounts) -> dict[tuple[str, int], int]:
        own = [digest for digest in places if digest in one.medians_ns]
        return {
            (digest, run): i * n_most + places[digest].index(run)
            for i, digest in enumerate(own)
            for run in one.medians_ns[digest]
        }

    used = {number for one in baseline.workloads.values() for number in numbers(one).values()}
    return tuple(Run(number, number // n_most) for number in sorted(used)), numbers


def _measured(key: str, one: Amounts, numbers: Mapping[tuple[str, int], int]) -> Measured:
    run_ns = {number: one.medians_ns[digest][run] for (digest, run), number in numbers.items()}
    log_se = math.hypot(*one.log_se.values()) / math.sqrt(len(one.log_se)) if one.log_se else None
    return Measured(key, one.label, dict(sorted(run_ns.items())), log_se, one.facts)


def _capture(baseline: Baseline, folder: Path, workloads: Mapping[str, Measured], runs: Sequence[Run]) -> Capture:
    """What a model can be fitted to and calibrated rates be read from; a run's only time is its median."""
    latest = baseline.head.occasions[-1]
    manifest = _manifest(baseline, runs)
    if len(baseline.head.occasions) == 1:
        name, digest = latest.name, latest.digest
    else:
        times = {key: dict(one.run_ns) for key, one in workloads.items()}
        rests_on = {"fingerprint": dict(baseline.head.fingerprint), "calibration": manifest["calibration"]}
        name, digest = baseline.name, short_name({**rests_on, "times": times})
    lines = {key: kept.line for key, kept in baseline.workloads.items() if kept.line is not None}
    measured = [(key, run, ns) for key, one in workloads.items() for run, ns in one.run_ns.items()]
    with about(f"baseline {baseline.name}"):
        table = observations_of(name, lines, ((key, run, [max(round(ns), 1)]) for key, run, ns in measured))
    table = table.with_columns(time_ns=pl.Series([ns for *_, ns in measured], dtype=pl.Float64))
    probes, left_out = pl.DataFrame(schema=CALIBRATIONS), pl.DataFrame(schema=LEFT_OUT_TABLE)
    return Capture(name, folder, manifest, table, probes, left_out, digest)


def _manifest(baseline: Baseline, runs: Sequence[Run]) -> dict[str, Any]:
    """The manifest that a capture of all occasions would have."""
    head, latest = baseline.head, baseline.head.occasions[-1]
    facts: dict[str, dict[str, Any]] = {"machine": {}, "software": {}, "settings": dict(latest.settings)}
    for key, value in head.fingerprint.items():
        group, _, name = key.partition(".")
        if group in facts:
            facts[group][name] = value
    facts["machine"] |= latest.seen
    missing = {"device", "dtype"} - set(facts["settings"])
    if missing or "kernel" not in head.fingerprint:
        raise InputError(f"baseline {baseline.name!r}: its fingerprint lacks {min(missing, default='kernel')}")
    return {
        "schema": SCHEMA,
        "created": latest.taken,
        "collector": latest.collector,
        **facts,
        "capabilities": latest.capabilities,
        "calibration": pooled(one.calibration for one in head.occasions),
        "kernel": head.fingerprint["kernel"],
        "n_workloads": len(baseline.workloads),
        "runs": [{"run": one.run, "started": one.started, "finished": one.finished} for one in runs],
    }


def pooled(occasions: Iterable[Mapping[str, Calibrated]]) -> dict[str, dict[str, Any]]:
    """The calibrated numbers of several occasions, oldest first, as one: the middle of those that were measured as the
    latest was, with the larger of their scatter within and between."""
    by_key: dict[str, list[Calibrated]] = {}
    for calibration in occasions:
        for key, entry in calibration.items():
            by_key.setdefault(key, []).append(entry)
    return {key: _middle([one for one in entries if one.how == entries[-1].how]) for key, entries in by_key.items()}


def _middle(entries: Sequence[Calibrated]) -> dict[str, Any]:
    values = [one.value for one in entries]
    value, within = statistics.median(values), [one.spread_frac for one in entries if one.spread_frac is not None]
    spread_frac = statistics.median(within) if within else None
    if len(entries) > 1 and value:
        between = MAD_TO_SD * statistics.median(abs(one - value) for one in values) / value
        spread_frac = max(spread_frac or 0.0, between)
    n = [one.n for one in entries if one.n is not None]
    found = {"value": value, "spread_frac": spread_frac, "n": math.fsum(n) if n else None, "how": entries[-1].how}
    return {key: one for key, one in found.items() if one is not None}
