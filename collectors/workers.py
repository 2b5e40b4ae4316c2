"""Measuring processes seen from outside: start one, follow what it says, end it when it hangs, go on when it dies.

A process says on stdout what it begins and what it has done, one JSON object a line. A GPU error or a crash takes the
process with it; the point it was at is then left out with the reason, and a new process goes on with the next.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import store

RESTART = 75  # a process asks for a successor: its device no longer answers
SAID_WHY = (2, 3)  # bad input, missing package: the process has printed a sentence
N_RESTARTS = 12  # of one stage, before something is wrong with the machine rather than with a point
LEAST_PATIENCE_S, PATIENCE_FACTOR = 60.0, 20.0  # silence after which a process counts as hanging
START_PATIENCE_S, END_PATIENCE_S = 180.0, 20.0  # the same while it starts, and once it has said its last word
GRACE_S = 20.0  # a process has so much more than its time, for the point it is at
SIGNAL_PATIENCE_S = 5.0  # after SIGTERM, and after SIGKILL
PACKAGE = __package__ or "collectors"  # part of another package where it is installed

Wrap = Callable[[list[str]], list[str]]


class StageError(Exception):
    """A measuring process ended early; `exit_code` is its own, and unless it is 2 or 3 nobody has said why yet."""

    def __init__(self, exit_code: int, words: str = "") -> None:
        super().__init__(words or f"a measuring process ended with {exit_code}")
        self.exit_code = exit_code


@dataclass
class Step:
    """What a process is at: the journal entry to write should it die, how long it may be silent, whether it is done.

    `has_left_out`: the last it said was that something failed. The device may be in disorder then, of which it may die.
    """

    entry: store.Json | None = None
    patience_s: float = START_PATIENCE_S
    is_done: bool = False
    has_left_out: bool = False


@dataclass(frozen=True)
class Stage:
    """One stage of a measurement: its arguments on the command line, its threads, the folder's lock to hold.

    `seconds` is the time for all its processes together, null for as much as it takes.
    """

    folder: Path
    arguments: Sequence[str]
    threads: int
    lock: int | None = None
    wrap: Wrap = list  # puts the command into another, such as a profiler's; as it is, a copy
    seconds: float | None = None


def _command(stage: Stage, left_s: float | None) -> list[str]:
    limit = [] if left_s is None else ["--seconds", f"{max(0.0, left_s):.1f}"]
    command = [sys.executable, "-m", PACKAGE, "stage", *stage.arguments, *limit, "--out", str(stage.folder)]
    return stage.wrap(command)


def environment(threads: int) -> dict[str, str]:
    """The variables of a process of this package that computes on so many threads."""
    # The measuring process must find this very package, however the command was started.
    depth = len(PACKAGE.split("."))
    home = str(Path(__file__).resolve().parents[depth])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}


def _started(stage: Stage, left_s: float | None) -> tuple[subprocess.Popen[str], queue.Queue[str | None]]:
    process = subprocess.Popen(
        _command(stage, left_s),
        stdout=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",  # a library that prints
        env=environment(stage.threads),
        pass_fds=() if stage.lock is None else (stage.lock,),
        start_new_session=True,  # Ctrl-C is for this process, which ends the other
    )
    said: queue.Queue[str | None] = queue.Queue()

    def follow() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                said.put(line)
        said.put(None)

    threading.Thread(target=follow, daemon=True).start()
    return process, said


def _follow(process: subprocess.Popen[str], said: queue.Queue[str | None], on_word: Callable[[store.Json], None],
            step: Step, give_up: float) -> str | None:  # fmt: skip
    """Hand on what a process says until it ends; why it has to be ended when it does not, `` when time is up."""
    while True:
        left_s = give_up - time.monotonic()
        try:
            line = said.get(timeout=max(0.0, min(step.patience_s, left_s)))
            if line is None:
                process.wait(timeout=END_PATIENCE_S)
                return None
        except queue.Empty:
            return f"no answer in {step.patience_s:.0f} s" if step.patience_s < left_s else ""
        except subprocess.TimeoutExpired:
            return "closed its output and went on"
        try:
            word = json.loads(line)
        except ValueError:
            continue  # a library that prints
        if not isinstance(word, dict):
            continue
        if "begin" in word:
            step.entry, seconds = word["begin"], float(word.get("seconds", 0.0))
            waits_s = max(0.0, float(word.get("waits_s", 0.0)))
            step.patience_s = max(LEAST_PATIENCE_S, PATIENCE_FACTOR * seconds) + waits_s
        else:
            step.entry = None
        step.has_left_out = "left" in word
        if "end" in word:
            step.is_done, step.patience_s = True, END_PATIENCE_S
        on_word(word)


def end(process: subprocess.Popen[str]) -> None:
    """End a process and all that it started; gives up on one that hangs in a driver, `returncode` is then null."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=SIGNAL_PATIENCE_S)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
        break
    process.poll()


def run_stage(stage: Stage, on_word: Callable[[store.Json], None]) -> None:
    """Run one stage to its end, in as many processes as it takes. Each holds the folder's lock as long as it lives.

    A process that is not done when time and grace are over is ended, and nothing is left out: more time may do it.
    Raises StageError when a process says why it cannot go on, ends outside of any point, or too many die; one that a
    signal ended there, such as for want of memory, is tried once more. Ends the process when this one is interrupted.
    """
    is_first_time = True
    until = None if stage.seconds is None else time.monotonic() + stage.seconds
    for _ in range(N_RESTARTS):
        step = Step()
        process, said = _started(stage, None if until is None else until - time.monotonic())
        try:
            failure = _follow(process, said, on_word, step, float("inf") if until is None else until + GRACE_S)
        finally:
            end(process)
        code = process.returncode
        if code is None:
            raise StageError(1, "a measuring process cannot be ended: it hangs in the system or a driver")
        if (failure is None and code == 0) or step.is_done:  # what goes wrong after the last word harms nothing
            return
        if failure == "":
            at = f" at {words_of(step.entry)}" if step.entry is not None else ""
            print(f"a measuring process was ended{at}: its time was up", file=sys.stderr)
            return
        if failure is None and code in SAID_WHY:
            raise StageError(code)
        if failure is None and code == -signal.SIGTERM:  # somebody stops all processes: no fault of the point
            raise StageError(1, f"a measuring process {how_it_ended(code)}")
        if step.entry is not None:
            entry = {**step.entry, "reason": failure or how_it_ended(code), "is_fatal": True}
            store.append(stage.folder, store.LEFT_OUT, {**entry, "started": int(time.time())})
            print(f"left out: {words_of(step.entry)}: {entry['reason']}", file=sys.stderr)
        elif code < 0 and failure is None and is_first_time:
            is_first_time = step.has_left_out
        elif code != RESTART and not step.has_left_out:
            raise StageError(code if code > 0 else 1, f"a measuring process {failure or how_it_ended(code)}")
        if until is not None and time.monotonic() >= until:
            return
    raise StageError(1, f"{N_RESTARTS} measuring processes of one stage died")


def how_it_ended(code: int) -> str:
    """The end of a process in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by signal {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def words_of(entry: store.Json) -> str:
    """A journal entry in a few words, for people."""
    return " ".join(f"{key} {value}" for key, value in entry.items() if not isinstance(value, dict))
