"""Callbacks of every run: checkpoints, early stopping and weight averaging."""

from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from mnist_lit.errors import Stopped, UsageError
from mnist_lit.signals import handle_signals
from mnist_lit.training.checkpoints import BEST, LAST
from mnist_lit.training.metrics import best_mode


class BestCheckpoint(ModelCheckpoint):
    """Keep the checkpoint of the best epoch as `checkpoints/best.ckpt`, beside the last one as `last.ckpt`.

    Args:
        enabled: Whether a run keeps checkpoints.
        monitor: Metric of training or validation that selects the best epoch; null keeps the last epoch.
        mode: Whether a higher (`max`) or a lower (`min`) value is better; null is `min` for a loss, else `max`.
    """

    def __init__(
        self, enabled: bool = True, monitor: str | None = "val/acc", mode: Literal["min", "max"] | None = None
    ) -> None:
        # By default, that of several validations in an epoch, of which the first knows no metric of training.
        at_end_of_epoch = True if monitor is not None and monitor.startswith("train/") else None
        super().__init__(
            filename=Path(BEST).stem,
            monitor=monitor,
            mode=mode or best_mode(monitor),
            enable_version_counter=False,
            save_on_train_epoch_end=at_end_of_epoch,
        )
        self.enabled = enabled

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # The run directory may have been moved.
        best = str(Path(str(self.dirpath), BEST))
        scores = {best: state_dict["best_model_score"]} if state_dict["best_k_models"] else {}
        moved = {"best_model_path": best, "kth_best_model_path": best, "best_k_models": scores}
        super().load_state_dict({**state_dict, **moved, "dirpath": self.dirpath})


class LastCheckpoint(Checkpoint):
    """Keep `checkpoints/last.ckpt`: after each epoch, and when a signal stops the run.

    SIGINT, SIGTERM and SIGHUP take effect between two batches, where weights, optimizer and loops agree, so that a
    resumed run ends as if it had not been stopped. With several processes all of them stop after the same batch,
    whichever received the signal. A second signal stops at once.
    """

    def __init__(self) -> None:
        self.max_steps = -1
        self.received = 0
        self.handlers = ExitStack()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        loop = checkpoint["loops"]["fit_loop"]
        batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
        for name, num_begun in (("max_epochs", epochs["current"]["started"]), ("max_steps", checkpoint["global_step"])):
            if 0 <= (limit := getattr(trainer, name)) < num_begun:
                raise UsageError(
                    f"trainer.{name} is {limit:,}, but the checkpoint has begun number {num_begun:,}\n"
                    f"give more, for example --trainer.{name} {2 * num_begun}"
                )
        # Lightning counts an epoch as processed that `max_steps` or `max_time` has ended before its last batch.
        if batches["current"]["ready"] and not batches["is_last_batch"]:
            for progress in (epochs["total"], epochs["current"]):
                progress["processed"] = progress["completed"] = progress["started"] - 1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.should_stop:
            raise UsageError("trainer.max_time is used up\ngive more, for example --trainer.max_time 00:12:00:00")
        # With `max_steps` Lightning resumes a finished epoch once more, without batches.
        self.max_steps, trainer.fit_loop.epoch_loop.max_steps = trainer.max_steps, -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.fit_loop.epoch_loop.max_steps = self.max_steps
        # Lightning's handler of SIGTERM ends an epoch before its checkpoint, and hangs with several processes.
        self.handlers.enter_context(handle_signals(self._on_signal))

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if self.received:
            raise Stopped(signum)
        self.received = signum

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning takes a validation that follows the batch of a checkpoint for done: here one may follow.
        num_batches = 1 + (trainer.fit_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx)
        every_n_batches = trainer.val_check_batch  # None: by the clock
        if not trainer.enable_validation or not every_n_batches or num_batches % every_n_batches:
            self._stop_between_batches(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_between_batches(trainer)

    def _stop_between_batches(self, trainer: Trainer) -> None:
        """Stop after a batch if a signal was received; after the last one, the end of the epoch comes first."""
        # No checkpoint holds accumulated gradients.
        is_step = (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_step and not trainer.is_last_batch and (signum := self._received_anywhere(trainer)):
            trainer.save_checkpoint(Path(trainer.default_root_dir, "checkpoints", LAST))
            raise Stopped(signum)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir, "checkpoints", LAST))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The end of the epoch before has saved the checkpoint.
        if signum := self._received_anywhere(trainer):
            raise Stopped(signum)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.handlers.close()
        if signum := self._received_anywhere(trainer):
            raise Stopped(signum)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.handlers.close()

    def _received_anywhere(self, trainer: Trainer) -> int:
        """Return the signal that any process of the run has received, or 0; the same in all processes."""
        if trainer.world_size == 1:
            return self.received
        received = torch.tensor(self.received, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))


class EarlyStop(EarlyStopping):
    """Stop a run whose metric no longer improves.

    Args:
        enabled: Whether runs are stopped early.
        monitor: Any metric of training or validation.
        mode: Whether a higher (`max`) or a lower (`min`) value is better; null is `min` for a loss, else `max`.
        patience: Validations without improvement, 1 or more, after which the run stops.
        min_delta: Smallest change that counts as an improvement, 0 or more.
    """

    def __init__(
        self,
        enabled: bool = False,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] | None = None,
        patience: PositiveInt = 5,
        min_delta: NonNegativeFloat = 0.0,
    ) -> None:
        # The checkpoint holds these numbers as plain data: no types of the parser's.
        super().__init__(
            monitor=monitor,
            mode=mode or best_mode(monitor),
            patience=int(patience),
            min_delta=float(min_delta),
            check_on_train_epoch_end=True if monitor.startswith("train/") else None,
        )
        self.enabled = enabled

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_last_batch:  # else `max_steps` has ended the run, perhaps before its first validation
            super().on_train_epoch_end(trainer, pl_module)


class EMA(EMAWeightAveraging):
    """Validate, test and keep an exponential moving average of the weights instead of the weights themselves.

    Args:
        enabled: Whether the weights are averaged.
        decay: Share, 0 to 1, of the average that is kept at each step.
        every_n_steps: Optimizer steps, 1 or more, between two updates of the average.
    """

    def __init__(
        self, enabled: bool = False, decay: ClosedUnitInterval = 0.999, every_n_steps: PositiveInt = 1
    ) -> None:
        super().__init__(decay=float(decay), update_every_n_steps=int(every_n_steps))
        self.enabled = enabled

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:  # the test after a fit would get the weights, not their average
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
