"""What build servers read of a comparison of captures: JUnit XML, and Markdown for the page of a job."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from perfmodel import markdown, text
from perfmodel.report.baselines import update_words
from perfmodel.report.captures import (
    CASE_HEADER,
    QUANTITY_HEADER,
    case_cells,
    model_line,
    quantity_cells,
    telling,
    verdict_line,
)
from perfmodel.report.check_parts import PART_HEADER, is_told, part_cells, part_words, parts_line
from perfmodel.report.check_traces import moved_tables, trace_lines

if TYPE_CHECKING:  # these bring scipy and scikit-learn, which reading a trace does not need
    from perfmodel.regression import Case, Comparison

N_FIRST = 20  # rows that a summary shows at once
# A forge takes 1 MiB for the summary of a job's step: so many rows below the fold, with names of so many characters.
N_FOLDED, N_NAME = 1000, 120
_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def check_junit(comparison: "Comparison", fail_on: Sequence[str], *, must_conclude: bool = False) -> str:
    """A comparison as JUnit XML, one test case for all workloads together and one for each.

    Cases that meet one of the conditions `fail_on` fail, inconclusive ones are skipped (or fail, all together, with
    `must_conclude`), others pass; each carries its numbers. Characters that XML cannot hold become `?`.
    """
    cases = [_test_case(comparison, case, fail_on, must_conclude=must_conclude) for case in comparison.cases]
    said = {
        "baseline": comparison.baseline,
        "candidate": comparison.candidate,
        "margin_frac": f"{comparison.margin_frac:g}",
        "axes": ",".join(comparison.axes),
        "model": comparison.model or "",
    }
    return junit_file(f"perfmodel check {comparison.baseline} {comparison.candidate}", said, cases)


def junit_file(name: str, said: Mapping[str, str], cases: Sequence[ET.Element]) -> str:
    """Test cases as one suite of JUnit XML, with what is `said` of them all as its properties."""
    attributes = {
        "name": _xml(name),
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": "0",
        "skipped": str(sum(case.find("skipped") is not None for case in cases)),
    }
    suite = ET.Element("testsuite", attributes)
    properties = ET.SubElement(suite, "properties")
    for key, value in said.items():
        ET.SubElement(properties, "property", {"name": key, "value": _xml(value)})
    suite.extend(cases)
    suites = ET.Element("testsuites", {key: attributes[key] for key in ("tests", "failures", "errors", "skipped")})
    suites.append(suite)
    ET.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def _test_case(comparison: "Comparison", case: "Case", fail_on: Sequence[str], *, must_conclude: bool) -> ET.Element:
    verdict = case.verdict
    found = ET.Element("testcase", {"classname": "perfmodel.check", "name": _xml(_name(case))})
    numbers = _numbers(comparison, case)
    failures = comparison.failures_of(case, fail_on)
    is_open = verdict.verdict == "inconclusive"
    if is_open and must_conclude and case is comparison.overall:
        failures.append("inconclusive")
    if failures:
        message = _xml(f"{failures[0]}: {numbers[0]}")
        failure = ET.SubElement(found, "failure", {"type": failures[0], "message": message})
        failure.text = _xml("\n".join(numbers))
    elif is_open:
        more = f", {verdict.n_more_runs} more runs wanted on each side" if verdict.n_more_runs else ""
        ET.SubElement(found, "skipped", {"message": _xml(f"inconclusive: {numbers[0]}{more}")})
    else:
        ET.SubElement(found, "system-out").text = _xml("\n".join(numbers))
    return found


def _name(case: "Case") -> str:
    """What tells a case from all others: workloads may share their label, such as those of two seeds."""
    verdict = case.verdict
    return verdict.label if verdict.label == verdict.workload else f"{verdict.label} ({verdict.workload})"


def _numbers(comparison: "Comparison", case: "Case") -> list[str]:
    """The numbers behind a case, a line for each question."""
    verdict, found = case.verdict, case.expectation
    lines = [
        f"{verdict.ratio:.3f}x the baseline's time (90 % interval {verdict.ratio_low:.3f} to {verdict.ratio_high:.3f}, "
        f"margin {100 * comparison.margin_frac:g} %, {verdict.n_runs_baseline} and {verdict.n_runs_candidate} runs)"
    ]
    if found is not None:
        low, high = text.ns(found.model_low_ns), text.ns(found.model_high_ns)
        lines.append(
            f"{found.verdict}: measured {text.ns(found.measured_ns)} ({text.ns(found.measured_low_ns)} to "
            f"{text.ns(found.measured_high_ns)}), model {comparison.model} {text.ns(found.model_ns)} ({low} to {high})"
        )
    if case.expected_ratio not in (None, 1.0):
        lines.append(f"by the calibrated rates the model expects {case.expected_ratio:.3f}x the baseline's time")
    if part_words(case):
        lines.append(part_words(case))
    return [*lines, f"{verdict.verdict}, {case.cell}", *trace_lines(comparison)]


def _xml(words: str) -> str:
    return _NOT_IN_XML.sub("?", words)


def check_markdown(comparison: "Comparison", fail_on: Sequence[str]) -> str:
    """A comparison as Markdown for the summary of a job: the verdict in one line, at most N_FIRST workloads, the rest
    and what changed below folds. Names stand in code spans, so that nothing in them is interpreted."""
    failures = comparison.failures(fail_on)
    is_open = comparison.overall.verdict.verdict == "inconclusive"
    # What is slower is not well only because nothing was to fail by it.
    symbol = "❌" if failures else "❔" if is_open else "⚠️" if comparison.slower() else "✅"
    words = f"{symbol} **{verdict_line(comparison)}**"
    if failures:
        words += f" ({', '.join(failures)})"
    shown = telling(comparison)
    first = shown[:N_FIRST]
    rest = [case for case in comparison.each if not any(case is one for one in first)]
    parts = [words, f"{_code(comparison.baseline)} → {_code(comparison.candidate)}. " + _inline(model_line(comparison))]
    if comparison.model is not None:
        cells = [(name, str(n)) for name, n in comparison.cells().items() if n]
        parts.append(markdown.table([name for name, _ in cells], [[n for _, n in cells]]).rstrip())
    parts.append(_cases(first).rstrip())
    parts += ["\n".join(f"- {_inline(line)}" for line in trace_lines(comparison))]
    of_traces = moved_tables(comparison)
    for head, rows in of_traces:
        parts.append(markdown.table(head, [[_code(row[0]), *row[1:]] for row in rows]).rstrip())
    if rest:
        more = len(rest) - N_FOLDED
        body = _cases(rest[:N_FOLDED]) + (f"\n... and {text.count(more)} more\n" if more > 0 else "")
        parts.append(_folded(f"{text.counted(len(rest), 'other workload')}", body))
    if is_told(comparison) and not of_traces:
        rows = [[*part_cells(part)[:-1], _inline(part_cells(part)[-1])] for part in comparison.parts]
        body = markdown.table(PART_HEADER, rows) + "".join(f"\n{_inline(one)}\n" for one in comparison.findings)
        parts.append(_inline(parts_line(comparison)))
        parts.append(_folded("What the change consists of", body))
    rates = [quantity_cells(moved) for moved in comparison.quantities if moved.ratio is not None]
    changed = [[change.key, str(change.baseline), str(change.candidate)] for change in comparison.changes]
    tables = [
        markdown.table(head, [list(map(_code, row)) for row in rows])
        for head, rows in (
            (QUANTITY_HEADER, rates),
            (["what changed", "baseline", "candidate"], changed),
        )
        if rows
    ]
    if tables:
        parts.append(_folded("What changed", "\n".join(tables)))
    return "\n\n".join(filter(None, [*parts, update_words(comparison)])) + "\n"


def _cases(cases: "Iterable[Case]") -> str:
    rows = [case_cells(case) for case in cases]
    return markdown.table([*CASE_HEADER[:-1], "cell"], [[_code(row[0]), *row[1:]] for row in rows])


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n</details>"


def _code(words: str) -> str:
    """Words as a code span in a cell of a table: one line, no backtick, no bar, which ends a cell even there."""
    shown = text.shortened(words, N_NAME).replace("`", "'").replace("|", "¦")
    return f"`{shown}`" if shown.strip() else ""


def _inline(words: str) -> str:
    """A sentence with names in it as one line in which Markdown finds nothing."""
    return re.sub(r"([\\`*_\[\]<>&|~#@!$])", lambda found: f"&#{ord(found[1])};", " ".join(words.split()))
