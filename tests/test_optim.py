"""Optimizers and schedules: their settings, their steps, and how they go on from a checkpoint."""

import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from runs import STEPS_PER_EPOCH, read, resume, rows, signals, stop
from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from mnist_lit import main

Fit = Callable[..., Any]

LR = 0.01
STEPS = 2 * STEPS_PER_EPOCH
FULL = "--trainer.precision=32-true"
LOG_ALL = ["--csv=true", "--trainer.log_every_n_steps=1"]


def scalars(cli: Any, name: str) -> dict[int, float]:
    """A metric's values by step, as the run wrote them."""
    return {int(row["step"]): float(row[name]) for row in rows(cli.run_dir) if row[name]}


# Optimizers


@pytest.mark.parametrize(
    ("flags", "kind", "setting"),
    [
        (["--model.optimizer=torch.optim.Adam", "--model.optimizer.betas=[0.8,0.9]"], Adam, {"betas": [0.8, 0.9]}),
        ([], AdamW, {"fused": True}),
    ],
)
def test_optimizer_is_any_class_or_the_fused_adamw_with_the_lr_of_the_model(
    flags: list[str], kind: type[Optimizer], setting: dict[str, Any], fit: Fit
) -> None:
    (optimizer,) = fit("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", *flags).trainer.optimizers
    assert isinstance(optimizer, kind)
    assert [group["lr"] for group in optimizer.param_groups] == [LR, LR]
    assert setting.items() <= {**optimizer.defaults, "betas": list(optimizer.defaults["betas"])}.items()


def test_weight_decay_spares_biases_and_normalisations(fit: Fit) -> None:
    flags = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.weight_decay=0.3", "--model.hidden=[8]"]
    cli = fit("--trainer.max_epochs=1", "--trainer.limit_train_batches=1", *flags)
    decay = {id(p): group["weight_decay"] for group in cli.trainer.optimizers[0].param_groups for p in group["params"]}
    by_name = {name: decay[id(parameter)] for name, parameter in cli.model.named_parameters()}
    spared = {name for name, value in by_name.items() if value == 0}
    assert set(by_name.values()) == {0, 0.3}
    kinds = {name: cli.model.get_submodule(name.rpartition(".")[0]) for name in by_name}
    assert spared == {
        name for name, module in kinds.items() if name.endswith("bias") or not isinstance(module, nn.Conv2d | nn.Linear)
    }


# Schedules


def cosine(step: int, length: int) -> float:
    return (1 + math.cos(math.pi * step / length)) / 2


def schedule(name: str, *settings: str) -> list[str]:
    flags = [f"--model.schedule.{setting}" for setting in settings]
    return [f"--model.schedule=torch.optim.lr_scheduler.{name}", *flags]


@pytest.mark.parametrize(
    ("flags", "factor"),
    [(schedule("CosineAnnealingLR"), cosine), (schedule("ExponentialLR", "gamma=0.9"), lambda step, _: 0.9**step)],
)
def test_a_schedule_takes_its_course_over_the_steps_of_the_run(
    flags: list[str], factor: Callable[[int, int], float], fit: Fit
) -> None:
    cli = fit(*LOG_ALL, *flags)
    assert scalars(cli, "lr") == pytest.approx({step: LR * factor(step, STEPS) for step in range(STEPS)})
    last = cli.trainer.optimizers[0].param_groups[0]["lr"]
    assert last == pytest.approx(LR * factor(STEPS, STEPS), abs=1e-12)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [(["--trainer.accumulate_grad_batches=3"], 2 * math.ceil(STEPS_PER_EPOCH / 3)), (["--trainer.max_steps=7"], 7)],
    ids=str,
)
def test_one_cycle_rises_to_the_lr_and_ends_where_it_is_planned(fit: Fit, flags: list[str], steps: int) -> None:
    lrs = scalars(fit(*LOG_ALL, *schedule("OneCycleLR"), *flags), "lr")
    assert list(lrs) == list(range(steps))
    assert lrs[0] == pytest.approx(LR / 25)
    assert lrs[steps - 1] == pytest.approx(LR / 25 / 1e4)
    assert LR / 2 < max(lrs.values()) <= LR


