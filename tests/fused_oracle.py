"""The fused kernel simulated moment by moment, task by task, with plain lists: what the fast simulation is held to."""

from collections import deque

from perfmodel.schedule.events import GEMM1, GEMM2, REDUCE, SEND_BACK, TAKE, TAKE_BACK
from perfmodel.schedule.tiles import Plan

AFTER = {GEMM1: GEMM2, GEMM2: SEND_BACK, TAKE: GEMM1, TAKE_BACK: REDUCE}
HOLD = -1


class Gpu:
    """Processors, and tasks that wait for them in the order in which they became ready."""

    def __init__(self, n: int, begin: float) -> None:
        self.n = n
        self.waiting: deque[tuple[int, int, int, float]] = deque()  # number, stage, block, duration
        self.owed: list[deque[tuple[int, float]]] = [deque() for _ in range(n)]  # holds of each processor
        self.busy: list[tuple[float, int, int] | None] = [(begin, HOLD, 0)] * n
        self.worked = 0.0

    def start(self, now: float, log: dict[tuple[int, int], list[float]]) -> None:
        for i in range(self.n):
            if self.busy[i] is not None:
                continue
            if self.owed[i] and not (self.waiting and self.waiting[0][0] < self.owed[i][0][0]):
                _, dur = self.owed[i].popleft()
                self.busy[i] = (now + dur, HOLD, 0)
            elif self.waiting:
                _, stage, block, dur = self.waiting.popleft()
                self.busy[i] = (now + dur, stage, block)
                log.setdefault((stage, block), []).append(now)
            else:
                continue
            self.worked += dur


class Oracle:
    """One run; `starts[stage, block]` of each task, `ends[stage, block]` of the last, `wire[stage, block]` of links."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.gpus = [Gpu(plan.n_processors, float(begin)) for begin in plan.begin_ns]
        self.items: list[tuple[float, int, int]] = []  # what becomes ready: when, which stage of which block
        self.starts: dict[tuple[int, int], list[float]] = {}
        self.ends: dict[tuple[int, int], float] = {}
        self.left: dict[tuple[int, int], int] = {}
        self.sends: dict[tuple[int, int], tuple[float, float]] = {}
        self.takes: dict[tuple[int, int], tuple[float, float]] = {}
        self.link: dict[tuple[str, int, int], float] = {}
        self.seen: set[tuple[int, int]] = set()
        self.end_ns = [float(begin) for begin in plan.begin_ns]
        self.number = 0
        for block, home in enumerate(plan.blocks.source):
            begin = float(plan.begin_ns[home])
            if plan.lane[block] < 0:
                self.items.append((begin, GEMM1, block))
            else:
                self.send(block, 0, int(home), begin, TAKE)
        while self.items or any(busy for gpu in self.gpus for busy in gpu.busy):
            moments = [item[0] for item in self.items]
            moments += [busy[0] for gpu in self.gpus for busy in gpu.busy if busy is not None]
            self.step(min(moments))

    def step(self, now: float) -> None:
        for gpu in self.gpus:
            for i, busy in enumerate(gpu.busy):
                if busy is not None and busy[0] == now:
                    gpu.busy[i] = None
                    if busy[1] != HOLD:
                        self.finished(now, busy[1], busy[2])
        while ready := sorted(item for item in self.items if item[0] == now):
            self.items.remove(ready[0])
            self.happens(*ready[0])
        for gpu in self.gpus:
            gpu.start(now, self.starts)

    def finished(self, now: float, stage: int, block: int) -> None:
        self.left[stage, block] -= 1
        if self.left[stage, block]:
            return
        self.ends[stage, block] = now
        if stage == REDUCE:
            home = self.plan.blocks.source[block]
            self.end_ns[home] = max(self.end_ns[home], now)
        else:
            stays = stage == GEMM2 and self.plan.lane[block] < 0
            self.items.append((now, REDUCE if stays else AFTER[stage], block))

    def happens(self, now: float, stage: int, block: int) -> None:
        plan, home = self.plan, int(self.plan.blocks.source[block])
        gpu, slot = int(plan.blocks.gpu[block]), int(plan.blocks.slot[block])
        if stage in (TAKE, TAKE_BACK):
            at = gpu if stage == TAKE else home
            self.takes[int(stage == TAKE_BACK), block] = taken = self.occupy("in", at, block, now)
            self.items.append((taken[1], AFTER[stage], block))
        elif stage == SEND_BACK:
            self.send(block, 1, gpu, now, TAKE_BACK)
        elif stage == REDUCE:
            self.queue(home, stage, block, plan.n_tiles[2], float(plan.reduce_ns[block]))
        else:
            g = int(stage == GEMM2)
            is_first = (g, slot) not in self.seen
            self.seen.add((g, slot))
            if is_first and g == 0 and plan.hold_ns[slot] > 0:
                for owed in self.gpus[gpu].owed:
                    owed.append((self.number, float(plan.hold_ns[slot])))
            self.queue(gpu, stage, block, plan.n_tiles[g], float(plan.gemm_ns[slot, g, int(is_first)]))

    def queue(self, gpu: int, stage: int, block: int, n_tasks: int, dur: float) -> None:
        self.left[stage, block] = n_tasks
        for _ in range(n_tasks):
            self.gpus[gpu].waiting.append((self.number, stage, block, dur))
            self.number += 1

    def send(self, block: int, way: int, gpu: int, ready: float, then: int) -> None:
        self.sends[way, block] = sent = self.occupy("out", gpu, block, ready)
        self.items.append((sent[0] + self.plan.alpha_ns[self.plan.lane[block]], then, block))

    def occupy(self, side: str, gpu: int, block: int, ready: float) -> tuple[float, float]:
        lane = int(self.plan.lane[block])
        start = max(ready, self.link.get((side, gpu, lane), 0.0))
        self.link[side, gpu, lane] = end = start + float(self.plan.wire_ns[block])
        return start, end
