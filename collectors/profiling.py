"""Structure of a few points as torch-profiler traces: named ranges, shapes, kernels; never a source of times.

Timing runs unprofiled, since profiling slows a small layer down by half. Identity (host name, file names) is removed.
"""

import gzip
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from perfmodel.errors import InputError
from perfmodel.routing import Shares

from .plan import Workload
from .points import Pool, prepare
from .profile_points import N_STEPS, file_name, range_name


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """Name a range for the torch profiler, and for nsys where the nvtx package is importable."""
    try:
        import nvtx
    except ImportError:
        with record_function(name):
            yield
        return
    with nvtx.annotate(name, domain="perfmodel"), record_function(name):
        yield


@contextmanager
def without_profiler_chatter() -> Iterator[None]:
    """Hold back what the profiler's C++ side writes to stderr (`USDT: ... profiler_start`); all else is passed on."""
    sys.stderr.flush()
    real = os.dup(2)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(real, 2)
            os.close(real)
            held.seek(0)
            sys.stderr.writelines(line for line in held if not line.startswith("USDT:"))


def scrub(text: str, where: str) -> str:
    """The trace without what says whose it is: host name, file name, folders of this process; compact JSON."""
    trace = json.loads(text)
    for key in ("host_name", "traceName"):
        trace.pop(key, None)
    text = json.dumps(trace, separators=(",", ":"))
    for folder in {where, str(Path.home()), str(Path.cwd()), tempfile.gettempdir()} - {"/"}:
        text = text.replace(folder, "")
    return text


def write_profile(folder: Path, pool: Pool, workload: Workload, shares: Shares | None) -> Path:
    """Profile a few steps of a workload into a folder; returns the file.

    Raises InputError when a CUDA trace holds no kernel: another profiler has the device's tracing.
    """
    call = prepare(pool, workload, shares, 0, mark=lambda part: named_range(f"perfmodel::{part}")).call
    is_cuda = workload.device == "cuda"
    call(0)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda else [])
    session_of = profile(activities=activities, record_shapes=True, acc_events=True)
    with without_profiler_chatter(), session_of as session:
        for step in range(1, N_STEPS + 1):
            with named_range(range_name(workload)):
                call(step)
        if is_cuda:
            torch.cuda.synchronize()
        table = {**workload.to_line(), "n_steps": N_STEPS}
        session.add_metadata_json("perfmodel", json.dumps(table))
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "trace.json"
        session.export_chrome_trace(str(raw))
        text = scrub(raw.read_text(encoding="utf-8"), scratch)
    if is_cuda and '"cat":"kernel"' not in text:
        raise InputError("the profiler saw no CUDA kernel: another profiler (nsys, ncu, a debugger) holds the device")
    path = folder / file_name(workload)
    beside = path.with_name(path.name + ".part")
    # No file name and no time in the gzip header: equal traces are equal files.
    with beside.open("wb") as file, gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=0) as packed:
        packed.write(text.encode())
    beside.replace(path)
    return path