# Runs that go on


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch, with OneCycleLR and AdamW."""
    run_dir = tmp_path_factory.mktemp("begun") / "run"
    flags = ["--model.optimizer=AdamW", *schedule("OneCycleLR"), "--trainer.max_epochs=1"]
    main(["fit", *SMALL, FULL, *LOG_ALL, *flags, f"--run_dir={run_dir}"])
    return run_dir


@pytest.fixture
def go_on(begun: Path, tmp_path: Path) -> Callable[..., Any]:
    """`go_on(*flags)`: train a copy of the run for a second epoch."""
    shutil.copytree(begun, tmp_path / "run")
    return lambda *flags: main(["fit", f"--ckpt_path={tmp_path / 'run'}", "--trainer.max_epochs=2", *flags])


@pytest.mark.parametrize(
    ("flags", "num_steps"),
    [([], 20), (["--data.batch_size=64"], 10 + 20), (["--trainer.accumulate_grad_batches=3"], 10 + 4)],
    ids=str,
)
def test_the_schedule_of_a_run_that_goes_on_covers_the_steps_done_and_those_that_remain(
    flags: list[str], num_steps: int, go_on: Callable[..., Any]
) -> None:
    lrs = scalars(go_on(*flags), "lr")
    assert max(lrs) == num_steps - 1
    assert lrs[num_steps - 1] == pytest.approx(LR / 25 / 1e4)
    planned = torch.optim.lr_scheduler.OneCycleLR(AdamW(nn.Linear(1, 1).parameters()), LR, num_steps)
    for step in range(num_steps - 1):
        planned.optimizer.step()
        if step >= 10:
            assert lrs[step] == pytest.approx(planned.get_last_lr()[0])
        planned.step()


def test_settings_of_a_run_that_goes_on_are_those_of_its_flags(go_on: Callable[..., Any]) -> None:
    cli = go_on("--model.lr=0.004", "--model.optimizer.weight_decay=0.9", "--model.optimizer.eps=1e-6")
    decayed, spared = read(cli.run_dir)["optimizer_states"][0]["param_groups"]
    assert (decayed["max_lr"], decayed["weight_decay"], decayed["eps"]) == (0.004, 0.9, 1e-6)
    assert (spared["max_lr"], spared["weight_decay"], spared["eps"]) == (0.004, 0.0, 1e-6)
    assert cli.trainer.optimizers[0].state_dict()["state"][0]["step"] == STEPS  # its moments go on


@pytest.mark.parametrize(
    ("flags", "key", "expected"),
    [
        (["--model.optimizer=SGD", "--model.optimizer.momentum=0.8"], "optimizer", LR / 25 / 1e4),
        (schedule("CosineAnnealingLR"), "schedule", LR * cosine(9, 10)),
        (["--model.schedule=null"], "schedule", LR),
    ],
    ids=str,
)
def test_another_class_starts_with_fresh_state_and_a_note(
    flags: list[str], key: str, expected: float, go_on: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    cli = go_on(*flags)
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.endswith("its state is fresh")]
    assert f"model.{key}" in note
    assert scalars(cli, "lr")[STEPS - 1] == pytest.approx(expected)


def test_a_finished_schedule_that_rises_again_is_announced(
    go_on: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    go_on("--trainer.max_epochs=1")
    assert capsys.readouterr().err == ""
    go_on()
    (note,) = capsys.readouterr().err.splitlines()
    assert "model.schedule" in note


@pytest.mark.parametrize("batch_size", [40, 300])
def test_a_run_that_was_stopped_in_an_epoch_goes_on_with_another_batch_size(batch_size: int) -> None:
    """The stopped epoch had 10 batches; now it has 31 or 5, so that the place in it lies beyond its end."""
    stop("fit", *SMALL, *LOG_ALL, *schedule("OneCycleLR"), "--run_dir=run", signals(signum=signal.SIGINT, batch=16))
    cli = resume(Path("run"), f"--data.batch_size={batch_size}", "--trainer.max_epochs=3")
    lrs = scalars(cli, "lr")
    assert list(lrs) == list(range(cli.trainer.global_step))
    assert lrs[max(lrs)] == pytest.approx(LR / 25 / 1e4)


def test_an_optimizer_that_the_schedule_cannot_drive_is_said_with_both_keys(fails: Callable[..., str]) -> None:
    error = fails("fit", *SMALL, "--model.optimizer=Adagrad", *schedule("OneCycleLR"))
    assert all(words in error for words in ("model.optimizer", "model.schedule", "Adagrad", "cycle_momentum"))


def test_a_plateau_goes_on_with_its_lr_and_with_new_settings(fit: Fit) -> None:
    plateau = schedule("ReduceLROnPlateau", "patience=0", "threshold=0.99")  # no second epoch is that much better
    fit(*LOG_ALL, *plateau, "--run_dir=run")
    cli = main(["fit", "--ckpt_path=run", "--trainer.max_epochs=4", "--model.schedule.factor=0.5"])
    lrs = scalars(cli, "lr")
    assert [lrs[10 * epoch] for epoch in range(4)] == pytest.approx([LR, LR, LR * 0.1, LR * 0.05])
