"""A capture folder made by `collectors/`, read as one OBSERVATIONS table with the circumstances it was measured in."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import polars as pl

from perfmodel.errors import InputError
from perfmodel.hardware import QUANTITIES, HardwareProfile, Quantity

Row = TypeVar("Row")

SCHEMA = 1
OPS = ("grouped_gemm", "moe_layer")

# One row: one workload measured in one run (a fresh process). `time_ns` is the median of the repeats in `times_ns`.
# `gemm_k`, `gemm_n` are the sizes of a single grouped GEMM call, null for a whole MoE layer.
OBSERVATIONS = pl.Schema(
    {
        "workload": pl.String(),  # hash of the workload's content: the same workload has the same id on every machine
        "op": pl.Enum(OPS),
        "shape": pl.String(),
        "n_experts": pl.Int64(),
        "top_k": pl.Int64(),
        "hidden": pl.Int64(),
        "inter": pl.Int64(),
        "n_gemms": pl.Int64(),
        "gemm_k": pl.Int64(),
        "gemm_n": pl.Int64(),
        "dtype": pl.String(),
        "device": pl.String(),
        "n_tokens": pl.Int64(),
        "routing": pl.String(),
        "tokens_per_expert": pl.List(pl.Int64()),
        "access": pl.String(),
        "offload_frac": pl.Float64(),
        "run": pl.Int64(),
        "times_ns": pl.List(pl.Int64()),
        "time_ns": pl.Float64(),
        "capture": pl.String(),
    }
)


class _Settings(msgspec.Struct):
    device: str
    dtype: str
    threads: int | None = None


class _Calibrated(msgspec.Struct):
    value: float


class _Run(msgspec.Struct):
    run: int
    started: float
    finished: float


class _Manifest(msgspec.Struct):
    """What must be there, and of which type, for a manifest to be used."""

    machine: dict[str, Any]
    software: dict[str, Any]
    settings: _Settings
    calibration: dict[str, _Calibrated]
    kernel: str | None
    runs: list[_Run] = []


class _Workload(msgspec.Struct):
    workload: str
    op: str
    shape: str
    n_experts: int
    top_k: int
    hidden: int
    inter: int
    n_gemms: int
    gemm_k: int | None
    gemm_n: int | None
    dtype: str
    device: str
    n_tokens: int
    routing: str
    tokens_per_expert: list[int]
    access: str
    offload_frac: float


class _Observation(msgspec.Struct):
    workload: str
    run: int
    times_ns: list[Annotated[int, msgspec.Meta(gt=0, lt=2**62)]]


@dataclass(frozen=True)
class Capture:
    """One folder of measurements: the manifest (machine, software, settings, calibration), and its observations."""

    name: str
    path: Path
    manifest: Mapping[str, Any]
    observations: pl.DataFrame

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must agree before measurements may be pooled or compared: machine, software, kernel, settings."""
        settings = self.manifest["settings"]
        return {
            **{f"machine.{key}": value for key, value in sorted(self.manifest["machine"].items())},
            **{f"software.{key}": value for key, value in sorted(self.manifest["software"].items())},
            "kernel": self.manifest["kernel"],
            **{f"settings.{key}": settings.get(key) for key in ("device", "dtype", "threads")},
        }

    @property
    def digest(self) -> str:
        """A short name of everything a model is computed from: fingerprint, calibration, workloads, observations."""
        content = json.dumps([self.fingerprint, self.manifest["calibration"]], sort_keys=True, default=str).encode()
        for name in ("workloads.jsonl", "observations.jsonl"):
            content += (self.path / name).read_bytes()
        return hashlib.sha256(content).hexdigest()[:16]

    @property
    def traces(self) -> list[Path]:
        """The profiled traces of the folder."""
        return sorted((self.path / "profiles").glob("*.json.gz"))


