"""The dashboard in a real browser: every view opens from its link without exceptions, at 1280 x 800 with no sideways
scrolling, and asks nobody outside for anything."""

import pytest

pytestmark = pytest.mark.browser

PATHS = ("", "trace", "roofline", "accuracy", "placement", "schedules", "regression")


@pytest.mark.parametrize("path", PATHS)
def test_a_link_opens_its_view(page, server, path: str) -> None:
    answer = page.goto(f"{server}/{path}")
    assert answer.headers["x-content-type-options"] == "nosniff"
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 1", timeout=60_000)
    assert page.get_by_test_id("stException").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
