"""What a plan must know of a machine: from its capture so far, or assumed for a plan that is only printed."""

from collections.abc import Mapping, Sequence
from typing import Any

from . import machine
from .plan import DTYPES
from .studies import Facts

# Of the machine's, or the GPU's, memory: for weights, and for weights and activations together.
POOL_FRAC, MEMORY_FRAC = {"cpu": 0.25, "cuda": 0.6}, {"cpu": 0.4, "cuda": 0.85}
PINNED_FRAC, MOST_PINNED_BYTES = 0.25, 1 << 33  # pinned memory is taken from everybody else on the machine
FALLBACK_BYTES, FALLBACK_CACHE_BYTES = 4 << 30, {"cpu": 1 << 25, "cuda": 50 << 20}
# For guessing durations before anything is measured: orders of magnitude, never results.
ASSUMED: dict[str, dict[str, float | None]] = {
    "cpu": {"flops_per_s": 1e11, "bytes_per_s": 2e10, "link_bytes_per_s": None},
    "cuda": {"flops_per_s": 5e14, "bytes_per_s": 3e12, "link_bytes_per_s": 5e10},
}
ASSUMED_GPU_BYTES = 80e9
HOST_FLOPS_PER_S, HOST_BYTES_PER_S = 1e12, 1e11  # of a server's CPU beside a GPU


def _value(calibration: Mapping[str, Any], *names: str) -> float | None:
    return next((float(calibration[name]["value"]) for name in names if name in calibration), None)


def facts_of(capture: Mapping[str, Any]) -> Facts:
    """The facts a capture has found of its machine; what it has not measured is assumed."""
    settings, found, calibration = capture["settings"], capture["machine"], capture["calibration"]
    device, dtypes = settings["device"], tuple(DTYPES[name] for name in settings["dtypes"])
    can = {way for way, reason in (capture["capabilities"] or {}).items() if reason is None}
    host_bytes = found.get("memory_bytes") or FALLBACK_BYTES
    device_bytes = found.get("gpu_memory_bytes") if device == "cuda" else host_bytes
    cache_bytes = found.get("gpu_l2_bytes") if device == "cuda" else machine.last_level_cache_bytes()
    assumed = ASSUMED[device]
    return Facts(
        device=device,
        dtypes=tuple(name for name in dtypes if name != "fp8" or "fp8" in can),
        flops_per_s=_value(calibration, f"{dtypes[0]}_gemm_flops_per_s") or float(assumed["flops_per_s"] or 0),
        bytes_per_s=_value(calibration, "memory_stream_bytes_per_s") or float(assumed["bytes_per_s"] or 0),
        link_bytes_per_s=_value(calibration, "link_kernel_read_bytes_per_s", "link_h2d_copy_bytes_per_s")
        or assumed["link_bytes_per_s"],
        cache_bytes=float(cache_bytes or FALLBACK_CACHE_BYTES[device]),
        pool_limit_bytes=POOL_FRAC[device] * float(device_bytes or FALLBACK_BYTES),
        memory_limit_bytes=MEMORY_FRAC[device] * float(device_bytes or FALLBACK_BYTES),
        host_limit_bytes=min(PINNED_FRAC * host_bytes, MOST_PINNED_BYTES),
        can=frozenset(can),
        host_flops_per_s=_value(calibration, "host_gemm_flops_per_s") or HOST_FLOPS_PER_S,
        host_bytes_per_s=_value(calibration, "host_stream_bytes_per_s") or HOST_BYTES_PER_S,
    )


def assumed_facts(device: str, dtypes: Sequence[str]) -> Facts:
    """Facts for a plan that is only printed: this machine's memory, assumed rates, and on CUDA all access modes."""
    capture = {
        "settings": {"device": device, "dtypes": list(dtypes)},
        "machine": {"memory_bytes": machine.memory_bytes(), "gpu_memory_bytes": ASSUMED_GPU_BYTES},
        "calibration": {},
        "capabilities": dict.fromkeys(("mapped", "split", "graph", "fp8") if device == "cuda" else ()),
    }
    return facts_of(capture)
