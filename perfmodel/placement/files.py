"""Placement files: a placement with what it belongs to, as JSON that this project writes and reads back."""

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError, first_line
from perfmodel.files import read_json, write_whole
from perfmodel.moe import MoEShape

from . import RESIDENT, TIERS, Placement

PLACEMENT_SCHEMA = 1
KIND = "perfmodel placement"
MAX_LAYERS = 10_000  # far above any model; a larger number is a slip
_NUMBER = re.compile(r"[0-9]{1,9}")
_SIZES = {one.name for one in fields(MoEShape)}


@dataclass(frozen=True, eq=False)
class PlacedModel:
    """A placement and the model it is for.

    `layers[i]` is the place in the model, counted from 0, of the layer that row i of the placement is for;
    `n_model_layers` counts all layers, those without experts too, and is null where it is not known. `made_from` says
    what the placement was decided on, `predicted` what was foretold of it: any JSON values by name. Raises InputError
    where layers, shape and tiers do not belong together.
    """

    placement: Placement
    shape: MoEShape
    layers: tuple[int, ...]
    n_model_layers: int | None = None
    made_from: Mapping[str, Any] = field(default_factory=dict)
    predicted: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tier = self.placement.tier
        if tier.ndim != 2 or not tier.size or tier.shape[1] != self.shape.n_experts:
            raise InputError(
                f"tiers of shape {tier.shape}, expected [layers, {self.shape.n_experts}] for {self.shape.name}"
            )
        if ((tier < 0) | (tier >= len(TIERS))).any():
            raise InputError(f"tiers must be 0 to {len(TIERS) - 1}, of {', '.join(TIERS)}")
        if len(self.layers) != len(tier):
            raise InputError(f"{len(self.layers)} places of layers for {len(tier)} layers of tiers")
        if any(b <= a for a, b in zip((-1, *self.layers), self.layers, strict=False)):
            raise InputError("the places of the layers must be whole numbers from 0, each above the one before it")
        n_model_layers = self.layers[-1] + 1 if self.n_model_layers is None else self.n_model_layers
        if not self.layers[-1] < n_model_layers <= MAX_LAYERS:
            raise InputError(
                f"a model of {n_model_layers} layers with experts in layer {self.layers[-1]}, counted from 0; "
                f"expected more layers than that, at most {MAX_LAYERS}"
            )

    @property
    def resident(self) -> NDArray[np.bool_]:
        """Which experts are in device memory, `[layer, expert]`."""
        return np.asarray(self.placement.tier == RESIDENT)

    @property
    def tier_bytes(self) -> dict[str, float]:
        """Weight bytes of the routed experts in each tier, over all layers of the placement."""
        n_experts = np.bincount(self.placement.tier.ravel(), minlength=len(TIERS))
        return {name: int(n) * self.shape.expert_bytes for name, n in zip(TIERS, n_experts, strict=True)}


def placement_json(placed: PlacedModel) -> str:
    """The text of a placement file, one line a layer; raises InputError for values that are no JSON."""
    head = {
        "kind": KIND,
        "schema": PLACEMENT_SCHEMA,
        "policy": placed.placement.policy,
        "shape": asdict(placed.shape),
        "n_model_layers": placed.n_model_layers,
        "layers": list(placed.layers),
        "tiers": list(TIERS),
        "tier_bytes": placed.tier_bytes,
        "made_from": dict(placed.made_from),
        "predicted": dict(placed.predicted),
    }
    try:
        lines = [f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in head.items()]
    except (TypeError, ValueError) as error:
        raise InputError(f"a placement file holds JSON values only: {error}") from None
    rows = ",\n".join(f"  {json.dumps(row)}" for row in placed.placement.tier.tolist())
    return "{\n" + ",\n".join(lines) + ',\n "tier": [\n' + rows + "\n ]\n}\n"


def write_placement(path: str | Path, placed: PlacedModel) -> None:
    """Write a placement file (JSON) whole or not at all; raises InputError where it cannot be written."""
    write_whole(path, placement_json(placed).encode())


def read_placement(path: str | Path) -> PlacedModel:
    """The placement in a file of `write_placement` and the model it is for; the order of the file's tiers is its own.

    Raises InputError for a file that cannot be read, another kind or schema, keys missing or unknown, values of
    another type, tiers that are not named, and bytes per tier that do not belong to the tiers.
    """
    path = Path(path)
    content = read_json(path, "placement")
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise InputError(f"{path.name} is not a placement file: its kind is not {KIND!r}")
    if content.get("schema") != PLACEMENT_SCHEMA:
        raise InputError(
            f"{path.name} has schema {content.get('schema')!r}, this version reads {PLACEMENT_SCHEMA}; place again"
        )
    try:
        placed = _placed(content)
    except InputError as error:
        raise InputError(f"{path.name}: {error}") from None
    if content["tier_bytes"] != placed.tier_bytes:
        raise InputError(
            f"{path.name}: tier_bytes does not belong to its tiers and shape; was the file edited by hand?"
        )
    return placed


