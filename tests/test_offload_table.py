"""A table of costs by expert says of every placement what the formulas say."""

from dataclasses import replace

import numpy as np
import pytest

from perfmodel import moe, physics
from perfmodel.errors import InputError
from perfmodel.hardware import hardware
from perfmodel.offload import Device, OffloadConstants, cost_table, offload_parts
from perfmodel.physics import PYTORCH_KERNEL, Work, form_of, total
from perfmodel.predict import work_of
from perfmodel.routing import Routing, drawn_counts, pattern_shares

SHAPE = moe.shape("olmoe")
FORM = form_of("gpu", PYTORCH_KERNEL)
GH200 = hardware("gh200")


def layer(n_tokens: int, op: str) -> Work:
    counts = drawn_counts(pattern_shares("power-law:1.2", SHAPE.n_experts)[0], n_tokens, SHAPE.top_k, 3)[None]
    return work_of(SHAPE, Routing("drawn", counts, n_tokens, SHAPE.top_k), op)


@pytest.mark.parametrize("access", ["zero-copy", "copy"])
@pytest.mark.parametrize("op", ["grouped-gemm", "moe-layer"])
@pytest.mark.parametrize("n_tokens", [4, 512, 65_536])
def test_a_table_agrees_with_the_formulas(access: str, op: str, n_tokens: int) -> None:
    work = layer(n_tokens, op)
    o = OffloadConstants(reread_frac=0.4, reread_rows=128.0, link_overlap_frac=0.3, link_eff=0.9, copy_eff=0.8)
    device = Device(GH200, physics.ceilings(GH200, "bf16"), FORM, FORM.defaults, o)
    gone = np.random.default_rng(1).random((12, SHAPE.n_experts)) < np.linspace(0, 1, 12)[:, None]
    found = cost_table(work, access, device).latencies_ns(gone)
    for mask, ns in zip(gone, found, strict=True):
        assert ns == pytest.approx(float(total(offload_parts(work, mask[None], access, device)[0])[0]), rel=1e-4)


def test_what_has_no_table_is_refused() -> None:
    device = Device(GH200, physics.ceilings(GH200, "bf16"), FORM, FORM.defaults)
    work = layer(4, "grouped-gemm")
    with pytest.raises(InputError, match="'cpu' has no table of costs; those that have: zero-copy, copy"):
        cost_table(work, "cpu", device)
    with pytest.raises(InputError, match=r"two launches \(split\) has no table of costs"):
        cost_table(work, "zero-copy", replace(device, residency="split"))
    index = np.zeros(2, dtype=np.int64)
    two = replace(work, routing_of=index, k=work.k[index], n=work.n[index])
    with pytest.raises(InputError, match="of one layer, found 2"):
        cost_table(two, "copy", device)
