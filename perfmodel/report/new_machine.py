"""The page about a machine that has just arrived, and what build servers read of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from perfmodel import markdown, text
from perfmodel.report import junit
from perfmodel.report.captures import N_NAME
from perfmodel.report.words import WIDTH, table, wrapped

if TYPE_CHECKING:  # these bring scipy and scikit-learn, which reading a trace does not need
    from perfmodel.regression.machine.items import Item
    from perfmodel.regression.machine.new_machine import NewMachine

MARKS = {"healthy": "ok", "look at": "LOOK AT", "not judged": "?"}
N_NAMES = 4  # items that the verdict names
N_WORST = 5  # workloads that the page shows
WORST_HEADER = ["slowest beside the model", "measured", "model", "ratio", "verdict"]


def new_machine_verdict(found: "NewMachine") -> str:
    """What a machine comes to, in one sentence."""
    wrong, n_open = found.of("look at"), len(found.of("not judged"))
    n = len(found.items) - n_open
    besides = f"; {text.counted(n_open, 'more item')} could not be judged" if n_open else ""
    if not n:
        return f"Nothing could be judged of {text.counted(n_open, 'item')}."
    if not wrong:
        return f"Healthy in all of {text.counted(n, 'item')}{besides}."
    names = ", ".join(item.name for item in wrong[:N_NAMES])
    more = f" and {len(wrong) - N_NAMES} more" if len(wrong) > N_NAMES else ""
    return f"Healthy but for {len(wrong)} of {text.counted(n, 'item')}: {names}{more}{besides}."


def runs_line(found: "NewMachine") -> str:
    """How many runs a check on this machine needs."""
    if found.n_runs_wanted is None:
        return "These runs do not tell how many a check needs: collect with --runs 5."
    line = f"A check with a margin of {100 * found.margin_frac:g} % over all workloads needs "
    line += f"{text.counted(found.n_runs_wanted, 'run')} on each side, by the spread between these runs"
    if found.is_enough:
        return f"{line}."
    return (
        f"{line}; on a virtual machine spread them over three occasions, for a short one does not show its neighbours."
    )


def new_machine_page(found: "NewMachine", machine: Sequence[str], width: int = WIDTH) -> str:
    """The verdict in a line, what the machine is, the items by section with what to look at next, and the workloads
    that are slowest beside the model."""
    head = [new_machine_verdict(found), "", *(text.shortened(words, width) for words in machine)]
    blocks = ["\n".join(head)]
    for section, items in _sections(found):
        lines = [section]
        for item in items:
            lines.append(wrapped(f"{item.name}: {item.words}", width, f"  {MARKS[item.verdict]:<8}", " " * 10))
            lines += [wrapped(step, width, " " * 10 + "-> ", " " * 13) for step in item.next_steps]
        blocks.append("\n".join(lines))
    blocks.append(wrapped(judge_line(found), width))
    worst = [one for one in found.expectations[1:] if one.model_low_ns is not None][:N_WORST]
    if worst:
        rows = [
            [one.label, text.ns(one.measured_ns), text.ns(one.model_ns), f"{one.ratio:.2f}x", one.verdict]
            for one in worst
        ]
        blocks.append(table(rows, WORST_HEADER, width))
    blocks.append(wrapped(runs_line(found), width))
    return "\n\n".join(blocks)


def judge_line(found: "NewMachine") -> str:
    """Which model judged the sweep, why that one, and whose nominal rates were used."""
    judge = f"The sweep was judged by {found.model}, {found.chosen}." if found.model else "No model judged the sweep."
    return judge + (f" Nominal rates are those of {found.datasheet}." if found.datasheet else "")


def _sections(found: "NewMachine") -> "list[tuple[str, list[Item]]]":
    names = dict.fromkeys(item.section for item in found.items)
    return [(name, [item for item in found.items if item.section == name]) for name in names]


def new_machine_junit(found: "NewMachine") -> str:
    """The items as JUnit XML, a test case each: what deserves a look fails, what is not judged is skipped."""
    cases = []
    for item in found.items:
        case, said = junit.case_of(f"perfmodel.{item.section}", item.name), "\n".join([item.words, *item.next_steps])
        if item.verdict == "look at":
            cases.append(junit.failed(case, item.verdict, item.words, said))
        else:
            cases.append((junit.skipped if item.verdict == "not judged" else junit.passed)(case, said))
    of_all = {"capture": found.capture, "model": found.model or "", "datasheet": found.datasheet or ""}
    return junit.suite(f"perfmodel check --new-machine {found.capture}", of_all, cases)


def new_machine_markdown(found: "NewMachine") -> str:
    """The page as Markdown: the verdict, what deserves a look with its next steps, the rest in folds."""
    wrong = found.of("look at")
    symbol = "⚠️" if wrong else "✅"
    parts = [f"{symbol} **{markdown.plain(new_machine_verdict(found))}**", markdown.code(found.capture, N_NAME)]
    if wrong:
        rows = [list(map(markdown.plain, (one.name, one.words, "; ".join(one.next_steps)))) for one in wrong]
        parts.append(markdown.table(["look at", "what was found", "look at next"], rows).rstrip())
    for verdict in ("healthy", "not judged"):
        items = found.of(verdict)
        if items:
            rows = [[one.section, markdown.plain(one.name), markdown.plain(one.words)] for one in items]
            title = f"{text.counted(len(items), 'item')} {verdict}"
            parts.append(markdown.folded(title, markdown.table(["section", "item", "what was found"], rows)))
    return "\n\n".join([*parts, markdown.plain(judge_line(found)), markdown.plain(runs_line(found))]) + "\n"