def placement_csv(placed: PlacedModel) -> str:
    """A placement as CSV for spreadsheets: a row an expert, of `layer`, `expert` and the name of its `tier`."""
    rows = [
        f"{layer},{expert},{TIERS[number]}"
        for layer, row in zip(placed.layers, placed.placement.tier.tolist(), strict=True)
        for expert, number in enumerate(row)
    ]
    return "\n".join(["layer,expert,tier", *rows]) + "\n"


def read_placement_csv(path: str | Path, placed: PlacedModel) -> PlacedModel:
    """The placement with the tiers of a CSV file of `placement_csv`, whose rows may be some experts in any order.

    Raises InputError for another header, and a row that names no layer, expert or tier of the placement, or one twice.
    """
    path = Path(path)
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path.name} cannot be read as CSV: {first_line(error)}") from None
    if not lines or [word.strip() for word in lines[0]] != ["layer", "expert", "tier"]:
        raise InputError(f"{path.name} does not begin with the header layer,expert,tier")
    tier, seen = placed.placement.tier.copy(), set()
    for number, line in enumerate(lines[1:], start=2):
        if not line:
            continue
        words = [word.strip() for word in line]
        where = f"{path.name}, line {number}"
        if len(words) != 3 or not all(_NUMBER.fullmatch(word) for word in words[:2]) or words[2] not in TIERS:
            found = ",".join(line)[:60]
            raise InputError(f"{where}: found {found!r}, expected layer,expert,tier of {', '.join(TIERS)}")
        layer, expert = int(words[0]), int(words[1])
        if layer not in placed.layers or expert >= tier.shape[1]:
            raise InputError(f"{where}: there is no expert {expert} of layer {layer} in this placement")
        if (layer, expert) in seen:
            raise InputError(f"{where}: expert {expert} of layer {layer} stands twice")
        seen.add((layer, expert))
        tier[placed.layers.index(layer), expert] = TIERS.index(words[2])
    return replace(placed, placement=Placement(placed.placement.policy, tier))


_WORDS = {str: "text", int: "a whole number", dict: "an object", list: "a list", type(None): "null"}
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("kind", "policy"), (str,)),
    **dict.fromkeys(("shape", "tier_bytes", "made_from", "predicted"), (dict,)),
    **dict.fromkeys(("layers", "tiers", "tier"), (list,)),
    **{"schema": (int,), "n_model_layers": (int, type(None))},
}


def _placed(content: dict[str, Any]) -> PlacedModel:
    if content.keys() != _TYPES.keys():
        odd = sorted(content.keys() ^ _TYPES.keys())
        raise InputError(f"key {odd[0]!r} is {'unknown' if odd[0] in content else 'missing'}")
    for key, kinds in _TYPES.items():
        if type(content[key]) not in kinds:
            expected = " or ".join(_WORDS[kind] for kind in kinds)
            raise InputError(f"{key} is of type {type(content[key]).__name__}, expected {expected}")
    tiers, shape = content["tiers"], content["shape"]
    unknown = [name for name in tiers if name not in TIERS]
    if unknown or len(set(tiers)) != len(tiers) or not tiers:
        raise InputError(f"tiers are {tiers}, expected names of {', '.join(TIERS)}, each once")
    if shape.keys() != _SIZES or not all(isinstance(shape[key], str) for key in ("name", "dtype", "source")):
        raise InputError(
            f"shape has the keys {', '.join(sorted(map(str, shape)))}, expected {', '.join(sorted(_SIZES))}"
        )
    for key in _SIZES - {"name", "dtype", "source"}:
        _whole_numbers([shape[key]], key)
    _whole_numbers(content["layers"], "layers")
    rows = content["tier"]
    if not all(isinstance(row, list) and len(row) == shape["n_experts"] for row in rows):
        raise InputError(f"tier must hold lists of {shape['n_experts']} numbers, one a layer")
    numbers = np.array(_whole_numbers([number for row in rows for number in row], "tier"), dtype=np.int64)
    if (numbers >= len(tiers)).any():
        raise InputError(f"tier holds {numbers.max()}, expected 0 to {len(tiers) - 1}, of {', '.join(tiers)}")
    ours = np.array([TIERS.index(name) for name in tiers], dtype=np.int8)
    return PlacedModel(
        Placement(content["policy"], ours[numbers].reshape(len(rows), shape["n_experts"])),
        MoEShape(**shape),
        tuple(content["layers"]),
        content["n_model_layers"],
        content["made_from"],
        content["predicted"],
    )


def _whole_numbers(values: list[Any], key: str) -> list[int]:
    for value in values:
        if type(value) is not int or not 0 <= value < 2**31:
            raise InputError(f"{key} holds {value!r}, expected whole numbers from 0")
    return values
