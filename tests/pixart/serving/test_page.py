"""The page in Chromium: request, rewritten prompt, slider, errors, gallery, keyboard, and axe-core's rules."""

import re
from pathlib import Path

import axe_playwright_python
import pytest
from playwright.sync_api import expect

from pixart.config.captions import CaptionsConfig
from pixart.data.captions.rewriting import Answer
from pixart.serving.recaptioning import Recaptioner
from tests.support.browser_fixture import SCREENSHOTS
from tests.support.cluster_fixture import wait_until
from tests.support.serving_fixture import HeldSteps

pytestmark = pytest.mark.slow
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
WIDTHS = (400, 1280)


def caption(conversations, sampling) -> list[Answer | None]:
    return [("A red circle on a white background. Soft light.", False) for _ in conversations]


def check_accessibility(page) -> None:
    """Assert that axe-core finds nothing of serious or critical impact."""
    page.evaluate(AXE)
    violations = page.evaluate("axe.run().then(results => results.violations)")
    assert [(item["id"], item["help"]) for item in violations if item["impact"] in ("serious", "critical")] == []


def screenshots(page, name: str) -> None:
    """Save the page at each width; assert that nothing is wider than the window."""
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.screenshot(path=SCREENSHOTS / f"{name}-{width}.png", full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_request_edit_generate_and_slider(serve, open_page, scheme):
    server = serve(recaptioner=Recaptioner(CaptionsConfig(), lambda: caption))
    with open_page(server.url, scheme, "serve") as page:
        page.get_by_label("Prompt", exact=True).fill("red circle")
        page.get_by_role("button", name="Rewrite as a caption").click()
        rewritten = page.get_by_label("Rewritten prompt")
        expect(rewritten).to_have_value("A red circle on a white background. Soft light.")
        rewritten.fill("A blue star.")
        page.get_by_role("spinbutton", name="Images").fill("2")
        page.get_by_label("Seed").fill("5")
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_role("status")).to_have_text("2 images are ready.", timeout=60_000)
        expect(page.locator("#shown-prompt")).to_have_text("A blue star.")
        expect(page.locator("#shown-request")).to_have_text("Request: red circle")
        figures = page.locator("figure")
        expect(figures).to_have_count(2)
        expect(figures.nth(1)).to_contain_text("seed 6")
        slider, picture = figures.nth(0).get_by_role("slider"), figures.nth(0).locator("img")
        last = picture.get_attribute("src")
        expect(figures.nth(0)).to_contain_text("step 4 of 4")
        slider.press("Home")
        expect(figures.nth(0)).to_contain_text("step 1 of 4")
        assert picture.get_attribute("src") != last
        slider.press("End")
        assert picture.get_attribute("src") == last
        with page.expect_download() as download:
            figures.nth(0).get_by_role("link", name="Download").click()
        assert download.value.suggested_filename == "seed-5.png"
        screenshots(page, f"serve-{scheme}")
        check_accessibility(page)

        rewritten.fill("")
        page.get_by_label("Prompt", exact=True).fill("green square")
        page.get_by_role("spinbutton", name="Images").fill("1")
        page.get_by_role("button", name="Generate").press("Enter")
        expect(page.get_by_role("status")).to_have_text("1 image is ready.", timeout=60_000)
        expect(page.locator("#shown-request")).to_be_hidden()
        gallery = page.get_by_role("list").get_by_role("button")
        expect(gallery).to_have_count(2)
        gallery.nth(0).click()
        expect(page.locator("#shown-prompt")).to_have_text("A blue star.")
        expect(page.locator("figure")).to_have_count(2)


def test_errors_and_the_full_queue_are_shown(serve, open_page):
    server = serve(limits={"batch_size": 1, "queued_images": 1})
    held = HeldSteps(server.service)
    expected = ("429", "400")
    with open_page(server.url, "light", "serve-error", expected) as page:
        page.get_by_label("Prompt", exact=True).fill("a star")
        page.get_by_role("spinbutton", name="Images").fill("9")
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_role("alert")).to_contain_text("n=9: is above the limit; it must be at most 8")
        page.get_by_role("spinbutton", name="Images").fill("2")
        page.get_by_role("button", name="Generate").click()
        held.wait()
        wait_until(lambda: server.service.queue.num_waiting == 1, 30)
        expect(page.get_by_role("button", name="Generate")).to_be_disabled()
        with page.context.expect_page() as opened:
            page.evaluate("open(location.href)")
        other = opened.value
        other.get_by_label("Prompt", exact=True).fill("a star")
        other.get_by_role("button", name="Generate").click()
        expect(other.get_by_role("alert")).to_have_text(re.compile(r"^the queue is full; try again in \d+ s\.$"))
        check_accessibility(other)
        other.close()
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("status")).to_have_text("Cancelled.")
        wait_until(lambda: server.service.queue.num_waiting == 0, 30)
        held.release()
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_role("status")).to_have_text("2 images are ready.", timeout=60_000)


def test_the_page_asks_for_the_token(serve, open_page):
    server = serve(token="secret")
    with open_page(server.url, "dark", "serve-token", ("401",)) as page:
        page.get_by_label("Bearer token").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("missing or wrong")
        check_accessibility(page)
        page.get_by_label("Bearer token").fill("secret")
        page.keyboard.press("Enter")
        expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
    with open_page(f"{server.url}/#token=secret", "light", "serve-token") as page:
        expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
        assert page.url == f"{server.url}/"


def test_classes_are_chosen_by_keyboard(serve, open_page):
    server = serve(stage=1)
    with open_page(server.url, "light", "serve-classes") as page:
        page.get_by_label("Class", exact=True).focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Tab")
        for _ in range(5):
            page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="Generate")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_have_text("1 image is ready.", timeout=60_000)
        expect(page.locator("#shown-prompt")).to_have_text(server.service.model.classes[1])
        check_accessibility(page)
