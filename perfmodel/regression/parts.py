"""What a change of time consists of: parts of the latency for captures, operators and classes for traces."""

from dataclasses import dataclass

# The parts that a slowdown may lie in. `copy exposure` and `communication` are what hides under no compute, `host` what
# the CPU computes of offloaded experts.
PARTS = ("launch", "compute", "memory", "link", "copy exposure", "communication", "host")


@dataclass(frozen=True)
class PartChange:
    """How much longer one part takes on the candidate, over all judged workloads, and what that adds to their time.

    `share_frac` is the part's share of the baseline's time, `change_frac` what its change adds to the whole (of the
    baseline's time; the sum over parts is the change of the whole, as far as it is explained), `factor` how many times
    longer the part takes, with its 90 % interval where one is known, null where the baseline has nothing of the part.
    `evidence` says in words what it rests on, such as the calibrated rates that moved.
    """

    part: str
    share_frac: float
    change_frac: float
    factor: float | None
    factor_low: float | None
    factor_high: float | None
    evidence: str


@dataclass(frozen=True)
class Detail:
    """An operator, a kernel class or a launch metric of traces of both sides, a step's worth of it; null: not there.

    `kind` is `operator`, `class` or `metric`; `change_frac` its change as a part of the baseline's step, null for what
    is no time of the step.
    """

    kind: str
    name: str
    baseline: float | None
    candidate: float | None
    ratio: float | None
    change_frac: float | None
