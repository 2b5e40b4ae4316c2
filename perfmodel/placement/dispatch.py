"""Who computes what is not resident: policies that decide at each step, for many layers and steps at once.

A row is one layer in one step. An expert with tokens is computed by the device, once its weights are there, or by the
host's CPU, which holds the weights of all experts. ktransformers' expert deferral, which adds the results of some
experts one layer later, is none of these: it changes the model's numbers. numpy only; times are ns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

from .problem import COPIED, ON_HOST, RESIDENT, Array, Mask, Tiers

SAME_FRAC = 1e-9  # spans this near to each other are the same but for rounding


@dataclass(frozen=True, eq=False)
class Steps:
    """What a dispatch may know, all `[row, expert]`: `tokens` on each expert, whether it is `resident`, and what it
    costs by itself: `gpu_ns` the device once its weights are there, `fetch_ns` the link for its weights, `host_ns` the
    CPU. Raises InputError for shapes that differ, and costs that are not finite or below 0."""

    tokens: NDArray[np.int64]
    resident: Mask
    gpu_ns: Array
    fetch_ns: Array
    host_ns: Array

    def __post_init__(self) -> None:
        shapes = {name: getattr(self, name).shape for name in self.__dataclass_fields__}
        if self.tokens.ndim != 2 or len(set(shapes.values())) > 1:
            raise InputError(f"dispatch: arrays of shapes {shapes}, expected all of one [row, expert]")
        for name in ("gpu_ns", "fetch_ns", "host_ns"):
            cost = getattr(self, name)
            if not (np.isfinite(cost) & (cost >= 0)).all():
                raise InputError(f"dispatch: {name} holds values that are not finite or below 0, expected times")

    @property
    def awake(self) -> Mask:
        """Which experts have tokens."""
        return self.tokens > 0

    def tiers(self, on_host: Mask) -> Tiers:
        """RESIDENT, COPIED or ON_HOST for each expert when the CPU computes those of `on_host`; RESIDENT, which is 0,
        for those without tokens."""
        device = np.where(self.resident, RESIDENT, COPIED)
        return np.where(self.awake, np.where(on_host, ON_HOST, device), RESIDENT).astype(np.int8)

    def of_rows(self, rows: NDArray[np.int64]) -> "Steps":
        """The same for some rows."""
        return Steps(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def of_experts(self, columns: NDArray[np.int64]) -> "Steps":
        """The same for some experts of each row, `columns[row, item]`."""
        return Steps(*(np.take_along_axis(getattr(self, n), columns, axis=1) for n in self.__dataclass_fields__))


Dispatch = Callable[[Steps], Tiers]  # RESIDENT, COPIED or ON_HOST, `[row, expert]`


def makespan_ns(steps: Steps, tiers: Tiers) -> Array:
    """How long each row takes, `[row]` ns: the longest of what the device computes, of the link with one expert to
    compute after the last arrival, and of the CPU.

    The last to arrive is the one that is computed soonest. A device that waits for an earlier arrival is not counted.
    """
    return _spans(steps, tiers == ON_HOST)


def _spans(s: Steps, on_host: Mask) -> Array:
    copied = s.awake & ~s.resident & ~on_host
    gpu = np.where(s.awake & ~on_host, s.gpu_ns, 0.0).sum(axis=1)
    last = np.where(copied, s.gpu_ns, np.inf).min(axis=1, initial=np.inf)
    link = np.where(copied, s.fetch_ns, 0.0).sum(axis=1) + np.where(np.isfinite(last), last, 0.0)
    host = np.where(s.awake & on_host, s.host_ns, 0.0).sum(axis=1)
    return np.asarray(np.maximum(np.maximum(gpu, link), host))


def all_host(steps: Steps) -> Tiers:
    """The CPU computes whatever is not resident (ktransformers, decoding)."""
    return steps.tiers(~steps.resident)


def all_copied(steps: Steps) -> Tiers:
    """The device computes everything, after copies of what is not resident (on-demand loading)."""
    return steps.tiers(np.zeros_like(steps.resident))


def fiddler(steps: Steps) -> Tiers:
    """Each expert that is not resident goes where it is cheaper by itself, to the link in a draw (Fiddler, arXiv
    2402.07033). Its code minimises the sum of costs over all splits, which is this: with its constants the CPU below 10
    tokens."""
    return steps.tiers(~steps.resident & (steps.host_ns < steps.fetch_ns + steps.gpu_ns))


def hybrimoe(steps: Steps) -> Tiers:
    """List scheduling from both ends (HybriMoE, arXiv 2504.05897).

    Experts in device memory by tokens descending, then those outside by tokens descending. The device takes the next
    from the front, after a copy if it is outside; copies run one after another beside the device's earlier work. The
    CPU takes the next from the back, at last those in device memory too. Whichever would finish its next one earlier
    takes it, the device in a draw.
    """
    order = np.lexsort((-steps.tokens, ~steps.resident, ~steps.awake), axis=-1)
    n_awake = steps.awake.sum(axis=1)
    order = order[:, : int(n_awake.max(initial=0))]
    s = steps.of_experts(order)
    rows = np.arange(len(order))
    front, back = np.zeros(len(order), dtype=np.int64), n_awake - 1
    gpu, link, host = np.zeros((3, len(order)))
    to_host = np.zeros(order.shape, dtype=bool)
    for _ in range(order.shape[1]):
        first, last = np.minimum(front, order.shape[1] - 1), np.maximum(back, 0)
        arrival = np.where(s.resident[rows, first], link, link + s.fetch_ns[rows, first])
        ready = np.where(s.resident[rows, first], gpu, np.maximum(gpu, arrival))
        by_gpu, by_host = ready + s.gpu_ns[rows, first], host + s.host_ns[rows, last]
        is_left, is_host = front <= back, by_host < by_gpu
        to_host[rows, last] |= is_left & is_host
        host = np.where(is_left & is_host, by_host, host)
        gpu, link = (np.where(is_left & ~is_host, new, old) for new, old in ((by_gpu, gpu), (arrival, link)))
        front, back = front + (is_left & ~is_host), back - (is_left & is_host)
    return steps.tiers(_scattered(to_host, order, steps))


def _scattered(values: Mask, columns: NDArray[np.int64], steps: Steps) -> Mask:
    """Values of some experts of each row at their places, `[row, expert]`; false for the others."""
    found = np.zeros(steps.tokens.shape, dtype=bool)
    np.put_along_axis(found, columns, values, axis=1)
    return found


def balanced(steps: Steps) -> Tiers:
    """Ours: from each of the others, one expert at a time goes to the other side while the row gets shorter, and the
    shortest end of all is taken; so a row is never longer than under any of the others.

    Each time that expert moves which makes `makespan_ns` least.
    """
    ends = np.stack([_descended(steps, start(steps) == ON_HOST) for start in (hybrimoe, fiddler, all_host, all_copied)])
    best = np.argmin([_spans(steps, on_host) for on_host in ends], axis=0)
    return steps.tiers(ends[best, np.arange(len(best))])


def _descended(steps: Steps, start: Mask) -> Mask:
    """Which experts the CPU computes when moves of one expert have nothing to gain any more, `[row, expert]`."""
    n_awake = steps.awake.sum(axis=1)
    columns = np.argsort(~steps.awake, axis=1, kind="stable")[:, : int(n_awake.max(initial=0))]
    s = steps.of_experts(columns)
    on_host = np.take_along_axis(start, columns, axis=1)
    going = np.flatnonzero(n_awake)
    while going.size:
        here = s.of_rows(going)
        spans = _spans_after_a_move(here, on_host[going])
        move = spans.argmin(axis=1)
        is_shorter = spans[np.arange(going.size), move] < _spans(here, on_host[going]) * (1 - SAME_FRAC)
        going, move = going[is_shorter], move[is_shorter]
        on_host[going, move] ^= True
    return _scattered(on_host, columns, steps)


def _spans_after_a_move(s: Steps, on_host: Mask) -> Array:
    """How long each row would take with one expert moved to the other side, `[row, expert]` ns; infinite for those
    without tokens. As `_spans` has it."""
    to_device = np.where(on_host, 1.0, -1.0)
    gpu = np.where(s.awake & ~on_host, s.gpu_ns, 0.0).sum(axis=1, keepdims=True) + to_device * s.gpu_ns
    host = np.where(s.awake & on_host, s.host_ns, 0.0).sum(axis=1, keepdims=True) - to_device * s.host_ns
    copied = s.awake & ~s.resident & ~on_host
    link = np.where(copied, s.fetch_ns, 0.0).sum(axis=1, keepdims=True)
    link = link + np.where(s.resident, 0.0, to_device * s.fetch_ns)
    # The least time of a copied expert, and that of the others where it is the one that leaves.
    times = np.pad(np.where(copied, s.gpu_ns, np.inf), ((0, 0), (0, 2)), constant_values=np.inf)
    least, second = np.partition(times, 1, axis=1)[:, :2].T
    leaves = copied & (np.arange(s.tokens.shape[1]) == times.argmin(axis=1)[:, None])
    last = np.where(leaves, second[:, None], least[:, None])
    last = np.where(on_host & ~s.resident, np.minimum(last, s.gpu_ns), last)
    link = np.where(np.isfinite(last), link + last, 0.0)
    return np.where(s.awake, np.maximum(np.maximum(gpu, link), host), np.inf)


DISPATCHES: dict[str, Dispatch] = {
    "all-host": all_host,
    "all-copied": all_copied,
    "fiddler": fiddler,
    "hybrimoe": hybrimoe,
    "balanced": balanced,
}


@dataclass(frozen=True)
class UnitCosts:
    """Costs as constants in an author's code, in units of its own: the CPU for one expert of n tokens takes
    `host_per_token` n + `host_fixed`, a copy `fetch`, the device `gpu`."""

    host_per_token: float
    host_fixed: float
    gpu: float
    fetch: float
    source: str

    def steps(self, tokens: NDArray[np.int64], resident: Mask) -> Steps:
        """Steps at these costs, `[row, expert]`, times in the author's units."""
        host = self.host_per_token * tokens.astype(np.float64) + self.host_fixed
        return Steps(tokens, resident, np.full(tokens.shape, self.gpu), np.full(tokens.shape, self.fetch), host)


PUBLISHED_COSTS = {
    "fiddler": UnitCosts(7.0, 0.0, 0.0, 70.0, "Fiddler (arXiv 2402.07033), constants of its code; resident experts 0"),
    "hybrimoe": UnitCosts(1.0, 0.79, 0.5, 0.418, "HybriMoE (arXiv 2504.05897), constants of its code"),
}
