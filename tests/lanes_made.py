"""Executors for tests: one that runs steps in any order that lanes and waits allow, and a made-up CUDA of queues."""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import numpy as np

from collectors.lanes import COMPUTE, HOST, SIDE_LANES, Step

Node = tuple[int, int]  # call, step


def orders(calls: Sequence[Sequence[Step]]) -> dict[Node, set[Node]]:
    """What must come before each step of several calls in a row, by the rules of lanes.py and nothing else.

    A lane keeps its order. Compute of a call comes after everything of earlier calls (the join), and so do side lanes
    (they wait for compute at entry). The host issues: what is listed after a host step comes after it.
    """
    before: dict[Node, set[Node]] = {}
    last_host: Node | None = None
    earlier: set[Node] = set()
    last_of_lane: dict[str, Node] = {}
    for c, steps in enumerate(calls):
        names = {step.name: (c, s) for s, step in enumerate(steps)}
        for s, step in enumerate(steps):
            needs = {names[dep] for dep in step.after}
            if step.lane in last_of_lane:
                needs.add(last_of_lane[step.lane])
            if last_host is not None:
                needs.add(last_host)
            if step.lane == COMPUTE or step.lane in SIDE_LANES:
                needs |= earlier
            before[c, s] = needs
            last_of_lane[step.lane] = (c, s)
            if step.lane == HOST:
                last_host = (c, s)
        earlier |= {(c, s) for s in range(len(steps))}
    return before


def run_adversarially(calls: Sequence[Sequence[Step]], pick: Callable[[list[Step]], int]) -> None:
    """Run calls in a row, each time the one of the allowed steps that `pick` says."""
    before = orders(calls)
    done: set[Node] = set()
    while len(done) < len(before):
        ready = sorted(node for node, needs in before.items() if node not in done and needs <= done)
        node = ready[pick([calls[c][s] for c, s in ready])]
        calls[node[0]][node[1]].run()
        done.add(node)


def pickers(n_random: int = 3) -> list[Callable[[list[Step]], int]]:
    """Copies as early as allowed, compute as early as allowed, and at random."""

    def prefer(lane: str) -> Callable[[list[Step]], int]:
        return lambda ready: min(range(len(ready)), key=lambda i: (ready[i].lane != lane, -i))

    def at_random(seed: int) -> Callable[[list[Step]], int]:
        rng = np.random.default_rng(seed)
        return lambda ready: int(rng.integers(len(ready)))

    return [prefer(lane) for lane in (*SIDE_LANES, COMPUTE, HOST)] + [at_random(seed) for seed in range(n_random)]


class MadeCuda:
    """Streams as queues of work that goes on when someone waits, in an order drawn at random."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.queues: dict[str, deque] = {}
        self.current = "main"
        made = self

        class Stream:
            def __init__(self, name: str | None = None) -> None:
                self.name = name or f"stream {len(made.queues)}"
                made.queues[self.name] = deque()

            def wait_event(self, event: "Event") -> None:
                made.queues[self.name].append(("wait", event.token))

        class Event:
            def __init__(self) -> None:
                self.token: list[bool] = [True]  # an event that was never recorded holds nobody up

            def record(self, stream: Stream) -> None:
                self.token = [False]
                made.queues[stream.name].append(("record", self.token))

            def synchronize(self) -> None:
                while not self.token[0]:
                    made.advance()

        self.stream_type, self.event_type = Stream, Event
        self.main = Stream("main")
        self.streams = {"main": self.main}

    def new_stream(self, name: str) -> object:
        """A stream of that name."""
        self.streams[name] = self.stream_type(name)
        return self.streams[name]

    @contextmanager
    def stream(self, stream):
        """torch.cuda.stream."""
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def enqueue(self, run: Callable[[], None]) -> None:
        """A kernel or a copy: work for later on the current stream."""
        self.queues[self.current].append(("run", run))

    def advance(self) -> None:
        """One piece of work at the head of some stream that nothing holds up."""
        able = [q for q in self.queues.values() if q and (q[0][0] != "wait" or q[0][1][0])]
        assert able, "the streams wait for each other for ever"
        kind, what = able[int(self.rng.integers(len(able)))].popleft()
        if kind == "run":
            what()
        elif kind == "record":
            what[0] = True

    def drain(self) -> None:
        """torch.cuda.synchronize."""
        while any(self.queues.values()):
            self.advance()
