"""Checks of a page that any reader needs: axe-core's rules, and no overflow on a small screen."""

from pathlib import Path

import axe_playwright_python

AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
SMALL, LARGE = {"width": 400, "height": 800}, {"width": 1280, "height": 800}


def check_accessible(page) -> None:
    """Assert that axe-core finds nothing of serious or critical impact."""
    page.evaluate(AXE)
    violations = page.evaluate("axe.run(document, {resultTypes: ['violations']}).then(results => results.violations)")
    serious = [one for one in violations if one["impact"] in ("serious", "critical")]
    assert not serious, [(one["id"], [node["html"][:200] for node in one["nodes"][:4]]) for one in serious]


def check_narrow(page) -> None:
    """Assert that the page itself does not scroll sideways at 400 pixels: wide parts have scroll bars of their own."""
    page.set_viewport_size(SMALL)
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    wide = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(one => one.getBoundingClientRect().right > innerWidth + 1 &&"
        " !one.closest('.scroll, svg')).slice(0, 5).map(one => one.outerHTML.slice(0, 200))"
    )
    assert overflow <= 0, wide
