"""Text pages about fitted models and how well they predict."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from perfmodel import text
from perfmodel.capture_lines import GRAPH
from perfmodel.report.words import table

if TYPE_CHECKING:  # this brings scipy and scikit-learn, which reading a trace does not need
    from perfmodel.latency import LatencyModel
    from perfmodel.offload.fitted import HeldOut

MAX_TRUSTED = 1.0  # a half-width of 100 %
MAX_ANOMALIES_FRAC = 0.25  # of the measurements, which intervals do not speak of
MAX_TRUSTED_ERROR = 0.5  # median held-out error where there is no interval
MUCH_WORSE = 2.0  # a shape's median error over that of all, from which on it is named
SHAPES_HEADER = ["held-out shape", "n", "median", "p90", "worst", "roofline only", "constant"]
MODELS_HEADER = ["model", "dtype", "n", "shapes", *SHAPES_HEADER[2:], "interval"]
LIMITS_HEADER = ["beyond", "what is known"]
OUTSIDE = "wider intervals outside, none far outside"
UNTRUSTED = "NOT TO BE TRUSTED: held-out errors are too large; was the machine busy, are times in another unit?"


def fit_page(model: "LatencyModel") -> str:
    """Held-out error by shape beside the baselines, the constants, the residual, the interval, and anomalies."""
    informed = set(model.informed_)
    constants = [
        [name, f"{value:.4g}", "" if name in informed else "not measured, the default"]
        for name, value in vars(model.constants_).items()
    ]
    return "\n\n".join(
        [
            f"fitted on {model.n_observations_} workloads of {model.profile.name}, {model.dtype}, {model.kernel}",
            "absolute error of each shape, predicted without its data; last two columns: medians of the baselines\n"
            + table(shape_rows(model), SHAPES_HEADER),
            table(constants, ["constant", "value", ""]),
            _sureness(model),
            *_offloaded(model),
        ]
    )


def _offloaded(model: "LatencyModel") -> list[str]:
    """What was learned of each way to reach offloaded experts: errors held out by shape and by offloaded fraction, the
    interval, and each constant with its range; nothing where no expert was offloaded."""
    missing = model.evidence_.get("offload_left_out", {})
    lines = [f"no constants of {way}: {why}" for way, why in missing.items()]
    if not model.offload_:
        return lines
    from perfmodel.offload.fitted import from_json

    errors, constants = [], []
    for way, one in from_json(model.offload_).ways.items():
        width = "none" if one.log_half_width is None else f"+{100 * math.expm1(one.log_half_width):.0f} %"
        held = [_held_out(found) for found in (one.by_shape, one.by_frac)]
        errors.append([str(way), str(one.n_observations), str(one.n_with_resident), *held[0], *held[1], width])
        for name, c in one.constants.items():
            known = "" if c.is_known else "loosely: not narrowed to a quarter of what was believed"
            constants.append([str(way), name, f"{c.value:.4g}", f"{c.low:.4g} to {c.high:.4g}", known])
    header = ["way", "n", "beside resident", "by shape", "p90", "groups", "by fraction", "p90", "groups", "interval"]
    return [
        "absolute error of latencies with offloaded experts, predicted without data of their shape, then of their "
        "offloaded\nfraction (medians; none: fewer than three to hold out)\n" + table(errors, header),
        table(constants, ["way", "constant", "value", "90 % range", ""]),
        *lines,
    ]


def _held_out(found: "HeldOut | None") -> list[str]:
    if found is None:
        return ["none", "", ""]
    return [text.frac(found.median_frac), text.frac(found.p90_frac), str(found.n_groups)]


def _sureness(model: "LatencyModel") -> str:
    sure = model.confidence_
    used = "used" if model.residual_ is not None else "not used: held-out errors did not say that it helps"
    lines = [f"residual      {used}"]
    if model.tiles_ is not None:
        lines.append(f"tiles         as {model.tiles_.framework} configures its launches")
    if _is_untrusted(model):
        lines.append(UNTRUSTED)
    lines.append(f"interval      {_interval(model)}")
    if sure is not None and sure.n_anomalies:
        lines.append(f"anomalies     {text.counted(sure.n_anomalies, 'measurement')} that no physics explains:")
        lines += [f"              {words}" for words in model.anomalies_]
    return "\n".join(lines)


def _is_untrusted(model: "LatencyModel") -> bool:
    """Whether held-out errors are too large to trust the model with anything."""
    sure, typical = model.confidence_, model.typical_half_width_
    if sure is None or typical is None:
        return bool(model.errors_["model"]["all"]["median_ape_frac"] > MAX_TRUSTED_ERROR)
    is_often_off = sure.n_anomalies > MAX_ANOMALIES_FRAC * (sure.n_scores + sure.n_anomalies)
    return is_often_off or math.expm1(typical) > MAX_TRUSTED


def _interval(model: "LatencyModel") -> str:
    sure = model.confidence_
    if sure is None or model.typical_half_width_ is None:
        return "none: too few measurements could be held out, or most of them lie far from what is predicted"
    half_width = math.expm1(model.typical_half_width_)
    return (
        f"90 %, typically +{100 * half_width:.0f} % / -{100 * (1 - 1 / (1 + half_width)):.0f} %, from "
        f"{text.count(sure.n_scores)} held-out errors of {sure.n_groups} shapes"
    )


def limits(model: "LatencyModel") -> list[list[str]]:
    """Where a fitted model must not be trusted, and why: rows of LIMITS_HEADER."""
    errors, sure = model.errors_["model"], model.confidence_
    typical = errors["all"]["median_ape_frac"]
    found = [("the whole model", UNTRUSTED)] if _is_untrusted(model) else []
    for name, one in errors.items():
        if name != "all" and one["median_ape_frac"] > MUCH_WORSE * typical:
            words = f"median error {text.frac(one['median_ape_frac'])}, worst {text.frac(one['worst_ape_frac'])}"
            found.append((f"shapes like {name}", f"{words}, against {text.frac(typical)} over all shapes"))
    found += [("anomaly", words) for words in model.anomalies_]
    if model.profile.device == "gpu":
        if not model.offload_:
            found.append(
                ("offloaded experts", "none were measured: their cost rests on assumed constants, no interval")
            )
        how, other = "replayed from a graph", "launched by the host"
        how, other = (how, other) if model.evidence_.get("launch") == GRAPH else (other, how)
        found.append((f"calls {other}", f"only calls {how} were measured; for others no interval"))
    ops = ", ".join(model.ops_)
    found.append(("other kernels, types", f"fitted to {model.kernel} in {model.dtype} ({ops}); for others no interval"))
    defaults = [name for name in vars(model.constants_) if name not in set(model.informed_)]
    if defaults:
        found.append(("constants", f"not measured, at their defaults: {', '.join(defaults)}"))
    for name, (low, high) in (sure.ranges if sure else {}).items():
        found.append((f"range of {name}", f"fitted from {_limit(low)} to {_limit(high)}; {OUTSIDE}"))
    return [list(one) for one in found]


def limits_page(model: "LatencyModel") -> str:
    """The same as a page."""
    rows = limits(model)
    width = max(len(where) for where, _ in rows)
    return "\n".join(["where not to trust this model", *(f"{where.ljust(width)}  {why}" for where, why in rows)])


def evaluation_page(result: Mapping[str, Any]) -> str:
    """Errors of each kernel and overall beside the baselines, with coverage and width of the intervals."""
    header = ["", "n", "median", "MAPE", "p90", "worst", "rank corr.", "covered", "half-width", "refused"]
    blocks = []
    for one in result["kernels"]:
        rows = [_row("all", one)]
        if one["screened"]["n"] != one["n"]:
            rows.append(_row("without failed configurations", one["screened"]))
        rows += [_row(name.replace("_", " "), errors) for name, errors in one["baselines"].items()]
        how = "by the model as it is" if one["split"] == "none" else f"held out by {one['split']}"
        blocks.append(f"{one['kernel']}, {how}\n" + table(rows, header))
        if len(one["shapes"]) > 1:
            blocks.append(table([_row(name, errors) for name, errors in one["shapes"].items()], ["shape", *header[1:]]))
        if one.get("offload"):
            rows = [
                [way, str(e["n"]), *(text.frac(e[key]) for key in ("median_ape", "p90_ape", "worst_ape")),
                 "fitted" if e["is_fitted"] else "assumed"]
                for way, e in one["offload"].items()
            ]  # fmt: skip
            words = "with offloaded experts, on top of the measured resident time where there is one\n"
            blocks.append(words + table(rows, ["way", "n", "median", "p90", "worst", "constants"]))
    if len(result["kernels"]) > 1:
        rows = [_row("all", result["overall"]), _row("without failed configurations", result["overall"]["screened"])]
        how = "by the model as it is" if result["kernels"][0]["split"] == "none" else "each by its own models"
        blocks.append(f"all kernels, {how}\n" + table(rows, header))
    return "\n\n".join(blocks)


def _row(name: str, errors: Mapping[str, Any]) -> list[str]:
    figures = [text.frac(errors.get(key)) for key in ("median_ape", "mape", "p90_ape", "worst_ape")]
    rank = errors.get("spearman_within_tokens")
    sure = [text.frac(errors[key]) if key in errors else "" for key in ("coverage90", "half_width")]
    refused = str(errors["n_refused"]) if "n_refused" in errors else ""
    return [name, str(errors["n"]), *figures, "n/a" if rank is None else f"{rank:.3f}", *sure, refused]


def _limit(value: float) -> str:
    return text.count(value) if value >= 100 or value == round(value) else f"{value:.3g}"


def models_rows(models: Mapping[str, "LatencyModel"]) -> list[list[str]]:
    """How well each of several models predicts shapes that it did not see, beside baselines: rows of MODELS_HEADER."""
    rows = []
    for name, model in models.items():
        errors = model.errors_
        e = errors["model"]["all"]
        own = [text.frac(e[key]) for key in ("median_ape_frac", "p90_ape_frac", "worst_ape_frac")]
        others = [text.frac(errors[who]["all"]["median_ape_frac"]) for who in ("roofline_only", "constant")]
        width = model.typical_half_width_
        wide = "none" if width is None else f"+{100 * math.expm1(width):.0f} %"
        rows.append([name, model.dtype, text.count(e["n"]), str(len(errors["model"]) - 1), *own, *others, wide])
    return rows


def shape_rows(model: "LatencyModel") -> list[list[str]]:
    """The same of each shape and of all of one model: rows of SHAPES_HEADER."""
    errors = model.errors_

    def row(shape: str) -> list[str]:
        e = errors["model"][shape]
        others = [text.frac(errors[who][shape]["median_ape_frac"]) for who in ("roofline_only", "constant")]
        own = [text.frac(e[name]) for name in ("median_ape_frac", "p90_ape_frac", "worst_ape_frac")]
        return [shape, str(e["n"]), *own, *others]

    return [row(shape) for shape in [*(s for s in errors["model"] if s != "all"), "all"]]
