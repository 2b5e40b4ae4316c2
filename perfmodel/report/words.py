"""Words and tables that every page is made of."""

import textwrap
from collections.abc import Sequence

from perfmodel import text

N_TOP = 10  # rows of a table
WIDTH = 120  # columns of a page where no terminal says how wide it is
MIN_NAME_WIDTH = 24


def table(rows: Sequence[Sequence[str]], header: Sequence[str], width: int | None = None) -> str:
    """Aligned columns, the first to the left and all others to the right.

    With a `width`, names in the first column lose their middle where the lines would be longer.
    """
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    if width is not None:
        room = width - sum(widths[1:]) - 2 * (len(widths) - 1)
        widths[0] = min(widths[0], max(room, MIN_NAME_WIDTH, len(header[0])))
        rows = [[text.shortened(row[0], widths[0]), *row[1:]] for row in rows]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def wrapped(words: str, width: int, first: str = "", others: str = "") -> str:
    """A paragraph of lines no longer than `width`, the first and the other lines behind their indents."""
    wrapper = textwrap.TextWrapper(max(width, 40), first, others, break_long_words=False, break_on_hyphens=False)
    return wrapper.fill(words)


def ratio(value: float | None) -> str:
    """A ratio of two figures in words, `n/a` for null."""
    return "n/a" if value is None else f"{value:,.2f}x"


def in_words(name: str, value: float | None) -> str:
    """A figure in words, by the unit at the end of its name; a count where there is none, `n/a` for null."""
    if value is None:
        return "n/a"
    if name == "flops_per_byte":
        return f"{value:,.1f}"
    writers = {
        "_flops_per_s": text.flops_per_s,
        "_bytes_per_s": text.bytes_per_s,
        "_bytes": text.n_bytes,
        "_ns": text.ns,
        "_frac": text.frac,
    }
    return next((write(value) for suffix, write in writers.items() if f"_{name}".endswith(suffix)), text.count(value))
