"""The dashboard in a real browser: `make page`.

    python -m tests.page.check    # installs Debian's chromium if it is missing, as root

It is not part of pytest because it may install Chromium. It prints every check and ends with exit
code 1 if one fails.
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
import tempfile
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, TimeoutError, expect

from benchmarks.namespaces.machine import install_missing
from dance_jax.config import UserError
from tests.launch.launched import Launch
from tests.page.browser import NAMES, PATIENCE_MS, asked, chromium, is_up, opened, served, settle
from tests.testbed.check import Checks

KEY = "s3cret"
#: Width of a phone's screen, in CSS pixels.
PHONE = 360
#: Seriousness of what axe finds that counts as a fault.
SERIOUS = ("serious", "critical")


def shows(checks: Checks, what: str, look: Any) -> None:
    """Check that a locator is there, or an expectation holds, before long."""
    try:
        look()
        checks.check(True, what)
    except (AssertionError, TimeoutError) as error:
        checks.check(False, f"{what}: {str(error).splitlines()[0]}")


def check_live(checks: Checks, page: Page, errors: list[str]) -> None:
    """Check that the page is live and shows all servers."""
    state = page.locator("#state")
    shows(
        checks,
        "the page is live",
        lambda: expect(state).to_have_attribute("data-state", "live", timeout=PATIENCE_MS),
    )
    cards = page.locator("#servers-cards")
    for name in NAMES:
        shows(checks, f"it shows {name}", lambda name=name: expect(cards).to_contain_text(name))
    grids = page.locator("#experts-grids canvas")
    shows(checks, "it draws the experts", lambda: expect(grids.first).to_be_visible())
    rows = page.locator("#links-rows tr")
    shows(checks, "it lists six directions of links", lambda: expect(rows).to_have_count(6))
    checks.check(not errors, f"the console has no error {errors[:3] or ''}")


def check_looks(checks: Checks, browser: Browser, url: str) -> None:
    """Check dark and light, a wide window and a phone's."""
    for scheme, width in (("light", 1400), ("dark", 1400), ("light", PHONE), ("dark", PHONE)):
        with opened(browser, url, width, scheme) as (page, errors):
            expect(page.locator("#state")).to_have_attribute("data-state", "live")
            settle()
            what = f"{scheme}, {width} pixels"
            wide = page.evaluate("document.documentElement.scrollWidth")
            checks.check(wide <= width, f"{what}: the page is {wide} pixels wide")
            found = Axe().run(page, options={"resultTypes": ["violations"]})
            faults = [
                f"{each['id']}: {each['nodes'][0]['html'][:90]}"
                for each in found.response["violations"]
                if each["impact"] in SERIOUS
            ]
            checks.check(not faults, f"{what}: axe finds no serious fault {faults or ''}")
            checks.check(not errors, f"{what}: the console has no error {errors[:3] or ''}")


def check_work(checks: Checks, page: Page) -> None:
    """Check what users do with the page: chat, waterfall, dry run, migration."""
    page.fill("#chat-text", "Once upon a time")
    page.fill("#chat-tokens", "24")
    page.click("#chat-send")
    said = page.locator("#chat-log")
    shows(
        checks,
        "the chat answers",
        lambda: expect(said).to_contain_text("tokens", timeout=PATIENCE_MS),
    )
    page.click("#token-record")
    shows(
        checks,
        "the waterfall shows calls of a token",
        lambda: expect(page.locator("#token-rows tr").first).to_be_visible(),
    )


def check_decisions(checks: Checks, page: Page) -> None:
    """Check a dry run and a forced migration; on busy cores, the solver would take a minute."""
    page.click("#decide-dry")
    last = page.locator("#decision-last")
    shows(
        checks,
        "a dry run shows both costs",
        lambda: expect(last).not_to_be_empty(timeout=PATIENCE_MS),
    )
    page.check("#decide-force")
    page.click("#decide-now")
    events = page.locator("#events")
    shows(
        checks,
        "a forced migration is marked",
        lambda: expect(events).to_contain_text("igration", timeout=PATIENCE_MS),
    )


def check_loss(checks: Checks, page: Page, launch: Launch, url: str) -> None:
    """Check that the page shows the loss of a server, and its return."""
    launch.note_workers()
    fronts = [p for p in launch.workers if "dance_jax.serve.frontend" in p.cmdline()]
    fronts[-1].kill()
    events = page.locator("#events")
    shows(
        checks,
        "the loss of a server is marked",
        lambda: expect(events).to_contain_text("lost", timeout=PATIENCE_MS),
    )
    port = int(url.rpartition(":")[2])
    checks.check(is_up(f"http://127.0.0.1:{port + 2}"), "the server comes back")
    cards = page.locator("#servers-cards")
    shows(
        checks,
        "the page shows why it was lost",
        lambda: expect(cards).to_contain_text("killed by signal 9", timeout=PATIENCE_MS),
    )


def check_key(checks: Checks, page: Page) -> None:
    """Check that the page asks for the key, and works with the right one."""
    state = page.locator("#state")
    shows(
        checks,
        "without the key the page asks for one",
        lambda: expect(state).to_have_attribute("data-state", "key", timeout=PATIENCE_MS),
    )
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    settle(1)
    shows(
        checks,
        "a wrong key does not help",
        lambda: expect(state).to_have_attribute("data-state", "key"),
    )
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    shows(
        checks,
        "the right key does",
        lambda: expect(state).to_have_attribute("data-state", "live"),
    )
    page.locator("#servers-cards").get_by_role("button", name="rain").nth(1).click()
    page.locator("#drain-dialog").get_by_role("button", name="Drain").click()
    shows(
        checks,
        "a server drains at a click",
        lambda: expect(page.locator("#servers-said")).to_contain_text("finishes its requests"),
    )


def main() -> int:
    """Run all checks and return the exit code."""
    try:
        install_missing(["chromium"])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    checks = Checks()
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        browser = stack.enter_context(chromium())
        launch, url = stack.enter_context(served(folder / "open"))
        page, errors = stack.enter_context(opened(browser, url))
        with asked(url):
            check_live(checks, page, errors)
            check_work(checks, page)
            check_looks(checks, browser, url)
        check_decisions(checks, page)
        check_loss(checks, page, launch, url)
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        browser = stack.enter_context(chromium())
        _, url = stack.enter_context(served(folder, KEY))
        page, _ = stack.enter_context(opened(browser, url))
        check_key(checks, page)
    print(f"{checks.passed} passed, {checks.failed} failed")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
