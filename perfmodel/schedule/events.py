"""The fused kernel run event by event: row blocks travel over links and become tasks of processors (decision 0031).

A block is sent, becomes the tasks of its first GEMM, when all these are done those of its second, is sent back, and
becomes the tasks of its weighted sum. A task that is ready goes to a processor at once if any is free, else to the
first that becomes free, in the order in which tasks became ready.
"""

from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

from perfmodel.physics import Array

from .network import BACK, THERE, Interval, links_of
from .tiles import Plan

# Stages of a block. Of what happens at one moment, what is nearer to the end comes first, then the lower block.
REDUCE, TAKE_BACK, SEND_BACK, GEMM2, TAKE, GEMM1 = range(6)
Free = list[tuple[float, int]]  # a heap: so many processors are free from this moment on


@dataclass(frozen=True, eq=False)
class Run:
    """When what happened, ns: `tasks[block, (GEMM 1, GEMM 2, sum), (first start, last end)]`; `sends` and `takes[block,
    way, (start, end)]` of links, zero for rows that stay; `end_ns[GPU]` when it has its tokens."""

    tasks: Array
    sends: Array
    takes: Array
    end_ns: Array


def simulate(plan: Plan) -> Run:
    """The run of a plan: exact list scheduling on each GPU, first come first served on each link."""
    n_blocks, links = len(plan.lane), links_of(plan)
    source, gpu, slot = (column.tolist() for column in (plan.blocks.source, plan.blocks.gpu, plan.blocks.slot))
    gemm_ns, hold_ns, reduce_ns = plan.gemm_ns.tolist(), plan.hold_ns.tolist(), plan.reduce_ns.tolist()
    begin, stays = plan.begin_ns.tolist(), (plan.lane < 0).tolist()
    free: list[Free] = [[(when, plan.n_processors)] for when in begin]
    is_first, reads, end_ns = [True] * len(hold_ns), [0] * n_blocks, list(begin)
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
        elif stage == GEMM1:
            where = slot[block]
            if is_first[where]:
                is_first[where], reads[block] = False, 1
                if hold_ns[where]:
                    hold(free[there], now, hold_ns[where])
            tasks[0][block] = ran = run(free[there], now, plan.n_tiles[0], gemm_ns[where][0][reads[block]])
            at(ran[1], GEMM2, block)
        elif stage == GEMM2:
            tasks[1][block] = ran = run(free[there], now, plan.n_tiles[1], gemm_ns[slot[block]][1][reads[block]])
            at(ran[1], REDUCE if stays[block] else SEND_BACK, block)
        elif stage == SEND_BACK:
            at(links.send(block, BACK, there, now), TAKE_BACK, block)
        elif stage == TAKE_BACK:
            at(links.take(block, BACK, here, now), REDUCE, block)
        else:
            tasks[2][block] = ran = run(free[here], now, plan.n_tiles[2], reduce_ns[block])
            end_ns[here] = max(end_ns[here], ran[1])
    return Run(np.stack(tasks, axis=1), *links.times(), np.array(end_ns))


def run(free: Free, ready: float, n_tasks: int, dur: float) -> Interval:
    """Give equal tasks to the processors that are free first; when the first starts, when the last ends.

    Processors that are free from the same moment on take their tasks in one step.
    """
    first = begin = max(ready, free[0][0])
    while n_tasks:
        when, n = free[0]
        begin = max(ready, when)
        if n <= n_tasks:
            heapreplace(free, (begin + dur, n))
            n_tasks -= n
        else:
            free[0] = (when, n - n_tasks)
            heappush(free, (begin + dur, n_tasks))
            n_tasks = 0
    return first, begin + dur


def hold(free: Free, ready: float, dur: float) -> None:
    """Hold all processors up, each as soon as it is free."""
    free[:] = [(max(ready, when) + dur, n) for when, n in free]
    heapify(free)
