"""The audit page: one self-contained HTML file without scripts, fonts or network access."""

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pixart.data.images.screening import Reason
from pixart.html.histogram import histogram
from pixart.html.page import Html, badge, document, table, text

HISTOGRAMS = {
    "brightness": (
        "mean luma, 0 black to 1 white",
        "Brightness. A peak at either end means many black or white images.",
    ),
    "entropy": ("entropy of the luma histogram, bits", "Entropy. An image near 0 bits has hardly more than one color."),
    "shorter side": ("shorter side, pixels", "Size, on a logarithmic axis."),
    "aspect": ("aspect ratio, longer over shorter side", "Aspect ratio. The center crop removes more of wider images."),
    "words": ("words per caption", "Caption length. The last bar includes all longer captions."),
}
# Texts for reason codes that do not explain themselves. The codes are stored in caption parts and must not change.
REASON_LABELS = {
    Reason.SOLID_COLOR: "solid color",
    Reason.UNIFORM: "uniform area",
    "caption: cut": "caption: truncated",
    "caption: narration": "caption: meta-commentary",
    "caption: no text": "caption: not prose",
}
GALLERY = """
.half { display: inline-block; width: 540px; max-width: 100%; padding-right: 12px;
  box-sizing: border-box; }
.half svg { width: 100%; height: auto; } .bar { fill: var(--c0); }
.gallery { display: flex; flex-wrap: wrap; gap: 10px; }
.gallery figure { margin: 0; width: 104px; font-size: 12px; overflow-wrap: anywhere; color: var(--soft); }
.gallery img { max-width: 104px; max-height: 84px; border: 1px solid var(--rule); image-rendering: auto; }
.gallery.large figure { width: min(100%, 260px); font-size: 13px; color: var(--ink); }
.gallery.large img { width: 100%; max-width: 100%; max-height: 260px; object-fit: contain; }
.none { width: 82px; height: 48px; border: 1px dashed var(--rule); }
.group { display: inline-flex; gap: 4px; margin: 0 14px 10px 0; border-left: 3px solid var(--rule); padding-left: 6px; }
"""
Thumbnail = tuple[str, bytes]  # caption and JPEG, which is empty if the image could not be decoded


@dataclass(frozen=True, kw_only=True, slots=True)
class AdoptedRows:
    """What is known of a dataset of precomputed latents."""

    source: str
    form: str
    captions: Sequence[tuple[str, str, str]]  # id, caption and short caption of sampled rows


def page(
    name: str,
    summary: Mapping[str, Any],
    rejected: Mapping[str, Sequence[Thumbnail]],
    accepted: Sequence[Thumbnail],
    duplicates: Sequence[tuple[str, int, Sequence[Thumbnail]]],
    adopted: AdoptedRows | None = None,
    extremes: Mapping[str, Sequence[Thumbnail]] | None = None,
) -> str:
    """Render the page of an audit.

    `summary` comes from `statistics.summary`, `rejected` maps reasons to examples, and each of `duplicates` is the
    kind of a group, its number of images and thumbnails of the first ones. `adopted` describes a dataset that has no
    images, and so no accepted ones and no duplicates. `extremes` maps headings to images that deserve a look.
    """
    if adopted:
        origin, ending = adopted_rows(adopted), ""
    else:
        origin, ending = "", duplicate_groups(summary, duplicates)
    sections = (
        verdict(name, summary),
        origin,
        rejections(summary, rejected),
        f"<h2>Accepted images</h2>\n<p>An evenly spaced sample.</p>{gallery(accepted, 'large')}" if accepted else "",
        "".join(f"<h2>{text(name)}</h2>\n{gallery(shown, 'large')}" for name, shown in (extremes or {}).items()),
        shapes(summary),
        distributions(summary),
        first_words(summary),
        ending,
    )
    return document(title(name, summary), "".join(sections), GALLERY)


def title(name: str, summary: Mapping[str, Any]) -> str:
    return f"{'PASS' if summary['passed'] else 'FAIL'}: audit of {name}"


def adopted_rows(adopted: AdoptedRows) -> str:
    """Return the section about the origin of an adopted dataset, with a sample of its captions."""
    rows = [(id, caption or "none", short or "none") for id, caption, short in adopted.captions]
    sample = table(("row", "caption", "short caption"), rows) if rows else ""
    return (
        f"<h2>Adopted captions</h2>\n<p>Captions and latents were adopted from {text(adopted.source)} "
        f"({text(adopted.form)}). The dataset has no images, so that neither their properties nor duplicates are "
        f"known. An evenly spaced sample of the valid rows:</p>\n{sample}"
    )


