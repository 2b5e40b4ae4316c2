"""A map of experts to GPUs as a file, in the words of serving engines."""

import json
import os
from contextlib import suppress
from pathlib import Path

from perfmodel.errors import InputError
from perfmodel.placement.balance import ExpertMap, Index


def write_map(path: str | Path, one: ExpertMap, layers: Index) -> None:
    """Write a map as JSON, whole or not at all: `layers`, the place of each MoE layer, `gpu_of_slot` and
    `physical_to_logical_map`, `[layer][slot]`, `logical_to_physical_map` `[layer][expert][copy]`, -1 beyond the copies,
    and `logical_replica_count` `[layer][expert]`, as SGLang and vLLM name them.

    Where GPUs do not have equally many slots, `is_even` is false, and engines cannot take it. Raises InputError where
    it cannot be written.
    """
    path = Path(path)
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
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(json.dumps(content) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise InputError(f"{path.name} cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
