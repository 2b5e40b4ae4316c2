"""Which chains of kernels always run together, and what would fusing them save: proximity score and ideal speed-up.

Equations 6 to 8 of SKIP (arXiv 2504.11750, section III-C). They hold where the host is the bound, and assume that every
launch costs the same and that fusing changes nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from perfmodel.errors import InputError
from perfmodel.intervals import PROCESS, STREAM
from perfmodel.launch import joined_kernels

CHAIN_LENGTHS = (2, 4, 8, 16, 32, 64, 128, 256, 512)  # those of the paper's Fig 7
SHORT_LENGTHS = tuple(length for length in CHAIN_LENGTHS if length <= 64)  # what is worth looking at in any trace

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Windows:
    """All windows of one length: where each begins, which chain it is, and the proximity score of that chain."""

    begins: Ints
    chain: Ints
    score: NDArray[np.float64]


def kernel_sequence(events: pl.DataFrame) -> pl.DataFrame:
    """In which order do kernels run, and where may a chain not reach across: columns `name`, `segment`.

    Kernels of one stream of one device in the order of their starts, streams one after another: kernels of different
    streams do not follow each other, however close their starts, nor do those of different ranks. A segment ends where
    the host waited for the device between two launches: at a `sync` call of the launching process. An orphan counts as
    launched when it started, by the only process of its rank that made calls, if there is one.
    """
    callers = events.filter(pl.col("kind").is_in(["launch", "sync"])).select(PROCESS).drop_nulls("process")
    only = callers.unique().filter(pl.len().over("rank") == 1).rename({"process": "only_process"})
    calls = events.filter(pl.col("kind") == "sync").select(*PROCESS, at="start_ns", is_sync=pl.lit(1))
    kernels = (
        joined_kernels(events)
        .join(only, on="rank", how="left", nulls_equal=True, maintain_order="left")
        .select(
            *("name", "start_ns", "rank", "device", "stream"),
            process=pl.coalesce("launch_process", "process", "only_process"),
            at=pl.coalesce("launch_start_ns", "start_ns"),
        )
    )
    n_waits = pl.col("is_sync").fill_null(0).cum_sum().over(PROCESS)
    return (
        pl.concat([calls, kernels], how="diagonal")
        .sort("at", maintain_order=True)
        .with_columns(n_waits=n_waits)
        .filter(pl.col("is_sync").is_null())
        .sort(*STREAM, "start_ns", maintain_order=True)
        .select("name", segment=pl.struct(*STREAM, "process", "n_waits").rle_id().cast(pl.Int64))
    )


def chains(events: pl.DataFrame, length: int, threshold: float = 1.0) -> pl.DataFrame:
    """Which chains of `length` kernels have a proximity score (Eq 6) of at least `threshold`.

    Columns `names` (the kernels in order), `n_chains` (how often it occurs, overlaps included), `n_first` (how often
    its first kernel occurs in the whole trace), `score` (their quotient); most frequent first.
    """
    sequence = kernel_sequence(events)
    names, ids = _name_ids(sequence)
    windows = _windows(ids, sequence["segment"].to_numpy(), length)
    _, at, count = np.unique(windows.chain, return_index=True, return_counts=True)
    kept = windows.score[at] >= threshold
    at, count = at[kept], count[kept]
    table = pl.DataFrame(
        {
            "names": [names.gather(ids[b : b + length]).to_list() for b in windows.begins[at]],
            "n_chains": count,
            "n_first": np.bincount(ids, minlength=1)[ids[windows.begins[at]]] if len(at) else [],
            "score": windows.score[at],
        },
        schema={"names": pl.List(pl.String), "n_chains": pl.Int64, "n_first": pl.Int64, "score": pl.Float64},
    )
    return table.sort("n_chains", descending=True, maintain_order=True)


def fusion_table(events: pl.DataFrame, lengths: Sequence[int] = CHAIN_LENGTHS) -> pl.DataFrame:
    """What would fusing save, for each chain length: one row each.

    Columns `length`, `n_kernels` (launches as they are), `n_unique_chains`, `n_fused` (occurrences of chains with score
    1 that do not overlap), `n_launches` (Eq 7) and `ideal_speedup` (Eq 8).
    """
    sequence = kernel_sequence(events)
    _, ids = _name_ids(sequence)
    segments = sequence["segment"].to_numpy()
    rows = []
    for length in lengths:
        windows = _windows(ids, segments, length)
        n_fused = _n_fused(windows, length)
        rows.append(
            {
                "length": length,
                "n_kernels": len(ids),
                "n_unique_chains": len(np.unique(windows.chain)),
                "n_fused": n_fused,
                "n_launches": len(ids) - n_fused * (length - 1),
                "ideal_speedup": ideal_speedup(len(ids), n_fused, length) if len(ids) else None,
            }
        )
    return pl.DataFrame(rows, schema_overrides={"ideal_speedup": pl.Float64})


def ideal_speedup(k_eager: int, n_fused: int, length: int) -> float:
    """How much faster would a host-bound run be with `n_fused` chains of `length` kernels each made one (Eq 7 and 8).

    Raises InputError when the chains hold more kernels than there are.
    """
    if k_eager <= 0 or length < 1 or n_fused < 0 or n_fused * length > k_eager:
        raise InputError(
            f"found {n_fused} chains of {length} kernels among {k_eager} launches; expected no more than fit"
        )
    return k_eager / (k_eager - n_fused * (length - 1))


def _name_ids(sequence: pl.DataFrame) -> tuple[pl.Series, Ints]:
    """The distinct names, and for every kernel which of them it has."""
    names = sequence["name"].cast(pl.String)
    distinct = names.unique(maintain_order=True)
    ids = names.replace_strict(distinct, pl.int_range(len(distinct), eager=True), return_dtype=pl.Int64)
    return distinct, ids.to_numpy()


def _windows(ids: Ints, segments: Ints, length: int) -> _Windows:
    """All windows of `length` kernels within one segment, with their chain and score."""
    if length < 2:
        raise InputError(f"a chain of {length} kernels; expected 2 or more")
    if len(ids) < length:
        empty = np.empty(0, np.int64)
        return _Windows(empty, empty, np.empty(0))
    begins = np.flatnonzero(segments[: len(ids) - length + 1] == segments[length - 1 :])
    _, chain, count = np.unique(_chain_ids(ids, length)[begins], return_inverse=True, return_counts=True)
    n_first = np.bincount(ids)[ids[begins]]
    return _Windows(begins, chain.astype(np.int64), count[chain] / n_first)


def _chain_ids(ids: Ints, length: int) -> Ints:
    """A number for the names in every window of `length`, the same exactly where the names are.

    Windows of twice the length are pairs of windows already numbered (Karp, Miller and Rosenberg 1972), so there are
    log2(length) sorts of n numbers and, unlike with a rolling hash, no collisions.
    """
    chain, done = ids, 1
    while done < length:
        step = min(done, length - done)  # the last pair may overlap
        pairs = chain[: len(chain) - step] * (int(chain.max()) + 1) + chain[step:]
        chain = np.unique(pairs, return_inverse=True)[1].astype(np.int64)
        done += step
    return chain


def _n_fused(windows: _Windows, length: int) -> int:
    """How many windows with score 1 fit without overlap, taken from the left, which is the most that can."""
    begins = windows.begins[windows.score >= 1]
    n_fused = at = 0
    while at < len(begins):
        n_fused += 1
        at = int(np.searchsorted(begins, begins[at] + length))
    return n_fused
