"""Callbacks of every run: checkpoints, early stopping, weight averaging."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, WORSE
from lightning.pytorch import Callback, LightningModule, Trainer
from runs import metrics, read

from mnist_lit import main

Fit = Callable[..., Any]


class Seen(Callback):
    """A user's own callback: what a run shows to it."""

    def __init__(self) -> None:
        self.raw: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.raw.append(_weight(pl_module))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.validated.append(_weight(pl_module))


SEEN = "--trainer.callbacks=test_callbacks.Seen"  # one alone, without a list
WEIGHT = "network.head.1.weight"


def _weight(pl_module: LightningModule) -> torch.Tensor:
    return pl_module.get_parameter(WEIGHT).detach().clone()


def seen(cli: Any) -> Seen:
    found: Seen = next(callback for callback in cli.trainer.callbacks if isinstance(callback, Seen))
    return found


# Checkpoints


@pytest.mark.parametrize(("mode", "epoch"), [("min", 2), ("max", 0), ("null", 2)])
def test_monitor_and_mode_decide_which_is_best(mode: str, epoch: int, fit: Fit) -> None:
    flags = ("--checkpoint.monitor=val/loss", f"--checkpoint.mode={mode}", "--trainer.max_epochs=3", "--run_dir=run")
    fit("--model.lr=0.001", *flags)
    assert read(Path("run"), "best")["epoch"] == epoch
    assert metrics(Path("run"))["epoch"] == epoch


@pytest.mark.parametrize(
    ("flags", "code"),
    [(["--checkpoint.monitor=M"], 2), (["--early_stopping.enabled=true", "--early_stopping.monitor=M"], 1)],
)
def test_metric_that_is_not_logged_is_named_with_those_that_are(
    flags: list[str], code: int, fails: Callable[..., str]
) -> None:
    error = fails("fit", *SMALL, *[flag.replace("=M", "=val/accuracy") for flag in flags], code=code)
    assert all(name in error for name in ("val/accuracy", "val/acc", "train/loss"))


def test_best_checkpoint_is_tested_where_another_callback_keeps_others(fit: Fit) -> None:
    worst = "{class_path: ModelCheckpoint, init_args: {monitor: val/acc, mode: min, dirpath: elsewhere}}"
    fit(*WORSE, f"--trainer.callbacks=[{worst}]", "--test_after_fit=true", "--run_dir=run")
    tested = metrics(Path("run"))["test/acc"]
    assert tested == float(main(["test", "--ckpt_path=run"]).trainer.callback_metrics["test/acc"])


def test_precision_may_be_a_plugin(fit: Fit) -> None:
    cli = fit("--trainer.plugins=lightning.pytorch.plugins.DoublePrecision", "--trainer.max_epochs=1", "--run_dir=run")
    assert metrics(Path("run"))["precision"] == cli.trainer.precision == "64-true"


def test_checkpoints_can_be_turned_off(fit: Fit) -> None:
    cli = fit("--checkpoint.enabled=false", "--test_after_fit=true", "--run_dir=run")
    assert not list(Path("run").rglob("*.ckpt"))
    assert 0 < float(cli.trainer.callback_metrics["val/acc_best"]) <= 1
    assert 0 < metrics(Path("run"))["test/acc"] <= 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--early_stopping.enabled=true", "--trainer.max_steps=5"],
        ["--early_stopping.enabled=true", "--early_stopping.monitor=train/loss", "--trainer.val_check_interval=3"],
        ["--checkpoint.monitor=train/loss", "--checkpoint.mode=min", "--trainer.val_check_interval=3"],
    ],
)
def test_metric_that_is_not_there_yet_is_waited_for(flags: list[str], fit: Fit) -> None:
    cli = fit(*flags, "--run_dir=run")
    assert read(Path("run"), "last")["global_step"] == cli.trainer.global_step > 0


# Early stopping


def test_early_stopping_ends_a_run_that_no_longer_improves(fit: Fit) -> None:
    flags = ("--early_stopping.enabled=true", "--early_stopping.patience=2", "--early_stopping.min_delta=100")
    cli = fit(*flags, "--trainer.max_epochs=20")
    assert cli.trainer.current_epoch == 3


# Weight averaging


def test_validation_and_checkpoints_use_the_averaged_weights(fit: Fit) -> None:
    cli = fit("--ema.enabled=true", "--ema.decay=0.5", "--trainer.max_epochs=1", "--run_dir=run", SEEN)
    average, *later = seen(cli).raw
    for raw in later:
        average = average + 0.5 * (raw - average)
    assert torch.allclose(seen(cli).validated[-1], average, atol=1e-6)
    assert not torch.allclose(seen(cli).validated[-1], later[-1], atol=1e-6)
    for checkpoint in (read(Path("run"), "best"), read(Path("run"), "last")):
        assert torch.equal(checkpoint["state_dict"][WEIGHT], seen(cli).validated[-1])
        raw = next(value for key, value in checkpoint["current_model_state"].items() if key.endswith(WEIGHT))
        assert torch.equal(raw, later[-1])


# Callbacks of the user's own


def test_callback_may_copy_the_model(fit: Fit) -> None:
    averaging = {"class_path": "StochasticWeightAveraging", "init_args": {"swa_lrs": 0.01, "device": None}}
    parts = ("--model.optimizer=AdamW", "--model.schedule=StepLR", "--model.schedule.step_size=30")
    cli = fit("--trainer.max_epochs=3", *parts, f"--trainer.callbacks=[{json.dumps(averaging)}]")
    assert cli.trainer.current_epoch == 3 + 1  # one more for the statistics of the averaged weights
