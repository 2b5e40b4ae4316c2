"""What all commands share: the application, its common options, reading what was asked for, printing, numbers."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from perfmodel import __version__, report, text
from perfmodel.errors import InputError
from perfmodel.files import write_whole
from perfmodel.readers import is_folder_of_ranks, read_trace
from perfmodel.readers.folder import read_ranks
from perfmodel.trace import Trace
from perfmodel.workers import PROCESSES

HELP_NAMES = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=HELP_NAMES,
    help="Trace analysis and roofline performance models for MoE models whose experts do not all fit on the GPU.",
)

LONG_READ_BYTES = 20 * 2**20  # reading more than this takes seconds
LONG_READ_NS = 3 * text.NS_PER_S  # who waited longer may want a cache

whole, number, fraction = text.whole, text.number, text.fraction  # from the words of an option

WRITES_FAILED = 2  # what ends with 0 otherwise, where a report that was asked for could not be written

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Top = Annotated[
    str | None, typer.Option(help=f"Rows of each table; {report.N_TOP} in text and all in JSON unless given.")
]
Cache = Annotated[
    str | None,
    typer.Option("--cache", help="Keep what was read, `beside` the file or in this folder, and read that next time."),
]
TracePath = Annotated[str, typer.Argument(help="PyTorch-profiler .json(.gz) or Nsight Systems .sqlite")]


def _version(wanted: bool) -> None:
    if wanted:
        print_words(f"perfmodel {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def expect_file(option: str, path: str | None, suffix: str) -> None:
    """Refuse a report that cannot be written before anything is computed; nothing where `path` is None."""
    if path is not None and not (path.endswith(suffix) and Path(path).parent.is_dir() and not Path(path).is_dir()):
        article = "an" if suffix == ".html" else "a"
        raise InputError(f"{option} is {path!r}, expected {article} {suffix} file in a folder that exists")


def group(name: str, words: str) -> typer.Typer:
    """Commands that share a first word."""
    found = typer.Typer(no_args_is_help=True, rich_markup_mode=None, context_settings=HELP_NAMES, help=words)
    app.add_typer(found, name=name)
    return found


def write_and_exit(code: int, writes: Iterable[Callable[[], None]]) -> NoReturn:
    """Write all reports and end with the code of the verdict, or where that is 0 with WRITES_FAILED if one failed."""
    all_written = all([_is_written(write) for write in writes])
    raise typer.Exit(code or (0 if all_written else WRITES_FAILED))


def _is_written(write: Callable[[], None]) -> bool:
    """Whether a report could be written; why not is said, and takes neither the verdict nor the other reports along."""
    try:
        write()
    except InputError as error:
        note(f"perfmodel: {error}")
        return False
    return True


def write_report(path: str | None, words: Callable[[], str]) -> None:
    """Write a report and say so; nothing where `path` is None."""
    if path is not None:
        write_whole(path, words().encode())
        note(f"wrote {path}")


def print_words(words: str) -> None:
    """Print what a command found, on stdout; whoever reads it may leave, which changes no exit code."""
    try:
        sys.stdout.write(text.for_logs(words) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: Any) -> None:
    """Print what a command found, as JSON."""
    print_json_words(json.dumps(value, indent=2, allow_nan=False))


def print_json_words(words: str) -> None:
    """Print JSON; what a build server would take for a command to it is written in another way, and means the same."""
    print_words(words.replace("##", "#\\u0023"))


def note(words: str) -> None:
    """Say what goes on, on stderr."""
    sys.stderr.write(text.for_logs(words) + "\n")


def read(
    path: str,
    cache: str | None = None,
    backend: str = PROCESSES,
    n_workers: int | None = None,
    scheduler: str | None = None,
) -> Trace:
    """The trace in a file or a folder of ranks; a person who watches is told that a large one is being read, and of the
    cache after a long time without one."""
    began_ns = time.monotonic_ns()
    trace = _read(path, cache, backend, n_workers, scheduler)
    hint_at_cache(time.monotonic_ns() - began_ns, cache)
    return trace


def hint_at_cache(waited_ns: int, cache: str | None) -> None:
    """Tell a person who watched a long reading without a cache that the next one need not take so long."""
    if cache is None and waited_ns > LONG_READ_NS and sys.stderr.isatty():
        note(f"reading took {text.ns(waited_ns)}; with `--cache beside` the next time takes a moment")


def _read(path: str, cache: str | None, backend: str, n_workers: int | None, scheduler: str | None) -> Trace:
    try:
        if is_folder_of_ranks(Path(path)):
            return read_ranks(path, cache, backend, n_workers, scheduler, progress)
        if Path(path).is_file() and Path(path).stat().st_size > LONG_READ_BYTES:
            progress(f"reading {Path(path).name} ({text.n_bytes(Path(path).stat().st_size)}) ...")
        return read_trace(path, cache)
    finally:
        progress("")


def progress(words: str) -> None:
    """Show a person who watches how far reading is, on one line that the next words, or none, replace."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{words[: shutil.get_terminal_size().columns - 1]}")
        sys.stderr.flush()


def width() -> int:
    """The columns of the terminal, or those of a page that goes elsewhere."""
    return max(shutil.get_terminal_size().columns, 60) if sys.stdout.isatty() else report.WIDTH
