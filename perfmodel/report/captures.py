"""Text pages about comparisons of two sides: captures, saved baselines, traces."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perfmodel import text
from perfmodel.report.baselines import update_words
from perfmodel.report.check_parts import part_lines, part_tables
from perfmodel.report.check_traces import moved_tables, trace_lines
from perfmodel.report.words import WIDTH, table, wrapped

if TYPE_CHECKING:  # these bring scipy and scikit-learn, which reading a trace does not need
    from perfmodel.regression import Case, Comparison, Moved

N_SHOWN = 20  # workloads of a page
N_LOST, N_NAME = 3, 120  # lost workloads that are named; characters of a name
SAME_FRAC = 1e-3  # by which two sizes may differ and be told as the same
FACT_HEADER = ("what changed", "baseline", "candidate")
QUANTITY_HEADER = ("calibrated", "baseline", "candidate", "ratio", "moved")
CASE_HEADER = ("workload", "ratio", "90 %", "verdict", "model expects", "of model", "")
# What a page leaves out on terminals of fewer columns: the cell says what the model makes of it, the verdict what the
# interval does.
LEFT_OUT = {110: ("model expects", "of model"), 90: ("90 %",)}


def conclusion(comparison: "Comparison") -> tuple[str, str]:
    """What a comparison comes to, in words of our own alone, and of which kind it is: bad, mixed, open or good.

    What lost workloads of its baseline is never good.
    """
    kind, words = _conclusion(comparison)
    if not comparison.lost:
        return kind, words
    lost = text.counted(len(comparison.lost), "workload")
    return "mixed" if kind == "good" else kind, f"{words} The candidate did not measure {lost} of the baseline."


def _conclusion(comparison: "Comparison") -> tuple[str, str]:
    overall, slower = comparison.overall, comparison.slower()
    found = overall.expectation
    if overall in slower and overall.cell == "explained":
        words = "Slower than the baseline, as the calibrated rates of the machine make the model expect."
        if comparison.cells()["regression to chase"]:
            words = (
                "Slower than the baseline. The calibrated rates of the machine account for it over all, not for each "
                "workload: some are regressions to chase."
            )
        if "regressed" in comparison.failures_of(overall):
            return "bad", f"{words} No other machine was declared: the rates that fell are the regression."
        return "mixed", words
    if overall in slower and overall.cell == "regression to chase":
        if found is not None and found.verdict == "faster-than-model":
            return "bad", (
                "Slower than the baseline, by less than the calibrated rates of the machine would make it, so that "
                "they do not account for it as it is: a regression to chase."
            )
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
    overall, n_both = comparison.overall.verdict, len(comparison.each)
    n_lost = len(comparison.lost)
    over = f"{n_both} of the baseline's {n_both + n_lost} workloads" if n_lost else "all workloads"
    return (
        f"{overall.verdict}: candidate takes {overall.ratio:.3f}x the baseline's time over {over} "
        f"(90 % interval {overall.ratio_low:.3f} to {overall.ratio_high:.3f}, "
        f"{overall.n_runs_baseline} and {overall.n_runs_candidate} runs)"
        + ("" if overall.verdict != "inconclusive" else f"; {_wanted(overall.n_more_runs)}")
    )


def _wanted(n_more_runs: int | None) -> str:
    """What would decide an open answer."""
    if n_more_runs is None:
        return "no number of such runs would tell: let both sides measure in turns, or quieten the machine"
    return f"{text.counted(n_more_runs, 'more run')} of each side would tell"


def remarks(comparison: "Comparison") -> list[str]:
    """Sentences on what a verdict rests on, where a reader might believe more than is there."""
    found = list(comparison.notes)
    lost, n_new = comparison.lost, comparison.n_missing["baseline"]
    if lost:
        more = "" if len(lost) <= N_LOST else f" and {text.count(len(lost) - N_LOST)} more"
        names = "; ".join(text.shortened(one.label, N_NAME) for one in lost[:N_LOST])
        found.append(f"not measured in the candidate, so not compared: {names}{more} (--fail-on missing ends with 1)")
    if n_new:
        found.append(f"{text.counted(n_new, 'workload')} of the candidate: not measured in the baseline, not compared")
    return found


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
    more = text.counted(verdict.n_more_runs, "more run") if verdict.n_more_runs else ""
    cell = "" if found is None or (more and case.cell == "undecided") else case.cell  # of both the number tells more
    return [
        verdict.label,
        f"{verdict.ratio:.3f}x",
        f"{verdict.ratio_low:.3f} to {verdict.ratio_high:.3f}",
        verdict.verdict,
        "" if case.expected_ratio in (None, 1.0) else f"{case.expected_ratio:.3f}x",
        "" if found is None else f"{found.ratio:.3f}x",
        ", ".join(filter(None, (cell, more))),
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


def check_page(comparison: "Comparison", width: int | None = None) -> str:
    """Both verdicts, the two questions crossed, the workloads that moved most, and what changed between the sides.

    With the `width` of a terminal lines keep to it: what all workloads share stands above them, and narrow terminals
    do not get all their numbers (LEFT_OUT).
    """
    each, room = comparison.each, width or WIDTH
    counts: dict[str, int] = {}
    for case in each:
        counts[case.verdict.verdict] = counts.get(case.verdict.verdict, 0) + 1
    answers = [verdict_line(comparison), *model_line(comparison).splitlines()]
    lines = [
        wrapped(conclusion(comparison)[1], room),
        *(answers if width is None else (wrapped(words, width, others="  ") for words in answers)),
        f"{text.counted(len(each), 'workload')}: " + ", ".join(f"{n} {name}" for name, n in counts.items()),
    ]
    if comparison.model is not None:
        lines.append("crossed: " + ", ".join(f"{n} {name}" for name, n in comparison.cells().items() if n))
    lines += [wrapped(words, room, others="  ") for words in changed_lines(comparison)]
    lines += [wrapped(words, room, "note: ", "  ") for words in remarks(comparison)]
    shown = telling(comparison)
    rows = _without_empty([CASE_HEADER, *map(case_cells, shown[:N_SHOWN])])
    if width is not None:
        rows = _narrowed(rows, width)
    page = "\n".join(lines) + "\n\n" + table(rows[1:], rows[0], width)
    if len(shown) > N_SHOWN:
        page += f"\n... and {len(shown) - N_SHOWN} more"
    tables = (table(one.rows, one.head, room) for one in changed_tables(comparison))
    return "\n\n".join(filter(None, [page, *tables, update_words(comparison)]))


def _narrowed(rows: list[list[str]], width: int) -> list[list[str]]:
    """Workloads under their header as a terminal of so many columns has room for them."""
    left_out = {head for least, heads in LEFT_OUT.items() if width < least for head in heads}
    names, shared = text.told_apart([row[0] for row in rows[1:]])
    heads = [f"{rows[0][0]} (all: {shared})" if shared else rows[0][0], *rows[0][1:]]
    kept = [i for i, head in enumerate(rows[0]) if head not in left_out]
    whole = [heads, *([name, *row[1:]] for name, row in zip(names, rows[1:], strict=True))]
    return [[row[i] for i in kept] for row in whole]


def _without_empty(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """The columns that say something in any row below the header."""
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def changed_lines(comparison: "Comparison") -> list[str]:
    """Sentences on what the change of time consists of, for every page; none where nothing could be divided."""
    return trace_lines(comparison) or part_lines(comparison)


@dataclass(frozen=True)
class Changed:
    """A table of what differs between two sides: what it is called, its head, its rows as words."""

    title: str
    head: Sequence[str]
    rows: list[list[str]]


def changed_tables(comparison: "Comparison") -> list[Changed]:
    """What differs between the two sides, for every page that shows it; tables without rows are left out."""
    facts = [
        [text.shortened(words, N_NAME) for words in (change.key, str(change.baseline), str(change.candidate))]
        for change in comparison.changes
    ]
    rates = [
        quantity_cells(moved)
        for moved in comparison.quantities
        if moved.ratio is not None and moved.moved != "same" and abs(moved.ratio - 1) > SAME_FRAC
    ]
    tables = (
        *(
            Changed(head[0].capitalize(), head, rows)
            for head, rows in moved_tables(comparison) or part_tables(comparison)
        ),
        Changed("Facts in which the sides differ", FACT_HEADER, facts),
        Changed("Calibrated rates and overheads that moved", QUANTITY_HEADER, rates),
    )
    return [one for one in tables if one.rows]
