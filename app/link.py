"""What a link asks for that is not here, such as a trace that its sender had uploaded: said, not passed over."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import frame
import streamlit as st

_RUN = "run of a link"  # where to say it in this run, and what the link asked for
_PASSED = "passed over"  # by key: what the link asked for, and what was shown in its place


@contextmanager
def honoured() -> Iterator[None]:
    """Above a view that runs in this block: what its link asks for and is not here, until that control is changed."""
    is_first = _PASSED not in st.session_state
    asked = {key: st.query_params.get_all(key) for key in st.query_params} if is_first else {}
    st.session_state.setdefault(_PASSED, {})
    st.session_state[_RUN] = st.empty(), asked
    yield
    _say()


def end() -> NoReturn:
    """End a view before its end: `st.stop` lets nothing more be shown."""
    _say()
    st.stop()


def _say() -> None:
    state = st.session_state
    if _RUN not in state:
        return
    (box, asked), passed = state.pop(_RUN), state[_PASSED]
    # Streamlit takes from the address what no control takes, and also what is a control's default.
    gone = [key for key, words in asked.items() if key in state and st.query_params.get_all(key) != words]
    passed |= {key: (asked[key], state[key]) for key in gone if not _is(asked[key], state[key])}
    left = [f"{key}: {', '.join(words)}" for key, (words, value) in passed.items() if state.get(key) == value]
    if left:
        with box.container():
            frame.refused("This link asks for what is not here; something else is shown instead:", "\n".join(left))
            st.caption("What was uploaded is in no link.")


def _is(words: list[str], value: Any) -> bool:
    """Whether words of a link are the value of a control, numbers by what they are."""
    try:
        return words == [value] or [float(word) for word in words] == [value]
    except ValueError:
        return words == [str(value)] or words == [str(value).lower()]
