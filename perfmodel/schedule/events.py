"""The fused kernel run event by event: row blocks travel over links and become tasks of processors (decision 0031).

A block is sent, becomes the tasks of its first GEMM, when all these are done those of its second, is sent back, and
becomes the tasks of its weighted sum. A task that is ready goes to a processor at once if any is free, else to the
first that becomes free, in the order in which tasks became ready.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from perfmodel.physics import Array

from .network import BACK, THERE, Interval, links_of
from .tiles import Plan

# Stages of a block. Of what happens at one moment, what is nearer to the end comes first, then the lower block.
REDUCE, TAKE_BACK, SEND_BACK, GEMM2, TAKE, GEMM1 = range(6)
Free = list[float]  # when each processor of a GPU is free, ascending
Idle = list[tuple[float, Free]]  # until when processors of a GPU had nothing to do, and since when each of them


@dataclass(frozen=True, eq=False)
class Run:
    """When what happened, ns: `tasks[block, (GEMM 1, GEMM 2, sum), (first start, last end)]`; `sends` and `takes[block,
    way, (start, end)]` of links, zero for rows that stay; `end_ns[GPU]` when it has its tokens; `idle[GPU][gap, (start,
    end)]` when a processor had nothing to do, from the GPU's first task to the end of the run."""

    tasks: Array
    sends: Array
    takes: Array
    end_ns: Array
    idle: tuple[Array, ...]


def simulate(plan: Plan) -> Run:
    """The run of a plan: exact list scheduling on each GPU, first come first served on each link."""
    n_blocks, links = len(plan.lane), links_of(plan)
    source, gpu, slot = (column.tolist() for column in (plan.blocks.source, plan.blocks.gpu, plan.blocks.slot))
    gemm_ns, hold_ns, reduce_ns = plan.gemm_ns.tolist(), plan.hold_ns.tolist(), plan.reduce_ns.tolist()
    begin, stays = plan.begin_ns.tolist(), (plan.lane < 0).tolist()
    free: list[Free] = [[when] * plan.n_processors for when in begin]
    idle: list[Idle] = [[] for _ in begin]
    end_ns, unread = list(begin), [[True] * len(hold_ns) for _ in range(2)]
    tasks: list[list[Interval]] = [[(0.0, 0.0)] * n_blocks for _ in plan.n_tiles]
    events: list[tuple[float, int]] = []

    def at(when: float, stage: int, block: int) -> None:
        heappush(events, (when, stage * n_blocks + block))

    for block in range(n_blocks):  # in the order of sending
        home = source[block]
        if stays[block]:
            at(begin[home], GEMM1, block)
        else:
            at(links.send(block, THERE, home, begin[home]), TAKE, block)
    while events:
        now, code = heappop(events)
        stage, block = divmod(code, n_blocks)
        here, there = source[block], gpu[block]
        if stage == TAKE:
            at(links.take(block, THERE, there, now), GEMM1, block)
        elif stage in (GEMM1, GEMM2):
            g, where = int(stage == GEMM2), slot[block]
            reads = unread[g][where]
            unread[g][where] = False
            if reads and stage == GEMM1 and hold_ns[where]:
                hold(free[there], now, hold_ns[where], idle[there])
            tasks[g][block] = ran = run(free[there], now, plan.n_tiles[g], gemm_ns[where][g][reads], idle[there])
            at(ran[1], GEMM2 if stage == GEMM1 else REDUCE if stays[block] else SEND_BACK, block)
        elif stage == SEND_BACK:
            at(links.send(block, BACK, there, now), TAKE_BACK, block)
        elif stage == TAKE_BACK:
            at(links.take(block, BACK, here, now), REDUCE, block)
        else:
            tasks[2][block] = ran = run(free[here], now, plan.n_tiles[2], reduce_ns[block], idle[here])
            end_ns[here] = max(end_ns[here], ran[1])
    for gpu_idle, gpu_free in zip(idle, free, strict=True):
        gpu_idle.append((max(end_ns), gpu_free))
    return Run(np.stack(tasks, axis=1), *links.times(), np.array(end_ns), tuple(_gaps(one) for one in idle))


def _gaps(idle: Idle) -> Array:
    """What is said of idle processors as a table, `[gap, (start, end)]`."""
    until, since = zip(*idle, strict=True)
    return np.stack([np.concatenate(since), np.repeat(until, [len(one) for one in since])], axis=1)


def run(free: Free, ready: float, n_tasks: int, dur: float, idle: Idle) -> Interval:
    """Give equal tasks to the processors that are free first; when the first starts, when the last ends.

    All processors that are free before the first of them would be free again take one task each, in one step.
    """
    first, last = max(ready, free[0]), ready
    if free[0] < ready:
        idle.append((ready, free[: min(n_tasks, bisect_left(free, ready))]))
    while n_tasks:
        n = min(n_tasks, bisect_right(free, max(ready, free[0]) + dur))
        free[:n] = [(when if when > ready else ready) + dur for when in free[:n]]
        last = free[n - 1]
        free.sort()  # two sorted runs: one merge
        n_tasks -= n
    return first, last


def hold(free: Free, ready: float, dur: float, idle: Idle) -> None:
    """Hold all processors up, each as soon as it is free."""
    if free[0] < ready:
        idle.append((ready, free[: bisect_left(free, ready)]))
    free[:] = [max(ready, when) + dur for when in free]
