"""What options of the collectors' command line may be, each with a sentence for what they may not. Needs no torch."""

import argparse
import importlib.util
from collections.abc import Callable
from typing import NoReturn

from perfmodel.errors import InputError, MissingExtraError
from perfmodel.routing import pattern_shares

from .plan import DTYPES

LONGEST_MINUTES = 24 * 60


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of printing the usage first."""

    def error(self, message: str) -> NoReturn:
        """Print the sentence and leave with exit code 2."""
        self.exit(2, f"collectors: {message}\n")


def count(name: str) -> Callable[[str], int]:
    """A parser of whole numbers; `name` is what they are called in what it says."""

    def parse(words: str) -> int:
        if not words.isdecimal() or len(words) > 7 or int(words) < 1:
            raise argparse.ArgumentTypeError(f"{name} is {words[:20]!r}, expected a whole number from 1 to 9,999,999")
        return int(words)

    return parse


def minutes(words: str) -> float:
    """A time budget."""
    try:
        found = float(words)
    except ValueError:
        found = 0.0
    if not 0.2 <= found <= LONGEST_MINUTES:
        raise argparse.ArgumentTypeError(f"--minutes is {words[:20]!r}, expected 0.2 to {LONGEST_MINUTES}")
    return found


def seed(words: str) -> int:
    """A seed of random numbers."""
    if not words.isdecimal() or int(words) >= 2**31:
        raise argparse.ArgumentTypeError(f"the seed is {words!r}, expected a whole number of 0 to 2^31 - 1")
    return int(words)


def names(words: str) -> tuple[str, ...]:
    """Names separated by commas, each once."""
    found = tuple(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    if not found:
        raise argparse.ArgumentTypeError("expected names separated by commas")
    return found


def dtypes(words: str) -> tuple[str, ...]:
    """Dtypes by their torch names, separated by commas."""
    for name in names(words):
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return names(words)


def token_counts(words: str) -> tuple[int, ...]:
    """Numbers of tokens separated by commas, ascending."""
    return _counts("a number of tokens", words)


def piece_counts(words: str) -> tuple[int, ...]:
    """Numbers of pieces separated by commas, ascending."""
    return _counts("a number of pieces", words)


def _counts(what: str, words: str) -> tuple[int, ...]:
    return tuple(sorted({count(what)(name) for name in names(words)}))


def routings(words: str) -> tuple[str, ...]:
    """Routing patterns separated by commas."""
    for name in names(words):
        try:
            pattern_shares(name, 2)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return names(words)


def require_torch(device: str) -> None:
    """Raise unless torch is there (MissingExtraError), and with it the device (InputError)."""
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError("measuring needs torch 2.9 or newer: pip install 'perfmodel[collect]' (or torch numpy)")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError(f"--device cuda: torch {torch.__version__} finds no CUDA device here; use --device cpu")
