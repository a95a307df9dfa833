"""What a model reads in images: predictions.csv for programs, a table for people."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from mnist_lit.formatting import escape_unprintable
from mnist_lit.model.networks import NUM_CLASSES
from mnist_lit.training.run_dir import write_text

if TYPE_CHECKING:
    from mnist_lit.data.image_files import ImageFile

__all__ = ["Prediction", "of_photographs", "of_test_set", "table", "write_predictions"]

NO_DIGIT = "no digit"
MAX_ROWS = 20


class Prediction(NamedTuple):
    """What a model reads in an image.

    Args:
        name: The image.
        probabilities: Those of the ten labels; empty where there is no digit.
    """

    name: str
    probabilities: list[float]

    @property
    def label(self) -> str:
        """The label that is the most probable."""
        return str(self.probabilities.index(max(self.probabilities))) if self.probabilities else NO_DIGIT

    @property
    def reading(self) -> str:
        """The label, and how sure the model is of it."""
        return f"{self.label}, {max(self.probabilities):.1%}" if self.probabilities else NO_DIGIT


def of_test_set(dataset: str, probabilities: Tensor) -> list[Prediction]:
    """The predictions for a data set's test split.

    Args:
        dataset: Its name.
        probabilities: Of shape (n, 10), in the order of the images.
    """
    return [Prediction(f"{dataset}/test/{index}", row) for index, row in enumerate(probabilities.tolist())]


def of_photographs(photographs: Sequence["ImageFile"], probabilities: Tensor) -> list[Prediction]:
    """The predictions for image files.

    Args:
        photographs: The files.
        probabilities: Of shape (n, 10), in the order of the first n files in which there is a digit; the files after
            them have no predictions.
    """
    rows = iter(probabilities.tolist())
    predictions = []
    for one in photographs:
        row = [] if one.digit is None else next(rows, None)
        if row is None:
            break
        predictions.append(Prediction(str(one.file), row))
    return predictions


def write_predictions(file: Path, predictions: Sequence[Prediction]) -> None:
    """Write a row for each image."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "confidence", *(f"p{label}" for label in range(NUM_CLASSES))])
    for one in predictions:
        shares = [f"{share:.6f}" for share in one.probabilities] or [""] * NUM_CLASSES
        writer.writerow([one.name, one.label, max(shares), *shares])
    write_text(file, text.getvalue())


def table(predictions: Sequence[Prediction]) -> str:
    """The first predictions, for the console."""
    shown = predictions[:MAX_ROWS]
    names = [escape_unprintable(prediction.name) for prediction in shown]
    width = max(map(len, names), default=0)
    lines = [f"{name:{width}}  {prediction.reading}" for name, prediction in zip(names, shown, strict=True)]
    more = [f"… and {len(predictions) - MAX_ROWS:,} more"] if len(predictions) > MAX_ROWS else []
    return "\n".join([*lines, *more])
