"""Expert-parallel layers on several GPUs: what bulk, chunked and fused schedules of one MoE layer cost.

`traffic` says who sends what to whom, `fabric` over which links, `costs` how long each GPU computes; `closed` and
`fused` make a timeline of it; `question`, `what_if` and `alternatives` ask. docs/schedule.md explains each formula.
"""

from .closed import bulk_timeline, chunked_timeline
from .costs import Layer
from .fabric import Fabric, Link, fabric_of
from .overheads import DEFAULTS, SCHEDULES, Overheads, overheads_of
from .timeline import LANES, PHASES, TRANSFERS, LayerTimeline, Span
from .traffic import Traffic, traffic_of

__all__ = [
    "DEFAULTS",
    "LANES",
    "PHASES",
    "SCHEDULES",
    "TRANSFERS",
    "Fabric",
    "Layer",
    "LayerTimeline",
    "Link",
    "Overheads",
    "Span",
    "Traffic",
    "bulk_timeline",
    "chunked_timeline",
    "fabric_of",
    "layer_timeline",
    "overheads_of",
    "traffic_of",
]


def layer_timeline(layer: Layer, schedule: str, overheads: Overheads | None = None) -> LayerTimeline:
    """One MoE layer under a schedule, one of SCHEDULES, with the overheads of an engine (null: the defaults).

    Raises InputError for an unknown schedule.
    """
    known = overheads_of(schedule) if overheads is None else overheads
    if schedule == "fused":
        from .fused import fused_timeline

        return fused_timeline(layer, known)
    return {"bulk": bulk_timeline, "chunked": chunked_timeline}[schedule](layer, known)
