"""What ships is what its sources make: captures, models fitted on them, profiles, accuracy page, goldens."""

import getpass
import json
import socket
from pathlib import Path

import pytest

from perfmodel.capture import Capture, fitted_rows, load_capture, per_workload, profile_of, shipped_captures
from perfmodel.fitting import fit_source
from perfmodel.hardware import hardware
from perfmodel.hf_config import resolve
from perfmodel.latency import load_model, shipped_models
from perfmodel.predict import predict
from perfmodel.readers import read_trace
from perfmodel.routing import routing
from perfmodel.sources import only_source, read_sources
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "data" / "golden_predictions.json"
CAPTURES = shipped_captures()


@pytest.fixture(scope="module", params=CAPTURES, ids=lambda path: path.name)
def capture(request: pytest.FixtureRequest) -> Capture:
    return load_capture(request.param)


def test_captures_are_small_and_name_nobody() -> None:
    for path in CAPTURES:
        files = [file for file in path.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < 2_000_000
        text = "".join(file.read_text() for file in files if file.suffix in (".json", ".jsonl"))
        for secret in (socket.gethostname(), str(Path.home())):
            assert secret not in text
        assert f'"{getpass.getuser()}"' not in text


def test_a_capture_has_enough_to_hold_out(capture: Capture) -> None:
    observations = capture.observations
    assert observations["shape"].n_unique() >= 6
    assert observations["run"].n_unique() >= 3
    assert set(observations["op"].cast(str)) == {"grouped_gemm", "moe_layer"}
    assert {"uniform", "mmlu-like"} < set(observations["routing"])


def test_its_traces_read_and_hold_the_named_ranges(capture: Capture) -> None:
    assert capture.traces
    for path in capture.traces:
        ranges = read_trace(path).of_kind("range")["name"].cast(str)
        assert any(name.startswith("perfmodel::moe_layer|shape=") for name in ranges)
        assert "perfmodel::gate_up" in set(ranges)


def test_the_shipped_model_is_fitted_on_this_capture(capture: Capture) -> None:
    model = load_model(capture.name)
    assert [c["digest"] for c in model.evidence_["captures"]] == [capture.digest], "run `python docs/regenerate.py`"
    again = fit_source(only_source(read_sources([str(capture.path)])))
    observations, _ = fitted_rows(per_workload(capture.observations), model.dtype)
    assert again.predict(observations) == pytest.approx(model.predict(observations), rel=0.02)


def test_the_model_beats_both_baselines_on_unseen_shapes(capture: Capture) -> None:
    median = {who: errors["all"]["median_ape_frac"] for who, errors in load_model(capture.name).errors_.items()}
    assert median["model"] < median["roofline_only"] / 2
    assert median["model"] < median["constant"] / 2


def test_the_shipped_profile_is_the_captures_calibration(capture: Capture) -> None:
    assert hardware(capture.name).quantities == profile_of(capture).quantities


def test_the_accuracy_page_shows_the_shipped_models() -> None:
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    for name in shipped_models():
        model = load_model(name)
        assert f"## {name}" in page
        assert f"{100 * model.errors_['model']['all']['median_ape_frac']:.1f} %" in page


@pytest.mark.parametrize(
    "case", json.loads(GOLDEN.read_text()), ids=lambda c: f"{c['hardware']}-{c['shape']}-{c['access']}"
)
def test_predictions_did_not_change(case: dict) -> None:
    """Not whether they are right (docs/accuracy.md): whether they are what they were. Made by docs/regenerate.py."""
    shape = resolve(case["shape"])
    batch = routing(case["routing"], shape.n_experts, shape.top_k, case["n_tokens"])
    result = predict(hardware(case["hardware"]), shape, batch, case["offload_frac"], case["access"])
    assert result.latency_ns == pytest.approx(case["latency_ns"], rel=1e-6)
    assert result.slowdown == pytest.approx(case["slowdown"], rel=1e-6)
    assert result.bottleneck == case["bottleneck"]
