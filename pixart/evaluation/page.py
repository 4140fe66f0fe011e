"""The page of an evaluation: figures with intervals, curves, skills, and the best and worst prompts with images."""

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from pixart.evaluation.protocol import remarks
from pixart.html.charts import Series, chart, linear_axis
from pixart.html.page import COLORS, Html, document, table, text

# Heading, explanation and whether lower is better, of each figure.
FIGURES = {
    "fd": ("Fréchet distance (FD)", "Distance of Gaussians fitted to the features of all images.", True),
    "kid": ("Kernel distance (KID)", "Unbiased squared MMD of the features; 0 for equal distributions.", True),
    "sliced_wasserstein": (
        "Sliced Wasserstein distance",
        "Mean squared distance over 512 directions, times width.",
        True,
    ),
    "precision": ("Precision", "Share of generated images within the reference.", False),
    "recall": ("Recall", "Share of reference images within the generated ones.", False),
    "density": ("Density", "Mean number of neighborhoods of the reference around a generated image.", False),
    "coverage": ("Coverage", "Share of reference images with a generated image nearby.", False),
    "counted": ("Counted prompts", "Share of images whose main color and main shape are right.", False),
    "color": ("Color", "Share of images whose main color is right.", False),
    "shape": ("Shape", "Share of images whose main shape is right.", False),
    "soft_tifa": ("Soft-TIFA", "Geometric mean of the probabilities of the right answers, by image.", False),
    "soft_tifa_arithmetic": (
        "Soft-TIFA, arithmetic",
        "Mean of the probabilities of the right answers, by image.",
        False,
    ),
    "all_right": ("All questions right", "Share of images with every question answered as it should be.", False),
    "clip_score": ("CLIP score", "100 times the cosine of the embeddings of image and prompt.", False),
    "caption_similarity": ("Caption similarity", "Cosine of MiniLM's embeddings of prompt and caption.", False),
}
RANKINGS = ("soft_tifa", "counted", "clip_score", "caption_similarity")  # the first that exists ranks the prompts
NUM_RANKED = 8
THUMBNAIL_PIXELS = 160
STYLE = """
.ranked { display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 14px; }
.ranked figure { margin: 0; } .ranked img { width: 100%; border: 1px solid var(--rule); image-rendering: auto; }
.facts td:first-child { color: var(--soft); } .facts td { white-space: normal; }
.figures td { white-space: nowrap; } .figures td:first-child { min-width: 15em; } .interval { color: var(--soft); }
"""
Variant = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """An image with the score of its prompt; `image` is None if it was not kept."""

    prompt: str
    score: float
    image: Path | None


def page(
    name: str,
    facts: Mapping[str, object],
    variants: Sequence[Variant],
    best: Sequence[Ranked],
    worst: Sequence[Ranked],
    ranking: str,
) -> str:
    """Return the page. `variants` are those of the results, and `ranking` is the figure that ranks the prompts."""
    names = [figure for figure in FIGURES if any(figure in variant["figures"] for variant in variants)]
    body = (
        f'<h1>Evaluation {text(name)}</h1>\n<div class="facts">{table((), facts.items())}</div>'
        f"{protocol_notice(variants)}{figures_table(names, variants)}"
        f"{''.join(curve_section(figure, variants) for figure in names)}"
        f"{skills_section(variants)}{ranked_section(best, worst, ranking)}"
    )
    return document(f"Evaluation {name}", body, STYLE)


def protocol_notice(variants: Sequence[Variant]) -> str:
    """Return a notice that figures of different protocols cannot be compared, if there is more than one."""
    protocols = {variant["protocol"]["hash"] for variant in variants}
    if len(protocols) == 1:
        return f"<p>All figures have the protocol <code>{text(protocols.pop())}</code>.</p>\n"
    return (
        f'<p class="alarm">The figures have {len(protocols)} protocols, such as other guidance or steps. Only figures '
        "of one protocol are on one curve.</p>\n"
    )


def label(variant: Variant) -> str:
    """Return the settings of a variant in words."""
    weights = "EMA" if variant["weights"] == "ema" else "master weights"
    return f"step {variant['step']:,}, {weights}, {variant['steps']} steps, guidance {variant['guidance']:g}"


def figure_cell(figure: Mapping[str, float] | None) -> Html:
    """Return a figure with its interval and number as a cell of a table."""
    if figure is None:
        return Html("-")
    value, low, high = (f"{figure[name]:.4g}" for name in ("value", "low", "high"))
    interval = f"{low} to {high}"
    return Html(f'{value} <span class="interval">({interval}; n {figure["count"]:,})</span>')


def figures_table(names: Sequence[str], variants: Sequence[Variant]) -> str:
    """Return the table of all figures, with a row per variant, and remarks on figures that rank nothing."""
    head = ["checkpoint and settings", "protocol", *(FIGURES[name][0] for name in names)]
    rows = [
        [label(variant), variant["protocol"]["hash"], *(figure_cell(variant["figures"].get(name)) for name in names)]
        for variant in variants
    ]
    sentences = dict.fromkeys(remark for variant in variants for remark in remarks(variant["figures"]))
    notes = "".join(f"<p>{text(remark)}</p>\n" for remark in sentences)
    return f'<h2>Figures with 95 % intervals</h2>\n<div class="figures">{table(head, rows)}</div>\n{notes}'


