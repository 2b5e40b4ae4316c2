"""Exports for SGLang (with and without kt-kernel) and for ktransformers.

Formats as read in sglang 0.5.23 (`srt/eplb/expert_location.py`, `srt/layers/moe/kt_ep_wrapper.py`) and in kt-kernel of
ktransformers (`generate_gpu_experts_masks`) with its fork of sglang.
"""

import numpy as np
from numpy.typing import NDArray

from perfmodel import text
from perfmodel.errors import InputError
from perfmodel.placement import Loads

from ..files import PlacedModel
from .exported import (
    Exported,
    Rounding,
    compact_json,
    layer_shares_of,
    model_rows,
    most_worth_first,
    npy,
    rounding,
    unknown_depth,
)


def hot_first(placed: PlacedModel, load: Loads | None = None) -> NDArray[np.int64]:
    """The experts of each layer, resident ones first, each group by falling load, `[layer, place]`; then by id."""
    share = np.zeros(placed.resident.shape) if load is None else layer_shares_of(placed, load)
    return np.lexsort((-share, ~placed.resident), axis=1).astype(np.int64)


def sglang(placed: PlacedModel, load: Loads | None = None, name: str = "placement") -> Exported:
    """`--init-expert-location` JSON for SGLang with kt-kernel: `physical_to_logical_map` `[model layers][experts]`.

    kt_ep_wrapper computes physical experts 0 to N - 1 of every layer on the device, N being `--kt-num-gpu-experts`, so
    the map lists resident experts first. N is the mean number of resident experts, rounded down so that the bytes fit;
    layers without experts have the identity.
    """
    order = hot_first(placed, load)
    n_layers, n_experts = order.shape
    n_gpu = int(placed.resident.sum()) // n_layers
    kept = np.zeros(order.shape)
    np.put_along_axis(kept, order[:, :n_gpu], 1.0, axis=1)
    found = rounding(placed, kept, load)
    return Exported(
        {f"{name}.sglang.json": _location(model_rows(placed, order, np.arange(n_experts)))},
        (f"--init-expert-location {name}.sglang.json --kt-num-gpu-experts {n_gpu}",),
        (*_one_number(placed, n_gpu, found), *unknown_depth(placed)),
        found,
    )


def _location(physical_to_logical: NDArray[np.generic]) -> bytes:
    return compact_json({"physical_to_logical_map": physical_to_logical.tolist()})  # further keys would be refused


def _one_number(placed: PlacedModel, n_gpu: int, found: Rounding) -> tuple[str, ...]:
    n_resident = placed.resident.sum(axis=1)
    n_lost, n_others = np.maximum(n_resident - n_gpu, 0), np.maximum(n_gpu - n_resident, 0)
    if not n_lost.any():
        return ()
    others = f", {text.counted(int(n_others.sum()), 'other')} take their place" if n_others.any() else ""
    return (
        f"--kt-num-gpu-experts is one number for all layers: {text.counted(int(n_lost.sum()), 'resident expert')} of "
        f"{text.counted(int((n_lost > 0).sum()), 'layer')} leave the device{others}; {found.words()}",
    )


def sglang_count(placed: PlacedModel, load: Loads | None = None, name: str = "placement") -> Exported:
    """`--init-expert-location` JSON with `logical_count` `[model layers][experts]`, on which SGLang runs EPLB at start.

    Shares become counts of a million assignments a layer; layers without experts have zeros, as in SGLang's recorder.
    Raises InputError without a load.
    """
    counts = model_rows(placed, whole_counts(placed, load), 0)
    return Exported(
        {f"{name}.sglang-count.json": compact_json({"logical_count": counts.tolist()})},
        (f"--init-expert-location {name}.sglang-count.json",),
        (
            "EPLB balances the devices of --ep-size by these counts; which experts are resident plays no part",
            *unknown_depth(placed),
        ),
    )


