"""A placement as files and options of serving engines: `FORMATS[name](placed, load, stem)` gives an `Exported`.

`FORMATS` follow where each expert lives, `DEVICE_FORMATS` which device has it. docs/export.md describes them.
"""

from collections.abc import Callable

from perfmodel.errors import InputError
from perfmodel.placement import Loads

from ..files import PlacedModel
from .arrays import eplb, own_json, plumb
from .devices import DEVICE_FORMATS, DeviceMap, device_map
from .exported import Exported, Rounding, archive, rounding, write
from .llama_cpp import llama_cpp
from .sglang import ktransformers, ktransformers_yaml, sglang, sglang_count
from .vllm import vllm

Format = Callable[[PlacedModel, Loads | None, str], Exported]
FORMATS: dict[str, Format] = {
    "json": own_json,
    "sglang": sglang,
    "sglang-count": sglang_count,
    "ktransformers": ktransformers,
    "ktransformers-yaml": ktransformers_yaml,
    "llama.cpp": llama_cpp,
    "vllm": vllm,
    "eplb": eplb,
    "plumb": plumb,
}


def export(form: str, placed: PlacedModel, load: Loads | None = None, name: str = "placement") -> Exported:
    """A placement in the format of that name: `load[layer, expert]` counts or shares, `name` the start of files' names.

    Raises InputError for an unknown format, and for a missing load where the format holds loads.
    """
    if form not in FORMATS:
        raise InputError(f"unknown export format {form!r}; known: {', '.join(FORMATS)}")
    return FORMATS[form](placed, load, name)


__all__ = [
    "DEVICE_FORMATS",
    "FORMATS",
    "DeviceMap",
    "Exported",
    "Format",
    "PlacedModel",
    "Rounding",
    "archive",
    "device_map",
    "export",
    "rounding",
    "write",
]
