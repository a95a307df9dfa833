"""The LightningModule: a network with its loss, metrics, optimizer and schedule."""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Protocol, Self

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt, restricted_number_type
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from mnist_lit.errors import MNISTLitError
from mnist_lit.model.ensemble import distortions, mean_probabilities, shifts
from mnist_lit.model.instantiate import arguments, made
from mnist_lit.model.networks import NUM_CLASSES, Activation, GlobalPool, Network, Norm, Pooling
from mnist_lit.training.checkpoints import find_checkpoint

__all__ = ["Batch", "ConvNet", "OptimizerFactory", "ScheduleFactory"]

Batch = tuple[Tensor, Tensor]
# Declared Any, as mypy takes no other made type for an annotation; without a name jsonargparse makes one of the range.
Shift: Any = restricted_number_type(None, int, [(">=", 0), ("<=", 14)])


class OptimizerFactory(Protocol):
    """Builds an optimizer; `lr` is the model's own knob and therefore no key of the optimizer."""

    def __call__(self, params: Iterable[dict[str, Any]], lr: float) -> Optimizer:
        """Build the optimizer over the parameter groups `params` with the learning rate `lr`."""


class ScheduleFactory(Protocol):
    """Builds a schedule; what the run knows (its steps, its learning rate) is filled in and therefore no key of it."""

    def __call__(
        self, optimizer: Optimizer, *, total_steps: int, total_iters: int, T_max: int, max_lr: float
    ) -> LRScheduler:
        """Build the schedule of `optimizer`; only the arguments that its class has are given."""


