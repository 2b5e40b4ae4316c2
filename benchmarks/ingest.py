"""What does it cost to read a PyTorch profiler trace and sum up its launches, here, at the least, and with others?

    python benchmarks/ingest.py [--hta-python hta/bin/python] [--simdjson-python simd/bin/python] [--repeats 5]
                                [--trace PATH] [--replica-bytes 1e9] [--keep FILE]

Every job is a whole child process, import included, and the jobs take turns; CPU seconds (user + system) and peak
memory are those the operating system counted for each child. Without --trace, the largest `*.json*` of
`../shared/traces` beside the repository is read, repeated with shifted times and ids until it has --replica-bytes.

    perfmodel        read the JSON, all launch metrics
    float times      the same with times as floating-point numbers, which loses nanoseconds: what exactness costs
    from the cache   read the Parquet cache instead, everything that `perfmodel analyze` says
    tokenise         read the file and tokenise it with simdjson, making nothing of it: a floor
    HTA              parse the JSON, kernel launch statistics

HolisticTraceAnalysis wants pandas below 3, so give it an environment of its own, and simdjson one too:

    python -m venv hta && hta/bin/pip install HolisticTraceAnalysis==0.5.0 "pandas<3" "setuptools<81"
    python -m venv simd && simd/bin/pip install pysimdjson
"""

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent

METRICS = """
from perfmodel.launch import launch_metrics
metrics = launch_metrics(trace)
print(metrics.n_kernels_joined, "kernels joined, TKLQT", metrics.tklqt_ns, "ns")
"""
OURS = "import sys\nfrom perfmodel.readers import read_trace\ntrace = read_trace(sys.argv[1])\n" + METRICS
# Every figure and finding of the page of `perfmodel analyze`; the times count from after the imports.
CACHED = """
import sys, time
from perfmodel.analysis import analyse
from perfmodel.readers import read_trace
began = time.perf_counter()
trace = read_trace(sys.argv[1], cache="beside")
read_s = time.perf_counter() - began
n_findings = len(analyse(trace).findings)
print(f"read in {read_s:.2f} s, all figures after {time.perf_counter() - began:.2f} s, {n_findings} findings")
"""
# The same reader with `ts` and `dur` as float64 microseconds, multiplied by 1000.
FLOAT = (
    """
import msgspec, polars
from perfmodel.readers import kineto
class FloatEvent(kineto.Event, gc=False):
    ts: float | None = None
    dur: float | None = None
kineto.decode_events = msgspec.json.Decoder(list[FloatEvent]).decode
lines_of = kineto._lines
kineto._lines = lambda values: lines_of(values) if values and isinstance(values[0], msgspec.Raw) else values
kineto.to_ns = lambda lists: (
    polars.Series([us for numbers in lists for us in numbers], dtype=polars.Float64) * 1000
).round().cast(polars.Int64)
"""
    + OURS
)
# Blocks end where an event does; each is copied once and tokenised by simdjson's DOM parser, and nothing is taken out.
TOKENISE = r"""
import re, sys
import simdjson
boundary = re.compile(rb'}\s*(,)\s*{\s*"(?:ph|name|cat|pid)"\s*:')
parser, rest, n_events = simdjson.Parser(), b"", 0
with open(sys.argv[1], "rb", buffering=0) as file:
    while piece := file.read(1 << 18):
        block = rest + piece
        if not n_events and not rest:
            block = block[block.index(b"[", block.index(b'"traceEvents"')) + 1:]
        cut, reach = None, 1 << 13
        while cut is None:
            for cut in boundary.finditer(block, max(0, len(block) - reach)):
                pass
            reach *= 8
        events = parser.parse(b"[" + block[: cut.start(1)] + b"]")
        n_events += len(events)
        del events
        rest = block[cut.start(1) + 1 :]
print(n_events, "events tokenised")
"""
THEIRS = """
import sys
from hta.trace_analysis import TraceAnalysis
analysis = TraceAnalysis(trace_files={0: sys.argv[1]}, trace_dir="")
print(len(analysis.get_cuda_kernel_launch_stats(visualize=False)[0]), "launches of kernels, copies and sets")
"""
# Columns of the report: field, unit, digits.
FIGURES = (("cpu_s", 1.0, 2), ("wall_s", 1.0, 2), ("peak_bytes", 1e6, 0))


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


