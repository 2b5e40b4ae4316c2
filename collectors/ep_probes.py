"""What the ranks can do together: rates and times measured on all of them at once, as they share what they share."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from perfmodel.moe import MoEShape, gemm_flops
from perfmodel.text import NS_PER_S

from .calibration import Scalar
from .ep_ranks import Ranks
from .layer import grouped_mm
from .memory import TORCH_DTYPES
from .probes_host import STREAMS, stream_kernel
from .timing import host_clock

GEMM_ROWS = (16, 128, 1024)
PAIR_BYTES = (*(4**n << 10 for n in range(7)), 8 << 20)  # 1 KiB to 4 MiB by fours, and 8 MiB
FEWEST, MOST = 5, 100  # calls of a probe
N_LAUNCHES = 256

Row = dict[str, object]


class Probe(NamedTuple):
    """One thing to repeat on all ranks at the same time; where `params` say `alone`, on rank 0 while the others wait.

    A time is that of one of `per_call` equal parts, a rate is of `per_call` bytes or FLOPs.
    """

    name: str
    params: Mapping[str, Scalar]
    unit: str
    call: Callable[[], object]
    per_call: float = 1.0


def probe_rows(
    ranks: Ranks, shapes: Sequence[MoEShape], dtype: str, stream_bytes: int, seconds: float
) -> Iterator[Row]:
    """The lines of probes.jsonl that this rank measures, one after another, with streams of about so many bytes.

    All together take about so many seconds, or what the fewest calls of each take.
    """
    n_probes = (len(GEMM_ROWS) + 1) * 2 * len(shapes) + 6 + len(PAIR_BYTES)
    for probe in chain(_computing(ranks, shapes, TORCH_DTYPES[dtype], stream_bytes), _between(ranks)):
        times_ns = _times(ranks, probe, seconds * NS_PER_S / n_probes)
        if not times_ns:
            continue
        middle = statistics.median(times_ns)
        value = middle / probe.per_call if probe.unit == "ns" else probe.per_call * NS_PER_S / middle
        yield {
            "probe": probe.name,
            "rank": ranks.rank,
            "params": dict(probe.params),
            "value": float(f"{value:.6g}"),
            "unit": probe.unit,
            "times": len(times_ns),
        }


def _computing(ranks: Ranks, shapes: Sequence[MoEShape], dtype: torch.dtype, stream_bytes: int) -> Iterator[Probe]:
    device = ranks.device
    for k, n in dict.fromkeys(gemm for shape in shapes for gemm in shape.gemms):
        weights = torch.randn(n, k, device=device).to(dtype).t()
        for n_rows in GEMM_ROWS:
            rows = torch.randn(n_rows, k, device=device).to(dtype)
            params = {"k": k, "n": n, "rows": n_rows}
            gemm = Probe("gemm", params, "flops_per_s", partial(torch.mm, rows, weights), gemm_flops(n_rows, k, n))
            yield gemm
        yield gemm._replace(params={**params, "alone": True})
    n_bytes = stream_bytes // 4096 * 4096
    for kernel in ("read", "triad"):
        call, total_bytes = partial(stream_kernel(kernel, n_bytes, device.type), 0), STREAMS[kernel][0] * n_bytes
        stream = Probe("stream", {"kernel": kernel, "n_bytes": n_bytes}, "bytes_per_s", call, total_bytes)
        yield stream
    yield stream._replace(params={**stream.params, "alone": True})
    rows, weights = torch.randn(1, 16, device=device).to(dtype), torch.randn(1, 16, 16, device=device).to(dtype)
    offs = torch.ones(1, dtype=torch.int32, device=device)
    yield Probe("grouped_call", {"rows": 1}, "ns", partial(grouped_mm, rows, weights, offs))
    if device.type == "cuda":
        one = torch.zeros(1, device=device)

        def launches() -> None:
            for _ in range(N_LAUNCHES):
                one.add_(1)

        yield Probe("launch", {"in_a_row": N_LAUNCHES}, "ns", launches, N_LAUNCHES)


def _between(ranks: Ranks) -> Iterator[Probe]:
    yield Probe("barrier", {}, "ns", ranks.meet)
    for pair_bytes in PAIR_BYTES:
        sizes = [pair_bytes] * ranks.size
        rows, there = (torch.ones(sum(sizes), dtype=torch.uint8, device=ranks.device) for _ in range(2))

        def all_to_all(there: Tensor = there, rows: Tensor = rows, sizes: list[int] = sizes) -> None:
            ranks.exchange(there, rows, sizes, sizes).wait()

        yield Probe("all_to_all", {"bytes": pair_bytes}, "ns", all_to_all)


def _times(ranks: Ranks, probe: Probe, total_ns: float) -> list[float]:
    """Times of the calls that take about so long together, as many on each rank; none where a rank only waits."""
    is_at_it = ranks.rank == 0 or "alone" not in probe.params

    def finished() -> None:
        probe.call()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        ranks.meet()
        warm_ns = ranks.largest(host_clock(finished) if is_at_it else 0.0)
    n_times = int(min(MOST, max(FEWEST, total_ns / warm_ns)))
    ranks.meet()
    return [host_clock(finished) for _ in range(n_times if is_at_it else 0)]
