"""Models as files: they predict the same after a round trip, and what no fit could have written is refused."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perfmodel.errors import InputError
from perfmodel.fitting import fit_source
from perfmodel.latency import HULL, LatencyModel, load_model, residual_features, save_model
from perfmodel.latency.store import POINT_NUMBERS, POINT_WORDS
from perfmodel.latency.work import N_FEATURES, N_TILE_FEATURES
from perfmodel.moe import MoEShape
from perfmodel.predict import predict
from perfmodel.routing import routing
from perfmodel.sources import Source
from tests.made_up import made_up_model, made_up_observations, new_model

TRITON = "vllm/0.0/made_up_triton/bf16"


@pytest.fixture(scope="module")
def whole() -> LatencyModel:
    """A model that has all that a model can have: a residual, a scale of errors, tiles, anomalies and points."""
    observations = made_up_observations(tokens=tuple(sorted({round(1.35**i) for i in range(33)})))
    n_tokens = observations["n_tokens"].to_numpy()
    wave = 1 + 0.2 * np.sign(np.sin(np.log(n_tokens))) + 9.0 * (n_tokens == 29)
    observations = observations.with_columns(time_ns=observations["time_ns"] * wave)
    profile = new_model().profile
    screened = observations["time_ns"] > 0
    source = Source("made up", TRITON, profile, "bf16", observations, observations[:0], screened, {"launch": "graph"})
    model = fit_source(source)
    assert None not in (model.residual_, model.confidence_, model.tiles_) and model.anomalies_
    assert model.confidence_.scale is not None
    return model


@pytest.fixture(scope="module")
def content(whole: LatencyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("whole") / "model.json"
    save_model(whole, path)
    return json.loads(path.read_text())


def loaded(content: Any, folder: Path) -> LatencyModel:
    (folder / "m.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return load_model(folder / "m.json")


def test_saved_and_loaded_predicts_the_same(whole: LatencyModel, tmp_path: Path) -> None:
    save_model(whole, tmp_path / "model.json")
    back = load_model(tmp_path / "model.json")
    observations = made_up_observations(seed=3)
    one, other = (m.forecast(m.work(observations)) for m in (whole, back))
    assert other.ns == pytest.approx(one.ns, rel=1e-9)
    assert other.log_half_width == pytest.approx(one.log_half_width, rel=1e-9, nan_ok=True)
    for name in ("constants_", "tiles_", "typical_half_width_", "anomalies_", "informed_", "ops_", "n_observations_"):
        assert getattr(back, name) == getattr(whole, name), name
    assert (back.errors_, back.points_, back.evidence_) == (whole.errors_, whole.points_, whole.evidence_)
    assert back.profile == whole.profile and (back.dtype, back.kernel) == (whole.dtype, whole.kernel)
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]


def test_a_file_is_plain_json_with_a_line_for_what_is_long(whole: LatencyModel, tmp_path: Path) -> None:
    save_model(whole, tmp_path / "model.json")
    lines = (tmp_path / "model.json").read_text().split("\n")
    assert sum(line.startswith(' "residual":') for line in lines) == 1 and len(lines) < 400
    json.loads("\n".join(lines), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_a_model_fitted_in_memory_without_points_can_be_kept_too(tmp_path: Path) -> None:
    few = new_model().fit(made_up_observations(sizes=((1024, 512, 16, 2),), tokens=(1, 64)))
    for name, model in (("few", few), ("more", made_up_model())):
        save_model(model, tmp_path / f"{name}.json")
        back = load_model(tmp_path / f"{name}.json")
        assert (back.errors_, back.points_, back.evidence_) == (None, None, {"launch": "graph"})
        observations = made_up_observations(tokens=(8,))
        assert back.predict(observations).tolist() == model.predict(observations).tolist()
    assert load_model(tmp_path / "few.json").confidence_ is None


def test_trees_see_as_many_features_as_files_are_checked_for(whole: LatencyModel) -> None:
    observations = made_up_observations(tokens=(1,))
    for model, n_features in ((made_up_model(), N_FEATURES), (whole, N_FEATURES + N_TILE_FEATURES)):
        work = model.work(observations)
        parts = model.form.resident_parts(work, model.roof, model.constants_)
        features = residual_features(work, parts)
        assert features.shape == (observations.height, n_features) and np.isfinite(features).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("not json", "not a model written by"),
        ("", "not a model written by"),
        ("[]", "not a model written by"),
        ("[" * 100_000, "not a model written by"),
        ('{"kind": "something else"}', "not a model written by"),
        ('{"kind": "perfmodel latency model", "schema": 99}', "schema 99"),
        ('{"kind": "perfmodel latency model", "schema": 1}', "fit it again"),
        ('{"kind": "perfmodel latency model", "schema": 2}', "not a model written by"),
    ],
)
def test_files_that_are_not_models_are_refused(tmp_path: Path, words: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        loaded(words, tmp_path)


def test_every_key_is_needed(content: dict[str, Any], tmp_path: Path) -> None:
    assert loaded(content, tmp_path).n_observations_ == content["n_observations"]
    for key in content:
        with pytest.raises(InputError, match=r"m\.json is not a model written by `perfmodel fit`$"):
            loaded({k: v for k, v in content.items() if k != key}, tmp_path)


NAN = float("nan")


@pytest.mark.parametrize(
    ("where", "values"),
    [
        ("dtype", ("bf17", None, 3)),
        ("kernel", (None, 3)),
        ("hardware", (None, {}, "h100")),
        ("hardware.device", ("tpu", None)),
        ("hardware.name", (None,)),
        ("hardware.quantities", (None, [], {"memory_stream_bytes_per_s": 3})),
        ("hardware.quantities.memory_stream_bytes_per_s.value", ("x", None, 0, -1, NAN)),
        ("hardware.quantities.memory_stream_bytes_per_s.kind", ("guessed", None)),
        ("constants", (None, {}, [])),
        ("constants.eff_compute", ("x", None, 0, -1, NAN, 9.0)),
        ("tiles", ({}, [], {"framework": "vllm"})),
        ("tiles.framework", ("made-up", None)),
        ("tiles.machine", (None, 3)),
        ("residual", ({}, [], "x")),
        ("residual.feature.0.0", (-1, N_FEATURES + N_TILE_FEATURES, "x", None)),
        ("residual.left.0.0", (-1, 10**6)),
        ("residual.value.0.1", (NAN, None)),
        ("residual.base", (None, NAN)),
        ("confidence", ({}, [], None)),  # null, though a typical width is told
        ("confidence.quantile", ("x", None, -1, NAN)),
        ("confidence.scale.feature.0.0", (N_FEATURES + N_TILE_FEATURES,)),
        ("confidence.ranges", (None, {})),
        ("confidence.ranges.n_tokens", (["a", "b"], [1], [2, 1], [0, 1], [1, 2, 3])),
        ("confidence.ladders.tokens", (None, [[1.0], []], [[1.0], [0.5]])),
        ("typical_half_width", ("x", None, -1, NAN)),
        ("anomalies", ("abc", None, [1])),
        ("informed", ("abc", None, ["warp"])),
        ("ops", ([], None, ["attention"], "moe_layer")),
        ("n_observations", (0, -1, None, "many", 1.5)),
        ("errors", ([], {}, "x", {"model": {}}, {"model": {"all": {}}})),
        ("errors.model.all.n", ("x", None, -1)),
        ("points", ([], {}, "x")),
        *((f"points.{name}", (None, [], [3])) for name in POINT_WORDS),
        *((f"points.{name}.0", (None, "x", 0, NAN)) for name in POINT_NUMBERS),
        ("offload", ([], "x", 3)),
        ("evidence", (None, [], "x")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_model_that_no_fit_could_have_written_is_refused(
    content: dict[str, Any], tmp_path: Path, where: str, values: tuple[object, ...]
) -> None:
    short = {**content, "points": {k: v[:2] for k, v in content["points"].items()}}
    for value in values:
        damaged = copy.deepcopy({k: v for k, v in short.items() if k == where.split(".", 1)[0]})
        target: Any = damaged
        *outer, last = [int(key) if key.isdigit() else key for key in where.split(".")]
        for key in outer:
            target = target[key]
        target[last] = value
        with pytest.raises(InputError, match=r"^m\.json is not a model written by `perfmodel fit`$"):
            loaded({**short, **damaged}, tmp_path)


def test_damaged_constants_of_offloading_are_refused_where_they_are_used(
    content: dict[str, Any], tmp_path: Path
) -> None:
    shape = MoEShape("synthetic", n_experts=16, top_k=2, hidden=1024, inter=512)
    for damaged in ({"copy": {}}, {"copy": None}, {"teleport": {}}):
        model = loaded({**content, "offload": damaged}, tmp_path)
        with pytest.raises(InputError, match="constants of offloading are damaged; fit it again"):
            predict(model.profile, shape, routing("uniform", 16, 2, 64), model=model)


def test_a_missing_model_names_the_command_that_makes_one(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "none.json" / "below.json"):
        with pytest.raises(InputError, match="perfmodel fit"):
            load_model(path)
    with pytest.raises(InputError, match="cannot read the model"):
        load_model(tmp_path / ("x" * 300 + ".json"))


@pytest.mark.skipif(os.name != "posix", reason="folders are files elsewhere too")
def test_a_model_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write the model"):
        save_model(made_up_model(), tmp_path / "none" / "m.json")


def test_points_lie_along_every_axis_of_the_hull(content: dict[str, Any]) -> None:
    assert {*POINT_WORDS, *POINT_NUMBERS} == set(content["points"])
    assert {f"at_{name}" for name in HULL} < set(content["points"])
