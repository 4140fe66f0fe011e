"""Elements of the HTML pages: document, table, badge; they follow the light or dark scheme, and escape every value."""

import math
from collections.abc import Iterable, Sequence
from html import escape

LONGEST_WORD = 28  # characters of a word that is not broken in a table
COLORS = 8  # --c0 to --c7 of the style, for series in charts
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6470; --rule: #d5dae0; --ground: #fff; --panel: #f5f7f9;
  --shade: #0005; --good: #17733a; --bad: #b3261e; --warn: #8f4d00; --c0: #0b62b8; --c1: #b04a00; --c2: #17733a;
  --c3: #9a2a7e;
  --c4: #6b4fc4; --c5: #00707a; --c6: #8a5a00; --c7: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a0a9b4; --rule: #3a424b; --ground: #15181c;
  --panel: #1e2329; --shade: #fff5; --good: #5fd08a; --bad: #ff8a80; --warn: #ffb65c; --c0: #6db3f8;
  --c1: #ff9d57; --c2: #5fd08a;
  --c3: #f08bd2; --c4: #b19cff; --c5: #4fd0dc; --c6: #e3c04e; --c7: #ff8a80; } }
body { margin: 0 auto; max-width: 1160px; padding: 1rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; } h1, h2, h3, p, figcaption { overflow-wrap: anywhere; } a { color: var(--c0); }
@media (max-width: 600px) { body { padding: .5rem .6rem 3rem; } h1 { font-size: 1.25rem; } }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; }
.badge { color: var(--ground); border-radius: .3em; padding: .05em .5em; font-weight: 700; font-size: .85em;
  white-space: nowrap; }
.pass { background: var(--good); } .fail { background: var(--bad); }
.alarm { border-left: 5px solid var(--warn); background: var(--panel); padding: .6rem 1rem; }
.alarm.failed { border-color: var(--bad); } .bad { color: var(--bad); } figcaption { color: var(--soft); }
.scroll { overflow: auto; max-height: 80vh; margin: .6rem 0;
  background: linear-gradient(to right, var(--ground) 30%, transparent) left / 24px 100%,
    linear-gradient(to left, var(--ground) 30%, transparent) right / 24px 100%,
    linear-gradient(to right, var(--shade), transparent) left / 9px 100%,
    linear-gradient(to left, var(--shade), transparent) right / 9px 100%;
  background-repeat: no-repeat; background-attachment: local, local, scroll, scroll; }
.scroll:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; } thead { position: sticky; top: 0; background: var(--ground); }
.long { overflow-wrap: anywhere; } td:first-child { min-width: 11em; }
.number { text-align: right; white-space: nowrap; }
.wide td:first-child { position: sticky; left: 0; background: var(--ground); white-space: nowrap; }
.wide td + td { text-align: right; white-space: nowrap; } .wide th + th { text-align: right; white-space: nowrap; }
.wide th, .wide td { padding: .15rem .35rem; font-size: 12px; }
summary { cursor: pointer; font-weight: 600; } figure { margin: 1rem 0 1.5rem; } figcaption { font-size: 13px; }
svg { display: block; overflow: visible; } figure .scroll svg { width: 100%; min-width: 860px; height: auto; }
svg text { fill: currentColor; font-size: 12px; } .grid { stroke: var(--rule); } .zero { stroke: var(--soft); }
.line { fill: none; stroke: currentColor; stroke-width: 1.3; stroke-opacity: .55; } .dot { fill: currentColor; }
.ring, .cross { fill: none; stroke: currentColor; stroke-width: 1.2; }
.faint, .curve { fill: transparent; } .legend .faint, .legend .curve { fill: currentColor; }
.series:has(.curve) .line { stroke-opacity: 1; stroke-width: 1.8; }
.event { stroke: var(--warn); stroke-width: 1.6; stroke-dasharray: 5 3; fill: none; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: 0; font-size: 13px; }
.legend svg { display: inline-block; width: 14px; height: 12px; vertical-align: -1px; }
"""


class Html(str):
    """Markup that `text` does not escape."""


def text(value: object) -> str:
    """Return a value as HTML: escaped, with "-" for None and three significant digits for a float."""
    if isinstance(value, Html):
        return value
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else f'<b class="bad">{value}</b>'
    return escape(str(value).encode(errors="replace").decode())  # a file name may not be valid UTF-8


def document(title: str, body: str, style: str = "") -> str:
    """Return a self-contained page: it loads no script, font or other file."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}{style}</style></head>\n<body>\n{body}</body></html>\n"
    )


def emphasis(value: float | None, bad: bool) -> Html:
    """Return a value as HTML, highlighted if it is bad."""
    return Html(f'<b class="bad">{text(value)}</b>' if bad else text(value))


def badge(passed: bool) -> Html:
    """Return the badge PASS or FAIL."""
    return Html('<span class="badge pass">PASS</span>' if passed else '<span class="badge fail">FAIL</span>')


def table(head: Sequence[str], rows: Iterable[Sequence[object]], groups: Sequence[tuple[str, int]] = ()) -> str:
    """Return a table; `head` may be empty, and `groups` are headings above it with the number of columns of each."""
    above = "".join(f'<th colspan="{columns}">{text(name)}</th>' for name, columns in groups)
    names = "".join(f"<th>{text(name)}</th>" for name in head)
    heads = "".join(f"<tr>{cells}</tr>" for cells in (above, names) if cells)
    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>\n" for row in rows)
    wide = ' class="wide"' if groups else ""
    region = '<div class="scroll" tabindex="0" role="region" aria-label="table">'
    return f"{region}<table{wide}><thead>{heads}</thead><tbody>\n{body}</tbody></table></div>\n"


def cell(value: object) -> str:
    """Return a value as a cell of a table, in which only words as long as a path break within the word."""
    if isinstance(value, float | int):
        return f'<td class="number">{text(value)}</td>'
    is_long = not isinstance(value, Html) and any(len(word) > LONGEST_WORD for word in str(value).split())
    return f'<td class="long">{text(value)}</td>' if is_long else f"<td>{text(value)}</td>"
