"""Routing files: counts of token-expert assignments in .npy, .npz or .csv, chosen as `FILE[#KEY][@LAYER]`. numpy only.

The arrays of an .npz that `write_counts` made are `counts` int64 `[steps, layers, experts]` and what they belong to:
`layers`, `top_k` and `n_tokens`.
"""

import os
import re
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError

from .patterns import Shares, pattern_usages

Counts = NDArray[np.int64]

MAX_COUNT = 1e18
COUNTS = "counts"  # the array that is meant where none is named
BESIDE_COUNTS = ("layers", "top_k", "n_tokens")


def split_source(source: str) -> tuple[str, str, int | None]:
    """The file, key and layer of `FILE[#KEY][@LAYER]`; the key is empty and the layer null where they are not given.

    A file that exists under the whole name is that file, whatever signs are in its name.
    """
    if Path(source).is_file():
        return source, "", None
    found = re.fullmatch(r"(?P<rest>.+)@(?P<layer>\d{1,9})", source, re.DOTALL)
    rest, layer = (found["rest"], int(found["layer"])) if found else (source, None)
    if Path(rest).is_file():
        return rest, "", layer
    file, _, key = rest.partition("#")
    return file, key, layer


def read_shares(source: str) -> Shares:
    """Shares `[layer, expert]` of a routing file: .npy, .npz or .csv of counts `[layers, experts]` or `[steps, layers,
    experts]` (summed over steps). Of an .npz with several arrays one is chosen as `FILE#KEY`, else the one called
    `counts`; of several layers one as `FILE@LAYER`, counted from 0 in the order of the file.

    Expert ids keep their order. Raises InputError for a missing file, other shapes, negative or all-zero layers.
    """
    file, key, layer = split_source(source)
    path = Path(file)
    if not path.is_file():
        known = ", ".join(pattern_usages())
        raise InputError(f"no routing file {file!r}, and no pattern of that name; patterns: {known}")
    counts = _counts(path, _choose(path, _read_arrays(path), key))
    if layer is not None:
        if layer >= len(counts):
            raise InputError(f"{path.name} has no layer {layer}; its layers are 0 to {len(counts) - 1}")
        counts = counts[layer : layer + 1]
    if not counts.any(axis=1).all():
        raise InputError(f"{path.name}: counts must be 0 to {MAX_COUNT:g}, and not all zero in a layer")
    sums = counts.sum(axis=1)
    shares: Shares = counts / sums[:, None]
    return shares


def layer_shares(source: str) -> Shares:
    """Shares `[1, expert]` of one layer of a routing file: the one after `@`, else the first (see `read_shares`)."""
    return read_shares(source)[:1]


def routing_keys(path: str | Path) -> list[str]:
    """The names of the arrays of counts in an .npz, in file order; empty for a file of one array without a name.

    What `write_counts` puts beside the counts is left out. Raises InputError for a file that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no routing file {str(path)!r}")
    keys = [key for key in _read_arrays(path) if key]
    return [key for key in keys if COUNTS not in keys or key not in BESIDE_COUNTS]


def write_counts(path: str | Path, counts: Counts, layers: NDArray[np.int64], top_k: int, n_tokens: Counts) -> None:
    """Write a routing file (.npz) whole or not at all: `counts[step, layer, expert]` and what they belong to.

    `layers[layer]` is the place of each MoE layer in its model, `n_tokens[step]` the tokens of each step. Raises
    InputError where a step's counts are not tokens x top-k, no suffix .npz, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise InputError(f"{path.name}: a routing file ends in .npz")
    if counts.ndim != 3 or (len(layers), len(n_tokens)) != (counts.shape[1], counts.shape[0]):
        raise InputError(
            f"{path.name}: counts of shape {counts.shape} with {len(layers)} layers and {len(n_tokens)} steps, "
            "expected [steps, layers, experts]"
        )
    if (counts < 0).any() or (counts.sum(axis=2) != n_tokens[:, None] * top_k).any():
        raise InputError(f"{path.name}: the counts of a step are not its tokens x top-k")
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            np.savez_compressed(
                file,
                counts=counts.astype(np.int64),
                layers=layers.astype(np.int64),
                top_k=np.int64(top_k),
                n_tokens=n_tokens.astype(np.int64),
            )
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise InputError(f"{path.name} cannot be written: {error.strerror or error}") from None
    finally:  # an interrupt, too, leaves nothing half-written
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _counts(path: Path, array: NDArray[np.generic]) -> NDArray[np.float64]:
    """Counts `[layer, expert]` of an array, summed over steps; InputError where it holds none."""
    counts = np.asarray(array)
    if counts.dtype.kind in "iuf":
        counts = counts.astype(np.float64)
    if counts.ndim == 3:
        counts = counts.sum(axis=0)
    if counts.ndim == 1:
        counts = counts[None, :]
    if counts.ndim != 2 or counts.dtype != np.float64 or not counts.size:
        raise InputError(
            f"{path.name}: found {counts.dtype} in {counts.ndim} dimensions, expected counts [layers, experts]"
        )
    if not ((counts >= 0) & (counts <= MAX_COUNT)).all():
        raise InputError(f"{path.name}: counts must be 0 to {MAX_COUNT:g}, and not all zero in a layer")
    return counts


def _choose(path: Path, arrays: dict[str, NDArray[np.generic]], key: str) -> NDArray[np.generic]:
    """The array of that key; without one the only array, or the one called `counts`."""
    if "" in arrays and key:
        raise InputError(f"{path.name} holds one array without a name, so leave out #{key}")
    chosen = key or (next(iter(arrays)) if len(arrays) == 1 else COUNTS)
    if chosen not in arrays:
        raise InputError(f"{path.name} holds {', '.join(arrays)}; choose one as {path.name}#{next(iter(arrays))}")
    return arrays[chosen]


def _read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """The arrays of a file by name; the name of the one array of an .npy or .csv is empty."""
    try:
        if path.suffix == ".csv":
            text = path.read_text(encoding="utf-8")
            array = np.loadtxt(text.splitlines(), delimiter=",", ndmin=2) if text.strip() else np.empty((0, 0))
            return {"": array}
        with path.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            arrays = {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded}
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise InputError(f"{path.name} is not a routing file (.npy, .npz or .csv of counts): {error}") from None
    if not arrays:
        raise InputError(f"{path.name} holds no arrays")
    return arrays
