"""How long does the dashboard let a user wait, alone and beside nine others, and how much memory does it take?

    python benchmarks/dashboard.py [--packed-bytes 50e6] [--sessions 10]

Starts a server of its own as `perfmodel app` does, and needs the extras `app` and `dev` and a Chromium. The upload is
made up: the largest shipped profile, repeated with shifted times and ids, its names made distinct by a number that
hardly packs, until it has --packed-bytes.

    first paint   from the request of the default page to its first figure, in a browser with an empty cache
    repaint       from the event of a control until the data of a figure are others: median and most of six changes
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
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from playwright.sync_api import Page, sync_playwright  # noqa: E402

from tests.conftest import CHROMIUM  # noqa: E402
from tests.served import ARGUMENTS, served, until  # noqa: E402
from tests.sessions import Session  # noqa: E402

GOALS_S = {"first paint": 3, "repaint": 0.5, "upload": 10}
N_STEPS = 6


class Control(NamedTuple):
    """A control of a view, and what is chosen there in turn: words, or keys that move a slider."""

    view: str
    role: str
    name: str
    values: tuple[str, ...]


MOVES = ("ArrowLeft", "ArrowRight")
CONTROLS = (
    Control("", "combobox", "Measurements", ("epyc-zen5-2c-bf16", "epyc-zen5-2c-fp32", "epyc-zen4-2c-fp32")),
    Control("roofline", "combobox", "Machine", ("h100-sxm", "epyc-zen5-2c-fp32", "epyc-zen4-2c-fp32")),
    Control("accuracy", "combobox", "Model", ("epyc-zen5-2c-bf16", "epyc-zen5-2c-fp32", "epyc-zen4-2c-fp32")),
    Control("placement", "slider", "Experts on the GPU, %", MOVES),
    Control("placement?shape=deepseek-v3", "slider", "Experts on the GPU, %", MOVES),
    Control("placement", "combobox", "Tokens of a pass", ("4096", "512", "65536")),
    Control("schedules", "slider", "Tokens on each GPU", MOVES),
    Control("schedules?gpus=16", "slider", "Tokens on each GPU", MOVES),
    Control("schedules?tab=Measured", "combobox", "Tokens of a rank", ("16", "128")),
    Control("schedules?tab=Expert+maps", "slider", "Fastest GPU faster by", ("ArrowRight", "ArrowRight")),
    Control("regression", "spinbutton", "Margin, %", ("5", "8", "3")),
    Control("trace?part=Timeline", "slider", "Part of it, in per cent", ("ArrowRight", "ArrowLeft")),
)
# From the event in the page until any figure has other data than before; both are times of the browser.
WATCH = """() => {
  const figures = () => [...document.querySelectorAll('.js-plotly-plot')].map(one => one.data);
  const before = JSON.stringify(figures());
  let last = figures(), began = 0;
  window.__changed_ms = 0;
  addEventListener('keydown', () => { began = began || performance.now() }, {capture: true, once: true});
  const look = () => {
    const now = figures();
    const isNew = now.length !== last.length || now.some((one, i) => one !== last[i]);
    last = now;
    if (isNew && now.length && JSON.stringify(now) !== before) window.__changed_ms = performance.now() - began;
    else requestAnimationFrame(look);
  };
  look();
}"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed-bytes", type=float, default=50e6)
    parser.add_argument("--sessions", type=int, default=10)
    parser.add_argument("--waits-only", action="store_true", help="first paint and repaints, no uploads")
    options = parser.parse_args()
    if options.waits_only:
        with served() as url:
            waits(url)
        return
    content, n_events = made_up_trace(options.packed_bytes)
    small, n_small = made_up_trace(options.packed_bytes / 20)
    print(f"made-up upload: {len(content) / 1e6:.0f} MB packed, {n_events:,} events")
    with served() as url:
        process = server_process(url)
        waits(url)
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


def waits(url: str) -> None:
    """Print what users of a browser wait for."""
    with sync_playwright() as driver:
        if CHROMIUM is None:
            raise SystemExit("no Chromium found: first paint and repaint cannot be measured")
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        say("first paint", first_paint(page, url))
        say("first paint", first_paint(browser.new_page(), url), "a second user")
        for control in CONTROLS:
            waits_s = repaint(page, url, control)
            say("repaint", median(waits_s), f"{control.view or 'overview'}: {control.name}, most {max(waits_s):.2f} s")
        browser.close()


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


def repaint(page: Page, url: str, control: Control) -> list[float]:
    """How long each of some changes of a control takes until the data of a figure are others."""
    page.goto(f"{url}/{control.view}")
    page.wait_for_selector(".js-plotly-plot .main-svg", timeout=60_000)
    page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]", timeout=60_000)
    page.wait_for_timeout(1500)
    found = page.get_by_role(control.role, name=control.name).first  # type: ignore[arg-type]
    waits_s = []
    for i in range(N_STEPS):
        value = control.values[i % len(control.values)]
        if control.role == "slider":
            found.focus()
        elif control.role == "combobox":
            found.click()
            found.fill(value)
            page.wait_for_timeout(200)
        else:
            found.fill(value)
        page.evaluate(WATCH)
        found.press(value if control.role == "slider" else "Enter")
        until(page, "window.__changed_ms")
        waits_s.append(page.evaluate("window.__changed_ms") / 1000)
        page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]", timeout=60_000)
        page.wait_for_timeout(400)
    return waits_s


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
