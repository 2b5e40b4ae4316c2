"""How much may a file of somebody unknown take to read, as on a server that many use; checked while it is read."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from perfmodel import text
from perfmodel.errors import InputError, TooLargeError

_RATIO_FROM_BYTES = 2**28  # content up to this may be packed as tightly as it likes: it fits in memory
_INSTEAD = "on your own machine `perfmodel analyze FILE` has no such limit"
# Environment variable -> the field that it sets.
VARIABLES = {
    "PERFMODEL_MAX_UNPACKED_BYTES": "unpacked_bytes",
    "PERFMODEL_MAX_UNPACKED_RATIO": "unpacked_ratio",
    "PERFMODEL_MAX_EVENTS": "n_events",
    "PERFMODEL_MAX_READ_SECONDS": "seconds",
}


@dataclass(frozen=True)
class Limits:
    """What reading one file, or one folder of ranks, may take at most before it raises TooLargeError.

    `unpacked_bytes` bounds the content of a file, `unpacked_ratio` the same as a multiple of the file's own size (from
    256 MiB on: traces pack 15 to 100 times, bombs a thousand times and more), `n_events` the events or rows that are
    read, `seconds` the time for one file (mending damaged events is slow). `progress` hears how many bytes of a file
    were read and how many it has. Within limits nothing is read that could not be checked: Parquet files, reports that
    another program must open, views in databases.
    """

    unpacked_bytes: int = 4 * 2**30
    unpacked_ratio: int = 200
    n_events: int = 10_000_000
    seconds: int = 300
    progress: Callable[[int, int], None] = lambda n_bytes, size_bytes: None

    def of_content(self, size_bytes: int) -> tuple[int, str]:
        """How many bytes a file of some size may hold, and that limit in words."""
        by_ratio = max(self.unpacked_ratio * size_bytes, _RATIO_FROM_BYTES)
        if by_ratio < self.unpacked_bytes:
            return by_ratio, f"more than {self.unpacked_ratio} times its own size"
        return self.unpacked_bytes, f"more than {text.n_bytes(self.unpacked_bytes)}"

    def refuse_bytes(self, n_bytes: int, size_bytes: int) -> None:
        """Raise TooLargeError where so many bytes of content are too many for a file of some size."""
        most, words = self.of_content(size_bytes)
        if n_bytes > most:
            raise TooLargeError(f"holds {words}, the most that is unpacked here; {_INSTEAD}")

    def clock(self) -> Callable[[], None]:
        """A function that raises TooLargeError when the time for one file, from now on, is over."""
        end = time.monotonic() + self.seconds

        def refuse_late() -> None:
            if time.monotonic() > end:
                raise TooLargeError(f"takes more than {text.count(self.seconds)} s to read, the most here; {_INSTEAD}")

        return refuse_late

    def refuse_events(self, n_events: int) -> None:
        """Raise TooLargeError where there are too many events or rows."""
        if n_events > self.n_events:
            raise TooLargeError(f"holds more than {text.count(self.n_events)} events, the most read here; {_INSTEAD}")


def limits_from(environment: Mapping[str, str]) -> Limits:
    """The limits that environment variables (VARIABLES) set, in whole numbers; defaults where they are not set."""
    plain = Limits()
    fields = {name: _whole_number(environment, variable, getattr(plain, name)) for variable, name in VARIABLES.items()}
    return replace(plain, **fields)  # type: ignore[arg-type]


def n_reads_from(environment: Mapping[str, str]) -> int:
    """How many traces a server reads at the same time."""
    return _whole_number(environment, "PERFMODEL_MAX_READS", 2)


def _whole_number(environment: Mapping[str, str], variable: str, default: int) -> int:
    """The number above 0 in an environment variable, a default where it is not set; raises InputError for others."""
    words = environment.get(variable) or str(default)
    if not words.isdecimal() or int(words) == 0:
        raise InputError(f"the environment variable {variable} is {words!r}, expected a whole number above 0")
    return int(words)
