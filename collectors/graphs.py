"""Calls recorded once into CUDA graphs and replayed: what the device takes when the host does not hold it up."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from perfmodel.errors import InputError, first_line

POSITIONS_PER_GRAPH = 16


@cache
def capture_stream() -> torch.cuda.Stream:
    """The stream graphs are recorded on, the same for all points of a process."""
    return torch.cuda.Stream()


def per_graph(n_positions: int) -> int:
    """Calls in each graph: as few graphs as hold all positions, all of one size; what is left over is not recorded."""
    n_graphs = -(-n_positions // POSITIONS_PER_GRAPH)
    return n_positions // n_graphs


def _refuse_waiting(call: Callable[[], object]) -> None:
    """Raise InputError when a call waits for the device: a recording that breaks off leaves torch in disorder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except torch.cuda.OutOfMemoryError:
            raise  # the same may fit when others have given back what they hold
        except RuntimeError as error:
            reason = first_line(error)
            raise InputError(f"this work waits for the device, so it cannot be recorded: {reason}") from None
        finally:
            torch.cuda.set_sync_debug_mode("default")


@dataclass(frozen=True)
class Recorded:
    """`replay(n)` replays the n-th graph, around the circle, which holds `n_inner` calls.

    `last` is what the last recorded call returned: memory that a replay of the last graph writes again.
    """

    replay: Callable[[int], None]
    n_inner: int
    n_graphs: int
    last: object
    close: Callable[[], None]


def record(calls: Sequence[Callable[[], object]], forget: Callable[[], None] = lambda: None) -> Recorded:
    """The calls as graphs, replayed once, the last one last.

    The first and the last call run before, so that libraries are set up; `forget` lets go of what calls keep, since a
    recording cannot use memory that was in use when it began. Raises InputError when the work cannot be recorded.
    """
    stream = capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
        _refuse_waiting(calls[-1])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    forget()
    size = per_graph(len(calls))
    graphs: list[torch.cuda.CUDAGraph] = []
    pool = torch.cuda.graph_pool_handle()
    last: object = None
    try:
        for first in range(0, len(calls) - size + 1, size):
            graph = torch.cuda.CUDAGraph()
            # Graphs are replayed one after another in the order they are recorded in, so they may share memory.
            # The outer context brings the stream back when a recording fails, which torch's own does not.
            with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=pool, stream=stream):
                for call in calls[first : first + size]:
                    last = None  # so that its memory serves the next call
                    last = call()
            graphs.append(graph)
    except torch.cuda.OutOfMemoryError:
        graphs.clear()
        raise
    except RuntimeError as error:
        graphs.clear()
        reason = first_line(error)
        raise InputError(f"this work cannot be recorded into a CUDA graph: {reason}") from None
    for graph in graphs:  # the first replay uploads a graph
        graph.replay()
    torch.cuda.synchronize()
    n_graphs = len(graphs)

    def replay(number: int) -> None:
        graphs[number % n_graphs].replay()

    def close() -> None:
        torch.cuda.synchronize()
        graphs.clear()

    return Recorded(replay, size, n_graphs, last, close)
