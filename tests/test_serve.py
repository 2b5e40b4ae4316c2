"""The dashboard as a server: who may reach it, what it tells, and many sessions, each alone with its uploads."""

import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from perfmodel.cli.main import app
from perfmodel.errors import InputError
from tests.conftest import ROOT
from tests.served import _free_port, _wait_until_healthy
from tests.test_hostile import KERNEL, document

pytest.importorskip("streamlit", reason="streamlit is not installed")

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
N_SESSIONS = 10


def started(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[list[str], str]:
    """The options with which `perfmodel app` starts Streamlit, and what it notes."""
    calls: list[list[str]] = []

    def become(program: str, command: list[str]) -> None:
        calls.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", become)
    result = CliRunner().invoke(app, ["app", *arguments])
    assert result.exit_code == 0, result.output
    return calls[0], result.stderr


def test_without_options_the_server_is_for_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    options, said = started(monkeypatch)
    assert "--server.address=127.0.0.1" in options
    assert "--browser.gatherUsageStats=false" in options
    assert [o for o in options if "allowedHosts" in o] == [
        f"--server.allowedHosts={host}" for host in ("127.0.0.1", "localhost", "::1")
    ]
    assert not said


def test_a_server_for_others_is_told_its_names_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    options, said = started(
        monkeypatch,
        "--address",
        "0.0.0.0",
        "--allow-host",
        "perf.example.org",
        "--base-path",
        "/perf/",
        "--max-upload",
        "50",
    )
    for option in (
        *("server.address=0.0.0.0", "server.allowedHosts=perf.example.org", "server.baseUrlPath=perf"),
        *("server.maxUploadSize=50", "browser.serverAddress=perf.example.org"),
    ):
        assert f"--{option}" in options
    assert "it knows no users" in said


def test_every_answer_has_the_headers_and_what_the_server_tells_of_itself_is_closed(server: str) -> None:
    for path in ("/", "/_stcore/health", "/nothing"):
        with OPENER.open(server + path) as answer:
            assert answer.headers["x-frame-options"] == "DENY"
            assert "connect-src 'self' data: blob:;" in answer.headers["content-security-policy"]
    with pytest.raises(urllib.error.HTTPError, match="404"):
        OPENER.open(f"{server}/_stcore/metrics")


@pytest.mark.parametrize(
    ("host", "origin", "is_let_in"),
    [
        (None, None, True),
        (None, "http://localhost:1", True),
        (None, "https://evil.example.org", False),
        ("evil.example.org", "http://evil.example.org", False),
    ],
    ids=["program", "own name", "other site", "other name for this machine"],
)
def test_pages_of_other_sites_open_no_socket(
    server: str, host: str | None, origin: str | None, is_let_in: bool
) -> None:
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    headers = {name: value for name, value in (("Host", host), ("Origin", origin)) if value}
    url = server.replace("http", "ws") + "/_stcore/stream"
    try:
        with connect(url, additional_headers=headers, proxy=None, open_timeout=5):
            assert is_let_in
    except InvalidStatus:
        assert not is_let_in


def test_ten_sessions_see_their_own_uploads_alone_and_another_stays_responsive(server: str) -> None:
    from tests.sessions import Session

    idle = Session(server, "")
    sessions = [Session(server, "trace") for _ in range(N_SESSIONS)]
    reading = threading.Event()

    def upload(i: int) -> str:
        name = f"only_{i}_kernel_made"
        events = [KERNEL.replace('"k"', f'"{name}"')] * 20_000
        reading.set()
        sessions[i].upload(f"session_{i}_made.json", document(*events))
        return sessions[i].words

    with ThreadPoolExecutor(N_SESSIONS) as pool:
        pages = pool.map(upload, range(N_SESSIONS))
        assert reading.wait(10)
        answers_s = [idle.run() for _ in range(5)]
        shown = list(pages)
    for i, words in enumerate(shown):
        assert f"session_{i}_made.json" in words
        for other in set(range(N_SESSIONS)) - {i}:
            assert f"session_{other}_made" not in words
            assert f"only_{other}_kernel" not in words
    assert max(answers_s) < 10  # benchmarks/dashboard.py measures; this only tells that nobody waits for all others
    newcomer = Session(server, "trace")
    assert "session_" not in newcomer.words
    for session in (idle, newcomer, *sessions):
        session.close()


@pytest.mark.parametrize("variable", ["PERFMODEL_MAX_READS", "PERFMODEL_MAX_EVENTS"])
def test_a_limit_in_the_environment_that_is_no_number_starts_no_server(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setattr(os, "execv", lambda *command: pytest.fail("it was started"))
    monkeypatch.setenv(variable, "two")
    with pytest.raises(InputError, match=f"{variable} is 'two', expected a whole number above 0"):
        CliRunner().invoke(app, ["app"], catch_exceptions=False)


@pytest.mark.browser
def test_an_error_of_ours_shows_its_kind_and_nothing_of_the_server(browser: Any, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "app", tmp_path / "app")
    view = tmp_path / "app" / "views" / "overview.py"
    view.write_text(view.read_text() + "\nraise RuntimeError('planted_' + __file__)\n")
    port, log = _free_port(), tmp_path / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "streamlit",
                "run",
                "app/serve.py",
                f"--server.port={port}",
                "--server.headless=true",
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{port}/")
            page.get_by_test_id("stException").wait_for(timeout=60_000)
            content = page.content()
            page.close()
        finally:
            process.terminate()
            process.wait(10)
    assert "RuntimeError" in content
    assert "planted_" not in content
    assert str(tmp_path) not in content
    assert "planted_" in log.read_text()  # the operator sees it
