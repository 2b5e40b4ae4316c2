"""Record the profiled points with Nsight Systems too: find it, run it, export, scrub and check. Needs no torch.

It sees what torch's profiler does not (calls of other libraries and of the operating system) by its own tracing of the
device; since that has one user, no process is profiled by both.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from perfmodel.errors import InputError

from .nsys_export import gaps, scrub
from .plan import Workload
from .profile_points import N_STEPS, range_name, without_injection

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
VERSION_S, EXPORT_S, RECORD_S = 60.0, 180.0, 300.0
STOP_S = 20.0
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


def command(nsys: Path, out: Path, inner: Sequence[str]) -> list[str]:
    """The command that records what `inner` does between cudaProfilerStart and Stop, graphs kernel by kernel."""
    return [
        str(nsys),
        "profile",
        "--trace=cuda,nvtx,osrt",
        "--sample=none",
        "--cpuctxsw=none",
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop",
        "--cuda-graph-trace=node",
        "--force-overwrite=true",
        f"--output={out}",
        *inner,
    ]


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of a recording: unregistered NVTX names are recorded, no other profiler is loaded."""
    return {**without_injection(environ), "NSYS_NVTX_PROFILER_REGISTER_ONLY": "0"}


def _run(command: Sequence[str], environ: Mapping[str, str], timeout_s: float, what: str) -> tuple[int, str]:
    """Run to the end; returns the exit code and what was said. Raises InputError when it does not start or end."""
    # A file and no pipe: what nsys leaves running in the background would hold a pipe open.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=dict(environ),
                start_new_session=True,  # so that it can be ended with all it started
            )
        except OSError as error:
            raise InputError(f"nsys cannot be started: {error.strerror}") from None
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise InputError(f"{what} did not end within {timeout_s:g} s and was stopped") from None
        finally:
            _end(process)
        said.seek(0)
        return code, said.read()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and its group: asked first (nsys then ends what it started), then killed."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, sign)
            process.wait(STOP_S)


def _last_words(said: str) -> str:
    """The line that tells most of what a failed program said: the last that speaks of an error, else the last."""
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error|fail|cannot|unable|unsupported|newer", line, re.I)]
    return (errors or lines or ["it said nothing"])[-1][:300]


def _report(folder: Path, code: int, said: str) -> Path:
    reports = sorted([*folder.glob("*.nsys-rep"), *folder.glob("*.qdrep")])
    if reports:
        return reports[0]
    if code:
        raise InputError(f"nsys ended with {code} and wrote no report: {_last_words(said)}")
    raise InputError(
        "nsys ended well and wrote no report: cudaProfilerStart never reached it, because the recorded process stopped "
        f"before or another profiler was loaded in it; it said: {_last_words(said)}"
    )


def _export(nsys: Path, report: Path, environ: Mapping[str, str]) -> Path:
    exported = report.with_suffix(".sqlite")
    options = ["--type", "sqlite", "--force-overwrite", "true", "--output", str(exported), str(report)]
    code, said = _run([str(nsys), "export", *options], environ, EXPORT_S, "the export of the report")
    if code or not exported.is_file():
        raise InputError(
            f"nsys {_dotted(version(nsys))} could not export its report (exit code {code}): {_last_words(said)}; an "
            "nsys that is older than the recording one cannot"
        )
    return exported


def record(
    folder: Path,
    inner: Sequence[str],
    points: Sequence[Workload],
    *,
    nsys: Path | None = None,
    environ: Mapping[str, str] | None = None,
    timeout_s: float = RECORD_S,
) -> tuple[Path, list[tuple[Workload, str]]]:
    """Record `inner`, a command that runs `nsys_stage` on the points; its scrubbed export goes to `folder`/nsys.sqlite.

    Returns the file and the points that are not whole in it, each with its reason; what `inner` says is passed on to
    stderr. Raises InputError with one sentence when there is no file in the end: no nsys, no report, no export, no
    kernels or none of our ranges. The report itself, which holds the environment and all processes, is not kept.
    """
    nsys = find() if nsys is None else nsys
    environ = environment(os.environ if environ is None else environ)
    expected = {range_name(point): N_STEPS for point in points}
    lines = {range_name(point): {**point.to_line(), "n_steps": N_STEPS} for point in points}
    beside = folder / f"{FILE}.part"
    with tempfile.TemporaryDirectory() as scratch:
        code, said = _run(command(nsys, Path(scratch) / "report", inner), environ, timeout_s, "the recording by nsys")
        sys.stderr.write("".join(f"nsys: {line}\n" for line in said.splitlines() if line.startswith("collectors:")))
        exported = _export(nsys, _report(Path(scratch), code, said), environ)
        try:
            scrub(exported, beside, lines)
            missing = gaps(beside, expected)
            beside.replace(folder / FILE)
        finally:
            beside.unlink(missing_ok=True)
    left_out = [(point, missing[range_name(point)]) for point in points if range_name(point) in missing]
    return folder / FILE, left_out
