"""SVG charts for HTML pages: colors follow the light or dark scheme, and every point has a title."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from pixart.html.page import text

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1120, 78, 1090, 10, 250  # pixels: width of a chart, edges of its frame
RELATIVE_TOLERANCE = 1e-9  # relative difference below which values count as equal
MARKS = {
    "dot": "M-2.4 0a2.4 2.4 0 1 0 4.8 0a2.4 2.4 0 1 0-4.8 0",
    "ring": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "cross": "M-3-3 3 3M-3 3 3-3",
}
PATHS = {**MARKS, "faint": MARKS["ring"], "curve": MARKS["ring"]}  # "faint" and "curve" show marks only in the legend


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis from `low` to `high`, with the position and text of each tick."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    panels: Sequence[str] = ()  # names of the intervals [0, 1], [1, 2], ...

    def share(self, value: float) -> float:
        """Return the position of a value as a fraction of the axis, 0 at `low` and 1 at `high`."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, kw_only=True)
class Series:
    """A series of points, each with a title; series that share a name and a mark share an entry of the legend."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    titles: Sequence[str]
    color: str
    mark: str


def drawable(value: float | None) -> TypeGuard[float]:
    """Return whether a value is present and finite."""
    return value is not None and math.isfinite(value)


def log_axis(label: str, low: int, high: int) -> Axis:
    """Return an axis from 10**low to 10**high, for series that hold decimal logarithms."""
    exponents = range(low, high + 1, -(-(high - low) // 8))
    return Axis(label=label, low=low, high=high, ticks=[(exponent, f"1e{exponent}") for exponent in exponents])


def linear_axis(label: str, series: Iterable[Series], *shown: float) -> Axis:
    """Return an axis between round numbers that covers every value of the series and of `shown`."""
    values = [*(value for one in series for value in one.y if drawable(value)), *shown] or [0.0]
    span, size = max(values) - min(values), max(map(abs, values))
    span = span if span > RELATIVE_TOLERANCE * size else size or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power * 6 >= span)
    low, high = math.floor(min(values) / step), max(math.ceil(max(values) / step), math.floor(min(values) / step) + 1)
    ticks = [(tick * step, f"{tick * step:g}") for tick in range(low, high + 1)]
    return Axis(label=label, low=low * step, high=high * step, ticks=ticks)


def kinds_axis(kinds: Sequence[str], blocks: int) -> Axis:
    """Return an axis with a panel for each kind of linear layer, over the transformer's blocks."""
    ends = sorted({0, blocks - 1})
    ticks = [(within(panel, block, blocks), f"{block}") for panel in range(len(kinds)) for block in ends]
    return Axis(label="block, by kind of linear", low=0, high=len(kinds), ticks=ticks, panels=kinds)


def within(panel: int, block: int, blocks: int) -> float:
    """Return the position of a block in a panel of `kinds_axis`."""
    return panel + 0.05 + 0.9 * (block + 0.5) / blocks


def chart(caption: str, series: Sequence[Series], x: Axis, y: Axis, events: Sequence[tuple[float, str]] = ()) -> str:
    """Return a figure with a legend, an SVG and a caption, which counts the values that cannot be drawn.

    `events` are positions on the horizontal axis with a title; they are drawn as dashed lines.
    """

    def across(value: float) -> float:
        return LEFT + (RIGHT - LEFT) * x.share(value)

    def down(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * y.share(value)

    if not any(drawable(value) for one in series for value in one.y):
        return "<p>No values to plot.</p>\n"
    parts = []
    for value, name in y.ticks:
        style = "zero" if name == "0" else "grid"
        parts.append(f'<path class="{style}" d="M{LEFT} {down(value):.1f}H{RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{down(value) + 4:.1f}" text-anchor="end">{name}</text>')
    for value, name in x.ticks:
        parts.append(f'<path class="zero" d="M{across(value):.1f} {BOTTOM}v4"/>')
        parts.append(f'<text x="{across(value):.1f}" y="{BOTTOM + 16}" text-anchor="middle">{name}</text>')
    for panel, kind in enumerate(x.panels):
        parts.append(f'<path class="grid" d="M{across(panel):.1f} {TOP}V{BOTTOM + 58}"/>')
        for row, word in enumerate(kind.split(".")):
            place = f'x="{across(panel + 0.5):.1f}" y="{BOTTOM + 30 + 13 * row}"'
            parts.append(f'<text {place} text-anchor="middle">{text(word)}</text>')
    label = BOTTOM + (78 if x.panels else 36)
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{label}" text-anchor="middle">{x.label}</text>')
    parts.append(
        f'<text transform="translate(14 {(TOP + BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{y.label}</text>'
    )
    for at, title in events:
        parts.append(f'<path class="event" d="M{across(at):.1f} {TOP}V{BOTTOM}"><title>{text(title)}</title></path>')
    missing = 0
    for one in series:
        points = list(zip(one.x, one.y, one.titles, strict=True))
        marks, path = [], ""
        for at, height, title in points:
            if not drawable(height):
                missing += 1
                path += " "
                continue
            path += f"{'L' if path and path[-1] != ' ' else 'M'}{across(at):.1f} {down(height):.1f}"
            transform = f'transform="translate({across(at):.1f} {down(height):.1f})"'
            marks.append(
                f'<path class="{one.mark}" d="{PATHS[one.mark]}" {transform}><title>{text(title)}</title></path>'
            )
        line = f'<path class="line" d="{path.strip()}"/>' if marks else ""
        parts.append(f'<g class="series" style="color: {one.color}">{line}{"".join(marks)}</g>')
    more = f" {missing} missing or non-finite values are not drawn." if missing else ""
    return (
        f'<figure><ul class="legend">{legend(series)}</ul><div class="scroll" tabindex="0" '
        f'role="region" aria-label="chart"><svg viewBox="0 0 {WIDTH} {label + 4}" role="img" '
        f'aria-label="{text(caption)}">\n{chr(10).join(parts)}\n</svg></div>'
        f"<figcaption>{text(caption + more)}</figcaption></figure>\n"
    )


def legend(series: Iterable[Series]) -> str:
    """Return the items of the legend; a name whose series have several colors is shown in the text color."""
    colors: dict[tuple[str, str], set[str]] = {}
    for one in series:
        colors.setdefault((one.name, one.mark), set()).add(one.color)
    return "".join(
        f'<li><svg viewBox="-7 -6 14 12" style="color: {names.pop() if len(names) == 1 else "currentColor"}">'
        f'<path class="{mark}" d="{PATHS[mark]}"/></svg> {text(name)}</li>'
        for (name, mark), names in colors.items()
    )
