"""The measuring processes: they describe, calibrate, time every point of a run, or profile. They import torch.

Each works on an existing capture folder, appends what it measures to a journal, and says on stdout what it begins and
what it has done; when nobody reads that any more, the collection was killed and the process ends after its point.
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from perfmodel.errors import InputError, first_line
from perfmodel.routing import Shares

from . import calibration, machine, nsys, probes, store
from .design import LONGEST_CALL_S, point_s
from .facts import facts_of
from .layer import Mark, grouped_mm_name
from .memory import HostSide, Pool, free_host_bytes, host_pool_bytes
from .plan import run_order
from .points import WAYS, Prepared, capability, make_pool, prepare
from .profile_points import PROFILES_BYTES, file_name, points_of, range_name
from .profiling import nsys_stage, write_profile
from .refusals import MOST_FATAL, Checked, refuse_large, refuse_slow, tired_ways, way_of
from .studies import Facts
from .timing import Limits, clock_of, measure, measure_undisturbed
from .workers import RESTART
from .workloads import Workload, file_shares, pool_bytes

COLD_CACHES = 4  # weights are read again after this many last-level caches of other weights
ORDER_BLOCK = 24  # points that are shuffled among themselves: the plan's order still decides what comes first
POOL_SHARE_OF_FREE = 0.8  # the rest is for activations and for other dtypes
CALL_OVER_PLAN, LEAST_REFUSED_S = 4.0, 1.0  # a call may take so much longer than the longest that was planned
PACE_GAIN = 0.2  # of how wrong the last guess was, into how wrong the next is taken to be
FIRST_POINT_S = 10.0  # of a dtype: its pool is made
MOST_CORE_SHARE = 0.15  # of a run's time, for the calibration at its end
PATIENCE_SHARE = 0.1  # of a run's time, for waiting until others are quiet


def say(**word: object) -> None:
    """Tell the collection about a step; raises BrokenPipeError when it is gone."""
    sys.stdout.write(json.dumps(word) + "\n")
    sys.stdout.flush()


@dataclass
class Stage:
    """What every stage works with; `seconds` is the time it has, null for as much as it takes."""

    folder: Path
    settings: store.Json
    facts: Facts
    limits: Limits
    files: Mapping[str, Shares]
    seconds: float | None
    started: float

    @property
    def left_s(self) -> float:
        """Seconds left of this stage's time."""
        return float("inf") if self.seconds is None else self.started + self.seconds - time.monotonic()

    @property
    def patience_s(self) -> float:
        """Seconds this stage may wait altogether until others are quiet."""
        most = self.limits.patience_s
        return most if self.seconds is None else min(most, PATIENCE_SHARE * self.seconds)

    def leave_out(self, entry: store.Json, error: BaseException) -> None:
        """Write down what could not be measured, and why; a device that no longer answers ends the process."""
        reason = first_line(error)[:300]
        if not isinstance(error, InputError | RuntimeError | OSError | MemoryError):
            reason = f"{type(error).__name__}: {reason}"  # another torch, another driver
        is_fatal = self.settings["device"] == "cuda" and not device_answers()
        fatal = {"is_fatal": True} if is_fatal else {}
        store.append(self.folder, store.LEFT_OUT, {**entry, "reason": reason, **fatal, "started": _now()})
        print(f"left out: {' '.join(f'{k} {v}' for k, v in entry.items() if k != 'params')}: {reason}", file=sys.stderr)
        say(left=entry)
        if is_fatal:
            raise SystemExit(RESTART)


