"""A fitted model as a JSON file, and back; never pickle."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perfmodel.errors import InputError
from perfmodel.hardware import DEVICES, EVIDENCE, HardwareProfile, Quantity
from perfmodel.moe import WEIGHT_BYTES
from perfmodel.tile_rules import FRAMEWORKS, TileRule

from .confidence import confidence_from_json
from .model import LatencyModel
from .trees import trees_from_json
from .work import HULL, LAYER_OPS, N_FEATURES, N_TILE_FEATURES

MODEL_SCHEMA = 2
KIND = "perfmodel latency model"
FITTED_DIR = Path(__file__).parent.parent / "data" / "fitted"
OPS = ("grouped_gemm", *LAYER_OPS)
ERRORS = ("n", "median_ape_frac", "mape_frac", "p90_ape_frac", "worst_ape_frac")
POINT_WORDS = ("op", "shape", "routing")
POINT_NUMBERS = ("n_tokens", "measured_ns", "predicted_ns", "roofline_only_ns", *(f"at_{name}" for name in HULL))


def save_model(model: LatencyModel, path: str | Path) -> None:
    """Write the model as JSON, beside and then renamed; `evidence_` says what it was fitted on."""
    content = {
        "schema": MODEL_SCHEMA,
        "kind": KIND,
        "dtype": model.dtype,
        "kernel": model.kernel,
        "hardware": {
            **asdict(model.profile),
            "quantities": {k: asdict(q) for k, q in model.profile.quantities.items()},
        },
        "constants": asdict(model.constants_),
        "tiles": None if model.tiles_ is None else asdict(model.tiles_),
        "residual": None if model.residual_ is None else model.residual_.to_json(),
        "confidence": None if model.confidence_ is None else model.confidence_.to_json(),
        "typical_half_width": model.typical_half_width_,
        "anomalies": model.anomalies_,
        "informed": model.informed_,
        "ops": model.ops_,
        "n_observations": model.n_observations_,
        "errors": model.errors_,
        "points": model.points_,
        "offload": model.offload_,
        "evidence": model.evidence_,
    }
    beside = Path(path).with_name(Path(path).name + ".part")
    try:
        beside.write_text(_readable(content) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise InputError(f"cannot write the model to {str(path)!r}: {error.strerror}") from None


def _readable(content: dict[str, Any]) -> str:
    """JSON with one line a key; what is long (trees, points) stands in one line each."""
    lines = []
    for key, value in content.items():
        is_long = key in ("residual", "confidence", "points", "offload")
        lines.append(f" {json.dumps(key)}: {json.dumps(value, indent=None if is_long else 1, allow_nan=False)}")
    return "{\n" + ",\n".join(lines) + "\n}"


def shipped_models() -> dict[str, Path]:
    """The models that come with the project, by name."""
    return {path.stem: path for path in sorted(FITTED_DIR.glob("*.json"))}


def load_model(source: str | Path) -> LatencyModel:
    """Read a model written by `save_model`, by path or by the name of a shipped one.

    Raises InputError when the file is missing, cannot be read, is not a model, or of another schema.
    """
    path = shipped_models().get(str(source), Path(source))
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        if content["kind"] != KIND:
            raise KeyError
        if content["schema"] != MODEL_SCHEMA:
            raise InputError(
                f"model {path.name} has schema {content['schema']}, this version reads {MODEL_SCHEMA}; fit it again"
            )
        return _model(content)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(
            f"no model file {str(path)!r}; make one with `perfmodel fit SOURCE --out MODEL.json`, or name a shipped "
            f"one: {', '.join(shipped_models()) or 'none'}"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read the model {str(path)!r}: {error.strerror}") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
        raise InputError(f"{path.name} is not a model written by `perfmodel fit`") from None


def _refuse(constant: str) -> None:
    raise ValueError(constant)  # NaN and infinities, which are no JSON


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _model(content: dict[str, Any]) -> LatencyModel:
    """The model; raises what `load_model` turns into a sentence on what no fit could have written."""
    model = LatencyModel(_profile(content["hardware"]), content["dtype"], content["kernel"])
    _require(model.dtype in WEIGHT_BYTES and isinstance(model.kernel, str) and model.roof.flops_per_s > 0, "dtype")
    model.constants_ = model.form.constants({name: float(value) for name, value in content["constants"].items()})
    model.tiles_ = None if content["tiles"] is None else _tiles(content["tiles"])
    n_features = N_FEATURES + (0 if model.tiles_ is None else N_TILE_FEATURES)
    residual, sure = content["residual"], content["confidence"]
    model.residual_ = None if residual is None else trees_from_json(residual, n_features)
    model.confidence_ = None if sure is None else confidence_from_json(sure, n_features)
    width = content["typical_half_width"]
    _require((width is None) == (sure is None) and (width is None or width >= 0), "typical_half_width")
    model.typical_half_width_ = width
    model.anomalies_, model.informed_, model.ops_ = (_words(content[name]) for name in ("anomalies", "informed", "ops"))
    _require(set(model.informed_) <= set(content["constants"]), "informed")
    _require(bool(model.ops_) and set(model.ops_) <= set(OPS), "ops")
    model.n_observations_ = content["n_observations"]
    _require(isinstance(model.n_observations_, int) and model.n_observations_ > 0, "n_observations")
    model.errors_ = None if content["errors"] is None else _errors(content["errors"])
    model.points_ = None if content["points"] is None else _points(content["points"])
    model.offload_ = content["offload"]  # `predict` reads and checks it
    _require(model.offload_ is None or isinstance(model.offload_, dict), "offload")
    model.evidence_ = content["evidence"]
    _require(isinstance(model.evidence_, dict), "evidence")
    return model


def _profile(stored: dict[str, Any]) -> HardwareProfile:
    profile = HardwareProfile(**{**stored, "quantities": {k: Quantity(**q) for k, q in stored["quantities"].items()}})
    _require(profile.device in DEVICES and isinstance(profile.name, str) and isinstance(profile.title, str), "hardware")
    for quantity in profile.quantities.values():
        _require(quantity.value > 0 and quantity.kind in EVIDENCE and isinstance(quantity.source, str), "quantity")
    return profile


def _tiles(stored: dict[str, Any]) -> TileRule:
    rule = TileRule(**stored)
    _require(rule.framework in FRAMEWORKS and all(isinstance(value, str) for value in stored.values()), "tiles")
    return rule


def _words(values: list[str]) -> list[str]:
    _require(isinstance(values, list) and all(isinstance(value, str) for value in values), "words")
    return values


def _errors(stored: dict[str, Any]) -> dict[str, Any]:
    for by_shape in stored.values():
        for errors in by_shape.values():
            _require(set(errors) == set(ERRORS) and all(value >= 0 for value in errors.values()), "errors")
    _require("model" in stored and all("all" in by_shape for by_shape in stored.values()), "errors")
    return stored


def _points(stored: dict[str, Any]) -> dict[str, Any]:
    columns = [*map(_words, (stored[name] for name in POINT_WORDS)), *(stored[name] for name in POINT_NUMBERS)]
    _require(len({len(column) for column in columns}) == 1, "points")
    _require(all(value > 0 for name in POINT_NUMBERS for value in stored[name]), "points")
    return stored
