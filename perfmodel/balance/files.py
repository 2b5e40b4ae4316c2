"""A map of experts to GPUs as a file, in the words of serving engines."""

import json
from pathlib import Path

import numpy as np

from perfmodel.errors import InputError
from perfmodel.files import read_json, write_whole
from perfmodel.placement.balance import ExpertMap, Index
from perfmodel.placement.eplb import numbers_among_equals


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


def read_map(path: str | Path) -> ExpertMap:
    """The map in a file that `write_map` wrote; raises InputError where it is none, or does not hold together."""
    path = Path(path)
    found = read_json(path, "map")
    try:
        policy, n_gpus = str(found["policy"]), int(found["n_gpus"])
        gpu_of, phy2log = (np.array(found[key], dtype=np.int64) for key in ("gpu_of_slot", "physical_to_logical_map"))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise InputError(f"{path.name} is no map of experts as `perfmodel balance --out` writes it") from None
    if phy2log.ndim != 2 or phy2log.shape != gpu_of.shape or not phy2log.size:
        raise InputError(f"{path.name}: gpu_of_slot and physical_to_logical_map are not both [layer][slot]")
    if gpu_of.min() < 0 or gpu_of.max() >= n_gpus or phy2log.min() < 0:
        raise InputError(f"{path.name}: a slot is on no GPU of 0 to {n_gpus - 1}, or of no expert")
    return ExpertMap(policy, n_gpus, phy2log, numbers_among_equals(phy2log), gpu_of)
