"""A fitted model as a JSON file, and back; never pickle."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perfmodel.errors import InputError
from perfmodel.hardware import DEVICES, HardwareProfile, Quantity
from perfmodel.tile_rules import TileRule

from .confidence import confidence_from_json
from .model import LatencyModel
from .trees import trees_from_json

MODEL_SCHEMA = 2
KIND = "perfmodel latency model"
FITTED_DIR = Path(__file__).parent.parent / "data" / "fitted"


def save_model(model: LatencyModel, path: str | Path) -> None:
    """Write the model as JSON, beside and then renamed; `evidence_`, where set, says what it was fitted on."""
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
        "errors": getattr(model, "errors_", None),
        "points": getattr(model, "points_", None),
        "offload": model.offload_,
        "evidence": getattr(model, "evidence_", {}),
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
        lines.append(f" {json.dumps(key)}: {json.dumps(value, indent=None if is_long else 1)}")
    return "{\n" + ",\n".join(lines) + "\n}"


def shipped_models() -> dict[str, Path]:
    """The models that come with the project, by name."""
    return {path.stem: path for path in sorted(FITTED_DIR.glob("*.json"))}


def load_model(source: str | Path) -> LatencyModel:
    """Read a model written by `save_model`, by path or by the name of a shipped one.

    Raises InputError when the file is missing, not a model, or of another schema.
    """
    path = shipped_models().get(str(source), Path(source))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["kind"] != KIND:
            raise KeyError
        if content["schema"] != MODEL_SCHEMA:
            raise InputError(
                f"model {path.name} has schema {content['schema']}, this version reads {MODEL_SCHEMA}; fit it again"
            )
        return _model(content)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(
            f"no model file {str(path)!r}; make one with `perfmodel fit SOURCE --out MODEL.json`, or name a shipped "
            f"one: {', '.join(shipped_models()) or 'none'}"
        ) from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, UnicodeDecodeError, OverflowError):
        raise InputError(f"{path.name} is not a model written by `perfmodel fit`") from None


def _model(content: dict[str, Any]) -> LatencyModel:
    stored = content["hardware"]
    profile = HardwareProfile(**{**stored, "quantities": {k: Quantity(**q) for k, q in stored["quantities"].items()}})
    if profile.device not in DEVICES:
        raise ValueError
    model = LatencyModel(profile, content["dtype"], content["kernel"])
    model.constants_ = model.form.constants({name: float(value) for name, value in content["constants"].items()})
    model.tiles_ = None if content["tiles"] is None else TileRule(**content["tiles"])
    model.residual_ = None if content["residual"] is None else trees_from_json(content["residual"])
    model.confidence_ = None if content["confidence"] is None else confidence_from_json(content["confidence"])
    model.typical_half_width_ = content["typical_half_width"]
    model.anomalies_, model.informed_ = list(content["anomalies"]), list(content["informed"])
    model.ops_, model.n_observations_ = list(content["ops"]), int(content["n_observations"])
    model.offload_ = content["offload"]  # read by `offload.from_json`, which checks it
    model.errors_, model.points_, model.evidence_ = content["errors"], content["points"], content["evidence"]
    return model
