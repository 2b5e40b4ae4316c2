"""Real ranks for tests: processes that meet through gloo, each of which runs a function and hands back its result."""

import contextlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from collectors.ep_capture import MEETING

PATIENCE_S = 60


@cache
def _context() -> Any:
    """A server that has loaded torch once and forks processes, which then start at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["collectors.ep_measure", "tests.gloo_ranks"])
    return context


def _as_rank(rank: int, n_ranks: int, meeting: str) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_WORLD_SIZE": n_ranks}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update({MEETING: meeting, "TORCH_CPP_LOG_LEVEL": "ERROR"})


def _call(where: tuple[int, int, str], function: Callable[..., Any], words: tuple, say: Connection) -> None:
    _as_rank(*where)
    import torch

    from collectors.ep_ranks import joined

    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), joined("cpu") as ranks:
            say.send((function(ranks, *words), None))
    except BaseException as error:
        say.send((None, (type(error).__name__, str(error), traceback.format_exc())))
    os._exit(0)


def _command(where: tuple[int, int, str], words: list[str]) -> None:
    _as_rank(*where)
    from collectors import cli

    cli.STARTED = time.monotonic()
    os._exit(cli.main(words))


@contextlib.contextmanager
def _processes(n_ranks: int, target: Callable[..., None], words_of_rank: list[tuple]) -> Iterator[list[Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        meeting = str(Path(scratch) / "meeting")
        started = []
        try:
            for rank, words in enumerate(words_of_rank):
                started.append(_context().Process(target=target, args=((rank, n_ranks, meeting), *words)))
                started[-1].start()
            yield started
        finally:
            for process in started:
                process.kill()
                process.join()


def on_ranks(n_ranks: int, function: Callable[..., Any], *words: Any) -> list[Any]:
    """What a function of a test module, called with a `Ranks` and some words, gives on each of so many ranks.

    Where it raised, the name of the error, what it said, and where.
    """
    pipes = [_context().Pipe(duplex=False) for _ in range(n_ranks)]
    with _processes(n_ranks, _call, [(function, words, say) for _, say in pipes]):
        found = []
        for hear, _ in pipes:
            assert hear.poll(PATIENCE_S), "a rank says nothing"
            value, error = hear.recv()
            found.append(value if error is None else error)
        return found


def run_as_ranks(n_ranks: int, words: list[str]) -> list[int | None]:
    """The exit codes of so many ranks that run one command line of the collectors."""
    with _processes(n_ranks, _command, [(words,)] * n_ranks) as started:
        for process in started:
            process.join(PATIENCE_S)
        return [process.exitcode for process in started]
