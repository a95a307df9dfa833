"""The LightningModule in small real runs: metrics, optimizers, schedules, clipping, precision, checkpoints."""

import csv
import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, digits, trainer
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from sklearn.metrics import f1_score  # type: ignore[import-untyped]  # it has no types
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer

from mnist_lit import Classifier, ConvNet, MNISTDataModule, main
from mnist_lit.training.callbacks import EMA

Fit = Callable[..., Any]

LR = 0.01
BATCHES = 10  # of an epoch of SMALL: 1,437 - 200 images, 128 at a time
STEPS = 2 * BATCHES
FULL = "--trainer.precision=32-true"
LOG_ALL = ["--csv=true", "--trainer.log_every_n_steps=1"]


class Recorder(Callback):
    """Notes what a run really did: gradients and weights after each step, batches that were accumulated."""

    def __init__(self) -> None:
        self.raw_norms: list[float] = []
        self.norms: list[float] = []
        self.largest: list[float] = []
        self.weights: list[list[Tensor]] = []
        self.sanity: list[dict[str, float]] = []

    def _note_weights(self, model: LightningModule) -> None:
        self.weights.append([parameter.detach().clone() for parameter in model.parameters()])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note_weights(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.raw_norms.append(float(norm(gradients(pl_module))))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == len(self.weights):
            self._note_weights(pl_module)
            self.norms.append(float(norm(gradients(pl_module))))
            self.largest.append(max(float(gradient.abs().max()) for gradient in gradients(pl_module)))

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sanity.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def norm(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.float().flatten() for tensor in tensors]).square().sum().sqrt()


def update_norms(weights: list[list[Tensor]]) -> list[float]:
    return [float(norm([b - a for a, b in zip(before, after, strict=True)])) for before, after in pairwise(weights)]


def scalars(cli: Any, name: str) -> dict[int, float]:
    """A metric's values by step, as the run wrote them."""
    with (cli.run_dir / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


def predicted(model: ConvNet, split: str, datamodule: MNISTDataModule) -> tuple[Tensor, Tensor]:
    """Logits and labels of a whole split, computed by hand."""
    loader = datamodule.val_dataloader() if split == "val" else datamodule.test_dataloader()
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    with torch.no_grad():
        return model.eval()(images / 255), labels


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A small run with label smoothing, in full precision, tested at its end; every metric is in its CSV."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mnist_lit"])
        run_dir = tmp_path_factory.mktemp("run") / "run"
        flags = [f"--run_dir={run_dir}", "--test_after_fit=true", "--model.label_smoothing=0.2"]
        yield main(["fit", *SMALL, FULL, *LOG_ALL, *flags, "--checkpoint.monitor=null", "--data.eval_batch_size=33"])


# Metrics


