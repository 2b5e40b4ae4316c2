"""The Predicted vs measured view: held-out points, intervals, errors by shape and machine, and limits of trust."""

import json

import pytest

from perfmodel.evaluation import coverage_by_level, held_out_points
from perfmodel.latency import load_model, shipped_models
from perfmodel.report import limits, limits_page, models_rows, shape_rows
from tests.app_pages import numbers, opened, shown, titles
from tests.served import until


def test_it_opens_with_held_out_points_and_every_number_is_that_of_the_model() -> None:
    test = opened("accuracy")
    model = load_model("epyc-zen4-2c-fp32")
    assert titles(test) == [
        "Predicted vs measured: median error 4.5 %",
        "Predicted over measured, by batch size",
        "Do intervals hold on shapes they were not made from?",
    ]
    assert numbers(test)["Median error"] == "4.5 %"
    shapes, machines, trust = (one.value for one in test.dataframe)
    assert shapes.to_numpy().tolist() == shape_rows(model) and len(shapes) == 10
    assert list(machines["model"]) == [*sorted(shipped_models())]
    assert any("at their defaults" in words or "fitted from" in words for words in trust["what is known"])
    assert "perfmodel fit traces/epyc-zen4-2c-fp32" in shown(test)


def test_a_link_opens_another_model_whose_sample_is_said_to_be_one() -> None:
    test = opened("accuracy", model="h100-sxm-trtllm-cutlass-bf16")
    assert "1,000 of 5,022 held-out points are drawn" in shown(test)
    assert numbers(test)["Worst"] == "85.9 %"
    trust = test.dataframe[2].value
    assert "anomaly" in set(trust["beyond"]) and "calls launched by the host" in set(trust["beyond"])


@pytest.mark.parametrize("name", [n for n in shipped_models() if n.startswith("epyc")])
def test_intervals_of_the_shipped_models_hold_on_shapes_they_were_not_made_from(name: str) -> None:
    found = coverage_by_level(held_out_points(load_model(name)))
    stated = found.filter(found["stated_frac"] == 0.9)
    assert 0.85 < stated["n_covered"].sum() / stated["n"].sum() < 0.95


def test_limits_name_the_fitted_ranges_what_was_not_measured_and_shapes_much_worse_than_others() -> None:
    h100 = dict(limits(load_model("h100-sxm-vllm-triton-bf16")))
    assert h100["range of n_tokens"].startswith("fitted from 1 to 16,384;")
    assert "assumed constants" in h100["offloaded experts"]
    zen4 = load_model("epyc-zen4-2c-fp32")
    zen4.errors_ = json.loads(json.dumps(zen4.errors_))
    zen4.errors_["model"]["olmoe/4"]["median_ape_frac"] = 0.5
    assert dict(limits(zen4))["shapes like olmoe/4"].startswith("median error 50.0 %")
    zen4.errors_["model"]["all"]["median_ape_frac"], zen4.confidence_ = 0.6, None
    assert limits(zen4)[0][0] == "the whole model"
    assert limits_page(zen4).splitlines()[1].startswith("the whole model  ")
    assert models_rows({"made": zen4})[0][:4] == ["made", "fp32", "342", "9"]


@pytest.mark.browser
def test_another_model_is_drawn_in_the_browser_without_sideways_scrolling(page, server) -> None:
    page.goto(f"{server}/accuracy?model=h100-sxm-sglang-triton-bf16")
    until(page, "document.querySelectorAll('.js-plotly-plot .main-svg').length >= 3")
    assert page.get_by_test_id("stException").count() == 0
    page.get_by_role("tab", name="All machines").click()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
