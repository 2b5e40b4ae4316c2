"""What does it cost to read a PyTorch profiler trace and sum up its launches, here and with HolisticTraceAnalysis?

    python benchmarks/ingest.py --hta-python hta/bin/python [--trace PATH] [--repeats 7]

Both tools do the same job as whole child processes in turn, import included: parse one trace file and compute its
kernel launch statistics. CPU seconds (user + system) and peak memory are those the operating system counted for each
child. Without --trace, the largest `*.json*` of `../shared/traces` beside the repository is read.

HolisticTraceAnalysis wants pandas below 3, so give it an environment of its own:

    python -m venv hta && hta/bin/pip install HolisticTraceAnalysis==0.5.0 "pandas<3" "setuptools<81"
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent

OURS = """
import sys
from perfmodel.launch import launch_metrics
from perfmodel.readers import read_trace
print(launch_metrics(read_trace(sys.argv[1])).n_kernels_joined, "kernels joined to their launch")
"""
THEIRS = """
import sys
from hta.trace_analysis import TraceAnalysis
analysis = TraceAnalysis(trace_files={0: sys.argv[1]}, trace_dir="")
print(len(analysis.get_cuda_kernel_launch_stats(visualize=False)[0]), "launches of kernels, copies and sets")
"""


@dataclass(frozen=True)
class Cost:
    """What one child process cost, as the operating system counted it."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    said: str


def cost_of(python: str, code: str, trace: Path) -> Cost:
    """Run code in a fresh interpreter and return its cost; exits when the child fails."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        child = subprocess.Popen([python, "-c", code, str(trace)], stdout=output, stderr=errors, cwd=ROOT)
        _, status, usage = os.wait4(child.pid, 0)
        wall_s = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)  # the child is reaped: subprocess must not wait again
        output.seek(0)
        errors.seek(0)
        if child.returncode:
            sys.exit(f"{python} failed:\n{errors.read()[-2000:]}")
        per_unit = 1 if sys.platform == "darwin" else 1024
        return Cost(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * per_unit, output.read().strip())


def largest_trace() -> Path:
    """The largest profiler trace beside the repository."""
    found = sorted((ROOT.parent / "shared" / "traces").glob("*.json*"), key=lambda path: path.stat().st_size)
    if not found:
        sys.exit("no traces beside the repository; name one with --trace")
    return found[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hta-python", required=True, help="an interpreter that has HolisticTraceAnalysis installed")
    parser.add_argument("--trace", type=Path, help="the trace to read")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    trace = (options.trace or largest_trace()).resolve()
    jobs = {"perfmodel": (sys.executable, OURS), "HTA": (options.hta_python, THEIRS)}
    for python, code in jobs.values():  # once uncounted: compiled bytecode and the file in the page cache
        cost_of(python, code, trace)
    costs: dict[str, list[Cost]] = {name: [] for name in jobs}
    for _ in range(options.repeats):
        for name, (python, code) in jobs.items():
            costs[name].append(cost_of(python, code, trace))
    report(trace, costs)


def report(trace: Path, costs: dict[str, list[Cost]]) -> None:
    """Print medians, ranges and ratios."""
    print(
        f"{trace.name}, {trace.stat().st_size / 1e6:.1f} MB as it lies; median [least to most] of {len(costs['HTA'])}"
    )
    print(f"{'':12}{'CPU s':>24}{'wall s':>24}{'peak MB':>24}   result")
    columns = ("cpu_s", 1.0, 2), ("wall_s", 1.0, 2), ("peak_bytes", 1e6, 0)
    middle: dict[str, list[float]] = {}
    for name, runs in costs.items():
        cells, middle[name] = "", []
        for field, unit, digits in columns:
            values = sorted(getattr(run, field) / unit for run in runs)
            middle[name].append(median(values))
            cell = f"{median(values):.{digits}f} [{values[0]:.{digits}f} to {values[-1]:.{digits}f}]"
            cells += f"{cell:>24}"
        print(f"{name:12}{cells}   {runs[-1].said}")
    ratios = [theirs / ours for ours, theirs in zip(middle["perfmodel"], middle["HTA"], strict=True)]
    print(f"{'ratio':12}" + "".join(f"{ratio:>23.1f}x" for ratio in ratios))


if __name__ == "__main__":
    main()
