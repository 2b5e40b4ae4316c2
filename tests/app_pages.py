"""Views of the dashboard run without a browser, and what they show."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.conftest import ROOT

testing = pytest.importorskip("streamlit.testing.v1", reason="streamlit is not installed")

VIEWS = sorted(path.stem for path in (ROOT / "app" / "views").glob("*.py"))


@contextmanager
def on_path() -> Iterator[None]:
    """`streamlit run` puts the script's folder on the path; AppTest does not."""
    sys.path.insert(0, str(ROOT / "app"))
    try:
        yield
    finally:
        sys.path.remove(str(ROOT / "app"))


def opened(view: str, **query: str) -> Any:
    """A view as it opens, with the state that a link holds; fails on an exception."""
    # The first view links to others, which only the entry script knows.
    script = "main" if view == "overview" else f"views/{view}"
    test = testing.AppTest.from_file(str(ROOT / "app" / f"{script}.py"), default_timeout=120)
    for key, value in query.items():
        test.query_params[key] = value
    return ran(test)


def ran(test: Any) -> Any:
    """The view after another run of its script."""
    with on_path():
        test.run()
    assert not test.exception, test.exception
    return test


def figure(test: Any, index: int) -> dict[str, Any]:
    """The figure that a view shows as its `index`th, as Plotly gets it."""
    return dict(json.loads(test.get("plotly_chart")[index].proto.spec))


def titles(test: Any) -> list[str]:
    """The titles of all figures of a view, in order."""
    return [figure(test, i)["layout"]["title"]["text"] for i in range(len(test.get("plotly_chart")))]


def numbers(test: Any) -> dict[str, str]:
    """The numbers of a view by label, without the escapes that keep Markdown out of them."""
    return {metric.label.replace("\\", ""): metric.value.replace("\\", "") for metric in test.metric}


def shown(test: Any) -> str:
    """All words that a view shows letter by letter: text, code."""
    return "\n".join(element.value for kind in (test.text, test.code) for element in kind)
