"""The site of the documentation is built without dead links, and works offline in a browser."""

import re

import pytest

from tests.support.browser_fixture import SCREENSHOTS
from tests.support.documentation import site

pytestmark = pytest.mark.slow
WIDTHS = (1280, 400)
# Pages with the widest tables, the longest commands, images and drawings.
PAGES = (
    "index",
    "docs/architecture",
    "docs/profiles",
    "docs/security",
    "docs/reference/configuration",
    "docs/training",
)


@pytest.fixture(scope="module")
def built():
    process = site.build()
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == ""
    return site.SITE


def test_pages_load_nothing_from_other_hosts(built):
    pages = list(built.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        loaded = re.findall(r"<(?:script|img|link|iframe)[^>]*?(?:src|href)=\"?(https?:[^\"> ]+)", page.read_text())
        assert loaded == [], page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_pages_fit_the_window(built, open_page, scheme, name):
    label = name.replace("/", "-")
    with open_page((built / f"{name}.html").as_uri(), scheme, f"site-{label}") as page:
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.screenshot(path=SCREENSHOTS / f"site-{label}-{width}-{scheme}.png")
        expected = {"light": "default", "dark": "slate"}[scheme]
        assert page.get_attribute("body", "data-md-color-scheme") == expected


def test_the_search_finds_pages_without_a_server(built, open_page):
    with open_page((built / "index.html").as_uri(), "light", "site-search") as page:
        page.focus(".md-search__input")
        page.keyboard.type("node_check")
        page.wait_for_selector(".md-search-result__link[href*='clusters.html']", state="attached", timeout=10_000)
