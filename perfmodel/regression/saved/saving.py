"""Saving a capture as a baseline of a store, adding occasions to it, taking a change over."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from perfmodel.errors import InputError, NotComparableError
from perfmodel.files import PART
from perfmodel.regression.compared import compare
from perfmodel.regression.evidence import CAPTURE, TRACES, Evidence, require_comparable
from perfmodel.regression.verdicts import SLOWER, Verdict

from .lookup import differences_words, fitting, heads_of, name_of, same_state
from .restored import costliest, details_of, joined, occasion_of, side_of, workloads_of
from .stored import (
    STORE_SCHEMA,
    Amounts,
    Baseline,
    Entry,
    Head,
    Kept,
    Occasion,
    foreign_files,
    locked,
    read_unlocked,
    write,
)

SAVED, ADDED, UPDATED = "saved", "added", "updated"


@dataclass(frozen=True)
class Took:
    """A workload before and after: geometric means over its runs, and new over old."""

    workload: str
    label: str
    old_ns: float
    new_ns: float
    ratio: float


@dataclass(frozen=True)
class Saving:
    """What was done to a baseline of a store, or would be: `rows` are the workloads of both sides, slowest first.

    `n_new` workloads came to it, `n_unmeasured` of those it had the capture did not measure; what becomes of them,
    `notes` say. `replaced` is the name that the baseline had before, null where it has kept it.
    """

    baseline: str
    replaced: str | None
    entry: Entry
    rows: tuple[Took, ...]
    n_workloads: int
    n_runs: int
    n_occasions: int
    n_new: int
    n_unmeasured: int
    notes: tuple[str, ...]
    is_written: bool

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self) | {"entry": entry_json(self.entry), "notes": list(self.notes)}


def entry_json(entry: Entry) -> dict[str, Any]:
    """An entry of a history as plain values, those that are null too."""
    return msgspec.structs.asdict(entry) | {"changed": {key: list(pair) for key, pair in entry.changed.items()}}


def save(side: Evidence, store: str | Path, *, add: bool = False) -> Saving:
    """Save a side as a baseline of a store, or with `add` as another occasion of the baseline of its fingerprint.

    Raises InputError where there is a baseline already and nothing is to be added, and for measurements that it holds
    already; NotComparableError where there is nothing of this fingerprint to add to.
    """
    store, occasion = Path(store), occasion_of(side)
    if not add:
        _make(store)
    with locked(store, to_write=True):
        heads = heads_of(store)
        same = same_state(heads, side)
        if add and not heads:
            raise InputError(f"store {str(store)!r} holds no baseline to add to; save a first one without --add")
        if add and not same:
            raise NotComparableError(
                f"not comparable: no baseline of store {str(store)!r} is of the machine, software, kernel and settings "
                f"of {side.name!r}, so that there is nothing to add to; {differences_words(heads, side)}"
            )
        if add:
            name = fitting(store, heads, side, ())
            return _write(store, name, _with_occasion(read_unlocked(store / name), side, occasion, store / name))
        if same:
            raise InputError(
                f"store {str(store)!r} has a baseline of this machine, software, kernel and settings already, "
                f"{same[0]}: add another occasion of the same state with --add, or take a change over with "
                "`perfmodel baseline update`" + (", traces of other work into another --store" * (side.kind == TRACES))
            )
        name = name_of(side)
        # What a save that was killed had begun to write is nobody's.
        if (store / name).exists() and any(not one.name.endswith(PART) for one in (store / name).iterdir()):
            raise InputError(f"{str(store / name)!r} exists and is not the baseline that was to be saved there")
        made = _fresh(name, side, occasion, [_entry(SAVED, side, occasion)])
        return _write(store, name, _Change(made, (), len(made.workloads), 0, ()))


def update(
    side: Evidence, store: str | Path, reason: str, axes: Sequence[str] = (), *, dry_run: bool = False
) -> Saving:
    """Take a change over: the medians of the workloads that the side measured replace those of the baseline that fits.

    What it did not measure stays. Where facts differ that `axes` declare, the baseline becomes one of the new
    fingerprint under a new name, with its history; workloads that were not measured leave it. Raises InputError for an
    empty reason and for measurements that the baseline holds already, NotComparableError where none fits.
    """
    store, reason = Path(store), " ".join(reason.split())
    if not reason:
        raise InputError("--reason is empty, expected a sentence on why the baseline changes, for its history")
    occasion = occasion_of(side)
    with locked(store, to_write=not dry_run):
        name = fitting(store, heads_of(store), side, axes)
        old = read_unlocked(store / name)
        change = _updated(old, side, occasion, reason, axes, store / name)
        return _write(store, name, change, is_written=not dry_run)


@dataclass(frozen=True)
class _Change:
    """What a baseline becomes, and what is told of it."""

    baseline: Baseline
    rows: tuple[Took, ...]
    n_new: int
    n_unmeasured: int
    notes: tuple[str, ...]


def _write(store: Path, before: str, change: _Change, *, is_written: bool = True) -> Saving:
    """Write what a baseline becomes, unless it is only to be told."""
    made = change.baseline
    folder = store / made.name
    side = side_of(made, folder)  # what could not be read again is not written
    notes = [*change.notes, *(words for words in side.notes if made.name in words)]
    if is_written:
        if made.name != before:
            _rename(store / before, folder)
        write(folder, made)
        notes += [f"left alone: {name}" for name in foreign_files(folder, made.head)]
    return Saving(
        baseline=made.name,
        replaced=before if before != made.name else None,
        entry=made.head.history[-1],
        rows=change.rows,
        n_workloads=len(made.workloads),
        n_runs=sum(len(one.runs) for one in made.head.occasions),
        n_occasions=len(made.head.occasions),
        n_new=change.n_new,
        n_unmeasured=change.n_unmeasured,
        notes=tuple(notes),
        is_written=is_written,
    )


def _fresh(name: str, side: Evidence, occasion: Occasion, history: list[Entry]) -> Baseline:
    """A baseline of one occasion alone."""
    return _made(
        Baseline(
            name,
            Head(
                schema_version=STORE_SCHEMA,
                kind="capture" if side.kind == CAPTURE else "traces",
                fingerprint=dict(side.fingerprint),
                occasions=[occasion],
                history=history,
                workloads=[],
            ),
            {},
        ),
        workloads_of(side, occasion.digest),
        details_of(side, occasion.digest),
    )


def _made(
    old: Baseline, workloads: dict[str, Kept], details: dict[str, Amounts], n_cut_before: int = 0, **changes: Any
) -> Baseline:
    """A baseline with other workloads, details and facts; occasions of which nothing is left are left out."""
    kept = costliest(details)
    used = {digest for one in (*workloads.values(), *kept.values()) for digest in one.medians_ns}
    occasions = changes.pop("occasions", old.head.occasions)
    head = msgspec.structs.replace(
        old.head, workloads=sorted(workloads), occasions=[one for one in occasions if one.digest in used], **changes
    )
    return Baseline(old.name, head, workloads, kept, max(n_cut_before, len(details) - len(kept)))


def _with_occasion(old: Baseline, side: Evidence, occasion: Occasion, folder: Path) -> _Change:
    _refuse_known(old, occasion)
    _refuse_again(old, old.head.occasions, occasion)
    before = side_of(old, folder)
    rows, verdict = compared(before, side)
    notes = []
    if verdict is not None and verdict.verdict in (*SLOWER, "improved"):
        word = "faster" if verdict.verdict == "improved" else "slower"
        notes.append(
            f"this occasion takes {verdict.ratio:.3f}x the baseline's time ({verdict.ratio_low:.3f} to "
            f"{verdict.ratio_high:.3f}), {word} beyond doubt: another occasion of the same state should not be, for "
            "baselines creep that way; take a change that is meant over with `perfmodel baseline update`"
        )
    entry = _entry(ADDED, side, occasion, rows, verdict)
    n_new, n_unmeasured = _n_other(before, side)
    if n_unmeasured:
        notes.append(f"{n_unmeasured} workloads of the baseline were not measured on this occasion")
    made = _made(
        old,
        joined(old.workloads, workloads_of(side, occasion.digest)),
        joined(old.details, details_of(side, occasion.digest)),
        old.n_details_cut,
        occasions=[*old.head.occasions, occasion],
        history=[*old.head.history, entry],
    )
    return _Change(made, rows, n_new, n_unmeasured, tuple(notes))


def _updated(
    old: Baseline, side: Evidence, occasion: Occasion, reason: str, axes: Sequence[str], folder: Path
) -> _Change:
    _refuse_known(old, occasion)
    before = side_of(old, folder)
    changed = require_comparable(before, side, axes)
    rows, verdict = compared(before, side, axes)
    if not rows:
        raise NotComparableError(
            f"not comparable: {side.name!r} and baseline {old.name!r} share no workload; a capture of further "
            "workloads is added with `perfmodel baseline save --add`"
        )
    n_new, n_unmeasured = _n_other(before, side)
    entry = _entry(UPDATED, side, occasion, rows, verdict)
    history = [*old.head.history, msgspec.structs.replace(entry, reason=reason, changed=changed)]
    if changed:
        history[-1] = msgspec.structs.replace(history[-1], n_left=n_unmeasured)
        notes = [f"{n_unmeasured} workloads of the baseline were not measured and leave it"] if n_unmeasured else []
        return _Change(_fresh(name_of(side), side, occasion, history), rows, n_new, n_unmeasured, tuple(notes))
    notes = [f"{n_unmeasured} workloads were not measured and stay as they are"] if n_unmeasured else []
    # What was calibrated before the change says nothing of the machine as it is now.
    earlier = [msgspec.structs.replace(one, calibration={}) for one in old.head.occasions]
    made = _made(
        old,
        {**old.workloads, **workloads_of(side, occasion.digest)},
        details_of(side, occasion.digest),
        occasions=[*earlier, occasion],
        history=history,
    )
    _refuse_again(old, made.head.occasions[:-1], occasion)
    return _Change(made, rows, n_new, n_unmeasured, tuple(notes))


def compared(before: Evidence, side: Evidence, axes: Sequence[str] = ()) -> tuple[tuple[Took, ...], Verdict | None]:
    """The workloads of both, slowest first, and the verdict on all together, null where no run measured all.

    Raises NotComparableError for traces of other work.
    """
    rows = []
    for key, one in side.workloads.items():
        if key in before.workloads:
            old_ns, new_ns = (statistics.geometric_mean(x.run_ns.values()) for x in (before.workloads[key], one))
            rows.append(Took(key, one.label, old_ns, new_ns, new_ns / old_ns))
    try:
        verdict = compare(before, side, axes=axes, with_model=False).overall.verdict
    except NotComparableError:
        if side.kind == TRACES:
            raise
        verdict = None
    return tuple(sorted(rows, key=lambda row: -row.ratio)), verdict


def _entry(
    event: str, side: Evidence, occasion: Occasion, rows: Sequence[Took] = (), verdict: Verdict | None = None
) -> Entry:
    found: dict[str, Any] = {"event": event, "name": occasion.name, "digest": occasion.digest, "taken": occasion.taken}
    if rows:
        old_ns, new_ns = (statistics.geometric_mean(getattr(row, of) for row in rows) for of in ("old_ns", "new_ns"))
        found |= {"old_ns": old_ns, "new_ns": new_ns, "ratio": new_ns / old_ns}
    if verdict is not None:
        found |= {"ratio": verdict.ratio, "ratio_low": verdict.ratio_low, "ratio_high": verdict.ratio_high}
    found = {key: float(f"{one:.6g}") if isinstance(one, float) else one for key, one in found.items()}  # for people
    return msgspec.convert({**found, "n_workloads": len(side.workloads)}, Entry)


def _n_other(before: Evidence, side: Evidence) -> tuple[int, int]:
    """How many workloads are new in a side, and how many it did not measure."""
    return len(side.workloads.keys() - before.workloads.keys()), len(before.workloads.keys() - side.workloads.keys())


def _refuse_known(old: Baseline, occasion: Occasion) -> None:
    if occasion.digest in old.occasions:
        raise InputError(f"baseline {old.name} holds the measurements of {occasion.name!r} already")


def _refuse_again(old: Baseline, stay: Sequence[Occasion], occasion: Occasion) -> None:
    """Refuse runs that are among the occasions that stay in a baseline: a capture that has grown since."""
    starts = {run.started for one in stay for run in one.runs if run.started is not None}
    again = [run.run for run in occasion.runs if run.started in starts]
    if again:
        raise InputError(
            f"baseline {old.name} holds run {again[0]} of {occasion.name!r} already, from before the capture grew; "
            "measure another occasion into a folder of its own"
        )


def _make(store: Path) -> None:
    try:
        store.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"store {str(store)!r} cannot be made: {error.strerror or error}") from None


def _rename(folder: Path, to: Path) -> None:
    """A baseline under the name that fits what it becomes; its content is whole before and after."""
    try:
        folder.rename(to)
    except OSError as error:
        raise InputError(f"baseline {folder.name!r} cannot become {to.name!r}: {error.strerror or error}") from None