def load_capture(path: str | Path) -> Capture:
    """Read a capture folder; raises InputError when it is not one, is empty, or contradicts itself."""
    path = Path(path)
    manifest_file = path / "capture.json"
    if not manifest_file.is_file():
        found = "a file" if path.is_file() else "a folder without capture.json" if path.is_dir() else "nothing"
        raise InputError(
            f"{str(path)!r} is not a capture folder: found {found}; make one with `perfmodel collect sweep`"
        )
    manifest = _manifest(manifest_file)
    workloads = {row.workload: row for row in _lines(path / "workloads.jsonl", _Workload)}
    observed = _lines(path / "observations.jsonl", _Observation)
    if not observed:
        raise InputError(f"capture {path.name!r} holds no observation yet; run its sweep command again to go on")
    unknown = {row.workload for row in observed} - set(workloads)
    if unknown:
        raise InputError(
            f"capture {path.name!r}: observations name a workload that is not planned: {sorted(unknown)[0]}"
        )
    rows = [
        {
            **msgspec.structs.asdict(workloads[row.workload]),
            "run": row.run,
            "times_ns": row.times_ns,
            "capture": path.name,
        }
        for row in observed
    ]
    for row in rows:
        _check_row(path.name, row)
    table = pl.DataFrame(rows, schema={k: v for k, v in OBSERVATIONS.items() if k != "time_ns"}, orient="row")
    table = table.with_columns(time_ns=pl.col("times_ns").list.median()).select(list(OBSERVATIONS)).cast(OBSERVATIONS)
    return Capture(path.name, path, manifest, table)


def _manifest(file: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{file.parent.name}/{file.name} is not a capture manifest: no JSON object with a schema"
        ) from None
    if schema != SCHEMA:
        raise InputError(f"capture {file.parent.name!r} has schema {schema!r}, this version reads schema {SCHEMA}")
    missing = {"machine", "software", "settings", "calibration", "kernel"} - set(manifest)
    if missing:
        raise InputError(f"capture {file.parent.name!r}: capture.json lacks {', '.join(sorted(missing))}")
    try:
        msgspec.convert(manifest, _Manifest)
    except msgspec.ValidationError as error:
        raise InputError(f"capture {file.parent.name!r}: capture.json is damaged: {error}") from None
    return manifest


def _lines(file: Path, row_type: type[Row]) -> list[Row]:
    """Decode JSON lines; a last line cut short by a killed sweep is left out, a broken one elsewhere is refused."""
    if not file.is_file():
        raise InputError(f"capture {file.parent.name!r} has no {file.name}")
    content = file.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    try:
        return msgspec.json.Decoder(row_type).decode_lines(complete)
    except msgspec.MsgspecError as error:
        raise InputError(f"capture {file.parent.name!r}: {file.name} is damaged: {error}") from None


def _check_row(capture: str, row: Mapping[str, Any]) -> None:
    counts = row["tokens_per_expert"]
    if row["op"] not in OPS:
        raise InputError(f"capture {capture!r}: op {row['op']!r} is unknown; known: {', '.join(OPS)}")
    total = row["n_tokens"] * row["top_k"]
    if (
        len(counts) != row["n_experts"]
        or sum(counts) != total
        or not 0 <= min(counts) <= max(counts) <= row["n_tokens"]
    ):
        raise InputError(f"capture {capture!r}: workload {row['workload']} breaks tokens x top-k over its experts")
    if not row["times_ns"]:
        raise InputError(f"capture {capture!r}: workload {row['workload']} has no time")


def fingerprint_differences(first: Capture, other: Capture) -> dict[str, tuple[object, object]]:
    """Every fact of machine, software, kernel and settings in which two captures differ."""
    a, b = first.fingerprint, other.fingerprint
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def per_workload(observations: pl.DataFrame) -> pl.DataFrame:
    """One row a workload: the median over runs of the run medians, with `n_runs`; other columns as they are."""
    columns = [c for c in OBSERVATIONS if c not in ("workload", "run", "times_ns", "time_ns")]
    return observations.group_by("workload", maintain_order=True).agg(
        *[pl.col(c).first() for c in columns], pl.col("time_ns").median(), n_runs=pl.col("run").n_unique()
    )


def profile_of(capture: Capture) -> HardwareProfile:
    """The machine of a capture as its own calibration measured it."""
    manifest = capture.manifest
    date = str(manifest.get("created", ""))[:10] or None
    quantities = {
        key: Quantity(float(entry["value"]), "measured", entry.get("how", "collector calibration"), date)
        for key, entry in manifest["calibration"].items()
        if key in QUANTITIES
    }
    device = "gpu" if manifest["settings"]["device"] == "cuda" else "cpu"
    title = manifest["machine"].get("gpu_name" if device == "gpu" else "cpu_model", capture.name)
    return HardwareProfile(capture.name, f"{title}, as calibrated by capture {capture.name}", device, quantities)


def shipped_captures() -> list[Path]:
    """The capture folders that come with the project, whether installed or in a checkout."""
    here = Path(__file__).parent
    is_checkout = (here.parent / "pyproject.toml").is_file()
    roots = [here.parent / "traces" if is_checkout else here / "traces"]
    return sorted(file.parent for root in roots for file in root.glob("*/capture.json"))
