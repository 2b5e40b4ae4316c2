"""How is one function run on many files: here, in processes of this machine, or on the user's cluster; joblib runs it.

Nothing here imports Polars, and functions travel by name: in a fresh worker the number of Polars' threads is set before
Polars is loaded, after which it could not be changed (docs/decisions/0014-ranks.md).
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from perfmodel.errors import InputError, MissingExtraError

PROCESSES = "loky"  # joblib's name for processes of this machine
IN_PROCESS = ("threading", "sequential")
ON_THIS_MACHINE = (PROCESSES, *IN_PROCESS)
WAIT_S = 60  # for the first worker of a cluster, or for one that is started again

# Classes of errors that say "a worker died": those of concurrent.futures and loky, Dask, and Ray.
_DEAD_WORKER = {"BrokenExecutor", "TerminatedWorkerError", "KilledWorker", "WorkerCrashedError", "OutOfMemoryError"}
_INSTALL = 'pip install "perfmodel[cluster]"'

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Lost:
    """A call that has no result, because every worker that ran it died."""

    reason: str


def run_on_all(
    function: str,
    calls: Sequence[tuple[str | None, ...]],
    backend: str = PROCESSES,
    n_workers: int | None = None,
    scheduler: str | None = None,
    progress: Progress = lambda _: None,
) -> list[Any]:
    """The results of `function`, written as "module:name", for each tuple of arguments, in their order.

    A call whose worker died runs again, at last alone; where that worker dies as well its result is `Lost`, as are all
    that remain when a cluster has lost its last worker. `backend` is a joblib backend: "loky" (processes), "threading",
    "sequential", "dask" with the scheduler's address (or a client that is open), or one that is registered with joblib,
    as Ray's. `n_workers` is null for one worker for each core; Dask decides for itself. Raises InputError on an unknown
    backend or one that cannot be reached, and MissingExtraError where Dask is not installed.
    """
    results: dict[int, Any] = {}
    with _configured(backend, n_workers, scheduler) as n_jobs:
        n_threads = None if backend in IN_PROCESS else _threads_per_worker(backend, n_jobs)

        def missing() -> list[int]:
            return [index for index in range(len(calls)) if index not in results]

        def run(indices: Sequence[int], n_jobs: int | None) -> str | None:
            """Add the results of some calls; returns why not of all."""
            try:
                for index, result in _stream([(i, function, calls[i], n_threads) for i in indices], n_jobs):
                    results[index] = result
                    progress(f"{len(results)} of {len(calls)}: {calls[index][0]}")
            except TimeoutError as error:  # nobody is there to run anything
                reason = " ".join(str(error).split())
                if not results:
                    raise InputError(f"the Dask scheduler has no worker ({reason})") from None
                results.update(dict.fromkeys(missing(), Lost(reason)))
            except Exception as error:
                if _DEAD_WORKER.isdisjoint(kind.__name__ for kind in type(error).__mro__):
                    raise
                return " ".join(str(error).split()) or type(error).__name__
            return None

        # A death takes the calls of other workers with it. They may try together once more, unless Dask has tried; then
        # one by one, until the culprit has died alone, which is one of the first: calls begin in their order.
        while run(missing(), n_jobs) and (backend == "dask" or run(missing(), n_jobs)):
            for index in missing():
                reason = run([index], 2)  # a pool of one would be this very process
                if reason and index not in results:
                    results[index] = Lost(reason)
                    break
    return [results[index] for index in range(len(calls))]


def call(index: int, function: str, arguments: tuple[str | None, ...], n_threads: int | None) -> tuple[int, Any]:
    """What a worker runs: one call, with its index; Polars gets `n_threads` where it is not loaded yet."""
    if n_threads and "polars" not in sys.modules:
        os.environ["POLARS_MAX_THREADS"] = str(n_threads)
    module, _, name = function.partition(":")
    return index, getattr(import_module(module), name)(*arguments)


def _stream(tasks: Sequence[tuple[Any, ...]], n_jobs: int | None) -> Iterator[tuple[int, Any]]:
    """The results of tasks as they come, or together where the backend cannot stream."""
    from joblib import Parallel, delayed
    from joblib.parallel import get_active_backend

    streams = get_active_backend()[0].supports_return_generator
    return_as = "generator_unordered" if streams else "list"
    parallel = Parallel(n_jobs=n_jobs, batch_size=1, pre_dispatch="all", return_as=return_as)
    yield from parallel(delayed(call)(*task) for task in tasks)


def _threads_per_worker(backend: str, n_jobs: int | None) -> int:
    """Polars threads such that the workers of a machine have as many as it has cores; 1 where we do not know them."""
    from joblib import cpu_count

    return max(1, cpu_count() // (n_jobs or cpu_count())) if backend == PROCESSES else 1


@contextmanager
def _configured(backend: str, n_workers: int | None, scheduler: str | None) -> Iterator[int | None]:
    """The backend, chosen for the time of the block; gives the number of workers to ask for."""
    from joblib import cpu_count, parallel_config
    from joblib.parallel import BACKENDS, EXTERNAL_BACKENDS

    if n_workers is not None and n_workers < 1:
        raise InputError(f"found {n_workers} workers, expected 1 or more")
    if scheduler is not None and backend != "dask":
        raise InputError(f"the backend {backend!r} knows no scheduler address; only dask does")
    if backend == "dask":
        with _dask(scheduler) as chosen, parallel_config(backend=chosen):
            yield -1
        return
    known = sorted({*BACKENDS, *EXTERNAL_BACKENDS} - {"multiprocessing"})  # which forks, and Polars does not survive it
    if backend not in known:
        raise InputError(f"{backend!r} is not a backend that joblib has here; there are {', '.join(known)}")
    with parallel_config(backend=backend):
        yield n_workers or (cpu_count() if backend in ON_THIS_MACHINE else -1)


@contextmanager
def _dask(scheduler: str | None) -> Iterator[Any]:
    """joblib's Dask backend on the scheduler at an address, or on the client that is open here."""
    try:
        from distributed import Client, get_client
        from joblib._dask import DaskDistributedBackend
    except ImportError as error:
        raise MissingExtraError(f"the backend dask needs a package that is absent ({error.name}): {_INSTALL}") from None
    from concurrent.futures import Future

    class Backend(DaskDistributedBackend):  # type: ignore[misc]
        """joblib 1.6 waits for ever for a task that Dask gave up, and does itself what a single worker should do."""

        def effective_n_jobs(self, n_jobs: int) -> int:
            return max(2, int(super().effective_n_jobs(n_jobs)))

        def submit(self, func: Any, callback: Any = None) -> Any:
            future = super().submit(func, callback)
            future.add_done_callback(lambda done: callback(done) if done.exception() else None)
            return future

        def retrieve_result_callback(self, out: Any) -> Any:
            return out.result() if isinstance(out, Future) else super().retrieve_result_callback(out)

    if scheduler is None:
        try:
            client = get_client()
        except ValueError:
            raise InputError(
                "the backend dask needs the address of a scheduler, as tcp://host:8786, or an open client"
            ) from None
        yield Backend(client=client, wait_for_workers_timeout=WAIT_S)
        return
    try:
        client = Client(scheduler, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:  # a TimeoutError is an OSError
        raise InputError(f"no Dask scheduler answers at {scheduler!r} ({error}); expected tcp://host:8786") from None
    with client:
        yield Backend(client=client, wait_for_workers_timeout=WAIT_S)
