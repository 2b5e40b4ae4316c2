"""Running the command line: what a person sees when something goes wrong, and the exit codes."""

import os
import sys
import traceback
from typing import NoReturn

import typer

from perfmodel.cli import traces  # noqa: F401  its commands join the application, before those of models

# isort: split
from perfmodel.cli import models  # noqa: F401
from perfmodel.cli.shell import app, note
from perfmodel.errors import InputError

EXIT_BUG = 70  # none of the documented codes: a defect of ours must not read as "slower"


def main() -> NoReturn:
    """Run the command line; a user's mistake becomes one sentence on stderr and an exit code, never a traceback."""
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except InputError as error:
        note(f"perfmodel: {error}")
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has left
        sys.exit(0)
    except OSError as error:
        note(f"perfmodel: {error.strerror or error}")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        note("perfmodel: interrupted")
        sys.exit(130)
    except Exception as error:
        sys.exit(_usage_error(error))
    sys.exit(code if isinstance(code, int) else 0)


def _usage_error(error: Exception) -> int:
    """Say what is wrong with the words of a command, as typer found it; anything else is a bug and shows its trace."""
    if not hasattr(error, "format_message"):
        traceback.print_exception(error)
        return EXIT_BUG
    message = " ".join(error.format_message().split())
    if type(error).__name__ == "NoArgsIsHelpError":
        note(error.format_message())
    else:
        note(f"perfmodel: {message}")
    return 2
