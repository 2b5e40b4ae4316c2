"""One expert-parallel MoE layer, each rank with its own experts and its own tokens, and when each of its phases ran.

Shape letters as in `layer.py`; G ranks, C chunks of a rank's tokens, and of experts E those of this rank. A rank's
experts are neighbours, so rows sorted by expert are sorted by rank.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from .layer import Layer, Mark, apply_experts, dispatch, no_mark, route, slow_moe_layer, stacked

# What `apply_experts` calls its parts, and what they are called between ranks.
PHASE_OF_PART = {"gate_up": "gemm1", "activation": "activation", "down": "gemm2"}


class Work(Protocol):
    """A collective that was started, as torch.distributed gives it."""

    def wait(self) -> object:
        """Go on when it is finished; on CUDA what is launched from now on does."""

    def get_future(self) -> "torch.futures.Future[object]":
        """What says that it is finished to those who do not wait."""


# Rows to write, rows to send, how many of the first come from each rank, how many of the second go to each.
Exchange = Callable[[Tensor, Tensor, list[int], list[int]], Work]


@dataclass(frozen=True)
class Phase:
    """One phase of a step on this rank: which chunk of the tokens, begin and duration in ns of this rank's clock."""

    name: str
    chunk: int
    start_ns: int
    dur_ns: int


class Watch(Protocol):
    """Notes when phases begin and end; phases of computing run inside `phase`, collectives from `begin` to the end."""

    def phase(self, name: str, chunk: int = 0) -> AbstractContextManager[None]:
        """A phase that computes."""

    def begin(self, name: str, chunk: int, start: Callable[[], Work]) -> Callable[[], None]:
        """Start a collective; what comes back waits for it."""


class HostWatch:
    """A watch by the host's clock, for work that is finished when its call returns.

    A collective ends when its own thread says so, which may be long before somebody waits for it.
    """

    def __init__(self, mark: Mark = no_mark) -> None:
        self.mark = mark
        self.found: list[Phase] = []
        self.start_ns = self.end_ns = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """All of one step; forgets the step before."""
        self.found = []
        self.start_ns = time.perf_counter_ns()
        yield
        self.end_ns = time.perf_counter_ns()

    @contextmanager
    def phase(self, name: str, chunk: int = 0) -> Iterator[None]:
        """A phase that computes."""
        start_ns = time.perf_counter_ns()
        with self.mark(name):
            yield
        self.found.append(Phase(name, chunk, start_ns, time.perf_counter_ns() - start_ns))

    def begin(self, name: str, chunk: int, start: Callable[[], Work]) -> Callable[[], None]:
        """Start a collective; what comes back waits for it."""
        start_ns = time.perf_counter_ns()
        ended_ns: list[int] = []
        with self.mark(name):
            work = start()
        work.get_future().add_done_callback(lambda _: ended_ns.append(time.perf_counter_ns()))

        def wait() -> None:
            with self.mark(name):
                work.wait()
            end_ns = ended_ns[0] if ended_ns else time.perf_counter_ns()
            self.found.append(Phase(name, chunk, start_ns, end_ns - start_ns))

        return wait


class CudaWatch:
    """A watch by CUDA events. A collective begins when the work before its call is done, since it waits for that.

    Its end is seen on a stream of its own that does nothing but wait for collectives, in the order of their calls.
    """

    def __init__(self, mark: Mark = no_mark) -> None:
        self.mark = mark
        self.beside = torch.cuda.Stream()
        self.base, self.base_ns = torch.cuda.Event(enable_timing=True), 0
        self.seen: list[tuple[str, int, torch.cuda.Event, torch.cuda.Event]] = []
        self.start_ns = self.end_ns = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """All of one step, from an idle device to an idle device; forgets the step before."""
        self.seen = []
        torch.cuda.synchronize()
        self.base = self._stamp()
        self.start_ns = self.base_ns = time.perf_counter_ns()
        yield
        end = self._stamp()
        torch.cuda.synchronize()
        self.end_ns = self._ns(end)

    @property
    def found(self) -> list[Phase]:
        """The phases of the last step."""
        return [
            Phase(name, chunk, self._ns(start), self._ns(end) - self._ns(start))
            for name, chunk, start, end in self.seen
        ]

    def _stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ns(self, event: torch.cuda.Event) -> int:
        return self.base_ns + round(self.base.elapsed_time(event) * 1e6)

    @contextmanager
    def phase(self, name: str, chunk: int = 0) -> Iterator[None]:
        """A phase that computes."""
        start = self._stamp()
        with self.mark(name):
            yield
        self.seen.append((name, chunk, start, self._stamp()))

    def begin(self, name: str, chunk: int, start: Callable[[], Work]) -> Callable[[], None]:
        """Start a collective; what comes back makes the current stream wait for it."""
        began = self._stamp()
        with self.mark(name):
            work = start()
            with torch.cuda.stream(self.beside):
                work.wait()
                ended = self._stamp()

        def wait() -> None:
            with self.mark(name):
                torch.cuda.current_stream().wait_event(ended)
            self.seen.append((name, chunk, began, ended))

        return wait


@dataclass(frozen=True)
class Counts:
    """Rows this rank sends and receives, by chunk and other rank; of those received also by expert, `[C, G, E]`."""

    sent: list[list[int]]
    received: list[list[int]]
    of_experts: Tensor


