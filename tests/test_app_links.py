"""Links of the dashboard: what is not here is said, and what a control says is in the address of its view."""

from urllib.parse import parse_qs, urlencode, urlsplit

import pytest

pytest.importorskip("streamlit", reason="streamlit is not installed")

from tests.app_pages import on_path, shown, testing
from tests.conftest import ROOT

# A value that is not the default of every control of a view that can be without an upload.
LINKS = {
    "": {"capture": "epyc-zen5-2c-fp32"},
    "roofline": {"machine": "epyc-zen5-2c-fp32", "op": "moe_layer", "shape": "qwen3-30b-a3b/4"},
    "accuracy": {"model": "epyc-zen5-2c-fp32"},
    "placement": {
        **{"shape": "olmoe", "hardware": "h200-sxm", "batch": "64,4096", "access": "copy", "op": "moe-layer"},
        **{"unit": "GiB", "gib": "20.5", "routing": "power-law", "argument": "1.1", "lines": "by batch size"},
        **{"limit_host": "true", "host": "300", "per_layer": "true", "sequences": "2", "context": "64", "seed": "3"},
        **{"which": "4,096 tokens", "tab": "Routing", "order": "id"},
    },
    "schedules": {
        **{"model": "mixtral-8x7b", "hardware": "h200-sxm", "gpus": "4", "node": "2", "tokens": "64"},
        **{"power-law-exponent": "0.7", "capacity": "1.25", "chunks": "2", "offload": "25"},
        "access": "copy",
    },
    "schedules?tab=Measured": {"capture": "epyc-zen5-4p-expert-parallel"},
    "schedules?tab=Expert+maps": {
        **{"map-model": "mixtral-8x7b", "map-hardware": "h200-sxm", "map-routing": "uniform", "map-gpus": "4"},
        **{"map-tokens": "256", "map-spread": "10"},
    },
    "regression": {"baseline": "epyc-zen5-2c-bf16", "candidate": "epyc-zen5-2c-fp32", "margin": "4.5", "model": "none"},
    "regression?way=One+machine+alone": {
        "capture": "epyc-zen5-2c-fp32",
        "judge": "none",
        "nominal": "epyc-zen5-2c-fp32",
    },
    "trace?part=Timeline": {"window": ["0", "50"], "step": "1", "whole": "true"},
}


@pytest.mark.browser
@pytest.mark.parametrize("path", LINKS)
def test_a_link_keeps_the_value_of_every_control(page, server, path: str) -> None:
    asked = urlencode(LINKS[path], doseq=True)
    page.goto(f"{server}/{path}{'&' if '?' in path else '?'}{asked}")
    page.get_by_test_id("stHeading").first.wait_for(timeout=60_000)
    page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]", timeout=60_000)
    page.wait_for_timeout(500)
    now = parse_qs(urlsplit(page.url).query)
    assert {key: now.get(key) for key in LINKS[path]} == parse_qs(asked)
    assert page.get_by_text("This link asks for").count() == 0


def test_a_link_to_what_another_session_uploaded_says_so() -> None:
    test = testing.AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=120)
    test.query_params["capture"] = "uploaded: elsewhere_made"
    with on_path():
        test.run()
    assert "This link asks for" in test.error[0].value
    assert "capture: uploaded: elsewhere_made" in shown(test)
    with on_path():
        test.selectbox[0].select_index(1).run()
    assert not test.error


def test_an_honoured_link_says_nothing() -> None:
    test = testing.AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=120)
    test.query_params["capture"] = "epyc-zen5-2c-fp32"
    with on_path():
        test.run()
    assert not test.error
    assert test.selectbox[0].value == "epyc-zen5-2c-fp32"


@pytest.mark.browser
def test_it_is_said_too_above_a_view_that_ends_early(page, server) -> None:
    page.goto(f"{server}/regression?candidate=uploaded:+elsewhere_made&axes=machine")
    page.get_by_text("This link asks for what is not here").wait_for(timeout=60_000)
    page.get_by_text("candidate: uploaded: elsewhere_made").wait_for()
    assert page.get_by_text("These two are not compared").count() == 1
