"""Workloads that changed for themselves, and what they have in common."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from perfmodel import text

Mask = NDArray[np.bool_]

FACTS = ("shape", "op", "dtype", "launch", "access", "residency", "routing")
LEAST_ALIKE, LEAST_FRAC = 2, 0.75  # workloads that share a fact, and the part of all that have it, to name the fact
MOST_GROUPS, N_NAMED = 3, 3
MOST_VALUES = 16  # of a fact, the commonest: pairs of them are tried, and a stranger's capture may have any number
PLAIN = {"launch": "calls launched by the host", "access": "resident experts", "residency": "no residency"}


def what_they_share(facts: pl.DataFrame, is_alone: Mask) -> list[str]:
    """Sentences on workloads that changed alone, `is_alone[workload]`: what sets them apart from the others in `facts`,
    a row each, or their names where nothing does."""
    left = is_alone.copy()
    found: list[str] = []
    conditions = list(_conditions(facts, is_alone)) if is_alone.any() else []
    while left.any() and len(found) < MOST_GROUPS:
        best = max(conditions, key=lambda one: _worth(one[1], one[2], is_alone, left), default=None)
        if best is None or _worth(best[1], best[2], is_alone, left)[0] == 0:
            break
        words, _, held = best
        n, n_alone = int(held.sum()), int((held & is_alone).sum())
        many = f"All {n} workloads" if n == n_alone else f"{n_alone} of the {n} workloads"
        found.append(f"{many} of {words} are slower for themselves: no part of the time explains them.")
        left &= ~held
    if left.any():
        rows = facts.filter(pl.Series(left)).head(N_NAMED)
        names = [f"{row['op']} {row['shape']}, {row['n_tokens']} tokens" for row in rows.iter_rows(named=True)]
        more = int(left.sum()) - len(names)
        found.append(
            f"{text.counted(int(left.sum()), 'workload')} slower alone, with nothing in common: {'; '.join(names)}"
            + (f" and {more} more." if more > 0 else ".")
        )
    return found


def _conditions(facts: pl.DataFrame, is_alone: Mask) -> Iterator[tuple[str, int, Mask]]:
    """What workloads may share, in words, of how many facts it is made, and which workloads have it, `[workload]`."""
    single: list[tuple[str, str, Mask]] = []
    for fact in FACTS:
        column = facts[fact].cast(pl.String)
        counts = column.filter(pl.Series(is_alone)).value_counts(name="n").sort(["n", fact], descending=[True, False])
        for value in counts.filter(pl.col("n") >= LEAST_ALIKE).head(MOST_VALUES)[fact].sort().to_list():
            words = PLAIN.get(fact, fact) if value is None or value == "resident" else f"{fact} {value}"
            single.append((fact, words, column.eq_missing(pl.Series([value], dtype=pl.String)).to_numpy()))
    tokens = facts["n_tokens"].to_numpy()
    low, high = int(tokens[is_alone].min()), int(tokens[is_alone].max())
    for words, held in (
        (f"{text.count(low)} tokens and more", tokens >= low),
        (f"up to {text.count(high)} tokens", tokens <= high),
        (f"{text.count(low)} to {text.count(high)} tokens", (tokens >= low) & (tokens <= high)),
    ):
        single.append(("n_tokens", words, held))
    for _, words, held in single:
        yield words, 1, held
    for one, other in combinations(single, 2):
        if one[0] != other[0]:
            yield f"{one[1]}, {other[1]}", 2, one[2] & other[2]


def _worth(n_facts: int, held: Mask, is_alone: Mask, left: Mask) -> tuple[int, float, int]:
    """How good a common factor is: new workloads that it names, the part of its workloads that changed alone, and few
    facts; nothing where it does not set them apart."""
    n, n_alone = int(held.sum()), int((held & is_alone).sum())
    n_new = int((held & left).sum())
    if n_new < LEAST_ALIKE or n_alone < LEAST_FRAC * n or n == len(held):
        return 0, 0.0, 0
    return n_new, n_alone / n, -n_facts
