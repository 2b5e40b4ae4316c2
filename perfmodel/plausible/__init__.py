"""Can a capture be believed: its form, whose machine it gives away, its size, its physics, its noise, its design."""

from pathlib import Path

from perfmodel.plausible import calibration, design, form, identity, points
from perfmodel.plausible.folder import ERROR, WARNING, Finding, read_folder, worst_first

__all__ = ["ERROR", "WARNING", "Finding", "check_capture", "is_sound", "verdict"]

CHECKS = (*form.CHECKS, *identity.CHECKS, *calibration.CHECKS, *points.CHECKS, *design.CHECKS)


def check_capture(path: str | Path) -> list[Finding]:
    """Everything that is wrong with a capture folder or deserves a look, by group, errors first.

    Raises InputError when the folder is no capture, or its manifest cannot be used at all.
    """
    folder, found = read_folder(Path(path))
    return worst_first([*found, *(finding for check in CHECKS for finding in check(folder))])


def is_sound(findings: list[Finding]) -> bool:
    """Whether nothing is wrong; warnings leave a capture sound."""
    return all(finding.severity != ERROR for finding in findings)


def verdict(name: str, findings: list[Finding]) -> str:
    """The final sentence about a capture."""
    n_errors = sum(finding.severity == ERROR for finding in findings)
    n_warnings = len(findings) - n_errors

    def several(n: int, noun: str) -> str:
        return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"

    beside = f", with {several(n_warnings, 'warning')}" if n_warnings else ""
    if n_errors:
        return f"{name} is not sound: {several(n_errors, 'error')}{beside}"
    return f"{name} is sound{beside}"
