"""Running the command line: what a person sees when something goes wrong, and the exit codes."""

import codecs
import io
import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import typer

from perfmodel.cli import traces  # noqa: F401  its commands join the application, before those of models

# isort: split
from perfmodel.cli import layers  # noqa: F401

# isort: split
from perfmodel.cli import latency  # noqa: F401

# isort: split
from perfmodel.cli import adapting  # noqa: F401

# isort: split
from perfmodel.cli import checking  # noqa: F401

# isort: split
from perfmodel.cli import models  # noqa: F401

# isort: split
from perfmodel.cli import captures  # noqa: F401

# isort: split
from perfmodel.cli import baselines  # noqa: F401

# isort: split
from perfmodel.cli import routing  # noqa: F401

# isort: split
from perfmodel.cli import placing  # noqa: F401

# isort: split
from perfmodel.cli import trimoe  # noqa: F401

# isort: split
from perfmodel.cli import balance  # noqa: F401

# isort: split
from perfmodel.cli import schedule  # noqa: F401

# isort: split
from perfmodel.cli import phases  # noqa: F401

# isort: split
from perfmodel.cli import roofline  # noqa: F401
from perfmodel.cli.shell import app, note
from perfmodel.errors import InputError
from perfmodel.report.words import BARS

_IN_ASCII = {"µ": "u", "…": "~"} | dict(zip(BARS, "_.:-=+*#", strict=True))
EXIT_BUG = 70  # none of the documented codes: a defect of ours must not read as "slower"


def main() -> NoReturn:
    """Run the command line; a user's mistake becomes one sentence on stderr and an exit code, never a traceback."""
    _make_printable()
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except InputError as error:
        note(f"perfmodel: {' '.join(str(error).splitlines())}")
        sys.exit(error.exit_code)
    except SystemExit as end:
        # Typer ends with 1, which reads as "slower", where whoever read its help has left.
        sys.exit(0 if isinstance(end.__context__, BrokenPipeError) else end.code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        note(f"perfmodel: {where}{error.strerror or error}")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        note("perfmodel: interrupted")
        sys.exit(130)
    except Exception as error:
        sys.exit(_usage_error(error))
    sys.exit(code if isinstance(code, int) else 0)


def _make_printable() -> None:
    """Let every character be written: where a terminal knows few, one stands for another, so that columns stay columns.

    A stream that was closed before we began swallows what is written to it.
    """
    codecs.register_error("perfmodel", _substitute)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  used until the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="perfmodel")


def _substitute(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_IN_ASCII.get(c, "?") for c in error.object[error.start : error.end]), error.end


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
