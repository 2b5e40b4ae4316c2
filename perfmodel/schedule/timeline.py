"""What a schedule makes of a layer: who does what when, and what it adds up to."""

from dataclasses import dataclass
from typing import Any, NamedTuple

# What is done in an expert-parallel layer, in the order in which a token meets it. `dispatch` and `combine` move rows
# between GPUs; `permute` sorts tokens into rows, `reduce` is the weighted sum of a token's rows; `offload` is what
# experts outside device memory add to the grouped GEMMs.
PHASES = ("gate", "permute", "dispatch", "gemm1", "activation", "gemm2", "offload", "combine", "reduce")
TRANSFERS = ("dispatch", "combine")
LANES = ("compute", "send", "receive")


class Span(NamedTuple):
    """One piece of a timeline: on which GPU and lane (LANES), which of PHASES, which chunk or tile row of it."""

    gpu: int
    lane: str
    phase: str
    start_ns: float
    dur_ns: float
    piece: int = 0


class Shared(NamedTuple):
    """What a GPU does whose phases share its processors, ns: `work` by phase, processor time over processors; of the
    time in which its links move rows, `exposed_ns` by TRANSFERS in which processors had no task (the share of them that
    had none; of both at once half for each), and `hidden_ns` in which they had."""

    work: dict[str, float]
    exposed_ns: dict[str, float]
    hidden_ns: float


@dataclass(frozen=True)
class LayerTimeline:
    """One MoE layer on several GPUs under a schedule.

    `latency_ns` ends when the last GPU has all its tokens; `end_ns[gpu]` when each has its own. `phases` is the time
    each phase takes on its own on the GPU that takes longest, `launch` (what the host needs beyond what hides) with
    them: they sum to more than the latency where a schedule overlaps. `busy_ns[gpu]` is how long each computes.
    `bounds` are what no schedule can beat: the work of the busiest GPU at full rate by resource (`compute`, `memory`,
    `link`), and `host`, what the host needs for this schedule's launches; ns. `bottleneck` is the phase that,
    shortened, would shorten the latency most. `sent_bytes` is what all GPUs send, padding and all; `payload_bytes` what
    of it is not padding; `computed_padding_frac` the share of the rows that experts compute that is padding, to a
    capacity or to the fused kernel's blocks; `dropped_frac` the share of rows that no expert computes because they
    exceed its capacity. `shared[gpu]` is there where phases share processors, and says what spans do not.
    """

    schedule: str
    latency_ns: float
    end_ns: tuple[float, ...]
    phases: dict[str, float]
    busy_ns: tuple[float, ...]
    bounds: dict[str, float]
    bottleneck: str
    n_launches: int
    sent_bytes: float
    payload_bytes: float
    dropped_frac: float = 0.0
    computed_padding_frac: float = 0.0
    spans: tuple[Span, ...] = ()
    shared: tuple[Shared, ...] = ()

    @property
    def padding_frac(self) -> float:
        """The share of what is sent that is padding."""
        return 1 - self.payload_bytes / self.sent_bytes if self.sent_bytes else 0.0

    @property
    def bound_ns(self) -> float:
        """The largest of the bounds: what this schedule cannot be faster than."""
        return max(self.bounds.values())

    @property
    def wait_frac(self) -> float:
        """How much of the layer the mean GPU waits for the one that computes longest."""
        return (max(self.busy_ns) - sum(self.busy_ns) / len(self.busy_ns)) / self.latency_ns

    @property
    def compute_busy_frac(self) -> float:
        """How much of the layer the GPUs compute, mean over GPUs."""
        return sum(self.busy_ns) / len(self.busy_ns) / self.latency_ns

    def to_json(self) -> dict[str, Any]:
        """The timeline as plain values, without its spans."""
        return {
            "schedule": self.schedule,
            "latency_ns": self.latency_ns,
            "end_ns": list(self.end_ns),
            "phases": {f"{name}_ns": value for name, value in self.phases.items()},
            "compute_busy_frac": self.compute_busy_frac,
            "wait_frac": self.wait_frac,
            "bounds": {f"{name}_ns": value for name, value in self.bounds.items()},
            "bottleneck": self.bottleneck,
            "n_launches": self.n_launches,
            "sent_bytes": self.sent_bytes,
            "payload_bytes": self.payload_bytes,
            "padding_frac": self.padding_frac,
            "dropped_frac": self.dropped_frac,
            "computed_padding_frac": self.computed_padding_frac,
        }
