"""The LightningModule around a network: loss, metrics, optimizer, schedule and test-time augmentation."""

import itertools
from typing import Any, Self

from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt, restricted_number_type
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, channels_last, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from mnist_lit.model import optim
from mnist_lit.model.ensemble import distortions, mean_probabilities, shifts
from mnist_lit.model.optim import OptimizerFactory, ScheduleFactory
from mnist_lit.training.checkpoints import find_checkpoint

__all__ = ["Batch", "Classifier", "Shift"]

Batch = tuple[Tensor, Tensor]
# Declared Any, as mypy takes no other made type for an annotation; without a name jsonargparse makes one of the range.
Shift: Any = restricted_number_type(None, int, [(">=", 0), ("<=", 14)])


class Classifier(LightningModule):
    """Train and evaluate any network that maps images to logits.

    Args:
        network: Maps images of shape (n, c, h, w) in [0, 1] to logits of shape (n, num_classes). Buffers `mean` and
            `std` are filled with those of the training images.
        num_classes: Number of classes, 1 or more.
        label_smoothing: Share, 0 to 1, of the training target that is spread over all classes.
        lr: Learning rate, above 0; the peak of a schedule that has one.
        optimizer: Makes the optimizer; without one it is the fused AdamW.
        schedule: Makes the schedule, stepped once per optimizer step (`ReduceLROnPlateau` once per epoch).
        tta_shift: Pixels, 0 to 14, of the shifts in every direction whose predictions are averaged.
        tta_distort: Whether the predictions for eight distorted copies are averaged in, too.
        compile: Whether to train through `torch.compile`.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: PositiveInt = 10,
        label_smoothing: ClosedUnitInterval = 0.0,
        lr: PositiveFloat = 1e-3,
        optimizer: OptimizerFactory | None = None,
        schedule: ScheduleFactory | None = None,
        tta_shift: Shift = 0,
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
        self.tta_shift = int(tta_shift)
        self.tta_distort = tta_distort
        self.compile_network = compile
        # Of one value per image: told to leave NaN alone, torchmetrics 1.9 ignores the weights of batches.
        self.train_loss, self.val_loss, self.test_loss = (MeanMetric(nan_strategy="disable") for _ in range(3))
        accuracy = MulticlassAccuracy(self.num_classes, average="micro", validate_args=False)
        f1_score = MulticlassF1Score(self.num_classes, validate_args=False)
        metrics = MetricCollection({"acc": accuracy, "f1": f1_score})
        self.train_acc = accuracy.clone()
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        self.best_acc = 0.0
        self.applies_settings = self.is_tuned = False
        self.schedule_steps, self.keeps_lr = 0, False  # of the checkpoint that a run goes on from
        self.saved_val_loss: float | None = None
        self.configure_optimizers()  # a wrong argument is found now, not when training begins

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a model without running anything that the checkpoint holds or names.

        Args:
            checkpoint_path: A checkpoint file, a URL or a run directory.
            args: As Lightning's: `map_location` and so on.
            kwargs: As Lightning's; others are arguments of the model in place of the checkpoint's.

        Raises:
            UsageError: If it is no checkpoint of plain data.
        """
        checkpoint = find_checkpoint(str(checkpoint_path))
        assert checkpoint.file is not None
        # Lightning takes them from other places in the file, too, unless they are given.
        factories = {name: checkpoint.hyper_parameters.get(name) for name in ("optimizer", "schedule")}
        return super().load_from_checkpoint(checkpoint.file, *args, **{**factories, **kwargs, "weights_only": True})

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits of shape (n, num_classes) of images of shape (n, c, h, w) in [0, 1]."""
        if self.training or not (self.tta_shift or self.tta_distort):
            logits: Tensor = self.network(images)
            return logits
        copies = itertools.chain(shifts(images, self.tta_shift), distortions(images) if self.tta_distort else ())
        return mean_probabilities(self.network(copy) for copy in copies)

    def setup(self, stage: str) -> None:
        has_own_optimizers = type(self).configure_optimizers is not Classifier.configure_optimizers
        self.applies_settings, self.is_tuned = stage == "fit" and not has_own_optimizers, False
        if stage != "fit":
            return
        self.best_acc = 0.0  # of this run; a run that goes on gets it back from its checkpoint
        self.schedule_steps, self.keeps_lr, self.saved_val_loss = 0, False, None
        statistics = getattr(self.trainer.datamodule, "statistics", None)  # type: ignore[attr-defined]
        if statistics is not None:
            buffers = dict(self.network.named_buffers(recurse=False))
            for name, value in zip(("mean", "std"), statistics, strict=True):
                if name in buffers:
                    buffers[name].fill_(value)
        if self.compile_network:
            self.network.compile()  # in place, so that the names in the checkpoint stay those of the plain network

    # Steps

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self.train_loss.update(loss.detach().expand(len(labels)))
        self.train_acc.update(logits.detach(), labels)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, self.val_loss, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(batch, self.test_loss, self.test_metrics)

    def _evaluate(self, batch: Batch, mean_loss: MeanMetric, metrics: MetricCollection) -> Tensor:
        images, labels = batch
        logits: Tensor = self(images).float()
        if len(labels):  # of several processes one may have no image for its last batch
            mean_loss.update(F.cross_entropy(logits, labels, reduction="none"))
            metrics.update(logits, labels)
        return logits

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute probabilities of shape (n, num_classes)."""
        logits: Tensor = self(batch[0])
        return logits.float().softmax(dim=1)

    # Metrics

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

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.val_loss)
        self.log_dict(self.val_metrics)
        if not self.trainer.sanity_checking:
            self.best_acc = max(self.best_acc, float(self.val_metrics["acc"].compute()))
            self.log("val/acc_best", self.best_acc, prog_bar=True, sync_dist=True, reduce_fx="max")

    def on_test_epoch_end(self) -> None:
        self.log("test/loss", self.test_loss)
        self.log_dict(self.test_metrics)

    def _train_metrics(self) -> dict[str, Metric]:
        return {"loss": self.train_loss, "acc": self.train_acc}

    # Optimization

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = optim.build_optimizer(self.optimizer, self.network, self.lr)
        if self.schedule is None:
            return optimizer
        # Of any length: `on_train_start` knows the steps of the run, those of a resumed one, too.
        schedule = optim.build_schedule(self.schedule, optimizer, max_lr=self.lr, num_steps=1000)
        interval = "epoch" if isinstance(schedule, ReduceLROnPlateau) else "step"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": interval, "monitor": "val/loss"},
        }

    def on_fit_start(self) -> None:
        # Finders of the batch size and the learning rate have run by now: in their trials a schedule of theirs stays.
        self.is_tuned = True

    def on_train_start(self) -> None:
        for optimizer in self.trainer.optimizers:
            optim.check_states(optimizer)
        if self.applies_settings and self.is_tuned:
            self._apply_settings(self.trainer.optimizers[0])

    def _apply_settings(self, optimizer: Optimizer) -> None:
        configured = optim.build_optimizer(self.optimizer, self.network, self.lr)
        optim.apply_settings(optimizer, configured, keep_lr=self.keeps_lr)
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                # Lightning steps it after the checkpoint at the end of an epoch.
                if self.saved_val_loss is not None and config.scheduler.last_epoch < self.current_epoch:
                    config.scheduler.step(self.saved_val_loss)
            elif self.schedule is not None:
                config.scheduler = optim.build_schedule(
                    self.schedule,
                    optimizer,
                    max_lr=self.lr,
                    num_steps=self.schedule_steps + optim.remaining_steps(self.trainer),
                    num_done=self.schedule_steps,
                )

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

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["val_acc_best"] = self.best_acc
        if "val/loss" in self.trainer.callback_metrics:
            checkpoint["val_loss"] = float(self.trainer.callback_metrics["val/loss"])
        # What the batches before a stop have added up to belongs to their epoch's train/loss and train/acc.
        checkpoint["train_metrics"] = {name: metric.metric_state for name, metric in self._train_metrics().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.best_acc = float(checkpoint.get("val_acc_best", 0.0))
        for name, state in checkpoint.get("train_metrics", {}).items():
            metric = self._train_metrics()[name]
            for part, value in state.items():
                setattr(metric, part, value.to(metric.device))
        if self.applies_settings:
            self.saved_val_loss = checkpoint.get("val_loss")
            self.schedule_steps, self.keeps_lr = optim.restore_matching(checkpoint, self.hparams)
