"""The metrics of a run: metrics.json, the loggers' hyper-parameters, the configuration in each checkpoint."""

import json
import operator
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_only

from mnist_lit.errors import MNISTLitError
from mnist_lit.formatting import flatten, format_value
from mnist_lit.training.run_dir import write_text

__all__ = ["MetricsWriter"]

PACKAGES = ("mnist_lit", "torch", "torchvision", "lightning", "torchmetrics")
# Hyper-parameters that are logged even where they have their defaults.
ALWAYS = ("model.lr", "model.channels", "data.batch_size", "trainer.max_epochs")


class MetricsWriter(Callback):
    """Write `metrics.json`, and give every logger the hyper-parameters.

    The best epoch is that of `monitor` and `mode`; of the lowest `val/loss` where the monitor is not of the validation.
    """

    def __init__(
        self, run_dir: Path, config: dict[str, Any], defaults: Mapping[str, Any], *, monitor: str | None, mode: str
    ) -> None:
        self.file = run_dir / "metrics.json"
        self.config, self.defaults = config, defaults
        self.monitor, self.mode = monitor, mode
        self.best: dict[str, float] = {}
        self.best_step = self.judged_step = -1
        self.seconds, self.num_images = 0.0, 0
        self.started: float | None = None

    @property
    def state_key(self) -> str:
        return "RunRecord"  # the name of this class when the first checkpoints were written

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "seconds": self._elapsed(), "num_images": self.num_images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        self.seconds, self.num_images = state_dict["seconds"], state_dict["num_images"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            logger.log_hyperparams(self._hparams(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        self.num_images += len(batch[1]) * trainer.world_size

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._merge(trainer)
        elif not trainer.sanity_checking:
            self.is_best(trainer)
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._merge(trainer)

    def is_best(self, trainer: Trainer) -> bool:
        """Check whether the validation that has just ended is the best; callbacks may ask in any order."""
        if self.judged_step == trainer.global_step:
            return self.best_step == self.judged_step
        self.judged_step = trainer.global_step
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        name, mode = (self.monitor, self.mode) if self.monitor in metrics else ("val/loss", "min")
        is_better = operator.gt if mode == "max" else operator.lt
        if name in metrics and (name not in self.best or is_better(metrics[name], self.best[name])):
            self.best = {**metrics, "epoch": trainer.current_epoch}
            self.best_step = self.judged_step
        if "val/acc_best" in metrics:
            self.best["val/acc_best"] = metrics["val/acc_best"]
        return self.best_step == self.judged_step

    def _hparams(self, trainer: Trainer) -> dict[str, Any]:
        """Select the keys that differ from their defaults, and those that always count."""
        config, defaults = flatten(self.config), flatten(self.defaults)
        values = {key: config[key] for key in config if key in ALWAYS or config[key] != defaults.get(key)}
        values["model.optimizer"] = type(trainer.optimizers[0]).__name__
        values["seed"] = values.pop("seed_everything", self.config["seed_everything"])
        return {key: value if isinstance(value, int | float) else format_value(value) for key, value in values.items()}

    @rank_zero_only
    def _merge(self, trainer: Trainer) -> None:
        """Add the metrics of an evaluation to those in the file."""
        try:
            recorded = json.loads(self.file.read_bytes()) if self.file.is_file() else self._facts(trainer)
        except ValueError as error:
            raise MNISTLitError(f"{self.file} is damaged: {error}\nrename it; this command writes a new one") from error
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
        self._write_json({**recorded, **metrics})

    @rank_zero_only
    def _write(self, trainer: Trainer) -> None:
        seconds = self._elapsed()
        speed = {
            "seconds": round(seconds, 3),
            "images_per_second": round(self.num_images / seconds, 1) if seconds else 0.0,
        }
        self._write_json({"epoch": trainer.current_epoch, **self.best, **speed, **self._facts(trainer)})

    def _write_json(self, metrics: dict[str, Any]) -> None:
        write_text(self.file, json.dumps(metrics, indent=2) + "\n")

    def _elapsed(self) -> float:
        return self.seconds + (0.0 if self.started is None else time.monotonic() - self.started)

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
