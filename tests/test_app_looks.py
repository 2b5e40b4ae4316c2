"""How the dashboard reads: contrast of its colours, alternatives in words for its charts, heads and ticks in words."""

import ast
import re
import tomllib

import polars as pl
import pytest

pytest.importorskip("plotly", reason="plotly is not installed")

import plotly.graph_objects as go

from perfmodel import figures
from perfmodel.figures.drawing import PALETTE, RATE_DECADES, time_ticks
from tests.app_pages import on_path, testing
from tests.conftest import ROOT

APP = ROOT / "app"
WHITE, CAPTION_OPACITY = "#FFFFFF", 0.6  # Streamlit's light background, and how it fades captions
READABLE, OF_CONTROLS = 4.5, 3.0  # least contrast of text and of controls, WCAG 2.1 criteria 1.4.3 and 1.4.11
THEME = tomllib.loads((APP / ".streamlit" / "config.toml").read_text())["theme"]


def channels(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def contrast(front: str, behind: str, opacity: float = 1.0) -> float:
    """The contrast ratio of WCAG 2.1 between two colours, the first faded over the second."""
    mixed = [opacity * a + (1 - opacity) * b for a, b in zip(channels(front), channels(behind), strict=True)]
    bright, dark = sorted((luminance(mixed), luminance(channels(behind))), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def luminance(rgb: list[float]) -> float:
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", WHITE) == pytest.approx(21)
    assert contrast("#777777", WHITE) == pytest.approx(4.48, abs=0.01)


def test_text_can_be_read_in_the_light_theme() -> None:
    with on_path():
        import frame
    light = THEME["light"]
    assert contrast(light["textColor"], WHITE, CAPTION_OPACITY) >= READABLE
    assert contrast(light["primaryColor"], WHITE) >= READABLE
    assert contrast(frame.INK, WHITE) >= READABLE


def test_what_is_chosen_can_be_told_in_the_dark_theme() -> None:
    dark = THEME["dark"]
    assert contrast(dark["primaryColor"], dark["backgroundColor"]) >= READABLE
    assert contrast(WHITE, dark["primaryColor"]) >= OF_CONTROLS  # words of what was chosen in a box
    # Lines and bars of the palette, from the one that is drawn most:
    assert contrast(PALETTE[0], dark["backgroundColor"]) >= OF_CONTROLS


@pytest.mark.parametrize("path", sorted(APP.rglob("*.py")), ids=lambda path: path.stem)
def test_every_chart_and_table_says_in_words_what_it_shows(path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            names = {key.arg for key in node.keywords}
            if owner == "st" and node.func.attr in ("plotly_chart", "dataframe"):
                assert "alt" in names, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", sorted((ROOT / "perfmodel" / "figures").glob("*.py")), ids=lambda path: path.stem)
def test_no_figure_has_words_or_lines_in_the_colour_of_a_background(path) -> None:
    source = path.read_text()
    assert not re.search(r"""["'](?:black|#000(?:000)?)["']""", source)
    for line in source.splitlines():
        if re.search(r"""["'](?:white|#fff(?:fff)?)["']""", line, re.IGNORECASE):
            assert "fgcolor" in line or "insidetextfont" in line, line  # on a bar, whatever the theme


@pytest.mark.browser
@pytest.mark.parametrize(("view", "name"), [("", "Overview"), ("trace", "Trace"), ("placement", "Placement")])
def test_a_page_has_a_title_one_first_heading_and_names_for_all_controls(page, server, view: str, name: str) -> None:
    page.goto(f"{server}/{view}")
    page.locator(".js-plotly-plot .main-svg").first.wait_for(timeout=60_000)
    assert page.title() == f"{name} - perfmodel"
    assert page.locator("h1").count() == 1
    assert page.evaluate("document.documentElement.lang") == "en"
    unnamed = """[...document.querySelectorAll("button, input, textarea, [role=slider]")].filter(one =>
        one.checkVisibility({visibilityProperty: true}) && !one.closest("details:not([open])")
        && !one.innerText?.trim() && !one.labels?.length && !one.closest("label")
        && !["aria-label", "aria-labelledby", "title"].some(name => one.getAttribute(name)))
        .map(one => one.outerHTML)"""
    assert page.evaluate(unnamed) == []


def test_heads_of_a_table_are_words_with_units_and_what_no_row_knows_is_left_out() -> None:
    def script() -> None:
        import frame
        import polars as pl

        table = {"n_kernels": [2, 3], "time_ns": [1500, 2500], "idle_frac": [0.5, None], "rank": [None, None]}
        frame.rows(pl.DataFrame(table), "A table")

    with on_path():
        test = testing.AppTest.from_function(script).run()
    assert not test.exception
    [shown] = test.dataframe
    assert list(shown.value.columns) == ["n_kernels", "time_ns", "idle_frac"]
    assert shown.value["time_ns"].to_list() == [1.5, 2.5]
    columns = shown.proto.columns
    assert [word in columns for word in ('"kernels"', "time, \\u00b5s", "idle share")] == [True] * 3


def test_numbers_stand_below_each_other_on_the_right_and_words_on_the_left() -> None:
    def script() -> None:
        import frame

        frame.words_table(("name", "time", "version"), [("a", "1.50 ms", "6.1.2-a"), ("b", "n/a", "7")], "A table")

    with on_path():
        test = testing.AppTest.from_function(script).run()
    columns = test.dataframe[0].proto.columns
    assert '"time"' in columns and "right" in columns
    assert '"name"' not in columns and '"version"' not in columns


@pytest.mark.parametrize(("top_ns", "words"), [(2.28e6, ["0", "500 µs", "1 ms", "1.5 ms", "2 ms"]), (0.0, ["0"])])
def test_ticks_of_times_are_round(top_ns: float, words: list[str]) -> None:
    axis = go.layout.XAxis()
    time_ticks(axis, top_ns)
    assert list(axis.ticktext) == words
    assert all(not re.search(r"\.0", word) for _, word in RATE_DECADES)


def test_a_figure_keeps_its_own_colours_when_its_copy_is_inked() -> None:
    figure = figures.shares(pl.DataFrame({"name": ["a"], "time_ns": [1]}), "name", "time_ns", "Shares")
    inked = figures.inked(figure, "#123456")
    assert inked.layout.yaxis.tickfont.color == "#123456" and figure.layout.yaxis.tickfont.color is None
    assert inked.layout.title.text == "Shares" and inked.data == figure.data
