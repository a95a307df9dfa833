"""Report the predictions for images: predictions.csv for programs, a table for people."""

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from mnist_lit.formatting import escape_unprintable
from mnist_lit.training.run_dir import write_text

if TYPE_CHECKING:
    from mnist_lit.data.image_files import ImageFile

__all__ = ["Prediction", "predictions_for_test_set", "report_predictions", "write_predictions"]

NO_DIGIT = "no digit"
MAX_ROWS = 20


class Prediction(NamedTuple):
    """Hold the prediction for an image.

    Args:
        name: The image.
        probabilities: One per class; empty if there is no digit in the image.
    """

    name: str
    probabilities: list[float]

    @property
    def label(self) -> str:
        """Name the most probable class."""
        return str(self.probabilities.index(max(self.probabilities))) if self.probabilities else NO_DIGIT

    @property
    def summary(self) -> str:
        """Format the label and its probability."""
        return f"{self.label}, {max(self.probabilities):.1%}" if self.probabilities else NO_DIGIT


def predictions_for_test_set(dataset: str, probabilities: Tensor) -> list[Prediction]:
    """List the predictions for the test split of a data set.

    Args:
        dataset: Name of the data set.
        probabilities: Shape (n, num_classes), in the order of the images.
    """
    return [Prediction(f"{dataset}/test/{index}", row) for index, row in enumerate(probabilities.tolist())]


def predictions_for_files(image_files: Sequence["ImageFile"], probabilities: Tensor) -> list[Prediction]:
    """List the predictions for image files.

    Args:
        image_files: The files.
        probabilities: Shape (n, num_classes), in the order of the first n files with a digit; the files after them
            have no predictions.
    """
    rows = iter(probabilities.tolist())
    predictions = []
    for image_file in image_files:
        row = [] if image_file.digit is None else next(rows, None)
        if row is None:
            break
        predictions.append(Prediction(str(image_file.file), row))
    return predictions


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
        probabilities: Shape (n, num_classes), in the order of the files with a digit.

    Returns:
        How many files are no images.
    """
    from mnist_lit.inference.prediction_grid import draw_predictions  # image libraries

    images = [image_file for image_file in image_files if not image_file.problem]
    skipped = [image_file for image_file in image_files if image_file.problem]
    predictions = predictions_for_files(images, probabilities)
    write_predictions(run_dir / "predictions.csv", predictions, probabilities.shape[1])
    if images:
        picture = run_dir / "pictures" / "predictions.png"
        draw_predictions(picture, images, predictions)
        print(f"{format_predictions(predictions)}\nin pictures: {picture}")
    for image_file in skipped:
        print(f"skipped: {escape_unprintable(f'{image_file.file}: {image_file.problem}')}", file=sys.stderr)
    return len(skipped)


def format_predictions(predictions: Sequence[Prediction]) -> str:
    """Format the first predictions as a table for the console."""
    shown = predictions[:MAX_ROWS]
    names = [escape_unprintable(prediction.name) for prediction in shown]
    width = max(map(len, names), default=0)
    lines = [f"{name:{width}}  {prediction.summary}" for name, prediction in zip(names, shown, strict=True)]
    more = [f"… and {len(predictions) - MAX_ROWS:,} more"] if len(predictions) > MAX_ROWS else []
    return "\n".join([*lines, *more])
