"""Pictures of a run, as PNG files in the run directory and for the loggers."""

import contextlib
import io
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_only
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision.utils import make_grid  # type: ignore[import-untyped]

from mnist_lit.training.metrics import MetricsWriter
from mnist_lit.training.run_dir import atomic_write

mpl.rcParams["text.parse_math"] = False  # names of classes and files with dollar signs are no formulas

DPI = 100
NUM_COLUMNS = 9
IMAGE_SIDE = 112  # pixels, of an image in a grid: 4 for each of MNIST's
HEADER = 64  # pixels, above a grid
MAX_CHARACTERS = 22  # of a line above an image
MAX_CLASSES_WITH_COUNTS = 20


class Evaluation(NamedTuple):
    """Hold the confusion matrix (num_classes, num_classes), true classes in rows, and the highest losses."""

    counts: Tensor
    top_losses: tuple[Tensor, ...]  # misclassified images of 0 to 255, their labels and logits
    epoch: int


class Pictures(Callback):
    """Plot training images as the network gets them, confusion matrix, top losses, and the graph of the network.

    The pictures of validation show the best epoch. All are made when the run ends.

    Args:
        enabled: Whether pictures are made.
        num_images: Images in the grid of training images and in that of top losses, 1 or more.
    """

    def __init__(self, enabled: bool = True, num_images: PositiveInt = 36) -> None:
        self.enabled, self.num_images = enabled, num_images
        self.first_batch: list[Tensor] | None = None
        self.validation: Evaluation | None = None

    def state_dict(self) -> dict[str, Any]:
        # A resumed run ends with the pictures of its best epoch, which may lie before the stop.
        return {} if self.validation is None else {"validation": tuple(self.validation)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validation = Evaluation(*state_dict["validation"])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any) -> None:
        if trainer.global_step == 0 and self.first_batch is None:
            self.first_batch = [part[: self.num_images].cpu() for part in batch]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        num_classes: Any = pl_module.num_classes
        self.confusion = MulticlassConfusionMatrix(num_classes, validate_args=False).to(pl_module.device)
        self.top_losses: tuple[Tensor, ...] = ()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        images, labels = batch
        self.confusion.update(outputs, labels)
        # Those whose true class has got the lowest probability; with several processes those of the first one.
        is_wrong = outputs.argmax(dim=1) != labels
        images, labels, logits = (part[is_wrong].float().cpu() for part in (images, labels, outputs))
        parts = [(images * 255).round().byte(), labels.long(), logits]
        if self.top_losses:
            parts = [torch.cat(pair) for pair in zip(self.top_losses, parts, strict=True)]
        losses = F.cross_entropy(parts[2], parts[1], reduction="none")
        highest = losses.topk(min(self.num_images, len(losses))).indices
        self.top_losses = tuple(part[highest] for part in parts)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        writers = (callback for callback in trainer.callbacks if isinstance(callback, MetricsWriter))  # type: ignore[attr-defined]
        is_of_fit = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if is_of_fit and all(writer.is_best(trainer) for writer in writers):
            self.validation = Evaluation(self.confusion.compute().cpu(), self.top_losses, trainer.current_epoch)

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.first_batch:
            images, labels = self.first_batch
            _add_graph(trainer, pl_module, images[:1])
            names = trainer.datamodule.class_names  # type: ignore[attr-defined]
            texts = [names[label] for label in labels.tolist()]
            caption = "the first batch after augmentation, with its labels"
            self._publish(trainer, "training_images", plot_images("Training images", caption, images, texts), 0)
        if self.validation is not None:
            self._plot(trainer, "val", f"Validation, epoch {self.validation.epoch + 1}", self.validation)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._plot(trainer, "test", "Test", Evaluation(self.confusion.compute().cpu(), self.top_losses, 0))

    @rank_zero_only
    def _plot(self, trainer: Trainer, split: str, split_name: str, evaluation: Evaluation) -> None:
        counts, (images, labels, logits), _ = evaluation
        names = trainer.datamodule.class_names  # type: ignore[attr-defined]
        num_images, num_wrong = int(counts.sum()), int(counts.sum() - counts.trace())
        title = f"{split_name}: {num_wrong:,} of {num_images:,} images are misclassified"
        self._publish(trainer, f"{split}_confusion", plot_confusion(title, counts, names), trainer.global_step)
        confidences, predictions = (part.tolist() for part in logits.softmax(dim=1).max(dim=1))
        texts = [
            textwrap.fill(f"{names[label]} predicted as {names[prediction]}, {confidence:.0%}", MAX_CHARACTERS)
            for label, prediction, confidence in zip(labels.tolist(), predictions, confidences, strict=True)
        ]
        caption = "the highest losses first: label, predicted class and its confidence" if texts else ""
        figure = plot_images(title, caption, images / 255, texts)
        self._publish(trainer, f"{split}_mistakes", figure, trainer.global_step)

    def _publish(self, trainer: Trainer, name: str, figure: Figure, step: int) -> None:
        """Write a figure to its file, and give it to the loggers."""
        file = save_figure(figure, Path(trainer.default_root_dir, "pictures", f"{name}.png"))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                pixels = np.asarray(Image.open(file).convert("RGB"))
                logger.experiment.add_image(name.replace("_", "/", 1), pixels, step, dataformats="HWC")
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_artifact(logger.run_id, str(file), "pictures")
            elif hasattr(logger, "log_image"):
                logger.log_image(key=name, images=[str(file)])


