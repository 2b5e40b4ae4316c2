"""The dashboard as a child process on a free port of loopback, for browser tests and for the documents' pictures."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-proxy-server",
    "--disable-background-networking",
]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            with opener.open(f"{url}/_stcore/health", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the dashboard did not start:\n{log.read_text()}")


@contextmanager
def served() -> Iterator[str]:
    """The address of a dashboard started as `perfmodel app` starts it, from a foreign folder; stopped at the end."""
    with tempfile.TemporaryDirectory() as folder:
        log, port = Path(folder) / "log", _free_port()
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "perfmodel", "app", "--headless", "--port", str(port)],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT)},  # this checkout, whichever one is installed
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                _wait_until_healthy(f"http://127.0.0.1:{port}", process, log)
                yield f"http://127.0.0.1:{port}"
            finally:
                process.terminate()
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                with socket.socket() as probe:  # whoever stops the command stops the server
                    assert probe.connect_ex(("127.0.0.1", port)) != 0


def until(page: Any, expression: str, timeout_s: float = 60) -> None:
    """Wait until an expression is true in a page; Playwright's own way evaluates strings, which our policy forbids."""
    end = time.monotonic() + timeout_s
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"not so within {timeout_s:g} s: {expression}"
        page.wait_for_timeout(100)