def curve_section(name: str, variants: Sequence[Variant]) -> str:
    """Return the curves of a figure over the steps of training and over the guidance, where there are several."""
    heading, explanation, lower = FIGURES[name]
    better = "Lower is better." if lower else "Higher is better."
    present = [variant for variant in variants if name in variant["figures"]]
    charts = [
        curves(name, present, "optimizer step", lambda one: one["step"], same_protocol, f"{explanation} {better}"),
        curves(name, present, "guidance", lambda one: one["guidance"], same_checkpoint, f"{explanation} {better}"),
    ]
    return f"<h2>{text(heading)}</h2>\n{''.join(charts)}" if any(charts) else ""


def same_protocol(variant: Variant) -> tuple[str, str]:
    """Return what the points of a curve over steps have in common."""
    return variant["protocol"]["hash"], f"{variant['weights']}, guidance {variant['guidance']:g}"


def same_checkpoint(variant: Variant) -> tuple[Any, str]:
    """Return what the points of a curve over guidance have in common: everything but the guidance."""
    protocol = {key: value for key, value in variant["protocol"].items() if key not in ("guidance", "hash")}
    return (variant["checkpoint"], str(sorted(protocol.items()))), f"step {variant['step']:,}, {variant['weights']}"


def curves(
    name: str,
    variants: Sequence[Variant],
    across: str,
    position: Callable[[Variant], float],
    common: Callable[[Variant], tuple[Any, str]],
    caption: str,
) -> str:
    """Return the chart of a figure with a curve for each group of at least two variants; "" without one."""
    groups: dict[Any, list[Variant]] = {}
    for variant in sorted(variants, key=position):
        groups.setdefault(common(variant)[0], []).append(variant)
    series: list[Series] = []
    for index, group in enumerate(group for group in groups.values() if len({position(one) for one in group}) > 1):
        color, title = f"var(--c{index % COLORS})", common(group[0])[1]
        x = [position(one) for one in group]
        y = [one["figures"][name]["value"] for one in group]
        titles = [f"{across} {at:,}: {value:.4g}" for at, value in zip(x, y, strict=True)]
        series.append(Series(name=title, x=x, y=y, titles=titles, color=color, mark="dot"))
        for at, one in zip(x, group, strict=True):
            ends = [one["figures"][name][end] for end in ("low", "high")]
            words = [f"{across} {at:,}: 95 % interval {ends[0]:.4g} to {ends[1]:.4g}"] * 2
            series.append(Series(name="95 % interval", x=[at, at], y=ends, titles=words, color=color, mark="curve"))
    if not series:
        return ""
    positions = [at for one in series for at in one.x]
    x_axis = linear_axis(across, (), min(positions), max(positions))
    return chart(caption, series, x_axis, linear_axis(text(FIGURES[name][0]), series))


def skills_section(variants: Sequence[Variant]) -> str:
    """Return the table of the judged skills; "" if nothing was judged."""
    skills = sorted({skill for variant in variants for skill in variant["skills"]})
    judged = [variant for variant in variants if variant["judged_by"]]
    if not judged:
        return ""
    head = ["skill", *(label(variant) for variant in judged)]
    rows = [[skill, *(figure_cell(variant["skills"].get(skill)) for variant in judged)] for skill in skills]
    rows.append(["questions not judged", *(variant["not_judged"] for variant in judged)])
    return (
        f"<h2>Skills, judged by {text(judged[0]['judged_by'])}</h2>\n"
        "<p>Arithmetic mean of the probability that the judge gives to the right answer.</p>\n"
        f'<div class="figures">{table(head, rows)}</div>'
    )


def ranked_section(best: Sequence[Ranked], worst: Sequence[Ranked], ranking: str) -> str:
    """Return the best and the worst prompts; "" if no figure ranks them."""
    if not best:
        return ""
    name = FIGURES[ranking][0]
    return "".join(
        f'<h2>{heading} prompts by {text(name)}</h2>\n<div class="ranked">{"".join(map(ranked_figure, items))}</div>\n'
        for heading, items in (("Best", best), ("Worst", worst))
    )


def ranked_figure(item: Ranked) -> str:
    """Return an image with its prompt and score."""
    image = ""
    if item.image is not None and item.image.exists():
        from PIL import Image

        small = BytesIO()
        with Image.open(item.image) as picture:
            copy = picture.convert("RGB")
            copy.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
            copy.save(small, "JPEG", quality=85)
        source = b64encode(small.getvalue()).decode()
        image = f'<img alt="{text(item.prompt)}" src="data:image/jpeg;base64,{source}">'
    return f"<figure>{image}<figcaption>{text(item.score)}: {text(item.prompt)}</figcaption></figure>"
