"""A capture from the outside: begin or continue its folder, and run the measuring processes one after another.

Needs no torch. A campaign plans to a time budget from what it finds of the machine; a sweep measures a grid to its
end. Each run is a process of its own, because the process (its memory layout, its luck) is what repeats when a
measurement is repeated; repeats inside it are not independent.
"""

import datetime
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from perfmodel import __version__
from perfmodel.errors import InputError
from perfmodel.hardware import same_fact

from . import calibration, machine, nsys, store
from .design import design
from .facts import facts_of
from .plan import Request
from .plan import plan as grid
from .profile_points import file_name, points_of
from .progress import Progress
from .timing import Limits
from .words import summary_words
from .workers import SAID_WHY, Stage, StageError, Wrap, run_stage
from .workloads import Workload, file_shares, routing_name

# What may differ between the command that began a capture and the one that continues it.
FREE_SETTINGS = ("runs", "minutes", "nsys")
SAME_MACHINE = ("cpu_model", "cpu_flags", "n_cores", "memory_bytes")
SAME_SOFTWARE = ("torch", "numpy")
BUSY_LOAD = 0.5
CALIBRATION_SHARE = 0.3  # of the time budget, at most
PROFILE_SHARE = 0.1
MOST_PROFILE_SHARE = 0.15  # between two runs, so that slow profiles do not take the place of repeats
ROUND_SLICE_S = 20.0  # for each run, which starts a process anew
MOST_ROUNDS = 3
LEAST_SLICE_S = 5.0  # a process that starts with less has no time to measure


@dataclass(frozen=True)
class Order:
    """What the user asked for: the settings of the capture, the limits of timing, and where routing files lie.

    `request` is the grid of a sweep, null for a campaign, which plans by itself. `started` is when the command began
    (monotonic seconds), since loading torch is part of the minutes; null: now.
    """

    settings: store.Json
    limits: Limits
    routing_files: tuple[str, ...] = ()
    request: Request | None = None
    started: float | None = None


def settings_of(kind: str, *, device: str, dtypes: Sequence[str], threads: int, runs: int, seed: int, preset: str,
                minutes: float | None, limits: Limits, routing_files: Sequence[str], grid_of: Request | None = None,
                ) -> store.Json:  # fmt: skip
    """Everything that decides what is measured and how, as it stands in capture.json. No folders."""
    shares = file_shares(routing_files)
    settings: store.Json = {
        "kind": kind, "device": device, "dtype": dtypes[0], "dtypes": list(dtypes), "preset": preset,
        "minutes": minutes, "runs": runs, "threads": threads, "seed": seed,
        "routing_files": [routing_name(source) for source in routing_files],
        "routing_files_sha256": {name: hashlib.sha256(s.tobytes()).hexdigest() for name, s in shares.items()},
        "timing": asdict(limits),
    }  # fmt: skip
    if grid_of is not None:
        if grid_of.points:
            content = json.dumps([asdict(point) for point in grid_of.points], sort_keys=True)
            settings["points_sha256"] = hashlib.sha256(content.encode()).hexdigest()
        else:
            settings |= {key: list(getattr(grid_of, key)) for key in ("shapes", "tokens", "routings")}
    return settings


def begin(folder: Path, settings: store.Json) -> None:
    """Write the first capture.json of a new capture."""
    store.write_capture(
        folder,
        {
            "schema": store.SCHEMA,
            "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "collector": f"perfmodel {__version__}",
            "settings": settings,
            "machine": machine.machine(settings["threads"]),
            "software": machine.software(),
            "capabilities": None,
            "stated": {},
            "calibration": {},
            "kernel": None,
            "n_workloads": None,
            "skipped": [],
            "runs": [],
            "spent_s": 0.0,
            "spent_until": int(time.time()),
        },
    )


