"""A sweep from the outside: begin or continue a capture folder and start the measuring processes one after another.

Needs no torch on the CPU. Each run is a process of its own, because the process (its memory layout, its luck) is what
repeats when a measurement is repeated; repeats inside it are not independent.
"""

import datetime
import hashlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from perfmodel import __version__
from perfmodel.errors import InputError

from . import machine, store
from .plan import Plan, Request, file_shares, routing_name
from .plan import plan as make_plan
from .profile_points import chosen_points, file_name
from .progress import Progress
from .timing import FULL, QUICK

# What may differ between the command that began a capture and the one that continues it.
FREE_SETTINGS = ("runs", "memory_limit_bytes")
SAME_MACHINE = ("cpu_model", "cpu_flags", "n_cores", "memory_bytes")
SAME_SOFTWARE = ("torch", "numpy")
BUSY_LOAD = 0.5


class StageError(Exception):
    """A measuring process ended early and has said why; `exit_code` is its own."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"a measuring process ended with {exit_code}")
        self.exit_code = exit_code


def settings_of(request: Request, threads: int, quick: bool, runs: int, memory_limit_bytes: float | None) -> store.Json:
    """Everything that decides what is measured and how, as it stands in capture.json. No folders."""
    shares = file_shares(request.routing_file)
    return {
        **asdict(request),
        "shapes": list(request.shapes),
        "tokens": list(request.tokens),
        "routings": list(request.routings),
        "routing_file": None if request.routing_file is None else routing_name(request.routing_file),
        "routing_file_sha256": None if shares is None else hashlib.sha256(shares.tobytes()).hexdigest(),
        "threads": threads,
        "quick": quick,
        "runs": runs,
        "memory_limit_bytes": memory_limit_bytes,
        "timing": asdict(QUICK if quick else FULL),
    }


def begin(folder: Path, settings: store.Json, plan: Plan) -> None:
    """Write the first capture.json and the plan of a new capture."""
    store.write_workloads(folder, (workload.to_line() for workload in plan.workloads))
    capture = {
        "schema": store.SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "collector": f"perfmodel {__version__}",
        "settings": settings,
        "machine": machine.machine(settings["threads"]),
        "software": machine.software(),
        "calibration": {},
        "kernel": None,
        "n_workloads": len(plan.workloads),
        "skipped": list(plan.skipped),
        "runs": [],
    }
    store.write_capture(folder, capture)


def refuse_other(folder: Path, settings: store.Json, plan: Plan) -> None:
    """Raise InputError unless the folder's capture is of these settings, this plan, this machine and this software."""
    capture = store.read_capture(folder)
    before = capture["settings"]
    changed = [k for k in settings if k not in FREE_SETTINGS and before.get(k) != settings[k]]
    if changed:
        words = "; ".join(f"{key} was {before.get(key)!r} and is {settings[key]!r}" for key in changed)
        raise InputError(f"{folder} holds another plan ({words}); give the same options, or another --out")
    now = {
        "machine": (machine.machine(settings["threads"]), SAME_MACHINE),
        "software": (machine.software(), SAME_SOFTWARE),
    }
    for part, (found, keys) in now.items():
        for key in keys:
            if capture[part].get(key) != found[key]:
                raise InputError(
                    f"{folder} was begun with {key} {capture[part].get(key)!r} and this is {found[key]!r}: "
                    f"measurements of two machines do not belong in one capture; choose another --out"
                )
    if store.workload_ids(folder) != [workload.id for workload in plan.workloads]:
        raise InputError(f"{folder} was planned by another version of the collectors; choose another --out")


