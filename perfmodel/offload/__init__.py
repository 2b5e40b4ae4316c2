"""What experts cost that live outside device memory: access modes, their constants, and fitting these.

`constants` are what is assumed or fitted of each mode, `device` the machine as modes see it, `modes` their latency by
part; `in_place`, `overlap`, `beside` and `paged` are the compositions that need more room. `table` evaluates many
placements of the same layers. `fit` learns constants from observations and gives what `fitted` describes; `study` and
`study_page` make the page on the GH200 study, `kt_study` and `kt_page` that on ktransformers. These need models and
predictions and are imported by name.
"""

from .beside import beside_parts
from .constants import PRIORS, OffloadConstants
from .device import ACCESS_MODES, LAYOUTS, SPREADS, Device, Host, Mask, link_rate, rate_keys, usable_modes
from .modes import MIXABLE, TIER_OF, modes_of, offload_parts, placement_parts
from .table import placement_costs

__all__ = [
    "ACCESS_MODES",
    "LAYOUTS",
    "MIXABLE",
    "PRIORS",
    "SPREADS",
    "TIER_OF",
    "Device",
    "Host",
    "Mask",
    "OffloadConstants",
    "beside_parts",
    "link_rate",
    "modes_of",
    "offload_parts",
    "placement_costs",
    "placement_parts",
    "rate_keys",
    "usable_modes",
]
