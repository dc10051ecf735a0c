"""Parts of a self-contained HTML page: no network, no script but the page's own, every text escaped, light and dark.

Colours have names (`--ink`, `--s0` …) that the style sheet gives twice, so that figures follow the reader's theme.
"""

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.runlog import score_text

#: Nothing may be loaded and nothing may run but a page's own script; pictures are part of the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

# Series colours: Okabe and Ito 2008, told apart with any colour vision; lighter on dark ground where they need it.
_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfcfa; --card: #ffffff; --ink: #1d2125; --muted: #5d666f; --faint: #8b949c; --line: #e4e1db;
  --blank: #dfe3e6;
  --accent: #0b5f8a; --soft: #eaf1f4;
  --s0: #0072b2; --s1: #d55e00; --s2: #009e73; --s3: #a8568a; --s4: #b8860b; --s5: #3f9bd0;
  --sans: "Inter", "Segoe UI", system-ui, -apple-system, "Helvetica Neue", Arial, sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1b1f23; --ink: #e8e6e1; --muted: #a4acb3; --faint: #79828a; --line: #30363c;
    --blank: #525a61;
    --accent: #6db9e0; --soft: #1f2a31;
    --s0: #56b4e9; --s1: #f08a4b; --s2: #2fbf95; --s3: #d68bbb; --s4: #e6b93d; --s5: #9bd3f5;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.6 var(--sans); text-wrap: pretty; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }
h1, h2, h3 { font-weight: 650; line-height: 1.2; letter-spacing: -.015em; text-wrap: balance; }
h1 { font-size: clamp(1.5rem, 4.5vw, 2.8rem); margin: .2rem 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.45rem; margin: 0 0 .35rem; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .35rem 0 .9rem; max-width: 46rem; }
a { color: var(--accent); }
code, pre { font-family: var(--mono); font-size: .86em; overflow-wrap: anywhere; }
td code { white-space: nowrap; }
td:not(:has(code)) { max-width: min(30rem, 60vw); }
td, .legend span { overflow-wrap: break-word; }
.kicker { font-size: .78rem; letter-spacing: .09em; text-transform: uppercase; color: var(--muted); }
.lead { font-size: 1.08rem; color: var(--muted); }
.note, figcaption { font-size: .86rem; color: var(--muted); max-width: 46rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1.4rem 0 0; padding: .7rem 0;
  border-block: 1px solid var(--line); font-size: .9rem; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { padding-top: 3rem; }
.hero { display: grid; grid-template-columns: minmax(max-content, 1fr) 2.2fr; gap: 1.5rem 3rem; align-items: center;
  margin-top: 1.8rem; }
.score { font-size: clamp(3.2rem, 9vw, 4.6rem); font-weight: 650; line-height: 1.05; letter-spacing: -.045em;
  white-space: nowrap; }
.bars { display: grid; grid-template-columns: fit-content(55%) 1fr max-content; gap: .4rem .8rem;
  align-items: center; font-size: .92rem; }
.bars .track { height: .8rem; }
.bars .bar { display: block; height: 100%; border-radius: 2px; background: var(--faint); opacity: .55; }
.bars .own .bar { background: var(--accent); opacity: 1; }
.bars > div { display: contents; }
.bars .own { font-weight: 650; }
.bars .label { overflow-wrap: anywhere; }
.bars .number, td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.bars .number, td.number { white-space: nowrap; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1rem; margin: 1.8rem 0 0;
  padding: 0; }
.facts div { border-top: 2px solid var(--line); padding-top: .45rem; }
.facts dt { font-size: .8rem; color: var(--muted); }
.facts dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .4rem 0 1rem; min-width: 60%; }
th { text-align: left; vertical-align: bottom; font-weight: 600; color: var(--muted); }
thead { border-bottom: 1px solid var(--ink); }
th, td { padding: .34rem 1.1rem .34rem 0; }
td { border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
tr.own td { font-weight: 650; }
tr.floor td { color: var(--muted); }
tr.floor td:first-child { white-space: nowrap; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.2rem 1.6rem;
  margin: 1rem 0; align-items: start; }
.panels.small { grid-template-columns: repeat(auto-fit, minmax(min(47%, 13rem), 1fr)); }
.panels > figure:only-child { max-width: 34rem; }
figure { margin: 0; min-width: 0; }
figure.wide { margin: 1rem 0 1.4rem; }
figure.wide .scroll svg { min-width: 44rem; }
.sideways { display: none; font-size: .8rem; color: var(--muted); }
h4 { margin: 0 0 .2rem; font: 600 .95rem/1.35 var(--sans); overflow-wrap: anywhere; }
figcaption { margin-top: .25rem; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.2rem; align-items: center; margin: .4rem 0; font-size: .86rem;
  color: var(--muted); }
.legend span { max-width: 100%; }
.legend i { display: inline-block; width: 1.3rem; height: .28rem; border-radius: 2px; margin-right: .4rem;
  vertical-align: .22em; }
.ramp { display: inline-block; width: 9rem; height: .7rem; border-radius: 2px; }
details { border: 1px solid var(--line); border-radius: 6px; background: var(--card); margin: .6rem 0; }
summary { cursor: pointer; padding: .55rem .9rem; font-weight: 600; overflow-wrap: anywhere; }
details > div { padding: 0 .9rem .5rem; }
pre { white-space: pre-wrap; line-height: 1.5; margin: .2rem 0; }
.missing { border-left: 3px solid var(--s1); background: var(--soft); padding: .6rem .9rem; font-size: .92rem; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: .84rem;
  color: var(--muted); }
@media (max-width: 44rem) { .sideways { display: block; } }
@media (max-width: 44rem) { .hero { grid-template-columns: 1fr; } main { padding-top: 1.5rem; } }
@media print { details > * { display: block; } section { break-inside: avoid; } nav { display: none; } }
"""

#: Series colours of the style sheet.
COLOURS = 6


class Markup(str):
    """Text that is HTML already: made by this module or by a figure, never by data."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Any value as HTML: markup as it is, everything else escaped, None as a dash."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape("–" if value is None else str(value)))


