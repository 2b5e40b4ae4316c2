"""Files that are written whole or not at all, and JSON that is read or refused in one sentence."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from perfmodel.errors import InputError

PART = ".part"  # ends the name of what is being written


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all, beside and then renamed; raises InputError where it cannot be written."""
    path = Path(path)
    beside = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise InputError(f"{path.name} cannot be written: {error.strerror or error}") from None
    finally:  # an interrupt, too, leaves nothing half-written
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def read_json(path: Path, what: str) -> Any:
    """What a JSON file holds; raises InputError where there is none, `what` saying of which kind, or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no {what} file {str(path)!r}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path.name} is not a JSON file: {error}") from None
