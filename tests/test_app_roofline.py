"""The Roofline view: ceilings and points of captures, profiles and open traces, and the command that gives the same."""

import shlex
from types import SimpleNamespace

import pytest

from perfmodel import figures
from perfmodel.analysis import analyse
from perfmodel.capture import load_capture, per_workload, profile_of
from perfmodel.readers import read_trace
from perfmodel.roofline import Roofline, roofline
from tests.app_pages import figure, on_path, opened, ran, shown, testing, titles
from tests.conftest import ROOT
from tests.served import until
from tests.test_roofline import run

HOSTILE = "![x](http://127.0.0.1:9/a.png) <img src=x onerror=alert(1)>.json"


def of_capture(name: str) -> Roofline:
    """The roofline of a shipped capture with all that it measured."""
    capture = load_capture(ROOT / "traces" / name)
    return roofline(profile_of(capture), capture.dtype, observations=per_workload(capture.observations))


def points(test: object) -> int:
    """How many points the figure shows."""
    return sum(len(trace["x"]["bdata"]) > 0 for trace in figure(test, 0)["data"] if trace.get("mode") == "markers")


def test_it_opens_with_a_capture_its_losses_and_the_command_that_says_the_same() -> None:
    test = opened("roofline")
    assert titles(test) == ["AMD EPYC, as calibrated by capture epyc-zen4-2c-fp32, fp32"]
    assert points(test) == 2  # both operations
    command, page = (block.value for block in test.code)
    assert command == "perfmodel roofline traces/epyc-zen4-2c-fp32 --dtype fp32 --model epyc-zen4-2c-fp32"
    words = shlex.split(command)[1:]
    assert run(words[0], str(ROOT / words[1]), *words[2:]).strip() == page.strip()
    assert "342 points" in shown(test) and "No datasheet peaks" in shown(test)
    assert test.dataframe[0].value.shape[0] == 10


def test_a_link_opens_a_shape_whose_batches_are_joined() -> None:
    test = opened("roofline", machine="epyc-zen5-2c-bf16", op="moe_layer", shape="mixtral-8x7b/8")
    joined = [trace for trace in figure(test, 0)["data"] if trace["mode"] in ("lines+text", "lines") and trace["name"]]
    assert any(trace["name"].startswith("moe_layer, uniform") for trace in joined)
    assert set(test.dataframe[0].value["shape"]) == {"mixtral-8x7b/8"}
    assert set(test.dataframe[0].value["operation"]) == {"moe_layer"}
    assert "--op moe_layer --shape mixtral-8x7b/8" in test.code[0].value


def test_a_profile_of_the_catalogue_shows_its_ceilings_and_says_what_to_do_for_points() -> None:
    test = opened("roofline", machine="gh200")
    assert titles(test) == ["NVIDIA GH200, 96 GB HBM3, Grace with 480 GB LPDDR5X, bf16"]
    assert any("open a trace" in caption.value for caption in test.caption)
    ceilings = test.dataframe[0].value
    assert ceilings["nominal"].to_list()[:2] == ["989 TFLOP/s", "4.00 TB/s"]


def test_points_chosen_in_the_figure_are_those_of_the_table_until_another_choice_is_made() -> None:
    test = opened("roofline")
    key, page = "chart epyc-zen4-2c-fp32  fp32 all all", test.code[1].value
    test.session_state[key] = {
        "selection": {"points": [{"customdata": 3}, {"customdata": 341}, {"customdata": 342}, {"x": 1.0}]}
    }
    ran(test)
    found = of_capture("epyc-zen4-2c-fp32")
    assert sorted(test.dataframe[0].value["shape"]) == sorted(found.points["shape"][[3, 341]])
    assert "2 points:" in shown(test) and test.code[1].value == page
    test.selectbox(key="op").set_value("moe_layer")
    n_layers = (found.points["op"] == "moe_layer").sum()
    assert f"{n_layers} points:" in shown(ran(test))


def test_every_point_of_the_figure_knows_its_row() -> None:
    found = of_capture("epyc-zen4-2c-fp32")
    for trace in figures.roofline(found).data:
        if trace.mode == "markers":
            assert list(found.points["flops_per_s"][list(trace.customdata)]) == list(trace.y)


@pytest.mark.parametrize("query", [{"machine": "no-such"}, {"shape": "<b>"}, {"dtype": "int3", "op": "x"}])
def test_a_link_to_what_is_not_there_opens_what_is(query: dict[str, str]) -> None:
    assert titles(opened("roofline", **query)) == ["AMD EPYC, as calibrated by capture epyc-zen4-2c-fp32, fp32"]


def test_products_of_an_open_trace_stand_under_the_machine_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = next((ROOT / "traces" / "epyc-zen5-2c-bf16" / "profiles").glob("*olmoe-4-1-uniform*"))
    test = testing.AppTest.from_file(str(ROOT / "app" / "views" / "roofline.py"), default_timeout=120)
    loaded = SimpleNamespace(name=HOSTILE, digest="0", analysis=analyse(read_trace(trace)))
    with on_path():
        import uploads
    monkeypatch.setattr(uploads, "loaded", lambda: [loaded])
    test.query_params["machine"] = "epyc-zen5-2c-bf16"
    ran(test)
    test.selectbox(key="points_of").set_value(0)
    ran(test)
    assert "aten::_grouped_mm" in set(test.dataframe[0].value["operation"])
    assert f"--trace {shlex.quote(HOSTILE)}" in test.code[0].value
    assert not any("127.0.0.1" in element.value for element in (*test.markdown, *test.caption))
    test.selectbox(key="op").set_value("aten::mm")
    assert set(ran(test).dataframe[0].value["operation"]) == {"aten::mm"}


@pytest.mark.browser
def test_another_shape_is_drawn_in_the_browser_and_stands_in_the_link(page, server) -> None:
    page.goto(f"{server}/roofline?machine=epyc-zen5-2c-bf16")
    page.wait_for_selector(".js-plotly-plot .main-svg", timeout=60_000)
    page.get_by_role("combobox", name="Shape").fill("mixtral-8x7b/8")  # the list holds but a part of long ones
    page.get_by_role("option", name="mixtral-8x7b/8").click()
    until(page, "location.search.includes('shape=mixtral-8x7b')")
    until(page, "[...document.querySelectorAll('.legendtext')].some(e => e.textContent.includes('moe_layer, uniform'))")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
