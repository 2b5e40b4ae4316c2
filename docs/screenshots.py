"""Take the pictures of the dashboard that the documents show: `python docs/screenshots.py` (playwright, Chromium).

Each view at 1280 x 800 in the light theme; the first page is the README's picture.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.served import ARGUMENTS, served  # noqa: E402

VIEWS = {"": "dashboard", "offload": "offload"}


def main(folder: Path) -> None:
    """Write one PNG per view into the folder."""
    with served() as url, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        for path, name in VIEWS.items():
            page.goto(f"{url}/{path}")
            page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 2", timeout=60_000)
            page.wait_for_timeout(1500)
            page.screenshot(path=folder / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main(ROOT / "docs")
