"""The LightningModule in small real runs: metrics, clipping, precision, checkpoints."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, digits, trainer
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.plugins import MixedPrecision
from runs import STEPS_PER_EPOCH
from sklearn.metrics import f1_score  # type: ignore[import-untyped]  # it has no types
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD

from mnist_lit import Classifier, ConvNet, MNISTDataModule, main

Fit = Callable[..., Any]

FULL = "--trainer.precision=32-true"


def predicted(model: ConvNet, split: str, datamodule: MNISTDataModule) -> tuple[Tensor, Tensor]:
    """Logits and labels of a whole split, computed by hand."""
    loader = datamodule.val_dataloader() if split == "val" else datamodule.test_dataloader()
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    with torch.no_grad():
        return model.eval()(images / 255), labels


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small run with label smoothing, in full precision, tested at its end."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    flags = [f"--run_dir={run_dir}", "--test_after_fit=true", "--model.label_smoothing=0.2"]
    return main(["fit", *SMALL, FULL, *flags, "--checkpoint.monitor=null", "--data.eval_batch_size=33"])


# Metrics


@pytest.mark.parametrize("split", ["val", "test"])
def test_metrics_are_those_of_the_whole_split(run: Any, split: str) -> None:
    logits, labels = predicted(run.model, split, run.datamodule)
    guesses = logits.argmax(dim=1)
    metrics = {name: float(value) for name, value in run.trainer.callback_metrics.items()}
    assert len(labels) == {"val": 200, "test": 360}[split]
    assert metrics[f"{split}/acc"] == pytest.approx(float((guesses == labels).float().mean()), abs=1e-6)
    assert metrics[f"{split}/f1"] == pytest.approx(f1_score(labels, guesses, average="macro"), abs=1e-6)
    assert metrics[f"{split}/loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-5)
    assert 0.2 < metrics[f"{split}/acc"] < 1


def test_training_metrics_are_means_over_all_images_of_the_epoch(fit: Fit) -> None:
    flags = ["--model.lr=1e-12", "--model.norm=none", "--trainer.max_epochs=1", "--data.batch_size=100"]
    cli = fit(FULL, *flags, "--model.label_smoothing=0.5")
    images, labels = (torch.cat(parts) for parts in zip(*cli.datamodule.train_dataloader(), strict=True))
    with torch.no_grad():
        logits = cli.model(images / 255)
    assert len(labels) == 1_237  # the last batch is smaller and must not weigh as much as a whole one
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    loss = float(F.cross_entropy(logits, labels, label_smoothing=0.5))
    assert metrics["train/loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["train/acc"] == pytest.approx(float((logits.argmax(dim=1) == labels).float().mean()))


def test_the_first_loss_is_the_recorded_one(fit: Fit) -> None:
    """Recorded with torch 2.15 on x86 by running this test: it changes when data, network or training do."""
    cli = fit(FULL, "--trainer.max_epochs=1", "--seed_everything=7")
    assert float(cli.trainer.callback_metrics["train/loss"]) == pytest.approx(1.209644, abs=1e-4)


# Gradients


@pytest.mark.parametrize("fused", [True, False])
def test_under_a_gradient_scaler_it_is_the_unscaled_gradient_that_is_clipped(fused: bool) -> None:
    bound = 1e-3
    weights: list[Tensor] = []  # at the start and after each step

    def note(_: Trainer, model: LightningModule, *_args: Any) -> None:
        weights.append(parameters_to_vector(model.parameters()).detach())

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    model = ConvNet(channels=[4], lr=1.0, optimizer=partial(SGD, fused=fused))
    noting = LambdaCallback(on_train_start=note, on_train_batch_end=note)
    trainer(noting, plugins=[plugin], gradient_clip_val=bound).fit(model, digits())
    updates = [float((after - before).norm()) for before, after in pairwise(weights)]
    assert updates == pytest.approx([bound] * STEPS_PER_EPOCH, rel=1e-2)


# Compilation


@pytest.mark.slow
def test_a_compiled_run_learns_and_its_checkpoint_is_a_plain_one(fit: Fit) -> None:
    flags = ["--trainer.max_epochs=3", "--data.batch_size=64", "--pictures.enabled=true"]
    cli = fit("--model.compile=true", FULL, *flags)
    assert float(cli.trainer.callback_metrics["val/acc"]) > 0.5
    file = cli.run_dir / "checkpoints" / "best.ckpt"
    state = torch.load(file, weights_only=True)["state_dict"]
    assert list(state) == list(ConvNet(channels=[4]).state_dict())
    model = ConvNet.load_from_checkpoint(file, compile=False)
    logits, labels = predicted(model, "val", cli.datamodule)
    accuracy = float((logits.argmax(dim=1) == labels).float().mean())
    assert accuracy == pytest.approx(float(cli.trainer.callback_metrics["val/acc_best"]))


# Checkpoints


def test_a_model_built_in_python_with_functions_has_a_checkpoint_of_plain_data(tmp_path: Path) -> None:
    model = ConvNet(
        channels=[4], optimizer=partial(SGD, momentum=0.9), schedule=torch.optim.lr_scheduler.CosineAnnealingLR
    )
    fitting = trainer()
    fitting.fit(model, digits())
    fitting.save_checkpoint(tmp_path / "model.ckpt")
    hyper_parameters = torch.load(tmp_path / "model.ckpt", weights_only=True)["hyper_parameters"]
    assert hyper_parameters["channels"] == [4]
    assert {"optimizer", "schedule"}.isdisjoint(hyper_parameters)
    images = torch.rand(4, 1, 28, 28)
    again = ConvNet.load_from_checkpoint(tmp_path / "model.ckpt")
    assert torch.equal(again.eval()(images), model.eval()(images))
    assert fitting.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_any_network_is_trained_and_loaded_by_a_subclass_of_classifier(tmp_path: Path) -> None:
    class Linear(Classifier):
        def __init__(self, width: int = 16, lr: float = 0.01, num_classes: int = 12) -> None:
            layers = [nn.Flatten(), nn.Linear(784, width), nn.ReLU(), nn.Linear(width, num_classes)]
            super().__init__(nn.Sequential(*layers), num_classes=num_classes, lr=lr)

    model, fitting = Linear(width=64), trainer(max_epochs=4)
    fitting.fit(model, digits())
    fitting.save_checkpoint(tmp_path / "model.ckpt")
    again = Linear.load_from_checkpoint(tmp_path / "model.ckpt")
    images = torch.rand(4, 1, 28, 28)
    assert float(fitting.callback_metrics["val/acc"]) > 0.5
    assert again.hparams["width"] == 64
    assert again.eval()(images).shape == (4, 12)
    assert torch.equal(again(images), model.eval()(images))
