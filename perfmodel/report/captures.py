"""Text pages about comparisons of captures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from perfmodel import text
from perfmodel.report.baselines import update_words
from perfmodel.report.check_parts import parts_page
from perfmodel.report.check_traces import trace_lines, trace_tables
from perfmodel.report.words import WIDTH, table, wrapped

if TYPE_CHECKING:  # these bring scipy and scikit-learn, which reading a trace does not need
    from perfmodel.regression import Case, Comparison, Moved

N_SHOWN = 20  # workloads of a page
SAME_FRAC = 1e-3  # by which two sizes may differ and be told as the same
QUANTITY_HEADER = ("calibrated", "baseline", "candidate", "ratio", "moved")
CASE_HEADER = ("workload", "ratio", "90 %", "verdict", "model expects", "of model", "")


def conclusion(comparison: "Comparison") -> tuple[str, str]:
    """What a comparison comes to, in words of our own alone, and of which kind it is: bad, mixed, open or good."""
    overall, slower = comparison.overall, comparison.slower()
    found = overall.expectation
    if overall in slower and overall.cell == "explained":
        if comparison.cells()["regression to chase"]:
            return "mixed", (
                "Slower than the baseline. The calibrated rates of the machine account for it over all, not for each "
                "workload: some are regressions to chase."
            )
        return "mixed", "Slower than the baseline, as the calibrated rates of the machine make the model expect."
    if overall in slower and overall.cell == "regression to chase":
        return "bad", "Slower than the baseline, and no calibrated rate accounts for it: a regression to chase."
    if overall in slower:
        return "bad", "Slower than the baseline; no model says whether it should be."
    if slower:
        return "bad", "Single workloads are slower than the baseline, all of them together are not."
    if overall.cell == "undecided" and found is not None and found.verdict == "slower-than-model":
        return "mixed", "Slower than the model expects; the runs cannot tell whether slower than the baseline."
    if overall.verdict.verdict == "inconclusive":
        return "open", "The runs cannot tell whether it is slower than the baseline."
    if overall.cell == "left on the table":
        return (
            "mixed",
            "Not slower than the baseline, but slower than the model expects: time is left on the table.",
        )
    if overall.verdict.verdict == "improved":
        return "good", "Faster than the baseline."
    if overall.verdict.ratio_low * (1 + comparison.margin_frac) < 1:
        return "good", "Not slower than the baseline by more than the margin."
    return "good", "As fast as the baseline, within the margin."


def verdict_line(comparison: "Comparison") -> str:
    """The first question answered in one line: the candidate against the baseline over all workloads."""
    overall = comparison.overall.verdict
    return (
        f"{overall.verdict}: candidate takes {overall.ratio:.3f}x the baseline's time over all workloads "
        f"(90 % interval {overall.ratio_low:.3f} to {overall.ratio_high:.3f}, "
        f"{overall.n_runs_baseline} and {overall.n_runs_candidate} runs)"
    )


def model_line(comparison: "Comparison") -> str:
    """The second question answered in one line: the candidate against what a model expects of it."""
    case = comparison.overall
    found = case.expectation
    if found is None:
        return f"no model: {comparison.no_model}"
    words = f"{found.verdict}: {found.ratio:.3f}x of what model {comparison.model} expects of the machine as calibrated"
    if found.model_low_ns is not None and found.model_high_ns is not None:
        low, high = found.model_low_ns / found.model_ns, found.model_high_ns / found.model_ns
        words += f" (its 90 % interval {low:.3f} to {high:.3f})"
    if comparison.n_judged < len(comparison.each):
        words += f", over the {comparison.n_judged} of {len(comparison.each)} workloads that it can judge"
    if found.reason:
        words += f": {found.reason}"
    if case.expected_ratio is not None and abs(case.expected_ratio - 1) > 5e-4:
        words += f";\nby the calibrated rates of both machines it expects {case.expected_ratio:.3f}x the baseline's"
    if case.datasheet is not None:
        nominal = case.datasheet
        words += f"\n{nominal.verdict} with the ceilings of {comparison.datasheet}: {nominal.ratio:.3f}x"
    return words


def case_cells(case: "Case") -> list[str]:
    """A case as words, under CASE_HEADER."""
    verdict, found = case.verdict, case.expectation
    more = f"{verdict.n_more_runs} more runs" if verdict.n_more_runs else ""
    return [
        verdict.label,
        f"{verdict.ratio:.3f}x",
        f"{verdict.ratio_low:.3f} to {verdict.ratio_high:.3f}",
        verdict.verdict,
        "" if case.expected_ratio in (None, 1.0) else f"{case.expected_ratio:.3f}x",
        "" if found is None else f"{found.ratio:.3f}x",
        more if found is None else ", ".join(word for word in (case.cell, more) if word),
    ]


def telling(comparison: "Comparison") -> "list[Case]":
    """The workloads that a reader should see first: what moved, or stands above its model, slowest first."""
    moved = [
        case
        for case in comparison.each
        if case.verdict.verdict in ("regressed", "suspect", "improved") or case.cell == "left on the table"
    ]
    return moved or list(comparison.each[:5])


def quantity_cells(moved: "Moved") -> list[str]:
    """A calibrated quantity as words: what it is, baseline, candidate, ratio, whether it moved."""
    note = "" if moved.is_alike or moved.ratio is None else ", measured in another way"
    return [
        moved.words,
        text.figure(moved.key, moved.baseline),
        text.figure(moved.key, moved.candidate),
        "" if moved.ratio is None else f"{moved.ratio:.3f}x",
        (moved.moved or "") + note,
    ]


def check_page(comparison: "Comparison") -> str:
    """Both verdicts, the two questions crossed, the workloads that moved most, and what changed between the sides."""
    each = comparison.each
    counts: dict[str, int] = {}
    for case in each:
        counts[case.verdict.verdict] = counts.get(case.verdict.verdict, 0) + 1
    lines = [
        conclusion(comparison)[1],
        verdict_line(comparison),
        model_line(comparison),
        f"{len(each)} workloads: " + ", ".join(f"{n} {name}" for name, n in counts.items()),
    ]
    if comparison.model is not None:
        lines.append("crossed: " + ", ".join(f"{n} {name}" for name, n in comparison.cells().items() if n))
    if comparison.details:
        lines += [wrapped(line, WIDTH, others="  ") for line in trace_lines(comparison)]
    elif "suspect" in (comparison.overall.verdict.verdict, *counts):
        lines.append("suspect: one side has a single run, so the spread between runs is assumed; collect with --runs 5")
    shown = telling(comparison)
    rows = _without_empty([CASE_HEADER, *map(case_cells, shown[:N_SHOWN])])
    page = "\n".join(lines) + "\n\n" + table(rows[1:], rows[0])
    if len(shown) > N_SHOWN:
        page += f"\n... and {len(shown) - N_SHOWN} more"
    moved = trace_tables(comparison) or parts_page(comparison)
    return "\n\n".join(filter(None, [page, *moved, *_changes(comparison), update_words(comparison)]))


def _without_empty(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """The columns that say something in any row below the header."""
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def _changes(comparison: "Comparison") -> list[str]:
    """Tables of what differs between the two captures, and of what their calibrations say moved."""
    facts = [[change.key, str(change.baseline), str(change.candidate)] for change in comparison.changes]
    rates = [
        quantity_cells(moved)
        for moved in comparison.quantities
        if moved.ratio is not None and moved.moved != "same" and abs(moved.ratio - 1) > SAME_FRAC
    ]
    tables = ((["what changed", "baseline", "candidate"], facts), (list(QUANTITY_HEADER), rates))
    return [table(rows, head) for head, rows in tables if rows]
