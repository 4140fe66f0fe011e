"""A headless Chromium for tests of HTML pages; errors of a page and its requests to other hosts fail the test."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import pytest

from slurm.devcluster import packages

PACKAGES = {"chromium": "chromium fonts-dejavu-core"}
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
VIEWPORT = {"width": 1280, "height": 800}


def chromium() -> str:
    """Return the path of Chromium, which is installed if it is missing; skip the test if it cannot be."""
    if not shutil.which("chromium") and (not shutil.which("apt-get") or os.geteuid()):
        pytest.skip("needs Debian's chromium, and to be root to install it")
    packages.install(PACKAGES)
    path = shutil.which("chromium")
    assert path
    return path


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def open_page(browser) -> Callable:
    """Context manager that opens a page and yields it.

    `with open_page(url, "light", "name") as page:` has the viewport of a laptop. At the end a screenshot is saved, and
    an error of the page fails the test unless it contains one of `expected_errors`.
    """

    @contextmanager
    def open_page(url: str, scheme: str, name: str, expected_errors: Sequence[str] = ()) -> Iterator:
        host = urlparse(url).netloc
        context = browser.new_context(color_scheme=scheme, viewport=VIEWPORT)
        page, errors = context.new_page(), []
        page.on("console", lambda message: errors.append(format_message(message)) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "request",
            lambda request: errors.append(f"asks for {request.url}") if is_foreign(request.url, host) else None,
        )
        page.goto(url)
        yield page
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{name}-{scheme}.png", full_page=True)
        context.close()
        unexpected = [error for error in errors if not any(known in error for known in expected_errors)]
        assert not unexpected, unexpected

    return open_page


def format_message(message) -> str:
    """Return a console message with its URL, because the text does not name a missing file."""
    return f"{message.text} ({message.location['url']})"


def is_foreign(url: str, host: str) -> bool:
    """Return whether a URL refers to another host."""
    parsed = urlparse(url)
    return parsed.scheme not in ("data", "blob", "about") and parsed.netloc != host
