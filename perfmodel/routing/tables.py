"""Recordings from tables: CSV (or tabs, semicolons, blanks) of counts or of `layer,expert` rows, Parquet of either.

A table is *wide*, a row for each layer and a column for each expert, or *long*, a row for each selection or each count.
polars is imported where a table has a header or is Parquet.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perfmodel.errors import InputError, first_line

from .recording import Draft, Hints, loads_of
from .selections import MAX_EXPERTS, MAX_SIZE

if TYPE_CHECKING:
    import polars as pl

COLUMNS = {  # what the columns of a long table are called
    "layer": ("layer", "layer_id", "layer_idx", "block"),
    "expert": ("expert", "expert_id", "expert_idx"),
    "count": ("count", "counts", "n_tokens", "tokens", "load", "weight"),
    "step": ("step", "pass", "forward_pass_id", "iteration"),
    "token": ("token", "token_id", "token_idx", "position"),
}
LONG = "layer, expert[, count][, step or token]"
MAX_LAYERS = 512  # rows of two or three numbers beyond any model's layers are no table of counts


def draft_of_csv(path: Path, hints: Hints, is_lenient: bool) -> Draft | None:
    """The recording in a CSV file of the long form, or with a header; null where it is a bare table of counts.

    Without a header, rows of two or three numbers are `layer,expert[,step]` where `hints.kind` is ids, or where there
    are more of them than a model has layers. `is_lenient` is whether what may be either is counts. Raises InputError
    for columns that are not known and for what may be either, ValueError for no CSV.
    """
    first = _first_row(path)
    sign = _separator(first)
    if first.count(sign or " ") > MAX_EXPERTS:
        raise InputError(f"{path.name} has more columns than {MAX_EXPERTS} experts")
    n_columns, has_header = len(first.split(sign)), not _are_numbers(first.split(sign))
    kind = hints.kind or ("ids" if has_header else _kind_of_rows(path, sign, n_columns, hints))
    if kind is None and not is_lenient:
        raise InputError(
            f"{path.name}: rows of {n_columns} numbers may be counts of as many experts, or layer,expert of "
            "selections; say which by kind, counts or ids"
        )
    if not has_header and kind != "ids":
        return None
    import polars as pl

    try:
        table = pl.read_csv(
            path, has_header=has_header, separator=sign or " ", comment_prefix="#", infer_schema_length=None
        )
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise ValueError(first_line(error)) from None
    table = table.rename({old: old.strip() for old in table.columns})
    if not has_header:
        table = table.rename(dict(zip(table.columns, ("layer", "expert", "step"), strict=False)))
    return draft_of_table(path.name, table, hints)


def bare_table(path: Path) -> NDArray[np.float64]:
    """The numbers of a table without a header; InputError where there are none."""
    lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.partition("#")[0].strip()]
    if not lines:
        raise InputError(f"{path.name} holds no numbers")
    return np.loadtxt(lines, delimiter=_separator(lines[0]), ndmin=2)


def _first_row(path: Path) -> str:
    with path.open("rb") as file:
        first = next((line for line in file if line.strip() and not line.startswith(b"#")), b"")
    return first.decode("utf-8-sig").strip()


def _separator(row: str) -> str | None:
    """What divides the columns of a row: a tab, semicolon or comma; null for blanks."""
    return next((sign for sign in "\t;," if sign in row), None)


def _kind_of_rows(path: Path, sign: str | None, n_columns: int, hints: Hints) -> str | None:
    """Whether rows without a header are counts or a layer and expert each (ids); null where they may be either."""
    if n_columns not in (2, 3) or n_columns == hints.n_experts:
        return "counts"
    with path.open("rb") as file:
        if sum(1 for line in file if line.strip()) > MAX_LAYERS:
            return "ids"
    rows = np.loadtxt(path, delimiter=sign, ndmin=2, encoding="utf-8-sig")
    may_be_ids = (rows == np.floor(rows)).all() and len(np.unique(rows[:, 0])) < len(rows)  # layers come again
    return None if may_be_ids else "counts"


def draft_of_parquet(path: Path, hints: Hints) -> Draft:
    """The recording in a Parquet file: wide or long, see `draft_of_table`."""
    import polars as pl

    try:
        table = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise InputError(f"{path.name} is a damaged Parquet file: {first_line(error)}") from None
    return draft_of_table(path.name, table, hints)


def draft_of_table(name: str, table: "pl.DataFrame", hints: Hints) -> Draft:
    """The recording in a long table, or in a wide one whose columns of experts are numbered (`0`, `expert_0`, ...)."""
    found = {
        meaning: next((column for column in table.columns if column.lower() in names), None)
        for meaning, names in COLUMNS.items()
    }
    if not table.height:
        raise InputError(f"{name} has no rows, expected {LONG}")
    if found["layer"] is not None and found["expert"] is not None:
        if found["token"] is not None and (found["count"] or "").lower() == "weight":
            found["count"] = None  # the router's weight of a selection, and not how many there are
        columns = {meaning: _numbers(name, table, column) for meaning, column in found.items() if column is not None}
        return _draft_of_rows(name, columns, hints)
    labels = [column for column in (found["layer"], found["step"], "") if column in table.columns]
    experts = [column for column in table.columns if column not in labels]
    if not experts or not all(re.fullmatch(r"\D*\d+", column) for column in experts):
        raise InputError(
            f"{name} is not a routing file: its columns are {', '.join(table.columns)[:80]}, expected {LONG}, or one "
            "for each expert"
        )
    experts.sort(key=lambda column: int(re.sub(r"\D", "", column)))
    counts = np.stack([_numbers(name, table, column) for column in experts], axis=1)
    place = {meaning: _numbers(name, table, found[meaning]) for meaning in ("layer", "step") if found[meaning]}
    if "layer" not in place:
        if "step" in place:
            raise InputError(f"{name} has a step and no layer in its rows, expected both")
        return Draft(loads_of(name, counts), np.arange(len(counts)))
    layers, row = np.unique(place["layer"], return_inverse=True)
    steps, step = np.unique(place.get("step", np.zeros(len(row))), return_inverse=True)
    if len(np.unique(step * len(layers) + row)) != len(row):
        raise InputError(f"{name} has two rows for the same step and layer")
    loads = np.zeros((len(steps), len(layers), counts.shape[1]))
    loads[step, row] = loads_of(name, counts)[0]
    return Draft(loads, _whole(name, "layer", layers, MAX_EXPERTS))


def _draft_of_rows(name: str, columns: dict[str, NDArray[Any]], hints: Hints) -> Draft:
    layers, layer = np.unique(_whole(name, "layer", columns["layer"], MAX_EXPERTS), return_inverse=True)
    expert = _whole(name, "expert", columns["expert"], MAX_EXPERTS)
    notes: tuple[str, ...] = ()
    n_experts = hints.n_experts
    if n_experts is None:
        n_experts = int(expert.max()) + 1
        notes = (f"the number of experts is not in the file; the largest id makes it {n_experts}",)
    if expert.max() >= n_experts:
        raise InputError(f"{name} names expert {expert.max()}, expected 0 to {n_experts - 1}")
    n_tokens = None
    step = np.zeros(len(expert), dtype=np.int64)
    if "step" in columns:
        step = np.unique(columns["step"], return_inverse=True)[1]
    elif "token" in columns:
        tokens, token = np.unique(columns["token"], return_inverse=True)
        step = token // hints.step_tokens
        n_tokens = np.bincount(np.arange(len(tokens)) // hints.step_tokens)
    shape = (int(step.max()) + 1, len(layers), n_experts)
    if np.prod(shape, dtype=np.float64) > MAX_SIZE:
        raise InputError(f"{name} would be {shape[0]} steps of {shape[1]} x {n_experts} counts, which is too many")
    count = columns.get("count")
    if count is not None:
        loads_of(name, count)
    place = np.ravel_multi_index((step, layer, expert), shape)
    loads = np.bincount(place, weights=count, minlength=int(np.prod(shape))).astype(np.float64).reshape(shape)
    if n_tokens is not None:
        top_k = int(loads[0, 0].sum() / n_tokens[0])
        if (loads.sum(axis=2) == (n_tokens * top_k)[:, None]).all():
            return Draft(loads, layers, top_k, n_tokens, notes=notes)
    return Draft(loads, layers, notes=notes)


def _are_numbers(words: list[str]) -> bool:
    try:
        np.array(words, dtype=np.float64)
    except ValueError:
        return False
    return True


def _numbers(name: str, table: "pl.DataFrame", column: str | None) -> NDArray[Any]:
    """A column as numbers; InputError for words and for gaps."""
    import polars as pl

    series = table[str(column)]
    if series.dtype == pl.String:  # blanks around a number make it a word
        series = series.str.strip_chars().cast(pl.Float64, strict=False)
    if not series.dtype.is_numeric():
        raise InputError(f"{name}: column {column} holds {series.dtype}, expected numbers")
    if series.null_count():
        raise InputError(f"{name}: column {column} has no number in {series.null_count()} of {len(series)} rows")
    return series.to_numpy()


def _whole(name: str, what: str, values: NDArray[Any], limit: int) -> NDArray[np.int64]:
    if not ((values >= 0) & (values < limit)).all() or (values != np.floor(values)).any():
        raise InputError(f"{name}: its column {what} must hold whole numbers from 0 to {limit - 1}")
    return np.asarray(values, dtype=np.int64)