def save_figure(figure: Figure, file: Path) -> Path:
    """Write a figure as a PNG file into the folder `pictures`, and return that file."""
    file.parent.mkdir(exist_ok=True)
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
    return file


def plot_images(title: str, caption: str, images: Tensor, texts: Sequence[str]) -> Figure:
    """Plot images of shape (n, channels, h, w) in [0, 1] in a grid, with a text above each."""
    side = images.shape[-1]
    scale, gap, top = max(1, round(IMAGE_SIDE / side)), side // 8, side // 3
    tiles = 0.95 * (1 - images.float()) if images.shape[1] == 1 else images.float()  # grey images as ink on paper
    num_missing = max(0, NUM_COLUMNS - len(tiles))
    tiles = F.pad(tiles, (gap, gap, top, gap, 0, 0, 0, num_missing), value=1.0)
    grid = make_grid(tiles, nrow=NUM_COLUMNS, padding=0, pad_value=1.0).permute(1, 2, 0).numpy()
    height, width = scale * grid.shape[0], scale * grid.shape[1]
    figure = Figure(figsize=(width / DPI, (height + HEADER) / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, height / (height + HEADER)))
    axes.set_axis_off()
    axes.imshow(grid.clip(0, 1), interpolation="nearest", aspect="auto")
    for index, text in enumerate(texts):
        row, column = divmod(index, NUM_COLUMNS)
        axes.text((column + 0.5) * tiles.shape[3], row * tiles.shape[2] + top - 1.5, text, fontsize=8, ha="center")
    figure.text(0.01, 1 - 28 / (height + HEADER), title, fontsize=14, weight="bold")
    figure.text(0.01, 1 - 50 / (height + HEADER), caption, fontsize=10, color="dimgray")
    return figure


def plot_confusion(title: str, counts: Tensor, names: Sequence[str]) -> Figure:
    """Plot a confusion matrix of counts (num_classes, num_classes), true classes in rows."""
    side = min(max(7.0, 0.35 * len(counts)), 40.0)  # beyond a hundred classes a picture of gigabytes
    figure = Figure(figsize=(side, side), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    has_counts = len(counts) <= MAX_CLASSES_WITH_COUNTS
    MulticlassConfusionMatrix(len(counts)).plot(counts, axes, add_text=has_counts, labels=list(names), cmap="Blues")
    axes.images[0].set_norm(PowerNorm(0.3))  # a count of one among thousands is still visible
    for text in axes.texts:
        text.set(text=text.get_text() if text.get_text() != "0" else "", fontsize=11)
    axes.set_title(title, fontsize=14, weight="bold", loc="left", pad=10)
    axes.set(xlabel="predicted class", ylabel="true class")
    return figure


def _add_graph(trainer: Trainer, pl_module: LightningModule, image: Tensor) -> None:
    network = pl_module.get_submodule("network")
    was_training = network.training
    # In eval mode, as tracing runs the network and would move its batch statistics; compiled code cannot be traced.
    # TensorBoard prints the code that it cannot trace, without end.
    with torch.compiler.set_stance("force_eager"), contextlib.redirect_stdout(io.StringIO()):
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                try:
                    logger.experiment.add_graph(network.eval(), image.to(pl_module.device))
                except Exception as error:
                    print(f"note: TensorBoard has no graph of this network: {type(error).__name__}", file=sys.stderr)
    network.train(was_training)