def join(*parts: object) -> Markup:
    """Parts one after the other, each as by `text`."""
    return Markup("".join(text(part) for part in parts))


def element(tag: str, *content: object, **attributes: str) -> Markup:
    """``<tag attribute="…">content</tag>``; a trailing underscore of an attribute's name is dropped, others are dashes.

    >>> element("p", "a < b", class_="note")
    '<p class="note">a &lt; b</p>'
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for name, value in attributes.items() if value
    )
    return Markup(f"<{tag}{given}>{join(*content)}</{tag}>")


def number(value: float | None, digits: int = 4) -> Markup:
    """A number with fixed digits and thousands separators, or a dash."""
    return text(None if value is None else f"{value:,.{digits}f}")


def table(
    head: Sequence[str], rows: Sequence[Sequence[object]], *, words: int = 1, classes: Sequence[str] = ()
) -> Markup:
    """A table that scrolls sideways where it must.

    Args:
        head: names of the columns.
        rows: cells, each shown as by `text`.
        words: columns at the left that hold words; the others hold numbers.
        classes: class of each row, if any.
    """

    def cells(tag: str, row: Sequence[object]) -> Markup:
        return join(*(element(tag, cell, class_="number" if at >= words else "") for at, cell in enumerate(row)))

    classes = classes or [""] * len(rows)
    body = [element("tr", cells("td", row), class_=kind) for row, kind in zip(rows, classes, strict=True)]
    whole = element("table", element("thead", element("tr", cells("th", head))), element("tbody", *body))
    return element("div", whole, class_="scroll")


def bars(rows: Sequence[tuple[str, float, bool]]) -> Markup:
    """Horizontal bars with their numbers: (label, value, whether it is the subject of the page)."""
    largest = max((value for _, value, _ in rows), default=1.0) or 1.0
    lines = [
        element(
            "div",
            element("span", label, class_="label"),
            element("span", element("i", class_="bar", style=f"width: {100 * value / largest:.1f}%"), class_="track"),
            element("span", score_text(value), class_="number"),
            class_="own" if own else "",
        )
        for label, value, own in rows
    ]
    return element("div", *lines, class_="bars")


def facts(values: Mapping[str, object]) -> Markup:
    """Names and values as a row of tiles."""
    return element(
        "dl",
        *(element("div", element("dt", name), element("dd", value)) for name, value in values.items()),
        class_="facts",
    )


def figure(drawing: Markup, *, title: str = "", caption: object = "", wide: bool = False) -> Markup:
    """A drawing with its title and caption; a wide one scrolls sideways on a small screen."""
    return element(
        "figure",
        element("h4", title) if title else "",
        element("div", "scroll sideways to see all →", class_="sideways") if wide else "",
        element("div", drawing, class_="scroll") if wide else drawing,
        element("figcaption", caption) if caption else "",
        class_="wide" if wide else "",
    )


def panels(drawings: Sequence[Markup], *, small: bool = False) -> Markup:
    """Figures side by side, as many as the screen has room for."""
    return element("div", *drawings, class_="panels small" if small else "panels")


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Colour keys: (label, colour)."""
    keys = [element("span", element("i", style=f"background: {colour}"), label) for label, colour in entries]
    return element("div", *keys, class_="legend")


def series_colour(place: int) -> str:
    """Colour of a series for a key, `COLOURS` of them in turn."""
    return f"var(--s{place % COLOURS})"


def note(words: object) -> Markup:
    """A remark in smaller letters."""
    return element("p", words, class_="note")


def missing(reason: str) -> Markup:
    """What cannot be shown, and why."""
    return element("p", reason, class_="missing")


def details(summary: str, content: object) -> Markup:
    """Something that opens on a click."""
    return element("details", element("summary", summary), element("div", content))


def page(title: str, body: Markup, *, style: str = "", script: str = "") -> str:
    """The whole document.

    Args:
        title: of the document.
        body: what is on it.
        style: added to the style sheet.
        script: the only one that may run, at the end of the page; "" = none.
    """
    policy = _POLICY
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
        body = join(body, Markup(f"<script>{script}</script>"))
    head = join(
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="referrer" content="no-referrer">'),
        element("title", title),
        element("style", Markup(_STYLE + style)),
    )
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body><main>{body}</main></body>\n</html>\n'


def section(anchor: str, title: str, *content: Any) -> Markup:
    """A part of the page that the navigation can point to."""
    return element("section", element("h2", title), *content, id=anchor)
