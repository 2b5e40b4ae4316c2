"""A report is one file: it draws offline, asks nobody for anything, and shows names letter by letter."""

from pathlib import Path

import pytest

pytest.importorskip("plotly", reason="plotly is not installed")

from perfmodel import figures
from perfmodel.cli.drawing import check_html, write_html
from perfmodel.errors import InputError
from perfmodel.hardware import hardware
from perfmodel.roofline import roofline
from tests.served import until

HOSTILE = "<script>window.__pwned=1</script><img src=http://192.0.2.1/x.png onerror='window.__pwned=1'>"


def written(folder: Path) -> Path:
    path = folder / "report.html"
    figure = figures.roofline(roofline(hardware("gh200"), "bf16")).update_layout(
        title={"text": figures.literal(HOSTILE)}
    )
    write_html(str(path), HOSTILE, f"a table\n{HOSTILE}", lambda: [(figure, HOSTILE), (figure, "the same again")])
    return path


def test_names_are_letters_and_the_drawing_code_is_there_once(tmp_path: Path) -> None:
    page = written(tmp_path).read_text()
    assert HOSTILE not in page and "<img src=http" not in page
    assert "&lt;script&gt;window.__pwned" in page
    assert page.count("plotly.js v") == 1


def test_nothing_is_computed_for_a_report_that_nobody_asked_for() -> None:
    write_html(None, "t", "w", lambda: pytest.fail("figures were drawn"))


def test_a_report_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    check_html(None)
    with pytest.raises(InputError, match=r"expected an \.html file in a folder that exists"):
        check_html(str(tmp_path / "none" / "x.html"))
    with pytest.raises(InputError, match=r"--html is 'x\.png'"):
        check_html("x.png")


@pytest.mark.browser
def test_a_report_draws_its_figures_offline_and_runs_no_script_of_a_name(browser, tmp_path: Path) -> None:
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(written(tmp_path).as_uri())
    until(page, "document.querySelectorAll('.js-plotly-plot .main-svg').length >= 2")
    assert page.evaluate("window.__pwned") is None
    assert page.get_by_role("heading", name="script").inner_text() == HOSTILE
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    page.close()
