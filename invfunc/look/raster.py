"""SVG as a PNG, by matplotlib: the few shapes that pictures.py draws."""

from __future__ import annotations

from io import BytesIO
from typing import Any
from xml.etree.ElementTree import Element, fromstring

from ..errors import OptionError

DOTS = 144  # of a PNG, for each 72 pixels of the SVG


def png(svg: str) -> bytes:
    """An SVG document of `pictures.document` as a PNG.

    Raises:
        OptionError: When matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("a PNG needs matplotlib", cure="pip install matplotlib, or save an .svg") from error
    root = fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    figure = Figure(figsize=(width / 72, height / 72), dpi=DOTS)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    _draw_all(root, axes, 0.0, 0.0)
    out = BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _draw_all(parent: Element, axes: Any, x: float, y: float) -> None:
    """The children of an element whose corner is at (x, y)."""
    for item in parent:
        kind = item.tag.rpartition("}")[2]
        if kind == "g":
            right, down = item.attrib["transform"][len("translate(") : -1].split(",")
            _draw_all(item, axes, x + float(right), y + float(down))
        elif not item.get("width", "").endswith("%"):  # the white ground, which a figure has
            _DRAW[kind](axes, _Shape(item, x, y))


class _Shape:
    """An element's attributes, as numbers from the corner of the document."""

    def __init__(self, item: Element, x: float, y: float) -> None:
        self.item, self.corner = item, (x, y)

    def at(self, horizontal: str, vertical: str) -> tuple[float, float]:
        """A point."""
        x, y = self.corner
        return x + self.number(horizontal), y + self.number(vertical)

    def number(self, name: str) -> float:
        """A size; 0 where there is none."""
        return float(self.item.get(name, 0))

    @property
    def style(self) -> dict[str, Any]:
        """Colours and dashes, as patches take them."""
        fill, edge = (self.item.get(name, "none") for name in ("fill", "stroke"))
        dashes = tuple(map(float, self.item.get("stroke-dasharray", "").split()))
        opacity = float(self.item.get("fill-opacity", 1))
        return {
            "facecolor": fill if fill == "none" else (fill, opacity),
            "edgecolor": edge,
            "linestyle": (0, dashes) if dashes else "solid",
            "linewidth": 1,
        }


def _line(axes: Any, shape: _Shape) -> None:
    xs, ys = zip(shape.at("x1", "y1"), shape.at("x2", "y2"), strict=True)
    axes.plot(xs, ys, color=shape.item.get("stroke"), linewidth=1)


def _rectangle(axes: Any, shape: _Shape) -> None:
    from matplotlib.patches import FancyBboxPatch

    rounded = f"round,pad=0,rounding_size={shape.number('rx'):g}"
    width, height = shape.number("width"), shape.number("height")
    axes.add_patch(FancyBboxPatch(shape.at("x", "y"), width, height, boxstyle=rounded, zorder=2, **shape.style))


def _circle(axes: Any, shape: _Shape) -> None:
    from matplotlib.patches import Circle

    axes.add_patch(Circle(shape.at("cx", "cy"), shape.number("r"), zorder=3, **shape.style))


def _text(axes: Any, shape: _Shape) -> None:
    given = shape.item.attrib
    axes.text(
        *shape.at("x", "y"),
        (shape.item.text or "").replace("$", r"\$"),  # no mathematics
        family="monospace",
        fontsize=float(given.get("font-size", 12)),
        fontstyle=given.get("font-style", "normal"),
        alpha=float(given.get("fill-opacity", 1)),
        horizontalalignment="center" if given.get("text-anchor") == "middle" else "left",
        zorder=4,
    )


_DRAW = {"line": _line, "rect": _rectangle, "circle": _circle, "text": _text}
