"""The one family of errors a user can cause; shells print the sentence and exit with `exit_code`, never a traceback."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what was found and what was expected."""

    exit_code = 2


class NotComparableError(InputError):
    """Two measurements differ in something that forbids comparing them."""

    exit_code = 3


class MissingExtraError(InputError):
    """A command needs an optional package that is not installed; the message names the install command."""

    exit_code = 3
