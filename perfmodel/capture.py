"""A capture folder made by `collectors/`, read as one OBSERVATIONS table with the circumstances it was measured in."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from perfmodel.capture_lines import (
    ACCESS,
    CALIBRATION,
    DTYPES,
    GRAPH,
    LEFT_OUT,
    MANIFEST,
    OBSERVATIONS_FILE,
    OPS,
    PROFILES,
    RESIDENT,
    WORKLOADS,
    CalibrationLine,
    LeftOutLine,
    ObservationLine,
    WorkloadLine,
    read_lines,
    read_manifest,
    refuse_nested,
)
from perfmodel.errors import InputError
from perfmodel.hardware import QUANTITIES, HardwareProfile, Quantity, same_fact

# One row: one workload measured in one run (a fresh process). `time_ns` is the median of the repeats in `times_ns`.
# `gemm_k`, `gemm_n` are the sizes of a single grouped GEMM call, null for a whole MoE layer. `offloaded` are the
# experts in host memory, taken in `order` of routing probability, and `residency` how zero-copy saw two memories: null
# where nothing is offloaded. `launch` is `graph` for calls replayed from a CUDA graph, null for launched ones; `study`
# is a label of the plan, null in captures without one.
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
        "offloaded": pl.List(pl.Int64()),
        "order": pl.String(),
        "residency": pl.String(),
        "launch": pl.String(),
        "study": pl.String(),
        "run": pl.Int64(),
        "times_ns": pl.List(pl.Int64()),
        "time_ns": pl.Float64(),
        "capture": pl.String(),
    }
)


IS_OFFLOADED = (pl.col("access") != RESIDENT) | (pl.col("offload_frac") > 0)  # of a row of OBSERVATIONS


# One row: one measurement of a calibration probe in one run, `value` in the base unit `unit`; `params` are JSON. Null
# `quantity`: a detail that no machine number stands for.
CALIBRATIONS = pl.Schema(
    {
        "probe": pl.String(),
        "params": pl.String(),
        "run": pl.Int64(),
        "quantity": pl.String(),
        "value": pl.Float64(),
        "unit": pl.String(),
        "spread_frac": pl.Float64(),
        "n": pl.Int64(),
        "how": pl.String(),
        "capture": pl.String(),
    }
)
# One row: a workload, probe, profile or stage (the others null) that gave nothing, and why; null `run`: in none.
LEFT_OUT_TABLE = pl.Schema(
    {
        "workload": pl.String(),
        "probe": pl.String(),
        "profile": pl.String(),
        "stage": pl.String(),
        "params": pl.String(),
        "run": pl.Int64(),
        "reason": pl.String(),
    }
)


# What was seen of a machine while it was measured (clocks, power, temperature): of the occasion, not of the machine.
SEEN_ONCE = ("under_load",)
SIZES = ("n_tokens", "top_k", "n_experts", "hidden", "inter", "n_gemms")  # without which there is no work
MAX_COUNTS = 2**26  # experts of all observations together: a hundred times what a large capture has


@dataclass(frozen=True)
class Capture:
    """One folder of measurements: the manifest (machine, software, settings, calibration), its observations, each
    calibration measurement (CALIBRATIONS), and what was left out with the reason (LEFT_OUT_TABLE).

    `digest` is a short name of everything a model is computed from: fingerprint, calibration, workloads, observations.
    """

    name: str
    path: Path
    manifest: Mapping[str, Any]
    observations: pl.DataFrame
    calibrations: pl.DataFrame
    left_out: pl.DataFrame
    digest: str

    @property
    def capabilities(self) -> Mapping[str, Any]:
        """What the machine was found able to do (which access modes, which dtypes); empty in captures without it."""
        return self.manifest.get("capabilities") or {}

    @property
    def dtype(self) -> str:
        """The dtype the settings name, as observations call it."""
        named = str(self.manifest["settings"]["dtype"])
        return DTYPES.get(named, named)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must agree before measurements may be pooled or compared: machine, software, kernel, settings."""
        return _fingerprint(self.manifest)

    @property
    def traces(self) -> list[Path]:
        """The profiled traces of the folder."""
        return sorted((self.path / PROFILES).glob("*.json.gz"))


