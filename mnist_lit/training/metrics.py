"""What a run leaves for people and programs: metrics.json, its hyper-parameters, its config in each checkpoint."""

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_only

from mnist_lit.errors import MNISTLitError
from mnist_lit.training.run_dir import write_text

__all__ = ["RunRecord"]

PACKAGES = ("mnist_lit", "torch", "torchvision", "lightning", "torchmetrics")


class RunRecord(Callback):
    """Write `metrics.json` and give every logger the hyper-parameters.

    Args:
        run_dir: Where the run lies.
        config: The complete configuration as plain data.
        monitor: The metric whose best epoch is recorded, if any.
        mode: Whether more (`max`) or less (`min`) of it is better.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any], *, monitor: str | None, mode: str) -> None:
        self.file = run_dir / "metrics.json"
        self.config = config
        self.monitor = monitor
        self.sign = 1 if mode == "max" else -1
        self.best: dict[str, float] = {}
        self.seconds = 0.0
        self.num_images = 0
        self.clock = 0.0
        self.has_hparams = False

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "seconds": self._seconds(), "num_images": self.num_images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        self.seconds = state_dict["seconds"]
        self.num_images = state_dict["num_images"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage in ("validate", "test") and self.file.is_file():
            self._read()  # before anything is computed that it could not take in

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            # TensorBoard can only show hyper-parameters beside a metric that there is: see on_validation_end.
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(self._hparams())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.num_images += len(batch[1]) * trainer.world_size

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._merge(trainer)
        elif not trainer.sanity_checking:
            self._record_validation(trainer)

    def _record_validation(self, trainer: Trainer) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if self._is_best(metrics):
            self.best = {**metrics, "epoch": trainer.current_epoch}
        if "val/acc_best" in metrics:
            self.best["val/acc_best"] = metrics["val/acc_best"]
        self._log_hparams(trainer)
        self._write_fit(trainer)

    def _is_best(self, metrics: dict[str, float]) -> bool:
        name = self.monitor if self.monitor in metrics else "val/loss"
        sign = self.sign if name == self.monitor else -1
        return name in metrics and (name not in self.best or sign * metrics[name] > sign * self.best[name])

    def _log_hparams(self, trainer: Trainer) -> None:
        if self.has_hparams or "val/acc_best" not in self.best:
            return
        self.has_hparams = True
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(self._hparams(), {"val/acc_best": self.best["val/acc_best"]})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_fit(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self.clock:
            self._write_fit(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._merge(trainer)

    @rank_zero_only
    def _merge(self, trainer: Trainer) -> None:
        before = self._read() if self.file.is_file() else self._facts(trainer)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
        write_text(self.file, json.dumps({**before, **metrics}, indent=2) + "\n")

    def _read(self) -> dict[str, Any]:
        try:
            metrics: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise MNISTLitError(
                f"{self.file} is damaged: {error}\nrename it, and this command makes a new one"
            ) from error
        return metrics

    @rank_zero_only
    def _write_fit(self, trainer: Trainer) -> None:
        seconds = self._seconds()
        record = {
            "epoch": trainer.current_epoch,
            **self.best,
            "seconds": round(seconds, 3),
            "images_per_second": round(self.num_images / seconds, 1) if seconds else 0.0,
            **self._facts(trainer),
        }
        write_text(self.file, json.dumps(record, indent=2) + "\n")

    def _seconds(self) -> float:
        return self.seconds + (time.monotonic() - self.clock if self.clock else 0.0)

    def _facts(self, trainer: Trainer) -> dict[str, Any]:
        versions = [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]
        return {
            "seed": self.config["seed_everything"],
            "dataset": self.config["data"]["dataset"],
            "device": trainer.strategy.root_device.type,
            "precision": str(trainer.precision),
            "parameters": sum(parameter.numel() for parameter in trainer.lightning_module.parameters()),
            "versions": ", ".join(versions),
        }

    def _hparams(self) -> dict[str, Any]:
        sections = {name: self.config[name] for name in ("model", "data", "ema", "early_stopping")}
        names = ("max_epochs", "precision", "accumulate_grad_batches", "gradient_clip_val", "devices")
        sections["trainer"] = {name: self.config["trainer"][name] for name in names}
        return {**_flat(sections), "seed": self.config["seed_everything"]}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined with dots; values that are no scalars become text."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            flat[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
