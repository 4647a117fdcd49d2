"""The dashboard in a real browser: `make page`.

    python -m tests.page.check    # installs Debian's chromium and haproxy if missing, as root

The script prints every check and ends with exit code 1 if one fails.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import sys
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, TimeoutError, expect

from tests.checks import NAMES, Checks, haproxy, run_checks, three_servers
from tests.launch.launched import Launch, free_ports
from tests.page.browser import MOVING, PATIENCE_MS, asked, chromium, is_up, opened, settle

KEY = "s3cret"
#: Width of a phone's screen, in CSS pixels.
PHONE = 360
#: Seriousness of what axe finds that counts as a fault.
SERIOUS = ("serious", "critical")
#: A proxy that serves under a prefix.
PREFIX = "/models/demo"
PROXY = """
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend page
    bind 127.0.0.1:{own}
    http-request replace-path {prefix}(/.*) \\1
    default_backend server
backend server
    server alpha 127.0.0.1:{port}
"""


def shows(checks: Checks, what: str, look: Any) -> None:
    """Check that a locator is there, or an expectation holds, before long."""
    try:
        look()
        checks.check(True, what)
    except (AssertionError, TimeoutError) as error:
        checks.check(False, f"{what}: {str(error).splitlines()[0]}")


def has_text(checks: Checks, what: str, page: Page, selector: str, text: str) -> None:
    """Check that part of the page has a text before long."""
    part = expect(page.locator(selector))
    shows(checks, what, functools.partial(part.to_contain_text, text, timeout=PATIENCE_MS))


def is_in_state(checks: Checks, what: str, page: Page, state: str) -> None:
    """Check the state of the page's connection: "live", "key" or another."""
    part = expect(page.locator("#state"))
    shows(
        checks,
        what,
        functools.partial(part.to_have_attribute, "data-state", state, timeout=PATIENCE_MS),
    )


def check_live(checks: Checks, page: Page, errors: list[str]) -> None:
    """Check that the page is live and shows all servers."""
    is_in_state(checks, "the page is live", page, "live")
    for name in NAMES:
        has_text(checks, f"it shows {name}", page, "#servers-cards", name)
    grids = page.locator("#experts-grids canvas")
    shows(checks, "it draws the experts", lambda: expect(grids.first).to_be_visible())
    rows = page.locator("#links-rows tr")
    shows(checks, "it lists six directions of links", lambda: expect(rows).to_have_count(6))
    wrong = page.evaluate(pathlib.Path(__file__).with_name("pure.js").read_text(), "/dashboard")
    checks.check(not wrong, f"its functions compute what they should {wrong or ''}")
    checks.check(not errors, f"the console has no error {errors[:3] or ''}")


def check_looks(checks: Checks, browser: Browser, port: int) -> None:
    """Check dark and light, a wide window and a phone's."""
    for scheme, width in (("light", 1400), ("dark", 1400), ("light", PHONE), ("dark", PHONE)):
        with opened(browser, port, width, scheme) as (page, errors):
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
    """Check what users do with the page: chat with each server, waterfall."""
    page.fill("#chat-tokens", "24")
    for name in (f"{NAMES[0]} (this server)", NAMES[1]):
        page.select_option("#chat-server", label=name)
        page.fill("#chat-text", "Once upon a time")
        page.click("#chat-send")
        said = page.locator("#chat-log .said:not(.mine)").last
        shows(
            checks,
            f"{name} answers in the chat",
            lambda said=said: expect(said).to_contain_text("TTFT", timeout=PATIENCE_MS),
        )
    page.click("#token-record")
    row = page.locator("#token-rows tr").first
    shows(checks, "the waterfall shows calls of a token", lambda: expect(row).to_be_visible())


def check_prefix(checks: Checks, browser: Browser, folder: pathlib.Path, port: int) -> None:
    """Check the page behind a proxy that serves under a prefix."""
    own = free_ports(1)
    configuration = PROXY.format(own=own, prefix=PREFIX, port=port)
    with haproxy(folder, configuration), opened(browser, own, prefix=PREFIX) as (page, errors):
        is_in_state(checks, "the page is live under a prefix", page, "live")
        has_text(checks, "it shows all servers there", page, "#servers-cards", NAMES[-1])
        checks.check(not errors, f"the console has no error there {errors[:3] or ''}")


def check_decisions(checks: Checks, page: Page) -> None:
    """Check a dry run and a forced migration; on busy cores, the solver would take a minute."""
    page.click("#decide-dry")
    has_text(checks, "a dry run is told", page, "#decide-said", "would move")
    has_text(checks, "it shows both costs", page, "#decision-last", "New placement")
    has_text(checks, "and who would get experts", page, "#experts-moving", "Would move:")
    page.check("#decide-force")
    page.click("#decide-now")
    has_text(checks, "a forced migration begins", page, "#events", "begin to migrate")
    has_text(checks, "it is seen on its way", page, "#experts-moving", "On their way:")
    has_text(checks, "it ends", page, "#events", "Experts have migrated: placement 2")
    has_text(checks, "the new experts are told", page, "#experts-moving", "New within a minute:")


def check_loss(checks: Checks, page: Page, launch: Launch, port: int) -> None:
    """Check that the page shows the loss of a server, and its return."""
    launch.note_workers()
    fronts = [p for p in launch.workers if "dance_jax.serve.frontend" in p.cmdline()]
    fronts[-1].kill()
    has_text(checks, "the loss of a server is marked", page, "#events", "is lost")
    checks.check(is_up(port + 2), "the server comes back")
    has_text(checks, "the page marks it", page, "#events", f"{NAMES[-1]} serves")
    why = "killed by signal 9"
    has_text(checks, "and shows why it was lost", page, "#servers-cards", why)


def check_key(checks: Checks, page: Page, hosts: pathlib.Path) -> None:
    """Check that the page asks for the key, works with the right one, and drains a server."""
    is_in_state(checks, "without the key the page asks for one", page, "key")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    settle(1)
    is_in_state(checks, "a wrong key does not help", page, "key")
    page.fill("#key", KEY)
    page.press("#key", "Enter")
    is_in_state(checks, "the right key does", page, "live")
    page.locator("#servers-cards").get_by_role("button", name=f"Drain {NAMES[1]}").click()
    page.locator("#drain-dialog").get_by_role("button", name="Drain").click()
    said = "finishes its requests"
    has_text(checks, "a server drains at a click", page, "#servers-said", said)
    cards = page.locator("#servers-cards article")
    shows(
        checks,
        "it leaves the page",
        lambda: expect(cards).to_have_count(len(NAMES) - 1, timeout=PATIENCE_MS),
    )
    drained = f"# drained: {NAMES[1]}" in hosts.read_text()
    checks.check(drained, "the hosts file has it as drained")


def check(checks: Checks, folder: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """Run all checks."""
    browser = stack.enter_context(chromium())
    with (
        three_servers(folder / "open", *MOVING) as (launch, port),
        opened(browser, port) as (page, errors),
    ):
        with asked(port):
            check_live(checks, page, errors)
            check_work(checks, page)
            check_looks(checks, browser, port)
        check_prefix(checks, browser, folder, port)
        check_decisions(checks, page)
        check_loss(checks, page, launch, port)
    with (
        three_servers(folder / "keyed", "--api-key", KEY) as (_, port),
        opened(browser, port) as (page, _),
    ):
        check_key(checks, page, folder / "keyed" / "hosts.txt")


if __name__ == "__main__":
    sys.exit(run_checks(["chromium", "haproxy"], check))
