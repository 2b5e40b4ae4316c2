"""Export for vLLM's UVA offloading, whose unit is one stacked tensor of a layer (`experts.w13_weight`, `w2_weight`).

As read in `vllm/model_executor/offloader/uva.py`: parameters that match `cpu_offload_params` leave the device in the
order of the layers until `cpu_offload_gb` (GiB on each GPU) is reached, the last one whole.
"""

import math

import numpy as np

from perfmodel.placement import Loads

from ..files import PlacedModel
from .exported import Exported, compact_json, rounding
from .llama_cpp import kept_by, projections

GIB = 2**30


def vllm(placed: PlacedModel, load: Loads | None = None, name: str = "placement") -> Exported:
    """`--cpu-offload-gb` and `--cpu-offload-params` for the bytes of experts that are not resident, for one GPU.

    Experts cannot be chosen: the first layers leave the device, so the rounding is that of whole layers with the last
    one cut between its two tensors.
    """
    units = projections(placed.shape.n_gemms, fused=True)
    unit_bytes = np.array(list(units.values())) * placed.shape.layer_bytes / placed.shape.n_gemms
    gone_bytes = int((~placed.resident).sum()) * placed.shape.expert_bytes
    limit = math.ceil(100 * gone_bytes / GIB) / 100
    before_bytes = np.cumsum(np.tile(unit_bytes, len(placed.layers))) - np.tile(unit_bytes, len(placed.layers))
    held = (before_bytes >= limit * GIB).reshape(len(placed.layers), len(units))
    found = rounding(placed, kept_by(placed, held, units), load)
    options = {"cpu_offload_gb": limit, "cpu_offload_params": ["experts"]}
    return Exported(
        {f"{name}.vllm.json": compact_json(options)},
        (f"--offload-backend uva --cpu-offload-gb {limit:g} --cpu-offload-params experts",),
        (
            f"vLLM offloads whole tensors of the first layers and reads them in place: {found.words()}",
            "the limit is for each GPU; with tensor or expert parallelism divide it by their number",
        ),
        found,
    )