def refuse_other(folder: Path, settings: store.Json) -> None:
    """Raise InputError unless the folder's capture is of these settings, this machine and this software."""
    capture = store.read_capture(folder)
    before = capture["settings"]
    changed = [k for k in settings if k not in FREE_SETTINGS and before.get(k) != settings[k]]
    if changed:
        words = "; ".join(f"{key} was {before.get(key)!r} and is {settings[key]!r}" for key in changed)
        raise InputError(f"{folder} holds another plan ({words}); give the same options, or another --out")
    refuse_other_machine(folder, capture, settings["threads"])


def refuse_other_machine(folder: Path, capture: store.Json, threads: int) -> None:
    """Raise InputError unless a capture was begun on this machine with this software."""
    now = {
        "machine": (machine.machine(threads), SAME_MACHINE),
        "software": (machine.software(), SAME_SOFTWARE),
    }
    for part, (found, keys) in now.items():
        for key in keys:
            if not same_fact(key, capture[part].get(key), found[key]):
                raise InputError(
                    f"{folder} was begun with {key} {capture[part].get(key)!r} and this is {found[key]!r}: "
                    f"measurements of two machines do not belong in one capture; choose another --out"
                )


def open_folder(folder: Path, manifest: str = store.CAPTURE) -> bool:
    """Whether the folder already holds a capture, as the file `manifest` tells; makes it when it is new.

    Raises InputError when the path is a file, or a folder of something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file, expected a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder} cannot be made: {error.strerror}") from None
    if (folder / manifest).exists():
        return True
    strange = sorted(p.name for p in folder.iterdir() if not p.name.endswith(".part") and p.name != store.WORKLOADS)
    if strange:
        raise InputError(f"--out {folder} holds {strange[0]!r} and no {manifest}; choose an empty or a new folder")
    return False


def collect(folder: Path, order: Order) -> None:
    """Measure what is missing of a capture: calibration, every run of every point that time allows, profiles.

    Raises InputError for a folder that cannot be used and StageError when a measuring process fails.
    """
    if order.request is not None:
        grid(order.request, None)  # a plan that cannot be is refused before anything is made
    open_folder(folder)
    try:
        lock = store.lock(folder, 0.0)
    except InputError:
        print(f"note: {folder} is in use; waiting for a process that may be at its last point", file=sys.stderr)
        lock = store.lock(folder)
    try:
        if open_folder(folder):  # asked again: another command may have begun it while this one waited for the lock
            refuse_other(folder, order.settings)
            _reopen(folder, order.settings)
        else:
            begin(folder, order.settings)
        load = machine.load_average()
        if load is not None and load > BUSY_LOAD:
            print(f"note: the load average is {load:g}; other work disturbs the times", file=sys.stderr)
        Collection(folder, order, lock).run()
    finally:
        if lock is not None:
            os.close(lock)


def _reopen(folder: Path, settings: store.Json) -> None:
    """Take over more runs or minutes than a capture had; with more minutes all runs go on where time had cut them."""
    capture = store.read_capture(folder)
    before, now = capture["settings"], dict(settings)
    now["runs"] = max(before["runs"], now["runs"])
    runs = capture["runs"]
    if now["minutes"] is not None:
        if now["minutes"] > before["minutes"]:
            if any(run["n_todo"] for run in runs):
                runs = []  # later runs repeat what the first will have measured
            store.update_capture(folder, calibrated=False)  # what time had cut off of it
        now["minutes"] = max(before["minutes"], now["minutes"])
    store.update_capture(folder, settings={**before, **now}, runs=runs)


class Collection:
    """The stages of one capture in order, with what they share: folder, order, lock, time budget, progress."""

    def __init__(self, folder: Path, order: Order, lock: int | None) -> None:
        self.folder, self.order, self.lock = folder, order, lock
        capture = store.read_capture(folder)
        self.n_runs, minutes = capture["settings"]["runs"], capture["settings"]["minutes"]
        started = time.monotonic() if order.started is None else order.started
        self.deadline = None if minutes is None else started + 60 * minutes - spent_s(folder)
        self.progress = Progress(0, 0, deadline=self.deadline)
        self.has_tried_nsys = False

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left; endless for a sweep."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def stage(self, label: str, *arguments: str, seconds: float | None = None, wrap: Wrap = list) -> list[store.Json]:
        """Run one stage, showing progress and keeping the clock; returns the last words of its processes."""
        ends: list[store.Json] = []
        routing = [word for source in self.order.routing_files for word in ("--routing-file", source)]
        limit = None if seconds is None or seconds == float("inf") else max(0.0, seconds)

        def on_word(word: store.Json) -> None:
            self.progress.n_done += "point" in word
            if "end" in word:
                ends.append(word["end"])
            self.progress.show(label)

        self.progress.show(label, force=True)
        settings = self.order.settings
        stage = Stage(self.folder, [*arguments, *routing], settings["threads"], self.lock, wrap, limit)
        before = spent_s(self.folder)
        started = time.monotonic()
        try:
            run_stage(stage, on_word)
        finally:
            took_s = time.monotonic() - started
            store.update_capture(self.folder, spent_s=round(before + took_s, 1), spent_until=int(time.time()) + 1)
        return ends

    def run(self) -> None:
        """Everything that is missing, in the order in which a cut hurts least."""
        try:
            self.describe()
            self.calibrate()
            workloads = self.plan()
            self.measure(workloads)
            store.pack_plan(self.folder)
            self.progress.show("done", force=True)
        finally:
            self.progress.close()
        for line in summary_words(self.folder, spent_s(self.folder)):
            print(line, file=sys.stderr)
        if not store.points(self.folder):
            raise StageError(1, f"no point was measured; {store.LEFT_OUT} says why, unless time was too short")

    def describe(self) -> None:
        """What the machine is and can do, as its own process finds."""
        if store.read_capture(self.folder)["capabilities"] is not None:
            return
        for found in self.stage("looking at the machine", "describe", seconds=self.left_s):
            capture = store.read_capture(self.folder)
            parts = {part: {**capture[part], **found[part]} for part in ("machine", "software")}
            more = {name: found[name] for name in ("kernel", "capabilities", "stated")}
            store.update_capture(self.folder, **parts, **more)

    def calibrate(self) -> None:
        """The machine's numbers, once before the first run."""
        if store.read_capture(self.folder).get("calibrated"):
            return
        minutes = store.read_capture(self.folder)["settings"]["minutes"]
        done_s = sum(line.get("took_s", 0.0) for line in store.calibrations(self.folder) if line["run"] == 0)
        seconds = min(self.left_s, CALIBRATION_SHARE * 60 * (minutes or float("inf")) - done_s)
        if seconds > 0:
            for found in self.optional("calibrating", "calibrate", seconds=seconds):
                seen = store.read_capture(self.folder)["machine"]
                store.update_capture(self.folder, machine={**seen, **found.get("machine", {})})
        self.pool(calibrated=True)

    def optional(self, label: str, *arguments: str, seconds: float, wrap: Wrap = list) -> list[store.Json]:
        """A stage without which the others still are worth their time: that it failed is one sentence."""
        try:
            return self.stage(label, *arguments, seconds=seconds, wrap=wrap)
        except StageError as error:
            if error.exit_code in SAID_WHY:
                raise
            print(f"{label} ended early: {error}", file=sys.stderr)
            return []

    def pool(self, **more: object) -> None:
        """One calibration of all processes so far into capture.json."""
        stated = store.read_capture(self.folder)["stated"]
        measured = calibration.summary(store.calibrations(self.folder))
        store.update_capture(self.folder, calibration={**measured, **stated}, **more)

    def plan(self) -> list[Workload]:
        """The planned workloads, the most telling first; written once, so that a continued capture has the same."""
        store.unpack_plan(self.folder)
        capture = store.read_capture(self.folder)
        if capture["n_workloads"] is None:
            facts = facts_of(capture)
            if self.order.request is None:
                files = file_shares(self.order.routing_files)
                points, skipped = design(facts, capture["settings"]["preset"], capture["settings"]["seed"], files)
                lines = [{**point.workload.to_line(), "study": point.study} for point in points]
            else:
                planned = grid(self.order.request, facts.memory_limit_bytes)
                lines, skipped = [w.to_line() for w in planned.workloads], list(planned.skipped)
            store.write_workloads(self.folder, lines)
            capture = store.update_capture(self.folder, n_workloads=len(lines), skipped=skipped)
            for sentence in skipped:
                print(f"left out: {sentence}", file=sys.stderr)
        return [Workload.from_line(line) for line in store.read_workloads(self.folder)]

    def measure(self, workloads: Sequence[Workload]) -> None:
        """Every run, and all again where they left time: later ones have no checks to make and are through sooner.

        Profiles come after the first run, because without them a cut capture shows no structure.
        """
        self.progress.n_total = len(workloads) * self.n_runs
        self.progress.n_before = len(store.points(self.folder))
        for n_rounds in range(1, MOST_ROUNDS + 1):
            for run in range(self.n_runs):
                if run == 1:
                    most = MOST_PROFILE_SHARE * 60 * (self.order.settings["minutes"] or float("inf"))
                    self.profile(min(self.left_s, most))
                self.one_run(run)
            self.profile(self.left_s)
            was_cut = any(record["n_todo"] for record in store.read_capture(self.folder)["runs"])
            has_time = self.deadline is not None and self.left_s >= ROUND_SLICE_S * self.n_runs
            if n_rounds == MOST_ROUNDS or not was_cut or not has_time:
                break
            store.update_capture(self.folder, runs=[])

    def one_run(self, run: int) -> None:
        """What is missing of a run, within its part of the time."""
        if any(record["run"] == run for record in store.read_capture(self.folder)["runs"]):
            return
        has_profiles = any((self.folder / store.PROFILES).glob("*"))
        seconds = self.left_s * (1.0 if has_profiles else 1.0 - PROFILE_SHARE) / (self.n_runs - run)
        if seconds < LEAST_SLICE_S:
            return
        label = f"run {run + 1} of {self.n_runs}"
        for record in self.stage(label, "run", str(run), seconds=seconds):
            runs = [r for r in store.read_capture(self.folder)["runs"] if r["run"] != run]
            store.update_capture(self.folder, runs=[*runs, record])
        self.pool()

    def profile(self, seconds: float) -> None:
        """Structure of a few points as traces; what cannot be profiled is said and left out."""
        if seconds > 0 and profiles_missing(self.folder):
            self.optional("profiling", "profile", seconds=seconds, wrap=nsys.uninjected)
        wants_nsys = self.order.settings["nsys"] and not self.has_tried_nsys and self.left_s > 0
        if wants_nsys and not any((self.folder / store.PROFILES).glob("*.sqlite")):
            self.has_tried_nsys = True
            nsys_profile(self, min(seconds, self.left_s))


def profiles_missing(folder: Path) -> list[Workload]:
    """The points to profile that have no trace yet and did not fail."""
    failed = {entry.get("profile") for entry in store.left_out(folder)}
    there = {path.name for path in (folder / store.PROFILES).glob("*")}
    return [w for w in points_of(folder) if file_name(w) not in there | failed]


def nsys_profile(collection: Collection, seconds: float) -> None:
    """The same points under Nsight Systems; what is missing for that is one sentence, and the capture is whole."""
    try:
        nsys.collect(collection.folder, partial(collection.stage, seconds=seconds))
    except (InputError, StageError) as error:
        print(f"no Nsight Systems profile: {error}", file=sys.stderr)


def spent_s(folder: Path) -> float:
    """Seconds that the measurements of a capture have taken: of finished stages, and of a killed one's journal."""
    capture = store.read_capture(folder)
    since = capture["spent_until"]
    lines = [*store.calibrations(folder), *store.points(folder)]
    return float(capture["spent_s"] + sum(line.get("took_s", 0.0) for line in lines if line.get("started", 0) >= since))
