"""Report the predictions for images: predictions.csv for programs, a table and a picture for people."""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mnist_lit.formatting import escape_unprintable, shorten
from mnist_lit.training.plots import plot_images
from mnist_lit.training.run_dir import atomic_write, write_text

if TYPE_CHECKING:
    from mnist_lit.data.image_files import ImageFile

__all__ = ["predictions_for_test_set", "report_predictions", "write_predictions"]

NO_DIGIT = "no digit"
MAX_ROWS = 20
MAX_IMAGES = 36
SIDE = 112  # of an image in the picture, in pixels


class Prediction(NamedTuple):
    """Hold the probability of each class for an image; none if there is no digit in it."""

    name: str
    probabilities: list[float]
    note: str = ""
    digit: NDArray[np.uint8] | None = None

    @property
    def label(self) -> str:
        """Name the most probable class."""
        return str(self.probabilities.index(max(self.probabilities))) if self.probabilities else NO_DIGIT

    @property
    def summary(self) -> str:
        """Format the label and its probability."""
        return f"{self.label}, {max(self.probabilities):.1%}" if self.probabilities else NO_DIGIT

    @classmethod
    def from_candidates(cls, image_file: "ImageFile", rows: list[list[float]]) -> "Prediction":
        """Choose one of the candidates of an image file; each has a row of probabilities."""
        from mnist_lit.data.digits import choose  # image libraries

        frames = f"frame 1 of {image_file.num_frames}" if image_file.num_frames > 1 else ""
        if not rows:
            return cls(str(image_file.file), [], frames)
        index, note = choose(image_file.candidates, [max(row) for row in rows])
        notes = ", ".join(filter(None, (frames, note)))
        return cls(str(image_file.file), rows[index], notes, image_file.candidates[index].digit)


def predictions_for_test_set(dataset: str, probabilities: Tensor) -> list[Prediction]:
    """List the predictions for the test split of a data set, in the order of its images."""
    return [Prediction(f"{dataset}/test/{index}", row) for index, row in enumerate(probabilities.tolist())]


def write_predictions(file: Path, predictions: Sequence[Prediction], num_classes: int) -> None:
    """Write a CSV file with a row for each image and a column for each class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "confidence", *(f"p{label}" for label in range(num_classes))])
    for prediction in predictions:
        columns = [f"{probability:.6f}" for probability in prediction.probabilities] or [""] * num_classes
        writer.writerow([prediction.name, prediction.label, max(columns), *columns])
    write_text(file, text.getvalue())


def report_predictions(run_dir: Path, image_files: Sequence["ImageFile"], probabilities: Tensor) -> int:
    """Write, draw and print the predictions for image files.

    Args:
        run_dir: Where predictions.csv and pictures/predictions.png are written.
        image_files: The files.
        probabilities: Shape (n, num_classes), in the order of the first n candidates of the files; the files after
            them are left out.

    Returns:
        How many files are no images.
    """
    images = [image_file for image_file in image_files if not image_file.problem]
    skipped = [image_file for image_file in image_files if image_file.problem]
    predictions: list[Prediction] = []
    remaining = probabilities.tolist()
    for image_file in images:
        num_candidates = len(image_file.candidates)
        if num_candidates > len(remaining):
            break
        predictions.append(Prediction.from_candidates(image_file, remaining[:num_candidates]))
        del remaining[:num_candidates]
    write_predictions(run_dir / "predictions.csv", predictions, probabilities.shape[1])
    for prediction in predictions[:MAX_ROWS]:
        note = f" ({prediction.note})" if prediction.note else ""
        print(f"{escape_unprintable(prediction.name)}  {prediction.summary}{note}")
    if len(predictions) > MAX_ROWS:
        print(f"… and {len(predictions) - MAX_ROWS:,} more")
    if predictions:
        print(f"in pictures: {_draw(run_dir / 'pictures', images, predictions)}")
    for image_file in skipped:
        print(f"skipped: {escape_unprintable(f'{image_file.file}: {image_file.problem}')}", file=sys.stderr)
    return len(skipped)


def _draw(folder: Path, image_files: Sequence["ImageFile"], predictions: Sequence[Prediction]) -> Path:
    """Draw the first images above the network's input."""
    texts = []
    for image_file, prediction in zip(image_files[:MAX_IMAGES], predictions, strict=False):
        # The font lacks most other characters, and formulas stand between dollar signs.
        name = escape_unprintable(image_file.file.name).encode("ascii", "replace").decode()
        texts.append(f"{prediction.summary}\n{shorten(name, 22)}".replace("$", r"\$"))
    pairs = zip(image_files[: len(texts)], predictions, strict=False)
    tiles = torch.stack([_tile(image_file.file, prediction.digit) for image_file, prediction in pairs])
    caption = "each image above the network's input"
    figure = plot_images(f"Predictions: {len(texts)} of {len(predictions):,} images", caption, tiles, texts)
    folder.mkdir(exist_ok=True)
    with atomic_write(folder / "predictions.png") as temporary:
        figure.savefig(temporary, format="png")
    return folder / "predictions.png"


def _tile(file: Path, digit: NDArray[np.uint8] | None) -> Tensor:
    """Paste an image above the network's input; shape (3, 2 * SIDE, SIDE), in [0, 1]."""
    from mnist_lit.data.image_files import thumbnail  # image libraries

    tile = Image.new("RGB", (SIDE, 2 * SIDE), "white")
    tile.paste(thumbnail(file, SIDE))
    if digit is not None:
        tile.paste(Image.fromarray(255 - digit).resize((SIDE, SIDE), Image.Resampling.NEAREST), (0, SIDE))
    return torch.from_numpy(np.asarray(tile) / 255).permute(2, 0, 1)