class ConvNet(LightningModule):
    """A convolutional network (or, without convolutions, a multi-layer perceptron) that classifies digits.

    Args:
        channels: Output channels of each convolution stage; their number is the number of stages (may be empty).
        hidden: Units of each dense layer between the last stage and the output (may be empty).
        kernel_size: Side of the convolution kernels, in pixels.
        convs_per_stage: Convolutions in each stage.
        residual: Whether a stage adds what its first convolution makes to what the others make of that.
        pooling: What halves the map in each stage.
        pool_at_end: Whether that is done at the end of a stage instead of after its first convolution: more accurate,
            and less than half as fast.
        unpadded_stages: Stages, 0 or more, from the first, whose kernels stay inside the map: each convolution takes
            kernel_size - 1 pixels from its sides, and the ones that come then have less to do.
        global_pool: What reduces the last map to one value per channel; `none` keeps all its pixels.
        norm: Normalisation after each convolution and each hidden dense layer.
        activation: Non-linearity after each normalisation.
        dropout: Probability, 0 to 1, with which a feature is dropped before each dense layer (never a pixel).
        label_smoothing: Share, 0 to 1, of the training target that is spread over all classes.
        lr: Learning rate, above 0; the peak of a schedule that has one.
        optimizer: Any `torch.optim` class by `class_path`; without one it is the fused AdamW.
            Its weight decay spares biases and normalisations.
        schedule: Any `torch.optim.lr_scheduler` class by `class_path`, stepped once per optimizer step
            (`ReduceLROnPlateau` once per epoch, on `val/loss`). Its number of steps and its peak are filled in.
        tta_shift: Pixels, 0 to 14, by which an image is shifted in every direction when it is evaluated (test-time
            augmentation): the probabilities of all the (2 * tta_shift + 1)^2 copies are averaged.
        tta_distort: Whether eight more copies are averaged in, each turned by 9 degrees, scaled by 9 %, slanted by 8
            degrees and moved by a pixel along both axes, each of that one way or the other.
        compile: Whether to train through `torch.compile`; checkpoints are the same either way.
        image_size: Side of the square input images, in pixels; the command line takes it from `data.image_size`.

    Raises:
        ValueError: If no network has this shape; the message says why.
    """

    def __init__(
        self,
        channels: list[PositiveInt] = [16, 32, 64],
        hidden: list[PositiveInt] = [],
        kernel_size: PositiveInt = 3,
        convs_per_stage: PositiveInt = 1,
        residual: bool = False,
        pooling: Pooling = "max",
        pool_at_end: bool = False,
        unpadded_stages: NonNegativeInt = 0,
        global_pool: GlobalPool = "none",
        norm: Norm = "batch",
        activation: Activation = "relu",
        dropout: ClosedUnitInterval = 0.0,
        label_smoothing: ClosedUnitInterval = 0.0,
        lr: PositiveFloat = 1e-3,
        optimizer: OptimizerFactory | None = None,
        schedule: ScheduleFactory | None = None,
        tta_shift: Shift = 0,
        tta_distort: bool = False,
        compile: bool = False,
        image_size: PositiveInt = 28,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name in ("optimizer", "schedule"):
            # From Python these are functions, which no checkpoint of plain data can hold.
            if callable(self.hparams[name]):
                del self.hparams[name]
        network = Network(
            channels=channels,
            hidden=hidden,
            kernel_size=kernel_size,
            convs_per_stage=convs_per_stage,
            residual=residual,
            pooling=pooling,
            pool_at_end=pool_at_end,
            unpadded_stages=unpadded_stages,
            global_pool=global_pool,
            norm=norm,
            activation=activation,
            dropout=dropout,
            image_size=image_size,
        )
        self.network = network.to(memory_format=torch.channels_last)
        # The parser's restricted types are classes of its own, which a checkpoint of plain data cannot hold.
        self.label_smoothing = float(label_smoothing)
        self.lr = float(lr)
        self.optimizer = optimizer
        self.schedule = schedule
        self.tta_shift = int(tta_shift)
        self.tta_distort = tta_distort
        self.compile_network = compile
        # Of one value per image: told to leave NaN alone, torchmetrics 1.9 ignores the weights of batches.
        self.train_loss, self.val_loss, self.test_loss = (MeanMetric(nan_strategy="disable") for _ in range(3))
        self.train_acc = _accuracy()
        metrics = MetricCollection({"acc": _accuracy(), "f1": MulticlassF1Score(NUM_CLASSES, validate_args=False)})
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        self.best_acc = 0.0
        # Built here only to see that they can be: a wrong argument is found now, not when training begins.
        self._build_schedule(self._build_optimizer(), num_steps=1000)
        self.planned: tuple[float, int] | None = None

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As Lightning's, which would run what is pickled in the file of a URL, and what its hyper-parameters name.

        Args:
            checkpoint_path: A checkpoint file, a URL or a run directory.
            args: As Lightning's: `map_location` and so on.
            kwargs: As Lightning's; others are arguments of the model in place of the checkpoint's.

        Raises:
            UsageError: If that is no checkpoint of plain data, or names code that is not torch's.
        """
        source = find_checkpoint(str(checkpoint_path))
        assert source.file is not None
        hyper_parameters = source.hyper_parameters if isinstance(source.hyper_parameters, dict) else {}
        # Lightning takes them from other places in the file, too, unless they are given.
        checked = {name: hyper_parameters.get(name) for name in ("optimizer", "schedule")}
        return super().load_from_checkpoint(source.file, *args, **{**checked, **kwargs, "weights_only": True})

    def forward(self, images: Tensor) -> Tensor:
        """Images of shape (n, 1, image_size, image_size) in [0, 1] to logits of shape (n, 10)."""
        if self.training or not (self.tta_shift or self.tta_distort):
            logits: Tensor = self.network(images)
            return logits
        copies = itertools.chain(shifts(images, self.tta_shift), distortions(images) if self.tta_distort else ())
        return mean_probabilities(self.network(copy) for copy in copies)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.best_acc = 0.0  # of this run; a run that goes on gets it back from its checkpoint
            statistics = getattr(self.trainer.datamodule, "statistics", None)  # type: ignore[attr-defined]
            if statistics is not None:
                self.network.mean.fill_(statistics[0])
                self.network.std.fill_(statistics[1])
            if self.compile_network:
                # In place, so that the names in the checkpoint stay those of the plain network.
                self.network.compile()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.train_loss.update(loss.detach().expand(len(labels)))
        self.train_acc.update(logits.detach(), labels)
        return loss

    def on_train_start(self) -> None:
        # Fused optimizers write as many values as a parameter has, whatever room a checkpoint has left them.
        for optimizer in self.trainer.optimizers:
            for parameter, state in optimizer.state.items() if optimizer.defaults.get("fused") else ():
                shapes = {value.shape for value in state.values() if isinstance(value, Tensor) and value.ndim}
                if shapes - {parameter.shape}:
                    raise MNISTLitError("the checkpoint's optimizer_states are of another network")

    def on_train_epoch_start(self) -> None:
        for metric in self._train_metrics().values():
            metric.reset()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        every_n_steps = getattr(self.trainer, "log_every_n_steps", 0)
        is_new_step = batch_idx % self.trainer.accumulate_grad_batches == 0
        if is_new_step and every_n_steps and self.global_step % every_n_steps == 0:
            lr = self.trainer.optimizers[0].param_groups[0]["lr"]
            for logger in self.loggers:
                logger.log_metrics({"lr": lr}, step=self.global_step)

    def on_train_epoch_end(self) -> None:
        self.log("train/loss", self.train_loss, logger=False)
        self.log("train/acc", self.train_acc, logger=False, prog_bar=True)
        # Lightning would log them after the epoch's checkpoint: a run that is killed between the two would lose them.
        metrics = {"train/loss": float(self.train_loss.compute()), "train/acc": float(self.train_acc.compute())}
        for logger in self.loggers:
            logger.log_metrics({**metrics, "epoch": self.current_epoch}, step=self.global_step - 1)
            logger.save()

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, self.val_loss, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.val_loss)
        self.log_dict(self.val_metrics)
        if not self.trainer.sanity_checking:
            self.best_acc = max(self.best_acc, float(self.val_metrics["acc"].compute()))
            self.log("val/acc_best", self.best_acc, prog_bar=True, sync_dist=True, reduce_fx="max")

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, self.test_loss, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        self.log("test/loss", self.test_loss)
        self.log_dict(self.test_metrics)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities of shape (n, 10)."""
        logits: Tensor = self(batch[0])
        return logits.float().softmax(dim=1)

    def _evaluate(self, batch: Batch, mean_loss: MeanMetric, metrics: MetricCollection) -> Tensor:
        images, labels = batch
        logits: Tensor = self(images).float()
        if len(labels):  # of several processes one may have no image for its last batch
            mean_loss.update(F.cross_entropy(logits, labels, reduction="none"))
            metrics.update(logits, labels)
        return logits

    def configure_optimizers(self) -> OptimizerLRScheduler:
        self.planned = self._plan()
        optimizer = self._build_optimizer()
        schedule = self._build_schedule(optimizer, num_steps=self.planned[1])
        if schedule is None:
            return optimizer
        interval = "epoch" if isinstance(schedule, ReduceLROnPlateau) else "step"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": interval, "monitor": "val/loss"},
        }

    def on_fit_start(self) -> None:
        # A search for the batch size or the learning rate has run by now and changed what the plan was made from.
        if self.planned != self._plan():
            self.trainer.strategy.setup_optimizers(self.trainer)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip also the gradients of fused optimizers, which the Trainer refuses under mixed precision."""
        if not gradient_clip_val:
            return
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and optimizer.defaults.get("fused"):
            scaler.unscale_(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        else:
            nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["val_acc_best"] = self.best_acc
        # What the batches before a stop have added up to belongs to their epoch's train/loss and train/acc.
        checkpoint["train_metrics"] = {name: metric.metric_state for name, metric in self._train_metrics().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.best_acc = float(checkpoint.get("val_acc_best", 0.0))
        for name, state in checkpoint.get("train_metrics", {}).items():
            metric = self._train_metrics()[name]
            for part, value in state.items():
                setattr(metric, part, value.to(metric.device))
        for state in checkpoint.get("lr_schedulers", []):
            # The length comes from this run: one that goes on for more epochs has more steps than the checkpoint's.
            for name in ("total_steps", "total_iters", "T_max", "_schedule_phases"):
                state.pop(name, None)

    def _train_metrics(self) -> dict[str, Metric]:
        return {"loss": self.train_loss, "acc": self.train_acc}

    def _plan(self) -> tuple[float, int]:
        return self.lr, int(self.trainer.estimated_stepping_batches)

    def _build_optimizer(self) -> Optimizer:
        factory: Callable[..., Optimizer] = self.optimizer or functools.partial(AdamW, fused=True)
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        if "weight_decay" not in arguments(factory):
            return factory(parameters, lr=self.lr)
        decayed = [parameter for parameter in parameters if parameter.ndim > 1]
        spared = [parameter for parameter in parameters if parameter.ndim <= 1]
        return factory([{"params": decayed}, {"params": spared, "weight_decay": 0.0}], lr=self.lr)

    def _build_schedule(self, optimizer: Optimizer, *, num_steps: int) -> LRScheduler | None:
        if self.schedule is None:
            return None
        schedule: LRScheduler = made(
            self.schedule, optimizer, total_steps=num_steps, total_iters=num_steps, T_max=num_steps, max_lr=self.lr
        )
        return schedule


def _accuracy() -> MulticlassAccuracy:
    return MulticlassAccuracy(NUM_CLASSES, average="micro", validate_args=False)
