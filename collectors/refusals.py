"""What a run does not time, and why: a layer that is too large, a call that is too slow, a way that ends processes, and
what computes something else than its slow twin.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from perfmodel.errors import InputError
from perfmodel.routing import Shares
from perfmodel.text import NS_PER_S

from . import store
from .memory import Pool
from .points import check
from .timing import clock_of
from .workloads import Workload

CHECK_TOKENS = 16
MOST_FATAL = 2  # points of a way that end their process, before the way is given up
FAR_ELEMENTS = 1 << 31  # activations so large that kernels which count in 32 bits write elsewhere


def refuse_large(pool: Pool, w: Workload) -> None:
    """Raise InputError when the pool, made to what memory was free, holds not one copy of a layer."""
    layer_bytes, held_bytes = w.moe_shape.layer_bytes, pool.flat.numel() * pool.flat.element_size()
    if layer_bytes > held_bytes:
        raise InputError(f"the layer takes {layer_bytes:.0f} bytes, and memory was free for {held_bytes}")


def refuse_slow(call: Callable[[int], object], device: str, longest_s: float) -> None:
    """Make a call; raises InputError when it is so slow that its repeats would take the time of many other points.

    A slow one is made again before it is believed: the first of a kind loads kernels.
    """
    clock = clock_of(device)
    took_s = clock(partial(call, 0)) / NS_PER_S
    if took_s > longest_s:
        took_s = clock(partial(call, 1)) / NS_PER_S
    if took_s > longest_s:
        raise InputError(f"a call takes {took_s:.2g} s, more than {longest_s:g}: its repeats would cost too much time")


def way_of(w: Workload) -> tuple[object, ...]:
    """What workloads have in common of which each may end its process: how they are run, resident ones by shape.

    Those with activations of 2^31 elements or more are one way, however they are run.
    """
    widest = max(w.hidden if w.gemm_k is None else w.gemm_k, w.gemm_n or (w.n_gemms - 1) * w.inter)
    if w.n_tokens * w.top_k * widest >= FAR_ELEMENTS:
        return ("far", w.device)
    return (w.dtype, w.op, w.access, w.residency, w.launch, w.shape if w.access == "resident" else None)


def tired_ways(folder: Path, planned: Sequence[Workload]) -> set[tuple[object, ...]]:
    """The ways of which several points have ended their process, by a crash, by silence or by a broken device."""
    fatal = {entry.get("workload") for entry in store.left_out(folder) if entry.get("is_fatal")}
    counts = Counter(way_of(w) for w in planned if w.id in fatal)
    return {way for way, n in counts.items() if n >= MOST_FATAL}


def kind_of(w: Workload) -> tuple[object, ...]:
    """What workloads that run the same code over the same weights have in common."""
    return (w.shape, w.dtype, w.op, w.access, w.residency, w.launch)


class Checked:
    """Which kinds of workload were compared with slow twins, and how they fared; each is, before it is first timed."""

    def __init__(self, folder: Path, planned: Sequence[Workload], files: Mapping[str, Shares]) -> None:
        timed = {point["workload"] for point in store.points(folder)}
        self.planned, self.files = planned, files
        self.kinds: dict[tuple[object, ...], str | None] = {kind_of(w): None for w in planned if w.id in timed}

    def refuse_wrong(self, pool: Pool, w: Workload) -> None:
        """Raise InputError when workloads of this kind compute something else than the reference."""
        kind = kind_of(w)
        if kind not in self.kinds:
            # A small batch is enough to see it, and the slow twin takes long.
            alike = [other for other in self.planned if kind_of(other) == kind]
            small = min(alike, key=lambda o: (abs(o.n_tokens - CHECK_TOKENS), o.routing == "uniform"))
            self.kinds[kind] = None
            try:
                check(pool, small, self.files.get(small.routing))
            except InputError as error:
                self.kinds[kind] = str(error)
            except Exception as error:  # such as no memory for the twin: what nobody has checked is not timed
                self.kinds[kind] = f"was not compared with its slow twin: {' '.join(str(error).split())[:200]}"
        if self.kinds[kind] is not None:
            raise InputError(self.kinds[kind] or "")
