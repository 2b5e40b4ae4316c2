"""A capture folder read for checking: every line that can be read, and a finding for each that cannot."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from perfmodel.capture_lines import (
    CALIBRATION,
    DTYPES,
    GRAPH,
    LEFT_OUT,
    MANIFEST,
    NEEDED,
    OBSERVATIONS_FILE,
    SCHEMA,
    WORKLOADS,
    CalibrationLine,
    LeftOutLine,
    Manifest,
    ObservationLine,
    WorkloadLine,
    complete_lines,
    typed_manifest,
)
from perfmodel.errors import InputError

ERROR, WARNING = "error", "warning"
GROUPS = ("form", "identity", "size", "physics", "noise", "design")

Line = TypeVar("Line")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (`error`) or worth a look (`warning`): a sentence, where it was found, and the value and
    the limit it broke in base units, null where there is none. Findings of one `rule` are of one kind."""

    severity: str
    group: str
    rule: str
    sentence: str
    where: str
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Folder:
    """What a capture folder holds, lines with their numbers; `workloads` by id, with the raw lines beside them."""

    path: Path
    raw_manifest: dict[str, Any]
    manifest: Manifest
    raw_workloads: list[tuple[int, dict[str, Any]]]
    workloads: dict[str, WorkloadLine]
    observations: list[tuple[int, ObservationLine]]
    calibrations: list[tuple[int, CalibrationLine]]
    left_out: list[tuple[int, LeftOutLine]]

    @property
    def is_cuda(self) -> bool:
        """Whether a GPU computed."""
        return self.manifest.settings.device == "cuda"

    @property
    def dtype(self) -> str:
        """The dtype of the settings, as workloads call it."""
        named = self.manifest.settings.dtype
        return DTYPES.get(named, named)

    @property
    def measured(self) -> list[tuple[int, WorkloadLine, ObservationLine]]:
        """Every observation of a planned workload, with its line number and its workload."""
        known = self.workloads
        return [(number, known[o.workload], o) for number, o in self.observations if o.workload in known]


def read_folder(path: Path) -> tuple[Folder, list[Finding]]:
    """The folder with what of it can be read, and a finding for each part that cannot.

    Raises InputError when it is no capture of this schema at all, or its manifest has other types than it must.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(f"{str(path)!r} is not a capture folder: it has no {MANIFEST}")
    try:
        raw = msgspec.json.decode(file.read_bytes())  # unlike json, refuses numbers that are none
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not a capture manifest: {error}") from None
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        raise InputError(f"{file} is not a capture manifest of schema {SCHEMA}")
    found = [
        Finding(ERROR, "form", "manifest", f"{MANIFEST} lacks {key!r}", MANIFEST) for key in NEEDED if key not in raw
    ]
    try:
        manifest = typed_manifest({"machine": {}, "software": {}, "calibration": {}, "kernel": None, **raw})
    except msgspec.ValidationError as error:
        raise InputError(f"{file} is damaged: {error}") from None
    lines: dict[str, list[Any]] = {}
    for name, line_type, is_needed in (
        (WORKLOADS, WorkloadLine, True),
        (OBSERVATIONS_FILE, ObservationLine, True),
        (CALIBRATION, CalibrationLine, False),
        (LEFT_OUT, LeftOutLine, False),
    ):
        lines[name], broken = _read(path / name, line_type, is_needed)
        found += broken
    workloads = {line.workload: line for _, _, line in lines[WORKLOADS]}
    return Folder(
        path,
        raw,
        manifest,
        [(number, content) for number, content, _ in lines[WORKLOADS]],
        workloads,
        _typed(lines[OBSERVATIONS_FILE]),
        _typed(lines[CALIBRATION]),
        _typed(lines[LEFT_OUT]),
    ), found


def _typed(lines: list[tuple[int, dict[str, Any], Line]]) -> list[tuple[int, Line]]:
    return [(number, line) for number, _, line in lines]


def _read(
    file: Path, line_type: type[Line], is_needed: bool
) -> tuple[list[tuple[int, dict[str, Any], Line]], list[Finding]]:
    if not file.is_file():
        missing = Finding(ERROR, "form", "missing file", f"{file.name} is missing", file.name)
        return [], [missing] if is_needed else []
    lines: list[tuple[int, dict[str, Any], Line]] = []
    found = []
    if not file.read_bytes().endswith(b"\n") and file.stat().st_size:
        words = f"the last line of {file.name} was cut short, by a kill or a crash, and does not count"
        found.append(Finding(WARNING, "form", "cut line", words, file.name))
    for number, line in complete_lines(file):
        try:
            content = msgspec.json.decode(line, type=dict[str, Any])
            lines.append((number, content, msgspec.convert(content, line_type)))
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            words = f"the line cannot be used: {error}"
            found.append(Finding(ERROR, "form", "damaged line", words, f"{file.name}, line {number}"))
    return lines, found


def label(workload: WorkloadLine) -> str:
    """A workload in a few words, its id first."""
    size = f" {workload.gemm_k}x{workload.gemm_n}" if workload.gemm_k else ""
    tail = [workload.access if not workload.residency else f"{workload.access} {workload.residency}"]
    tail += [GRAPH] if workload.launch == GRAPH else []
    return (
        f"{workload.workload} {workload.op} {workload.shape}{size}, {workload.n_tokens} tokens, "
        f"{workload.routing}, {workload.dtype}, {', '.join(tail)}"
    )


def worst_first(found: Iterator[Finding] | list[Finding]) -> list[Finding]:
    """Errors before warnings, groups in their order, otherwise as they came."""
    return sorted(found, key=lambda f: (GROUPS.index(f.group), f.severity != ERROR))
