"""Words and tables that every page is made of."""

import textwrap
from collections.abc import Sequence

from perfmodel import text

N_TOP = 10  # rows of a table
WIDTH = 120  # columns of a page where no terminal says how wide it is
MIN_NAME_WIDTH = 24
BARS = "▁▂▃▄▅▆▇█"  # heights, lowest first
# Figures as the titles of columns.
HEADERS = {
    "n_calls": "calls",
    "n_copies": "number",
    "n_kernels": "kernels",
    "n_launches": "launches",
    "n_products": "products",
    "time_ns": "time",
    "time_frac": "share",
    "mean_ns": "mean",
    "exposed_ns": "exposed",
    "idle_ns": "devices idle then",
    "self_ns": "host time",
    "kernel_time_ns": "kernel time",
    "compute_time_ns": "compute",
    "communication_time_ns": "communication",
    "akd_ns": "average kernel duration",
    "kernel_busy_ns": "kernel busy",
    "gpu_busy_ns": "busy",
    "gpu_span_ns": "span",
    "gpu_idle_frac": "idle",
    "tklqt_ns": "TKLQT",
    "tklqt_frac": "share",
    "mean_delay_ns": "mean delay",
    "delay_median_ns": "median delay",
    "queue_ns": "queueing",
    "launch_call_ns": "launch calls",
    "inference_latency_ns": "latency",
    "copy_busy_ns": "copies",
    "copy_exposed_ns": "exposed",
    "communication_busy_ns": "communication",
    "communication_exposed_ns": "exposed",
    "gap_ns": "gaps",
    "launch_ns": "launching",
    "sync_ns": "syncing",
    "neither_ns": "neither",
    "bytes": "size",
    "bytes_per_s": "speed",
    "flops_per_s": "achieved",
    "flops_per_byte": "FLOP/B",
    "roof_frac": "of roof",
}


def table(rows: Sequence[Sequence[str]], header: Sequence[str], width: int | None = None) -> str:
    """Aligned columns, the first to the left and all others to the right; no name breaks a line.

    With a `width`, names in the first column lose their middle where the lines would be longer.
    """
    rows = [[text.printable(cell) for cell in row] for row in rows]
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
