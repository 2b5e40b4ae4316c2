"""A call as steps on lanes: what computes, what copies in and out, what the host does, and which step waits for which.

Steps of a lane run in the order given; `after` names steps of other lanes that must have finished. One call ends before
the next begins: side lanes first wait for where the compute lane was at entry, and at the end it waits for all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

COMPUTE, COPY_IN, COPY_OUT, HOST = "compute", "copy_in", "copy_out", "host"
LANES = (COMPUTE, COPY_IN, COPY_OUT, HOST)
SIDE_LANES = (COPY_IN, COPY_OUT)

Run = Callable[[], None]


@dataclass(frozen=True)
class Step:
    """One piece of a call; `after` are names of earlier steps whose results it needs or whose buffers it overwrites."""

    name: str
    lane: str
    after: tuple[str, ...]
    run: Run


def checked(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps, if names are unique, lanes known, and each waits only for earlier ones; raises ValueError if not."""
    seen: set[str] = set()
    for step in steps:
        if step.name in seen or step.lane not in LANES:
            raise ValueError(f"step {step.name!r} on lane {step.lane!r}: a name twice, or no such lane")
        if unknown := set(step.after) - seen:
            raise ValueError(f"step {step.name!r} waits for {sorted(unknown)}, which no earlier step is called")
        seen.add(step.name)
    return tuple(steps)


def in_order(steps: Sequence[Step]) -> Run:
    """A call that runs the steps one after another: the executor of machines without CUDA."""
    runs = tuple(step.run for step in checked(steps))

    def call() -> None:
        for run in runs:
            run()

    return call


def on_cuda(steps: Sequence[Step], streams: Mapping[str, torch.cuda.Stream]) -> Run:
    """A call on CUDA: the current stream computes, `streams` of the side lanes copy, events join them.

    The host lane waits for the events of what it needs, so all that can run beside it must be listed before it.
    """
    steps = checked(steps)
    lane_of = {step.name: step.lane for step in steps}
    last = {step.lane: step.name for step in steps}
    side = [(streams[lane], last[lane]) for lane in SIDE_LANES if lane in last]
    # Order within a stream, and whatever the host has finished before it goes on, need no event.
    waits = {s.name: tuple(d for d in s.after if lane_of[d] not in (s.lane, HOST)) for s in steps}
    events = {name: torch.cuda.Event() for name in {d for found in waits.values() for d in found}}
    events |= {name: torch.cuda.Event() for _, name in side if name not in events}
    entry = torch.cuda.Event()
    plan = tuple(
        (step.lane, step.run, tuple(events[d] for d in waits[step.name]), events.get(step.name)) for step in steps
    )

    def call() -> None:
        compute = torch.cuda.current_stream()
        if side:
            entry.record(compute)
            for stream, _ in side:
                stream.wait_event(entry)
        for lane, run, awaited, done in plan:
            if lane == HOST:
                for event in awaited:
                    event.synchronize()
                run()
                continue
            stream = compute if lane == COMPUTE else streams[lane]
            for event in awaited:
                stream.wait_event(event)
            if lane == COMPUTE:
                run()
            else:
                with torch.cuda.stream(stream):
                    run()
            if done is not None:
                done.record(stream)
        for _, name in side:
            compute.wait_event(events[name])

    return call
