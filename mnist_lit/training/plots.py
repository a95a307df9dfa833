"""Pictures of a run, for TensorBoard and other trackers and as PNG files in the run directory."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities.types import STEP_OUTPUT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from torch.distributed import all_gather_object, get_world_size, is_available, is_initialized
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from mnist_lit.model.networks import NUM_CLASSES
from mnist_lit.training.run_dir import atomic_write

__all__ = ["Pictures", "draw_confusion", "draw_digits"]

SPLITS = {"val": "Validation", "test": "Test"}
DPI = 100
# The grids, in pixels; 4 of them show one of MNIST's.
NUM_COLUMNS = 9
SIDE = 112
GAP = 12
CELL_WIDTH = SIDE + GAP
CELL_HEIGHT = SIDE + 32
HEADER = 60


class Pictures(Callback):
    """Show a run: training images as the network sees them, confusion matrix, worst mistakes, graph of the network.

    Confusion matrix and mistakes are those of the latest validation (or of the test). All are drawn when the run
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
        self.beginning: Beginning | None = None
        self.has_begun = False
        self.has_news = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Once it is compiled it cannot be traced.
        if stage == "fit" and trainer.is_global_zero and pl_module.hparams["compile"]:
            _publish_graph(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
        if not self.has_begun and trainer.is_global_zero:
            self.has_begun = True
            images, labels = (part[: self.num_images].cpu() for part in batch)
            # Drawn later: training need not wait for it.
            self.beginning = Beginning(images, labels, trainer.global_step)

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
        self.has_news = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs and epoch % self.every_n_epochs == 0 and not trainer.sanity_checking:
            self._draw_beginning(trainer, pl_module)
            self._draw(trainer, "val")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers if self.histograms else []:
            if isinstance(logger, TensorBoardLogger):
                for name, parameter in pl_module.get_submodule("network").named_parameters():
                    logger.experiment.add_histogram(f"weights/{name}", parameter.detach().float(), trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw_beginning(trainer, pl_module)
        if self.has_news:
            self._draw(trainer, "val")

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, "test")

    def _draw_beginning(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.beginning is None:
            return
        if not pl_module.hparams["compile"]:
            _publish_graph(trainer, pl_module)
        images, labels, step = self.beginning
        self.beginning = None
        title, caption = "Training images", "the first batch as the network sees it, after augmentation; label above"
        figure = draw_digits(title, caption, images, [str(int(label)) for label in labels])
        self._publish(trainer, "training_images", figure, step)

    def _draw(self, trainer: Trainer, split: str) -> None:
        self.has_news = False
        # On every process: these put their shares together.
        counts = self.confusion.compute().cpu().numpy()
        mistakes = self.mistakes.of_all_processes()
        if not trainer.is_global_zero:
            return
        num_images, num_right = int(counts.sum()), int(counts.trace())
        title = f"{SPLITS[split]}: {num_right / max(num_images, 1):.2%} of {num_images:,} images are read right"
        step = trainer.global_step
        self._publish(trainer, f"{split}_confusion", draw_confusion(title, counts), step)
        title = f"{SPLITS[split]}: {num_images - num_right:,} of {num_images:,} images are misread"
        caption = (
            "label, what it is read as, and the confidence in that; the label given the least probability comes first"
        )
        figure = draw_digits(title, caption, mistakes.images, mistakes.texts())
        self._publish(trainer, f"{split}_mistakes", figure, step)

    def _publish(self, trainer: Trainer, name: str, figure: Figure, step: int) -> None:
        self.folder.mkdir(exist_ok=True)
        file = self.folder / f"{name}.png"
        with atomic_write(file) as temporary:
            figure.savefig(temporary, format="png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name, np.asarray(Image.open(file)), step, dataformats="HWC")
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_artifact(logger.run_id, str(file), "pictures")
            elif hasattr(logger, "log_image"):
                logger.log_image(key=name, images=[str(file)])


class Beginning(NamedTuple):
    """The first training images of a run, their labels, and the step that they were seen in."""

    images: Tensor
    labels: Tensor
    step: int


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

    def of_all_processes(self) -> "Mistakes":
        """The worst of what all processes of the run have."""
        if not (is_available() and is_initialized()):
            return self
        shares: list[Mistakes | None] = [None] * get_world_size()
        all_gather_object(shares, self)
        merged = Mistakes(self.limit)
        for share in shares:
            if share is not None and len(share.labels):
                merged.update(share.images, share.labels, share.logits)
        return merged

    def texts(self) -> list[str]:
        """Label, prediction and its confidence for each image."""
        confidences, predictions = self.logits.softmax(dim=1).max(dim=1)
        return [
            f"{label} read as {prediction}, {confidence:.0%}"
            for label, prediction, confidence in zip(self.labels, predictions, confidences, strict=True)
        ]


def draw_digits(title: str, caption: str, images: Tensor, texts: list[str]) -> Figure:
    """A grid of images of shape (n, 1, h, w) in [0, 1], drawn as ink on paper, with a text above each."""
    num_rows = -(-len(images) // NUM_COLUMNS)
    width, height = NUM_COLUMNS * CELL_WIDTH + GAP, num_rows * CELL_HEIGHT + HEADER
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))  # its unit is one pixel of the picture
    axes.set_axis_off()
    axes.text(GAP, 28, title, fontsize=14, weight="bold")
    axes.text(GAP, 50, caption if texts else "nothing to show", fontsize=10, color="dimgray")
    for place, (image, text) in enumerate(zip(images, texts, strict=True)):
        row, column = divmod(place, NUM_COLUMNS)
        left, bottom = GAP + column * CELL_WIDTH, HEADER + (row + 1) * CELL_HEIGHT - GAP
        box = (left, left + SIDE, bottom, bottom - SIDE)
        axes.imshow(image[0].numpy(), extent=box, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axes.add_patch(Rectangle((left, bottom), SIDE, -SIDE, fill=False, edgecolor="silver"))
        axes.text(left + SIDE / 2, bottom - SIDE - 5, text, fontsize=9, ha="center")
    return figure


def draw_confusion(title: str, counts: "np.ndarray[Any, Any]") -> Figure:
    """A confusion matrix of counts, true labels in rows: what is right in purple, what is wrong in orange.

    A cell's shade is its share of the row, on a scale on which one image in a thousand can still be seen.
    """
    figure = Figure(figsize=(7, 7), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(aspect="equal")
    shades = np.cbrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    signs = 2 * np.eye(len(counts)) - 1
    axes.pcolormesh(shades * signs, cmap="PuOr", vmin=-1, vmax=1, edgecolors="gainsboro", linewidth=1)
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if shades[row, column] > 0.7 else "black"
        axes.text(column + 0.5, row + 0.5, f"{count or ''}", ha="center", va="center", color=color)
    axes.set_title(title, fontsize=14, weight="bold", loc="left", pad=10)
    ticks = np.arange(len(counts))
    axes.set_xticks(ticks + 0.5, ticks)
    axes.set_yticks(ticks + 0.5, ticks)
    axes.tick_params(length=0)
    axes.set(xlabel="read as", ylabel="label")
    axes.invert_yaxis()
    return figure


def _publish_graph(trainer: Trainer, pl_module: LightningModule) -> None:
    network, side = pl_module.get_submodule("network"), pl_module.hparams["image_size"]
    was_training = network.training
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # In eval mode: tracing runs the network, and that must not move its batch statistics.
            image = torch.zeros(1, 1, side, side, device=next(network.parameters()).device)
            logger.experiment.add_graph(network.eval(), image)
            network.train(was_training)
