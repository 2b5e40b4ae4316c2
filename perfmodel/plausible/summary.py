"""What a capture holds, in tables: points by study and access, calibrated numbers, what was left out, profiles."""

from typing import Any

import polars as pl

from perfmodel import text
from perfmodel.capture import Capture
from perfmodel.capture_lines import WORKLOADS, complete_lines
from perfmodel.plausible.points import error_frac, stated_error_frac

KIND = ("study", "access", "residency", "launch", "dtype")

# One row: the points of one study, access, residency, launch and dtype (null as in OBSERVATIONS). Errors are those of
# each point's median over its repeats; `noisy_frac` is the share of points above the error that was asked for.
STUDIES = pl.Schema(
    {
        **dict.fromkeys(KIND, pl.String()),
        "n_workloads": pl.Int64(),
        "n_shapes": pl.Int64(),
        "n_routings": pl.Int64(),
        "least_tokens": pl.Int64(),
        "most_tokens": pl.Int64(),
        "n_runs": pl.Int64(),
        "n_points": pl.Int64(),
        "median_error_frac": pl.Float64(),
        "worst_error_frac": pl.Float64(),
        "noisy_frac": pl.Float64(),
    }
)


def studies(capture: Capture) -> pl.DataFrame:
    """A STUDIES table of the capture."""
    stated = stated_error_frac(capture.manifest["settings"].get("timing"))
    errors = [error_frac(times) for times in capture.observations["times_ns"].to_list()]
    error = pl.col("error_frac")
    table = capture.observations.with_columns(error_frac=pl.Series(errors, dtype=pl.Float64))
    found = table.group_by(KIND, maintain_order=True).agg(
        n_workloads=pl.col("workload").n_unique(),
        n_shapes=pl.col("shape").n_unique(),
        n_routings=pl.col("routing").n_unique(),
        least_tokens=pl.col("n_tokens").min(),
        most_tokens=pl.col("n_tokens").max(),
        n_runs=pl.col("run").n_unique(),
        n_points=pl.len(),
        median_error_frac=error.median(),
        worst_error_frac=error.max(),
        noisy_frac=(error > stated).mean(),
    )
    return found.select(list(STUDIES)).cast(STUDIES)


def calibrated(capture: Capture) -> list[dict[str, Any]]:
    """The calibrated numbers of the manifest: `quantity`, `value` in its base unit, `spread_frac`, `n`, `how`."""
    return [
        {"quantity": key, **{name: entry.get(name) for name in ("value", "spread_frac", "n", "how")}}
        for key, entry in capture.manifest["calibration"].items()
    ]


def left_out(capture: Capture) -> list[dict[str, Any]]:
    """What gave no number, by reason: `reason`, `n` points or probes, and an `example` of them; both are null for what
    was never planned."""
    rows = [{"reason": sentence, "n": None, "example": None} for sentence in capture.manifest.get("skipped") or ()]
    by_reason = capture.left_out.group_by("reason", maintain_order=True).agg(
        n=pl.len(), example=pl.coalesce("workload", "probe", "profile", "stage").first()
    )
    return rows + by_reason.to_dicts()


def profiles(capture: Capture) -> list[dict[str, Any]]:
    """The profiles of the folder: `name` and `size_bytes`."""
    found = sorted(file for file in (capture.path / "profiles").glob("*") if file.is_file())
    return [{"name": file.name, "size_bytes": file.stat().st_size} for file in found]


def machine_words(capture: Capture) -> list[str]:
    """What the machine and its software are, a line each: processor, GPU where one computed, software."""
    machine, software, settings = (capture.manifest[key] for key in ("machine", "software", "settings"))

    def part(key: str, words: str, of: dict[str, Any] = machine) -> list[str]:
        value = of.get(key)
        return [] if value in (None, "") else [words.format(value)]

    def size(key: str, words: str) -> list[str]:
        value = machine.get(key)
        return [words.format(text.n_bytes(value))] if isinstance(value, int | float) and value else []

    processor = [
        *part("cpu_model", "{}"),
        *part("n_cores", "{} cores"),
        *part("n_threads", "{} threads used"),
        *size("l3_bytes", "{} of last-level cache"),
        *size("memory_bytes", "{} of memory"),
        *(["a virtual machine"] if machine.get("hypervisor") else []),
    ]
    link = f"PCIe {machine.get('pcie_gen_max')}.0 x{machine.get('pcie_width_max')}"
    if machine.get("link_kind") == "nvlink-c2c":
        link = "NVLink-C2C"
    gpu = [
        *part("gpu_name", "{}"),
        *part("gpu_n_sms", "{} SMs"),
        *size("gpu_memory_bytes", "{} of memory"),
        *part("driver", "driver {}"),
        *part("power_limit_watts", "power limit {} W"),
        *([link] if machine.get("pcie_gen_max") or link == "NVLink-C2C" else []),
    ]
    programs = [
        *part("torch", "torch {}", software),
        *part("torch_cuda", "CUDA {}", software),
        *part("python", "Python {}", software),
        *([f"kernel {capture.manifest['kernel']}"] if capture.manifest["kernel"] else []),
        f"computing {capture.dtype} on the {'GPU' if settings['device'] == 'cuda' else 'CPU'}",
    ]
    return [", ".join(words) for words in (gpu, _under_load(machine.get("under_load")), processor, programs) if words]


def _under_load(seen: object) -> list[str]:
    if not isinstance(seen, dict):
        return []
    units = {"sm_clock_mhz": "SM clock {:,.0f} MHz", "memory_clock_mhz": "memory clock {:,.0f} MHz"}
    units |= {"power_watts": "{:,.0f} W", "temperature_c": "{:,.0f} degrees"}
    found = [words.format(seen[key]) for key, words in units.items() if isinstance(seen.get(key), int | float)]
    reasons = seen.get("clock_reasons")
    found += [str(reason) for reason in reasons] if isinstance(reasons, list) else []
    return ["under load: " + found[0], *found[1:]] if found else []


def summary(capture: Capture) -> dict[str, Any]:
    """Everything that `perfmodel captures show` tells, as plain values; times and rates in base units."""
    manifest = capture.manifest
    return {
        "capture": capture.name,
        "created": manifest.get("created"),
        "n_planned": capture.manifest.get("n_planned") or len(complete_lines(capture.path / WORKLOADS)),
        "n_measured": capture.observations["workload"].n_unique(),
        "machine": dict(manifest["machine"]),
        "software": dict(manifest["software"]),
        "capabilities": dict(capture.capabilities),
        "calibration": calibrated(capture),
        "n_calibration_lines": capture.calibrations.height,
        "studies": studies(capture).to_dicts(),
        "left_out": left_out(capture),
        "profiles": profiles(capture),
    }
