"""The dashboard as a whole, without a browser: views open, are reachable, show no foreign word as Markdown."""

import ast
import tomllib

import pytest

from tests.app_pages import VIEWS, opened, titles
from tests.conftest import ROOT

APP = ROOT / "app"

# Streamlit renders Markdown in the first argument of these, so that views give it constant words only.
INTERPRETED = (
    *("markdown", "write", "caption", "title", "header", "subheader", "error", "warning", "info", "success", "toast"),
    *("metric", "tabs", "expander", "button", "checkbox", "toggle", "radio", "selectbox", "multiselect", "slider"),
    *("select_slider", "text_input", "number_input", "text_area", "file_uploader", "download_button", "popover"),
    *("spinner", "status", "progress", "segmented_control", "pills", "table", "latex", "badge", "link_button"),
)


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_opens_with_something_to_look_at(view: str) -> None:
    assert titles(opened(view))


def test_every_view_is_reachable_from_the_navigation() -> None:
    source = (APP / "main.py").read_text()
    for view in VIEWS:
        assert f"views/{view}.py" in source


def is_constant(node: ast.expr) -> bool:
    """Whether an expression is words of the project alone."""
    if isinstance(node, ast.List | ast.Tuple):
        return all(is_constant(each) for each in node.elts)
    if isinstance(node, ast.IfExp):
        return is_constant(node.body) and is_constant(node.orelse)
    return isinstance(node, ast.Constant)


@pytest.mark.parametrize("path", sorted(APP.rglob("*.py")), ids=lambda path: path.stem)
def test_words_that_may_come_from_a_file_are_never_interpreted(path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        assert not any((key.arg or "").startswith("unsafe_allow") for key in node.keywords), path.name
        assert node.func.attr not in ("html", "iframe"), path.name
        if path.name == "frame.py" or node.func.attr not in INTERPRETED or not node.args:
            continue
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id not in ("st",):
            continue  # a function of ours with such a name
        assert is_constant(node.args[0]), f"{path.name}:{node.lineno} gives {node.func.attr} words that may be foreign"


def test_telemetry_is_off_and_the_server_stays_on_loopback() -> None:
    config = tomllib.loads((APP / ".streamlit" / "config.toml").read_text())
    assert config["browser"]["gatherUsageStats"] is False
    assert config["server"]["address"] == "127.0.0.1"
    assert config["client"]["showErrorDetails"] == "type"
