"""What people hand over as one side of a comparison, read for what it is."""

from pathlib import Path

from perfmodel.capture import load_capture

from .evidence import Evidence, of_capture
from .from_traces import is_of_traces, of_traces


def evidence(path: str | Path) -> Evidence:
    """A side of a comparison from a path: a capture folder, a trace, or a folder of traces.

    Raises InputError for what is none of these or cannot be read.
    """
    if is_of_traces(Path(path)):
        return of_traces(path)
    return of_capture(load_capture(path))
