"""HTML page of a lineage: a drawing of the graph, with links to the pages in the run folders."""

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from jobs.reports.lineage import Node, topological_order
from pixart.html.page import Html, document, text

WIDTH, LEFT = 1120, 190  # pixels; the area left of LEFT is for arrows that pass other cards
LINE, GAP, PAD = 19, 34, 12
LANE = 26  # pixels between two of these arrows
MAX_LINE_LENGTH = 104  # characters that fit on a line of a card
STYLE = """
.card { fill: var(--panel); stroke: var(--rule); } .first .card { stroke: var(--c0); stroke-width: 2; }
.arrow { fill: none; stroke: var(--soft); stroke-width: 1.5; } .head { fill: var(--soft); }
.graph .kind { font-weight: 700; font-size: 14px; } .graph .key { fill: var(--soft); }
.graph a text { fill: var(--c0); text-decoration: underline; } .graph { font-variant-numeric: tabular-nums; }
"""


def page(node: Node, folder: Path) -> str:
    """Return the page of a node's lineage.

    Links are relative to `folder`, where the page is written, so that they work in a copied home folder.
    """
    nodes = topological_order(node)
    tops, top = {}, 2
    for one in nodes:
        tops[one.name] = top
        top += height(one) + GAP
    parts = [arrow(parent, one, nodes, tops) for one in nodes for parent in one.parents]
    parts += [card(one, tops[one.name], folder, first=one is node) for one in nodes]
    words = f"{node.kind} {Path(node.name).name}"
    body = (
        f"<h1>Lineage of {text(words)}</h1>\n<p>Ancestors are above their descendants.</p>\n"
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="graph">'
        f'<svg class="graph" viewBox="0 0 {WIDTH} {top - GAP + 4}" role="group" aria-label="lineage">\n'
        f"{chr(10).join(parts)}\n</svg></div></figure>\n"
    )
    return document(f"Lineage of {words}", body, STYLE + ".scroll { max-height: none; }")


def height(node: Node) -> int:
    """Return the height of a node's card in pixels."""
    return 2 * PAD + LINE * (1 + len(lines(node)))


def lines(node: Node) -> list[tuple[str, str]]:
    """Return the lines of a node's card as keys and values."""
    return [("path", node.name.removesuffix(" (conversion)")), *node.facts.items()]


def card(node: Node, top: int, folder: Path, *, first: bool) -> str:
    """Return the SVG of a node's card; `first` marks the node whose lineage is shown."""
    parts = [
        f'<g class="{"first" if first else "other"}"><rect class="card" x="{LEFT}" y="{top}" rx="8" '
        f'width="{WIDTH - LEFT - 4}" height="{height(node)}"/>',
        f'<text class="kind" x="{LEFT + PAD}" y="{top + PAD + 12}">{text(node.kind)}</text>',
    ]
    existing = {name: path for name, path in node.pages.items() if path.exists()}
    for index, (name, path) in enumerate(existing.items()):
        target = quote(os.path.relpath(path, folder))
        position = f'x="{WIDTH - PAD - 8 - 130 * index}" y="{top + PAD + 12}" text-anchor="end"'
        parts.append(f'<a href="{target}"><text {position}>{text(name)}</text></a>')
    for index, (key, value) in enumerate(lines(node)):
        y = top + PAD + LINE * (index + 1) + 12
        parts.append(f'<text class="key" x="{LEFT + PAD}" y="{y}">{text(key)}</text>')
        parts.append(f'<text x="{LEFT + 120}" y="{y}">{clipped(value)}</text>')
    return "".join([*parts, "</g>"])


def clipped(value: str) -> Html:
    """Shorten a value to LETTERS characters and put the full value into its title.

    A path loses its beginning, which is less informative than its end.
    """
    if len(value) <= MAX_LINE_LENGTH:
        return Html(text(value))
    short = f"…{value[1 - MAX_LINE_LENGTH :]}" if value.startswith("/") else f"{value[: MAX_LINE_LENGTH - 1]}…"
    return Html(f"{text(short)}<title>{text(value)}</title>")


def arrow(parent: Node, child: Node, nodes: Sequence[Node], tops: dict[str, int]) -> str:
    """Return the SVG of an arrow: straight between neighbours, else in a lane beside the cards, one per distance."""
    names = [one.name for one in nodes]
    distance = names.index(child.name) - names.index(parent.name)
    begin, end = tops[parent.name] + height(parent), tops[child.name]
    if distance == 1:
        x = (LEFT + WIDTH) / 2
        head = f'<path class="head" d="M{x} {end}l-5-9h10z"/>'
        return f'<path class="arrow" d="M{x} {begin}V{end - 8}"/>{head}'
    lane = max(12, LEFT - LANE * distance)
    begin, end = begin - height(parent) // 2, end + height(child) // 2
    head = f'<path class="head" d="M{LEFT} {end}l-9-5v10z"/>'
    return f'<path class="arrow" d="M{LEFT} {begin}H{lane + 10}q-10 0-10 10V{end - 10}q0 10 10 10H{LEFT - 8}"/>{head}'
