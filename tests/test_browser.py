"""The dashboard in a real browser: it opens with figures, takes an upload, moves with its sliders, and asks nobody
outside for anything."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.served import ARGUMENTS, served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REQUIRED = bool(os.environ.get("PERFMODEL_REQUIRE_BROWSER"))

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None and not REQUIRED, reason="no Chromium installed; apt-get install chromium"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of the dashboard."""
    with served() as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator["object"]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    assert CHROMIUM is not None, "browser tests are required here, but no Chromium is installed"
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser, server) -> Iterator["object"]:
    """A page of 1280 x 800 that remembers what it asked for; everything must come from the server."""
    opened = browser.new_page(viewport={"width": 1280, "height": 800})
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    yield opened
    opened.close()
    outside = [url for url in asked if not url.startswith((server, server.replace("http", "ws"), "data:", "blob:"))]
    assert not outside


def wait_for_figures(page, n: int) -> None:
    page.wait_for_function(f"document.querySelectorAll('.js-plotly-plot .main-svg').length >= {n}", timeout=60_000)


def test_the_first_page_shows_parity_slowdown_and_an_upload_box(page, server) -> None:
    page.goto(server)
    wait_for_figures(page, 2)
    page.get_by_text("Predicted vs measured: median error").first.wait_for(timeout=30_000)
    page.get_by_text("Slowdown against offloaded fraction").first.wait_for()
    assert page.get_by_test_id("stFileUploader").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_an_uploaded_trace_is_analysed_and_its_names_run_no_script(page, server, tmp_path: Path) -> None:
    hostile = "<img src=http://192.0.2.1/x.png onerror='window.__pwned=1'> ![i](http://192.0.2.1/y.png) $x$"
    events = [
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 1, "tid": 1, "ts": 2.0, "dur": 3.0}
        | {"args": {"correlation": 7}},
        {"ph": "X", "cat": "kernel", "name": hostile, "pid": 0, "tid": 7, "ts": 6.5, "dur": 4.0}
        | {"args": {"device": 0, "stream": 7, "correlation": 7}},
    ]
    trace = tmp_path / "synthetic.json"
    trace.write_text(json.dumps({"traceEvents": events}))
    page.goto(f"{server}/trace")
    page.get_by_test_id("stFileUploader").locator("input[type=file]").set_input_files(str(trace))
    page.get_by_text("4.50 µs").first.wait_for(timeout=30_000)
    wait_for_figures(page, 2)
    assert page.evaluate("window.__pwned") is None


@pytest.mark.parametrize(
    ("path", "heading"), [("accuracy", "Predicted vs measured"), ("offload", "Offload"), ("trace", "Trace")]
)
def test_deep_links_open_their_view(page, server, path: str, heading: str) -> None:
    page.goto(f"{server}/{path}")
    page.get_by_role("heading", name=heading, exact=True).wait_for(timeout=30_000)


def test_moving_a_slider_changes_the_prediction(page, server) -> None:
    page.goto(f"{server}/offload")
    page.get_by_text("1.49x").first.wait_for(timeout=30_000)
    handle = page.get_by_role("slider", name="Offloaded fraction")
    handle.focus()
    page.keyboard.press("Home")
    page.get_by_text("1.00x").first.wait_for(timeout=30_000)
