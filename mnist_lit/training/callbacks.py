"""Callbacks that belong to every run: checkpoints, early stopping, weight averaging, the progress bar."""

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, TQDMProgressBar

from mnist_lit.errors import Stopped
from mnist_lit.training.checkpoints import BEST, LAST

Monitor = Literal["val/acc", "val/f1", "val/loss", "train/acc", "train/loss"]

__all__ = ["EMA", "BestCheckpoint", "EarlyStop", "LastCheckpoint", "Progress"]


class BestCheckpoint(ModelCheckpoint):
    """Keep the checkpoint of the best epoch as `checkpoints/best.ckpt`, beside the last one as `last.ckpt`.

    Args:
        enabled: Whether a run keeps checkpoints.
        monitor: The metric that decides; null keeps the last epoch's.
        mode: Whether more (`max`) or less (`min`) of it is better.
    """

    def __init__(
        self, enabled: bool = True, monitor: Monitor | None = "val/acc", mode: Literal["min", "max"] = "max"
    ) -> None:
        super().__init__(
            filename=Path(BEST).stem,
            monitor=monitor,
            mode=mode,
            enable_version_counter=False,
        )
        self.enabled = enabled

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(_moved(state_dict, str(self.dirpath)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        # Trackers that keep a run's checkpoint keep that of the callback which they heard of last.
        for logger in trainer.loggers if trainer.is_global_zero and self.best_model_path else []:
            logger.after_save_checkpoint(self)


class LastCheckpoint(ModelCheckpoint):
    """Keep `checkpoints/last.ckpt`: at the end of each epoch, and when the run is asked to stop.

    Ctrl-C, SIGTERM and SIGHUP take effect between two batches, where the weights, the optimizer and the loops agree,
    so that a resumed run ends as if it had not been stopped; if there are several processes, then in all of them after
    the same batch, whichever got the signal. A second signal does not wait.
    """

    def __init__(self) -> None:
        super().__init__(filename=Path(LAST).stem, save_on_train_epoch_end=True, enable_version_counter=False)
        self.received: int | None = None
        self.handlers: dict[int, Any] = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(_moved(state_dict, str(self.dirpath)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if threading.current_thread() is not threading.main_thread():
            return
        # In place of Lightning's own handler of SIGTERM, which ends an epoch before its checkpoint, and which makes
        # several processes wait for each other for ever.
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:  # nohup means it
                self.handlers[signum] = signal.signal(signum, self._note)
        if not trainer.is_global_zero:
            # A terminal's Ctrl-C comes to all processes; the second one is for the first of them to obey.
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise Stopped(signum)
        self.received = signum

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # After an epoch's last batch there is its validation to wait for; gradients that are being accumulated are in
        # no checkpoint.
        is_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if is_step and not trainer.is_last_batch and (received := self._agreed(trainer)):
            trainer.save_checkpoint(Path(str(self.dirpath)) / LAST)
            raise Stopped(received)

    # The end of an epoch has saved the checkpoint already.
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if received := self._agreed(trainer):
            raise Stopped(received)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._restore_handlers()
        if received := self._agreed(trainer):
            raise Stopped(received)

    def _agreed(self, trainer: Trainer) -> int:
        """The signal that any process of the run has received, 0 if none has: the same in all of them."""
        received = self.received or 0
        if trainer.world_size == 1:
            return received
        device = trainer.strategy.root_device
        return int(trainer.strategy.reduce(torch.tensor(received, device=device), reduce_op="max"))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        while self.handlers:
            signal.signal(*self.handlers.popitem())


class EarlyStop(EarlyStopping):
    """Stop a run whose metric no longer improves.

    Args:
        enabled: Whether runs are stopped early.
        monitor: The metric that is watched.
        mode: Whether more (`max`) or less (`min`) of it is better.
        patience: Validations without improvement, 1 or more, after which the run stops.
        min_delta: What counts as an improvement, 0 or more.
    """

    def __init__(
        self,
        enabled: bool = False,
        monitor: Monitor = "val/loss",
        mode: Literal["min", "max"] = "min",
        patience: PositiveInt = 5,
        min_delta: NonNegativeFloat = 0.0,
    ) -> None:
        # The checkpoint holds these numbers: no classes of the parser's.
        super().__init__(monitor=monitor, mode=mode, patience=int(patience), min_delta=float(min_delta))
        self.enabled = enabled


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


class Progress(TQDMProgressBar):
    """A bar that costs little: drawn every 20 batches, and only where somebody watches."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=20 if sys.stdout.isatty() else 0)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}


def _moved(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """A checkpoint callback's state as if it had been written in `folder`: run directories may be moved."""
    here = {
        name: str(Path(folder) / Path(state[name]).name) for name in state if name.endswith("_path") and state[name]
    }
    best = {str(Path(folder) / Path(path).name): score for path, score in state["best_k_models"].items()}
    return {**state, **here, "best_k_models": best, "dirpath": folder}
