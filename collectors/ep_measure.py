"""A rank of an expert-parallel collection: checks, timed steps, profiled steps. Rank 0 also decides and writes."""

import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from perfmodel.errors import InputError
from perfmodel.routing import Shares

from . import ep_capture, machine, store
from .campaign import open_folder
from .checks import TOLERANCE, difference
from .ep_layer import CudaWatch, HostWatch, expert_parallel_layer, slow_part
from .ep_plan import N_WARM_UP, Batch, Request, chosen_experts, firsts, gpu_of, plan, profiled
from .ep_probes import probe_rows
from .ep_ranks import Ranks, clocks, correction_ns, hold_to, joined, own_processors
from .layer import Layer, grouped_mm_name
from .memory import TORCH_DTYPES, fill
from .points import FILL_ELEMENTS, WEIGHT_SCALE
from .probes_host import COLD_CACHES, FALLBACK_CACHE_BYTES, stream_bytes
from .profile_checks import refuse_gaps
from .profile_points import in_the_way
from .profiling import counting, named_range, trace_of
from .progress import Progress
from .workloads import file_shares

MOST_COPIES = 16
POOL_FRAC = 0.25  # of the memory there is, for weights of all ranks
MEASURING_FRAC = 0.9  # of the time budget; profiles are made of the rest
PROBES_FRAC = 0.05
N_PROFILED_STEPS = 2


@dataclass(frozen=True)
class Order:
    """What was asked for: the plan, how it is measured, where it goes, when the command began (monotonic seconds).

    `parent` is the process that started this rank.
    """

    folder: Path
    request: Request
    settings: store.Json
    minutes: float
    started: float
    parent: int


@dataclass(frozen=True)
class Inputs:
    """One batch on one rank: copies of its layer of which one is used at a time, tokens, and who serves them."""

    batch: Batch
    copies: list[Layer]
    x: Tensor
    chosen: Tensor
    firsts: list[int]


class Room(NamedTuple):
    """What all ranks share, as rank 0 saw it before it was bound to processors: their caches are not all there are.

    Bytes that the layers of all ranks together may take, those of the last-level caches, those of a streamed array.
    """

    limit_bytes: float
    cache_bytes: float
    stream_bytes: int


