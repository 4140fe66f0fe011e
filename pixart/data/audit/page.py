"""A dataset's audit as one HTML page that needs nothing beside it: no script, no font, no network."""

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pixart.html.histogram import histogram
from pixart.html.page import Html, badge, document, table, text

HISTOGRAMS = {
    "brightness": ("mean luma, 0 black to 1 white", "Brightness. A peak at an end is a heap of black or white images."),
    "entropy": ("bits of the luma histogram", "Entropy. Near 0 an image has hardly more than one colour."),
    "shorter side": ("pixels of the shorter side", "Size, on a logarithmic axis."),
    "aspect": ("longer over shorter side", "Aspect. What is cut off by the centre crop grows to the right."),
    "words": ("words of the caption", "Length of captions. The last bar holds all that are longer."),
}
GALLERY = """
.half { display: inline-block; width: 540px; max-width: 100%; margin-right: 12px; }
.half svg { width: 100%; height: auto; } .bar { fill: var(--c0); }
.gallery { display: flex; flex-wrap: wrap; gap: 10px; }
.gallery figure { margin: 0; width: 104px; font-size: 11px; overflow-wrap: anywhere; color: var(--soft); }
.gallery img { max-width: 104px; max-height: 84px; border: 1px solid var(--rule); image-rendering: auto; }
.none { width: 82px; height: 48px; border: 1px dashed var(--rule); }
.group { display: inline-flex; gap: 4px; margin: 0 14px 10px 0; border-left: 3px solid var(--rule); padding-left: 6px; }
"""
Picture = tuple[str, bytes]  # what is written below it, and a JPEG or nothing


def page(
    name: str,
    summary: Mapping[str, Any],
    rejected: Mapping[str, Sequence[Picture]],
    accepted: Sequence[Picture],
    duplicates: Sequence[tuple[str, int, Sequence[Picture]]],
) -> str:
    """`summary` is that of `statistics.summary`; `duplicates` are kind, rows of the group, and its first pictures."""
    passed = summary["passed"]
    sections = (
        verdict(name, summary),
        reasons(summary, rejected),
        f"<h2>Accepted</h2>\n<p>A sample, evenly from all of it.</p>{gallery(accepted)}" if accepted else "",
        distributions(summary),
        openings(summary),
        same(summary, duplicates),
    )
    return document(f"{'PASS' if passed else 'FAIL'}: audit of {name}", "".join(sections), GALLERY)


def verdict(name: str, summary: Mapping[str, Any]) -> str:
    rows = [(check["name"], shown(check), limit(check), badge(check["passed"])) for check in summary["checks"]]
    failed = ", ".join(check["name"] for check in summary["checks"] if not check["passed"])
    alarm = (
        f'<p class="alarm failed"><b>This dataset is not fit for training:</b> {text(failed)}.<br>'
        "Training takes it with --accept-failed-audit only.</p>\n"
    )
    return (
        f"<h1>Audit of a dataset {badge(summary['passed'])}</h1>\n{alarm if failed else ''}"
        f"<p>{text(name)}: {summary['rows']:,} images, {summary['valid']:,} valid.</p>\n"
        + table(("check", "found", "limit", ""), rows)
    )


def shown(check: Mapping[str, Any]) -> str:
    return f"{check['value']:,}" if isinstance(check["value"], int) else f"{check['value']:.2%}"


def limit(check: Mapping[str, Any]) -> str:
    least = isinstance(check["value"], int)
    return f"at least {check['limit']}" if least else f"at most {check['limit']:.2%}"


def reasons(summary: Mapping[str, Any], rejected: Mapping[str, Sequence[Picture]]) -> str:
    rows = [
        (reason, f"{count:,}", f"{count / max(1, summary['rows']):.2%}") for reason, count in summary["reasons"].items()
    ]
    if not rows:
        return "<h2>Rejected</h2>\n<p>Nothing.</p>\n"
    galleries = "".join(
        f"<h3>{text(reason)}: {len(rejected[reason])} of {count:,}</h3>\n{gallery(rejected[reason])}"
        for reason, count in summary["reasons"].items()
    )
    return f"<h2>Rejected</h2>\n{table(('reason', 'images', 'share'), rows)}{galleries}"


def distributions(summary: Mapping[str, Any]) -> str:
    drawn = (
        histogram(caption, summary["histograms"][name]["edges"], summary["histograms"][name]["counts"], label)
        for name, (label, caption) in HISTOGRAMS.items()
    )
    return f"<h2>Valid images</h2>\n{''.join(drawn)}"


def openings(summary: Mapping[str, Any]) -> str:
    rows = [(words, f"{count:,}", f"{count / summary['valid']:.2%}") for words, count in summary["openings"].items()]
    return f"<h2>How captions begin</h2>\n{table(('first three words', 'captions', 'share'), rows)}"


def same(summary: Mapping[str, Any], groups: Sequence[tuple[str, int, Sequence[Picture]]]) -> str:
    found = summary["duplicates"]
    rows = [(kind, f"{found[kind]['groups']:,}", f"{found[kind]['rows']:,}") for kind in found]
    drawn = "".join(
        f"<h3>{text(kind)}, {count:,} images</h3>{gallery(pictures, 'group')}" for kind, count, pictures in groups
    )
    return f"<h2>Duplicates</h2>\n{table(('kind', 'groups', 'images in them'), rows)}{drawn}"


def gallery(pictures: Iterable[Picture], style: str = "") -> Html:
    return Html(f'<div class="gallery {style}">{"".join(figure(*picture) for picture in pictures)}</div>\n')


def figure(words: str, jpeg: bytes) -> str:
    picture = (
        f'<img alt="" src="data:image/jpeg;base64,{b64encode(jpeg).decode()}">' if jpeg else '<div class="none"></div>'
    )
    return f"<figure>{picture}<figcaption>{text(words)}</figcaption></figure>"
