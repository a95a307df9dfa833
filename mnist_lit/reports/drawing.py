"""How everything on a page is drawn: one style, colours that all can tell apart, PNG."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator
from PIL import Image

from mnist_lit.formatting import shorten

__all__ = [
    "BLACK",
    "BLUE",
    "GREY",
    "OTHERS",
    "VERMILION",
    "WIDTH",
    "add_legend",
    "drawable",
    "new_figure",
    "own_style",
    "png",
    "whole_numbers",
]

WIDTH = 10.0
DPI = 140
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.labelcolor": "#333333",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
    "font.size": 10,
    "grid.color": "#e9e9e9",
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a name is one
    "xtick.color": "#888888",
    "xtick.labelcolor": "#333333",
    "ytick.color": "#888888",
    "ytick.labelcolor": "#333333",
}
# They differ in brightness, too, and each is drawn with a mark of its own.
BLUE, VERMILION, GREY, BLACK = "#0072b2", "#d55e00", "#9a9a9a", "#222222"
OTHERS = ("#56b4e9", "#009e73", "#cc79a7")


@contextmanager
def own_style() -> Iterator[None]:
    """Draw in this style, whatever a user's matplotlibrc or a notebook has set."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file."""
    canvas, file = FigureCanvasAgg(figure), BytesIO()
    canvas.draw()  # type: ignore[no-untyped-call]
    # In 256 colors, a difference that no eye sees, it takes a third of the room.
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")  # type: ignore[no-untyped-call]
    picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, "png")
    return file.getvalue()


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), dpi=DPI)


def whole_numbers() -> MaxNLocator:
    """A few ticks at whole numbers."""
    return MaxNLocator(8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def add_legend(axes: Axes, **options: Any) -> None:
    """A legend above the axes, where there is something to name."""
    options = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 6, "borderaxespad": 0.2, **options}
    if axes.get_legend_handles_labels()[0]:
        axes.legend(handletextpad=0.4, columnspacing=1.5, **options)


def drawable(text: str, limit: int = 60) -> str:
    """A text without what the font cannot draw."""
    return "".join(char if ord(char) in _glyphs() else "?" for char in shorten(" ".join(text.split()), limit))


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())
