"""What an export is, and what an engine loses of a placement because it cannot place single experts."""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from perfmodel import text
from perfmodel.errors import InputError
from perfmodel.files import write_whole
from perfmodel.placement import Loads

from ..files import PlacedModel

Kept = NDArray[np.float64]  # the part of each expert's weights in device memory, 0 to 1, `[layer, expert]`


@dataclass(frozen=True)
class Rounding:
    """What a placement asked for and what an engine's format gives, over all layers.

    Experts count by the part of their weights on the device, so a projection alone is a part of one. Shares are of all
    assignments, each layer with the same weight, and null where no load was given; where only a part of an expert is
    on the device, that part of its assignments counts.
    """

    asked_bytes: float
    got_bytes: float
    n_asked: int
    n_got: float
    asked_frac: float | None
    got_frac: float | None

    @property
    def lost_frac(self) -> float | None:
        """Share of all assignments that the format takes from the device; below 0 where it adds some, null unknown."""
        return None if self.asked_frac is None or self.got_frac is None else self.asked_frac - self.got_frac

    @property
    def is_exact(self) -> bool:
        """Does the format keep as many experts as were asked for, and as large a share of assignments."""
        return self.n_asked == self.n_got and not self.lost_frac

    def words(self) -> str:
        """One sentence on what was asked for and what comes out."""
        got = f"{self.n_got:,.0f}" if self.n_got == round(self.n_got) else f"{self.n_got:,.1f}"
        lost = self.lost_frac
        share = (
            ""
            if lost is None
            else f"; {text.frac(self.got_frac)} of assignments instead of {text.frac(self.asked_frac)}"
        )
        return (
            f"asked for {text.count(self.n_asked)} resident experts in {text.n_bytes(self.asked_bytes)}, "
            f"this format keeps {got} in {text.n_bytes(self.got_bytes)}{share}"
        )


@dataclass(frozen=True)
class Exported:
    """Files by name, the command-line options that go with them, what to know of both in sentences, and the rounding.

    The rounding is null where a format places no experts in device memory: loads, and maps of devices.
    """

    files: Mapping[str, bytes]
    flags: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    rounding: Rounding | None = None


def write(folder: str | Path, exported: Exported) -> list[Path]:
    """Write the files of an export into a folder, each beside and then renamed; their paths.

    Raises InputError where one cannot be written.
    """
    paths = [Path(folder) / name for name in exported.files]
    for path, content in zip(paths, exported.files.values(), strict=True):
        write_whole(path, content)
    return paths


def archive(exported: Exported, name: str) -> tuple[str, bytes]:
    """An export as the one file that it is, or a .zip of its files: file name and content. What to know of it and the
    options that go with it are in a zip as `README.txt`."""
    if len(exported.files) == 1:
        return next(iter(exported.files.items()))
    kept = [] if exported.rounding is None else [exported.rounding.words()]
    words = "\n".join([*exported.flags, "", *dict.fromkeys([*exported.warnings, *kept])]) + "\n"
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for path, content in {**exported.files, "README.txt": words.encode()}.items():
            file.writestr(zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)
    return f"{name}.zip", packed.getvalue()


def npy(array: NDArray[np.generic]) -> bytes:
    """The bytes of an .npy file of one array."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def compact_json(value: object) -> bytes:
    """JSON in one line, as bytes."""
    return (json.dumps(value) + "\n").encode()


def model_rows(placed: PlacedModel, rows: NDArray[np.generic], dense_row: object) -> NDArray[np.generic]:
    """Rows of the placement's layers among those of all layers of the model, `[n_model_layers, ...]`.

    `dense_row` stands for each layer without experts. Without `n_model_layers` the model ends with the last MoE layer.
    """
    n_layers = placed.n_model_layers or placed.layers[-1] + 1
    whole = np.empty((n_layers, *rows.shape[1:]), dtype=rows.dtype)
    whole[:] = dense_row
    whole[list(placed.layers)] = rows
    return whole


def unknown_depth(placed: PlacedModel) -> tuple[str, ...]:
    """The sentence about a model whose number of layers is not known; none otherwise."""
    if placed.n_model_layers is not None:
        return ()
    return (f"the number of layers of the model is not known; {placed.layers[-1] + 1} is assumed",)


def rounding(placed: PlacedModel, kept: Kept, load: Loads | None = None) -> Rounding:
    """What a placement asked for against what a format keeps on the device: the part `kept[layer, expert]` of each.

    `load[layer, expert]` are counts or shares of the layers of the placement; without it shares are null. Raises
    InputError where the load is of another shape, negative or all zero in a layer.
    """
    share = None if load is None else layer_shares_of(placed, load)
    n_layers, resident = len(placed.layers), placed.resident
    return Rounding(
        asked_bytes=int(resident.sum()) * placed.shape.expert_bytes,
        got_bytes=float(kept.sum()) * placed.shape.expert_bytes,
        n_asked=int(resident.sum()),
        n_got=float(kept.sum()),
        asked_frac=None if share is None else float((share * resident).sum()) / n_layers,
        got_frac=None if share is None else float((share * kept).sum()) / n_layers,
    )


def layer_shares_of(placed: PlacedModel, load: Loads) -> NDArray[np.float64]:
    """Each expert's share of its layer's assignments, `[layer, expert]`; raises InputError for a load that has none."""
    if load.shape != placed.placement.tier.shape:
        raise InputError(f"load of shape {load.shape}, expected {placed.placement.tier.shape} as the placement has")
    if not np.isfinite(load).all() or (load < 0).any() or not load.any(axis=1).all():
        raise InputError("the load must be finite, not negative, and not all zero in a layer")
    shares: NDArray[np.float64] = load / load.sum(axis=1, keepdims=True)
    return shares


def resident_worth(placed: PlacedModel, load: Loads | None) -> NDArray[np.float64]:
    """What whole layers are chosen by, `[layer]`: the resident experts' share of assignments, else their number."""
    worth = placed.resident if load is None else layer_shares_of(placed, load) * placed.resident
    return np.asarray(worth.sum(axis=1), dtype=np.float64)


def most_worth_first(placed: PlacedModel, load: Loads | None) -> NDArray[np.int64]:
    """The layers in the order in which they deserve the device, those of equal worth with the later ones first.

    Late ones first because engines offload the first layers (`--n-cpu-moe` counts from the start).
    """
    worth = resident_worth(placed, load)
    return (len(worth) - 1 - np.argsort(-worth[::-1], kind="stable")).astype(np.int64)
