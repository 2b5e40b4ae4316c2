"""Exports for several devices: which expert each slot of each device holds, with or without copies.

Formats as read in sglang 0.5.23 (`physical_to_logical_map`), vLLM (`expert_map`; the file `expert_to_ep_rank` is
proposed in #34811, no release reads it), vllm-ascend (`expert_map_path`) and DeepSeek's EPLB (phy2log).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

from .exported import Exported, compact_json, npy


@dataclass(frozen=True, eq=False)
class DeviceMap:
    """Which expert each slot holds, `expert[layer, device, slot]`; every expert of a layer has one slot or several.

    `layers` are the places of these layers in the model, counted from 0, `n_model_layers` null where not known. Raises
    InputError where an expert has no slot or the numbers do not belong together.
    """

    expert: NDArray[np.int64]
    n_experts: int
    layers: tuple[int, ...]
    n_model_layers: int | None = None

    def __post_init__(self) -> None:
        if self.expert.ndim != 3 or not self.expert.size or len(self.layers) != len(self.expert):
            raise InputError(
                f"slots of shape {self.expert.shape} for {len(self.layers)} layers, expected [layers, devices, slots]"
            )
        held = np.zeros((len(self.layers), self.n_experts), dtype=np.bool_)
        if (self.expert < 0).any() or (self.expert >= self.n_experts).any():
            raise InputError(
                f"slots hold experts {self.expert.min()} to {self.expert.max()}, expected 0 to {self.n_experts - 1}"
            )
        np.put_along_axis(held, self.physical_to_logical, True, axis=1)
        if not held.all():
            layer, expert = np.argwhere(~held)[0]
            raise InputError(f"expert {expert} of layer {self.layers[layer]} has no slot on any device")

    @property
    def physical_to_logical(self) -> NDArray[np.int64]:
        """The expert of each slot, devices one after another, `[layer, slot]`: EPLB's phy2log."""
        return self.expert.reshape(len(self.expert), -1)

    @property
    def n_devices(self) -> int:
        """Over how many devices the experts are spread."""
        return int(self.expert.shape[1])

    @property
    def has_copies(self) -> bool:
        """Does any expert have more than one slot."""
        return bool(self.physical_to_logical.shape[1] > self.n_experts)


def device_map(
    device: NDArray[np.int64], n_devices: int, layers: tuple[int, ...], n_model_layers: int | None = None
) -> DeviceMap:
    """The slots of a mapping `device[layer, expert]` without copies, experts by id on each device.

    Raises InputError for devices outside 0 to n_devices - 1 and where they do not hold equally many experts of every
    layer, which the engines require.
    """
    if device.ndim != 2 or not device.size or (device < 0).any() or (device >= n_devices).any():
        raise InputError(
            f"a mapping of shape {device.shape}, expected devices 0 to {n_devices - 1} as [layers, experts]"
        )
    held = (device[:, :, None] == np.arange(n_devices)).sum(axis=1)
    if (held != held[0, 0]).any():
        layer, at = np.argwhere(held != device.shape[1] / n_devices)[0]
        raise InputError(
            f"device {at} has {held[layer, at]} of the {device.shape[1]} experts of layer {layers[layer]}; the engines "
            f"need equally many experts on each of {n_devices} devices"
        )
    slots = np.argsort(device, axis=1, kind="stable").reshape(len(device), n_devices, -1)
    return DeviceMap(slots.astype(np.int64), device.shape[1], layers, n_model_layers)


def sglang_map(mapped: DeviceMap, name: str = "placement") -> Exported:
    """SGLang's `--init-expert-location`: `physical_to_logical_map` `[model layers][slots]`; in turn where dense."""
    n_slots = mapped.physical_to_logical.shape[1]
    n_layers = mapped.n_model_layers or mapped.layers[-1] + 1
    rows = np.tile(np.arange(n_slots) % mapped.n_experts, (n_layers, 1))
    rows[list(mapped.layers)] = mapped.physical_to_logical
    assumed = (
        "" if mapped.n_model_layers else f"; the number of layers of the model is not known, {n_layers} is assumed"
    )
    return Exported(
        {f"{name}.sglang-map.json": compact_json({"physical_to_logical_map": rows.tolist()})},
        (
            f"--init-expert-location {name}.sglang-map.json --ep-size {mapped.n_devices} "
            f"--ep-num-redundant-experts {n_slots - mapped.n_experts}",
        ),
        (f"layers without experts have all experts in turn{assumed}",),
    )


