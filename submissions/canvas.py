"""The house style of figures: inline SVG whose colours and letters follow the page.

Matplotlib draws with placeholder colours; each becomes a CSS variable of `submissions.page`, so one drawing serves a
light and a dark page. Texts stay texts.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure

from submissions.page import COLOURS, Markup, element

INK, MUTED, LINE, PAPER, BLANK = "#010101", "#020202", "#030303", "#040404", "#050505"
SERIES = tuple(f"#0a0a{k:02x}" for k in range(1, COLOURS + 1))
_VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", PAPER: "--paper", BLANK: "--blank"}
_VARIABLES |= {colour: f"--s{k}" for k, colour in enumerate(SERIES)}

#: Values from low to high: pale to dark, even steps of lightness, readable with any colour vision.
HEAT = ListedColormap(mpl.colormaps["magma"](np.linspace(0.97, 0.11, 256)))
DENSITY = LinearSegmentedColormap.from_list("density", [(0.5, 0.55, 0.6, 0.0), (0.5, 0.55, 0.6, 0.9)])

#: A map of values from 0 to 1.
HEAT_MAP: Any = {"cmap": HEAT, "vmin": 0.0, "vmax": 1.0, "interpolation": "none"}
#: A line to compare with: a floor, perfect predictions, guessing.
DASHED: Any = {"color": MUTED, "linewidth": 1.0, "linestyle": (0, (4, 3))}

_STYLE: Any = {
    "text.parse_math": False,  # a $ in an id is a $
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.solid_capstyle": "round",
}


@dataclass
class Canvas:
    """A figure that is being drawn, and its drawing once it is finished."""

    figure: Figure
    drawing: Markup = field(default_factory=Markup)

    @property
    def axes(self) -> Axes:
        return self.figure.axes[0]


@contextmanager
def canvas(width: float, height: float, **options: Any) -> Iterator[Canvas]:
    """Draw a figure in the house style.

    Args:
        width: inches; the drawing is scaled to its place, so this sets how large letters look beside it.
        height: inches.
        options: of ``Figure.subplots``.
    """
    with mpl.rc_context(_STYLE):
        made = Canvas(Figure(figsize=(width, height), layout="constrained"))
        made.figure.subplots(**options)
        yield made
        made.drawing = _to_svg(made.figure)


def _to_svg(figure: Figure) -> Markup:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<(metadata|style)\b.*?</\1>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r' (?:width|height)="[\d.]+pt"', "", drawing, count=2)
    used = set(re.findall(r"#([\w-]+)[)\"]", drawing))
    drawing = re.sub(r' id="([\w.-]+)"', lambda found: found.group() if found.group(1) in used else "", drawing)
    drawing = re.sub(r"font-family: [^;\"]*;? ?", "", drawing)  # the page's own
    drawing = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--sans)", drawing)
    for colour, variable in _VARIABLES.items():
        drawing = drawing.replace(colour, f"var({variable})")
    return Markup(re.sub(r"\n\s*", "\n", drawing).strip())


def colour_of(place: int) -> str:
    """Colour of a series; there are `COLOURS`, again from the first behind the last."""
    return SERIES[place % COLOURS]


def ramp() -> Markup:
    """The heat map's colours from low to high, for a legend."""
    stops = ", ".join(mpl.colors.to_hex(HEAT(share)) for share in np.linspace(0, 1, 9))
    return element("span", class_="ramp", style=f"background: linear-gradient(to right, {stops})")


def heat_colour(share: float) -> tuple[str, str]:
    """Colour of a value from 0 to 1 on the heat map's scale, and that of letters on it.

    >>> heat_colour(0.0)[1], heat_colour(1.0)[1]
    ('#111111', '#ffffff')
    """
    colour = HEAT(share)
    light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return mpl.colors.to_hex(colour), "#111111" if light > 0.55 else "#ffffff"
