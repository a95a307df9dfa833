"""Every shipped config runs and does what its first comment promises."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS
from runs import files

from mnist_lit import main

ALL_NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
# The others are for searches.
NAMES = [name for name in ALL_NAMES if not name.startswith("search")]
# These have tests of their own, mlflow.yaml with the other trackers.
OWN = "accuracy base ddp debug digits fast gpu large_batch lr_finder mlflow mlp overfit profile quick"


def fit_config(tmp_path: Path, *names: str, flags: tuple[str, ...] = ()) -> Any:
    configs = [f"--config={CONFIGS / name}.yaml" for name in names]
    return main(["fit", *configs, f"--run_dir={tmp_path / 'run'}", *flags])


@pytest.mark.parametrize("name", ALL_NAMES)
def test_config_is_short_and_its_first_comment_tells_when_to_use_it(name: str) -> None:
    text = CONFIGS.joinpath(f"{name}.yaml").read_text()
    comment = text.split("\n\n")[0]
    assert comment.startswith("# ")
    assert "Use it" in comment or "Start here" in comment
    assert len(text.splitlines()) <= 50


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OWN.split()])
def test_config_runs_on_the_digits(name: str, tmp_path: Path) -> None:
    few = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=4")
    flags = (*few, "--trainer.check_val_every_n_epoch=1", "--data.val_size=200")
    cli = fit_config(tmp_path, "base", "digits", name, flags=flags)
    assert cli.trainer.global_step > 0
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert 0 <= float(cli.trainer.callback_metrics["val/acc_best"]) <= 1


def test_digits_reach_97_percent_without_a_download(tmp_path: Path) -> None:
    cli = fit_config(tmp_path, "base", "digits")
    assert float(cli.trainer.callback_metrics["test/acc"]) >= 0.97
    assert not (tmp_path / "data").exists()


def test_mlp_is_784_500_10(tmp_path: Path) -> None:
    cli = fit_config(tmp_path, "base", "digits", "mlp", "debug")
    shapes = [tuple(layer.weight.shape) for layer in cli.model.network.modules() if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(500, 784), (10, 500)]
    assert isinstance(cli.trainer.optimizers[0], torch.optim.Adam)
    assert cli.trainer.optimizers[0].param_groups[0]["initial_lr"] == 1e-3
    assert cli.datamodule.batch_size == 100


def test_debug_is_one_batch_and_gpu_runs_on_a_cpu_too(tmp_path: Path) -> None:
    cli = fit_config(tmp_path, "base", "digits", "gpu", "debug")
    assert cli.trainer.global_step == 1
    assert cli.trainer.num_test_batches == [1]
    assert cli.datamodule.splits["train"].images.device == cli.model.device


def test_overfit_learns_its_batches_by_heart(tmp_path: Path) -> None:
    cli = fit_config(tmp_path, "base", "digits", "overfit")
    assert cli.trainer.num_training_batches == 4
    assert float(cli.trainer.callback_metrics["train/acc"]) == 1.0


def test_profile_leaves_a_trace(tmp_path: Path) -> None:
    fit_config(tmp_path, "base", "digits", "profile")
    assert list((tmp_path / "run").glob("*.pt.trace.json"))


def test_large_batch_finds_its_size_and_accumulates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = fit_config(tmp_path, "base", "digits", "large_batch", flags=("--trainer.max_epochs=2",))
    found = cli.datamodule.batch_size
    assert found >= 1024
    batches_per_epoch = -(-len(cli.datamodule.splits["train"]) // found)
    num_steps = 2 * -(-batches_per_epoch // 4)
    assert cli.trainer.lr_scheduler_configs[0].scheduler.total_steps == num_steps
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == num_steps
    assert "--trainer.max_epochs 4\n" in capsys.readouterr().out


def test_lr_finder_replaces_the_learning_rate(tmp_path: Path) -> None:
    cli = fit_config(tmp_path, "base", "digits", "lr_finder", flags=("--trainer.max_epochs=2",))
    assert cli.model.lr != 0.02
    assert max(group["max_lr"] for group in cli.trainer.optimizers[0].param_groups) == cli.model.lr
    assert float(cli.trainer.callback_metrics["test/acc"]) > 0.8


def test_ddp_is_two_processes_and_one_run_with_the_results_of_one(tmp_path: Path, shell: Callable[..., Any]) -> None:
    """201 images and batches of 50: one process has 101 of them, the other 100, in as many batches."""
    configs = [f"--config={CONFIGS / name}.yaml" for name in ("base", "digits", "ddp")]
    flags = ["--data.val_size=201", "--data.eval_batch_size=50", "--trainer.precision=32-true", "--csv=true"]
    done = shell("fit", *configs, *flags, "--trainer.max_epochs=1", "--trainer.limit_train_batches=5", "--run_dir=run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "run"
    assert done.stdout.count("test/acc") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    expected = {"config.yaml", "metrics.json", "metrics.csv", "report.html", "checkpoints/best.ckpt", "events"}
    assert expected <= files(tmp_path / "run")
    # TensorBoard's names have the number of the process that writes.
    assert len({path.name.split(".")[-2] for path in (tmp_path / "run").glob("events*")}) == 1
    together = json.loads((tmp_path / "run" / "metrics.json").read_text())
    alone = ["--trainer.devices=1", "--trainer.strategy=auto", "--ckpt_path=run/checkpoints/best.ckpt"]
    for command, split in (("validate", "val"), ("test", "test")):
        metrics = main([command, *alone, f"--run_dir={command}"]).trainer.callback_metrics
        assert together[f"{split}/acc"] == float(metrics[f"{split}/acc"])
        for name in (f"{split}/f1", f"{split}/loss"):
            assert together[name] == pytest.approx(float(metrics[name]), abs=1e-6)


@pytest.mark.parametrize("name", ["fast", "quick", "accuracy"])
def test_recipe_is_complete_in_itself(name: str, tmp_path: Path) -> None:
    few = ["--data.eval_batch_size=50", "--trainer.max_epochs=1", "--trainer.limit_train_batches=4"]
    few += ["--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"]
    flags = ("--data.dataset=digits", "--data.val_size=200", *few)
    cli = fit_config(tmp_path, name, flags=flags)
    assert cli.trainer.lr_scheduler_configs[0].scheduler.total_steps == cli.trainer.global_step
    assert "test/acc" in cli.trainer.callback_metrics


@pytest.mark.slow  # test_images.py trains by fast.yaml once
@pytest.mark.parametrize(
    ("names", "target"), [(["base"], 0.993), (["base", "mlp"], 0.98), (["fast"], 0.99), (["quick"], 0.995)]
)
def test_real_mnist_to_the_promised_accuracy(names: list[str], target: float, tmp_path: Path, mnist_dir: Path) -> None:
    accuracies = []
    for seed in ("1", "2", "3"):
        flags = (f"--data.data_dir={mnist_dir}", f"--seed_everything={seed}")
        cli = fit_config(tmp_path / seed, *names, flags=flags)
        accuracies.append(float(cli.trainer.callback_metrics["test/acc"]))
    assert len(cli.datamodule.splits["test"]) == 10_000
    assert sum(accuracies) / 3 >= target
