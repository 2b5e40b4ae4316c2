"""Reports that commands write as one HTML file, with figures."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from perfmodel.cli.shell import expect_file, note
from perfmodel.errors import MissingExtraError
from perfmodel.files import write_whole

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

    write_whole(path, html_page(title, words, draw()).encode())
    note(f"wrote {path}")
