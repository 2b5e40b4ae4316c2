"""Experts over several GPUs: how long each takes (`profiles`), and what policies make of a routing (`compare`).

The policies themselves are in `perfmodel.placement`; docs/balance.md has the definitions.
"""

from .compare import POLICIES, Comparison, Outcome, Slots, compare, steps_of
from .files import read_map, write_map
from .profiles import device_ns, layer_ns_by_rows, observed_staircase, predicted_staircase, predicted_times

__all__ = [
    "POLICIES",
    "Comparison",
    "Outcome",
    "Slots",
    "compare",
    "device_ns",
    "layer_ns_by_rows",
    "observed_staircase",
    "predicted_staircase",
    "predicted_times",
    "read_map",
    "steps_of",
    "write_map",
]
