"""A map of experts to GPUs as a file, in the words of serving engines."""

import json
from pathlib import Path

from perfmodel.files import write_whole
from perfmodel.placement.balance import ExpertMap, Index


def write_map(path: str | Path, one: ExpertMap, layers: Index) -> None:
    """Write a map as JSON, whole or not at all: `layers`, the place of each MoE layer, `gpu_of_slot` and
    `physical_to_logical_map`, `[layer][slot]`, `logical_to_physical_map` `[layer][expert][copy]`, -1 beyond the copies,
    and `logical_replica_count` `[layer][expert]`, as SGLang and vLLM name them.

    Where GPUs do not have equally many slots, `is_even` is false, and engines cannot take it. Raises InputError where
    it cannot be written.
    """
    content = {
        "policy": one.policy,
        "n_gpus": one.n_gpus,
        "is_even": one.is_even,
        "layers": layers.tolist(),
        "gpu_of_slot": one.gpu_of.tolist(),
        "physical_to_logical_map": one.phy2log.tolist(),
        "logical_to_physical_map": one.log2phy.tolist(),
        "logical_replica_count": one.logcnt.tolist(),
    }
    write_whole(path, (json.dumps(content) + "\n").encode())
