"""The dashboard's logic, without a browser: every page opens with something to look at, and shows what it should."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from perfmodel.capture import shipped_captures
from tests.conftest import ROOT

testing = pytest.importorskip("streamlit.testing.v1", reason="streamlit is not installed")


@pytest.fixture(autouse=True)
def _on_path() -> Iterator[None]:
    """`streamlit run` puts the script's folder on the path; AppTest does not."""
    sys.path.insert(0, str(ROOT / "app"))
    yield
    sys.path.remove(str(ROOT / "app"))


def page(name: str) -> "testing.AppTest":
    test = testing.AppTest.from_file(str(ROOT / "app" / "views" / f"{name}.py"), default_timeout=60).run()
    assert not test.exception
    return test


def figure(test: "testing.AppTest", index: int) -> dict:
    return json.loads(test.get("plotly_chart")[index].proto.spec)


def title(spec: dict) -> str:
    return spec["layout"]["title"]["text"]


def test_the_overview_opens_with_the_shipped_capture_a_parity_plot_a_slowdown_curve_and_an_upload_box() -> None:
    test = page("overview")
    assert any(shipped_captures()[0].name in element.value for element in test.text)
    assert title(figure(test, 0)).startswith("Predicted vs measured: median error")
    assert title(figure(test, 1)) == "Slowdown against offloaded fraction"
    assert len(test.file_uploader) == 1


def test_an_uploaded_trace_shows_its_launch_metrics_with_names_taken_literally() -> None:
    hostile = "<img src=x onerror=alert(1)> *a* $x$ [l](javascript:1)"
    kernel = {"ph": "X", "cat": "kernel", "name": hostile, "pid": 0, "tid": 7, "ts": 6.5, "dur": 4.0}
    events = [
        {**kernel, "args": {"device": 0, "stream": 7, "correlation": 7}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 1, "tid": 1, "ts": 2.0, "dur": 3.0}
        | {"args": {"correlation": 7}},
    ]
    test = page("trace")
    test.file_uploader[0].upload(
        "synthetic.json", json.dumps({"traceEvents": events}).encode(), "application/json"
    ).run()
    assert not test.exception
    values = {metric.label: metric.value for metric in test.metric}
    assert values["TKLQT"] == "4.50 µs"
    assert values["Kernels"] == "1"
    assert list(test.dataframe[0].value["name"]) == [hostile]  # a cell is text, and so is a finding
    shown = [element.value for kind in (test.markdown, test.caption) for element in kind]
    assert not any("onerror" in words for words in shown)


def test_a_file_that_is_no_trace_is_refused_in_words() -> None:
    test = page("trace")
    test.file_uploader[0].upload("notes.json", b"hello", "application/json").run()
    assert not test.exception
    assert test.error[0].value == "This file cannot be read as a trace:"
    assert any(element.value.startswith("notes.json: a file that begins with b'hello'") for element in test.text)


def test_the_accuracy_page_lists_every_shape_and_the_baselines() -> None:
    test = page("accuracy")
    table = test.dataframe[0].value
    assert "all" in list(table["shape"])
    assert {"median error", "roofline only (median)", "constant (median)"} <= set(table.columns)
    assert title(figure(test, 1)) == "Roofline"


def test_the_offload_sliders_move_the_prediction() -> None:
    test = page("offload")
    before = {metric.label: metric.value for metric in test.metric}
    assert before["Slowdown"] == "1.49x"  # 65,536 tokens, 20 of 64 experts: the GH200 study's first point
    test.slider[1].set_value(0.0).run()
    assert {m.label: m.value for m in test.metric}["Slowdown"] == "1.00x"
    assert title(figure(test, 0)) == "Slowdown against offloaded fraction"


def test_every_view_is_reachable_from_the_navigation() -> None:
    source = (ROOT / "app" / "main.py").read_text()
    for view in (ROOT / "app" / "views").glob("*.py"):
        assert f"views/{view.name}" in source


def test_telemetry_is_off_and_the_server_stays_on_loopback() -> None:
    import tomllib

    config = tomllib.loads(Path(ROOT / "app" / ".streamlit" / "config.toml").read_text())
    assert config["browser"]["gatherUsageStats"] is False
    assert config["server"]["address"] == "127.0.0.1"
