"""Reports that commands write into files beside what they print."""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import typer

from perfmodel.cli.shell import expect_file, note
from perfmodel.errors import InputError, MissingExtraError
from perfmodel.files import write_whole

Html = Annotated[
    str | None, typer.Option("--html", help="Write a report with figures to this .html file, which works offline.")
]


WRITES_FAILED = 2  # what ends with 0 otherwise, where a report that was asked for could not be written


def write_file(path: str | None, words: Callable[[], str]) -> None:
    """Write a report, and say so; nothing where `path` is None."""
    if path is not None:
        write_whole(path, words().encode())
        note(f"wrote {path}")


def all_written(writes: Iterable[Callable[[], None]]) -> bool:
    """Whether all reports could be written; why one could not is said, and takes neither the verdict nor the other
    reports along."""
    failed = False
    for write in writes:
        try:
            write()
        except InputError as error:
            note(f"perfmodel: {error}")
            failed = True
    return not failed


def check_html(path: str | None) -> None:
    """Refuse a report that cannot be written before anything is computed."""
    if path is None:
        return
    expect_file("--html", path, ".html")
    if importlib.util.find_spec("plotly") is None:
        raise MissingExtraError(
            'a report with figures needs plotly, which is not installed: pip install "perfmodel[figures]"'
        )


def write_html(path: str | None, title: str, words: str, draw: Callable[[], Sequence[tuple[Any, str]]]) -> None:
    """Write a report: the words of the command's page, and what `draw` gives, figures each with what it shows.

    Nothing where `path` is None.
    """
    if path is None:
        return
    from perfmodel.figures import html_page

    write_file(path, lambda: html_page(title, words, draw()))
