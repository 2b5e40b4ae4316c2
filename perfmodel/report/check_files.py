"""What build servers read of a comparison: JUnit XML, JSON, and Markdown for the page of a job."""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from perfmodel import markdown, text
from perfmodel.report import junit
from perfmodel.report.baselines import update_words
from perfmodel.report.captures import (
    CASE_HEADER,
    N_NAME,
    case_cells,
    changed_lines,
    changed_tables,
    conclusion,
    model_line,
    remarks,
    telling,
    verdict_line,
)

if TYPE_CHECKING:  # these bring scipy and scikit-learn, which reading a trace does not need
    from perfmodel.regression import Case, Comparison, Measured

N_FIRST = 20  # rows that a summary shows at once
# A forge takes 1 MiB for the summary of a job's step: what the rows below a fold may take.
FOLDED_BYTES, CHANGED_BYTES = 500_000, 80_000
N_REMARKS = 20
SYMBOLS = {"bad": "⚠️", "mixed": "⚠️", "open": "❔", "good": "✅"}  # of what nothing fails by
_NUMBER = re.compile(r"[-+\d][\d.,]*(?: ?(?:[A-Za-zµ%/]{1,9}|to [\d.]+x?))?", re.ASCII)  # with a unit or an end


def check_json(comparison: "Comparison", fail_on: Sequence[str], *, must_conclude: bool = False) -> str:
    """A comparison as the JSON that `check --json` prints and `--json-file` writes, its keys always in this order."""
    return json.dumps(comparison.to_json(fail_on, must_conclude=must_conclude), indent=2, allow_nan=False) + "\n"


def check_junit(comparison: "Comparison", fail_on: Sequence[str], *, must_conclude: bool = False) -> str:
    """A comparison as JUnit XML, one test case for all workloads together and one for each, lost ones last.

    Cases that meet one of the conditions `fail_on` fail, inconclusive and lost ones are skipped (or fail: all together
    with `must_conclude`, lost ones by `missing`), others pass; each carries its numbers, and as its time that of the
    candidate in s.
    """
    cases = [_test_case(comparison, case, fail_on, must_conclude=must_conclude) for case in comparison.cases]
    cases += [_lost(one, is_failure="missing" in fail_on) for one in comparison.lost]
    said = {
        "baseline": comparison.baseline,
        "candidate": comparison.candidate,
        "margin_frac": f"{comparison.margin_frac:g}",
        "axes": ",".join(comparison.axes),
        "model": comparison.model or "",
        "fail_on": ",".join(fail_on),
    }
    return junit.suite(f"perfmodel check {comparison.baseline} {comparison.candidate}", said, cases)


def _case_of(label: str, workload: str, time_ns: float) -> ET.Element:
    """A test case under what tells it from all others: workloads may share their label, such as those of two seeds."""
    name = label if label == workload else f"{label} ({workload})"
    return junit.case_of("perfmodel.check", name, time_ns)


def _lost(one: "Measured", *, is_failure: bool) -> ET.Element:
    """The test case of a workload that the candidate did not measure."""
    case = _case_of(one.label, one.workload, 0.0)
    message = "missing: the baseline measured this workload, the candidate did not"
    return junit.failed(case, "missing", message) if is_failure else junit.skipped(case, message)


def _test_case(comparison: "Comparison", case: "Case", fail_on: Sequence[str], *, must_conclude: bool) -> ET.Element:
    verdict = case.verdict
    found = _case_of(verdict.label, verdict.workload, verdict.candidate_ns)
    numbers = _numbers(comparison, case)
    failures = comparison.failures_of(case, fail_on)
    is_open = verdict.verdict == "inconclusive"
    if is_open and must_conclude and case is comparison.overall:
        failures.append("inconclusive")
    if failures:
        return junit.failed(found, failures[0], f"{failures[0]}: {numbers[0]}", "\n".join(numbers))
    if is_open:
        return junit.skipped(found, f"inconclusive: {numbers[0]}{_more_wanted(case)}")
    return junit.passed(found, "\n".join(numbers))


