"""Reports that commands write into files beside what they print."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from perfmodel.cli.shell import expect_file, write_report
from perfmodel.errors import MissingExtraError

Html = Annotated[
    str | None, typer.Option("--html", help="Write a report with figures to this .html file, which works offline.")
]


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

    write_report(path, lambda: html_page(title, words, draw()))
