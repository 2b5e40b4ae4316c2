"""Record the profiled points with Nsight Systems too: find it, run it, export, scrub and check. Needs no torch.

It sees what torch's profiler does not (calls of other libraries and of the operating system) by its own tracing of the
device; since that has one user, no process is profiled by both.
"""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from perfmodel.errors import InputError

from . import store
from .nsys_export import gaps, scrub
from .profile_points import INJECTORS, N_STEPS, points_of, range_name
from .workloads import Workload

FILE = "nsys.sqlite"
# Where the packages of Nsight Systems and of the CUDA toolkit put it.
FOLDERS = (
    "/opt/nvidia/nsight-systems*/bin",
    "/opt/nvidia/nsight-systems*/*/bin",
    "/opt/nvidia/nsight-systems*/*/target-linux-*",
    "/usr/local/cuda*/bin",
    "/usr/local/cuda*/nsight-systems*/bin",
    "/usr/lib/nsight-systems/bin",
    "/usr/local/bin",
)
# That of CUDA 11.8, the first toolkit for Hopper, whose guide has all the options below; older ones were not tried.
MIN_VERSION = (2022, 4)
VERSION_S, EXPORT_S = 60.0, 180.0
WHERE_FROM = "it comes with the CUDA toolkit or as the package nsight-systems-cli; it is not on PyPI"


def version(nsys: Path) -> tuple[int, ...] | None:
    """The version an nsys says it is; null when it does not run or says none."""
    try:
        done = subprocess.run(
            [nsys, "--version"], capture_output=True, text=True, errors="replace", timeout=VERSION_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"version\s+(\d+(?:\.\d+)+)", done.stdout + done.stderr)
    return tuple(int(n) for n in found[1].split(".")[:4]) if found and not done.returncode else None


def _candidates(folders: Sequence[str]) -> list[Path]:
    """Programs called nsys: that on PATH first, then those in the usual folders."""
    on_path = shutil.which("nsys")
    found = [Path(on_path)] if on_path else []
    for pattern in folders:
        found += sorted(Path("/").glob(f"{pattern.lstrip('/')}/nsys"), reverse=True)
    return list(dict.fromkeys(path for path in found if os.access(path, os.X_OK)))


def find(folders: Sequence[str] = FOLDERS) -> Path:
    """The nsys to use: that on PATH when it runs and is not too old, else the newest in the usual folders.

    Raises InputError, saying what is missing and where to get it.
    """
    candidates = _candidates(folders)
    versions = {path: version(path) for path in candidates}
    usable = [path for path in candidates if (versions[path] or ()) >= MIN_VERSION]
    if usable:
        on_path = shutil.which("nsys")
        if on_path is not None and Path(on_path) == usable[0]:
            return usable[0]
        return max(usable, key=lambda path: versions[path] or ())
    if not candidates:
        raise InputError(f"no nsys on PATH or in the usual folders, so no Nsight Systems profile is made; {WHERE_FROM}")
    words = "; ".join(f"{path.name} {_dotted(versions[path])}" for path in candidates)
    raise InputError(
        f"found {words}, expected Nsight Systems {_dotted(MIN_VERSION)} or newer that runs here; {WHERE_FROM}"
    )


def _dotted(numbers: tuple[int, ...] | None) -> str:
    return ".".join(map(str, numbers)) if numbers else "that does not run"


def uninjected(command: Sequence[str]) -> list[str]:
    """A command that runs without the variables that load another profiler into it; itself where none is set."""
    unset = [word for name in INJECTORS if os.environ.get(name) for word in ("-u", name)]
    return ["env", *unset, *command] if unset else list(command)


