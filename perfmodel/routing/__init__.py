"""How tokens spread over experts: routing patterns with stated definitions, routing files, statistics of skew.

A routing is named by a pattern (`patterns`) or a file (`files`); `batches` makes the counts of a batch of it, `steps`
those of several steps and layers, `published` those of a public collection of measurements. A file becomes a
`recording`, by way of `torch_files`, `json_files` and `tables` for what is written in it, and `arrays`, `selections`,
`engines` and `dumps` for what that means. `statistics`, `sampling` and `temporal` say how skewed a recording is, how
sure that is and whether it lasts, and `verdict` whether it is worth anything; `summary` has all of that.
docs/routing.md has the definitions.
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
from .files import SHIPPED, Counts, layer_shares, read_recording, read_shares, routing_keys, write_counts
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
from .sampling import SamplingError, held_out_curves, is_counted, sampling_error
from .statistics import (
    COVERED_FRACS,
    Comparison,
    LayerStatistics,
    compare,
    coverage_curve,
    covering_fracs,
    expected_active,
    experts_for_coverage,
    layer_statistics,
    max_over_mean,
    served_curves,
)
from .steps import FAMILIES, family_usages, is_drawn, synthetic_counts, synthetic_recording, synthetic_steps
from .summary import DECODE_TOKENS, RoutingSummary, selected, summarise
from .temporal import (
    CUTOFFS,
    HOT_FRAC,
    WINDOWS,
    Cutoffs,
    ExpertsInTime,
    HotSetOverlap,
    experts_in_time,
    hot_set_overlap,
    used_experts,
)
from .verdict import RESIDENT_FRAC, DecodeGain, ResidentGain, Verdict, judge

__all__ = [
    "COVERED_FRACS",
    "CUTOFFS",
    "DECODE_TOKENS",
    "FAMILIES",
    "HOT_FRAC",
    "MAX_DRAWN",
    "N_DRAWS",
    "PATTERNS",
    "PUBLISHED",
    "SHIPPED",
    "RESIDENT_FRAC",
    "WINDOWS",
    "Comparison",
    "Counts",
    "Cutoffs",
    "DecodeGain",
    "ExpertsInTime",
    "HotSetOverlap",
    "LayerStatistics",
    "Loads",
    "Recording",
    "ResidentGain",
    "Routing",
    "RoutingSummary",
    "SamplingError",
    "Shares",
    "Verdict",
    "compare",
    "coverage_curve",
    "coverage_shares",
    "covering_fracs",
    "drawn_counts",
    "expected_active",
    "expected_counts",
    "experts_for_coverage",
    "experts_in_time",
    "family_usages",
    "held_out_curves",
    "hot_set_overlap",
    "is_counted",
    "is_drawn",
    "is_pattern",
    "is_published",
    "judge",
    "layer_shares",
    "layer_statistics",
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
    "sampling_error",
    "selected",
    "served_curves",
    "summarise",
    "synthetic_counts",
    "synthetic_recording",
    "synthetic_steps",
    "uniform_shares",
    "used_experts",
    "write_counts",
]
