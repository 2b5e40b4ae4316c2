"""How far a collection is, on stderr: one line that is rewritten on a terminal, otherwise a line every few seconds."""

import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

LINE_EVERY_S = 5.0


def clock_words(seconds: float) -> str:
    """Seconds as minutes and seconds, `2:05`."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@dataclass
class Progress:
    """Counts points done of a total; points done before this process began say nothing about its speed.

    `deadline` (monotonic seconds) ends a time budget, null without one.
    """

    n_total: int
    n_before: int
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    n_done: int = 0
    started: float = field(default_factory=time.monotonic)
    shown: float = -LINE_EVERY_S
    deadline: float | None = None

    def line(self, label: str) -> str:
        """The words: label, done of total, elapsed, and what remains: of the budget, or once a point is done."""
        elapsed = time.monotonic() - self.started
        done = f" {self.n_before + self.n_done}/{self.n_total} points," if self.n_total else ""
        words = f"{label}:{done} {clock_words(elapsed)} elapsed"
        if self.deadline is not None:
            words += f", at most {clock_words(max(0.0, self.deadline - time.monotonic()))} left"
        elif self.n_done:
            left = self.n_total - self.n_before - self.n_done
            words += f", about {clock_words(elapsed / self.n_done * left)} left"
        return words

    def show(self, label: str, force: bool = False) -> None:
        """Write the line if it is time to."""
        now = time.monotonic()
        is_terminal = self.stream.isatty()
        if not force and now - self.shown < (0.1 if is_terminal else LINE_EVERY_S):
            return
        self.shown = now
        if is_terminal:
            print("\r\x1b[K" + self.line(label), end="", file=self.stream, flush=True)
        else:
            print(self.line(label), file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the cursor on a fresh line."""
        if self.stream.isatty():
            print(file=self.stream, flush=True)
