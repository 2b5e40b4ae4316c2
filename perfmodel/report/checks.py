"""Text pages about captures: what one holds, what is wrong with it, and which come with the project."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from perfmodel import text
from perfmodel.report.words import table, wrapped

if TYPE_CHECKING:
    from perfmodel.plausible import Finding

N_OF_A_RULE = 5  # findings of one kind that are shown
N_PARTS = 12  # reasons and profiles that are shown
REASON_WIDTH = 100
TITLES = {
    "form": "form: files, ids, token counts, offloading, runs",
    "identity": "identity: host, user, folders, addresses, serial numbers",
    "size": "size and strange files",
    "physics": "physics: rates, times, what costs what",
    "noise": "noise: repeats, runs, drift",
    "design": "design: runs, shapes, batch sizes",
}


def findings_page(verdict: str, findings: "Sequence[Finding]", width: int) -> str:
    """What is wrong with a capture, one line a finding, by group; of many of one kind the first and how many more."""
    blocks = []
    for group, title in TITLES.items():
        rules: dict[tuple[str, str], list[Finding]] = {}
        for finding in findings:
            if finding.group == group:
                rules.setdefault((finding.severity, finding.rule), []).append(finding)
        if not rules:
            continue
        lines = [title]
        for (severity, rule), several in rules.items():
            lines += [_line(finding, width) for finding in several[:N_OF_A_RULE]]
            if len(several) > N_OF_A_RULE:
                lines.append(f"  ... and {len(several) - N_OF_A_RULE:,} more {severity}s of this kind ({rule})")
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, verdict])


def _line(finding: "Finding", width: int) -> str:
    words = f"{finding.severity}: {finding.where}: {finding.sentence}"
    return wrapped("".join(c if c.isprintable() else "?" for c in words), width, "  ", "    ")


def capture_page(found: Mapping[str, Any], machine: Sequence[str], width: int) -> str:
    """What a capture holds: machine, calibration, points by study and access, what was left out, profiles, and
    what it says in short where a shipped model was fitted on it."""
    calibration = [
        [
            row["quantity"],
            text.figure(row["quantity"], row["value"]),
            text.frac(row["spread_frac"]),
            text.count(row["n"]),
        ]
        for row in found["calibration"]
    ]
    blocks = [
        "\n".join(
            [f"{found['capture']}, taken {found['created'] or 'on a day not told'}", *(f"  {m}" for m in machine)]
        ),
        table(calibration, ["calibrated", "value", "spread", "n"], width)
        + (f"\nfrom {text.counted(found['n_calibration_lines'], 'measurement')}" * bool(found["n_calibration_lines"])),
        table([_study(row) for row in found["studies"]], _STUDY_HEADER, width)
        + f"\n{found['n_measured']:,} of {found['n_planned']:,} planned workloads were measured"
        + "\nerror: standard error of the median of a point's repeats; above: share of points above what was asked for",
    ]
    if found["capabilities"]:
        width_of_name = max(map(len, found["capabilities"]))
        rows = [
            f"  {name.ljust(width_of_name)}  {'yes' if reason is None else text.shortened(str(reason), REASON_WIDTH)}"
            for name, reason in found["capabilities"].items()
        ]
        blocks.append("\n".join(["what works here", *rows]))
    if found["left_out"]:
        rows = [
            f"  {f'{n:,}x ' if (n := row['n']) else ''}{text.shortened(row['reason'], REASON_WIDTH)}"
            for row in found["left_out"]
        ]
        blocks.append("\n".join(["left out", *_first(rows)]))
    if found["profiles"]:
        rows = [f"  {row['name']} ({text.n_bytes(row['size_bytes'])})" for row in found["profiles"]]
        blocks.append("\n".join(["profiles", *_first(rows)]))
    if "headlines" in found:
        blocks.append("\n".join(["in short", *(wrapped(line, width, "  ", "  ") for line in found["headlines"])]))
    return "\n\n".join(blocks)


_STUDY_HEADER = ["points of", "dtype", "workloads", "shapes", "routings", "tokens", "runs", "error", "worst", "above"]


def _study(row: Mapping[str, Any]) -> list[str]:
    access = " ".join(word for word in (row["access"], row["residency"]) if word)
    tokens = f"{row['least_tokens']:,} to {row['most_tokens']:,}"
    return [
        ", ".join(word for word in (row["study"], access, row["launch"]) if word),
        row["dtype"],
        *(text.count(row[name]) for name in ("n_workloads", "n_shapes", "n_routings")),
        text.count(row["most_tokens"]) if row["least_tokens"] == row["most_tokens"] else tokens,
        text.count(row["n_runs"]),
        *(text.frac(row[name]) for name in ("median_error_frac", "worst_error_frac", "noisy_frac")),
    ]


def _first(rows: Sequence[str]) -> list[str]:
    more = [f"  ... and {len(rows) - N_PARTS:,} more"] if len(rows) > N_PARTS else []
    return [*rows[:N_PARTS], *more]


def captures_page(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each capture: what it is of, how much of it, when it was taken."""
    body = [
        [row["path"], row["machine"], row["dtype"], text.count(row["n_workloads"]), text.count(row["n_runs"]),
         str(row["created"])]
        for row in rows
    ]  # fmt: skip
    return table(body, ["capture", "machine", "dtype", "workloads", "runs", "taken"])
