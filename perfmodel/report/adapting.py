"""Text pages about a model that a few points carried to another machine, and about which points to measure there."""

import math
from typing import TYPE_CHECKING, Any

from perfmodel import text
from perfmodel.report.words import table

if TYPE_CHECKING:  # these bring polars, scipy and scikit-learn, which reading a trace does not need
    import polars as pl

    from perfmodel.latency import LatencyModel


def _spread(log_sd: float | None) -> str:
    return "" if log_sd is None else f"{100 * math.expm1(log_sd):.0f} %"


def _errors(words: str, errors: dict[str, Any]) -> list[str]:
    return [words, *(text.frac(errors[key]) for key in ("median_ape_frac", "p90_ape_frac", "worst_ape_frac"))]


def calibration_page(model: "LatencyModel") -> str:
    """What changed and what was left alone and why, the points' errors before and after, and how intervals widened."""
    found = model.evidence_["calibrated"]
    origin, n_points = found["from"], found["n_points"]
    moved = [row for row in found["constants"] if row["before"] != row["after"]]
    stayed = [row for row in found["constants"] if row["before"] == row["after"]]
    lines = [
        f"{model.kernel}, {model.dtype}, on {model.profile.name}: from a model of {origin['kernel']}, "
        f"{origin['dtype']}, on {origin['hardware']} ({text.counted(origin['n_observations'], 'measurement')}) and "
        f"{text.counted(n_points, 'point')} of {text.counted(len(found['shapes']), 'shape')}",
        "error of the points\n"
        + table(
            [_errors("as transferred", found["zero_shot"]), _errors("each left out", found["left_out"])],
            ["", "median", "p90", "worst"],
        ),
    ]
    if moved:
        rows = [
            [row["name"], f"{row['before']:.4g}", f"{row['after']:.4g}", _spread(row["spread_before"]),
             _spread(row["spread_after"])]
            for row in moved
        ]  # fmt: skip
        header = ["what changed", "before", "after", "+- before", "+- after"]
        way = f"{100 * found['part']:.0f} % of the way to what the points say by themselves"
        lines.append(f"{table(rows, header)}\n{way}")
    else:
        lines.append("no constant changed: the model as it was transferred is kept")
    if stayed:
        rows = [[row["name"], f"{row['after']:.4g}", _spread(row["spread_before"]), row["why"] or ""] for row in stayed]
        lines.append(table(rows, ["left alone", "value", "+-", "why"]))
    if found["scalar_log"]:
        lines.append(f"all predictions times {math.exp(found['scalar_log']):.3f}, as what is left has a common part")
    if found["n_anomalies"]:
        lines.append(
            f"{text.counted(found['n_anomalies'], 'point')} far from any prediction (a failed configuration?), "
            "of which intervals do not speak"
        )
    if model.confidence_ is None:
        lines.append("no interval: the model it came from has none")
    else:
        lines.append(f"intervals are {found['widened']:.2f}x as wide as the model's it came from")
    return "\n\n".join(lines)


def design_page(points: "pl.DataFrame", model: "LatencyModel", hardware: str) -> str:
    """The points to measure, the most telling first, each with its reason."""
    rows = []
    for i, row in enumerate(points.to_dicts(), 1):
        gemm = "" if row.get("gemm_k") is None else f" {row['gemm_k']} x {row['gemm_n']}"
        rows.append(
            [
                f"{i}", f"{row['op']}{gemm}", row["shape"], text.count(row["n_tokens"]), row["routing"],
                text.ns(row["predicted_ns"]), f"{row['information_bits']:.1f}", row["reason"],
            ]
        )  # fmt: skip
    header = ["", "operation", "shape", "tokens", "routing", "predicted", "bits", "why"]
    return (
        f"{text.counted(points.height, 'point')} to measure on {hardware} for the model of {model.kernel}, "
        f"{model.dtype}, on {model.profile.name}\n\n" + table(rows, header)
    )