def load_capture(path: str | Path) -> Capture:
    """Read a capture folder; raises InputError when it is not one, is empty, or contradicts itself."""
    path = Path(path)
    manifest_file = path / MANIFEST
    if not manifest_file.is_file():
        found = "a file" if path.is_file() else "a folder without capture.json" if path.is_dir() else "nothing"
        raise InputError(
            f"{str(path)!r} is not a capture folder: found {found}; make one with `perfmodel collect sweep`"
        )
    manifest = read_manifest(manifest_file)
    workloads: dict[str, WorkloadLine] = {}
    for row in read_lines(path / WORKLOADS, WorkloadLine):
        if workloads.setdefault(row.workload, row) != row:
            raise InputError(f"capture {path.name!r}: {WORKLOADS} plans workload {row.workload} twice, differently")
    observed = read_lines(path / OBSERVATIONS_FILE, ObservationLine)
    if not observed:
        raise InputError(f"capture {path.name!r} holds no observation yet; run its sweep command again to go on")
    unknown = {row.workload for row in observed} - set(workloads)
    if unknown:
        raise InputError(
            f"capture {path.name!r}: observations name a workload that is not planned: {sorted(unknown)[0]}"
        )
    table = observations_of(path.name, workloads, ((row.workload, row.run, row.times_ns) for row in observed))
    return Capture(path.name, path, manifest, table, _calibrations(path), _left_out(path), _digest(path, manifest))


def observations_of(
    capture: str, workloads: Mapping[str, WorkloadLine], measured: Iterable[tuple[str, int, list[int]]]
) -> pl.DataFrame:
    """An OBSERVATIONS table from the workload, the run and the times of each measurement; raises InputError where a
    workload contradicts itself."""
    planned = {key: msgspec.structs.asdict(workload) for key, workload in workloads.items()}
    rows = [
        {**planned[workload], "run": run, "times_ns": times_ns, "capture": capture}
        for workload, run, times_ns in measured
    ]
    if sum(len(row["tokens_per_expert"]) for row in rows) > MAX_COUNTS:
        raise InputError(f"capture {capture!r}: its observations have more than {MAX_COUNTS} experts in all")
    for row in rows:
        _check_row(capture, row)
    table = pl.DataFrame(rows, schema={k: v for k, v in OBSERVATIONS.items() if k != "time_ns"}, orient="row")
    return table.with_columns(time_ns=pl.col("times_ns").list.median()).select(list(OBSERVATIONS)).cast(OBSERVATIONS)


def _fingerprint(manifest: Mapping[str, Any]) -> dict[str, Any]:
    settings = manifest["settings"]
    return {
        **{f"machine.{k}": v for k, v in sorted(manifest["machine"].items()) if k not in SEEN_ONCE},
        **{f"software.{key}": value for key, value in sorted(manifest["software"].items())},
        "kernel": manifest["kernel"],
        **{f"settings.{key}": settings.get(key) for key in ("device", "dtype", "threads")},
    }


def _digest(path: Path, manifest: Mapping[str, Any]) -> str:
    content = json.dumps([_fingerprint(manifest), manifest["calibration"]], sort_keys=True, default=str).encode()
    for name in (WORKLOADS, OBSERVATIONS_FILE):
        content += (path / name).read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def _calibrations(path: Path) -> pl.DataFrame:
    lines = read_lines(path / CALIBRATION, CalibrationLine, optional=True)
    for line in lines:
        refuse_nested(line.params, f"{path.name}/{CALIBRATION}")
    rows = [{**msgspec.structs.asdict(line), "params": _params(line.params), "capture": path.name} for line in lines]
    return pl.DataFrame([{key: row[key] for key in CALIBRATIONS} for row in rows], schema=CALIBRATIONS)


def _left_out(path: Path) -> pl.DataFrame:
    lines = read_lines(path / LEFT_OUT, LeftOutLine, optional=True)
    for line in lines:
        refuse_nested(line.params, f"{path.name}/{LEFT_OUT}")
    rows = [
        {
            **msgspec.structs.asdict(line),
            "params": _params(line.params),
            "run": line.run if isinstance(line.run, int) else None,
        }
        for line in lines
    ]
    return pl.DataFrame([{key: row[key] for key in LEFT_OUT_TABLE} for row in rows], schema=LEFT_OUT_TABLE)


def _params(params: Mapping[str, Any] | None) -> str | None:
    return None if params is None else json.dumps(params, sort_keys=True)