def verdict(name: str, summary: Mapping[str, Any]) -> str:
    rows = [
        (check["name"], format_value(check), format_limit(check), badge(check["passed"])) for check in summary["checks"]
    ]
    failed = ", ".join(check["name"] for check in summary["checks"] if not check["passed"])
    alarm = (
        f'<p class="alarm failed"><b>This dataset failed its audit:</b> {text(failed)}.<br>'
        "Training refuses it unless --accept-failed-audit is given.</p>\n"
    )
    return (
        f"<h1>Dataset audit {badge(summary['passed'])}</h1>\n{alarm if failed else ''}"
        f"<p>{text(name)}: {summary['rows']:,} images, {summary['valid']:,} valid.</p>\n"
        + table(("check", "measured", "limit", "result"), rows)
    )


def format_value(check: Mapping[str, Any]) -> str:
    return f"{check['value']:,}" if isinstance(check["value"], int) else f"{check['value']:.2%}"


def format_limit(check: Mapping[str, Any]) -> str:
    is_count = isinstance(check["value"], int)
    return f"at least {check['limit']}" if is_count else f"at most {check['limit']:.2%}"


def rejections(summary: Mapping[str, Any], rejected: Mapping[str, Sequence[Thumbnail]]) -> str:
    rows = [
        (label_of(reason), f"{count:,}", f"{count / max(1, summary['rows']):.2%}")
        for reason, count in summary["reasons"].items()
    ]
    if not rows:
        return "<h2>Rejected images</h2>\n<p>No image was rejected.</p>\n"
    galleries = "".join(
        f"<h3>{text(label_of(reason))}: {len(rejected[reason])} of {count:,}</h3>\n{gallery(rejected[reason])}"
        for reason, count in summary["reasons"].items()
    )
    return f"<h2>Rejected images</h2>\n{table(('reason', 'images', 'share'), rows)}{galleries}"


def label_of(reason: str) -> str:
    """Return the text that the page shows for a stored reason code."""
    return REASON_LABELS.get(reason, reason)


def shapes(summary: Mapping[str, Any]) -> str:
    """Return the section about the shapes of the training images, and what is cropped away for them."""
    if not summary["shapes"]:
        return ""
    rows = [
        (
            f"{shape['width']} x {shape['height']}",
            f"{shape['images']:,}",
            f"{shape['share']:.2%}",
            f"{shape['cropped']:.2%}",
            f"{shape['cropped_by_square']:.2%}",
        )
        for shape in summary["shapes"]
    ]
    cropped, square = (
        sum(shape["share"] * shape[key] for shape in summary["shapes"]) for key in ("cropped", "cropped_by_square")
    )
    head = ("width x height, pixels", "images", "share", "area cropped away", "by a square")
    return (
        f"<h2>Shapes of the training images</h2>\n<p>Cropping removes {cropped:.2%} of the images' area; a square "
        f"would remove {square:.2%}.</p>\n{table(head, rows)}"
    )


def distributions(summary: Mapping[str, Any]) -> str:
    figures = (
        histogram(caption, summary["histograms"][name]["edges"], summary["histograms"][name]["counts"], label)
        for name, (label, caption) in HISTOGRAMS.items()
        if name in summary["histograms"]
    )
    return f"<h2>Valid images</h2>\n{''.join(figures)}"


def first_words(summary: Mapping[str, Any]) -> str:
    rows = [(words, f"{count:,}", f"{count / summary['valid']:.2%}") for words, count in summary["first_words"].items()]
    return f"<h2>First words of captions</h2>\n{table(('first three words', 'captions', 'share'), rows)}"


def duplicate_groups(summary: Mapping[str, Any], groups: Sequence[tuple[str, int, Sequence[Thumbnail]]]) -> str:
    counts = summary["duplicates"]
    rows = [(kind, f"{counts[kind]['groups']:,}", f"{counts[kind]['rows']:,}") for kind in counts]
    galleries = "".join(
        f"<h3>{text(kind)} duplicates, {count:,} images</h3>{gallery(thumbnails, 'group')}"
        for kind, count, thumbnails in groups
    )
    return f"<h2>Duplicates</h2>\n{table(('kind', 'groups', 'images in groups'), rows)}{galleries}"


def gallery(thumbnails: Iterable[Thumbnail], style: str = "") -> Html:
    return Html(f'<div class="gallery {style}">{"".join(figure(*thumbnail) for thumbnail in thumbnails)}</div>\n')


def figure(caption: str, jpeg: bytes) -> str:
    image = (
        f'<img alt="" src="data:image/jpeg;base64,{b64encode(jpeg).decode()}">' if jpeg else '<div class="none"></div>'
    )
    return f"<figure>{image}<figcaption>{text(caption)}</figcaption></figure>"
