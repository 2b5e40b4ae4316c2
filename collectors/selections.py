"""Which experts a model selects: hooks on the selected indices of every MoE layer, checked for conservation.

Router logits are not the selection in models that add a bias or choose groups first, so the indices themselves are
read: those that a router returns, else those that the experts are given, else those of the last `topk` over experts
inside the layer.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from perfmodel.errors import InputError

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
TOPK = (torch.topk, torch.Tensor.topk)
ROUTER_NAMES, ROUTER_CLASSES = ("gate", "router"), ("Router", "Gate", "Gating")


@dataclass(frozen=True)
class MoELayer:
    """A MoE layer: its router, which the model knows as `name`, and the module around it, which has the experts too."""

    name: str
    index: int
    router: nn.Module
    around: nn.Module


@dataclass(frozen=True)
class Seen:
    """What one layer showed during a forward pass: indices from each source, and how often it ran."""

    by_router: list[torch.Tensor] = field(default_factory=list)
    by_experts: list[torch.Tensor] = field(default_factory=list)
    inside: list[torch.Tensor] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)

    @property
    def selected(self) -> list[torch.Tensor]:
        """The indices of the first source that has any."""
        return self.by_router or self.by_experts or self.inside


@dataclass(frozen=True)
class Recorded:
    """What a model selected: `counts[step, layer, expert]`, where each layer is in the model, and tokens of a step."""

    counts: NDArray[np.int64]
    layers: NDArray[np.int64]
    top_k: int
    n_tokens: NDArray[np.int64]


def moe_layers(model: nn.Module, n_experts: int) -> list[MoELayer]:
    """The MoE layers of a model in its own order: by their routers, modules with a row of weights for each expert.

    `index` is the first number in a router's name, its layer. Raises InputError where the model has none.
    """
    found: list[MoELayer] = []
    for name, module in model.named_modules():
        outer, _, own = name.rpartition(".")
        if own not in ROUTER_NAMES and not type(module).__name__.endswith(ROUTER_CLASSES):
            continue
        around = model.get_submodule(outer)
        if any(around is layer.around or around is layer.router for layer in found):
            continue  # a part of a router, or a second gate, such as that of a shared expert
        if re.search("Attention|MoA", type(around).__name__):
            continue
        if not any(weight.ndim == 2 and weight.shape[0] == n_experts for weight in module.parameters()):
            continue
        numbers = re.findall(r"(?<![^.])\d+(?![^.])", outer)
        found.append(MoELayer(name, int(numbers[0]) if numbers else len(found), module, around))
    if not found:
        raise InputError(f"the model has no router of {n_experts} experts among its modules called gate or router")
    return found


def record(
    model: nn.Module, windows: Sequence[torch.Tensor], n_experts: int, top_k: int, tick: Callable[[], None]
) -> Recorded:
    """Run the model over each window of tokens, `[1, tokens]`, and count the selections of each MoE layer that runs.

    `tick` is called after each window. Raises InputError, naming the module, where a layer selects anything but top_k
    different experts for each token.
    """
    layers = moe_layers(model, n_experts)
    # The first window is looked at twice: layers that do not run (some predict further tokens in training) are left
    # out, and only layers that show no indices are looked into.
    seen = _watch(model, windows[0], layers, n_experts, top_k, frozenset())
    layers = [layer for layer in layers if seen[layer.name].calls]
    if not layers:
        raise InputError("no MoE layer of the model ran, so it computes its experts in some other way")
    opaque = frozenset(layer.name for layer in layers if not seen[layer.name].selected)
    counts = np.zeros((len(windows), len(layers), n_experts), dtype=np.int64)
    for step, window in enumerate(windows):
        seen = _watch(model, window, layers, n_experts, top_k, opaque)
        for place, layer in enumerate(layers):
            counts[step, place] = _counted(layer.name, seen[layer.name].selected, window.numel(), n_experts, top_k)
        tick()
    n_tokens = np.array([window.numel() for window in windows], dtype=np.int64)
    return Recorded(counts, np.array([layer.index for layer in layers], dtype=np.int64), top_k, n_tokens)


def _watch(
    model: nn.Module,
    window: torch.Tensor,
    layers: Sequence[MoELayer],
    n_experts: int,
    top_k: int,
    opaque: frozenset[str],
) -> dict[str, Seen]:
    """What each layer shows while the model runs over one window."""
    seen = {layer.name: Seen() for layer in layers}
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(_hooked(layer, seen[layer.name], top_k))
            if layer.name in opaque:
                stack.enter_context(_looked_into(layer, seen[layer.name], n_experts, top_k))
        accepted = inspect.signature(model.forward).parameters
        only = {"use_cache": False, "logits_to_keep": 1}  # nothing but the selections is needed
        stack.enter_context(torch.inference_mode())
        model(window.to(next(model.parameters()).device), **{key: only[key] for key in only if key in accepted})
    return seen


@contextmanager
def _hooked(layer: MoELayer, seen: Seen, top_k: int) -> Iterator[None]:
    """Note the indices that go out of the router and into the experts."""

    def after_router(_module: nn.Module, _args: object, output: object) -> None:
        seen.by_router.extend(_indices(output, top_k))

    def before_experts(_module: nn.Module, args: object, kwargs: object) -> None:
        seen.by_experts.extend(_indices([args, kwargs], top_k))

    def after_layer(_module: nn.Module, _args: object, _output: object) -> None:
        seen.calls.append(1)

    handles = [layer.router.register_forward_hook(after_router), layer.around.register_forward_hook(after_layer)]
    experts = getattr(layer.around, "experts", None)
    if isinstance(experts, nn.Module):
        handles.append(experts.register_forward_pre_hook(before_experts, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _looked_into(layer: MoELayer, seen: Seen, n_experts: int, top_k: int) -> Iterator[None]:
    """Note the indices of the last `topk` over experts in each call of the layer."""
    forward, was_own = layer.around.forward, vars(layer.around).get("forward")

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _TopK(n_experts, top_k) as mode:
            output = forward(*args, **kwargs)
        seen.inside.extend(mode.indices[-1:])
        return output

    layer.around.forward = wrapped
    try:
        yield
    finally:
        if was_own is None:
            del layer.around.forward  # the one of the class shows again
        else:
            layer.around.forward = was_own


class _TopK(TorchFunctionMode):
    """Collects the indices of every `topk` of top_k over the last dimension, of n_experts."""

    def __init__(self, n_experts: int, top_k: int) -> None:
        super().__init__()
        self.n_experts, self.top_k = n_experts, top_k
        self.indices: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in TOPK:
            scores = args[0] if args else kwargs["input"]
            indices = output[1]
            if scores.shape[-1] == self.n_experts and indices.shape == (*scores.shape[:-1], self.top_k):
                self.indices.append(indices.detach().clone())
        return output


def _indices(values: object, top_k: int) -> list[torch.Tensor]:
    """The one tensor of whole numbers `[..., top_k]` among values, as a list; empty where there is none, or several."""
    found: list[torch.Tensor] = []
    left = [values]
    while left:
        value = left.pop()
        if isinstance(value, (tuple, list)):
            left.extend(value)
        elif isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, torch.Tensor) and value.dtype in INTEGERS and value.ndim:
            by_token = value if value.ndim > 1 else value[:, None]  # a top-1 router may leave the last dimension out
            found += [by_token] * (by_token.shape[-1] == top_k)
    return [found[0].detach().clone()] if len(found) == 1 else []


def _counted(
    name: str, selected: Sequence[torch.Tensor], n_tokens: int, n_experts: int, top_k: int
) -> NDArray[np.int64]:
    """Selections of each expert, `[expert]`; InputError where they are not top_k different experts of each token."""
    chosen = np.concatenate([np.zeros((0, top_k), np.int64), *(s.cpu().numpy().reshape(-1, top_k) for s in selected)])
    if len(chosen) != n_tokens:
        raise InputError(
            f"module {name} shows the selections of {len(chosen)} tokens of {n_tokens}, "
            f"expected {top_k} of {n_experts} experts for each"
        )
    if chosen.min() < 0 or chosen.max() >= n_experts:
        raise InputError(
            f"module {name} selects experts {chosen.min()} to {chosen.max()}, expected 0 to {n_experts - 1}"
        )
    if (np.diff(np.sort(chosen, axis=1), axis=1) == 0).any():
        raise InputError(f"module {name} selects an expert twice for one token, expected {top_k} different ones")
    return np.bincount(chosen.ravel(), minlength=n_experts).astype(np.int64)
