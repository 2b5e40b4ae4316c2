"""The measuring processes of a sweep: one calibrates, one per run times every point, one profiles. They import torch.

Each works on an existing capture folder and says on stdout when a step is done; when nobody reads that any more, the
sweep was killed and the process ends after the point it is at.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from perfmodel.errors import InputError
from perfmodel.routing import PATTERNS, Shares

from . import machine, store
from .calibrate import calibrate, clock_of, pooled
from .layer import grouped_mm_name
from .plan import DTYPES, Request, Workload, file_shares, pool_bytes, run_order
from .plan import plan as make_plan
from .points import Pool, check, make_pool, prepare
from .profile_points import chosen_points
from .profiling import write_profile
from .timing import FULL, QUICK, Limits, measure, measure_undisturbed

FALLBACK_CACHE_BYTES = 1 << 25
COLD_CACHES = 4  # weights are read again after this many last-level caches of other weights
CPU_POOL_FRAC, CUDA_POOL_FRAC = 0.25, 0.6
CHECK_TOKENS = 16


def say(word: str) -> None:
    """Tell the sweep that a step is done; raises BrokenPipeError when it is gone."""
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


def limits_of(settings: store.Json) -> Limits:
    """The timing limits a capture was begun with."""
    return QUICK if settings["quick"] else FULL


def request_of(settings: store.Json, routing_file: str | None) -> Request:
    """The request a capture was begun with; the routing file is found by the caller, captures hold no folders."""
    return Request(
        settings["device"], settings["dtype"], tuple(settings["shapes"]), tuple(settings["tokens"]),
        tuple(settings["routings"]), routing_file, settings["seed"],
    )  # fmt: skip


def shares_for(workload: Workload, shares: Shares | None) -> Shares | None:
    """The shares a workload draws from: those of the routing file, null for the named patterns."""
    return None if workload.routing.partition(":")[0] in PATTERNS else shares


def the_pool(settings: store.Json, workloads: Sequence[Workload]) -> Pool:
    """The weights of a whole sweep, at most a quarter of the machine's memory (six tenths of a GPU's)."""

    torch.set_num_threads(settings["threads"])
    device, dtype = settings["device"], DTYPES[settings["dtype"]]
    if device == "cuda":
        cold_bytes = COLD_CACHES * torch.cuda.get_device_properties(0).L2_cache_size
        limit = CUDA_POOL_FRAC * torch.cuda.mem_get_info()[0]
    else:
        cold_bytes = COLD_CACHES * (machine.last_level_cache_bytes() or FALLBACK_CACHE_BYTES)
        limit = CPU_POOL_FRAC * (machine.memory_bytes() or 4 << 30)
    n_bytes = pool_bytes(workloads, cold_bytes, limit)
    free = machine.available_bytes() if device == "cpu" else None
    if free is not None and n_bytes > 0.9 * free:
        raise InputError(f"the weights need {n_bytes} bytes and {free} are free; name fewer --shapes or free memory")
    return make_pool(n_bytes, cold_bytes, dtype, device, settings["seed"])


def _checks(workloads: Sequence[Workload]) -> list[Workload]:
    """For each shape the workload to check: the last routing, which is skewed and leaves experts idle, few tokens."""
    found: dict[str, Workload] = {}
    for workload in sorted(workloads, key=lambda w: (abs(w.n_tokens - CHECK_TOKENS), w.routing == "uniform")):
        found.setdefault(workload.shape, workload)
    return list(found.values())


def calibrate_stage(folder: Path, settings: store.Json, workloads: Sequence[Workload], shares: Shares | None) -> None:
    """Check that this torch computes each shape right, then measure the machine's numbers into capture.json."""

    pool = the_pool(settings, workloads)
    with torch.inference_mode():
        for workload in _checks(workloads):
            check(pool, workload, shares_for(workload, shares))
            say("checked")
        del pool
        numbers = calibrate(settings["device"], DTYPES[settings["dtype"]], settings["threads"], limits_of(settings))
    capture = store.read_capture(folder)
    software = {**capture["software"], **torch_build()}
    store.update_capture(
        folder,
        machine={**capture["machine"], **gpu(settings["device"])},
        software=software,
        calibration=numbers,
        first_calibration=numbers,
        kernel=grouped_mm_name(),
    )
    say("calibrated")


