"""What a picture of a layer shows: who does what when, under a schedule or in a step that was measured."""

from dataclasses import dataclass

import polars as pl

from perfmodel import ep_steps, text
from perfmodel.ep_capture import COMMUNICATION, REGROUP, EpCapture, EpWorkload

from .captured import Beside
from .timeline import LANES, PHASES, LayerTimeline, Span

MOVING = "communication"  # the lane of a rank's collectives: from the call until it has all, waiting included
DRAWN_LANES = (*LANES, MOVING)
DRAWN_PHASES = (*PHASES, REGROUP, "counts")


@dataclass(frozen=True)
class Panel:
    """One panel: its `title`, `latency_ns`, how many GPUs or ranks take part, and their spans (lanes of DRAWN_LANES,
    phases of DRAWN_PHASES)."""

    title: str
    latency_ns: float
    n_gpus: int
    spans: tuple[Span, ...]

    def busy_ns(self, gpu: int) -> float:
        """The time of a GPU's spans that compute, together."""
        return sum(span.dur_ns for span in self.spans if span.gpu == gpu and span.lane == "compute")


def scheduled(one: LayerTimeline) -> Panel:
    """A layer under a schedule."""
    return Panel(f"{one.schedule}, {text.ns(one.latency_ns)}", one.latency_ns, len(one.end_ns), one.spans)


def measured(capture: EpCapture, workload: EpWorkload) -> Panel:
    """The step of a workload whose latency is closest to the median of all, the first of several."""
    of_it = pl.col("workload") == workload.workload
    steps = ep_steps.step_latencies(capture).filter(of_it)
    median_ns = steps["latency_ns"].median()
    step, latency_ns = steps.sort((pl.col("latency_ns") - median_ns).abs(), "step").select("step", "latency_ns").row(0)
    is_here = of_it & (pl.col("step") == step)
    from_ns = capture.ends.filter(is_here)["start_ns"].min()
    rows = capture.steps.filter(is_here).with_columns(
        pl.col("phase").cast(pl.String),
        pl.col("start_ns") - from_ns,
        lane=pl.when(pl.col("phase").is_in(list(COMMUNICATION))).then(pl.lit(MOVING)).otherwise(pl.lit("compute")),
    )
    spans = tuple(Span(*row) for row in rows.select("rank", "lane", "phase", "start_ns", "dur_ns", "chunk").iter_rows())
    ranks = text.counted(capture.n_ranks, "rank")
    title = f"measured on {ranks}, {text.ns(latency_ns)}: step {step}, the one closest to the median of {steps.height}"
    return Panel(title, float(latency_ns), capture.n_ranks, spans)


def predicted(beside: Beside, workload: EpWorkload) -> Panel:
    """What the model says of the same: its schedule. What engines and shared cores add has no place in it; the title
    says how much that is."""
    found = beside.predicted[workload.workload]
    own = found.timeline
    more = {"counts": found.counts_ns, "regroup": float(found.regroup_ns.max()), "sharing cores": found.sharing_ns}
    said = ", ".join(f"{name} {text.ns(ns)}" for name, ns in more.items() if ns)
    ranks = text.counted(len(own.end_ns), "rank")
    title = f"predicted on {ranks}, {text.ns(found.latency_ns)}: drawn {text.ns(own.latency_ns)}"
    title += f"; {said}" if said else ""
    spans = tuple(
        one._replace(lane=MOVING) if one.lane == "send" else one for one in own.spans if one.lane != "receive"
    )
    return Panel(title, own.latency_ns, len(own.end_ns), spans)
