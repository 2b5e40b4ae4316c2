"""Links of the fused kernel as queues: what a GPU sends, and what it receives, goes one block after another."""

from dataclasses import dataclass

import numpy as np

from perfmodel.physics import Array

from .tiles import Plan

Interval = tuple[float, float]
THERE, BACK = range(2)  # ways of a block: to its expert's GPU, and back


@dataclass(frozen=True)
class Links:
    """Each GPU's ways out and in, when they are free next, `[GPU][lane]`, and when blocks took them, `[way][block]`.

    A block occupies the sender's way out and, alpha later or when it is free, the receiver's way in, for as long as its
    bytes take each: a switch passes on what arrives and holds what cannot be taken yet. Every queue is first come first
    served, of what goes there and what comes back.
    """

    lane: list[int]
    wire_ns: list[float]
    alpha_ns: tuple[float, float]
    out_free: list[list[float]]
    in_free: list[list[float]]
    sends: tuple[list[Interval], list[Interval]]
    takes: tuple[list[Interval], list[Interval]]

    def send(self, block: int, way: int, gpu: int, ready: float) -> float:
        """A GPU sends a block that is ready: when its first byte reaches the other."""
        lane = self.lane[block]
        start = max(ready, self.out_free[gpu][lane])
        self.out_free[gpu][lane] = end = start + self.wire_ns[block]
        self.sends[way][block] = (start, end)
        return start + self.alpha_ns[lane]

    def take(self, block: int, way: int, gpu: int, reached: float) -> float:
        """A GPU receives a block whose first byte has reached it: when it has all of it."""
        lane = self.lane[block]
        start = max(reached, self.in_free[gpu][lane])
        self.in_free[gpu][lane] = end = start + self.wire_ns[block]
        self.takes[way][block] = (start, end)
        return end

    def times(self) -> tuple[Array, Array]:
        """When blocks were sent and received, `[block, way, (start, end)]`; zero where they stayed."""
        return np.stack(self.sends, axis=1), np.stack(self.takes, axis=1)


def links_of(plan: Plan) -> Links:
    """The links of a plan, all free."""
    n_gpus, n_blocks = len(plan.begin_ns), len(plan.lane)
    return Links(
        lane=plan.lane.tolist(),
        wire_ns=plan.wire_ns.tolist(),
        alpha_ns=plan.alpha_ns,
        out_free=[[0.0, 0.0] for _ in range(n_gpus)],
        in_free=[[0.0, 0.0] for _ in range(n_gpus)],
        sends=([(0.0, 0.0)] * n_blocks, [(0.0, 0.0)] * n_blocks),
        takes=([(0.0, 0.0)] * n_blocks, [(0.0, 0.0)] * n_blocks),
    )
