"""The LightningModule around a network: loss, metrics, optimizer, schedule and test-time augmentation."""

import functools
import itertools
import math
import sys
from typing import Any, Self

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, channels_last, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from mnist_lit.model import networks, optim
from mnist_lit.model.ensemble import distortions, mean_probabilities
from mnist_lit.model.networks import Activation, GlobalPool, Norm, Pooling
from mnist_lit.model.optim import OptimizerFactory, ScheduleFactory
from mnist_lit.training.checkpoints import find_checkpoint

Batch = tuple[Tensor, Tensor]
SCHEDULE = "model.schedule"


class Classifier(LightningModule):
    """Train and evaluate any network that maps images to logits.

    Args:
        network: Maps images of shape (n, c, h, w) in [0, 1] to logits of shape (n, num_classes). Buffers `mean` and
            `std` are filled with those of the training images.
        num_classes: Number of classes, 1 or more.
        label_smoothing: Share, 0 to 1, of the training target that is spread over all classes.
        lr: Learning rate, above 0; the peak of a schedule that has one.
        optimizer: Any `torch.optim` class by `class_path`; without one it is the fused AdamW.
            Weight decay is not applied to biases and normalisation layers.
        schedule: Any `torch.optim.lr_scheduler` class by `class_path`, stepped once per optimizer step
            (`ReduceLROnPlateau` after each validation, on `val/loss`). Its number of steps and its peak are filled in.
        tta_distort: Whether the probabilities of an image and of eight copies are averaged when it is evaluated
            (test-time augmentation). Each copy is rotated by 9 degrees, scaled by 9 %, sheared by 8 degrees and
            shifted by a pixel along both axes, in one direction or the other.
        compile: Whether to train through `torch.compile`; checkpoints are the same either way.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: PositiveInt = 10,
        label_smoothing: ClosedUnitInterval = 0.0,
        lr: PositiveFloat = 1e-3,
        optimizer: OptimizerFactory | None = None,
        schedule: ScheduleFactory | None = None,
        tta_distort: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["network"], logger=False)  # those of a subclass, too
        for name in ("optimizer", "schedule"):
            # From Python these are functions, which no checkpoint of plain data can hold.
            if callable(self.hparams.get(name)):
                del self.hparams[name]
        self.network = network.to(memory_format=channels_last)
        self.num_classes = int(num_classes)
        # The parser's restricted types are classes of its own, which a checkpoint of plain data cannot hold.
        self.label_smoothing = float(label_smoothing)
        self.lr = float(lr)
        self.optimizer = optimizer
        self.schedule = schedule
        self.tta_distort = tta_distort
        self.compile_network = compile
        # Of one value per image: told to leave NaN alone, torchmetrics 1.9 ignores the weights of batches.
        loss = MeanMetric(nan_strategy="disable")
        acc = MulticlassAccuracy(self.num_classes, average="micro", validate_args=False)
        f1 = MulticlassF1Score(self.num_classes, validate_args=False)
        metrics = MetricCollection({"loss": loss, "acc": acc, "f1": f1}, compute_groups=False)
        self.train_metrics = MetricCollection({"loss": loss, "acc": acc}, compute_groups=False).clone("train/")
        self.val_metrics = metrics.clone("val/")
        self.test_metrics = metrics.clone("test/")
        self.best_acc = 0.0
        self.schedule_done = (0, math.inf)  # steps before the checkpoint that a run goes on from, learning rate there
        self.is_fitting = False
        self.configure_optimizers()  # a wrong argument is found now, not when training begins

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a model from a checkpoint file, a URL or a run directory, without running any code in it."""
        checkpoint = find_checkpoint(str(checkpoint_path))
        assert checkpoint.file is not None
        # Those in the file could be any code; whoever trains on gives them.
        kwargs = {"optimizer": None, "schedule": None, **kwargs, "weights_only": True}
        return super().load_from_checkpoint(checkpoint.file, *args, **kwargs)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits of shape (n, num_classes) of images of shape (n, c, h, w) in [0, 1]."""
        if self.tta_distort and not self.training:
            return mean_probabilities(self.network(copy) for copy in (images, *distortions(images)))
        logits: Tensor = self.network(images)
        return logits

    def setup(self, stage: str) -> None:
        self.is_fitting = stage == "fit"
        if not self.is_fitting:
            return
        self.best_acc, self.schedule_done = 0.0, (0, math.inf)  # a run that goes on gets them back from its checkpoint
        statistics = getattr(self.trainer.datamodule, "statistics", None)  # type: ignore[attr-defined]
        for name, value in zip(("mean", "std"), statistics or (), strict=False):
            if name in dict(self.network.named_buffers(recurse=False)):
                buffer = self.network.get_buffer(name)
                buffer.copy_(torch.tensor(value).view_as(buffer))
        if self.compile_network:
            self.network.compile()  # in place, so that the names in the checkpoint stay those of the plain network

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.train_metrics.update(value=loss.detach().expand(len(labels)), preds=logits.detach(), target=labels)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, self.test_metrics)

    def _evaluate(self, batch: Batch, metrics: MetricCollection) -> Tensor:
        images, labels = batch
        logits: Tensor = self(images).float()
        if len(labels):  # of several processes one may have no image for its last batch
            metrics.update(value=F.cross_entropy(logits, labels, reduction="none"), preds=logits, target=labels)
        return logits

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute probabilities of shape (n, num_classes)."""
        logits: Tensor = self(batch[0])
        return logits.float().softmax(dim=1)

    def on_train_epoch_start(self) -> None:
        self.train_metrics.reset()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        every_n_steps = getattr(self.trainer, "log_every_n_steps", 0)
        is_new_step = batch_idx % self.trainer.accumulate_grad_batches == 0
        if is_new_step and every_n_steps and self.global_step % every_n_steps == 0:
            lr = self.trainer.optimizers[0].param_groups[0]["lr"]
            for logger in self.loggers:
                logger.log_metrics({"lr": lr}, step=self.global_step)

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.train_metrics, logger=False, prog_bar=True)
        # Lightning would log them after the epoch's checkpoint: a run that is killed between the two would lose them.
        metrics = {name: float(value) for name, value in self.train_metrics.compute().items()}
        for logger in self.loggers:
            logger.log_metrics({**metrics, "epoch": self.current_epoch}, step=self.global_step - 1)
            logger.save()

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_metrics)
        if not self.trainer.sanity_checking:
            self.best_acc = max(self.best_acc, float(self.val_metrics["acc"].compute()))
            self.log("val/acc_best", self.best_acc, prog_bar=True, sync_dist=True, reduce_fx="max")
            for config in self.trainer.lr_scheduler_configs:
                if config.name == SCHEDULE and isinstance(config.scheduler, ReduceLROnPlateau):
                    config.scheduler.step(float(self.val_metrics["loss"].compute()))

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.test_metrics)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = optim.build_optimizer(self.optimizer, self.network, self.lr)
        if self.schedule is None:
            return optimizer
        # Of any length: `on_train_start` knows the steps of the run, those of a resumed one, too.
        schedule = optim.build_schedule(self.schedule, optimizer, self.lr, num_steps=1000)
        config: Any = {"scheduler": schedule, "name": SCHEDULE, "interval": "step"}
        if isinstance(schedule, ReduceLROnPlateau):
            # `on_validation_epoch_end` steps it: Lightning would do that after the epoch's checkpoint.
            config |= {"interval": "epoch", "frequency": sys.maxsize, "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_train_start(self) -> None:
        if self.trainer.ckpt_path is not None:
            for optimizer in self.trainer.optimizers:
                optim.check_states(optimizer)
        for config in self.trainer.lr_scheduler_configs:
            # Other schedules are those of a subclass, or of Lightning's finder of the learning rate.
            if config.name == SCHEDULE and not isinstance(config.scheduler, ReduceLROnPlateau):
                assert self.schedule is not None
                num_done, lr_before = self.schedule_done
                num_steps = num_done + optim.remaining_steps(self.trainer)
                config.scheduler = optim.build_schedule(
                    self.schedule, config.scheduler.optimizer, self.lr, num_steps, num_done=num_done
                )
                lr = config.scheduler.get_last_lr()[0]
                if lr > lr_before and self.trainer.is_global_zero:
                    print(
                        f"note: model.schedule covers {num_steps:,} steps now, so the learning rate rises again, "
                        f"from {lr_before:.2g} to {lr:.2g}; --model.schedule null keeps it at --model.lr",
                        file=sys.stderr,
                    )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["val_acc_best"] = self.best_acc
        # What the batches before a stop have added up to belongs to their epoch's train/loss and train/acc.
        checkpoint["train_metrics"] = {}
        for name, metric in self.train_metrics.items(keep_base=True):
            with metric.sync_context():  # the sum over all processes
                checkpoint["train_metrics"][name] = metric.metric_state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.best_acc = float(checkpoint.get("val_acc_best", 0.0))
        is_first = self.is_fitting and self.trainer.is_global_zero  # of several processes one has that sum
        for name, state in checkpoint.get("train_metrics", {}).items() if is_first else ():
            metric = self.train_metrics[name]
            for part, value in state.items():
                setattr(metric, part, value.to(metric.device))
        if self.is_fitting and self.trainer.precision == "64-true":
            self.double()  # Lightning does so when it has loaded the weights, which would have lost half of their bits
        if self.is_fitting and type(self).configure_optimizers is Classifier.configure_optimizers:
            configured = optim.build_optimizer(self.optimizer, self.network, self.lr)
            self.schedule_done = optim.apply_settings(checkpoint, self.hparams, configured)


class ConvNet(Classifier):
    """Classify images with a convolutional network or, without convolutions, a multi-layer perceptron.

    Args:
        channels: Output channels of each convolution stage; their number is the number of stages (may be empty).
        hidden: Units of each dense layer between the last stage and the output (may be empty).
        kernel_size: Side of the convolution kernels, in pixels.
        convs_per_stage: Convolutions in each stage.
        residual: Whether a stage adds the output of its first convolution to the output of the others.
        pooling: Pooling that halves the feature map in each stage; `none` keeps its size.
        pool_at_end: Whether that is done at the end of a stage instead of after its first convolution: more accurate,
            and less than half as fast.
        unpadded_stages: Number of stages, 0 or more, from the first, with unpadded convolutions: each makes the feature
            map kernel_size - 1 pixels smaller in height and width, which saves time.
        global_pool: Operation that reduces the last map to one value per channel; `none` keeps all its pixels.
        norm: Normalisation after each convolution and each hidden dense layer.
        activation: Non-linearity after each normalisation.
        dropout: Dropout probability, 0 to 1, before each dense layer; input pixels are never dropped.
        image_size: Side of the square input images, in pixels; the command line takes it from `data.image_size`.
        in_channels: Channels of the images; the command line takes it from `data.in_channels`.
        num_classes: Number of classes, 1 or more.
        kwargs: As those of `Classifier`.

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
        image_size: PositiveInt = 28,
        in_channels: PositiveInt = 1,
        num_classes: PositiveInt = 10,
        **kwargs: Any,
    ) -> None:
        if not channels and not hidden:
            raise ValueError("the network is empty: give at least one number in model.channels or in model.hidden")
        if residual and unpadded_stages and convs_per_stage > 1:
            raise ValueError("model.residual needs maps that keep their size\nuse --model.unpadded_stages 0")
        at_end = pool_at_end and convs_per_stage > 1
        layers: list[nn.Module] = []
        for stage, (num_in, num_out) in enumerate(itertools.pairwise([in_channels, *channels])):
            padding = "valid" if stage < unpadded_stages else "same"
            convolution = functools.partial(networks.convolution, kernel_size, padding, norm, activation)
            layers += convolution(num_in, num_out, pooling="none" if at_end else pooling)
            others = [part for _ in range(convs_per_stage - 1) for part in convolution(num_out, num_out)]
            layers += [networks.Residual(*others)] if residual and others else others
            layers += [networks.POOLINGS[pooling](2)] if at_end else []
        stages = nn.Sequential(*layers, *([networks.GLOBAL_POOLS[global_pool](1)] if channels else []))
        widths = [networks.num_features(stages, in_channels, image_size), *hidden, num_classes]
        head = networks.dense(widths, norm, activation, dropout, drop_input=bool(channels))
        network = networks.Network(stages, nn.Sequential(nn.Flatten(), *head), in_channels)
        super().__init__(network, num_classes=num_classes, **kwargs)
