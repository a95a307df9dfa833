"""predictions.csv: what a model reads in each image, and how sure it is."""

import csv
import io
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor

from mnist_lit.networks import NUM_CLASSES
from mnist_lit.runs import write_text

__all__ = ["write_predictions"]


@rank_zero_only
def write_predictions(file: Path, probabilities: Tensor, dataset: str) -> None:
    """Write a row for each image of a data set's test split.

    Args:
        file: Where to.
        probabilities: Of shape (n, 10), in the order of the images.
        dataset: The data set's name.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "confidence", *(f"p{label}" for label in range(NUM_CLASSES))])
    for index, row in enumerate(probabilities.cpu()):
        confidence, label = row.max(dim=0)
        shares = [f"{share:.6f}" for share in row.tolist()]
        writer.writerow([f"{dataset}/test/{index}", int(label), f"{float(confidence):.6f}", *shares])
    write_text(file, text.getvalue())
