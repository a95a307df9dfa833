"""The metrics of a run: metrics.json, TensorBoard's event files, metrics.csv, the configuration in each checkpoint."""

import functools
import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from mnist_lit.formatting import flag_names, format_value
from mnist_lit.training.run_dir import is_global_zero, write_csv, write_text, write_yaml
from mnist_lit.version import __version__

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics")
# Hyper-parameters that are logged even where they have their defaults.
ALWAYS = ("model.lr", "model.channels", "data.batch_size", "trainer.max_epochs")
HPARAMS_METRIC = "val/acc_best"


def best_mode(monitor: str | None) -> Literal["min", "max"]:
    """Choose whether less or more of a metric is better, where no configuration says it."""
    return "min" if monitor is not None and monitor.endswith("loss") else "max"


class MetricsWriter(Callback):
    """Write `metrics.json`, and give every logger the hyper-parameters.

    The best epoch is that of `checkpoint.monitor`; of the lowest `val/loss` where that is not of the validation.
    A run that resumes replaces its config.yaml after a first batch: what fails before changes nothing.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any], defaults: Callable[[], Any], *, resumes: bool) -> None:
        self.file = run_dir / "metrics.json"
        self.config, self.defaults, self.resumes = config, defaults, resumes
        monitor, mode = config["checkpoint"]["monitor"], config["checkpoint"]["mode"]
        self.judge = [monitor, mode or best_mode(monitor)]
        self.best: dict[str, float] = {}
        self.best_step = self.judged_step = -1
        self.seconds, self.num_images = 0.0, 0  # until the last batch or validation has ended
        self.started = 0.0
        self.has_logged_params, self.has_recorded_config = False, not resumes

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "judge": self.judge, "seconds": self.seconds, "num_images": self.num_images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("judge", self.judge) == self.judge:  # else best.ckpt begins anew, too
            self.best = state_dict["best"]
        self.seconds, self.num_images = state_dict["seconds"], state_dict["num_images"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # The best epoch of another run, its checkpoint and its pictures are not those of a new one.
        if trainer.state.fn == TrainerFn.FITTING and not self.resumes:
            of_run = ("BestCheckpoint", "MetricsWriter", "Pictures")
            states = checkpoint.get("callbacks", {}).items()
            checkpoint["callbacks"] = {name: state for name, state in states if not name.startswith(of_run)}
            pl_module.best_acc = 0.0  # type: ignore[assignment]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.monotonic() - self.seconds

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        self.seconds = time.monotonic() - self.started
        self.num_images += len(batch[1]) * trainer.world_size
        if not self.has_recorded_config and trainer.is_global_zero:
            self.has_recorded_config = True
            write_yaml(self.file.with_name("config.yaml"), self.config)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.has_logged_params:
            return
        self.has_logged_params = True
        # Those that always count, and those that differ from their defaults.
        config, defaults = flag_names(self.config), flag_names(self.defaults())
        params = {key: value for key, value in config.items() if key in ALWAYS or value != defaults.get(key)}
        params |= {"model.optimizer": type(trainer.optimizers[0]).__name__, "seed": config["seed_everything"]}
        params.pop("seed_everything", None)
        for key, value in params.items():
            params[key] = value if type(value) in (int, float) else format_value(value)
        for logger in trainer.loggers:
            logger.log_hyperparams(params)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_test_end(trainer, pl_module)
        elif not trainer.sanity_checking:
            self.seconds = time.monotonic() - self.started
            self.is_best(trainer)
            self.on_train_end(trainer, pl_module)

    def is_best(self, trainer: Trainer) -> bool:
        """Check whether the validation that has just ended is the best; callbacks may ask in any order."""
        if self.judged_step != trainer.global_step:
            self.judged_step = trainer.global_step
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name[:4] == "val/"}
            name, mode = self.judge if self.judge[0] in metrics else ("val/loss", "min")
            sign = 1 if mode == "max" else -1
            score, best = (sign * of_epoch.get(name, math.nan) for of_epoch in (metrics, self.best))
            is_better = score > (-math.inf if math.isnan(best) else best)  # as ModelCheckpoint, NaN is the worst score
            if name in metrics and (name not in self.best or is_better):
                self.best = {**metrics, "epoch": trainer.current_epoch}
                self.best_step = self.judged_step
            self.best |= {name: value for name, value in metrics.items() if name == HPARAMS_METRIC}
        return self.best_step == self.judged_step

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        speed = self.num_images / self.seconds if self.seconds else 0.0
        timing = {"seconds": round(self.seconds, 3), "images_per_second": round(speed, 1)}
        epoch = max(trainer.current_epoch - 1, 0)  # it is counted up already
        self._write({"epoch": epoch, **self.best, **timing, **self._facts(trainer)})

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        recorded = json.loads(self.file.read_bytes()) if self.file.is_file() else self._facts(trainer)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}
        self._write({**recorded, **metrics})

    def _write(self, metrics: dict[str, Any]) -> None:
        # JSON has no number for NaN and infinity.
        is_number = {name: not isinstance(value, float) or math.isfinite(value) for name, value in metrics.items()}
        values = {name: value if is_number[name] else None for name, value in metrics.items()}
        write_text(self.file, json.dumps(values, indent=2) + "\n")

    def _facts(self, trainer: Trainer) -> dict[str, Any]:
        return {
            "seed": self.config["seed_everything"],
            "dataset": trainer.datamodule.dataset,  # type: ignore[attr-defined]
            "device": trainer.strategy.root_device.type,
            "precision": str(trainer.precision),
            "parameters": sum(parameter.numel() for parameter in trainer.lightning_module.parameters()),
            "versions": _versions(),
        }


@functools.cache  # it reads files, and a trial of a search takes a fifth of a second beside its training
def _versions() -> str:
    own = [f"python {platform.python_version()}", f"mnist_lit {__version__}"]
    return ", ".join([*own, *(f"{name} {version(name)}" for name in PACKAGES)])


class TensorBoard(TensorBoardLogger):
    """Write event files into the run directory itself, and `metrics.csv` if wanted.

    A resumed run gives the step that it goes on from: what a killed run has logged from there on is dropped.
    """

    def __init__(self, run_dir: Path, *, purge_step: int | None, csv: bool = False) -> None:
        if purge_step is not None and is_global_zero():
            # TensorBoard sorts event files by name, which begins with the second they were made in: two may share it.
            for number, file in enumerate(sorted(run_dir.glob("events.out.tfevents.*"))):
                file.rename(run_dir / f"events.out.tfevents.{number:010d}.{file.name.split('.', 4)[4]}")
        super().__init__(run_dir, name="", version="", default_hp_metric=False, purge_step=purge_step)
        self.csv = csv

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Mapping[str, float] | None = None, step: int | None = None) -> None:
        """Log hyper-parameters beside the metric that has a curve: Lightning would log a point of its own."""
        for summary in hparams(params, {HPARAMS_METRIC: 0.0}):  # type: ignore[no-untyped-call]
            self.experiment.file_writer.add_summary(summary)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars, but not the epoch, which Lightning adds: its chart is a straight line."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)

    @rank_zero_only
    def save(self) -> None:
        """Flush the events; Lightning's file of hyper-parameters would only repeat config.yaml."""
        self.experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the event file; write `metrics.csv` if wanted: a row for each step, a column for each scalar."""
        super().finalize(status)
        if self.csv:
            curves = dict(sorted(read_scalars(Path(self.log_dir)).items()))
            steps = sorted(set().union(*curves.values()))
            # Events hold single precision.
            rows = ([f"{curve[step]:.8g}" if step in curve else "" for curve in curves.values()] for step in steps)
            lines = ([step, *row] for step, row in zip(steps, rows, strict=True))
            write_csv(Path(self.log_dir, "metrics.csv"), [["step", *curves], *lines])


def read_scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    """Read the values of each scalar by step, without those of later validations, which stand at earlier steps."""
    # Imported here as it takes a tenth of a second, and training needs none of it.
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={SCALARS: 0}).Reload()
    curves: dict[str, dict[int, float]] = {tag: {} for tag in events.Tags()[SCALARS]}
    for tag, curve in curves.items():
        for event in events.Scalars(tag):
            if event.step > next(reversed(curve), -1):
                curve[event.step] = event.value
    return curves
