"""Take the pictures of the dashboard that the documents show: `python docs/screenshots.py [VIEW ...]` (playwright,
Chromium), each view at 1280 x 800, light and dark, into docs/pictures."""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.served import ARGUMENTS, served  # noqa: E402

VIEWS = ("overview", "trace", "roofline", "accuracy", "placement", "schedules", "regression")
THEMES = ("light", "dark")


def main(folder: Path, views: list[str]) -> None:
    """Write one PNG for each view and theme into the folder."""
    folder.mkdir(exist_ok=True)
    with served() as url, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        for theme in THEMES:
            page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=theme)
            for view in views:
                page.goto(f"{url}/{'' if view == 'overview' else view}")
                page.wait_for_selector(".js-plotly-plot .main-svg", timeout=120_000)
                page.wait_for_selector("[data-testid=stStatusWidget]", state="detached", timeout=120_000)
                page.wait_for_timeout(1500)  # figures are drawn after the page
                page.screenshot(path=folder / f"{view}-{theme}.png")
        browser.close()


if __name__ == "__main__":
    main(ROOT / "docs" / "pictures", sys.argv[1:] or list(VIEWS))
