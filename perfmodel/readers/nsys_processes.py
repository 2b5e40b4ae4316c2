"""Whose is a record of Nsight Systems: processes use the same correlation ids, so each gets a number of its own."""

from dataclasses import dataclass, field

import polars as pl

PROCESS = 2**24  # a process begins at this bit of a globalTid


@dataclass
class Processes:
    """The processes met so far, with a number for each, and those of them that made calls."""

    numbers: dict[int, int] = field(default_factory=dict)
    callers: set[int] = field(default_factory=set)

    def owners(self, tid: pl.Series, are_calls: bool) -> tuple[pl.Expr, pl.Expr]:
        """The process of each record, by its globalTid or globalPid, and the number of that process; null for unknown.

        Exports that leave out the process of device work belong to the one process that made calls, of which there must
        be records before; with several such processes it is unknown.
        """
        owner = _owner(tid)
        known = owner.unique().drop_nulls().sort().to_list()
        for process in known:
            self.numbers.setdefault(process, len(self.numbers))
        if are_calls:
            self.callers.update(known)
        filled = owner.fill_null(next(iter(self.callers))) if len(self.callers) == 1 else owner
        number = filled.replace_strict(self.numbers, default=None, return_dtype=pl.Int64)
        return _expression(owner), _expression(number)


def _owner(tid: pl.Series) -> pl.Series:
    """The process of each record, one value where all have the same."""
    low, high = tid.to_frame("tid").select(low=pl.min("tid") // PROCESS, high=pl.max("tid") // PROCESS).row(0)
    if low == high and tid.null_count() in (0, len(tid)):
        return pl.Series("owner", [low], dtype=pl.Int64)
    return (tid // PROCESS).alias("owner")


def _expression(values: pl.Series) -> pl.Expr:
    return pl.lit(values[0], pl.Int64) if len(values) == 1 else pl.lit(values)
