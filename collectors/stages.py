"""The measuring processes: they describe, calibrate, time every point of a run, or profile. They import torch.

Each works on an existing capture folder, appends what it measures to a journal, and says on stdout what it begins and
what it has done; when nobody reads that any more, the collection was killed and the process ends after its point.
"""

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from perfmodel.errors import InputError
from perfmodel.routing import Shares

from . import calibration, machine, nsys, probes, store
from .design import point_s
from .facts import facts_of
from .layer import Mark, grouped_mm_name
from .memory import HostSide, Pool, host_pool_bytes
from .plan import run_order
from .points import WAYS, Prepared, capability, check, make_pool, prepare
from .profile_points import file_name, points_of, range_name
from .profiling import nsys_stage, write_profile
from .studies import Facts
from .timing import Limits, clock_of, measure, measure_undisturbed
from .workers import RESTART
from .workloads import Workload, file_shares, pool_bytes

COLD_CACHES = 4  # weights are read again after this many last-level caches of other weights
ORDER_BLOCK = 24  # points that are shuffled among themselves: the plan's order still decides what comes first
CHECK_TOKENS = 16
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

    def leave_out(self, entry: store.Json, error: BaseException) -> None:
        """Write down what could not be measured, and why; a device that no longer answers ends the process."""
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        store.append(self.folder, store.LEFT_OUT, {**entry, "reason": reason, "started": _now()})
        print(f"left out: {' '.join(f'{k} {v}' for k, v in entry.items() if k != 'params')}: {reason}", file=sys.stderr)
        say(left=entry)
        if self.settings["device"] == "cuda" and not device_answers():
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
        say(begin={"capability": way}, seconds=10)
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


def calibrate(stage: Stage, run: int, core_only: bool = False) -> None:
    """Every probe that is not on disk yet for this run, the important ones first, as long as time lasts."""
    settings = stage.settings
    done = {calibration.key(line) for line in store.calibrations(stage.folder) if line["run"] == run}
    done |= {calibration.key(entry) for entry in store.left_out(stage.folder) if "probe" in entry}
    todo = probes.probes(settings["device"], stage.facts.dtypes, torch.get_num_threads(), settings["preset"])
    for probe in todo:
        if (core_only and not probe.core) or calibration.probe_key(probe.name, probe.params) in done:
            continue
        if stage.left_s <= 0:
            break
        entry = {"probe": probe.name, "params": dict(probe.params), "run": run}
        say(begin=entry, seconds=10)
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


# --- a run ---


def the_pool(stage: Stage, workloads: Sequence[Workload], dtype: str) -> Pool:
    """The weights of all workloads of a dtype."""
    cold_bytes = COLD_CACHES * stage.facts.cache_bytes
    mine = [w for w in workloads if w.dtype == dtype]
    n_bytes = pool_bytes(mine, cold_bytes, stage.facts.pool_limit_bytes)
    device = stage.settings["device"]
    free = machine.available_bytes() if device == "cpu" else 0.95 * torch.cuda.mem_get_info()[0]
    if free is not None and n_bytes > 0.9 * free:
        raise InputError(f"the weights need {n_bytes} bytes and {free} are free; name fewer --shapes or free memory")
    limit = int(stage.facts.host_limit_bytes)
    host = HostSide(limit, host_pool_bytes(mine, limit))
    return make_pool(n_bytes, cold_bytes, dtype, device, stage.settings["seed"], host)


def kind_of(w: Workload) -> tuple[object, ...]:
    """What workloads that run the same code over the same weights have in common."""
    return (w.shape, w.dtype, w.op, w.access, w.residency, w.launch)


class Checked:
    """Which kinds of workload were compared with slow twins, and how they fared; each is, before it is first timed."""

    def __init__(self, stage: Stage, planned: Sequence[Workload]) -> None:
        timed = {point["workload"] for point in store.points(stage.folder)}
        self.kinds: dict[tuple[object, ...], str | None] = {kind_of(w): None for w in planned if w.id in timed}

    def refuse_wrong(self, stage: Stage, pool: Pool, w: Workload, planned: Sequence[Workload]) -> None:
        """Raise InputError when workloads of this kind compute something else than the reference."""
        kind = kind_of(w)
        if kind not in self.kinds:
            # A small batch is enough to see it, and the slow twin takes long.
            alike = [other for other in planned if kind_of(other) == kind]
            small = min(alike, key=lambda o: (abs(o.n_tokens - CHECK_TOKENS), o.routing == "uniform"))
            self.kinds[kind] = None
            try:
                check(pool, small, stage.files.get(small.routing))
            except InputError as error:
                self.kinds[kind] = str(error)
        if self.kinds[kind] is not None:
            raise InputError(self.kinds[kind] or "")


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
    checked, pace = Checked(stage, planned), 1.0
    with torch.inference_mode():
        for order, w in enumerate(todo):
            guess_s = point_s(w, stage.facts, stage.limits)
            if stage.left_s < pace * guess_s:
                counts["n_todo"] += 1
                continue
            entry, began, clock_s = {"workload": w.id, "run": run}, _now(), time.monotonic()
            say(begin=entry, seconds=guess_s)
            try:
                if w.dtype not in pools:
                    pools[w.dtype] = the_pool(stage, planned, w.dtype)
                checked.refuse_wrong(stage, pools[w.dtype], w, planned)
                times, facts, was_disturbed, point_waited_s = _timed(stage, pools[w.dtype], w, run, waited_s)
            except (InputError, RuntimeError, OSError, MemoryError) as error:
                counts["n_left_out"] += 1
                stage.leave_out(entry, error)
                continue
            took_s = time.monotonic() - clock_s
            waited_s += point_waited_s
            # How wrong guesses are on this machine, from what was just seen.
            pace = 0.9 * pace + 0.1 * min(10.0, took_s / guess_s)
            point = {
                **entry, "times_ns": [round(t) for t in times], "started": began, "order": n_before + order,
                "took_s": round(took_s, 3), **({"facts": facts} if facts else {}),
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
        attempt = partial(measure, prepared.call, clock_of(w.device), limits)
        patience_s = limits.patience_s if stage.seconds is None else PATIENCE_SHARE * stage.seconds
        left_s = max(0.0, min(patience_s, limits.patience_s) - waited_s)
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
                if w.dtype not in pools:
                    pools[w.dtype] = the_pool(stage, points, w.dtype)
                write_profile(path.parent, partial(prepare, pools[w.dtype], w, stage.files.get(w.routing), 0), w)
            except (InputError, RuntimeError, OSError, MemoryError) as error:
                stage.leave_out(entry, error)
                continue
            say(profile=path.name)


def record_stage(stage: Stage) -> None:
    """Run the same points once more, for an nsys around this process."""
    points = nsys.chosen(stage.folder)
    pools: dict[str, Pool] = {}

    def prepare_of(w: Workload) -> Callable[[Mark], Prepared]:
        if w.dtype not in pools:
            pools[w.dtype] = the_pool(stage, points, w.dtype)
        return partial(prepare, pools[w.dtype], w, stage.files.get(w.routing), 0)

    with torch.inference_mode():
        nsys_stage(
            points,
            prepare_of,
            lambda w: say(begin={"nsys": range_name(w)}, seconds=10),
            lambda w, error: stage.leave_out({"nsys": range_name(w)}, error),
        )


def work(folder: Path, arguments: Sequence[str], routing_files: Sequence[str], seconds: float | None) -> None:
    """Do one stage of a collection: `describe`, `calibrate`, `run N`, `profile` or `nsys`."""
    started = time.monotonic()
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
