"""What experts cost that live outside device memory: access modes, their constants, and fitting these.

`constants` are what is assumed or fitted of each mode, `device` the machine as modes see it, `modes` their latency by
part, `overlap`, `beside` and `paged` the compositions that need more room; `table` evaluates many placements of one
layer. `fit` learns constants from observations and gives what `fitted` describes; `study` and `study_page` make the
page on the GH200 study, `kt_study` and `kt_page` that on ktransformers. These need models and predictions and are
imported by name.
"""

from .beside import DOMAINS, beside_parts
from .constants import PRIORS, OffloadConstants
from .device import ACCESS_MODES, LAYOUTS, SPREADS, Device, Host, Mask, link_rate, rate_keys, usable_modes
from .modes import offload_parts
from .table import CostTable, cost_table

__all__ = [
    "ACCESS_MODES",
    "DOMAINS",
    "LAYOUTS",
    "PRIORS",
    "SPREADS",
    "CostTable",
    "Device",
    "Host",
    "Mask",
    "OffloadConstants",
    "beside_parts",
    "cost_table",
    "link_rate",
    "offload_parts",
    "rate_keys",
    "usable_modes",
]