def vllm_rank_file(mapped: DeviceMap, name: str = "placement") -> Exported:
    """vLLM's proposed `{"expert_to_ep_rank": [rank of each expert]}`: one list for all layers, without copies.

    Raises InputError where layers differ or experts have copies, which one list cannot say.
    """
    if mapped.has_copies:
        raise InputError("expert_to_ep_rank names one rank for each expert, and this mapping has copies of experts")
    ranks = local_slots(mapped).argmax(axis=1)  # the one rank whose local id is not -1
    if (ranks != ranks[0]).any():
        layer = int(np.flatnonzero((ranks != ranks[0]).any(axis=1))[0])
        raise InputError(
            f"expert_to_ep_rank is one list for all layers, and layer {mapped.layers[layer]} is mapped otherwise than "
            f"layer {mapped.layers[0]}"
        )
    return Exported(
        {f"{name}.vllm-ranks.json": compact_json({"expert_to_ep_rank": ranks[0].tolist()})},
        warnings=("this file is proposed in vLLM #34811 and not read by a released vLLM",),
    )


def local_slots(mapped: DeviceMap) -> NDArray[np.int32]:
    """vLLM's expert_map of each layer and rank: an expert's slot on the rank, else -1, `[layer, rank, expert]`.

    Of several copies on one rank the last counts.
    """
    local = np.full((len(mapped.layers), mapped.n_devices, mapped.n_experts), -1, dtype=np.int32)
    slots = np.broadcast_to(np.arange(mapped.expert.shape[2], dtype=np.int32), mapped.expert.shape)
    np.put_along_axis(local, mapped.expert, slots, axis=2)
    return local


def vllm_expert_map(mapped: DeviceMap, name: str = "placement") -> Exported:
    """vLLM's `expert_map` for all layers and ranks as .npy, int32 `[layer, rank, expert]`: local slot, -1 elsewhere."""
    return Exported(
        {f"{name}.vllm-expert-map.npy": npy(local_slots(mapped))},
        warnings=("vLLM holds this array for each layer but reads no file of it; a patched or embedded engine can",),
    )


def vllm_ascend(mapped: DeviceMap, name: str = "placement") -> Exported:
    """vllm-ascend's expert map (JSON): `moe_layer_count`, and for each layer what experts each device holds."""
    layers = [
        {
            "layer_id": layer,
            "device_count": mapped.n_devices,
            "device_list": [{"device_id": at, "device_expert": held} for at, held in enumerate(devices)],
        }
        for layer, devices in enumerate(mapped.expert.tolist())
    ]
    content = {"moe_layer_count": len(layers), "layer_list": layers}
    return Exported(
        {f"{name}.vllm-ascend.json": compact_json(content)},
        (f"""--additional-config '{{"expert_map_path": "{name}.vllm-ascend.json"}}'""",),
        ("layer_id counts layers with experts from 0, not layers of the model",),
    )


def phy2log(mapped: DeviceMap, name: str = "placement") -> Exported:
    """EPLB's phy2log as .npy, int64 `[layer, slot]`: the expert of each slot, devices one after another."""
    return Exported({f"{name}.phy2log.npy": npy(mapped.physical_to_logical.astype(np.int64))})


DeviceFormat = Callable[[DeviceMap, str], Exported]
DEVICE_FORMATS: dict[str, DeviceFormat] = {
    "sglang-map": sglang_map,
    "vllm-ranks": vllm_rank_file,
    "vllm-expert-map": vllm_expert_map,
    "vllm-ascend": vllm_ascend,
    "phy2log": phy2log,
}
