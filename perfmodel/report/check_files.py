"""What build servers read of a comparison: JUnit XML, JSON, and Markdown for the page of a job."""

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from perfmodel import markdown, text
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
    from perfmodel.regression import Case, Comparison

N_FIRST = 20  # rows that a summary shows at once
# A forge takes 1 MiB for the summary of a job's step: what the rows below a fold may take.
FOLDED_BYTES, CHANGED_BYTES = 500_000, 80_000
N_REMARKS, N_SENTENCE = 20, 600  # sentences, and letters of one
SYMBOLS = {"bad": "⚠️", "mixed": "⚠️", "open": "❔", "good": "✅"}  # of what nothing fails by
_NUMBER = re.compile(r"[-+\d][\d.,]*(?: ?(?:[A-Za-zµ%/]{1,9}|to [\d.]+x?))?", re.ASCII)  # with a unit or an end
_NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def check_json(comparison: "Comparison", fail_on: Sequence[str], *, must_conclude: bool = False) -> str:
    """A comparison as the JSON that `check --json` prints and `--json-file` writes, its keys always in this order."""
    return json.dumps(comparison.to_json(fail_on, must_conclude=must_conclude), indent=2, allow_nan=False) + "\n"


def check_junit(comparison: "Comparison", fail_on: Sequence[str], *, must_conclude: bool = False) -> str:
    """A comparison as JUnit XML, one test case for all workloads together and one for each, lost ones last.

    Cases that meet one of the conditions `fail_on` fail, inconclusive and lost ones are skipped (or fail: all together
    with `must_conclude`, lost ones by `missing`), others pass; each carries its numbers, and as its time that of the
    candidate in s. Characters that XML cannot hold become `?`.
    """
    cases = [_test_case(comparison, case, fail_on, must_conclude=must_conclude) for case in comparison.cases]
    for one in comparison.lost:
        found = _case_of(one.label, one.workload, 0.0)
        ET.SubElement(found, *_lost("missing" in fail_on))
        cases.append(found)
    said = {
        "baseline": comparison.baseline,
        "candidate": comparison.candidate,
        "margin_frac": f"{comparison.margin_frac:g}",
        "axes": ",".join(comparison.axes),
        "model": comparison.model or "",
        "fail_on": ",".join(fail_on),
    }
    return junit_file(f"perfmodel check {comparison.baseline} {comparison.candidate}", said, cases)


def junit_file(name: str, said: Mapping[str, str], cases: Sequence[ET.Element]) -> str:
    """Test cases as one suite of JUnit XML, with what is `said` of them all as its properties."""
    counts = {
        "name": _xml(name),
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": "0",
    }
    suites = ET.Element("testsuites", counts)
    # Schemas in use know `skipped` of a suite, not of the suites together.
    skipped = str(sum(case.find("skipped") is not None for case in cases))
    suite = ET.SubElement(suites, "testsuite", {**counts, "skipped": skipped})
    properties = ET.SubElement(suite, "properties")
    for key, value in said.items():
        ET.SubElement(properties, "property", {"name": key, "value": _xml(value)})
    suite.extend(cases)
    ET.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def _case_of(label: str, workload: str, time_ns: float) -> ET.Element:
    """A test case under what tells it from all others: workloads may share their label, such as those of two seeds."""
    name = label if label == workload else f"{label} ({workload})"
    return ET.Element(
        "testcase", {"classname": "perfmodel.check", "name": _xml(name), "time": f"{time_ns / text.NS_PER_S:.9f}"}
    )


def _lost(is_failure: bool) -> tuple[str, dict[str, str]]:
    """The element that says of a test case that the candidate did not measure it."""
    message = {"message": "missing: the baseline measured this workload, the candidate did not"}
    return ("failure", {"type": "missing", **message}) if is_failure else ("skipped", message)


def _test_case(comparison: "Comparison", case: "Case", fail_on: Sequence[str], *, must_conclude: bool) -> ET.Element:
    verdict = case.verdict
    found = _case_of(verdict.label, verdict.workload, verdict.candidate_ns)
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
    more = f", {verdict.n_more_runs} more runs wanted on each side" if verdict.n_more_runs else ""
    return [*lines, f"{verdict.verdict}, {case.cell}{more}"]


def _xml(words: str) -> str:
    return _NOT_IN_XML.sub("?", words)


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
    parts = [words, f"{_code(comparison.baseline)} → {_code(comparison.candidate)}. " + _inline(model_line(comparison))]
    said = [f"- {_inline(line)}" for line in (*changed_lines(comparison), *remarks(comparison))[:N_REMARKS]]
    parts += ["\n".join(said)] if said else []
    if comparison.model is not None:
        cells = [(name, str(n)) for name, n in comparison.cells().items() if n]
        parts.append(markdown.table([name for name, _ in cells], [[n for _, n in cells]]).rstrip())
    head = [*CASE_HEADER[:-1], "cell, or runs wanted"]
    parts.append(markdown.table(head, list(map(_case_row, first))).rstrip())
    if rest:
        body = _bounded(head, map(_case_row, rest), len(rest), FOLDED_BYTES)
        parts.append(_folded(text.counted(len(rest), "other workload"), body))
    for one in changed_tables(comparison):
        rows = (list(map(_cell, row)) for row in one.rows)
        parts.append(_folded(one.title, _bounded(one.head, rows, len(one.rows), CHANGED_BYTES)))
    return "\n\n".join(filter(None, [*parts, update_words(comparison)])) + "\n"


def _case_row(case: "Case") -> list[str]:
    label, *numbers = case_cells(case)
    return [_code(label), *numbers]


def _bounded(head: Sequence[str], rows: Iterable[Sequence[str]], n_rows: int, n_bytes: int) -> str:
    """A table of as many rows as so many bytes hold, and how many are left out."""
    kept: list[Sequence[str]] = []
    for row in rows:
        n_bytes -= sum(len(cell.encode()) + 3 for cell in row) + 2
        if n_bytes < 0:
            break
        kept.append(row)
    left = n_rows - len(kept)
    return markdown.table(list(map(_inline, head)), kept) + (f"\n... and {text.count(left)} more\n" if left else "")


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{_inline(title)}</summary>\n\n{body}\n</details>"


def _cell(words: str) -> str:
    """A number as it is, words as a code span."""
    return words if _NUMBER.fullmatch(words) else _code(words, N_SENTENCE)


def _code(words: str, n_most: int = N_NAME) -> str:
    """Words as a code span in a cell of a table: one line, no backtick, no bar, which ends a cell even there."""
    shown = text.shortened(words, n_most).replace("`", "'").replace("|", "¦")
    return f"`{shown}`" if shown.strip() else ""


def _inline(words: str) -> str:
    """A sentence with names in it as one line in which Markdown finds nothing."""
    shown = text.shortened(" ".join(words.split()), N_SENTENCE)
    return re.sub(r"([\\`*_\[\]<>&|~#@!$])", lambda found: f"&#{ord(found[1])};", shown)