def command(nsys: Path, out: Path, inner: Sequence[str]) -> list[str]:
    """The command that records what `inner` does between cudaProfilerStart and Stop, graphs kernel by kernel."""
    return uninjected(
        [
            str(nsys),
            "profile",
            "--trace=cuda,nvtx,osrt",
            "--sample=none",
            "--cpuctxsw=none",
            "--capture-range=cudaProfilerApi",
            "--capture-range-end=stop",
            "--cuda-graph-trace=node",
            "--env-var=NSYS_NVTX_PROFILER_REGISTER_ONLY=0",  # names of ranges count unregistered, as torch gives them
            "--force-overwrite=true",
            f"--output={out}",
            *inner,
        ]
    )


def _last_words(said: str) -> str:
    """The line that tells most of what a failed program said: the last that speaks of an error, else the last."""
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error|fail|cannot|unable|unsupported|newer", line, re.I)]
    return (errors or lines or ["it said nothing"])[-1][:300]


def _report(folder: Path) -> Path:
    """The report in a folder; raises InputError when there is none."""
    reports = sorted([*folder.glob("*.nsys-rep"), *folder.glob("*.qdrep")])
    if reports:
        return reports[0]
    raise InputError(
        "nsys ended and wrote no report: cudaProfilerStart never reached it, because the recorded process stopped "
        "before or another profiler was loaded in it"
    )


def _export(nsys: Path, report: Path) -> Path:
    """The report as an SQLite file beside it; raises InputError with what nsys said when it fails."""
    exported = report.with_suffix(".sqlite")
    options = ["--type", "sqlite", "--force-overwrite", "true", "--output", str(exported), str(report)]
    # A file and no pipe: what nsys leaves running in the background would hold a pipe open.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        try:
            done = subprocess.run(
                [str(nsys), "export", *options],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=EXPORT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise InputError(f"the export of nsys's report did not end within {EXPORT_S:g} s and was stopped") from None
        except OSError as error:
            raise InputError(f"nsys cannot be started: {error.strerror}") from None
        said.seek(0)
        words = _last_words(said.read())
    if done.returncode or not exported.is_file():
        raise InputError(
            f"nsys {_dotted(version(nsys))} could not export its report (exit code {done.returncode}): {words}; an "
            "nsys that is older than the one that recorded cannot"
        )
    return exported


def chosen(folder: Path) -> list[Workload]:
    """The points of a capture to record: those that are profiled, but for those that failed under nsys before."""
    failed = {entry.get("nsys") for entry in store.left_out(folder)}
    return [point for point in points_of(folder) if range_name(point) not in failed]


def collect(folder: Path, stage: Callable[..., object]) -> Path:
    """Record the chosen points of a capture; the scrubbed export goes to profiles/nsys.sqlite.

    `stage(label, "nsys", wrap=...)` runs the measuring process that calls `nsys_stage`, its command put into another
    by `wrap`. Points that are not whole in the file are written to left_out.jsonl. Raises InputError with one sentence
    when there is no file in the end: no nsys, no CUDA, no report, no export, no kernels or none of our ranges; what
    `stage` raises goes on. The report itself, which holds the environment and all processes, is not kept.
    """
    device = store.read_capture(folder)["settings"]["device"]
    if device != "cuda":
        raise InputError(f"nsys records what a GPU does, and the device of this capture is {device!r}")
    nsys = find()
    beside = folder / store.PROFILES / f"{FILE}.part"
    beside.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "report"
        stage("recording with nsys", "nsys", wrap=lambda inner: command(nsys, out, inner))
        points = chosen(folder)
        lines = {range_name(point): {**point.to_line(), "n_steps": N_STEPS} for point in points}
        exported = _export(nsys, _report(Path(scratch)))
        try:
            scrub(exported, beside, lines)
            missing = gaps(beside, dict.fromkeys(lines, N_STEPS))
            beside.replace(beside.with_name(FILE))
        finally:
            beside.unlink(missing_ok=True)
    for name, reason in missing.items():
        store.append(folder, store.LEFT_OUT, {"nsys": name, "reason": reason, "started": int(time.time())})
    return beside.with_name(FILE)
