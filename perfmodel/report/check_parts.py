"""What a change of time consists of, in words and as a table."""

from typing import TYPE_CHECKING

from perfmodel import text
from perfmodel.report.words import table

if TYPE_CHECKING:  # these bring scipy and scikit-learn, which reading a trace does not need
    from perfmodel.regression import Case, Comparison, Detail, PartChange

PART_HEADER = ("part", "of the time", "takes", "90 %", "adds", "rests on")
DETAIL_HEADER = ("in profiles", "baseline", "candidate", "ratio")


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
        part.evidence,
    ]


def detail_cells(detail: "Detail") -> list[str]:
    """A detail of profiles as words, under DETAIL_HEADER."""
    a, b = (text.figure(detail.name, value) for value in (detail.baseline, detail.candidate))
    return [detail.name, a, b, "" if detail.ratio is None else f"{detail.ratio:.2f}x"]


def _added(frac: float) -> str:
    """A change as words, without a minus before nothing."""
    return f"{round(100 * frac, 1) + 0.0:+.1f} %"


def is_told(comparison: "Comparison") -> bool:
    """Whether a page tells the parts: where anything is slower, or all together faster."""
    is_faster = comparison.overall.verdict.verdict == "improved"
    return bool(comparison.parts) and (bool(comparison.slower()) or is_faster)


def parts_line(comparison: "Comparison") -> str:
    """The change over all workloads as the sum of its parts, in one line."""
    explained, left = sum(part.change_frac for part in comparison.parts), comparison.unexplained_frac or 0.0
    named = comparison.overall.part
    slower = f", most of it in {named}" if named else ""
    return (
        f"what changed: {_added(explained + left)} in the mean of the workloads{slower}; the parts explain "
        f"{_added(explained)}, {_added(left)} are left"
    )


def parts_page(comparison: "Comparison") -> list[str]:
    """Paragraphs on what changed: the line, the table of parts, findings, and what moved in profiles."""
    if not is_told(comparison):
        return ["\n".join(comparison.findings)] if comparison.findings else []
    rows = [part_cells(part) for part in comparison.parts]
    evidence = "\n".join(f"{part.part}: {part.evidence}" for part in comparison.parts)
    found = [parts_line(comparison), table([row[:-1] for row in rows], PART_HEADER[:-1]) + "\n" + evidence]
    found += ["\n".join(comparison.findings)] if comparison.findings else []
    told = [detail_cells(detail) for detail in comparison.details if detail.kind == "metric"]
    if told:
        found.append(table(told, DETAIL_HEADER) + "\nCounts and shares of profiled time, which is no source of times.")
    return found


def part_words(case: "Case") -> str:
    """What a slower workload's time grew by, in one line; empty where none is named."""
    return f"most of it in {case.part}" if case.part else ""