def whole_counts(placed: PlacedModel, load: Loads | None) -> NDArray[np.int64]:
    """A load as whole counts, `[layer, expert]`; shares become counts of a million. Raises InputError without one."""
    if load is None:
        raise InputError("this format holds loads of experts, so it needs a routing beside the placement")
    share = layer_shares_of(placed, load)
    return np.rint(load if (load == np.rint(load)).all() else share * 1e6).astype(np.int64)


def ktransformers(placed: PlacedModel, load: Loads | None = None, name: str = "placement") -> Exported:
    """Masks `bool[model layers, experts]` of the experts on the device for kt-kernel, exact for every single expert.

    Three files: the masks as .npy and as JSON for `KTMoEWrapper(gpu_experts_mask=...)`, and made-up activation counts
    `int64[1, model layers, experts]`, 2 for resident experts and 1 for others, whose global top-n is the placement:
    for `--kt-expert-placement-strategy frequency`, which reads them as a .pt of SGLang's recorder.
    """
    mask = model_rows(placed, placed.resident, True)
    counts = model_rows(placed, placed.resident.astype(np.int64) + 1, 0)
    n_gpu, n_all = int(placed.resident.sum()), placed.resident.size
    n_starved = int((~placed.resident.any(axis=1)).sum())
    convert = (
        f"""python -c "import numpy, torch; torch.save({{'logical_count': """
        f"""torch.from_numpy(numpy.load('{name}.kt-counts.npy'))}}, '{name}.kt-counts.pt')" """
    )
    # The engine takes int(experts x ratio): half an expert more keeps the product from falling below the number.
    ratio = min(1.0, (n_gpu + 0.5) / n_all)
    return Exported(
        {
            f"{name}.kt-mask.npy": npy(mask),
            f"{name}.kt-mask.json": compact_json({"gpu_experts_mask": mask.tolist()}),
            f"{name}.kt-counts.npy": npy(counts[None]),
        },
        (
            convert.strip(),
            "--kt-expert-placement-strategy frequency "
            f"--init-expert-location {name}.kt-counts.pt --kt-gpu-experts-ratio {ratio:.9g}",
        ),
        (
            "the counts are made from the placement, not measured; do not balance or fit on them",
            *((f"{n_starved} of {len(placed.layers)} layers have no resident expert",) if n_starved else ()),
            *unknown_depth(placed),
        ),
        rounding(placed, placed.resident.astype(np.float64), load),
    )


_RULE = """\
- match:
    name: "^model\\\\.layers\\\\.({layers})\\\\.mlp\\\\.experts$"
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs:
      prefill_device: "cuda"
      prefill_op: "KExpertsTorch"
      generate_device: "{device}"
      generate_op: "{op}"
      out_device: "cuda"
  recursive: False
"""


def ktransformers_yaml(placed: PlacedModel, load: Loads | None = None, name: str = "placement") -> Exported:
    """The rules of ktransformers' earlier YAML (`--optimize_config_path`): whole layers on the device or on the CPU.

    As many layers as the bytes of the resident experts hold, those whose resident experts have the largest share of
    assignments (or are most, without a load).
    """
    n_layers, n_experts = placed.resident.shape
    n_whole = int(placed.resident.sum()) // n_experts
    on_device = np.zeros(n_layers, dtype=np.bool_)
    on_device[most_worth_first(placed, load)[:n_whole]] = True
    found = rounding(placed, np.repeat(on_device[:, None].astype(np.float64), n_experts, axis=1), load)
    places = np.array(placed.layers)
    rules = [
        _RULE.format(layers="|".join(map(str, places[chosen])), device=device, op=op)
        for chosen, device, op in ((on_device, "cuda", "KExpertsMarlin"), (~on_device, "cpu", "KExpertsCPU"))
        if chosen.any()
    ]
    return Exported(
        {f"{name}.kt-rules.yaml": "".join(rules).encode()},
        (f"--optimize_config_path {name}.kt-rules.yaml",),
        (
            "these are the rules for routed experts alone; put them before the other rules of the model's own YAML",
            *(() if found.is_exact else (f"rules name whole layers: {found.words()}",)),
        ),
        found,
    )
