"""Text pages about comparisons of captures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from perfmodel.report.words import table

if TYPE_CHECKING:  # these bring scipy and scikit-learn, which reading a trace does not need
    from perfmodel.regression import Verdict


def check_page(verdicts: "Sequence[Verdict]") -> str:
    """The overall verdict, a count of each, and the workloads that moved most."""
    overall, *each = verdicts
    counts = {name: sum(v.verdict == name for v in each) for name in dict.fromkeys(v.verdict for v in each)}
    moved = [v for v in each if v.verdict in ("regressed", "suspect", "improved")] or each[:5]

    def row(v: "Verdict") -> list[str]:
        more = f"{v.n_more_runs} more runs" if v.n_more_runs else ""
        return [v.label, f"{v.ratio:.3f}x", f"{v.ratio_low:.3f} to {v.ratio_high:.3f}", v.verdict, more]

    shown = moved[:20]
    lines = [
        f"{overall.verdict}: candidate takes {overall.ratio:.3f}x the baseline's time over all workloads "
        f"(90 % interval {overall.ratio_low:.3f} to {overall.ratio_high:.3f}, "
        f"{overall.n_runs_baseline} and {overall.n_runs_candidate} runs)",
        f"{len(each)} workloads: " + ", ".join(f"{n} {name}" for name, n in counts.items()),
    ]
    if "suspect" in (overall.verdict, *counts):
        lines.append("suspect: one side has a single run, so the spread between runs is assumed; collect with --runs 5")
    more = f"\n... and {len(moved) - len(shown)} more" if len(moved) > len(shown) else ""
    return (
        "\n".join(lines) + "\n\n" + table([row(v) for v in shown], ["workload", "ratio", "90 %", "verdict", ""]) + more
    )
