"""Building blocks of a report: one HTML page that needs nothing beside it, no script, no network.

Every text that comes from outside (file names, class names, reasons) is escaped.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from unfreeze.reports.plots import to_data_uri

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5d6778; --line: #dfe3ea; --paper: #ffffff; --tint: #f5f7fa;
        --accent: #0072b2; --bad: #c2410c; --good: #00795a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa5b8; --line: #333c4b; --paper: #151a22;
        --tint: #1e2530; --accent: #56b4e9; --bad: #ff9a5c; --good: #4cd0a5; } }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 5rem; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .2rem; } h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1.02rem; margin: 1.4rem 0 .4rem; } p { margin: .5rem 0; } .soft { color: var(--soft); }
nav { margin: 1rem 0; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; } a { color: var(--accent); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(max(11rem, (100% - 2.4rem) / var(--across)), 1fr)); gap: .8rem; margin: 1rem 0; }
.card { background: var(--tint); border-radius: .6rem; padding: .8rem 1rem; } .card b { display: block; font-size: 1.65rem; }
.card small { color: var(--soft); display: block; line-height: 1.35; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .93rem; margin: .6rem 0; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; } tr.chosen { font-weight: 650; }
img.plot { max-width: 100%; height: auto; background: #fff; border-radius: .5rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .8rem; margin: .7rem 0; }
figure { margin: 0; font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere; }
figcaption { margin-top: .3rem; } figcaption b { font-weight: 600; } figcaption span { color: var(--soft); }
figcaption b, figcaption span { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; }
details { margin: .7rem 0; } summary { cursor: pointer; color: var(--accent); }
figure img { width: 100%; height: 8rem; object-fit: contain; background: var(--tint); border-radius: .4rem; }
.note { border-left: 4px solid var(--bad); padding: .3rem .9rem; margin: .7rem 0; background: var(--tint); }
.fine { border-left-color: var(--good); } .pairs .gallery { grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
.pair { display: flex; gap: .3rem; } .pair img { width: 50%; } @media print { nav { display: none; } h2, h3 { break-after: avoid; } figure, .card, tr { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Section:
    """A part of a page: title, and HTML that is safe already."""

    title: str
    body: str


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """A whole page of sections with a line of links to them."""
    links = "".join(f'<a href="#part{i}">{escape(s.title)}</a>' for i, s in enumerate(sections))
    parts = "".join(
        f'<section id="part{i}"><h2>{escape(s.title)}</h2>{s.body}</section>' for i, s in enumerate(sections)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p><nav>{links}</nav>{parts}</body></html>\n'
    )


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; kinds are ``soft``, ``note`` (look at this) and ``note fine`` (all is well)."""
    return f'<p class="{kind}">{escape(text)}</p>'


def heading(text: str) -> str:
    """A heading within a section."""
    return f"<h3>{escape(text)}</h3>"


def cards(items: Iterable[tuple[str, str, str]]) -> str:
    """Key numbers: (value, what it is, a remark)."""
    made = [
        f'<div class="card"><b>{escape(value)}</b>{escape(what)}<small>{escape(remark)}</small></div>'
        for value, what, remark in items
    ]
    across = 3 if len(made) % 3 == 0 else 4
    return f'<div class="cards" style="--across: {across}">{"".join(made)}</div>'


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], chosen: int | None = None) -> str:
    """A table; numbers are set right, floats with four digits, and the row ``chosen`` stands out."""

    def cell(value: Any, tag: str = "td", number: bool = False) -> str:
        number = number or isinstance(value, (int, float, np.number))
        text = f"{value:.4f}" if isinstance(value, (float, np.floating)) else str(value)
        return f"<{tag}{' class=number' if number else ''}>{escape(text)}</{tag}>"

    body = [list(row) for row in rows]
    numbers = [bool(body) and isinstance(body[0][i], (int, float, np.number)) for i in range(len(header))]
    head = "".join(cell(name, "th", number) for name, number in zip(header, numbers, strict=True))
    lines = "".join(
        f"<tr{' class=chosen' if i == chosen else ''}>{''.join(cell(value) for value in row)}</tr>"
        for i, row in enumerate(body)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def plot(figure: Figure, description: str) -> str:
    """A plot, with what it shows in words for those who cannot see it."""
    return f'<p><img class="plot" src="{to_data_uri(figure)}" alt="{escape(description)}"></p>'


def image_uri(pixels: NDArray[np.uint8]) -> str:
    """An image (H, W, 3) as a small JPEG data URI."""
    image = Image.fromarray(np.asarray(pixels))
    image.thumbnail((300, 150))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def folded(summary: str, body: str) -> str:
    """A part that opens on a click, without a script; the body is HTML that is safe already."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def gallery(images: Iterable[tuple[NDArray[np.uint8], Sequence[str]]]) -> str:
    """Images, each with a caption of lines, the first of them strong."""
    inner = "".join(
        f'<figure><img src="{image_uri(pixels)}" alt="{escape(", ".join(lines))}">{_caption(lines)}</figure>'
        for pixels, lines in images
    )
    return f'<div class="gallery">{inner}</div>'


def _caption(lines: Sequence[str]) -> str:
    rest = "".join(f"<span>{escape(line)}</span>" for line in lines[1:])
    return f"<figcaption><b>{escape(lines[0])}</b>{rest}</figcaption>"


def pairs(items: Iterable[tuple[NDArray[np.uint8], NDArray[np.uint8], Sequence[str]]]) -> str:
    """Images side by side, two by two, each pair with a caption of lines, the first of them strong."""
    inner = "".join(
        f'<figure><div class="pair"><img src="{image_uri(a)}" alt=""><img src="{image_uri(b)}" alt=""></div>'
        f"{_caption(lines)}</figure>"
        for a, b, lines in items
    )
    return f'<div class="pairs"><div class="gallery">{inner}</div></div>'
