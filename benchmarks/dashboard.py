"""How long does the dashboard let a user wait, alone and beside nine others, and how much memory does it take?

    python benchmarks/dashboard.py [--packed-bytes 50e6] [--sessions 10]

Starts a server of its own as `perfmodel app` does, and needs the extras `app` and `dev` and a Chromium. The upload is
made up: the largest shipped profile, repeated with shifted times and ids, its names made distinct by a number that
hardly packs, until it has --packed-bytes.

    first paint   from the request of the default page to its first figure, in a browser with an empty cache
    repaint       from a step of the first slider that a view has until the page is whole again; the slowest of 10 steps
    upload        from the first byte of the upload until the page with its metrics was sent (no browser)
    others read   how long an idle session waits for its page while all other sessions upload at once
    memory        resident memory of the server: after its start, with the upload open, with all sessions open
"""

import argparse
import gzip
import json
import random
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from playwright.sync_api import Page, sync_playwright  # noqa: E402

from tests.conftest import CHROMIUM  # noqa: E402
from tests.served import ARGUMENTS, served  # noqa: E402
from tests.sessions import Session  # noqa: E402

GOALS_S = {"first paint": 3, "repaint": 0.5, "upload": 10}
VIEWS = ("", "roofline", "accuracy", "placement", "schedules", "regression", "trace")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed-bytes", type=float, default=50e6)
    parser.add_argument("--sessions", type=int, default=10)
    options = parser.parse_args()
    content, n_events = made_up_trace(options.packed_bytes)
    small, n_small = made_up_trace(options.packed_bytes / 20)
    print(f"made-up upload: {len(content) / 1e6:.0f} MB packed, {n_events:,} events")
    with served() as url:
        process = server_process(url)
        with sync_playwright() as driver:
            if CHROMIUM is None:
                raise SystemExit("no Chromium found: first paint and repaint cannot be measured")
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            say("first paint", first_paint(page, url))
            say("first paint", first_paint(browser.new_page(), url), "a second user")
            found = repaint(page, url)
            view, waits_s = found or ("", [float("nan")])
            say(
                "repaint",
                max(waits_s),
                f"of view {view or 'overview'}, median {sorted(waits_s)[len(waits_s) // 2]:.2f} s",
            )
            browser.close()
        print(f"memory: {resident_mb(process):.0f} MB after that")
        session = Session(url, "trace")
        say("upload", session.upload("large_made.json.gz", content))
        assert f"{n_events:,} events" in session.words, session.words[:500]
        print(f"memory: {resident_mb(process):.0f} MB with that upload open")
        idle = Session(url, "")
        alone_s = [idle.run() for _ in range(5)]
        beside_s, done_s = others_read(url, idle, options.sessions, small, n_small)
        print(
            f"others read: an idle session waits {max(alone_s):.2f} s at most alone, {max(beside_s):.2f} s (median "
            f"{sorted(beside_s)[len(beside_s) // 2]:.2f} s) while {options.sessions} others "
            f"upload {len(small) / 1e6:.1f} MB each; they are done after {done_s[0]:.1f} to {done_s[-1]:.1f} s"
        )
        print(f"memory: {resident_mb(process):.0f} MB with {options.sessions} more uploads open")
    if found is None:
        raise SystemExit("no view has a slider: repaint was not measured")


def say(what: str, seconds: float, more: str = "") -> None:
    """Print one wait beside its goal."""
    print(f"{what}: {seconds:.2f} s{', ' + more if more else ''} (goal {GOALS_S[what]} s)", flush=True)


def made_up_trace(n_bytes: float) -> tuple[bytes, int]:
    """A packed profile of about so many bytes, made of a shipped one, and how many events it has."""
    source = max((ROOT / "traces").glob("*/profiles/*.json.gz"), key=lambda path: path.stat().st_size)
    document = json.loads(gzip.decompress(source.read_bytes()))
    events = document.pop("traceEvents")
    timed = [event for event in events if event.get("ph") == "X"]
    span_us = max(e["ts"] + e["dur"] for e in timed) - min(e["ts"] for e in timed)
    numbers = random.Random(0)
    packed = bytearray(gzip.compress(json.dumps(document)[:-1].encode() + b', "traceEvents": ['))
    for i in range(10**6):
        shifted = []
        for event in events:
            moved = {**event, "args": {**event.get("args", {}), "Record function id": numbers.getrandbits(48)}}
            moved["ts"] = round(event.get("ts", 0) + i * span_us, 3)
            if isinstance(moved["args"].get("External id"), int):
                moved["args"]["External id"] += i * 10**6
            shifted.append(json.dumps(moved))
        packed += gzip.compress(((", " if i else "") + ", ".join(shifted)).encode(), 6)
        if len(packed) >= n_bytes:
            return bytes(packed + gzip.compress(b"]}")), (i + 1) * len(events)
    raise AssertionError("unreachable for sizes that fit in memory")


def first_paint(page: Page, url: str) -> float:
    """Seconds until the default page has drawn a figure."""
    began = time.monotonic()
    page.goto(url)
    page.wait_for_selector(".js-plotly-plot .main-svg", timeout=60_000)
    return time.monotonic() - began


def repaint(page: Page, url: str, n_steps: int = 10) -> tuple[str, list[float]] | None:
    """The first view that has a slider, and how long each of some steps of it takes; null where none has."""
    whole = "[data-testid=stApp][data-test-script-state=notRunning]"
    for view in VIEWS:
        page.goto(f"{url}/{view}")
        page.wait_for_selector(whole, timeout=60_000)
        page.wait_for_timeout(2000)
        slider = page.get_by_role("slider").first
        if slider.count():
            break
    else:
        return None
    waits_s = []
    for step in range(n_steps):
        slider.focus()
        began = time.monotonic()
        slider.press("ArrowRight" if step % 2 else "ArrowLeft")
        page.wait_for_selector(
            "[data-testid=stApp]:not([data-test-script-state=notRunning])", timeout=10_000, state="attached"
        )
        page.wait_for_selector(whole, timeout=60_000)
        waits_s.append(time.monotonic() - began)
        page.wait_for_timeout(300)
    return view, waits_s


def others_read(
    url: str, idle: Session, n_sessions: int, content: bytes, n_events: int
) -> tuple[list[float], list[float]]:
    """How long an idle session waits for its page while others upload at once; when those are done."""

    def upload(session: Session) -> float:
        seconds = session.upload("small_made.json.gz", content)
        assert f"{n_events:,} events" in session.words, session.words[:500]
        return seconds

    sessions = [Session(url, "trace") for _ in range(n_sessions)]
    waits_s = []
    with ThreadPoolExecutor(n_sessions) as pool:
        done: list[Future[float]] = [pool.submit(upload, session) for session in sessions]
        while not all(one.done() for one in done):
            waits_s.append(idle.run())
            time.sleep(0.1)
    return waits_s, sorted(one.result() for one in done)


def server_process(url: str) -> Path:
    """The folder in /proc of the process that listens on a port."""
    port = f":{int(url.rsplit(':', 1)[1]):04X}"
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inode = next(line[9] for line in lines if line[1].endswith(port) and line[3] == "0A")
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(link.readlink()) == f"socket:[{inode}]":
                return link.parent.parent
        except OSError:
            continue
    raise SystemExit("the process of the server was not found in /proc: this needs Linux")


def resident_mb(process: Path) -> float:
    """The resident memory of a process in MB."""
    words: dict[str, Any] = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return int(words["VmRSS"].split()[0]) * 1024 / 1e6


if __name__ == "__main__":
    main()