def test_a_run_has_the_metrics_of_the_contract(run: Any) -> None:
    expected = {f"{split}/{name}" for split in ("val", "test") for name in ("loss", "acc", "f1")}
    assert set(run.trainer.callback_metrics) == expected | {"train/loss", "train/acc", "val/acc_best"}


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


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_training_metrics_are_means_over_all_images_of_the_epoch(fit: Fit, smoothing: float) -> None:
    flags = ["--model.lr=1e-12", "--model.norm=none", "--trainer.max_epochs=1", "--data.batch_size=100"]
    cli = fit(FULL, *flags, f"--model.label_smoothing={smoothing}")
    images, labels = (torch.cat(parts) for parts in zip(*cli.datamodule.train_dataloader(), strict=True))
    with torch.no_grad():
        logits = cli.model(images / 255)
    assert len(labels) == 1_237  # the last batch is smaller and must not weigh as much as a whole one
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    loss = float(F.cross_entropy(logits, labels, label_smoothing=smoothing))
    assert metrics["train/loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["train/acc"] == pytest.approx(float((logits.argmax(dim=1) == labels).float().mean()))


def test_the_best_accuracy_is_the_largest_of_all_epochs(fit: Fit) -> None:
    explode = ["torch.optim.lr_scheduler.StepLR", f"--model.schedule.step_size={STEPS}", "--model.schedule.gamma=1e4"]
    cli = fit(FULL, *LOG_ALL, "--trainer.max_epochs=4", f"--model.schedule={explode[0]}", *explode[1:])
    accuracies = list(scalars(cli, "val/acc").values())
    best = list(scalars(cli, "val/acc_best").values())
    assert accuracies[-1] < max(accuracies) - 0.2
    assert best == [max(accuracies[: epoch + 1]) for epoch in range(4)]
    assert float(cli.trainer.callback_metrics["val/acc_best"]) == max(accuracies)
    assert json.loads((cli.run_dir / "metrics.json").read_text())["val/acc_best"] == pytest.approx(max(accuracies))


def test_the_sanity_check_is_no_epoch(run: Any) -> None:
    model, recorder = ConvNet(channels=[4], lr=1e9, optimizer=SGD), Recorder()
    model.load_state_dict(run.model.state_dict())
    fitting = trainer(recorder, num_sanity_val_steps=2)
    fitting.fit(model, digits())
    assert recorder.sanity[0]["val/acc"] > float(fitting.callback_metrics["val/acc"])
    assert "val/acc_best" not in recorder.sanity[0]
    assert float(fitting.callback_metrics["val/acc_best"]) == float(fitting.callback_metrics["val/acc"])


def test_a_new_run_does_not_inherit_the_best_accuracy_of_the_one_that_made_its_weights(run: Any) -> None:
    model = ConvNet.load_from_checkpoint(run.run_dir / "checkpoints" / "last.ckpt")
    model.lr = 1e9
    fitting = trainer()
    fitting.fit(model, digits())
    metrics = fitting.callback_metrics
    assert float(metrics["val/acc_best"]) == float(metrics["val/acc"]) < run.model.best_acc


def test_the_first_loss_is_the_recorded_one(fit: Fit) -> None:
    """Recorded with torch 2.15 on x86 by running this test: it changes when data, network or training do."""
    cli = fit(FULL, "--trainer.max_epochs=1", "--seed_everything=7")
    assert float(cli.trainer.callback_metrics["train/loss"]) == pytest.approx(1.209644, abs=1e-4)


# Optimizers


@pytest.mark.parametrize(
    ("name", "flags", "expected"),
    [
        ("SGD", ["--model.optimizer.momentum=0.9"], {"momentum": 0.9}),
        ("Adam", ["--model.optimizer.betas=[0.8,0.9]"], {"betas": (0.8, 0.9)}),
    ],
)
def test_any_optimizer_works_by_its_class_path_with_the_lr_of_the_model(
    fit: Fit, name: str, flags: list[str], expected: dict[str, Any]
) -> None:
    cli = fit("--trainer.max_epochs=1", f"--model.optimizer=torch.optim.{name}", *flags, "--model.lr=0.003")
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is getattr(torch.optim, name)
    for group in optimizer.param_groups:
        assert {key: group[key] if key != "betas" else tuple(group[key]) for key in expected} == expected
        assert group["lr"] == 0.003
    assert float(cli.trainer.callback_metrics["val/acc"]) > 0.2


def test_without_an_optimizer_it_is_the_fused_adamw(run: Any) -> None:
    (optimizer,) = run.trainer.optimizers
    assert type(optimizer) is AdamW
    assert optimizer.defaults["fused"]
    assert [group["lr"] for group in optimizer.param_groups] == [LR, LR]


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


SCHEDULES: dict[str, tuple[list[str], Callable[[int, int], float]]] = {
    "CosineAnnealingLR": ([], cosine),
    "PolynomialLR": ([], lambda step, steps: 1 - step / steps),
    "CosineAnnealingWarmRestarts": (["T_0=5"], lambda step, _: cosine(step % 5, 5)),
    "ExponentialLR": (["gamma=0.9"], lambda step, _: 0.9**step),
    "StepLR": (["step_size=7", "gamma=0.5"], lambda step, _: 0.5 ** (step // 7)),
}


def schedule(name: str, *settings: str) -> list[str]:
    flags = [f"--model.schedule.{setting}" for setting in settings]
    return [f"--model.schedule=torch.optim.lr_scheduler.{name}", *flags]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_takes_its_course_over_the_steps_of_the_run(fit: Fit, name: str) -> None:
    settings, factor = SCHEDULES[name]
    cli = fit(*LOG_ALL, *schedule(name, *settings))
    expected = {step: LR * factor(step, STEPS) for step in range(STEPS)}
    assert scalars(cli, "lr") == pytest.approx(expected)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(LR * factor(STEPS, STEPS), abs=1e-12)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (["--trainer.accumulate_grad_batches=3"], 2 * math.ceil(BATCHES / 3)),
        (["--trainer.max_steps=7"], 7),
        (["--trainer.limit_train_batches=4"], 8),
    ],
    ids=str,
)
def test_one_cycle_rises_to_the_lr_and_ends_where_it_is_planned(fit: Fit, flags: list[str], steps: int) -> None:
    lrs = scalars(fit(*LOG_ALL, *schedule("OneCycleLR"), *flags), "lr")
    assert list(lrs) == list(range(steps))
    assert lrs[0] == pytest.approx(LR / 25)
    assert lrs[steps - 1] == pytest.approx(LR / 25 / 1e4)
    assert LR / 2 < max(lrs.values()) <= LR


def test_a_plateau_lowers_the_lr_at_the_end_of_an_epoch(fit: Fit) -> None:
    settings = ["patience=0", "threshold=0.99"]  # no second epoch is that much better
    cli = fit(*LOG_ALL, *schedule("ReduceLROnPlateau", *settings), "--trainer.max_epochs=3")
    assert scalars(cli, "lr") == pytest.approx({step: LR * (1 if step < 20 else 0.1) for step in range(30)})


# Gradients


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_under_a_gradient_scaler_it_is_the_unscaled_gradient_that_is_clipped(fused: bool, algorithm: str) -> None:
    bound, recorder = 1e-3, Recorder()
    clipping = {"gradient_clip_val": bound, "gradient_clip_algorithm": algorithm}
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    model = ConvNet(channels=[4], lr=1.0, optimizer=partial(SGD, fused=fused))
    trainer(recorder, plugins=[plugin], **clipping).fit(model, digits())
    updates = recorder.weights
    largest = [
        max(float((b - a).abs().max()) for a, b in zip(before, after, strict=True))
        for before, after in pairwise(updates)
    ]
    assert len(updates) == BATCHES + 1
    assert (update_norms(updates) if algorithm == "norm" else largest) == pytest.approx([bound] * BATCHES, rel=1e-2)


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    changes = []
    for batch_size, batches in ((400, 1), (100, 4)):
        seed_everything(1)
        model, recorder = ConvNet(channels=[4], norm="none", lr=1.0, optimizer=SGD), Recorder()
        limits = {"limit_train_batches": batches, "accumulate_grad_batches": batches, "limit_val_batches": 0}
        trainer(recorder, **limits).fit(model, digits(batch_size=batch_size))
        assert len(recorder.weights) == 2
        changes.append(recorder.weights[1])
    for whole, parts in zip(*changes, strict=True):
        torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-4)


