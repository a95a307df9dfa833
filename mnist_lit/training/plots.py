"""Pictures of a run, as PNG files in the run directory and for the loggers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.distributed import all_gather_object
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix
from torchvision.utils import make_grid

from mnist_lit.training.metrics import MetricsWriter
from mnist_lit.training.run_dir import atomic_write

__all__ = ["Pictures", "plot_confusion", "plot_images"]

SPLITS = {"val": "Validation", "test": "Test"}
DPI = 100
NUM_COLUMNS = 9
IMAGE_SIDE = 112  # pixels, of an image in a grid: 4 for each of MNIST's
HEADER = 64  # pixels, above a grid
MAX_CLASSES_WITH_COUNTS = 20
# A count of one among thousands is still visible.
COUNTS = ListedColormap(colormaps["Blues"](np.linspace(0, 1, 8192) ** 0.3))


class Misclassified(NamedTuple):
    """Misclassified images (n, channels, h, w) in [0, 1], their labels (n,) and logits (n, num_classes)."""

    images: Tensor
    labels: Tensor
    logits: Tensor


class Evaluation(NamedTuple):
    """Confusion matrix (num_classes, num_classes), true classes in rows, and the images with the top losses."""

    counts: Tensor
    top_losses: Misclassified
    epoch: int


class Pictures(Callback):
    """Plot training images as the network gets them, confusion matrix, top losses, and the graph of the network.

    The pictures of validation show the best epoch. All are made when the run ends.

    Args:
        enabled: Whether pictures are made.
        num_images: Images in the grid of training images and in that of top losses, 1 or more.
        every_n_epochs: Epochs, 1 or more, after which pictures are made before the end, too; 0 for the end only.
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
        self.confusion: MulticlassConfusionMatrix | None = None
        self.top_losses: Misclassified | None = None
        self.first_batch: tuple[Tensor, Tensor] | None = None
        self.validation: Evaluation | None = None
        self.is_plotted = True

    # A resumed run ends with the pictures of its best epoch, which may have come before the stop.
    def state_dict(self) -> dict[str, Any]:
        if self.validation is None:
            return {}
        counts, (images, labels, logits), epoch = self.validation
        return {
            "counts": counts,
            "images": (images * 255).round().byte(),
            "labels": labels,
            "logits": logits,
            "epoch": epoch,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        wrong = Misclassified(state_dict["images"] / 255, state_dict["labels"], state_dict["logits"])
        self.validation = Evaluation(state_dict["counts"], wrong, state_dict["epoch"])
        self.is_plotted = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0 and batch_idx == 0 and trainer.is_global_zero:
            images, labels = (part[: self.num_images].float().cpu() for part in batch)
            self.first_batch = images, labels.long()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.confusion = self.top_losses = None

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        images, labels = batch
        if self.confusion is None:
            self.confusion = MulticlassConfusionMatrix(outputs.shape[1], validate_args=False).to(pl_module.device)
        self.confusion.update(outputs, labels)
        is_wrong = outputs.argmax(dim=1) != labels
        images, labels, logits = (part[is_wrong].cpu() for part in (images, labels, outputs))
        wrong = Misclassified(images.float(), labels, logits.float())
        self.top_losses = _top_losses([self.top_losses, wrong], self.num_images)

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or self.confusion is None:
            return
        writers = (callback for callback in trainer.callbacks if isinstance(callback, MetricsWriter))  # type: ignore[attr-defined]
        if all(writer.is_best(trainer) for writer in writers):
            self.validation = self._evaluation(trainer)
            self.is_plotted = False
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._plot_run(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for board in _boards(trainer) if self.histograms else []:
            for name, parameter in pl_module.get_submodule("network").named_parameters():
                board.add_histogram(f"weights/{name}", parameter.detach().float(), trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._plot_run(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.confusion is not None:
            self._plot_evaluation(trainer, "test", self._evaluation(trainer))

    def _evaluation(self, trainer: Trainer) -> Evaluation:
        """Combine what all processes have evaluated."""
        assert self.confusion is not None
        shares = [self.top_losses]
        if trainer.world_size > 1:
            shares = [None] * trainer.world_size
            all_gather_object(shares, self.top_losses)
        return Evaluation(self.confusion.compute().cpu(), _top_losses(shares, self.num_images), trainer.current_epoch)

    def _plot_run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.first_batch is not None:
            images, labels = self.first_batch
            self.first_batch = None
            _add_graph(trainer, pl_module, images[:1])
            names = _class_names(trainer)
            texts = [names.get(int(label), str(int(label))) for label in labels]
            title, caption = "Training images", "the first batch, augmented, with its labels"
            self._publish(trainer, "training_images", plot_images(title, caption, images, texts), 0)
        if self.validation is not None and not self.is_plotted:
            self.is_plotted = True
            self._plot_evaluation(trainer, "val", self.validation)

    def _plot_evaluation(self, trainer: Trainer, split: str, evaluation: Evaluation) -> None:
        if not trainer.is_global_zero:
            return
        counts, (images, labels, logits), epoch = evaluation
        num_images, num_correct = int(counts.sum()), int(counts.trace())
        names, step = _class_names(trainer), trainer.global_step
        title = SPLITS[split] + (f", epoch {epoch + 1}" if split == "val" else "")
        accuracy = f"{title}: {100 * num_correct / max(num_images, 1):.2f} % of {num_images:,} images are correct"
        self._publish(trainer, f"{split}_confusion", plot_confusion(accuracy, counts, list(names.values())), step)
        confidences, predictions = logits.softmax(dim=1).max(dim=1)
        texts = [
            f"{names.get(label, label)} predicted as\n{names.get(prediction, prediction)}, {confidence:.0%}"
            for label, prediction, confidence in zip(
                labels.tolist(), predictions.tolist(), confidences.tolist(), strict=True
            )
        ]
        errors = f"{title}: {num_images - num_correct:,} of {num_images:,} images are misclassified"
        caption = "the highest losses first: label, predicted class and its confidence" if texts else ""
        self._publish(trainer, f"{split}_mistakes", plot_images(errors, caption, images, texts), step)

    def _publish(self, trainer: Trainer, name: str, figure: Figure, step: int) -> None:
        """Write a figure to its file, and give it to the loggers."""
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        self.folder.mkdir(exist_ok=True)
        file = self.folder / f"{name}.png"
        with atomic_write(file) as temporary:
            Image.fromarray(pixels).save(temporary, "png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(name.replace("_", "/", 1), pixels, step, dataformats="HWC")
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_artifact(logger.run_id, str(file), "pictures")
            elif hasattr(logger, "log_image"):
                logger.log_image(key=name, images=[str(file)])


def plot_images(title: str, caption: str, images: Tensor, texts: Sequence[str]) -> Figure:
    """Plot images of shape (n, channels, h, w) in [0, 1] in a grid, with a text above each."""
    side = images.shape[-1]
    scale, gap, top = max(1, round(IMAGE_SIDE / side)), side // 8, side // 3
    tiles = 0.95 * (1 - images) if images.shape[1] == 1 else images  # grey images as ink on paper
    tiles = F.pad(tiles, (gap, gap, top, gap), value=1.0)
    num_missing = -len(tiles) % NUM_COLUMNS or NUM_COLUMNS * (len(tiles) == 0)
    tiles = torch.cat([tiles, tiles.new_ones(num_missing, *tiles.shape[1:])])
    grid = make_grid(tiles, nrow=NUM_COLUMNS, padding=0).permute(1, 2, 0).numpy()
    height, width = scale * grid.shape[0], scale * grid.shape[1]
    figure = Figure(figsize=(width / DPI, (height + HEADER) / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, height / (height + HEADER)))
    axes.set_axis_off()
    axes.imshow(grid.clip(0, 1), interpolation="nearest", aspect="auto")
    for index, text in enumerate(texts):
        row, column = divmod(index, NUM_COLUMNS)
        axes.text((column + 0.5) * tiles.shape[3], row * tiles.shape[2] + top - 1.5, text, fontsize=8.5, ha="center")
    figure.text(0.01, 1 - 28 / (height + HEADER), title, fontsize=14, weight="bold")
    figure.text(0.01, 1 - 50 / (height + HEADER), caption, fontsize=10, color="dimgray")
    return figure


def plot_confusion(title: str, counts: Tensor, names: Sequence[str]) -> Figure:
    """Plot a confusion matrix of counts (num_classes, num_classes), true classes in rows."""
    num_classes = len(counts)
    side = max(7.0, 0.35 * num_classes)
    figure = Figure(figsize=(side, side), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    has_counts = num_classes <= MAX_CLASSES_WITH_COUNTS
    metric = MulticlassConfusionMatrix(num_classes)
    metric.plot(counts, axes, add_text=has_counts, labels=list(names) or None, cmap=COUNTS)
    for text in axes.texts:
        text.set(text="" if text.get_text() == "0" else text.get_text(), fontsize=11)
    if max(map(len, names), default=0) <= 2:
        axes.tick_params(labelrotation=0)
    axes.set_title(title, fontsize=14, weight="bold", loc="left", pad=10)
    return figure


def _top_losses(shares: Sequence[Misclassified | None], limit: int) -> Misclassified:
    """Select the images whose true class has got the least probability, the least first."""
    images, labels, logits = (torch.cat(parts) for parts in zip(*filter(None, shares), strict=True))
    losses = F.cross_entropy(logits, labels, reduction="none")
    top = losses.topk(min(limit, len(losses))).indices
    return Misclassified(images[top], labels[top], logits[top])


def _class_names(trainer: Trainer) -> dict[int, str]:
    names = getattr(trainer.datamodule, "class_names", None) or ()  # type: ignore[attr-defined]
    return dict(enumerate(map(str, names)))


def _boards(trainer: Trainer) -> list[Any]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _add_graph(trainer: Trainer, pl_module: LightningModule, image: Tensor) -> None:
    network = pl_module.get_submodule("network")
    was_training = network.training
    # Tracing runs the network: in eval mode it leaves the batch statistics alone. Compiled code cannot be traced.
    with torch.compiler.set_stance("force_eager"):
        for board in _boards(trainer):
            board.add_graph(network.eval(), image.to(pl_module.device))
    network.train(was_training)
