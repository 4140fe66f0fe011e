"""Hostile markup in every field of every page, in Chromium: no script runs, and nothing breaks out of its place."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conversion.report import html as conversion_page
from conversion.report.text import REPORT
from jobs.reports import lineage_page, run_pages
from jobs.reports.lineage import Node
from jobs.state import run as runs
from jobs.state.journal import Journal
from jobs.state.run_metadata import change, read_description
from pixart.data.audit import page as audit_page
from pixart.evaluation import page as evaluation_page
from tests.attack.campaign import Campaign, campaign
from tests.attack.hostile import MARKUP, places, replaced
from tests.support.demo_fixture import Demo

pytestmark = pytest.mark.slow
FOREIGN = "script, iframe, object, embed, base, form, meta[http-equiv], svg[onload], link"
HANDLERS = "[...document.querySelectorAll('*')].some(e => [...e.attributes].some(a => a.name.startsWith('on')))"
LINKS = "[...document.querySelectorAll('[href], [src]')].map(e => e.getAttribute('href') || e.getAttribute('src'))"
SCHEMES = ("javascript:", "vbscript:", "data:text")


def check(attack: Campaign, browser: Any, html: str, name: str, folder: Path, fields: int) -> None:
    """Open a page, move over it, and look for markup that a field has brought in."""
    file = folder / "page.html"
    file.write_text(html)
    page = browser.new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(file.as_uri())
    page.mouse.move(300, 300)
    page.keyboard.press("Tab")
    attack.figures.tries += fields
    if dialogs or page.evaluate("window.attacked !== undefined"):
        attack.wrong(name, "a script ran")
    if page.query_selector_all(FOREIGN) or page.evaluate(HANDLERS):
        attack.wrong(name, "an element or a handler of a field is in the page")
    if any(str(link).lower().startswith(SCHEMES) for link in page.evaluate(LINKS)):
        attack.wrong(name, "a field became a link that runs code")
    page.close()


def with_markup(value: Any, markup: str, render: Callable[[Any], str]) -> tuple[Any, int]:
    """Return a JSON value with markup in every text that the page renders with it, and the number of these texts."""
    fields = 0
    for path in list(places(value)):
        inner = value
        for key in path:
            inner = inner[key]
        if not isinstance(inner, str):
            continue
        changed = replaced(value, path, inner + markup)
        try:
            render(changed)
        except (KeyError, ValueError):  # a choice among names that the code has, not a text
            continue
        value, fields = changed, fields + 1
    return value, fields


def test_no_field_of_a_page_runs_or_breaks_out(small_demo: Demo, browser, tmp_path, record_property):
    attack = campaign("pages", short=4, long=len(MARKUP))
    report = json.loads(next(small_demo.home.glob(f"runs/*/checkpoints/*/{REPORT}")).read_text())
    summary = json.loads((small_demo.home / "datasets/demo/audit/audit.json").read_text())
    run = tmp_path / "runs" / "a-train"
    shutil.copytree(small_demo.runs("train")[-1], run, ignore=shutil.ignore_patterns("checkpoints"))
    for markup in MARKUP[: attack.tries]:
        changed, fields = with_markup(report, markup, conversion_page.page)
        changed["tensor_provenance"] = {f"{key}{markup}": markup for key in report["tensor_provenance"]}
        check(attack, browser, conversion_page.page(changed), f"conversion: {markup}", tmp_path, fields)

        def audit(values: Any, markup: str = markup) -> str:
            known = audit_page.AdoptedRows(source=markup, form=markup, captions=[(markup, markup, markup)])
            thumbnail = (markup, b"")
            groups = [("near", 2, [thumbnail, thumbnail])]
            return audit_page.page(markup, values, {markup: [thumbnail]}, [thumbnail], groups, known)

        changed, fields = with_markup(summary, markup, audit)
        changed["reasons"], changed["first_words"] = {markup: 3}, {markup: 2}
        check(attack, browser, audit(changed), f"audit: {markup}", tmp_path, fields + 8)

        parent = Node(kind=markup, name=f"/a/{markup}", facts={markup: markup * 20})
        node = Node(kind=markup, name=f"/b/{markup}", facts={markup: markup}, parents=[parent])
        node.pages = {markup: tmp_path / "page.html"}
        check(attack, browser, lineage_page.page(node, tmp_path), f"lineage: {markup}", tmp_path, 8)

        check(attack, browser, evaluation(markup), f"evaluation: {markup}", tmp_path, 10)
        check(attack, browser, training(run, markup), f"training: {markup}", tmp_path, 9)
    attack.finish(record_property)


def evaluation(markup: str) -> str:
    """Return the page of an evaluation whose texts are markup."""
    figure = {"value": 1.0, "low": 0.5, "high": 1.5, "count": 3}
    variants = [
        {
            "checkpoint": markup,
            "settings": markup,
            "weights": markup,
            "stage": 2,
            "step": step,
            "steps": 3,
            "guidance": float(step),
            "protocol": {"hash": markup, "prompts": markup, "guidance": 1.0},
            "figures": {"fd": figure},
            "skills": {markup: figure},
            "judged_by": markup,
            "not_judged": 0,
        }
        for step in (1, 2)
    ]
    ranked = [evaluation_page.Ranked(prompt=markup, score=0.5, image=None)]
    return evaluation_page.page(markup, {markup: markup}, variants, ranked, ranked, "clip_score")


def training(folder: Path, markup: str) -> str:
    """Return the summary of a training run with markup in its metadata and its journal."""
    description = read_description(folder)
    parameters = {**{key: markup for key in description["parameters"]}, markup: markup}
    change(folder, parameters=parameters, tags={"pixart.parent_checkpoint": markup, "pixart.commit": markup})
    journal = Journal(folder, "attack")
    journal.incident(3, markup)
    journal.metrics(3, {f"train/loss{markup}": 1.0, f"system/node_{markup}/load_average_1m": 1.0})
    return run_pages.summary(runs.load(folder))
