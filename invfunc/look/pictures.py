"""Pictures: SVG shapes in rectangles, which compose from top to bottom and from left to right as ops do."""

from __future__ import annotations

import html
from dataclasses import dataclass

GAP, ROW, LETTER = 12.0, 28.0, 7.3  # pixels between boxes, of a row, and of a letter
GREY = "#888888"


@dataclass(frozen=True)
class Picture:
    """Shapes in a rectangle; `above` and `beside` build bigger ones, as `chain` and `parallel` build ops."""

    width: float
    height: float
    shapes: str = ""


# ---- shapes ----------------------------------------------------------------------------------------------------------


def at(x: float, y: float, picture: Picture) -> str:
    """A picture's shapes, moved."""
    return f'<g transform="translate({x:g},{y:g})">{picture.shapes}</g>'


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line."""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{GREY}"/>'


def text(x: float, y: float, words: str, style: str = "") -> str:
    """Words, escaped."""
    return f'<text x="{x:g}" y="{y:g}"{style and " " + style}>{html.escape(words)}</text>'


def tinted(width: float, height: float, colour: str, style: str = "") -> str:
    """A rectangle in a light tint of a colour."""
    rectangle = f'<rect width="{width:g}" height="{height:g}" rx="4"'
    return f'{rectangle} fill="white"/>{rectangle} fill="{colour}" fill-opacity="0.15" stroke="{colour}"{style}/>'


# ---- pictures --------------------------------------------------------------------------------------------------------


def above(*pictures: Picture) -> Picture:
    """Pictures from top to bottom, centred."""
    width, height, shapes = max((p.width for p in pictures), default=0.0), 0.0, ""
    for picture in pictures:
        shapes += at((width - picture.width) / 2, height, picture)
        height += picture.height
    return Picture(width, height, shapes)


def beside(*pictures: Picture) -> Picture:
    """Pictures from left to right, on lines that reach from the top to the bottom."""
    x, height, shapes = 0.0, max((p.height for p in pictures), default=0.0), ""
    for picture in pictures:
        centre = x + picture.width / 2
        shapes += line(centre, 0, centre, height) + at(x, (height - picture.height) / 2, picture)
        x += picture.width + GAP
    return Picture(max(x - GAP, 0.0), height, shapes)


def box(words: str, colour: str = GREY, style: str = "", least: float = 150.0) -> Picture:
    """A box with words in the middle."""
    width = max(least, LETTER * len(words) + 2 * GAP)
    shapes = tinted(width, ROW, colour, style) + text(width / 2, 18.5, words, 'text-anchor="middle"')
    return Picture(width, ROW, shapes)


def framed(title: str, inner: Picture) -> Picture:
    """A picture in a dotted frame with a title."""
    width = max(inner.width + 2 * GAP, LETTER * len(title) + 2 * GAP)
    height = inner.height + ROW + GAP
    frame = f'<rect width="{width:g}" height="{height:g}" rx="4" fill="none" stroke="{GREY}" stroke-dasharray="2 3"/>'
    shapes = frame + text(6, 15, title, 'font-style="italic"') + at((width - inner.width) / 2, ROW, inner)
    return Picture(width, height, shapes)


def document(picture: Picture) -> str:
    """A picture as an SVG document, on white."""
    width, height = picture.width + 2 * GAP, picture.height + 2 * GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="monospace" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/>{at(GAP, GAP, picture)}</svg>'
    )
