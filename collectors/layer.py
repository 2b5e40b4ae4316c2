"""The work that is timed: grouped GEMM by whatever this torch offers, one MoE layer on top of it, and slow twins.

Shape letters: T tokens, R rows = T x top-k, E experts, H hidden, I intermediate width, K and N of a GEMM. Weights lie
as checkpoints store them, [E, N, K], and are used transposed.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Mark = Callable[[str], AbstractContextManager[object]]


E4M3_LARGEST = 448.0
ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Scaled:
    """An fp8 matrix with one fp32 scale for each row: values [..., rows, K], scale [..., rows]."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of the values."""
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: int | slice) -> "Scaled":
        return Scaled(self.values[part], self.scale[part])


Matrix = Tensor | Scaled


def quantise(rows_RK: Tensor) -> Scaled:
    """Rows in fp8, each with the scale that takes its largest magnitude to the largest number of e4m3."""
    scale = rows_RK.abs().amax(dim=-1).float().div_(E4M3_LARGEST).clamp_(min=1e-12)
    return Scaled((rows_RK.float() / scale.unsqueeze(-1)).to(torch.float8_e4m3fn), scale)


def quantised(rows_RK: Tensor) -> Scaled:
    """`quantise` for inputs made beforehand, piece by piece: in fp32 all of them may not fit on the device."""
    values = torch.empty_like(rows_RK, dtype=torch.float8_e4m3fn)
    scale = torch.empty(rows_RK.shape[:1], dtype=torch.float32, device=rows_RK.device)
    for first in range(0, len(rows_RK), ROWS_AT_ONCE):
        part = quantise(rows_RK[first : first + ROWS_AT_ONCE])
        values[first : first + ROWS_AT_ONCE].copy_(part.values)
        scale[first : first + ROWS_AT_ONCE].copy_(part.scale)
    return Scaled(values, scale)


def plain(matrix: Matrix, device: torch.device) -> Tensor:
    """The numbers of a matrix in fp32, on some device: what slow twins compute with."""
    if isinstance(matrix, Scaled):
        return matrix.values.to(device).float() * matrix.scale.to(device).unsqueeze(-1)
    return matrix.to(device).float()