def exchange_counts(offs: Tensor, firsts: Sequence[int], rank: int, n_chunks: int, exchange: Exchange) -> Counts:
    """Tell every rank how many rows it will get, by chunk and expert, from where the rows of each end here."""
    counts_CE = offs.diff(prepend=offs.new_zeros(1)).long().view(n_chunks, -1)
    parts = [counts_CE[:, first:last] for first, last in pairwise(firsts)]
    n_own = firsts[rank + 1] - firsts[rank]
    received = counts_CE.new_empty(len(parts) * n_chunks * n_own)
    message = torch.cat([part.reshape(-1) for part in parts])
    exchange(received, message, [n_chunks * n_own] * len(parts), [part.numel() for part in parts]).wait()
    of_experts = received.view(len(parts), n_chunks, n_own).transpose(0, 1)
    # Collectives need their sizes on the host: on CUDA this waits for the device, as it does in a serving system.
    sent = torch.stack([part.sum(dim=1) for part in parts], dim=1).tolist()
    return Counts(sent, of_experts.sum(dim=2).tolist(), of_experts)


def by_expert(received_GE: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """The order that sorts received rows, which lie by rank and then by expert, by expert; where each expert's end."""
    n_ranks, n_own = received_GE.shape
    expert = torch.arange(n_own, device=received_GE.device).repeat(n_ranks)
    expert = expert.repeat_interleave(received_GE.reshape(-1), output_size=n_rows)
    return expert.argsort(stable=True), received_GE.sum(dim=0).cumsum(0).to(torch.int32)


def expert_parallel_layer(
    layer: Layer, x_TH: Tensor, chosen: Tensor, firsts: Sequence[int], rank: int, n_chunks: int,
    exchange: Exchange, watch: Watch,
) -> Tensor:  # fmt: skip
    """One MoE layer over all ranks, `[T, H]` of this rank's tokens.

    `layer` holds the router of all experts and the weights of this rank's, which are firsts[rank] to firsts[rank + 1].
    The tokens go in `n_chunks` pieces: while the experts compute one, the next is on its way to them and the one before
    on its way back. One piece is the bulk schedule, in which everybody waits for every collective.
    """
    n_experts, width = layer.router.shape
    with watch.phase("gate"):
        weights = route(layer.router, x_TH, layer.top_k)
    with watch.phase("permute"):
        piece = torch.arange(len(x_TH), device=x_TH.device) * n_chunks // len(x_TH)
        keys = chosen + (piece * n_experts).unsqueeze(1)
        rows, offs, order, token = dispatch(x_TH, keys, n_chunks * n_experts)
    with watch.phase("counts"):
        counts = exchange_counts(offs, firsts, rank, n_chunks, exchange)
    pieces = [sum(to) for to in counts.sent]
    out_there = rows.split(pieces)
    back = torch.empty_like(rows)
    come_back = back.split(pieces)
    arrivals: list[tuple[Tensor, Callable[[], None]]] = []
    done: list[Tensor] = []  # held to the end, since collectives read them
    ends: list[Callable[[], None]] = []

    def send(chunk: int) -> None:
        there = rows.new_empty(sum(counts.received[chunk]), width)
        sizes = counts.received[chunk], counts.sent[chunk]
        wait = watch.begin("dispatch", chunk, lambda: exchange(there, out_there[chunk], *sizes))
        arrivals.append((there, wait))

    def give_back(chunk: int) -> None:
        sizes = counts.sent[chunk], counts.received[chunk]
        ends.append(watch.begin("combine", chunk, lambda: exchange(come_back[chunk], done[chunk], *sizes)))

    send(0)
    for chunk in range(n_chunks):
        if chunk + 1 < n_chunks:
            send(chunk + 1)
        there, wait = arrivals[chunk]
        wait()
        done.append(_experts(layer, there, counts.of_experts[chunk], chunk, watch))
        give_back(chunk)
    for end in ends:
        end()
    with watch.phase("reduce"):
        back.mul_(weights.reshape(-1)[order].unsqueeze(1))
        return torch.zeros_like(x_TH).index_add_(0, token, back)


def _experts(layer: Layer, there: Tensor, received_GE: Tensor, chunk: int, watch: Watch) -> Tensor:
    """What this rank's experts make of the rows of a chunk, in the order in which those arrived."""
    with watch.phase("permute", chunk):
        order, offs = by_expert(received_GE, len(there))
        rows = there.index_select(0, order)
    if len(rows):
        rows = apply_experts(
            rows, stacked(layer), offs, layer.is_gated, lambda part: watch.phase(PHASE_OF_PART[part], chunk)
        )
    with watch.phase("permute", chunk):
        return torch.empty_like(rows).index_copy_(0, order, rows)


def slow_part(layer: Layer, x_TH: Tensor, chosen: Tensor, first: int) -> Tensor:
    """What the experts of one rank, of which `first` is the first, add to the outputs of tokens: by the slow twin.

    Summed over ranks, with all tokens given to each, this is what `expert_parallel_layer` must give.
    """
    n_before, n_own = first, len(layer.down)
    is_own = (chosen >= first) & (chosen < first + n_own)
    gate_up, down = stacked(layer)
    n_after = layer.router.shape[0] - n_before - n_own
    # Others' experts are never asked: something must stand where they would.
    far = [
        [matrix[0]] * n_before + [matrix[e] for e in range(n_own)] + [matrix[0]] * n_after for matrix in (gate_up, down)
    ]
    everyone = Layer(layer.router, far[0], far[1], layer.top_k, layer.is_gated)
    return slow_moe_layer(everyone, x_TH, torch.where(is_own, chosen, -1))
