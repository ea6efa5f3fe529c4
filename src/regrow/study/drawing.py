"""The style of the figures, and their rendering by matplotlib as SVG text or PNG pictures."""

from __future__ import annotations

import io
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Widths of figures in inches; an inch has 96 CSS pixels.
WIDE, NARROW = 10.9, 3.9
# Okabe and Ito's colours, which colour-blind readers can tell apart. Their yellow is too pale for lines.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
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


def styles(methods: Sequence[str]) -> dict[str, Style]:
    """A style for each of ``methods``, by their order; the first 56 differ in colour or marker."""
    markers = list(MARKERS)
    return {
        method: Style(
            COLORS[index % len(COLORS)], markers[index % len(markers)], _DASHES[index % len(_DASHES)]
        )
        for index, method in enumerate(methods)
    }


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
