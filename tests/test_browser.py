"""The dashboard in a real browser: every view opens from its link without exceptions, at 1280 x 800 with no sideways
scrolling, asks nobody outside for anything, and for nothing that the server's policy forbids."""

import pytest

from tests.served import until

pytestmark = pytest.mark.browser

PATHS = ("", "trace", "roofline", "accuracy", "placement", "schedules", "regression")
FORBIDDEN = "addEventListener('securitypolicyviolation', e => console.error('forbidden: ' + e.violatedDirective))"


@pytest.mark.parametrize("path", PATHS)
def test_a_link_opens_its_view(page, server, path: str) -> None:
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.add_init_script(FORBIDDEN)
    answer = page.goto(f"{server}/{path}")
    assert answer.headers["x-content-type-options"] == "nosniff"
    until(page, "document.querySelectorAll('.js-plotly-plot .main-svg').length >= 1")
    page.wait_for_timeout(500)  # what a figure asks for comes after it
    assert page.get_by_test_id("stException").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert not [words for words in said if "forbidden: " in words or "Content Security Policy" in words]