def write_replica(source: Path, target: Path, n_bytes: float) -> int:
    """Write a trace again and again as one document, its text unchanged but for times and ids, which are shifted.

    Returns how many times it stands in the document. The document is plain JSON of at least `n_bytes`.
    """
    text = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
    begin = text.index(b"[", text.index(b'"traceEvents"')) + 1
    end = json.JSONDecoder().raw_decode(text.decode("latin-1"), begin - 1)[1] - 1
    number = re.compile(rb'("(?:ts|correlation|External id|id|Python id|Python parent id)"\s*:\s*)(\d+)')
    pieces = number.split(text[begin:end].rstrip())
    times = [
        int(pieces[i + 1]) for i in range(1, len(pieces), 3) if pieces[i].startswith(b'"ts"') and pieces[i + 1] != b"0"
    ]
    span_us = max(times) - min(times) + 1000
    n_copies = max(1, -(-int(n_bytes) // (end - begin)))
    with target.open("wb") as file:
        file.write(text[:begin])
        for k in range(n_copies):
            for i in range(1, len(pieces), 3):
                shift = k * (span_us if pieces[i].startswith(b'"ts"') else 10_000_000)
                value = int(pieces[i + 1])
                file.write(pieces[i - 1] + pieces[i] + b"%d" % (value + shift if value else 0))
            file.write(pieces[-1] + (b"," if k < n_copies - 1 else b""))
        file.write(text[end:])
    return n_copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hta-python", help="an interpreter that has HolisticTraceAnalysis installed")
    parser.add_argument("--simdjson-python", help="an interpreter that has pysimdjson installed")
    parser.add_argument("--trace", type=Path, help="the trace to read or to repeat")
    parser.add_argument("--replica-bytes", type=float, default=1e9, help="0 reads the trace as it is")
    parser.add_argument("--keep", type=Path, help="where to keep the repeated trace")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    trace = (options.trace or largest_trace()).resolve()
    jobs = {"perfmodel": (sys.executable, OURS), "float times": (sys.executable, FLOAT)}
    jobs["from the cache"] = (sys.executable, CACHED)
    if options.simdjson_python:
        jobs["tokenise"] = (options.simdjson_python, TOKENISE)
    if options.hta_python:
        jobs["HTA"] = (options.hta_python, THEIRS)
    with tempfile.TemporaryDirectory(prefix="perfmodel-") as folder:
        subject, n_copies = trace, 1
        if options.replica_bytes:
            subject = (options.keep or Path(folder) / "replica.json").resolve()
            # In a process of its own: what this one holds when it starts a child counts as that child's peak memory.
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                n_copies = pool.submit(write_replica, trace, subject, options.replica_bytes).result()
        print(f"{trace.name} x {n_copies}: {subject.stat().st_size / 1e6:,.0f} MB of JSON")
        for name, (python, code) in jobs.items():  # once uncounted: compiled bytecode, the cache, the file in memory
            if name != "HTA":
                cost_of(python, code, subject)
        costs: dict[str, list[Cost]] = {name: [] for name in jobs}
        for _ in range(options.repeats):
            for name, (python, code) in jobs.items():
                costs[name].append(cost_of(python, code, subject))
    report(costs)


def report(costs: dict[str, list[Cost]]) -> None:
    """Print medians, ranges, and the ratios to what perfmodel costs, pair by pair."""
    n = len(costs["perfmodel"])
    print(f"median [least to most] of {n}; last columns: CPU and peak memory over those of perfmodel, median of pairs")
    print(f"{'':15}{'CPU s':>23}{'wall s':>23}{'peak MB':>21}{'CPU':>8}{'peak':>8}   result")
    for name, runs in costs.items():
        cells = ""
        for field, unit, digits in FIGURES:
            values = sorted(getattr(run, field) / unit for run in runs)
            cell = f"{median(values):.{digits}f} [{values[0]:.{digits}f} to {values[-1]:.{digits}f}]"
            cells += f"{cell:>{21 if digits == 0 else 23}}"
        pairs = list(zip(runs, costs["perfmodel"], strict=True))
        ratios = [median(getattr(a, f) / getattr(b, f) for a, b in pairs) for f in ("cpu_s", "peak_bytes")]
        print(f"{name:15}{cells}" + "".join(f"{ratio:>7.2f}x" for ratio in ratios) + f"   {runs[-1].said}")


if __name__ == "__main__":
    main()
