"""A collection killed in the middle of what it measures: the beginning of the tests that continue it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from collectors import store
from tests.conftest import ROOT


def killed_while_measuring(folder: Path, arguments: list[str], n_points: int) -> tuple[list[str], bytes]:
    """The command, ended by SIGKILL once so many points are on disk, and the whole lines of points it left."""
    command = [sys.executable, "-m", "collectors", *arguments, "--out", str(folder)]
    victim = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    seen = folder / store.OBSERVATIONS
    try:
        give_up = time.monotonic() + 120
        while not seen.exists() or seen.read_bytes().count(b"\n") < n_points:
            assert time.monotonic() < give_up and victim.poll() is None, "nothing was measured"
            time.sleep(0.005)
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    at_kill = seen.read_bytes()
    return command, at_kill[: at_kill.rfind(b"\n") + 1]