def device_answers() -> bool:
    """Whether the GPU still works in this process: some errors stay for as long as it lives."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


# --- describe, calibrate ---


def describe(stage: Stage) -> None:
    """What the machine is, which software runs, and which access modes work on it."""
    device = stage.settings["device"]
    # A way that took its process with it is known from the journal and not tried again.
    found = {e["capability"]: e["reason"] for e in store.left_out(stage.folder) if "capability" in e}
    for way in (way for way in WAYS if way not in found):
        say(begin={"capability": way}, seconds=2)
        found[way] = capability(device, way)
        say(capability=way)
        if device == "cuda" and not device_answers():
            entry = {"capability": way, "reason": found[way] or "the device no longer answered", "started": _now()}
            store.append(stage.folder, store.LEFT_OUT, entry)
            raise SystemExit(RESTART)
    say(
        end={
            "machine": machine.gpu(device),
            "software": machine.torch_build(),
            "kernel": grouped_mm_name(),
            "capabilities": {way: found[way] for way in WAYS},
            "stated": probes.stated_numbers(device),
        }
    )


def _now() -> int:
    """Seconds since 1970, as journals note them."""
    return int(time.time())


def probes_of(stage: Stage) -> list[probes.Probe]:
    """All that is to be measured of this machine, the important ones first."""
    settings = stage.settings
    return probes.probes(settings["device"], stage.facts.dtypes, torch.get_num_threads(), settings["preset"])


def calibrate(stage: Stage, run: int, core_only: bool = False) -> None:
    """Every probe that is not on disk yet for this run, the important ones first, as long as time lasts."""
    done = {calibration.key(line) for line in store.calibrations(stage.folder) if line["run"] == run}
    done |= {calibration.key(entry) for entry in store.left_out(stage.folder) if "probe" in entry}
    for probe in probes_of(stage):
        if (core_only and not probe.core) or probe.key in done:
            continue
        if stage.left_s <= 0:
            break
        entry = {"probe": probe.name, "params": dict(probe.params), "run": run}
        say(begin=entry, seconds=5)
        began = _now()
        try:
            line = probes.run_probe(probe, stage.limits, run)
        except (InputError, RuntimeError, OSError, MemoryError) as error:
            stage.leave_out(entry, error)
            continue
        store.append(stage.folder, store.CALIBRATION, {**line, "started": began})
        say(probe=probe.name)
    if not core_only:
        say(end={"machine": {"under_load": calibration.seen_under_load(store.calibrations(stage.folder))}})


def core_reserve_s(stage: Stage) -> float:
    """Seconds of a run to keep for the calibration at its end: what its probes took before, at most a small share."""
    if stage.seconds is None or stage.settings["preset"] == "quick":
        return 0.0
    core = {probe.key for probe in probes_of(stage) if probe.core}
    took_s = {calibration.key(line): line.get("took_s", 0.0) for line in store.calibrations(stage.folder)}
    return min(MOST_CORE_SHARE * stage.seconds, float(sum(took_s[key] for key in core & set(took_s))))


# --- a run ---


def the_pool(stage: Stage, workloads: Sequence[Workload], dtype: str) -> Pool:
    """The weights of all workloads of a dtype whose layer fits in what is free; `refuse_large` tells of the others."""
    cold_bytes = COLD_CACHES * stage.facts.cache_bytes
    device = stage.settings["device"]
    free = free_host_bytes() if device == "cpu" else torch.cuda.mem_get_info()[0]
    most = min(stage.facts.pool_limit_bytes, POOL_SHARE_OF_FREE * free)
    limit = int(stage.facts.host_limit_bytes)
    refused = InputError(f"no layer fits in the {free} bytes of memory that are free")
    while mine := [w for w in workloads if w.dtype == dtype and w.moe_shape.layer_bytes <= most]:
        n_bytes = pool_bytes(mine, cold_bytes, most)
        try:
            host = HostSide(limit, host_pool_bytes(mine, limit))
            return make_pool(n_bytes, cold_bytes, dtype, device, stage.settings["seed"], host)
        except (RuntimeError, MemoryError) as error:  # less is free than is told, or a limit stands that nobody tells
            # Of the error only its words: it holds on to what it had begun.
            refused, most = InputError(first_line(error)), n_bytes / 2
    raise refused


def pool_of(pools: dict[str, Pool], stage: Stage, workloads: Sequence[Workload], dtype: str) -> Pool:
    """The weights of a dtype, made when a workload first needs them."""
    if dtype not in pools:
        pools[dtype] = the_pool(stage, workloads, dtype)
    return pools[dtype]


def todo_of(stage: Stage, planned: Sequence[Workload], run: int) -> list[Workload]:
    """What a run has to measure, in its order: the first whatever time allows, later ones what the first measured."""
    points = store.points(stage.folder)
    done = {point["workload"] for point in points if point["run"] == run}
    failed = {entry.get("workload") for entry in store.left_out(stage.folder)}
    in_first = {point["workload"] for point in points if point["run"] == 0}
    budgeted = stage.settings["minutes"] is not None
    wanted = [w for w in planned if run == 0 or not budgeted or w.id in in_first]
    block = ORDER_BLOCK if budgeted and run == 0 else None
    order = run_order(wanted, stage.settings["seed"], run, block)
    return [w for w in order if w.id not in done | failed]


def run_stage(stage: Stage, planned: Sequence[Workload], run: int) -> None:
    """Time every point of a run that is not on disk yet; one line on disk for each."""
    todo = todo_of(stage, planned, run)
    n_before = sum(point["run"] == run for point in store.points(stage.folder))
    record = {"run": run, "started": _now(), "load_before": machine.load_average(), "n_resumed": n_before}
    counts, waited_s = {"n_left_out": 0, "n_disturbed": 0, "n_todo": 0}, 0.0
    pools: dict[str, Pool] = {}
    checked, tired = Checked(stage.folder, planned, stage.files), tired_ways(stage.folder, planned)
    core_s = core_reserve_s(stage)
    pace: dict[str, float] = defaultdict(lambda: 1.0)  # how wrong guesses are on this machine, by access
    with torch.inference_mode():
        for order, w in enumerate(todo):
            guess_s = point_s(w, stage.facts, stage.limits)
            if stage.left_s - core_s < pace[w.access] * guess_s:
                counts["n_todo"] += 1
                continue
            entry, began, clock_s = {"workload": w.id, "run": run}, _now(), time.monotonic()
            more_s = 0.0 if w.dtype in pools else FIRST_POINT_S
            say(begin=entry, seconds=guess_s + more_s, waits_s=stage.patience_s - waited_s)
            try:
                if way_of(w) in tired:
                    raise InputError(f"{MOST_FATAL} other points run in this way have ended their process")
                refuse_large(pool_of(pools, stage, planned, w.dtype), w)
                checked.refuse_wrong(pools[w.dtype], w)
                timed_s = time.monotonic()
                times, facts, was_disturbed, point_waited_s = _timed(stage, pools[w.dtype], w, run, waited_s)
            except Exception as error:
                counts["n_left_out"] += 1
                stage.leave_out(entry, error)
                continue
            ended_s = time.monotonic()
            waited_s += point_waited_s
            wrong = min(30.0, (ended_s - timed_s - point_waited_s) / guess_s)
            pace[w.access] += PACE_GAIN * (wrong - pace[w.access])
            point = {
                **entry, "times_ns": [round(t) for t in times], "started": began, "order": n_before + order,
                "took_s": round(ended_s - clock_s, 3), **({"facts": facts} if facts else {}),
            }  # fmt: skip
            store.append(stage.folder, store.OBSERVATIONS, point)
            counts["n_disturbed"] += was_disturbed
            say(point=w.id)
    pools.clear()
    if stage.settings["preset"] != "quick":  # machines drift: see where they are at the end of each run
        calibrate(stage, run + 1, core_only=True)
    say(end={**record, "finished": _now(), **counts, "waited_s": round(waited_s)})


def _timed(
    stage: Stage, pool: Pool, w: Workload, run: int, waited_s: float
) -> tuple[list[float], Mapping[str, object], bool, float]:
    """The repeats of one point in ns per call, what is to be known about it, whether others disturbed it, waiting s."""
    limits = stage.limits
    prepared = prepare(pool, w, stage.files.get(w.routing), run)
    try:
        if stage.settings["minutes"] is not None:
            longest_s = max(LEAST_REFUSED_S, CALL_OVER_PLAN * LONGEST_CALL_S[stage.settings["preset"]])
            refuse_slow(prepared.call, w.device, longest_s * prepared.n_inner)
        attempt = partial(measure, prepared.call, clock_of(w.device), limits)
        left_s = max(0.0, min(stage.patience_s - waited_s, stage.left_s))
        times, was_disturbed, took_s = measure_undisturbed(attempt, machine.others_busy_s, limits.n_tries, left_s)
    finally:
        prepared.close()
    return [t / prepared.n_inner for t in times], prepared.facts, was_disturbed, took_s


# --- profiles ---


def profile_stage(stage: Stage) -> None:
    """Profile the chosen points into profiles/."""
    (stage.folder / store.PROFILES).mkdir(exist_ok=True)
    pools: dict[str, Pool] = {}
    failed = {entry.get("profile") for entry in store.left_out(stage.folder)}
    points = points_of(stage.folder)
    with torch.inference_mode():
        for w in points:
            path = stage.folder / store.PROFILES / file_name(w)
            if path.exists() or path.name in failed:
                continue
            if stage.left_s <= 0:
                break
            entry = {"profile": path.name}
            say(begin=entry, seconds=10)
            try:
                pool = pool_of(pools, stage, points, w.dtype)
                refuse_large(pool, w)
                write_profile(path.parent, partial(prepare, pool, w, stage.files.get(w.routing), 0), w)
            except Exception as error:
                stage.leave_out(entry, error)
                continue
            taken = sum(file.stat().st_size for file in path.parent.glob("*.gz"))
            if taken > PROFILES_BYTES:
                path.unlink()
                stage.leave_out(
                    entry, InputError(f"with it the profiles would take {taken} bytes, too many to hand on")
                )
                continue
            say(profile=path.name)
    say(end={})


def record_stage(stage: Stage) -> None:
    """Run the same points once more, for an nsys around this process."""
    points = nsys.chosen(stage.folder)
    pools: dict[str, Pool] = {}

    def prepare_of(w: Workload) -> Callable[[Mark], Prepared]:
        return partial(prepare, pool_of(pools, stage, points, w.dtype), w, stage.files.get(w.routing), 0)

    with torch.inference_mode():
        nsys_stage(
            points,
            prepare_of,
            lambda w: say(begin={"nsys": range_name(w)}, seconds=10),
            lambda w, error: stage.leave_out({"nsys": range_name(w)}, error),
        )


def work(
    folder: Path, arguments: Sequence[str], routing_files: Sequence[str], seconds: float | None, started: float
) -> None:
    """Do one stage of a collection: `describe`, `calibrate`, `run N`, `profile` or `nsys`.

    The process began at `started` (monotonic seconds): loading torch is part of its time.
    """
    capture = store.read_capture(folder)
    settings = capture["settings"]
    if (node := capture["machine"].get("gpu_numa_node")) is not None:
        machine.stay_near(node)
    torch.set_num_threads(min(settings["threads"], machine.n_physical_cores()))
    stage = Stage(
        folder, settings, facts_of(capture), Limits(**settings["timing"]), file_shares(routing_files), seconds, started
    )
    name = arguments[0]
    if name == "describe":
        describe(stage)
    elif name == "calibrate":
        calibrate(stage, 0)
    else:
        planned = [Workload.from_line(line) for line in store.read_workloads(folder)]
        if name == "run":
            run_stage(stage, planned, int(arguments[1]))
        elif name == "profile":
            profile_stage(stage)
        elif name == "nsys":
            record_stage(stage)
