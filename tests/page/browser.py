"""The dashboard of a running demo in Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.request
from collections.abc import Iterator

import httpx
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from benchmarks.namespaces.machine import find
from tests.checks import NAMES
from tests.launch.launched import eventually

#: Milliseconds within which the page must show what has happened.
PATIENCE_MS = 60_000.0
#: Options of a service whose next decision moves many experts.
MOVING = ("--policy", "uniform", "--rebalance-policy", "dance")
#: Chromium's own background work would look for hosts that are not there.
_OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


@contextlib.contextmanager
def asked(port: int) -> Iterator[None]:
    """Within the context, requests run on all three servers."""
    stop = threading.Event()
    body = {"prompt": "The mountain", "max_tokens": 150, "ignore_eos": True, "temperature": 1}

    def ask(rank: int) -> None:
        while not stop.is_set():
            with contextlib.suppress(httpx.HTTPError):
                address = f"http://127.0.0.1:{port + rank}/v1/completions"
                httpx.post(address, json=body, timeout=60)

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(len(NAMES))]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find("chromium"), args=[*_OPTIONS])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(
    browser: Browser, port: int, width: int = 1400, scheme: str = "light", prefix: str = ""
) -> Iterator[tuple[Page, list[str]]]:
    """The dashboard in a window, and what the console says of errors.

    Args:
        browser: shows the page.
        port: of the server, or of a proxy.
        width: of the window in pixels.
        scheme: "light" or "dark".
        prefix: of the proxy's paths.
    """
    height = 900 if width > 600 else 740
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    page, errors = context.new_page(), []

    def note(message: ConsoleMessage) -> None:
        if message.type == "error":
            errors.append(message.text)

    page.on("console", note)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(PATIENCE_MS)
    try:
        page.goto(f"http://127.0.0.1:{port}{prefix}/dashboard")
        yield page, errors
    finally:
        context.close()


def is_up(port: int) -> bool:
    """Waits until a server is ready."""

    def ready() -> bool:
        with contextlib.suppress(OSError):
            url = f"http://127.0.0.1:{port}/ready"
            return urllib.request.urlopen(url, timeout=5).status == 200
        return False

    return eventually(ready, 60)


def settle(seconds: float = 3.0) -> None:
    """Let the page take in a few views."""
    time.sleep(seconds)
