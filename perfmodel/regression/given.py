"""What people hand over as the sides of a comparison, read for what it is."""

from collections.abc import Sequence
from pathlib import Path

from perfmodel.capture import load_capture
from perfmodel.capture_lines import MANIFEST
from perfmodel.ep_capture import is_ep_capture
from perfmodel.errors import InputError
from perfmodel.readers.folder import listed
from perfmodel.regression.saved.lookup import choose
from perfmodel.regression.saved.restored import load
from perfmodel.regression.saved.stored import is_baseline, is_store
from perfmodel.regression.traces.sides import is_of_traces, of_traces

from .evidence import Evidence, of_capture


def evidence(path: str | Path) -> Evidence:
    """A side of a comparison from a path: the folder of a saved baseline, a trace, a folder of traces, or a capture.

    Raises InputError for what is none of these or cannot be read.
    """
    if is_baseline(path):
        return load(path)
    if is_of_traces(Path(path)):
        return of_traces(path)
    if is_ep_capture(path):
        raise InputError(f"{str(path)!r} is a capture of expert parallelism, which `perfmodel phases` reads")
    if not (Path(path) / MANIFEST).exists():
        raise InputError(
            f"{str(path)!r} is no capture, trace, folder of traces, saved baseline or store of them: found "
            f"{_what_is_there(Path(path))}; `perfmodel collect` makes captures, `perfmodel baseline save` baselines"
        )
    return of_capture(load_capture(path))


def _what_is_there(path: Path) -> str:
    if not path.is_dir():
        return "nothing"
    inside = sorted(file.parent.name for file in path.glob(f"*/{MANIFEST}"))
    return f"a folder of captures ({listed(inside)}), of which one is a side" if inside else "a folder without any"


def sides(baseline: str | Path, candidate: str | Path, axes: Sequence[str] = ()) -> tuple[Evidence, Evidence]:
    """Baseline and candidate from their paths, each as `evidence` reads it; of a store of saved baselines the one that
    fits the other side along the declared axes (`lookup.choose`).

    Raises InputError as `evidence` does and for two stores, NotComparableError where no baseline of a store fits.
    """
    is_first, is_other = is_store(baseline), is_store(candidate)
    if is_first and is_other:
        raise InputError("both sides are stores of baselines; give the folder of a single baseline as one of them")
    if is_first:
        other = evidence(candidate)
        return evidence(choose(baseline, other, axes)), other
    first = evidence(baseline)
    return first, evidence(choose(candidate, first, axes) if is_other else candidate)


def store_of(path: str | Path) -> Path | None:
    """The store that a side comes from, null for one that is no saved baseline."""
    if is_store(path):
        return Path(path)
    return Path(path).parent if is_baseline(path) else None
