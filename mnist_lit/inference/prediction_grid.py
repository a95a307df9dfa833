"""Draw image files beside the network's input and its prediction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mnist_lit.data.image_files import ImageFile, thumbnail
from mnist_lit.formatting import escape_unprintable, shorten
from mnist_lit.inference.predict import Prediction
from mnist_lit.training.run_dir import atomic_write

__all__ = ["draw_predictions"]

MAX_IMAGES = 48
NUM_COLUMNS = 4
SIDE = 112  # of a thumbnail, in pixels


def draw_predictions(file: Path, image_files: Sequence[ImageFile], predictions: Sequence[Prediction]) -> None:
    """Draw each image beside the network's input, under its prediction.

    Args:
        file: The PNG file to write.
        image_files: The images; the first of them are drawn.
        predictions: The predictions for all of the images, or for the first of them.
    """
    num_images = min(len(predictions), MAX_IMAGES)
    num_columns, num_rows = min(NUM_COLUMNS, max(num_images, 2)), max(1, -(-num_images // NUM_COLUMNS))
    drawn = f"the first {num_images} of {len(image_files):,} images" if num_images < len(image_files) else "each image"
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever a user's matplotlibrc has set
        figure = Figure(figsize=(2.7 * num_columns, 1.75 * num_rows + 0.6), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(f"Predictions: {drawn} beside the network's input", fontsize=11)
        cells = figure.subplots(num_rows, 2 * num_columns, squeeze=False).reshape(-1, 2)
        for (left, right), image_file, prediction in zip(cells, image_files, predictions, strict=False):
            _show(left, np.asarray(thumbnail(image_file.file, SIDE)))
            name = escape_unprintable(image_file.file.name)
            name = name.encode("ascii", "replace").decode()  # the font lacks most other characters
            left.set_title(f"{prediction.summary}\n{shorten(name, 34)}", loc="left", fontsize=8, parse_math=False)
            if image_file.digit is not None:
                _show(right, 255 - image_file.digit)
        for axes in figure.axes:
            axes.set_axis_off()
        file.parent.mkdir(exist_ok=True)
        with atomic_write(file) as temporary:
            figure.savefig(temporary, format="png", dpi=140)


def _show(axes: Axes, pixels: "np.ndarray[Any, np.dtype[np.uint8]]") -> None:
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
