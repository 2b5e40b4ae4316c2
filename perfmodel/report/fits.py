"""Text pages about fitted models and how well they predict."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from perfmodel import text
from perfmodel.report.words import table

if TYPE_CHECKING:  # this brings scipy and scikit-learn, which reading a trace does not need
    from perfmodel.latency import LatencyModel

MAX_TRUSTED = 1.0  # a half-width of 100 %


def fit_page(model: "LatencyModel") -> str:
    """Held-out error by shape beside the baselines, the constants, the residual, the interval, and anomalies."""
    errors = model.errors_
    shapes = [s for s in errors["model"] if s != "all"]

    def row(shape: str) -> list[str]:
        e = errors["model"][shape]
        others = [text.frac(errors[who][shape]["median_ape_frac"]) for who in ("roofline_only", "constant")]
        own = [text.frac(e[name]) for name in ("median_ape_frac", "p90_ape_frac", "worst_ape_frac")]
        return [shape, str(e["n"]), *own, *others]

    header = ["held-out shape", "n", "median", "p90", "worst", "roofline only", "constant"]
    informed = set(model.informed_)
    constants = [
        [name, f"{value:.4g}", "" if name in informed else "not measured, the default"]
        for name, value in vars(model.constants_).items()
    ]
    return "\n\n".join(
        [
            f"fitted on {model.n_observations_} workloads of {model.profile.name}, {model.dtype}, {model.kernel}",
            "absolute error of each shape, predicted without its data; last two columns: medians of the baselines\n"
            + table([row(s) for s in [*shapes, "all"]], header),
            table(constants, ["constant", "value", ""]),
            _sureness(model),
        ]
    )


def _sureness(model: "LatencyModel") -> str:
    sure = model.confidence_
    used = "used" if model.residual_ is not None else "not used: held-out errors did not say that it helps"
    lines = [f"residual      {used}"]
    if model.tiles_ is not None:
        lines.append(f"tiles         as {model.tiles_.framework} configures its launches")
    if sure is None or model.typical_half_width_ is None:
        return "\n".join([*lines, "interval      none: too few measurements could be held out"])
    half_width = math.expm1(model.typical_half_width_)
    if half_width > MAX_TRUSTED:
        lines.append("NOT TO BE TRUSTED: held-out errors are too large; was the machine busy?")
    lines.append(
        f"interval      90 %, typically +{100 * half_width:.0f} % / -{100 * (1 - 1 / (1 + half_width)):.0f} %, from "
        f"{text.count(sure.n_scores)} held-out errors of {sure.n_groups} shapes"
    )
    if sure.n_anomalies:
        lines.append(f"anomalies     {text.counted(sure.n_anomalies, 'measurement')} that no physics explains:")
        lines += [f"              {words}" for words in model.anomalies_]
    return "\n".join(lines)


def evaluation_page(result: Mapping[str, Any]) -> str:
    """Errors of each kernel and overall beside the baselines, with coverage and width of the intervals."""
    header = ["", "n", "median", "MAPE", "p90", "worst", "rank corr.", "covered", "half-width", "refused"]
    blocks = []
    for one in result["kernels"]:
        rows = [_row("all", one)]
        if one["screened"]["n"] != one["n"]:
            rows.append(_row("without failed configurations", one["screened"]))
        rows += [_row(name.replace("_", " "), errors) for name, errors in one["baselines"].items()]
        blocks.append(f"{one['kernel']}, held out by {one['split']}\n" + table(rows, header))
        if len(one["shapes"]) > 1:
            blocks.append(table([_row(name, errors) for name, errors in one["shapes"].items()], ["shape", *header[1:]]))
    if len(result["kernels"]) > 1:
        rows = [_row("all", result["overall"]), _row("without failed configurations", result["overall"]["screened"])]
        blocks.append("all kernels, each by its own models\n" + table(rows, header))
    return "\n\n".join(blocks)


def _row(name: str, errors: Mapping[str, Any]) -> list[str]:
    figures = [text.frac(errors.get(key)) for key in ("median_ape", "mape", "p90_ape", "worst_ape")]
    rank = errors.get("spearman_within_tokens")
    sure = [text.frac(errors[key]) if key in errors else "" for key in ("coverage90", "half_width")]
    refused = str(errors["n_refused"]) if "n_refused" in errors else ""
    return [name, str(errors["n"]), *figures, "n/a" if rank is None else f"{rank:.3f}", *sure, refused]
