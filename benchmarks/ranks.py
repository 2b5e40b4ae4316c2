"""How does reading a folder of ranks scale with workers, here and on a Dask cluster of this machine?

    python benchmarks/ranks.py [--trace PATH] [--ranks 8] [--workers 1 2] [--backends loky dask] [--repeats 3]

Makes a folder of copies of one trace, each with blanks of its own at the end so that no two are the same file, and
summarises it with an empty cache. Repeats go in turns over all settings; the ratio is to one worker of the same backend
in the same run. Starting the workers is left out (a summary of tiny ranks comes first), writing the parts is not. One
worker of loky is this very process, with all of Polars' threads; one worker of Dask is a process with one of them.
Without --trace, the largest `*.json*` of `../shared/traces` beside the repository is copied.
"""

import argparse
import gzip
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from ingest import largest_trace

from perfmodel.ranks import summarise_ranks
from perfmodel.readers import read_trace

ONE_EVENT = '[{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 1, "ts": 1, "dur": 1}]'


def make_ranks(trace: Path, folder: Path, n_ranks: int) -> int:
    """Write plain copies of a trace as ranks, alike but for blanks at the end; returns the bytes of all."""
    packed = trace.read_bytes()
    text = gzip.decompress(packed) if packed.startswith(b"\x1f\x8b") else packed
    for rank in range(n_ranks):
        (folder / f"rank-{rank}.json").write_bytes(text + b" " * rank)
    return sum(path.stat().st_size for path in folder.iterdir())


@contextmanager
def scheduler_of(backend: str, n_workers: int) -> Iterator[str | None]:
    """The address of a Dask cluster with so many workers; nothing for other backends."""
    if backend != "dask":
        yield None
        return
    from distributed import LocalCluster

    options = {"host": "127.0.0.1", "scheduler_port": 0, "dashboard_address": "127.0.0.1:0", "silence_logs": "ERROR"}
    with LocalCluster(n_workers=n_workers, threads_per_worker=1, processes=True, **options) as cluster:
        yield cluster.scheduler_address


def seconds(folder: Path, backend: str, n_workers: int) -> float:
    """How long one summary with an empty cache takes, workers being ready."""
    with scheduler_of(backend, n_workers) as address, tempfile.TemporaryDirectory() as parts:
        warm = Path(parts) / "warm"
        warm.mkdir()
        for rank in range(2 * n_workers):
            (warm / f"rank-{rank}.json").write_text(ONE_EVENT)
        summarise_ranks(warm, None, backend, n_workers, address)
        began = time.perf_counter()
        summary = summarise_ranks(folder, Path(parts) / "parts", backend, n_workers, address)
        took = time.perf_counter() - began
    if summary.failed:
        sys.exit(f"ranks failed: {summary.failed}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, help="the trace to copy")
    parser.add_argument("--ranks", type=int, default=8)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    powers = [2**i for i in range(cores.bit_length()) if 2**i <= cores]
    parser.add_argument("--workers", type=int, nargs="+", default=powers)
    parser.add_argument("--backends", nargs="+", default=["loky", "dask"])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    trace = options.trace or largest_trace()
    settings = [(backend, n) for backend in options.backends for n in sorted({1, *options.workers})]
    took: dict[tuple[str, int], list[float]] = {setting: [] for setting in settings}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_bytes = make_ranks(trace, folder, options.ranks)
        n_events = options.ranks * read_trace(folder / "rank-0.json").n_events
        for _ in range(options.repeats):
            for setting in settings:
                took[setting].append(seconds(folder, *setting))
    print(
        f"{options.ranks} ranks of {trace.name}: {n_events:,} events, {n_bytes / 1e6:.0f} MB; {cores} cores; "
        f"median [least to most] of {options.repeats}"
    )
    print(f"{'backend':10}{'workers':>8}{'wall s':>26}{'events/s':>14}{'MB/s':>8}{'against 1':>11}")
    for (backend, n_workers), runs in took.items():
        middle = median(runs)
        wall = f"{middle:.2f} [{min(runs):.2f} to {max(runs):.2f}]"
        ratio = median(took[backend, 1]) / middle
        rates = f"{n_events / middle:>14,.0f}{n_bytes / middle / 1e6:>8.0f}"
        print(f"{backend:10}{n_workers:>8}{wall:>26}{rates}{ratio:>10.2f}x")


if __name__ == "__main__":
    main()
