"""What a change of time consists of, in words and as a table."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from perfmodel import text

if TYPE_CHECKING:  # these bring scipy and scikit-learn, which reading a trace does not need
    from perfmodel.regression import Comparison, Detail, PartChange

PART_HEADER = ("parts of the time", "share", "takes", "90 %", "adds")
DETAIL_HEADER = ("in profiles, which are no source of times", "baseline", "candidate", "ratio")
SELF_FRAC = " self_frac"  # at the end of an operator's name: its share of the profiled time
METRIC_WORDS = {
    "n_kernels": "kernels of a step",
    "n_kernels_graph": "kernels of a step, replayed from graphs",
    "gpu_idle_frac": "devices idle",
    "tklqt_per_kernel_time": "launch delay over kernel time",
}


def part_cells(part: "PartChange") -> list[str]:
    """A part as words, under PART_HEADER."""
    factor = "" if part.factor is None else f"{part.factor:.2f}x"
    known = part.factor_low is not None and part.factor_high is not None
    return [
        part.part,
        text.frac(part.share_frac),
        factor,
        f"{part.factor_low:.2f} to {part.factor_high:.2f}" if known else "",
        _added(part.change_frac),
    ]


def detail_cells(detail: "Detail") -> list[str]:
    """A detail of profiles as words, under DETAIL_HEADER."""
    a, b = (text.figure(detail.name, value) for value in (detail.baseline, detail.candidate))
    name = METRIC_WORDS.get(detail.name, detail.name)
    name = f"{name.removesuffix(SELF_FRAC)}, share of the time" if name.endswith(SELF_FRAC) else name
    return [name, a, b, "" if detail.ratio is None else f"{detail.ratio:.2f}x"]


def _added(frac: float) -> str:
    """A change as words, without a minus before nothing."""
    return f"{round(100 * frac, 1) + 0.0:+.1f} %"


def parts_line(comparison: "Comparison") -> str:
    """The change over all workloads as the sum of its parts, in one line."""
    explained, left = sum(part.change_frac for part in comparison.parts), comparison.unexplained_frac or 0.0
    named = comparison.overall.part
    slower = f", most of it in {named}" if named else ""
    return (
        f"what changed: {_added(explained + left)} in the mean of the workloads{slower}; the parts explain "
        f"{_added(explained)}, {_added(left)} are left"
    )


def part_lines(comparison: "Comparison") -> list[str]:
    """What the change over all workloads consists of, in sentences: the sum, what each part rests on, findings."""
    if not comparison.is_divided:
        return list(comparison.findings)
    evidence = [f"{part.part}: {part.evidence}" for part in comparison.parts if part.evidence]
    return [parts_line(comparison), *evidence, *comparison.findings]


def part_tables(comparison: "Comparison") -> list[tuple[Sequence[str], list[list[str]]]]:
    """Headers and rows, as words, of the parts of the change and of what moved in profiles."""
    if not comparison.is_divided:
        return []
    metrics = [detail_cells(detail) for detail in comparison.details if detail.kind == "metric"]
    return [(PART_HEADER, list(map(part_cells, comparison.parts))), (DETAIL_HEADER, metrics)]
