"""The style of the figures, and their rendering by matplotlib as SVG text or PNG pictures."""

from __future__ import annotations

import io
import math
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regrow.study.compare import METHOD_SETTINGS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Widths of figures in inches; an inch has 96 CSS pixels.
WIDE, NARROW = 10.9, 3.9
# Okabe and Ito's colours, which colour-blind readers can tell apart. Their yellow is too pale for lines.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_BLACK, _WHITE = COLORS[0], "#FFFFFF"
# What is mixed into a colour, or into black, for the second and third variant of a method, and how much.
_MIXES = (((_BLACK, 0.5), (_WHITE, 0.4)), ((_WHITE, 0.4), (_WHITE, 0.64)))
# Lengths of dashes and gaps, in line widths; an empty tuple stands for a full line.
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.6), (1.3, 1.3), (6, 1.5, 1.3, 1.5))
# matplotlib's markers, each with the same shape as an SVG path in a square from −4 to 4.
MARKERS = {
    "o": "M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0z",
    "s": "M-3.1 -3.1h6.2v6.2h-6.2z",
    "^": "M0 -3.8L3.8 3.2H-3.8z",
    "D": "M0 -4L4 0L0 4L-4 0z",
    "v": "M0 3.8L3.8 -3.2H-3.8z",
    "P": "M-1.4 -4h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6v-2.8h2.6z",
    "X": "M-4 -2.3L-2.3 -4L0 -1.7L2.3 -4L4 -2.3L1.7 0L4 2.3L2.3 4L0 1.7L-2.3 4L-4 2.3L-1.7 0z",
    "p": "M0 -4L3.8 -1.2L2.4 3.3H-2.4L-3.8 -1.2z",
}
INK = "#2b2b2b"
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "regrow",
    "text.parse_math": False,
    "font.size": 9,
    "axes.edgecolor": "#8a8a86",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e5e1",
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Style:
    """How a method is drawn: its colour, and a marker and dashes for readers who do not see the colour."""

    color: str
    marker: str
    dashes: tuple[float, ...]

    @property
    def line(self) -> Any:
        """matplotlib's line style."""
        return (0, self.dashes) if self.dashes else "-"


def styles(names: Sequence[str], variants: Mapping[str, tuple[str, int]] | None = None) -> dict[str, Style]:
    """A style for each of ``names``, which is the same wherever the name stands and whatever else is there.

    A method that regrow knows always has its own look; standard training alone is black. Methods that share
    a colour have other markers and other dashes. Variants of one method have shades of its colour, and other
    markers and dashes. Names of no such method get the places behind those of the methods, in their order;
    48 places in a row differ in colour or marker.

    Args:
        names: of methods and variants.
        variants: {name: its method, and its number among the method's variants}; number 0 looks like the
            method itself. A name that is not there is a method.
    """
    known = [*METHOD_SETTINGS]
    parts = {name: (variants or {}).get(name, (name, 0)) for name in names}
    places = known + [method for method, _ in parts.values() if method not in known]
    order = {method: place for place, method in enumerate(dict.fromkeys(places))}
    return {name: _style(order[method], number) for name, (method, number) in parts.items()}


def _style(place: int, number: int) -> Style:
    # Black is for the first place alone. The others count colours, markers and dashes on; each time that all
    # pairs which follow from it have been there, markers or dashes are moved on by one, and then back.
    colors, markers = COLORS[1:], list(MARKERS)
    color = COLORS[0] if place == 0 else colors[(place - 1) % len(colors)]
    later = max(0, place - 1)
    marker = place + later // math.lcm(len(colors), len(markers)) % 2
    dashes = place + later // math.lcm(len(colors), len(_DASHES)) % 2
    shades = (color, *(_mixed(color, *mix) for mix in _MIXES[color == _BLACK]))
    # Variants that differ by a whole round of shades differ in their markers.
    return Style(
        shades[number % len(shades)],
        markers[(marker + 3 * number) % len(markers)],
        _DASHES[(dashes + number) % len(_DASHES)],
    )


def _mixed(color: str, other: str, share: float) -> str:
    """``color`` with a share of another one in it."""
    pairs = [(int(color[at : at + 2], 16), int(other[at : at + 2], 16)) for at in (1, 3, 5)]
    return "#" + "".join(f"{round((1 - share) * one + share * two):02X}" for one, two in pairs)


def svg(draw: Callable[[float], Figure], width: float) -> str:
    """The figure that ``draw`` makes at ``width`` inches, as SVG; the same figure gives the same text."""
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # matplotlib warns of letters that its fonts lack; the browser's fonts may have them.
        warnings.filterwarnings("ignore", message="Glyph")
        file = io.StringIO()
        draw(width).savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    # matplotlib lays the text out with its own fonts, which are wider than those of the readers.
    names = ", ".join(
        name if name == "sans-serif" else f"'{name}'" for name in matplotlib.rcParams["font.sans-serif"]
    )
    return text[text.index("<svg") :].replace(names, _FONTS)


def png(draw: Callable[[float], Figure], width: float) -> bytes:
    """The figure that ``draw`` makes at ``width`` inches, as a PNG picture on white, 200 dots an inch."""
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        file = io.BytesIO()
        draw(width).savefig(file, format="png", dpi=200, facecolor="white")
    return file.getvalue()


def printable(text: str, longest: int | None = None) -> str:
    """``text`` without control and format characters; beyond ``longest`` letters its middle is left out."""
    text = "".join("�" if unicodedata.category(letter)[0] == "C" else letter for letter in text)
    if longest is None or len(text) <= longest:
        return text
    tail = longest // 2
    return f"{text[: longest - tail - 1]}…{text[-tail:]}"
