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

from perfmodel import figures, text

MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#+\-.!|~$:&^=@/'\"])")
N_ROWS = 500  # of a table that is shown; downloads have all
NOT_KNOWN = "n/a"
NUMBER = r"^(?:[-+]?[\d,]*\.?\d+(?: ?[^\d.,;]{1,9})?|-|n/a)$"  # with a unit, or what stands for none
MOSTLY = 0.7  # of the cells of a column that are numbers, from where on it stands on the right
INK = "#545969"  # of words in figures on white
UNITS = {  # ends of a column's name: what its head says instead, how its numbers are shown
    "_bytes_per_s": (" rate, B/s", "compact"),
    "bytes_per_s": ("rate, B/s", "compact"),
    "bytes": ("bytes", "bytes"),
    "_ns": (", µs", "localized"),
    "_frac": (" share", "percent"),
}


def header(title: str, question: str) -> None:
    """The head of a view: its title and the question it answers, in words of the project."""
    st.title(title, anchor=False)
    st.caption(question)


def literal(words: object) -> None:
    """Show words that may come from a file exactly as they are: no Markdown, no HTML."""
    st.text(str(words))


def escaped(words: object) -> str:
    """Words in which Markdown finds nothing to interpret, for the few places that take no other."""
    return MARKDOWN.sub(r"\\\1", str(words))


def numbers(values: Mapping[str, str | None], helps: Mapping[str, str] | None = None) -> None:
    """The numbers that matter, side by side: label, value in words; None is shown as not known."""
    with st.container(horizontal=True, gap="medium"):  # numbers that have no room go to the next line, whole
        for label, value in values.items():
            words = escaped(NOT_KNOWN if value is None else value)
            st.metric(escaped(label), words, help=(helps or {}).get(label), width="content")


def chart(figure: Any, alt: str, key: str | None = None, **more: Any) -> Any:
    """Show a figure of `perfmodel.figures` at full width, with words for those who cannot see it; `more` is for
    `st.plotly_chart`, of which the answer is given back."""
    if st.context.theme.type == "light":  # the grey that Streamlit gives to ticks has too little contrast on white
        figure = figures.inked(figure, INK)
    return st.plotly_chart(figure, width="stretch", alt=alt, key=key, config={"displaylogo": False}, **more)


def rows(table: pl.DataFrame, alt: str, height: int | None = None) -> None:
    """Show the first rows of a table with words for those who cannot see it: columns that are known of no row are left
    out, heads are words with a unit, times are microseconds. Downloads have all columns as they are."""
    shown = table.head(N_ROWS).with_columns(pl.col(pl.Categorical, pl.Enum).cast(pl.String))
    shown = shown.select(column for column in shown if not shown.height or column.null_count() < shown.height)
    times = [name for name in shown.columns if name.endswith("_ns") and shown[name].dtype.is_numeric()]
    st.dataframe(
        shown.with_columns(pl.col(times) / 1000),
        width="stretch",
        height="auto" if height is None else height,
        hide_index=True,
        alt=alt,
        placeholder="-",
        column_config={column.name: _column(column) for column in shown},
    )
    if table.height > N_ROWS:
        literal(f"{text.count(N_ROWS)} of {text.count(table.height)} rows are shown; the download has all.")


def words_table(header_words: Sequence[str], body: Sequence[Sequence[str]], alt: str) -> None:
    """Show a small table of words, such as numbers with units."""
    table = pl.DataFrame(list(body), schema=dict.fromkeys(header_words, pl.String), orient="row")
    numeric = [column.name for column in table if column.str.contains(NUMBER).sum() > MOSTLY * column.len()]
    right = {name: st.column_config.TextColumn(alignment="right") for name in numeric}
    st.dataframe(table, width="stretch", hide_index=True, alt=alt, column_config=right)


def _column(column: pl.Series) -> Any:
    """How a column of a table is shown, by the unit in its name."""
    words, unit, form = column.name.removeprefix("n_"), "", "localized"
    if not column.dtype.is_numeric():
        return st.column_config.Column(words.replace("_", " "))
    for suffix, (said, shape) in UNITS.items():
        if column.name.endswith(suffix):
            words, unit, form = words.removesuffix(suffix), said, shape
            break
    return st.column_config.NumberColumn(
        words.replace("_", " ").replace("tklqt", "TKLQT").replace("gpu", "GPU") + unit, format=form
    )


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
