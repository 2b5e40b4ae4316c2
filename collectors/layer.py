"""The work that is timed: grouped GEMM by whatever this torch offers, one MoE layer on top of it, and slow twins.

Shape letters: T tokens, R rows = T x top-k, E experts, H hidden, I intermediate width, K and N of a GEMM. Weights lie
as checkpoints store them, [E, N, K], and are used transposed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Mark = Callable[[str], AbstractContextManager[object]]


def grouped_mm_name() -> str:
    """Which implementation runs: the public function, its private forerunner, or a loop."""
    if hasattr(functional, "grouped_mm"):
        return "torch.nn.functional.grouped_mm"
    return "torch._grouped_mm" if hasattr(torch, "_grouped_mm") else "loop of mm"


def loop_mm(rows_RK: Tensor, weights_EKN: Tensor, offs_E: Tensor) -> Tensor:
    """Grouped GEMM as a loop over experts: the fallback of an old torch."""
    out = rows_RK.new_empty(rows_RK.shape[0], weights_EKN.shape[2])
    first = 0
    for expert, last in enumerate(offs_E.tolist()):
        if last > first:
            torch.mm(rows_RK[first:last], weights_EKN[expert], out=out[first:last])
        first = last
    return out


def grouped_mm(rows_RK: Tensor, weights_ENK: Tensor, offs_E: Tensor) -> Tensor:
    """Rows of expert e, which end at offs[e] (int32), times its weights transposed; `[R, N]`.

    Every row must belong to an expert: rows past the last offset would come back as uninitialised memory.
    """
    weights_EKN = weights_ENK.transpose(1, 2)
    if hasattr(functional, "grouped_mm"):
        return functional.grouped_mm(rows_RK, weights_EKN, offs=offs_E)
    if hasattr(torch, "_grouped_mm"):
        return torch._grouped_mm(rows_RK, weights_EKN, offs=offs_E)
    return loop_mm(rows_RK, weights_EKN, offs_E)


def slow_grouped_mm(rows_RK: Tensor, weights_ENK: Tensor, offs_E: Tensor) -> Tensor:
    """Grouped GEMM expert by expert in fp32: what `grouped_mm` is checked against."""
    ends = [0, *offs_E.tolist()]
    parts = [rows_RK[ends[e] : ends[e + 1]].float() @ weights_ENK[e].float().T for e in range(len(weights_ENK))]
    return torch.cat(parts)


@dataclass(frozen=True)
class Layer:
    """Weights of one MoE layer: router [E, H], gate_up [E, (n_gemms - 1) I, H], down [E, H, I]."""

    router: Tensor
    gate_up: Tensor
    down: Tensor
    top_k: int
    is_gated: bool


def activate(hidden: Tensor, is_gated: bool) -> Tensor:
    """SiLU of the gate times the up projection, or SiLU alone for plain experts."""
    if not is_gated:
        return functional.silu(hidden)
    gate, up = hidden.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def no_mark(_name: str) -> AbstractContextManager[object]:
    """Name no ranges: timing runs without them."""
    return nullcontext()


def moe_layer(layer: Layer, x_TH: Tensor, chosen: Tensor, mark: Mark = no_mark) -> Tensor:
    """One MoE layer, `[T, H]`: route, permute, two grouped GEMMs, weighted sum over the experts of each token.

    The router's choice is computed for its cost and its weights; `chosen` [T, top-k] says which experts really serve.
    """
    with mark("router"):
        logits = functional.linear(x_TH, layer.router)
        weights, _ = torch.topk(torch.softmax(logits, dim=-1), layer.top_k, dim=-1)
    with mark("dispatch"):
        by_expert, order = chosen.reshape(-1).sort(stable=True)
        token = order // layer.top_k
        experts = torch.arange(layer.router.shape[0], device=chosen.device)
        offs = torch.searchsorted(by_expert, experts, right=True, out_int32=True)
        rows = x_TH.index_select(0, token)
    with mark("gate_up"):
        hidden = grouped_mm(rows, layer.gate_up, offs)
    with mark("activation"):
        hidden = activate(hidden, layer.is_gated)
    with mark("down"):
        out = grouped_mm(hidden, layer.down, offs)
    with mark("combine"):
        out.mul_(weights.reshape(-1)[order].unsqueeze(1))
        return torch.zeros_like(x_TH).index_add_(0, token, out)


def slow_moe_layer(layer: Layer, x_TH: Tensor, chosen: Tensor) -> Tensor:
    """The same layer expert by expert in fp32: what `moe_layer` is checked against."""
    x = x_TH.float()
    weights = torch.topk(torch.softmax(x @ layer.router.float().T, dim=-1), layer.top_k, dim=-1).values
    out = torch.zeros_like(x)
    for expert in range(layer.router.shape[0]):
        token, slot = torch.nonzero(chosen == expert, as_tuple=True)
        if len(token):
            hidden = activate(x[token] @ layer.gate_up[expert].float().T, layer.is_gated)
            out[token] += weights[token, slot].unsqueeze(1) * (hidden @ layer.down[expert].float().T)
    return out