def scaled_grouped_mm(rows_RK: Scaled, weights_ENK: Scaled, offs_E: Tensor) -> Tensor:
    """Grouped GEMM of fp8 rows and weights with a scale for each row of both, out in bf16."""
    weights_EKN = weights_ENK.values.transpose(1, 2)
    if hasattr(torch, "_scaled_grouped_mm"):
        return torch._scaled_grouped_mm(
            rows_RK.values, weights_EKN, rows_RK.scale, weights_ENK.scale,
            offs=offs_E, out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
    by_row = functional.ScalingType.RowWise
    return functional.scaled_grouped_mm(  # type: ignore[attr-defined]
        rows_RK.values, weights_EKN, rows_RK.scale, by_row, weights_ENK.scale, by_row,
        offs=offs_E, output_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip


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


def grouped_mm(rows_RK: Matrix, weights_ENK: Matrix, offs_E: Tensor) -> Tensor:
    """Rows of expert e, which end at offs[e] (int32), times its weights transposed; `[R, N]`.

    Every row must belong to an expert: rows past the last offset would come back as uninitialised memory. Rows that
    meet fp8 weights are quantised here unless they are already.
    """
    if isinstance(weights_ENK, Scaled):
        rows = rows_RK if isinstance(rows_RK, Scaled) else quantise(rows_RK)
        return scaled_grouped_mm(rows, weights_ENK, offs_E)
    assert isinstance(rows_RK, Tensor)
    weights_EKN = weights_ENK.transpose(1, 2)
    if hasattr(functional, "grouped_mm"):
        return functional.grouped_mm(rows_RK, weights_EKN, offs=offs_E)
    if hasattr(torch, "_grouped_mm"):
        return torch._grouped_mm(rows_RK, weights_EKN, offs=offs_E)
    return loop_mm(rows_RK, weights_EKN, offs_E)


def slow_grouped_mm(rows_RK: Matrix, weights_ENK: Matrix | Sequence[Matrix], offs_E: Tensor) -> Tensor:
    """Grouped GEMM expert by expert in fp32, weights wherever they lie: what `grouped_mm` is checked against."""
    ends, device = [0, *offs_E.tolist()], offs_E.device
    rows = plain(rows_RK, device)
    # Experts without rows add none; leaving them out keeps far weights where they are.
    busy = [e for e in range(len(weights_ENK)) if ends[e + 1] > ends[e]]
    return torch.cat([rows[ends[e] : ends[e + 1]] @ plain(weights_ENK[e], device).T for e in busy])


@dataclass(frozen=True)
class Layer:
    """Weights of one MoE layer: router [E, H], gate_up [E, (n_gemms - 1) I, H], down [E, H, I].

    For the slow twin the experts may be a sequence of matrices that lie wherever they are.
    """

    router: Tensor
    gate_up: Matrix | Sequence[Matrix]
    down: Matrix | Sequence[Matrix]
    top_k: int
    is_gated: bool


def stacked(layer: Layer) -> tuple[Matrix, Matrix]:
    """Gate and up, and down, as one tensor each; raises TypeError for the single experts of a slow twin."""
    if isinstance(layer.gate_up, Sequence) or isinstance(layer.down, Sequence):
        raise TypeError("a grouped GEMM takes the experts as one tensor")
    return layer.gate_up, layer.down


def activate(hidden: Tensor, is_gated: bool) -> Tensor:
    """SiLU of the gate times the up projection, or SiLU alone for plain experts."""
    if not is_gated:
        return functional.silu(hidden)
    gate, up = hidden.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def no_mark(_name: str) -> AbstractContextManager[object]:
    """Name no ranges: timing runs without them."""
    return nullcontext()


def route(router_EH: Tensor, x_TH: Tensor, top_k: int) -> Tensor:
    """The router's weights of the experts it would choose, `[T, top_k]`."""
    logits = functional.linear(x_TH, router_EH)
    return torch.topk(torch.softmax(logits, dim=-1), top_k, dim=-1).values


def dispatch(x_TH: Tensor, chosen: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows sorted by expert [R, H], where those of each expert end [E], and the order and the token of each row [R]."""
    by_expert, order = chosen.reshape(-1).sort(stable=True)
    token = order // chosen.shape[1]
    experts = torch.arange(n_experts, device=chosen.device)
    offs = torch.searchsorted(by_expert, experts, right=True, out_int32=True)
    return x_TH.index_select(0, token), offs, order, token


def apply_experts(
    rows: Matrix, weights: Sequence[Matrix], offs_E: Tensor, is_gated: bool, mark: Mark = no_mark
) -> Tensor:
    """One grouped GEMM, or two with the activation between them, over rows sorted by expert."""
    if len(weights) == 1:
        return grouped_mm(rows, weights[0], offs_E)
    with mark("gate_up"):
        hidden = grouped_mm(rows, weights[0], offs_E)
    with mark("activation"):
        hidden = activate(hidden, is_gated)
    with mark("down"):
        return grouped_mm(hidden, weights[1], offs_E)


def moe_layer(layer: Layer, x_TH: Tensor, chosen: Tensor, mark: Mark = no_mark) -> Tensor:
    """One MoE layer, `[T, H]`: route, permute, two grouped GEMMs, weighted sum over the experts of each token.

    The router's choice is computed for its cost and its weights; `chosen` [T, top-k] says which experts really serve.
    """
    with mark("router"):
        weights = route(layer.router, x_TH, layer.top_k)
    with mark("dispatch"):
        rows, offs, order, token = dispatch(x_TH, chosen, layer.router.shape[0])
    out = apply_experts(rows, stacked(layer), offs, layer.is_gated, mark)
    with mark("combine"):
        out.mul_(weights.reshape(-1)[order].unsqueeze(1))
        return torch.zeros_like(x_TH).index_add_(0, token, out)


def _as_met(rows: Tensor, weights: Matrix) -> Tensor:
    """Rows in fp32 as they meet weights: through fp8 where the weights are, which is coarse and no mistake."""
    return plain(quantise(rows), rows.device) if isinstance(weights, Scaled) else rows


def slow_moe_layer(layer: Layer, x_TH: Tensor, chosen: Tensor) -> Tensor:
    """The same layer expert by expert in fp32: what `moe_layer` is checked against."""
    x = x_TH.float()
    weights = torch.topk(torch.softmax(x @ layer.router.float().T, dim=-1), layer.top_k, dim=-1).values
    out = torch.zeros_like(x)
    for expert in range(layer.router.shape[0]):
        token, slot = torch.nonzero(chosen == expert, as_tuple=True)
        if len(token):
            gate_up, down = layer.gate_up[expert], layer.down[expert]
            hidden = activate(_as_met(x[token], gate_up) @ plain(gate_up, x.device).T, layer.is_gated)
            far = _as_met(hidden, down) @ plain(down, x.device).T
            out[token] += weights[token, slot].unsqueeze(1) * far
    return out
