"""Fixtures that more than one test file uses."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent

settings.register_profile("perfmodel", deadline=None)  # how long a case takes is the machine's doing, not the code's
settings.load_profile("perfmodel")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material beside the project; tests that need it skip where it is absent."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("the reference material beside the project is absent")
    return path


@pytest.fixture(autouse=True)
def _main_module() -> Iterator[None]:
    """What runs is still pytest after a test of the dashboard, whose page takes its place; new processes look there."""
    before = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = before


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """No test cuts the power, so that none waits until what was written is on the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def scheduler() -> Iterator[str]:
    """The address of a Dask cluster on this machine that gives a task up when two workers died of it."""
    distributed = pytest.importorskip("distributed")
    import dask

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 1}),
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            scheduler_port=0,
            dashboard_address="127.0.0.1:0",
            silence_logs="CRITICAL",
        ) as cluster,
    ):
        yield cluster.scheduler_address


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The address of a dashboard, for browser tests."""
    from tests.served import served

    pytest.importorskip("streamlit", reason="streamlit is not installed")
    with served() as url:
        yield url


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """A Chromium without a window; tests skip where there is none, unless PERFMODEL_REQUIRE_BROWSER is set."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    from tests.served import ARGUMENTS

    if CHROMIUM is None and not os.environ.get("PERFMODEL_REQUIRE_BROWSER"):
        pytest.skip("no Chromium installed; apt-get install chromium")
    assert CHROMIUM is not None, "browser tests are required here, but no Chromium is installed"
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser, server) -> Iterator[object]:
    """A page of 1280 x 800 that remembers what it asked for; everything must come from the server."""
    opened = browser.new_page(viewport={"width": 1280, "height": 800})
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    yield opened
    opened.close()
    outside = [url for url in asked if not url.startswith((server, server.replace("http", "ws"), "data:", "blob:"))]
    assert not outside
