"""A picture of image files: each beside what the network saw of it and what it read."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from mnist_lit.data.image_files import ImageFile, thumbnail
from mnist_lit.inference.predict import Prediction
from mnist_lit.reports.drawing import drawable, own_style
from mnist_lit.training.run_dir import write_bytes

__all__ = ["draw_predictions"]

DPI = 100
MAX_DRAWN = 48
NUM_COLUMNS = 4
# In its pixels; 4 of them show one of MNIST's.
SIDE = 112
GAP = 14
CELL_WIDTH = 2 * SIDE + 3 * GAP
CELL_HEIGHT = SIDE + 58
HEADER = 70


def draw_predictions(file: Path, photographs: Sequence[ImageFile], predictions: Sequence[Prediction]) -> None:
    """Draw each image beside what the network saw of it and what was read.

    Args:
        file: Where the PNG file is written.
        photographs: The images; the first of them are drawn.
        predictions: What was read in each, or in the first of them.
    """
    num_drawn = min(len(predictions), MAX_DRAWN)
    num_columns, num_rows = min(NUM_COLUMNS, max(num_drawn, 2)), -(-num_drawn // NUM_COLUMNS)
    width, height = num_columns * CELL_WIDTH + GAP, num_rows * CELL_HEIGHT + HEADER
    with own_style():
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        figure.set_layout_engine("none")  # every place is known
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))  # its unit is one pixel of the picture
        axes.set_axis_off()
        some = f"the first {num_drawn} of {len(photographs):,} images" if num_drawn < len(photographs) else "each image"
        axes.text(GAP, 30, "Predictions", fontsize=14, weight="bold")
        axes.text(GAP, 52, f"{some}, what the network saw of it, and what it read", fontsize=10, color="dimgray")
        for place in range(num_drawn):
            row, column = divmod(place, NUM_COLUMNS)
            corner = GAP + column * CELL_WIDTH, HEADER + row * CELL_HEIGHT
            _draw(axes, corner, photographs[place], predictions[place])
        content = BytesIO()
        figure.savefig(content)
    file.parent.mkdir(exist_ok=True)
    write_bytes(file, content.getvalue())


def _draw(axes: Axes, corner: tuple[int, int], photograph: ImageFile, prediction: Prediction) -> None:
    left, top = corner
    axes.text(left, top + 14, prediction.reading, fontsize=11, weight="bold")
    axes.text(left, top + 30, drawable(photograph.file.name, 34), fontsize=8, color="dimgray")
    _show(axes, np.asarray(thumbnail(photograph.file, SIDE)), left, top + 38)
    if photograph.digit is not None:
        seen = Image.fromarray(255 - photograph.digit).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        _show(axes, np.asarray(seen.convert("RGB")), left + SIDE + GAP, top + 38)


def _show(axes: Axes, pixels: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]", left: int, top: int) -> None:
    """Pixel by pixel, in the middle of a square."""
    height, width, _ = pixels.shape
    left, top = left + (SIDE - width) // 2, top + (SIDE - height) // 2
    axes.imshow(pixels, extent=(left, left + width, top + height, top), interpolation="nearest", aspect="auto")
    axes.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor="silver"))
