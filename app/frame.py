"""What views are made of, and the only place that shows words which are not the project's own.

Streamlit interprets Markdown in most of what it shows: views give constant words to it, and everything else (names from
files, numbers with units) to these functions, which show it letter by letter. A test holds views to that.
"""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polars as pl
import streamlit as st

from perfmodel import text

MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~$:&^=@/'\"])")
N_ROWS = 500  # of a table that is shown; downloads have all
NOT_KNOWN = "n/a"


def header(title: str, question: str) -> None:
    """The head of a view: its title and the question it answers, in words of the project."""
    st.header(title, anchor=False)
    st.caption(question)


def literal(words: object) -> None:
    """Show words that may come from a file exactly as they are: no Markdown, no HTML."""
    st.text(str(words))


def escaped(words: object) -> str:
    """Words in which Markdown finds nothing to interpret, for the few places that take no other."""
    return MARKDOWN.sub(r"\\\1", str(words))


def numbers(values: Mapping[str, str | None], helps: Mapping[str, str] | None = None) -> None:
    """The numbers that matter, side by side: label, value in words; None is shown as not known."""
    for column, (label, value) in zip(st.columns(len(values)), values.items(), strict=True):
        column.metric(escaped(label), escaped(NOT_KNOWN if value is None else value), help=(helps or {}).get(label))


def chart(figure: Any, alt: str, key: str | None = None, **more: Any) -> Any:
    """Show a figure of `perfmodel.figures` at full width, with words for those who cannot see it; `more` is for
    `st.plotly_chart`, of which the answer is given back."""
    return st.plotly_chart(figure, width="stretch", alt=alt, key=key, config={"displaylogo": False}, **more)


def rows(table: pl.DataFrame, alt: str, height: int | None = None) -> None:
    """Show the first rows of a table, its columns as they are, with words for those who cannot see it."""
    shown = table.head(N_ROWS).with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))
    st.dataframe(shown, width="stretch", height="auto" if height is None else height, hide_index=True, alt=alt)
    if table.height > N_ROWS:
        literal(f"{text.count(N_ROWS)} of {text.count(table.height)} rows are shown; the download has all.")


def words_table(header_words: Sequence[str], body: Sequence[Sequence[str]], alt: str) -> None:
    """Show a small table of words, such as numbers with units."""
    table = pl.DataFrame(list(body), schema=dict.fromkeys(header_words, pl.String), orient="row")
    st.dataframe(table, width="stretch", hide_index=True, alt=alt)


def refused(what: str, error: object) -> None:
    """Say that something the user gave cannot be used, and why, without ending the page."""
    st.error(escaped(what))
    literal(error)


def computed(command: Sequence[object], words: str = "") -> None:
    """The box that says how a view's numbers were computed: the command that gives the same, and its page."""
    with st.expander("How this was computed"):
        st.caption("The same numbers on the command line:")
        st.code(shlex.join(str(word) for word in command), language=None)
        if words:
            st.code(words, language=None)


def downloads(name: str, **contents: bytes | str | Callable[[], bytes | str]) -> None:
    """Buttons to download what a view shows, by suffix: `csv`, `json`, `html` ...; functions are called on a click."""
    with st.container(horizontal=True):
        for suffix, content in contents.items():
            st.download_button(
                f"Download {suffix.upper()}",
                content,
                f"{name}.{suffix}",
                key=f"download-{name}-{suffix}",
                on_click="ignore",
                icon=":material/download:",
            )