def room(ranks: Ranks) -> Room:
    """What this machine has; of a size that no plan reaches where the system does not tell."""
    if ranks.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(ranks.device)
        return Room(POOL_FRAC * ranks.size * gpu.total_memory, ranks.size * gpu.L2_cache_size, stream_bytes())
    free, caches = machine.available_bytes(), machine.last_level_cache_bytes() or FALLBACK_CACHE_BYTES
    # The ranks share the caches, so their arrays together are as large as those of one process alone.
    return Room(1 << 40 if free is None else POOL_FRAC * free, caches, stream_bytes() // ranks.size)


def weights_pool(ranks: Ranks, batches: Sequence[Batch], room: Room) -> Tensor:
    """The weights of all shapes: one buffer of random numbers, others on every rank, of which each shape takes a view.

    A model reads the weights of each layer once a step, so they come from memory: copies of the layer take turns until
    several caches of weights have passed.
    """
    needed = max(_n_copies(batch, ranks.size, room) * _own_bytes(ranks, batch) for batch in batches)
    dtype = TORCH_DTYPES[batches[0].shape.dtype]
    torch.manual_seed(ranks.rank)
    flat = torch.empty(needed // dtype.itemsize, dtype=dtype, device=ranks.device)
    fill(flat, torch.randn(min(FILL_ELEMENTS, flat.numel()), device=ranks.device).mul_(WEIGHT_SCALE).to(dtype))
    return flat


def _own_bytes(ranks: Ranks, batch: Batch) -> int:
    n_own = -(-batch.shape.n_experts // ranks.size)
    return n_own * round(batch.shape.expert_bytes)


def _n_copies(batch: Batch, n_ranks: int, room: Room) -> int:
    shape = batch.shape
    active = min(shape.n_experts, n_ranks * batch.n_tokens * shape.top_k)
    n_wanted = 1 + -(-COLD_CACHES * room.cache_bytes // round(active * shape.expert_bytes))
    return int(max(1, min(MOST_COPIES, n_wanted, room.limit_bytes // shape.layer_bytes)))


def inputs_of(
    ranks: Ranks, flat: Tensor, batch: Batch, n_copies: int, seed: int, files: Mapping[str, Shares]
) -> Inputs:
    """A batch as this rank has it; the router is the same on all ranks."""
    shape, bounds = batch.shape, firsts(batch.shape.n_experts, ranks.size)
    (k1, n1), (k2, n2) = shape.gemms
    n_own = bounds[ranks.rank + 1] - bounds[ranks.rank]
    n_up, n_down = n_own * k1 * n1, n_own * k2 * n2
    torch.manual_seed(seed)
    router = torch.randn(shape.n_experts, shape.hidden).mul_(WEIGHT_SCALE).to(flat.device, flat.dtype)
    copies = []
    for copy in range(n_copies):
        weights = flat[copy * (n_up + n_down) :]
        gate_up, down = weights[:n_up].view(n_own, n1, k1), weights[n_up : n_up + n_down].view(n_own, n2, k2)
        copies.append(Layer(router, gate_up, down, shape.top_k, shape.n_gemms == 3))
    torch.manual_seed(seed + 1 + ranks.rank)
    x = torch.randn(batch.n_tokens, shape.hidden).to(flat.device, flat.dtype)
    chosen = torch.from_numpy(chosen_experts(batch, ranks.rank, ranks.size, seed, files))
    return Inputs(batch, copies, x, chosen.to(flat.device), bounds)


def call(ranks: Ranks, inputs: Inputs, n: int, watch: HostWatch | CudaWatch) -> Tensor:
    """The n-th pass of the layer."""
    layer = inputs.copies[n % len(inputs.copies)]
    return expert_parallel_layer(
        layer, inputs.x, inputs.chosen, inputs.firsts, ranks.rank, inputs.batch.n_chunks, ranks.exchange, watch
    )


def check(ranks: Ranks, inputs: Inputs, watch: HostWatch | CudaWatch) -> None:
    """Compare a pass with the slow twin on every rank; all ranks end with one sentence unless all agree with it."""
    found = call(ranks, inputs, 0, watch)
    x, chosen = ranks.every(inputs.x), ranks.every(inputs.chosen)
    expected = slow_part(inputs.copies[0], x, chosen, inputs.firsts[ranks.rank])
    torch.distributed.all_reduce(expected)
    own = slice(ranks.rank * len(inputs.x), (ranks.rank + 1) * len(inputs.x))
    limit = TOLERANCE[inputs.batch.shape.dtype]
    worst = ranks.largest(difference(found, expected[own]))
    if not worst <= limit:
        ranks.refuse(
            f"{inputs.batch.words}: differs from the slow reference by {worst:.2g}, expected at most {limit:g}"
        )


def steps_of(
    ranks: Ranks, inputs: Inputs, n_steps: int, to_common_ns: int, watch: HostWatch | CudaWatch
) -> list[store.Json]:
    """The lines of this rank's timed steps, which all ranks begin together; `to_common_ns` is added to its clock."""
    for n in range(N_WARM_UP):
        call(ranks, inputs, n, watch)
    found: list[store.Json] = []
    for n in range(n_steps):
        ranks.meet()
        with watch.step():
            call(ranks, inputs, N_WARM_UP + n, watch)
        phases = sorted(watch.found, key=lambda phase: phase.start_ns)
        found.append(
            {
                "step": n,
                "rank": ranks.rank,
                "start_ns": watch.start_ns + to_common_ns,
                "end_ns": watch.end_ns + to_common_ns,
                "phases": [[p.name, p.chunk, p.start_ns + to_common_ns, p.dur_ns] for p in phases],
            }
        )
    return found


def profile(ranks: Ranks, inputs: Inputs, line: store.Json) -> tuple[store.Json | None, str]:
    """The trace of a few steps of a batch on this rank; null, and why, when the profiler lost some of it."""
    batch, parts = inputs.batch, Counter[str]()
    is_cuda = ranks.device.type == "cuda"
    watch = (CudaWatch if is_cuda else HostWatch)(counting(parts))
    for n in range(N_WARM_UP):
        call(ranks, inputs, n, watch)
    parts.clear()

    def steps() -> None:
        for n in range(N_PROFILED_STEPS):
            ranks.meet()
            with named_range(batch.range_name):
                call(ranks, inputs, n, watch)
        ranks.meet()

    def table() -> store.Json:
        ranges = {batch.range_name: {name: n // N_PROFILED_STEPS for name, n in sorted(parts.items())}}
        return {**line, "op": "moe_layer", "rank": ranks.rank, "n_steps": N_PROFILED_STEPS, "ranges": ranges}

    try:
        trace = trace_of(steps, is_cuda, table)
        expected = {batch.range_name: N_PROFILED_STEPS, **parts}
        refuse_gaps(trace, expected, on_cuda=is_cuda, from_graph=False, hint=in_the_way(os.environ))
    except InputError as error:
        return None, f"rank {ranks.rank}: {error}"
    group = {"backend": torch.distributed.get_backend(), "rank": ranks.rank, "world_size": ranks.size}
    return {**trace, "distributedInfo": group}, ""


def work(order: Order) -> None:
    """Everything of one rank, from meeting the others to leaving them.

    Raises InputError for what cannot be used or measured, on the rank that finds it, and RuntimeError when a rank is
    lost.
    """
    settings = order.settings
    torch.set_num_threads(settings["threads"])
    with torch.inference_mode(), joined(settings["device"]) as ranks:
        if ranks.size != settings["n_ranks"]:
            raise InputError(f"--ranks is {settings['n_ranks']}, and {ranks.size} ranks were started")
        Collection(order, ranks).run()


class Collection:
    """What a rank of one collection shares between its steps: the order, the other ranks, the plan, what is done."""

    def __init__(self, order: Order, ranks: Ranks) -> None:
        self.order, self.ranks, self.folder = order, ranks, order.folder
        self.files = file_shares(order.request.routing_files)
        self.room: Room = ranks.of_first(room(ranks))
        try:
            self.batches, self.skipped = plan(order.request, self.room.limit_bytes)
        except InputError as error:
            ranks.refuse(str(error))
        self.lines: list[store.Json] = []  # of what is measured; on rank 0
        self.deadline = order.started + MEASURING_FRAC * 60 * order.minutes
        self.progress = Progress(len(self.batches), 0, deadline=self.deadline)

    @property
    def is_first(self) -> bool:
        """Whether this rank decides and writes."""
        return self.ranks.rank == 0

    def show(self, label: str) -> None:
        """How far the collection is, of which one rank speaks."""
        if self.is_first:
            self.progress.show(label)

    def run(self) -> None:
        """What is missing of the capture, until it is whole or time is up."""
        lock = self.begin()
        self.probe()
        pool = weights_pool(self.ranks, self.batches, self.room)
        self.measure(pool)
        self.profile(pool)
        if self.is_first:
            self.progress.close()
            print(f"{len(self.lines)} batches are measured in {self.folder}", file=sys.stderr)
        if not self.ranks.of_first(len(self.lines)):
            self.ranks.refuse(f"--minutes {self.order.minutes:g}: no batch was measured in this time; give more")
        if lock is not None:
            os.close(lock)

    def begin(self) -> int | None:
        """Open the folder on rank 0 and hold its lock; set the clocks; keep ranks of the CPU to their processors."""
        clock, lock, settings = clocks(self.ranks), None, self.order.settings
        own = []
        if self.ranks.device.type == "cpu":
            own = own_processors(int(os.environ.get("LOCAL_RANK", self.ranks.rank)), settings["threads"])
        cpus = self.ranks.at_first(own)
        if self.is_first:
            open_folder(self.folder, ep_capture.MANIFEST)
            lock = store.lock(self.folder, 0.0)
            found = {
                "machine": {**machine.machine(settings["threads"]), **machine.gpu(settings["device"])},
                "software": {**machine.software(), **machine.torch_build()},
                "kernel": grouped_mm_name(),
                "clock": clock,
                "cpus_of_ranks": cpus,
                "n_planned": len(self.batches),
                "skipped": self.skipped,
            }
            ep_capture.begin(self.folder, settings, found)
            self.lines = ep_capture.measured(self.folder)
            base_ns = ep_capture.time_base_ns(self.folder)
            for sentence in self.skipped:
                print(f"left out: {sentence}", file=sys.stderr)
        hold_to(own)  # not before what the machine has is written down
        origin_ns = self.ranks.of_first(base_ns - time.perf_counter_ns() if self.is_first else None)
        own_clock = self.ranks.of_first(clock)[self.ranks.rank]
        self.to_common_ns = origin_ns + correction_ns(own_clock)
        return lock

    def probe(self) -> None:
        """What the ranks can do together, once: its GEMMs are those of the shapes that are planned first."""
        path = self.folder / ep_capture.PROBES
        if self.ranks.of_first(path.exists() if self.is_first else None):
            return
        self.show("probing")
        shapes = list(dict.fromkeys(b.shape for b in self.batches))
        seconds = PROBES_FRAC * 60 * self.order.minutes
        by_rank = self.ranks.at_first(
            list(probe_rows(self.ranks, shapes, shapes[0].dtype, self.room.stream_bytes, seconds))
        )
        if by_rank is not None:
            store.write_atomically(path, "".join(store.to_line(row) for rows in by_rank for row in rows))

    def measure(self, pool: Tensor) -> None:
        """Check and time each batch that is missing, as long as there is time."""
        done = [ep_capture.line_of(batch, self.lines) is not None for batch in self.batches]
        self.progress.n_before = sum(done)
        for batch, is_done in zip(self.batches, self.ranks.of_first(done), strict=True):
            if is_done:
                continue
            if self.ranks.of_first(self.is_over()):
                break
            inputs = self.inputs(pool, batch)
            watch = CudaWatch() if self.ranks.device.type == "cuda" else HostWatch()
            check(self.ranks, inputs, watch)
            steps = self.ranks.at_first(
                steps_of(self.ranks, inputs, self.order.settings["n_steps"], self.to_common_ns, watch)
            )
            rows = self.ranks.at_first(
                torch.bincount(inputs.chosen.reshape(-1), minlength=batch.shape.n_experts).tolist()
            )
            if steps is not None and rows is not None:
                self.lines.append(
                    ep_capture.add(self.folder, batch, gpu_of(batch.shape.n_experts, self.ranks.size), rows, steps)
                )
                self.progress.n_done += 1
            self.show("measuring")

    def is_over(self) -> bool:
        """Whether time is up, or whoever started the ranks is gone."""
        return time.monotonic() > self.deadline or self.is_left_alone()

    def is_left_alone(self) -> bool:
        """Whether whoever started this rank is gone: then nobody would end it."""
        return os.getppid() != self.order.parent

    def inputs(self, pool: Tensor, batch: Batch) -> Inputs:
        """A batch as this rank has it."""
        n_copies = _n_copies(batch, self.ranks.size, self.room)
        return inputs_of(self.ranks, pool, batch, n_copies, self.order.request.seed, self.files)

    def profile(self, pool: Tensor) -> None:
        """Profile the few batches that show how a step looks inside: those measured, and not profiled yet."""
        todo = []
        for batch in profiled(self.batches) if self.is_first and not self.is_left_alone() else ():
            line = ep_capture.line_of(batch, self.lines)
            if line is not None and not ep_capture.has_profile(self.folder, line, self.ranks.size):
                todo.append((batch, line))
        for batch, line in self.ranks.of_first(todo):
            self.show("profiling")
            found = self.ranks.at_first(profile(self.ranks, self.inputs(pool, batch), line))
            for why in (why for _, why in found or () if why):
                print(f"left out: the profile of {batch.words}: {why}", file=sys.stderr)
            if found is not None and all(trace is not None for trace, _ in found):
                ep_capture.add_profile(self.folder, line, [trace for trace, _ in found])