def _check_row(capture: str, row: Mapping[str, Any]) -> None:
    counts = row["tokens_per_expert"]
    if row["op"] not in OPS:
        raise InputError(f"capture {capture!r}: op {row['op']!r} is unknown; known: {', '.join(OPS)}")
    if row["access"] not in ACCESS:
        raise InputError(
            f"capture {capture!r}: workload {row['workload']} has access {row['access']!r}; known: {', '.join(ACCESS)}"
        )
    total = row["n_tokens"] * row["top_k"]
    if (
        not counts
        or len(counts) != row["n_experts"]
        or sum(counts) != total
        or not 0 <= min(counts) <= max(counts) <= row["n_tokens"]
    ):
        raise InputError(f"capture {capture!r}: workload {row['workload']} breaks tokens x top-k over its experts")
    sizes = SIZES if row["op"] == "moe_layer" else (*SIZES, "gemm_k", "gemm_n")
    empty = [size for size in sizes if not row[size]]
    if empty:
        raise InputError(f"capture {capture!r}: workload {row['workload']} has no {empty[0]}, and so no work")
    if any(expert >= row["n_experts"] for expert in row["offloaded"] or ()):
        raise InputError(f"capture {capture!r}: workload {row['workload']} offloads an expert that it does not have")
    if not row["times_ns"]:
        raise InputError(f"capture {capture!r}: workload {row['workload']} has no time")


def fingerprint_differences(first: Capture, other: Capture) -> dict[str, tuple[object, object]]:
    """Every fact of machine, software, kernel and settings in which two captures differ, among those that both tell."""
    a, b = first.fingerprint, other.fingerprint
    return {key: (a[key], b[key]) for key in sorted(a.keys() & b.keys()) if not same_fact(key, a[key], b[key])}


def per_workload(observations: pl.DataFrame) -> pl.DataFrame:
    """One row a workload: the median over runs of the run medians, with `n_runs`; other columns as they are."""
    columns = [c for c in OBSERVATIONS if c not in ("workload", "run", "times_ns", "time_ns")]
    return observations.group_by("workload", maintain_order=True).agg(
        *[pl.col(c).first() for c in columns], pl.col("time_ns").median(), n_runs=pl.col("run").n_unique()
    )


def fitted_rows(observations: pl.DataFrame, dtype: str) -> tuple[pl.DataFrame, dict[str, int]]:
    """The rows that one model of resident experts may pool, and how many are not among them, by the reason.

    Left out are other dtypes, offloaded experts, and the rarer kind of launch: calls that the host launches and calls
    replayed from a CUDA graph cost the host differently.
    """
    mine = observations.filter(pl.col("dtype") == dtype, ~IS_OFFLOADED)
    launch = GRAPH if 2 * mine["launch"].is_not_null().sum() > mine.height else None
    other = pl.col("launch").is_null() if launch == GRAPH else pl.col("launch").is_not_null()
    reasons = {
        f"of a dtype other than {dtype}": pl.col("dtype") != dtype,
        "with offloaded experts": IS_OFFLOADED,
        "launched by the host, not replayed" if launch == GRAPH else "replayed from a CUDA graph": other,
    }
    n_left_out = {}
    for reason, condition in reasons.items():
        kept = observations.filter(~condition)
        if kept.height < observations.height:
            n_left_out[reason] = observations.height - kept.height
        observations = kept
    return observations, n_left_out


def profile_of(capture: Capture) -> HardwareProfile:
    """The machine of a capture as its own calibration measured it."""
    manifest = capture.manifest
    date = str(manifest.get("created", ""))[:10] or None
    quantities = {
        key: Quantity(float(entry["value"]), "measured", entry.get("how", "collector calibration"), date)
        for key, entry in manifest["calibration"].items()
        if key in QUANTITIES and entry["value"]
    }
    device = "gpu" if manifest["settings"]["device"] == "cuda" else "cpu"
    n_threads = manifest["settings"].get("threads")
    if device == "cpu" and isinstance(n_threads, int) and n_threads > 0:  # these computed, whatever cores there are
        quantities["n_cores_count"] = Quantity(float(n_threads), "measured", "threads of the collection", date)
    title = manifest["machine"].get("gpu_name" if device == "gpu" else "cpu_model", capture.name)
    return HardwareProfile(capture.name, f"{title}, as calibrated by capture {capture.name}", device, quantities)


def shipped_captures() -> list[Path]:
    """The capture folders that come with the project, whether installed or in a checkout."""
    here = Path(__file__).parent
    is_checkout = (here.parent / "pyproject.toml").is_file()
    roots = [here.parent / "traces" if is_checkout else here / "traces"]
    return sorted(file.parent for root in roots for file in root.glob("*/capture.json"))