# Precision, compilation, averaging


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_each_precision_learns(fit: Fit, precision: str) -> None:
    cli = fit(f"--trainer.precision={precision}", "--trainer.accelerator=cpu", "--trainer.max_epochs=3")
    assert str(cli.trainer.precision) == precision
    assert float(cli.trainer.callback_metrics["val/acc"]) > 0.5
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert {parameter.dtype for parameter in cli.model.parameters()} == {dtype}


@pytest.mark.slow
def test_a_compiled_run_learns_and_its_checkpoint_is_a_plain_one(fit: Fit) -> None:
    cli = fit("--model.compile=true", FULL, "--trainer.max_epochs=3", "--data.batch_size=64")
    assert float(cli.trainer.callback_metrics["val/acc"]) > 0.5
    file = cli.run_dir / "checkpoints" / "best.ckpt"
    state = torch.load(file, weights_only=True)["state_dict"]
    assert list(state) == list(ConvNet(channels=[4]).state_dict())
    model = ConvNet.load_from_checkpoint(file, compile=False)
    logits, labels = predicted(model, "val", cli.datamodule)
    accuracy = float((logits.argmax(dim=1) == labels).float().mean())
    assert accuracy == pytest.approx(float(cli.trainer.callback_metrics["val/acc_best"]))