def _numbers(comparison: "Comparison", case: "Case") -> list[str]:
    """The numbers behind a case, a line for each question."""
    verdict, found = case.verdict, case.expectation
    lines = [
        f"{verdict.ratio:.3f}x the baseline's time (90 % interval {verdict.ratio_low:.3f} to {verdict.ratio_high:.3f}, "
        f"margin {100 * comparison.margin_frac:g} %, {verdict.n_runs_baseline} and {verdict.n_runs_candidate} runs)",
        f"{text.ns(verdict.candidate_ns)} against {text.ns(verdict.baseline_ns)}",
    ]
    if found is not None:
        low, high = text.ns(found.model_low_ns), text.ns(found.model_high_ns)
        lines.append(
            f"{found.verdict}: measured {text.ns(found.measured_ns)} ({text.ns(found.measured_low_ns)} to "
            f"{text.ns(found.measured_high_ns)}), model {comparison.model} {text.ns(found.model_ns)} ({low} to {high})"
        )
    if case.expected_ratio not in (None, 1.0):
        lines.append(f"by the calibrated rates the model expects {case.expected_ratio:.3f}x the baseline's time")
    if case.part:
        lines.append(f"most of it in {case.part}")
    if case is comparison.overall:
        lines += [*changed_lines(comparison), *(f"note: {words}" for words in remarks(comparison))]
    return [*lines, f"{verdict.verdict}, {case.cell}{_more_wanted(case)}"]


def _more_wanted(case: "Case") -> str:
    n = case.verdict.n_more_runs
    return f", {n} more runs wanted on each side" if n else ""


def check_markdown(comparison: "Comparison", fail_on: Sequence[str]) -> str:
    """A comparison as Markdown for the summary of a job: the verdict in one line, at most N_FIRST workloads, the rest
    and what changed below folds. Names stand in code spans, so that nothing in them is interpreted."""
    failures = comparison.failures(fail_on)
    # What is slower is not well only because nothing was to fail by it.
    symbol = "❌" if failures else SYMBOLS[conclusion(comparison)[0]]
    words = f"{symbol} **{verdict_line(comparison)}**"
    if failures:
        words += f" ({', '.join(failures)})"
    shown = telling(comparison)
    first = shown[:N_FIRST]
    rest = [case for case in comparison.each if not any(case is one for one in first)]
    parts = [
        words,
        f"{markdown.code(comparison.baseline, N_NAME)} → {markdown.code(comparison.candidate, N_NAME)}. "
        + markdown.plain(model_line(comparison)),
    ]
    said = [f"- {markdown.plain(line)}" for line in (*changed_lines(comparison), *remarks(comparison))[:N_REMARKS]]
    parts += ["\n".join(said)] if said else []
    if comparison.model is not None:
        cells = [(name, str(n)) for name, n in comparison.cells().items() if n]
        parts.append(markdown.table([name for name, _ in cells], [[n for _, n in cells]]).rstrip())
    head = [*CASE_HEADER[:-1], "cell, or runs wanted"]
    parts.append(markdown.table(head, list(map(_case_row, first))).rstrip())
    if rest:
        body = _bounded(head, map(_case_row, rest), len(rest), FOLDED_BYTES)
        parts.append(markdown.folded(text.counted(len(rest), "other workload"), body))
    for one in changed_tables(comparison):
        rows = (list(map(_cell, row)) for row in one.rows)
        parts.append(markdown.folded(one.title, _bounded(one.head, rows, len(one.rows), CHANGED_BYTES)))
    return "\n\n".join(filter(None, [*parts, update_words(comparison)])) + "\n"


def _case_row(case: "Case") -> list[str]:
    label, *numbers = case_cells(case)
    return [markdown.code(label, N_NAME), *numbers]


def _bounded(head: Sequence[str], rows: Iterable[Sequence[str]], n_rows: int, n_bytes: int) -> str:
    """A table of as many rows as so many bytes hold, and how many are left out."""
    kept: list[Sequence[str]] = []
    for row in rows:
        n_bytes -= sum(len(cell.encode()) + 3 for cell in row) + 2
        if n_bytes < 0:
            break
        kept.append(row)
    left = n_rows - len(kept)
    return markdown.table(list(map(markdown.plain, head)), kept) + (
        f"\n... and {text.count(left)} more\n" if left else ""
    )


def _cell(words: str) -> str:
    """A number as it is, words as a code span."""
    return words if _NUMBER.fullmatch(words) else markdown.code(words, markdown.N_SENTENCE)
