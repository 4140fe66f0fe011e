"""SVG histograms for HTML pages, with axes and a title for every bar."""

from collections.abc import Sequence

from pixart.html.page import text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 540, 220, 60, 530, 8, 170
TICKS = 6


def histogram(caption: str, edges: Sequence[float], counts: Sequence[int], label: str) -> str:
    """Return a figure of `counts` in the intervals between `edges`; `label` names the horizontal axis with its unit.

    All bars have the same width, whatever their interval.
    """
    highest = max([*counts, 1])
    width = (RIGHT - LEFT) / len(counts)
    parts = []
    for share in (0, 0.5, 1):
        level = BOTTOM - share * (BOTTOM - TOP)
        parts.append(f'<path class="{"grid" if share else "zero"}" d="M{LEFT} {level:.1f}H{RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{level + 4:.1f}" text-anchor="end">{short(share * highest)}</text>')
    for index, count in enumerate(counts):
        height = count / highest * (BOTTOM - TOP)
        title = f"{edges[index]:g} to {edges[index + 1]:g}: {count:,}"
        parts.append(
            f'<rect class="bar" x="{LEFT + index * width:.1f}" y="{BOTTOM - height:.1f}" width="{width - 0.6:.1f}" '
            f'height="{height:.1f}"><title>{title}</title></rect>'
        )
    for index in range(0, len(edges), max(1, len(counts) // TICKS)):
        at = LEFT + index * width
        parts.append(f'<text x="{at:.1f}" y="{BOTTOM + 16}" text-anchor="middle">{edges[index]:.4g}</text>')
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 36}" text-anchor="middle">{text(label)}</text>')
    parts.append(f'<text transform="translate(14 {(TOP + BOTTOM) / 2}) rotate(-90)" text-anchor="middle">images</text>')
    return (
        f'<figure class="half"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{text(caption)}">\n{chr(10).join(parts)}\n</svg>'
        f"<figcaption>{text(caption)}</figcaption></figure>\n"
    )


def short(count: float) -> str:
    """Format a count with three significant digits, and k or M for thousands or millions."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.3g}"
