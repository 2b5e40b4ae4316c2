"""How tokens spread over experts: routing patterns with stated definitions, routing files, statistics of skew.

A routing is named by a pattern (`patterns`) or a file (`files`); `batches` makes the counts of a batch of it, `steps`
those of several steps and layers, `published` those of a public collection of measurements, and `statistics` says how
skewed counts are. A file becomes a `recording`, by way of `torch_files`, `json_files` and `tables` for what is written
in it, and `arrays`, `selections`, `engines` and `dumps` for what that means. docs/routing.md has the definitions.
"""

from .batches import (
    MAX_DRAWN,
    N_DRAWS,
    Routing,
    drawn_counts,
    expected_counts,
    routing,
    sample_choices,
)
from .files import Counts, layer_shares, read_recording, read_shares, routing_keys, write_counts
from .patterns import (
    PATTERNS,
    Shares,
    coverage_shares,
    is_pattern,
    link_skew_shares,
    mmlu_like_shares,
    one_hot_shares,
    pareto_name,
    pareto_shares,
    pattern_shares,
    pattern_usages,
    power_law_shares,
    uniform_shares,
)
from .published import PUBLISHED, is_published, published_counts
from .recording import Loads, Recording
from .statistics import coverage_curve, experts_for_coverage, max_over_mean
from .steps import FAMILIES, family_usages, synthetic_counts, synthetic_steps

__all__ = [
    "FAMILIES",
    "MAX_DRAWN",
    "N_DRAWS",
    "PATTERNS",
    "PUBLISHED",
    "Counts",
    "Loads",
    "Recording",
    "Routing",
    "Shares",
    "coverage_curve",
    "coverage_shares",
    "drawn_counts",
    "expected_counts",
    "experts_for_coverage",
    "family_usages",
    "is_pattern",
    "is_published",
    "layer_shares",
    "link_skew_shares",
    "max_over_mean",
    "mmlu_like_shares",
    "one_hot_shares",
    "pareto_name",
    "pareto_shares",
    "pattern_shares",
    "pattern_usages",
    "power_law_shares",
    "published_counts",
    "read_recording",
    "read_shares",
    "routing",
    "routing_keys",
    "sample_choices",
    "synthetic_counts",
    "synthetic_steps",
    "uniform_shares",
    "write_counts",
]
