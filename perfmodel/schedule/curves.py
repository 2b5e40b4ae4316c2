"""How much faster schedules are than bulk, against the batch and against the skew, and where the fastest changes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import exp, log
from typing import Any

from .question import Question
from .what_if import skewed

TOKENS, EXPONENT = "tokens_per_gpu", "exponent"  # what a curve runs along
BATCHES = tuple(2**i for i in range(4, 15))
EXPONENTS = tuple(i / 4 for i in range(9))


@dataclass(frozen=True)
class Stretch:
    """Where one schedule is the fastest: between two values of what a curve runs along, null at its ends; the value is
    interpolated between the points on both sides."""

    schedule: str
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Curve:
    """The latency of schedules `latency_ns[schedule][point]` at the values `at[point]` of TOKENS or EXPONENT."""

    along: str
    at: tuple[float, ...]
    latency_ns: dict[str, tuple[float, ...]]

    @property
    def base(self) -> str:
        """The schedule that the others are set beside: bulk where it is there."""
        return "bulk" if "bulk" in self.latency_ns else next(iter(self.latency_ns))

    @property
    def speedups(self) -> dict[str, list[float]]:
        """How many times as fast as the base each schedule is, by point."""
        base = self.latency_ns[self.base]
        return {name: [b / ns for b, ns in zip(base, own, strict=True)] for name, own in self.latency_ns.items()}

    @property
    def stretches(self) -> list[Stretch]:
        """Which schedule is the fastest where. Between two points of different winners the ratio of their latencies is
        taken to run straight on logarithmic axes (of an exponent, on a plain one)."""
        names = list(self.latency_ns)
        best = [min(names, key=lambda name: self.latency_ns[name][i]) for i in range(len(self.at))]
        found, low = [], None
        for i in range(1, len(best)):
            if best[i] == best[i - 1]:
                continue
            before, after = (self.latency_ns[best[i + side]] for side in (-1, 0))
            left, right = (log(after[j] / before[j]) for j in (i - 1, i))
            share = left / (left - right) if left > right else 0.5
            x, y = self.at[i - 1], self.at[i]
            middle = exp(log(x) + share * log(y / x)) if self.along == TOKENS else x + share * (y - x)
            found.append(Stretch(best[i - 1], low, middle))
            low = middle
        return [*found, Stretch(best[-1], low, None)]

    def to_json(self) -> dict[str, Any]:
        """The curve as plain values, a row for each point."""
        rows = [
            {self.along: x, **{f"{name}_ns": own[i] for name, own in self.latency_ns.items()}}
            for i, x in enumerate(self.at)
        ]
        return {"points": rows, "fastest": [vars(one) for one in self.stretches]}


def at_batch(question: Question, tokens_per_gpu: float) -> Question:
    """The same with so many tokens on each GPU."""
    return replace(question, tokens_per_gpu=int(tokens_per_gpu))


MOVED: Mapping[str, Callable[[Question, float], Question]] = {TOKENS: at_batch, EXPONENT: skewed}


def point(question: Question, along: str, value: float, schedules: Sequence[str]) -> dict[str, float]:
    """The latency of each schedule at one point of a curve, ns."""
    moved = MOVED[along](question, value)
    return {name: moved.latency_ns(name) for name in schedules}


def curve_of(along: str, at: Sequence[float], find: Callable[[float], Mapping[str, float]]) -> Curve:
    """The curve through what `find` says of each point."""
    points = [find(value) for value in at]
    return Curve(along, tuple(at), {name: tuple(one[name] for one in points) for name in points[0]})


def curves(
    question: Question, schedules: Sequence[str], progress: Callable[[str], None] = lambda words: None
) -> tuple[Curve, Curve]:
    """Both curves of a question: against BATCHES, and against EXPONENTS of a power law; `progress` is told where."""

    def find(along: str, value: float) -> dict[str, float]:
        progress(f"{along.replace('_', ' ')} {value:g} ...")
        return point(question, along, value, schedules)

    batch = curve_of(TOKENS, BATCHES, partial(find, TOKENS))
    return batch, curve_of(EXPONENT, EXPONENTS, partial(find, EXPONENT))
