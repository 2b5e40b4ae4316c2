"""The files of a capture folder as typed records: what must stand in each line, and where a damaged one stands."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from perfmodel.errors import InputError
from perfmodel.hardware import SMALLEST
from perfmodel.text import short_name

Line = TypeVar("Line")

SCHEMA = 1
MANIFEST, WORKLOADS, OBSERVATIONS_FILE = "capture.json", "workloads.jsonl", "observations.jsonl"
PLAN = "plan.jsonl.gz"  # all that was planned, where workloads.jsonl has only what was tried
CALIBRATION, LEFT_OUT, PROFILES = "calibration.jsonl", "left_out.jsonl", "profiles"
OPS = ("grouped_gemm", "moe_layer")
RESIDENT = "resident"
ACCESS = (RESIDENT, "zero-copy", "copy", "copy-overlap", "cpu")  # what collectors can measure
RESIDENCIES = ("mapped", "split", "system")  # how zero-copy saw one layer in two memories
ORDERS = ("ascending", "descending", "random")  # routing probability of the experts that are offloaded first
GRAPH = "graph"
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float8_e4m3fn": "fp8"}  # torch name in the settings -> name in lines
NEEDED = ("machine", "software", "settings", "calibration", "kernel")
# What came after the first captures: no part of a workload's id where it is null. `study` never is.
LATER = ("offloaded", "order", "residency", "launch")
NOT_CONTENT = ("workload", "study")

Positive = Annotated[int, msgspec.Meta(gt=0, lt=2**62)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
RunNumber = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]  # of many occasions one after the other, too
MOST_NESTED = 32  # lists and objects in each other, of facts of which anything may be
Physical = Annotated[float, msgspec.Meta(ge=0, lt=1e30)]  # a number of a machine; neither infinite nor none


class Settings(msgspec.Struct):
    """What every reader needs of the settings; the rest is kept as it is. `minutes` is the time budget, null: none."""

    device: str
    dtype: str
    threads: int | None = None
    minutes: float | None = None
    timing: dict[str, Any] | None = None


class Calibrated(msgspec.Struct):
    """One calibrated number of the manifest, in the base unit its name says; 0 where nothing was reached."""

    value: Physical
    spread_frac: float | None = None
    n: float | None = None
    how: str | None = None

    def __post_init__(self) -> None:
        if 0 < self.value < SMALLEST:
            raise ValueError(f"a value of {self.value:g}, which no machine has")


class Run(msgspec.Struct):
    """One finished run: a fresh process; times are seconds since 1970."""

    run: int
    started: float
    finished: float
    n_resumed: int | None = None
    n_left_out: int | None = None
    n_disturbed: int | None = None
    n_todo: int | None = None  # points for which the time budget did not last
    calibration: dict[str, Calibrated] | None = None


class Manifest(msgspec.Struct):
    """What must be there, and of which type, for a manifest to be used."""

    machine: dict[str, Any]
    software: dict[str, Any]
    settings: Settings
    calibration: dict[str, Calibrated]
    kernel: str | None
    runs: list[Run] = []
    capabilities: dict[str, Any] | None = None
    n_workloads: int | None = None
    skipped: list[str] = []


class WorkloadLine(msgspec.Struct, frozen=True):
    """One planned workload; the last five are null where they do not apply or the capture is older than they are."""

    workload: str
    op: str
    shape: str
    n_experts: Count
    top_k: Count
    hidden: Count
    inter: Count
    n_gemms: Count
    gemm_k: Count | None
    gemm_n: Count | None
    dtype: str
    device: str
    n_tokens: Count
    routing: str
    tokens_per_expert: list[Count]
    access: str
    offload_frac: float
    offloaded: list[Count] | None = None
    order: str | None = None
    residency: str | None = None
    launch: str | None = None
    study: str | None = None


class ObservationLine(msgspec.Struct, frozen=True):
    """One workload measured in one run: the mean ns per call of each repeat."""

    workload: str
    run: RunNumber
    times_ns: list[Positive]
    started: float | None = None
    facts: dict[str, Any] | None = None


class CalibrationLine(msgspec.Struct, frozen=True):
    """One measurement of a calibration probe, `value` in the base unit `unit`; `quantity` null for a detail."""

    probe: str
    params: dict[str, Any]
    run: Count
    value: float
    unit: str
    quantity: str | None = None
    spread_frac: float | None = None
    n: Count | None = None
    how: str = ""
    times_ns: list[float] = []
    took_s: float | None = None


class LeftOutLine(msgspec.Struct, frozen=True):
    """A workload, a probe, a profile or a whole stage that gave nothing, and why."""

    reason: str
    workload: str | None = None
    probe: str | None = None
    profile: str | None = None
    stage: str | None = None
    params: dict[str, Any] | None = None
    run: Count | str | None = None  # a word for what is no run, such as profiling


def read_manifest(file: Path) -> dict[str, Any]:
    """The content of capture.json; raises InputError when it is none of this schema, or damaged."""
    try:
        manifest: dict[str, Any] = msgspec.json.decode(file.read_bytes())
        schema = manifest["schema"]
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{file.parent.name}/{file.name} is not a capture manifest: no JSON object with a schema"
        ) from None
    refuse_nested(manifest, f"{file.parent.name}/{file.name}")
    if schema != SCHEMA:
        raise InputError(f"capture {file.parent.name!r} has schema {schema!r}, this version reads schema {SCHEMA}")
    missing = set(NEEDED) - set(manifest)
    if missing:
        raise InputError(f"capture {file.parent.name!r}: capture.json lacks {', '.join(sorted(missing))}")
    try:
        typed_manifest(manifest)
    except msgspec.ValidationError as error:
        raise InputError(f"capture {file.parent.name!r}: capture.json is damaged: {error}") from None
    return manifest


def typed_manifest(manifest: Mapping[str, Any]) -> Manifest:
    """The parts of a manifest that have a fixed type; raises msgspec.ValidationError where one has another."""
    return msgspec.convert(manifest, Manifest)


def refuse_nested(value: Any, where: str) -> None:
    """Raise InputError where lists and objects lie in each other more than MOST_NESTED deep, which readers follow."""
    level = [value]
    for _ in range(MOST_NESTED):
        level = [
            one
            for held in level
            if isinstance(held, dict | list)
            for one in (held.values() if isinstance(held, dict) else held)
        ]
    if level:
        raise InputError(f"{where}: lists and objects lie in each other more than {MOST_NESTED} deep")


def complete_lines(file: Path) -> list[tuple[int, bytes]]:
    """The lines of a file with their numbers from 1, without empty ones and a last one that a kill cut short."""
    content = file.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def read_lines(file: Path, line_type: type[Line], *, optional: bool = False) -> list[Line]:
    """The records of a file of JSON lines; raises InputError naming the line that is damaged.

    A file that is not there is refused, or gives no records where it is `optional`.
    """
    if not file.is_file():
        if optional:
            return []
        raise InputError(f"capture {file.parent.name!r} has no {file.name}")
    decoder = msgspec.json.Decoder(line_type)
    records = []
    for number, line in complete_lines(file):
        try:
            records.append(decoder.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"capture {file.parent.name!r}: {file.name} is damaged: line {number}: {error}") from None
    return records


def content_id(line: Mapping[str, Any]) -> str:
    """The id that the content of a workload's line gives: 12 hexadecimal digits of its SHA-256 as compact JSON with
    sorted keys, without the id itself, the study, and the later keys that are null."""
    content = {k: v for k, v in line.items() if k not in NOT_CONTENT and (k not in LATER or v is not None)}
    return short_name(content)
