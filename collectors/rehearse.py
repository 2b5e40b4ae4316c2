"""A dry run of a CUDA plan on the CPU: every workload with tiny widths, checked, "host memory" being just memory."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from perfmodel.errors import InputError

from .points import check, make_pool
from .workloads import Workload, choices

HIDDEN, INTER, MAX_TOKENS = 64, 32, 32


def small(workload: Workload) -> Workload:
    """The workload with its experts, routing, placement and access, but tiny widths and few tokens, on the CPU.

    fp8 is rehearsed in bf16 and a replayed call is rehearsed as it is launched. A routing file is not at hand: its
    workloads are routed by a power law.
    """
    is_layer = workload.gemm_k is None
    found = replace(
        workload, hidden=HIDDEN, inter=INTER, gemm_k=None, gemm_n=None, device="cpu",
        dtype="bf16" if workload.dtype == "fp8" else workload.dtype, launch=None,
        routing="power-law:1.2" if workload.routing.startswith("file:") else workload.routing,
        n_tokens=min(workload.n_tokens, MAX_TOKENS),
    )  # fmt: skip
    if not is_layer:
        is_up = (workload.gemm_k, workload.gemm_n) == workload.moe_shape.gemms[0]
        gemm_k, gemm_n = found.moe_shape.gemms[0 if is_up else 1]
        found = replace(found, gemm_k=gemm_k, gemm_n=gemm_n)
    counts = np.bincount(choices(found).ravel(), minlength=found.n_experts)
    return replace(found, tokens_per_expert=tuple(counts.tolist()))


def rehearse(workloads: Sequence[Workload]) -> list[tuple[Workload, bool, str]]:
    """For each workload whether its dry run computed what it should, and what went wrong or how it was changed.

    Workloads that are the same when small run once.
    """
    seen: dict[str, tuple[bool, str]] = {}
    found = []
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny work: threads would only wait for each other
    try:
        with torch.inference_mode():
            for workload in workloads:
                tiny = small(workload)
                if tiny.id not in seen:
                    seen[tiny.id] = _try(tiny)
                found.append((workload, *seen[tiny.id]))
    finally:
        torch.set_num_threads(n_threads)
    return found


def _try(tiny: Workload) -> tuple[bool, str]:
    if tiny.residency == "system":
        return True, "plain system memory is not rehearsed: it needs a coherent machine"
    try:
        pool = make_pool(int(2 * tiny.moe_shape.layer_bytes), 0.0, tiny.dtype, "cpu", 0)
        check(pool, tiny, None)
    except InputError as error:
        return False, str(error)
    return True, "mapped memory was one ordinary tensor" if tiny.residency == "mapped" else ""
