"""What the workers of tests run, by name: in a module of its own, which loads no Polars before it is asked to."""

import os
import signal
import time
from pathlib import Path
from typing import Any


def n_threads(_: str) -> int:
    import polars as pl

    return pl.thread_pool_size()


def pid_of(_: str) -> int:
    return os.getpid()


def doubled(word: str, _: str | None = None) -> str:
    return 2 * word


def kill_worker_once(word: str, flag: str) -> str:
    """Doubled, but the first worker that is asked for "killer" dies."""
    if word == "killer" and _is_first(Path(flag)):
        _die()
    return 2 * word


def kill_worker(word: str, _: str) -> str:
    if word == "killer":
        _die()
    return 2 * word


def summary_killed_once(file: str, cache: str) -> Any:
    """The summary of a rank; the first worker that has read rank 2 dies before it can tell."""
    from perfmodel.ranks import summary_of_file

    found = summary_of_file(file, cache)
    if "rank-2" in file and _is_first(Path(cache) / "killed"):
        _die()
    return found


def broken(_: str) -> None:
    raise RuntimeError("a defect")


def _die() -> None:
    time.sleep(1)  # Dask starts no worker again that dies before it is known to run
    os.kill(os.getpid(), signal.SIGKILL)


def _is_first(flag: Path) -> bool:
    try:
        flag.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
