"""Report the predictions for images: predictions.csv for programs, a table and a picture for people."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mnist_lit.data.datamodule import MNISTDataModule
from mnist_lit.formatting import escape_unprintable, shorten
from mnist_lit.training.plots import MAX_CHARACTERS, plot_images, save_figure
from mnist_lit.training.run_dir import write_csv

if TYPE_CHECKING:
    from mnist_lit.data.image_files import ImageFile


NO_DIGIT = "no digit"
MAX_ROWS = 20
MAX_IMAGES = 36
SIDE = 112  # of an image in the picture, in pixels


class Prediction(NamedTuple):
    """Hold the most probable class of an image and the probability of each; none if there is no digit in it."""

    path: str
    label: str
    probabilities: list[float]
    note: str = ""
    digit: NDArray[np.uint8] | None = None

    @property
    def summary(self) -> str:
        return f"{self.label}, {max(self.probabilities):.1%}" if self.probabilities else self.label


def report_predictions(run_dir: Path, datamodule: MNISTDataModule, probabilities: Tensor) -> int:
    """Write predictions.csv; of image files also print a table and draw a picture.

    Args:
        run_dir: Where predictions.csv and pictures/predictions.png are written.
        datamodule: The data, with its test split or image files in memory.
        probabilities: Shape (n, num_classes), for the first n test images or candidates of the files; what follows
            them is left out.

    Returns:
        How many files cannot be read as images.
    """
    names, rows = datamodule.class_names, probabilities.tolist()
    picture = run_dir / "pictures" / "predictions.png"
    picture.unlink(missing_ok=True)  # it would show other images than the table
    files = [file for file in datamodule.image_files if not file.problem]
    if files:
        predictions = list(_predict_files(files, names, rows))
    else:
        paths = (f"{datamodule.dataset}/test/{index}" for index in range(len(rows)))
        predictions = [Prediction(path, names[int(np.argmax(row))], row) for path, row in zip(paths, rows, strict=True)]
    _write_csv(run_dir / "predictions.csv", predictions, names)
    if files:
        for prediction in predictions[:MAX_ROWS]:
            note = f" ({prediction.note})" if prediction.note else ""
            print(escape_unprintable(f"{prediction.path}  {prediction.summary}{note}"))
        if len(predictions) > MAX_ROWS:
            print(f"… and {len(predictions) - MAX_ROWS:,} more")
        if predictions:
            _draw(picture, predictions)
            print(f"in pictures: {picture}")
    skipped = [file for file in datamodule.image_files if file.problem]
    for file in skipped:
        print(f"skipped: {escape_unprintable(f'{file.file}: {file.problem}')}", file=sys.stderr)
    return len(skipped)


def _predict_files(
    files: Sequence["ImageFile"], names: Sequence[str], rows: Sequence[list[float]]
) -> Iterator[Prediction]:
    """Choose one of the candidates of each file; each candidate has a row of probabilities."""
    from mnist_lit.data.digits import choose  # image libraries

    remaining = iter(rows)
    for file in files:
        of_file = list(itertools.islice(remaining, len(file.candidates)))
        if len(of_file) < len(file.candidates):
            return
        frames = f"frame 1 of {file.num_frames}" if file.num_frames > 1 else ""
        if not of_file:
            yield Prediction(str(file.file), NO_DIGIT, [], frames)
            continue
        index, note = choose(file.candidates, [max(row) for row in of_file])
        label = names[int(np.argmax(of_file[index]))]
        note = ", ".join(filter(None, (frames, note)))
        yield Prediction(str(file.file), label, of_file[index], note, file.candidates[index].digit)


def _write_csv(file: Path, predictions: Sequence[Prediction], class_names: Sequence[str]) -> None:
    rows = [["path", "label", "confidence", *(f"p{name}" for name in class_names)]]
    for path, label, probabilities, *_ in predictions:
        columns = [f"{probability:.6f}" for probability in probabilities] or [""] * len(class_names)
        rows.append([path, label, max(columns), *columns])
    write_csv(file, rows)


def _draw(picture: Path, predictions: Sequence[Prediction]) -> None:
    """Draw the first images above the network's input."""
    shown = predictions[:MAX_IMAGES]
    names = [shorten(escape_unprintable(Path(prediction.path).name), MAX_CHARACTERS) for prediction in shown]
    texts = [f"{escape_unprintable(one.summary)}\n{name}" for one, name in zip(shown, names, strict=True)]
    tiles = torch.stack([_tile(prediction) for prediction in shown])
    caption = "each image above the network's input"
    save_figure(
        plot_images(f"Predictions: {len(texts)} of {len(predictions):,} images", caption, tiles, texts), picture
    )


def _tile(prediction: Prediction) -> Tensor:
    """Paste an image above the network's input; shape (3, 2 * SIDE, SIDE), in [0, 1]."""
    from mnist_lit.data.image_files import thumbnail  # image libraries

    tile, digit = Image.new("RGB", (SIDE, 2 * SIDE), "white"), prediction.digit
    tile.paste(thumbnail(Path(prediction.path), SIDE))
    if digit is not None:
        pixels = 255 - digit if digit.ndim == 2 else digit.transpose(1, 2, 0)
        tile.paste(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST), (0, SIDE))
    return torch.from_numpy(np.asarray(tile) / 255).permute(2, 0, 1)
