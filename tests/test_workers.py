"""Calls run by workers have the results they have here, whoever dies; nothing is lost and nothing hangs."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from perfmodel import workers
from perfmodel.errors import InputError, MissingExtraError
from perfmodel.workers import Lost, run_on_all

WORDS = ("a", "b", "killer", "c", "d", "e", "f")
PROCESSES = ("loky", "dask")


@pytest.fixture
def address(backend: str, request: pytest.FixtureRequest) -> str | None:
    """The scheduler a backend needs."""
    return str(request.getfixturevalue("scheduler")) if backend == "dask" else None


def run(function: str, backend: str, address: str | None, *more: str, words: Sequence[str] = WORDS) -> list[Any]:
    return run_on_all(f"tests.ranks_made:{function}", [(word, *more) for word in words], backend, 2, address)


@pytest.mark.parametrize("backend", ["loky", "threading", "sequential", "dask"])
def test_results_stand_in_the_order_of_their_calls(backend: str, address: str | None) -> None:
    assert run("doubled", backend, address) == [2 * word for word in WORDS]


@pytest.mark.parametrize("backend", PROCESSES)
def test_a_worker_that_dies_once_loses_nothing(backend: str, address: str | None, tmp_path: Path) -> None:
    flag = tmp_path / "killed"
    assert run("kill_worker_once", backend, address, str(flag)) == [2 * word for word in WORDS]
    assert flag.exists()


@pytest.mark.parametrize("backend", PROCESSES)
def test_calls_that_kill_every_worker_are_lost_alone(backend: str, address: str | None) -> None:
    words = ("a", "killer", "b", "c", "d") if backend == "dask" else ("a", "killer", "b", "c", "killer", "d")
    results = run("kill_worker", backend, address, "", words=words)
    for word, result in zip(words, results, strict=True):
        assert (isinstance(result, Lost) and result.reason) if word == "killer" else result == 2 * word


@pytest.mark.parametrize("backend", PROCESSES)
def test_fresh_workers_get_a_share_of_the_cores_for_polars(
    backend: str, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every worker so far died, or never loaded Polars; 3 is neither one thread nor one for each core."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True)
    monkeypatch.setattr(workers, "_threads_per_worker", lambda *_: 3)
    assert set(run("n_threads", backend, address)) == {3}
    assert "POLARS_MAX_THREADS" not in os.environ


@pytest.mark.parametrize(("n_jobs", "n_threads"), [(1, 8), (2, 4), (3, 2), (8, 1), (100, 1)])
def test_the_workers_of_a_machine_share_its_cores(n_jobs: int, n_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("joblib.cpu_count", lambda: 8)
    assert workers._threads_per_worker("loky", n_jobs) == n_threads
    assert workers._threads_per_worker("dask", -1) == 1


@pytest.mark.parametrize("backend", ["loky", "sequential"])
def test_processes_are_processes(backend: str) -> None:
    assert (os.getpid() in run("pid_of", backend, None)) == (backend == "sequential")


def test_a_defect_is_not_taken_for_a_dead_worker() -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        run("broken", "loky", None)


def test_progress_counts_every_call_once() -> None:
    said: list[str] = []
    run_on_all("tests.ranks_made:doubled", [(word,) for word in WORDS], "threading", 2, None, said.append)
    assert [line.split(": ")[0] for line in said] == [f"{i} of 7" for i in range(1, 8)]
    assert sorted(line.split(": ")[1] for line in said) == sorted(WORDS)


@pytest.mark.parametrize(
    ("backend", "n_workers", "scheduler", "words"),
    [
        ("spark?", None, None, "'spark?' is not a backend that joblib has here; there are dask, loky"),
        ("multiprocessing", None, None, "is not a backend"),
        ("loky", 0, None, "found 0 workers, expected 1 or more"),
        ("loky", None, "tcp://127.0.0.1:8786", "knows no scheduler address"),
        ("dask", None, "nonsense://x", "no Dask scheduler answers at 'nonsense://x'"),
        ("dask", None, None, "needs the address of a scheduler"),
    ],
)
def test_mistakes_are_sentences(backend: str, n_workers: int | None, scheduler: str | None, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("?", r"\?")):
        run_on_all("tests.ranks_made:doubled", [("a",)], backend, n_workers, scheduler)


def test_without_dask_the_install_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingExtraError, match=r'pip install "perfmodel\[cluster\]"'):
        run_on_all("tests.ranks_made:doubled", [("a",)], "dask", None, "tcp://127.0.0.1:1")


def test_a_cluster_without_workers_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(workers, "WAIT_S", 0.2)
    with (
        distributed.LocalCluster(
            n_workers=0, host="127.0.0.1", scheduler_port=0, dashboard_address="127.0.0.1:0", silence_logs="CRITICAL"
        ) as cluster,
        pytest.raises(InputError, match="the Dask scheduler has no worker"),
    ):
        run("doubled", "dask", cluster.scheduler_address)


def test_what_was_read_is_kept_when_the_last_worker_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(tasks: Sequence[Any], _: int | None) -> Any:
        yield 0, "first"
        raise TimeoutError("no worker")

    monkeypatch.setattr(workers, "_stream", stream)
    assert run("doubled", "threading", None, words=("a", "b", "c")) == ["first", *[Lost("no worker")] * 2]
