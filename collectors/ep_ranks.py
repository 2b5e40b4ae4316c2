"""The ranks of an expert-parallel collection: how they meet, agree, and set their clocks by that of rank 0.

Collectives of the layer run on the device (NCCL, or gloo on the CPU); all else is agreed through gloo on the host.
"""

import contextlib
import datetime
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from perfmodel.errors import InputError, first_line

from . import machine
from .ep_capture import MEETING
from .ep_layer import Work

PATIENCE = datetime.timedelta(seconds=60)  # a rank that hangs holds the others up no longer than this
N_ROUND_TRIPS = 100
TASKS = Path("/proc/self/task")  # the threads of this process


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks; `host` is the group that agrees on things."""

    rank: int
    size: int
    device: torch.device
    host: dist.ProcessGroup

    def exchange(self, there: Tensor, rows: Tensor, received: list[int], sent: list[int]) -> Work:
        """Start an all-to-all of rows; returns at once."""
        work = dist.all_to_all_single(there, rows, received, sent, async_op=True)
        assert work is not None
        return work

    def meet(self) -> None:
        """Go on when all ranks are here, and what this one gave to its device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier(group=self.host)

    def of_first(self, value: Any = None) -> Any:
        """What rank 0 says."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host)
        return box[0]

    def at_first(self, value: Any) -> list[Any] | None:
        """What each rank says, at rank 0; null elsewhere."""
        box: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, box, dst=0, group=self.host)
        return box

    def largest(self, value: float) -> float:
        """The largest of what the ranks say; not-a-number when one of them does."""
        box = torch.zeros(self.size, dtype=torch.float64)
        box[self.rank] = value
        dist.all_reduce(box, group=self.host)
        return float(box.max())

    def refuse(self, words: str) -> NoReturn:
        """End all ranks, which agree on why, with one sentence: that of rank 0."""
        if self.rank == 0:
            raise InputError(words)
        sys.exit(InputError.exit_code)

    def every(self, x: Tensor) -> Tensor:
        """The rows of all ranks, of which each has as many, one after another."""
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x.contiguous())
        return torch.cat(found)


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Meet the other ranks, as torchrun or the collector itself started them (RANK, WORLD_SIZE, LOCAL_RANK).

    Raises InputError where they cannot be met.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    where = torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device("cpu")
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size) and sys.platform == "linux":
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # one machine: its names and addresses do not matter
            os.environ.setdefault(name, "lo")
    if device == "cuda":
        torch.cuda.set_device(where)
    met = f"file://{os.environ[MEETING]}" if MEETING in os.environ else "env://"
    backend = "nccl" if device == "cuda" else "gloo"
    own = where if device == "cuda" else None
    try:
        dist.init_process_group(backend, init_method=met, rank=rank, world_size=size, timeout=PATIENCE, device_id=own)
    except (RuntimeError, ValueError) as error:  # the latter where variables are missing
        raise InputError(f"rank {rank} cannot meet the others: {first_line(error)}") from None
    host = dist.new_group(backend="gloo", timeout=PATIENCE) if device == "cuda" else dist.group.WORLD
    assert host is not None
    yield Ranks(rank, size, where, host)
    dist.destroy_process_group()  # not after an error: it may wait for ranks that are gone


def own_processors(local_rank: int, threads: int) -> list[int]:
    """The processors of a rank, which it shares with as few others as may be, cores before their hardware threads.

    None where a system binds no threads.
    """
    if not hasattr(os, "sched_setaffinity"):
        return []
    cpus = machine.cpus_by_core()
    return sorted({cpus[(local_rank * threads + i) % len(cpus)] for i in range(threads)})


def hold_to(cpus: Sequence[int]) -> None:
    """Keep all threads of this process to some processors.

    Left to itself the system moves ranks about: for milliseconds several stand on one core while another idles.
    """
    for task in TASKS.iterdir() if cpus else ():  # gloo's threads are there already, others inherit
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cpus)


def clocks(ranks: Ranks, n_round_trips: int = N_ROUND_TRIPS) -> list[dict[str, int]] | None:
    """What to add to each rank's clock to have that of rank 0, and how wrong that may be; at rank 0, null elsewhere.

    As NTP does it: the quickest of many round trips had the least chance to be held up on one of its ways, and its
    middle is when the other clock was read, give or take half of it.
    """
    found = {"rank": ranks.rank, "offset_ns": 0, "error_ns": 0}
    for other in range(1, ranks.size):
        if ranks.rank == 0:
            _answer(ranks, other, n_round_trips)
        elif ranks.rank == other:
            found |= _ask(ranks, n_round_trips)
    return ranks.at_first(found)


def _answer(ranks: Ranks, other: int, n_round_trips: int) -> None:
    message = torch.zeros(1, dtype=torch.int64)
    for _ in range(n_round_trips):
        dist.recv(message, src=other, group=ranks.host)
        message[0] = time.perf_counter_ns()
        dist.send(message, dst=other, group=ranks.host)


def _ask(ranks: Ranks, n_round_trips: int) -> dict[str, int]:
    message = torch.zeros(1, dtype=torch.int64)
    trips = []
    for _ in range(n_round_trips):
        asked_ns = time.perf_counter_ns()
        dist.send(message, dst=0, group=ranks.host)
        dist.recv(message, src=0, group=ranks.host)
        trips.append((asked_ns, int(message), time.perf_counter_ns()))
    return offset_of(trips)


def offset_of(trips: Sequence[tuple[int, int, int]]) -> dict[str, int]:
    """Offset and error of a clock from round trips (asked, the other's clock, answered), in ns."""
    asked_ns, other_ns, answered_ns = min(trips, key=lambda trip: trip[2] - trip[0])
    return {"offset_ns": other_ns - (asked_ns + answered_ns) // 2, "error_ns": -(-(answered_ns - asked_ns) // 2)}


def correction_ns(clock: Mapping[str, int]) -> int:
    """What is added to a rank's times: its offset, unless that lies within its error. Then the clocks may be one, as
    those of one machine are, and adding it would set them apart."""
    return clock["offset_ns"] if abs(clock["offset_ns"]) > clock["error_ns"] else 0