def open_folder(folder: Path) -> bool:
    """Whether the folder already holds a capture; makes it when it is new.

    Raises InputError when the path is a file, or a folder of something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file, expected a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder} cannot be made: {error.strerror}") from None
    if (folder / store.CAPTURE).exists():
        return True
    strange = sorted(p.name for p in folder.iterdir() if not p.name.endswith(".part") and p.name != store.WORKLOADS)
    if strange:
        raise InputError(f"--out {folder} holds {strange[0]!r} and no capture; choose an empty or a new folder")
    return False


def _command(folder: Path, stage: str, routing_file: str | None) -> list[str]:
    package = (__package__ or "collectors").split(".")
    command = [sys.executable, "-m", ".".join(package), "stage", stage, "--out", str(folder)]
    return command + (["--routing-file", routing_file] if routing_file else [])


def _environment(threads: int) -> dict[str, str]:
    # The measuring process must find this very package, however the sweep was started.
    depth = len((__package__ or "collectors").split("."))
    home = str(Path(__file__).resolve().parents[depth])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}


def run_stage(
    folder: Path, stage: str, request: Request, *, threads: int, lock: int | None, label: str, progress: Progress
) -> None:
    """Run one measuring process to its end, showing its progress. It holds the folder's lock as long as it lives.

    Raises StageError when it fails; ends it when this process is interrupted.
    """
    progress.show(label, force=True)
    process = subprocess.Popen(
        _command(folder, stage, request.routing_file),
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(threads),
        pass_fds=() if lock is None else (lock,),
        start_new_session=True,  # Ctrl-C is for this process, which ends the other
    )
    try:
        assert process.stdout is not None
        for word in process.stdout:
            progress.n_done += word == "point\n"
            progress.show(label)
        exit_code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        if process.stdout is not None:
            process.stdout.close()
    if exit_code:
        raise StageError(exit_code)


def sweep(
    folder: Path, request: Request, *, threads: int, quick: bool, runs: int, memory_limit_bytes: float | None
) -> None:
    """Measure what is missing of a capture: calibration, every run of every point, profiles.

    Raises InputError for a folder that cannot be used and StageError when a measuring process fails.
    """
    fresh = None if folder.exists() else make_plan(request, memory_limit_bytes)  # refused before anything is made
    exists = open_folder(folder)
    lock = store.lock(folder)
    try:
        if exists:
            memory_limit_bytes = store.read_capture(folder)["settings"]["memory_limit_bytes"]
        plan = fresh or make_plan(request, memory_limit_bytes)
        settings = settings_of(request, threads, quick, runs, memory_limit_bytes)
        if exists:
            refuse_other(folder, settings, plan)
            settings["runs"] = max(runs, store.read_capture(folder)["settings"]["runs"])
            store.update_capture(folder, settings=settings)
        else:
            begin(folder, settings, plan)
        load = machine.load_average()
        if load is not None and load > BUSY_LOAD:
            print(f"note: the load average is {load:g}; other work disturbs the times", file=sys.stderr)
        for sentence in plan.skipped:
            print(f"left out: {sentence}", file=sys.stderr)
        _measure_missing(folder, request, plan, settings, lock)
    finally:
        if lock is not None:
            os.close(lock)


def _measure_missing(folder: Path, request: Request, plan: Plan, settings: store.Json, lock: int | None) -> None:
    points = store.mend_observations(folder)
    n_runs, threads = settings["runs"], settings["threads"]
    progress = Progress(len(plan.workloads) * n_runs, len(points))

    def stage(name: str, label: str) -> None:
        run_stage(folder, name, request, threads=threads, lock=lock, label=label, progress=progress)

    try:
        capture = store.read_capture(folder)
        if not capture["calibration"]:
            stage("calibrate", "checking and calibrating")
        # Points that found no memory are not tried again; a run without its entry did not end.
        left_out = {run["run"]: run["n_left_out"] for run in capture["runs"]}
        n_done = Counter(point["run"] for point in points)
        for run in range(n_runs):
            if run not in left_out or n_done[run] + left_out[run] < len(plan.workloads):
                stage(str(run), f"run {run + 1} of {n_runs}")
        if not all((folder / store.PROFILES / file_name(w)).exists() for w in chosen_points(plan.workloads)):
            stage("profile", "profiling")
        progress.show("done", force=True)
    finally:
        progress.close()


def words(plan: Plan, runs: int) -> Sequence[str]:
    """A plan in a few lines for people."""
    groups: dict[str, list[int]] = {}
    for workload in plan.workloads:
        groups.setdefault(workload.shape, []).append(workload.n_tokens)
    lines = [f"{len(plan.workloads)} workloads, {len(plan.workloads) * runs} points in {runs} runs"]
    for shape, tokens in groups.items():
        first = next(w for w in plan.workloads if w.shape == shape)
        lines.append(
            f"  {shape}: {first.n_experts} experts, top-{first.top_k}, hidden {first.hidden}, inter {first.inter}, "
            f"{len(tokens)} workloads of {min(tokens)} to {max(tokens)} tokens"
        )
    return [*lines, *(f"  left out: {sentence}" for sentence in plan.skipped)]
