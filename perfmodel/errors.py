"""The one family of errors a user can cause; shells print the sentence and exit with `exit_code`, never a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what was found and what was expected."""

    exit_code = 2


class NotComparableError(InputError):
    """Two measurements differ in something that forbids comparing them."""

    exit_code = 3


class TooLargeError(InputError):
    """A file takes more to read than the limits that were set allow (`readers.limits`)."""


class MissingExtraError(InputError):
    """A command needs an optional package that is not installed; the message names the install command."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """The first line of what an error says, for a sentence; the name of its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def about(path: str | Path) -> Iterator[None]:
    """Which file is an error about: its path stands before what is said inside, and an OSError becomes an InputError.

    Use it once around a file or folder, where users name it, so that no path is said twice.
    """
    try:
        yield
    except InputError as error:
        raise type(error)(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
