"""Routing files of every known form, chosen as `FILE[#KEY][@LAYER]`; docs/routing.md lists the forms.

What a file is, its first bytes say. numpy only, and polars for tables with a header and Parquet.
"""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError, first_line
from perfmodel.files import write_whole

from .arrays import BESIDE_COUNTS, COUNTS, draft_of_arrays, refuse_key
from .dumps import draft_of_dumps, is_dump
from .json_files import draft_of_json
from .patterns import Shares, pattern_usages
from .recording import MAX_LOAD, STEP_TOKENS, Draft, Hints, Recording, tokens_of
from .tables import bare_table, draft_of_csv, draft_of_parquet
from .torch_files import is_torch_file, read_torch

Counts = NDArray[np.int64]

KNOWN = (
    "counts or expert ids as .npy, .npz, .csv, .parquet, .json or .pt, SGLang's recordings as .pt, responses with "
    "routed_experts and passes with expert_counts as JSON"
)
BINARY = (".pt", ".pth", ".parquet", ".json", ".jsonl")  # which are known by their first bytes

SHIPPED = Path(__file__).parent.parent / "data" / "routing" / "olmoe-mixtral.npz"  # measured; see data/README.md


def split_source(source: str) -> tuple[str, str, int | None]:
    """The file, key and layer of `FILE[#KEY][@LAYER]`; the key is empty and the layer null where they are not given.

    A file or folder that exists under the whole name is that one, whatever signs are in its name.
    """
    if is_there(source):
        return source, "", None
    found = re.fullmatch(r"(?P<rest>.+)@(?P<layer>\d{1,9})", source, re.DOTALL)
    rest, layer = (found["rest"], int(found["layer"])) if found else (source, None)
    if is_there(rest):
        return rest, "", layer
    file, _, key = rest.partition("#")
    return file, key, layer


def is_there(name: str) -> bool:
    """Whether there is a file or folder of that name; nothing else can be read."""
    try:
        return bool(name) and (Path(name).is_file() or Path(name).is_dir())
    except OSError:  # longer than any name may be
        return False


def read_recording(
    source: str,
    *,
    n_experts: int | None = None,
    top_k: int | None = None,
    n_layers: int | None = None,
    step_tokens: int = STEP_TOKENS,
    kind: str | None = None,
    phase: str | None = None,
) -> Recording:
    """What a router did, from a file of any known form: `FILE[#KEY][@LAYER]`, or a FOLDER of SGLang's rank files.

    The arguments are what the file may not say: experts of a layer, experts of a token, layers of the model (dense
    ones too), tokens that make a step where the file lists tokens, whether whole numbers are `counts` or `ids`, and
    whether only `prefill` or `decode` passes count. LAYER is a row of the file, from 0. Idle layers are left out and
    noted. Raises InputError for a missing, damaged or unknown file, and where it contradicts the arguments.
    """
    hints = Hints(n_experts, top_k, n_layers, step_tokens, kind, phase)
    name, draft = _read(source, hints, is_lenient=False)
    for what, found, expected in (("experts", draft.loads.shape[2], n_experts), ("top-k", draft.top_k, top_k)):
        if None not in (found, expected) and found != expected:
            raise InputError(f"{name}: found {what} {found}, expected {expected}")
    if draft.phase != phase:
        raise InputError(f"{name} does not say which of its tokens are {phase}; leave phase out")
    draft = _without_idle_layers(draft)
    if top_k is not None and draft.top_k is None:
        draft = _with_tokens(draft, top_k)
    return Recording(name, draft.loads, draft.layers, draft.top_k, draft.n_tokens, draft.is_ordered, draft.notes)


def read_shares(source: str, n_experts: int | None = None) -> Shares:
    """Shares `[layer, expert]` of a routing file of any known form, summed over steps (see `read_recording`).

    Of several arrays one is chosen as `FILE#KEY`, else the one called `counts`; of several layers one as `FILE@LAYER`,
    counted from 0 in the order of the file. Expert ids keep their order; of a file that lists ids, `n_experts` says how
    many experts there are, else the largest id does. What may be counts or ids is counts. Dense layers of an engine's
    recording are left out. Raises InputError for a missing file, other shapes, negative or all-zero layers.
    """
    name, draft = _read(source, Hints(n_experts), is_lenient=True)
    if draft.has_dense_layers:
        draft = _without_idle_layers(draft)
    counts = draft.loads.sum(axis=0)
    if not counts.any(axis=1).all():
        raise InputError(f"{name}: counts must be 0 to {MAX_LOAD:g}, and not all zero in a layer")
    sums = counts.sum(axis=1)
    shares: Shares = counts / sums[:, None]
    return shares


def layer_shares(source: str) -> Shares:
    """Shares `[1, expert]` of one layer of a routing file: the one after `@`, else the first (see `read_shares`)."""
    return read_shares(source)[:1]


