"""What people hand over as one side of a comparison, read for what it is."""

from pathlib import Path

from perfmodel.capture import load_capture

from .evidence import Evidence, of_capture


def evidence(path: str | Path) -> Evidence:
    """A side of a comparison from a path: a capture folder.

    Raises InputError for what is none of these or cannot be read.
    """
    return of_capture(load_capture(path))
