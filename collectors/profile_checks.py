"""Is a trace of torch's profiler whole, and free of whose it is; how it is packed. Needs no torch."""

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from perfmodel.errors import InputError

from .store import Json, write_atomically

# What Kineto says of the trace as a whole; all else at the top (host_name, traceName, ids of jobs, what a site adds by
# itself) is left out.
KEPT_KEYS = (
    "schemaVersion", "deviceProperties", "cupti_version", "cuda_runtime_version", "cuda_driver_version",
    "record_shapes", "with_flops", "with_stack", "with_modules", "profile_memory",
    "perfmodel", "displayTimeUnit", "baseTimeNanoseconds", "traceEvents",
)  # fmt: skip
CALLS = ("cuda_runtime", "cuda_driver")


def scrubbed(trace: Json, where: str) -> Json:
    """The trace without what says whose it is: names of host and file, ids, serial numbers, folders of this process."""
    kept = {key: trace[key] for key in KEPT_KEYS if key in trace}
    for device in kept.get("deviceProperties", []):
        device.pop("uuid", None)
    text = json.dumps(kept, separators=(",", ":"))
    for folder in {where, str(Path.home()), str(Path.cwd()), tempfile.gettempdir()} - {"/"}:
        text = text.replace(folder, "")
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


def work_of(trace: Json) -> Json:
    """How much device work a trace holds: `n_kernels`, `n_copies`, `n_kernels_joined` (their launch call is there) and
    `n_kernels_graph` (joined to the replay of a CUDA graph)."""
    calls: dict[int, str] = {}
    for event in trace["traceEvents"]:
        if event.get("cat") in CALLS and "correlation" in event.get("args", {}):
            calls[event["args"]["correlation"]] = event["name"]
    kernels = [e.get("args", {}).get("correlation") for e in trace["traceEvents"] if e.get("cat") == "kernel"]
    return {
        "n_kernels": len(kernels),
        "n_copies": sum(e.get("cat") in ("gpu_memcpy", "gpu_memset") for e in trace["traceEvents"]),
        "n_kernels_joined": sum(link in calls for link in kernels),
        "n_kernels_graph": sum("GraphLaunch" in calls.get(link, "") for link in kernels),
    }


def refuse_gaps(trace: Json, ranges: Mapping[str, int], *, on_cuda: bool, from_graph: bool, hint: str | None) -> None:
    """Raise InputError, saying what is missing and why, unless a trace holds what was profiled.

    That is each range as often as `ranges` says; on CUDA kernels that are joined to their launch calls, and for a
    replayed graph its own kernels, joined to the replay. `hint` is what is known of other profilers (`in_the_way`).
    """
    names = Counter(e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation")
    for name, n_expected in ranges.items():
        if names[name] != n_expected:
            raise InputError(
                f"the range {name} is in the profile {names[name]} times, expected {n_expected}: the profiler lost "
                "events, or another session of it ended this one"
            )
    if not on_cuda:
        return
    work = work_of(trace)
    if not work["n_kernels"]:
        cause = hint or (
            "another profiler (nsys, ncu, DCGM, a debugger) holds the device's tracing, "
            "or the driver does not allow it in this container or virtual GPU"
        )
        raise InputError(f"the profiler saw no CUDA kernel; {cause}")
    if not work["n_kernels_joined"]:
        raise InputError(
            f"none of {work['n_kernels']} kernels in the profile is joined to the call that launched it: the profiler "
            "lost the CUDA calls, so launch delays cannot be told"
        )
    if from_graph and not work["n_kernels_graph"]:
        raise InputError(
            f"none of {work['n_kernels']} kernels in the profile belongs to the replay of the CUDA graph: it was "
            "recorded as a whole or not at all; this CUDA's tracing does not follow graphs that were captured before"
        )


def write_packed(path: Path, trace: Json) -> None:
    """Write a trace as gzip JSON, whole or not at all. No file name and no time in it: equal traces are equal files.

    Raises InputError when it cannot be written, such as on a full disk.
    """
    content = json.dumps(trace, separators=(",", ":")).encode()
    write_atomically(path, gzip.compress(content, compresslevel=9, mtime=0))