def routing_keys(path: str | Path) -> list[str]:
    """The names of the arrays of counts in an .npz or .pt, in file order; empty for a file of one array without a name.

    What `write_counts` puts beside the counts is left out. Raises InputError for a file that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no routing file {str(path)!r}")
    try:
        if is_torch_file(path):
            found = read_torch(path)
            return [] if is_dump(found) else [key for key in _tensors(path.name, found) if key]
        keys = [key for key in _numpy_arrays(path) if key] if _is_numpy(path) else []
    except InputError:
        raise
    except Exception as error:  # what reads a damaged file may raise anything at all
        raise InputError(f"{path.name} is not a routing file ({KNOWN}): {first_line(error)}") from None
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
    file = io.BytesIO()
    np.savez_compressed(
        file,
        counts=counts.astype(np.int64),
        layers=layers.astype(np.int64),
        top_k=np.int64(top_k),
        n_tokens=n_tokens.astype(np.int64),
    )
    write_whole(path, file.getvalue())


def _read(source: str, hints: Hints, is_lenient: bool) -> tuple[str, Draft]:
    """The name of the file of a source and what is in it: of one layer, where the source names it."""
    file, key, layer = split_source(source)
    path = Path(file)
    if not is_there(file):
        known = ", ".join(pattern_usages())
        raise InputError(f"no routing file {file!r}, and no pattern of that name; patterns: {known}")
    draft = _draft(path, key, hints, is_lenient)
    n_layers = draft.loads.shape[1]
    if layer is None:
        return path.name, draft
    if layer >= n_layers:
        raise InputError(f"{path.name} has no layer {layer}; its layers are 0 to {n_layers - 1}")
    one = slice(layer, layer + 1)
    return path.name, replace(draft, loads=draft.loads[:, one], layers=draft.layers[one])


def _with_tokens(draft: Draft, top_k: int) -> Draft:
    """A draft of counts with top-k and the tokens of each step, where its counts are a whole number of them."""
    n_tokens = tokens_of(draft.loads, top_k)
    if n_tokens is None:
        words = f"the loads of a step are no whole number of tokens x top-k {top_k}, the same in all layers"
        return replace(draft, notes=(*draft.notes, words))
    return replace(draft, top_k=top_k, n_tokens=n_tokens)


def _without_idle_layers(draft: Draft) -> Draft:
    """A draft without the layers that have no load in any step, where another has."""
    busy = np.asarray(draft.loads.any(axis=(0, 2)))
    if busy.all() or not busy.any():
        return draft
    idle = draft.layers[~busy]
    words = (
        f"layer {idle[0]} has no load, as a dense layer, and is left out"
        if len(idle) == 1
        else f"{len(idle)} layers ({idle[0]} to {idle[-1]}) have no load, as dense layers, and are left out"
    )
    notes = (*draft.notes, words)
    return replace(draft, loads=draft.loads[:, busy], layers=draft.layers[busy], notes=notes)


def _draft_of_folder(path: Path, key: str, hints: Hints) -> Draft:
    refuse_key(path.name, key)
    dumps = [found for file in sorted(path.glob("*.pt")) if is_torch_file(file) and is_dump(found := read_torch(file))]
    if not dumps:
        raise InputError(f"{path.name} is a folder without .pt dumps of forward passes, which SGLang writes by rank")
    return draft_of_dumps(path.name, dumps, hints)


def _draft(path: Path, key: str, hints: Hints, is_lenient: bool) -> Draft:
    """What is in a file or folder, whatever its form; InputError where it is none that is known."""
    try:
        if path.is_dir():
            return _draft_of_folder(path, key, hints)
        if not path.stat().st_size:
            raise InputError(f"{path.name} is empty")
        if _begins(path, b"\x1f\x8b"):
            raise InputError(f"{path.name} is compressed by gzip; unpack it first")
        if is_torch_file(path):
            found = read_torch(path)
            if is_dump(found):
                refuse_key(path.name, key)
                return draft_of_dumps(path.name, [found], hints)
            return draft_of_arrays(path.name, _tensors(path.name, found), key, hints, is_lenient)
        if _begins(path, b"PAR1"):
            refuse_key(path.name, key)
            return draft_of_parquet(path, hints)
        if _begins(path, b"{", b"["):
            return draft_of_json(path, key, hints, is_lenient)
        if _is_numpy(path):
            return draft_of_arrays(path.name, _numpy_arrays(path), key, hints, is_lenient)
        if path.suffix in BINARY:
            raise ValueError("its first bytes are of no such file")
        table = draft_of_csv(path, hints, is_lenient)
        if table is None:
            return draft_of_arrays(path.name, {"": bare_table(path)}, key, hints, is_lenient)
        refuse_key(path.name, key)
        return table
    except InputError:
        raise
    except Exception as error:  # what reads a damaged file may raise anything at all
        raise InputError(f"{path.name} is not a routing file ({KNOWN}): {first_line(error)}") from None


def _begins(path: Path, *starts: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(starts)


def _is_numpy(path: Path) -> bool:
    return path.suffix in (".npy", ".npz") or _begins(path, b"\x93NUMPY", b"PK")


def _numpy_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npy or .npz by name; the name of the one array of an .npy is empty."""
    with path.open("rb") as stream:
        loaded = np.load(stream, allow_pickle=False)
        arrays = {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded}
    arrays = {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}  # a zip may hold others
    if not arrays:
        raise InputError(f"{path.name} holds no arrays")
    return arrays


def _tensors(name: str, found: object) -> dict[str, NDArray[Any]]:
    """The arrays of what torch.save wrote by name, of a list by place; the name of one that is alone is empty."""
    if isinstance(found, np.ndarray):
        return {"": found}
    named = found if isinstance(found, dict) else dict(enumerate(found)) if isinstance(found, list | tuple) else {}
    arrays = {str(key): value for key, value in named.items() if isinstance(value, np.ndarray)}
    if not arrays:
        raise InputError(f"{name} holds no tensors of numbers, alone or in a dict or list; known are {KNOWN}")
    return arrays
