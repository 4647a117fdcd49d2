"""The pictures of the dashboard in README and docs: `python -m tests.page.screenshots`.

Three servers of the demo are asked for a while, and experts begin to move; then pictures are taken
of the page, in a wide window and on a phone.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

from playwright.sync_api import expect

from tests.checks import three_servers
from tests.page.browser import MOVING, PATIENCE_MS, asked, chromium, opened, settle

DOCS = pathlib.Path(__file__).parents[2] / "docs"
#: Seconds of work before the pictures are taken.
WORK_S = 25.0
#: Seconds of a migration before they are taken: part of the experts has moved.
MOVING_S = 10.0


def main() -> int:
    """Write the pictures."""
    with (
        tempfile.TemporaryDirectory() as folder,
        three_servers(pathlib.Path(folder), *MOVING) as (_, port),
        chromium() as browser,
    ):
        with opened(browser, port, 1400, "dark") as (page, _), asked(port):
            settle(WORK_S)
            page.click("#token-record")
            page.check("#decide-force")
            page.click("#decide-now")
            began = expect(page.locator("#events"))
            began.to_contain_text("begin to migrate", timeout=PATIENCE_MS)
            settle(MOVING_S)
            page.evaluate("scrollTo(0, 0)")
            page.screenshot(path=DOCS / "dashboard.png", full_page=True)
            for section in ("experts", "token"):
                page.locator(f"#{section}").screenshot(path=DOCS / f"dashboard-{section}.png")
        with opened(browser, port, 360, "light") as (page, _), asked(port):
            settle(WORK_S / 2)
            page.screenshot(path=DOCS / "dashboard-phone.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
