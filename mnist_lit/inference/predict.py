"""Report the predictions for images: predictions.csv for programs, a table and a picture for people."""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mnist_lit.data.datamodule import MNISTDataModule
from mnist_lit.formatting import escape_unprintable, shorten
from mnist_lit.training.plots import plot_images
from mnist_lit.training.run_dir import atomic_write, write_text

if TYPE_CHECKING:
    from mnist_lit.data.image_files import ImageFile

__all__ = ["report_predictions"]

NO_DIGIT = "no digit"
MAX_ROWS = 20
MAX_IMAGES = 36
SIDE = 112  # of an image in the picture, in pixels


class Prediction(NamedTuple):
    """Hold the most probable class of an image and the probability of each; none if there is no digit in it."""

    path: str
    label: str
    probabilities: list[float]

    @property
    def summary(self) -> str:
        return f"{self.label}, {max(self.probabilities):.1%}" if self.probabilities else self.label


def report_predictions(run_dir: Path, datamodule: MNISTDataModule, probabilities: Tensor) -> int:
    """Write predictions.csv; of image files also print a table and draw a picture.

    Args:
        run_dir: Where predictions.csv and pictures/predictions.png are written.
        datamodule: The data, with its test split or image files in memory.
        probabilities: Shape (n, num_classes), for the first n test images or files with a digit; what follows them is
            left out.

    Returns:
        How many files are no images.
    """
    names, rows = datamodule.class_names, probabilities.tolist()
    picture = run_dir / "pictures" / "predictions.png"
    picture.unlink(missing_ok=True)  # it would show other images than the table
    files = [file for file in datamodule.image_files if not file.problem]
    paths = [str(file.file) for file in files] or [f"{datamodule.dataset}/test/{i}" for i in range(len(rows))]
    for index, file in enumerate(files):
        if file.digit is None and index <= len(rows):
            rows.insert(index, [])
    labels = [names[int(np.argmax(row))] if row else NO_DIGIT for row in rows]
    predictions = list(map(Prediction, paths, labels, rows))
    _write_csv(run_dir / "predictions.csv", predictions, names)
    if files:
        for prediction in predictions[:MAX_ROWS]:
            print(escape_unprintable(f"{prediction.path}  {prediction.summary}"))
        if len(predictions) > MAX_ROWS:
            print(f"… and {len(predictions) - MAX_ROWS:,} more")
        _draw(picture, files, predictions)
        print(f"in pictures: {picture}")
    skipped = [file for file in datamodule.image_files if file.problem]
    for file in skipped:
        print(f"skipped: {escape_unprintable(f'{file.file}: {file.problem}')}", file=sys.stderr)
    return len(skipped)


def _write_csv(file: Path, predictions: Sequence[Prediction], class_names: Sequence[str]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "confidence", *(f"p{name}" for name in class_names)])
    for path, label, probabilities in predictions:
        columns = [f"{probability:.6f}" for probability in probabilities] or [""] * len(class_names)
        writer.writerow([path, label, max(columns), *columns])
    write_text(file, text.getvalue())


def _draw(picture: Path, files: Sequence["ImageFile"], predictions: Sequence[Prediction]) -> None:
    """Draw the first images above the network's input."""
    texts = []
    for file, prediction in zip(files[:MAX_IMAGES], predictions, strict=False):
        # The font lacks most other characters.
        text = f"{escape_unprintable(prediction.summary)}\n{escape_unprintable(shorten(file.file.name, 22))}"
        texts.append(text.encode("ascii", "replace").decode())
    tiles = torch.stack([_tile(file) for file in files[: len(texts)]])
    caption = "each image above the network's input"
    figure = plot_images(f"Predictions: {len(texts)} of {len(predictions):,} images", caption, tiles, texts)
    picture.parent.mkdir(exist_ok=True)
    with atomic_write(picture) as temporary:
        figure.savefig(temporary, format="png")


def _tile(file: "ImageFile") -> Tensor:
    """Paste an image above the network's input; shape (3, 2 * SIDE, SIDE), in [0, 1]."""
    from mnist_lit.data.image_files import thumbnail  # image libraries

    tile = Image.new("RGB", (SIDE, 2 * SIDE), "white")
    tile.paste(thumbnail(file.file, SIDE))
    if file.digit is not None:
        pixels = 255 - file.digit if file.digit.ndim == 2 else file.digit.transpose(1, 2, 0)
        tile.paste(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST), (0, SIDE))
    return torch.from_numpy(np.asarray(tile) / 255).permute(2, 0, 1)
