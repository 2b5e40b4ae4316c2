"""What experts cost that live outside device memory: access modes, their constants, and fitting these."""

from .constants import PRIORS, OffloadConstants
from .modes import ACCESS_MODES, Device, Mask, link_rate, offload_parts, rate_keys

__all__ = [
    "ACCESS_MODES",
    "PRIORS",
    "Device",
    "Mask",
    "OffloadConstants",
    "link_rate",
    "offload_parts",
    "rate_keys",
]