def torch_build() -> dict[str, object]:
    """How this torch was built, as far as it decides which kernels run."""

    return {
        "torch_mkldnn": torch.backends.mkldnn.is_available(),
        "torch_mkl": torch.backends.mkl.is_available(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_cuda": torch.version.cuda,
    }


def gpu(device: str) -> dict[str, object]:
    """The GPU's entries of the machine part; empty on the CPU."""
    if device != "cuda":
        return {}

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu_name": properties.name,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_n_sms": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        **machine.gpu_smi(f"GPU-{properties.uuid}"),
    }


def run_stage(
    folder: Path, settings: store.Json, workloads: Sequence[Workload], shares: Shares | None, run: int
) -> None:
    """Time every point of a run that is not on disk yet, in the run's own order; one line on disk for each."""
    began_on = store.read_capture(folder)["machine"].get("gpu_name")
    if gpu(settings["device"]).get("gpu_name") != began_on:
        raise InputError(f"{folder} was begun on {began_on!r}, which is not the GPU here; choose another --out")
    done = {point["workload"] for point in store.mend_observations(folder) if point["run"] == run}
    started, load = int(time.time()), machine.load_average()
    pool = the_pool(settings, workloads)
    clock, limits = clock_of(settings["device"]), limits_of(settings)
    n_left_out, n_disturbed, waited_s = 0, 0, 0.0
    with torch.inference_mode():
        for order, workload in enumerate(run_order(workloads, settings["seed"], run)):
            if workload.id in done:
                continue
            began = int(time.time())
            try:
                call = prepare(pool, workload, shares_for(workload, shares), run).call
                attempt = partial(measure, call, clock, limits)
                left_s = max(0.0, limits.patience_s - waited_s)
                times, was_disturbed, took_s = measure_undisturbed(
                    attempt, machine.others_busy_s, limits.n_tries, left_s
                )
                waited_s += took_s
            except torch.cuda.OutOfMemoryError:
                n_left_out += 1
                print(f"no memory for {workload.shape} with {workload.n_tokens} tokens: left out", file=sys.stderr)
                continue
            point = {
                "workload": workload.id,
                "run": run,
                "times_ns": [round(t) for t in times],
                "started": began,
                "order": order,
            }
            store.append_observation(folder, point)
            n_disturbed += was_disturbed
            say("point")
        del pool
        numbers = {}
        if not settings["quick"]:  # machines drift: see where they are at the end of each run
            numbers = calibrate(settings["device"], DTYPES[settings["dtype"]], settings["threads"], limits)
    record = {
        "run": run,
        "started": started,
        "finished": int(time.time()),
        "load_before": load,
        "n_resumed": len(done),
        "n_left_out": n_left_out,
        "n_disturbed": n_disturbed,
        "waited_s": round(waited_s),
        "calibration": {name: number for name, number in numbers.items() if int(number["n"]) > 1},
    }
    capture = store.read_capture(folder)
    runs = [r for r in capture["runs"] if r["run"] != run] + [record]
    first = capture["first_calibration"]
    store.update_capture(folder, runs=runs, calibration=pooled([first, *(r["calibration"] for r in runs)]))


def profile_stage(folder: Path, settings: store.Json, workloads: Sequence[Workload], shares: Shares | None) -> None:
    """Profile the chosen points into profiles/."""

    (folder / store.PROFILES).mkdir(exist_ok=True)
    points = chosen_points(workloads)
    pool = the_pool(settings, points) if points else None
    with torch.inference_mode():
        for workload in points:
            assert pool is not None
            write_profile(folder / store.PROFILES, pool, workload, shares_for(workload, shares))
            say("profiled")


def work(folder: Path, stage: str, routing_file: str | None) -> None:
    """Do one stage of a sweep: `calibrate`, `profile`, or the number of a run."""
    settings = store.read_capture(folder)["settings"]
    request = request_of(settings, routing_file)
    workloads = make_plan(request, settings["memory_limit_bytes"]).workloads
    shares = file_shares(routing_file)
    if stage == "calibrate":
        calibrate_stage(folder, settings, workloads, shares)
    elif stage == "profile":
        profile_stage(folder, settings, workloads, shares)
    else:
        run_stage(folder, settings, workloads, shares, int(stage))