def test_averaged_weights_are_the_exponential_moving_average_of_the_steps() -> None:
    model, recorder = ConvNet(channels=[4], norm="none", lr=0.1, optimizer=SGD), Recorder()
    trainer(recorder, EMA(enabled=True, decay=0.8)).fit(model, digits())
    average, *_ = recorder.weights[1:]  # the first step is taken as it is
    for weights in recorder.weights[2:]:
        average = [0.8 * mean + 0.2 * now for mean, now in zip(average, weights, strict=True)]
    torch.testing.assert_close([parameter.detach() for parameter in model.parameters()], average)


# Checkpoints


def test_a_checkpoint_holds_the_statistics_of_the_training_split(run: Any) -> None:
    state = torch.load(run.run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    images, _ = (torch.cat(parts) for parts in zip(*run.datamodule.train_dataloader(), strict=True))
    pixels = images.double() / 255
    assert float(state["network.mean"]) == pytest.approx(float(pixels.mean()))
    assert float(state["network.std"]) == pytest.approx(float(pixels.std(correction=0)))


def test_a_model_built_in_python_with_functions_has_a_checkpoint_of_plain_data(tmp_path: Path) -> None:
    model = ConvNet(
        channels=[4],
        optimizer=partial(SGD, momentum=0.9),
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR,  # type: ignore[arg-type]
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


@pytest.mark.parametrize("key", ["optimizer", "schedule"])
def test_weights_are_loaded_without_the_classes_that_trained_them(key: str, run: Any, tmp_path: Path) -> None:
    content = torch.load(run.run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    content["hyper_parameters"][key] = {"class_path": "nowhere.Mine", "init_args": {}}
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (tmp_path / "config.yaml").write_text("{}")
    torch.save(content, folder / "best.ckpt")
    images = torch.rand(4, 1, 28, 28)
    assert torch.equal(ConvNet.load_from_checkpoint(tmp_path).eval()(images), run.model.eval()(images))


# Runs that go on


def groups(run_dir: Path) -> list[dict[str, Any]]:
    """Read the settings of the optimizer from a run's last checkpoint."""
    state = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return list(state["optimizer_states"][0]["param_groups"])


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch, with OneCycleLR and AdamW."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mnist_lit"])
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
    [
        ([], 20),
        (["--data.batch_size=64"], 10 + 20),
        (["--data.batch_size=300"], 10 + 5),
        (["--trainer.accumulate_grad_batches=3"], 10 + 4),
        (["--trainer.limit_train_batches=4"], 10 + 4),
    ],
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
            assert lrs[step] == planned.get_last_lr()[0]
        planned.step()


def test_settings_of_a_run_that_goes_on_are_those_of_its_flags(go_on: Callable[..., Any]) -> None:
    cli = go_on("--model.lr=0.004", "--model.optimizer.weight_decay=0.9", "--model.optimizer.eps=1e-6")
    decayed, spared = groups(cli.run_dir)
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
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert f"model.{key}" in notes[0]
    assert scalars(cli, "lr")[STEPS - 1] == pytest.approx(expected)


def test_a_plateau_goes_on_with_its_lr_and_with_new_settings(fit: Fit) -> None:
    settings = ["patience=0", "threshold=0.99"]  # no second epoch is that much better
    fit(*LOG_ALL, *schedule("ReduceLROnPlateau", *settings), "--run_dir=run")
    cli = main(["fit", "--ckpt_path=run", "--trainer.max_epochs=4", "--model.schedule.factor=0.5"])
    lrs = scalars(cli, "lr")
    assert [lrs[10 * epoch] for epoch in range(4)] == pytest.approx([LR, LR, LR * 0.1, LR * 0.05])
