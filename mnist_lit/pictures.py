"""Pictures of a run, for TensorBoard and other trackers and as PNG files in the run directory."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities.types import STEP_OUTPUT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from mnist_lit.networks import NUM_CLASSES

__all__ = ["Pictures", "draw_confusion", "draw_digits"]

NUM_COLUMNS = 6


class Pictures(Callback):
    """Show a run: training images as the network sees them, confusion matrix, worst mistakes, graph of the network.

    Confusion matrix and mistakes are those of the latest validation (or of the test). They are drawn when the run
    ends, and every `every_n_epochs` epochs in between.

    Args:
        enabled: Whether pictures are made.
        num_images: Images in the grid of training images and in that of mistakes, 1 or more.
        every_n_epochs: Epochs, 0 or more, between two drawings while the run goes on; 0 draws only at its end.
        histograms: Whether TensorBoard also gets a histogram of each weight after each epoch.
    """

    def __init__(
        self,
        enabled: bool = True,
        num_images: PositiveInt = 36,
        every_n_epochs: NonNegativeInt = 0,
        histograms: bool = False,
    ) -> None:
        self.enabled = enabled
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs
        self.histograms = histograms
        self.folder = Path("pictures")
        self.confusion = MulticlassConfusionMatrix(NUM_CLASSES, validate_args=False)
        self.mistakes = Mistakes(num_images)
        self.has_begun = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
        if self.has_begun or not trainer.is_global_zero:
            return
        self.has_begun = True
        images, labels = (part[: self.num_images].cpu() for part in batch)
        figure = draw_digits("training images, as the network sees them", images, [str(int(n)) for n in labels])
        self._publish(trainer, "training_images", figure)
        _publish_graph(trainer, pl_module, batch[0][:1])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.confusion.to(pl_module.device).reset()
        self.mistakes = Mistakes(self.num_images)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(outputs, Tensor)
        self.confusion.update(outputs, batch[1])
        self.mistakes.update(*batch, outputs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs and epoch % self.every_n_epochs == 0 and not trainer.sanity_checking:
            self._draw(trainer, "val")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers if self.histograms else []:
            if isinstance(logger, TensorBoardLogger):
                for name, parameter in pl_module.network.named_parameters():
                    logger.experiment.add_histogram(name, parameter.detach().float(), trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.confusion.update_called:
            self._draw(trainer, "val")

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, "test")

    def _draw(self, trainer: Trainer, split: str) -> None:
        counts = self.confusion.compute().cpu().numpy()  # on every process: it adds up their shares
        if trainer.is_global_zero:
            self._publish(trainer, f"{split}_confusion", draw_confusion(counts))
            title = f"worst of {counts.sum() - counts.trace()} mistakes in {counts.sum()} images"
            self._publish(trainer, f"{split}_mistakes", draw_digits(title, self.mistakes.images, self.mistakes.texts()))

    def _publish(self, trainer: Trainer, name: str, figure: Figure) -> None:
        self.folder.mkdir(exist_ok=True)
        file = self.folder / f"{name}.png"
        figure.savefig(file)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, np.asarray(Image.open(file)), trainer.global_step, dataformats="HWC")
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_artifact(logger.run_id, str(file), "pictures")
            elif hasattr(logger, "log_image"):
                logger.log_image(key=name, images=[str(file)])


class Mistakes:
    """The worst of the misclassified images: those whose true label was given the least probability.

    Args:
        limit: How many are kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.images = torch.empty(0)
        self.labels = torch.empty(0, dtype=torch.long)
        self.logits = torch.empty(0, NUM_CLASSES)

    def update(self, images: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Add a batch: images (n, 1, h, w), labels (n,), logits (n, 10)."""
        wrong = logits.argmax(dim=1) != labels
        images, labels, logits = (part[wrong].float().cpu() for part in (images, labels, logits))
        self.images = torch.cat([self.images.reshape(-1, *images.shape[1:]), images])
        self.labels = torch.cat([self.labels, labels.long()])
        self.logits = torch.cat([self.logits, logits])
        worst = F.cross_entropy(self.logits, self.labels, reduction="none").topk(min(self.limit, len(self.labels)))
        self.images, self.labels, self.logits = (
            part[worst.indices] for part in (self.images, self.labels, self.logits)
        )

    def texts(self) -> list[str]:
        """Label, prediction and its confidence for each image."""
        confidences, predictions = self.logits.softmax(dim=1).max(dim=1)
        return [
            f"{label}, read as {prediction}\n{confidence:.1%}"
            for label, prediction, confidence in zip(self.labels, predictions, confidences, strict=True)
        ]


def draw_digits(title: str, images: Tensor, texts: list[str]) -> Figure:
    """A grid of images of shape (n, 1, h, w) in [0, 1], with a text above each."""
    num_rows = max(1, -(-len(images) // NUM_COLUMNS))
    height = 1.5 * num_rows + 0.5
    figure = Figure(figsize=(1.5 * NUM_COLUMNS, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for place, (image, text) in enumerate(zip(images, texts, strict=True), start=1):
        axes = figure.add_subplot(num_rows, NUM_COLUMNS, place)
        axes.imshow(image[0], cmap="gray", vmin=0, vmax=1)
        axes.set_title(text, fontsize=8)
        axes.set_axis_off()
    return figure


def draw_confusion(counts: "np.ndarray[Any, Any]") -> Figure:
    """A confusion matrix of counts, true labels in rows; shades are shares of the row on a scale that shows 1 %."""
    figure = Figure(figsize=(7, 6.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(np.sqrt(shares), cmap="cividis", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "black" if shares[row, column] > 0.3 else "white"
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=9)
    axes.set(xlabel="prediction", ylabel="label", xticks=range(len(counts)), yticks=range(len(counts)))
    axes.set_title(f"{counts.trace() / max(counts.sum(), 1):.2%} of {counts.sum()} images are on the diagonal")
    return figure


def _publish_graph(trainer: Trainer, pl_module: LightningModule, image: Tensor) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # In eval mode: tracing runs the network, and that must not move its batch statistics.
            pl_module.network.eval()
            logger.experiment.add_graph(pl_module.network, image)
            pl_module.network.train()
