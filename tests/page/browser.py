"""The dashboard of a running demo in Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import contextlib
import pathlib
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator

import httpx
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from benchmarks.namespaces.machine import find
from tests.launch.launched import Launch, eventually, free_ports

NAMES = ("alpha", "beta", "gamma")
#: Milliseconds within which the page must show what has happened.
PATIENCE_MS = 60_000.0
#: Chromium's own background work would look for hosts that are not there.
_OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


@contextlib.contextmanager
def served(folder: pathlib.Path, key: str = "") -> Iterator[tuple[Launch, str]]:
    """Three servers of the demo, any two of which hold all experts, and the URL of the first."""
    folder.mkdir(exist_ok=True)
    lines = (f"{name} address=localhost memory=8MiB bandwidth=100Mbps\n" for name in NAMES)
    (folder / "hosts.txt").write_text("".join(lines))
    port = free_ports(len(NAMES))
    words = ["--hosts", folder / "hosts.txt", "--port", port, "--rebalance-interval", 0]
    words += ["--policy", "uniform", "--rebalance-policy", "dance"]
    words += ["--api-key", key] if key else []
    command = [sys.executable, "-m", "dance_jax.launch", *map(str, words)]
    launch = Launch(command, folder)
    try:
        launch.wait_for("curl ")
        yield launch, f"http://127.0.0.1:{port}"
    finally:
        if launch.process.poll() is None:
            launch.note_workers()
        launch.kill()


@contextlib.contextmanager
def asked(url: str, key: str = "") -> Iterator[None]:
    """Within the context, requests run on all three servers."""
    port, stop = int(url.rpartition(":")[2]), threading.Event()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"prompt": "The mountain", "max_tokens": 150, "ignore_eos": True, "temperature": 1}

    def ask(rank: int) -> None:
        while not stop.is_set():
            with contextlib.suppress(httpx.HTTPError):
                address = f"http://127.0.0.1:{port + rank}/v1/completions"
                httpx.post(address, json=body, headers=headers, timeout=60)

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
    browser: Browser, url: str, width: int = 1400, scheme: str = "light"
) -> Iterator[tuple[Page, list[str]]]:
    """The dashboard in a window, and what the console says of errors."""
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
        page.goto(f"{url}/dashboard")
        yield page, errors
    finally:
        context.close()


def is_up(url: str) -> bool:
    """Waits until a server is ready."""

    def ready() -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{url}/ready", timeout=5).status == 200
        return False

    return eventually(ready, 60)


def settle(seconds: float = 3.0) -> None:
    """Let the page take in a few views."""
    time.sleep(seconds)
