"""The data module: splits, statistics, batches, augmentation, and the same of all this in several processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, digits, trainer
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from runs import metrics
from torch import Tensor

from mnist_lit import ConvNet, MNISTDataModule, main
from mnist_lit.data.augment import Augment

Fit = Callable[..., Any]
Fails = Callable[..., str]

STRONG = Augment(rotation=30, translation=0.2, erasing=0.5)


class Batches(Callback):
    """Keeps what the model is given, on its way in."""

    def __init__(self) -> None:
        self.train: list[Tensor] = []
        self.val: list[Tensor] = []
        self.test: list[Tensor] = []
        self.predict: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.train.append(batch[0].clone())

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any) -> None:
        self.val.append(batch[0].clone())

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any) -> None:
        self.test.append(batch[0].clone())

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any) -> None:
        self.predict.append(batch[0].clone())


class StopAfter(Callback):
    """Saves a checkpoint after some steps and stops at once."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.steps:
            trainer.save_checkpoint("stopped.ckpt")
            trainer.should_stop = True


def ready(datamodule: MNISTDataModule, stage: str = "fit", **kwargs: Any) -> MNISTDataModule:
    """A data module as a run has it before its first batch."""
    datamodule.trainer = trainer(**kwargs)
    datamodule.setup(stage)
    return datamodule


def seen(seed: int = 1, epochs: int = 1, **kwargs: Any) -> Batches:
    """What a run with that seed gives its model."""
    seed_everything(seed)
    batches = Batches()
    datamodule = digits(batch_size=300, **kwargs)
    trainer(batches, max_epochs=epochs).fit(ConvNet(channels=[2], image_size=datamodule.image_size), datamodule)
    return batches


def as_set(pictures: Tensor) -> set[bytes]:
    return {picture.numpy().tobytes() for picture in pictures}


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[MNISTDataModule]]:
    """`processes(n, stage, **kwargs)`: the data module as each of n processes of a run has it."""
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # trainers change it; it is put back

    def build(num: int, stage: str = "fit", **kwargs: Any) -> list[MNISTDataModule]:
        datamodules = []
        for rank in range(num):
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            seed_everything(1)
            datamodules.append(ready(digits(**kwargs), stage, devices=num, strategy="ddp"))
            assert datamodules[-1].trainer is not None
            assert (datamodules[-1].trainer.world_size, datamodules[-1].trainer.global_rank) == (num, rank)
        return datamodules

    return build


def linked(data_dir: Path, source: Path, pattern: str) -> Path:
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (source / "MNIST" / "raw").glob(pattern):
        (raw / file.name).symlink_to(file)
    return data_dir


def mnist_flags(data_dir: Path) -> list[str]:
    few = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]
    return [f"--data.data_dir={data_dir}", "--data.dataset=mnist", "--data.download=false", *few]


# Splits


def test_the_validation_split_has_its_size_and_is_the_same_for_every_seed() -> None:
    val_size, chosen = 333, []
    for seed in (1, 2):
        seed_everything(seed)
        splits = ready(digits(val_size=val_size)).splits
        train, val = (splits[name].indices for name in ("train", "val"))
        assert (len(train), len(val)) == (1_437 - val_size, val_size)
        assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(1_437))
        chosen.append(val)
    assert torch.equal(*chosen)


def test_mnist_is_split_with_its_own_shares_of_each_class_and_has_the_known_statistics(mnist_dir: Path) -> None:
    datamodule = ready(MNISTDataModule(data_dir=str(mnist_dir)))
    train, val = (datamodule.splits[name] for name in ("train", "val"))
    assert (len(train), len(val)) == (55_000, 5_000)
    shares = torch.tensor([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]) / 12
    assert float((val.labels[val.indices].bincount() - shares).abs().max()) <= 1
    pixels = train.images[train.indices].numpy()
    mean, std = datamodule.statistics or ([], [])
    assert [*mean, *std] == pytest.approx([np.mean(pixels) / 255, np.std(pixels) / 255])
    assert [*mean, *std] == pytest.approx([0.1307, 0.3081], abs=1e-3)


def test_without_validation_all_images_are_trained_on(fit: Fit) -> None:
    cli = fit("--data.val_size=0", "--trainer.max_epochs=1")
    assert metrics(cli.run_dir)["epoch"] == 0
    assert len(cli.datamodule.splits["train"]) == 1_437
    assert set(cli.trainer.callback_metrics) == {"train/loss", "train/acc"}
    assert (cli.run_dir / "checkpoints" / "best.ckpt").is_file()


def test_a_validation_split_that_leaves_nothing_is_refused_where_it_is_used(fails: Fails, fit: Fit) -> None:
    error = fails("fit", "--data.dataset=digits", "--data.val_size=1437")
    assert "data.val_size 1437" in error
    assert not Path("logs").exists()
    run = f"--ckpt_path={fit('--trainer.max_epochs=1').run_dir}"
    main(["test", run, "--data.val_size=5000"])
    assert "data.val_size: 0" in fails("validate", run, "--data.val_size=0")


# The official test set


def test_training_needs_no_test_files_and_a_test_no_training_files(
    mnist_dir: Path, fit: Fit, fails: Fails, tmp_path: Path, capsys: Any
) -> None:
    training_files, test_files = (linked(tmp_path / name, mnist_dir, f"{name}-*") for name in ("train", "t10k"))
    names = ": t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte\n"
    assert names in fails("fit", *SMALL, *mnist_flags(training_files), "--test_after_fit=true", code=1)
    assert not (tmp_path / "logs").exists()
    cli = fit(*mnist_flags(training_files))
    validated = main(["validate", f"--ckpt_path={cli.run_dir}", *mnist_flags(training_files)])
    assert set(cli.datamodule.splits) == set(validated.datamodule.splits) == {"train", "val"}
    assert capsys.readouterr().err == ""
    test = ["test", f"--ckpt_path={cli.run_dir}", "--trainer.limit_test_batches=1"]
    assert names in fails(*test, *mnist_flags(training_files), code=1)
    tested = main([*test, *mnist_flags(test_files)])
    assert set(tested.datamodule.splits) == {"test"}
    assert "test/acc" in tested.trainer.callback_metrics


# Batches


def test_each_image_keeps_its_label() -> None:
    datamodule = ready(digits())
    train = datamodule.splits["train"]
    known = {image.numpy().tobytes(): int(label) for image, label in zip(train.images, train.labels, strict=True)}
    for batch, labels in datamodule.train_dataloader():
        assert [known[image.numpy().tobytes()] for image in batch] == labels.tolist()


def test_images_and_model_have_the_size_that_is_wanted(fit: Fit) -> None:
    assert fit("--data.image_size=14", "--trainer.max_epochs=1").model.hparams["image_size"] == 14
    batches = seen(image_size=14)
    assert {tuple(batch.shape[1:]) for batch in batches.train + batches.val} == {(1, 14, 14)}
    whole = torch.cat(seen().val).unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    assert float((torch.cat(batches.val) - whole).abs().mean()) < 0.02  # the same picture


@pytest.mark.parametrize("flags", [{"num_workers": 2, "pin_memory": True}, {"resident": True}], ids=str)
def test_where_batches_are_gathered_does_not_change_them(flags: dict[str, Any]) -> None:
    plain, other = seen(epochs=2, augment=STRONG), seen(epochs=2, augment=STRONG, **flags)
    assert equal(plain.train, other.train)
    assert equal(plain.val, other.val)


def test_test_and_prediction_see_the_unchanged_test_images_in_their_order() -> None:
    batches, datamodule = Batches(), digits(eval_batch_size=100, augment=STRONG)
    predictions = trainer(batches).predict(ConvNet(channels=[2]), datamodule)
    assert [len(part) for part in predictions or []] == [100, 100, 100, 60]
    trainer(batches).test(ConvNet(channels=[2]), datamodule, verbose=False)
    expected = datamodule.splits["test"].images.unsqueeze(1).float() / 255
    assert torch.equal(torch.cat(batches.predict), expected)
    assert torch.equal(torch.cat(batches.test), expected)


def test_a_single_image_left_over_does_not_break_batch_normalisation(fit: Fit) -> None:
    layers = ["--model.channels=[]", "--model.hidden=[8]"]
    cli = fit("--data.batch_size=103", *layers, "--trainer.max_epochs=1")  # 1,237 = 12 * 103 + 1
    assert cli.trainer.global_step == 12
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])


# Augmentation and seeds


def test_only_training_images_are_changed() -> None:
    plain, changed = seen(), seen(augment=STRONG)
    assert equal(plain.val, changed.val)
    assert not any(map(torch.equal, plain.train, changed.train))
    assert changed.train[0].shape == plain.train[0].shape


@pytest.mark.parametrize("seed", [3, 4])
def test_an_epoch_has_each_image_once_in_an_order_and_with_changes_that_seed_and_epoch_decide(seed: int) -> None:
    runs = [torch.cat(seen(seed, epochs=2).train) for seed in (3, seed)]
    first, second = runs[1].split(1_237)  # type: ignore[no-untyped-call]
    train = ready(digits()).splits["train"]
    assert as_set(first) == as_set(second) == as_set(train.images[train.indices].unsqueeze(1) / 255)
    assert not torch.equal(first, second)
    assert torch.equal(*runs) == (seed == 3)
    changed = [as_set(torch.cat(seen(seed, epochs=2, augment=STRONG).train)) for seed in (3, seed)]
    assert len(changed[0]) == 2 * 1_237
    assert len(changed[0] & changed[1]) == (2 * 1_237 if seed == 3 else 0)


# Going on


@pytest.mark.parametrize(("steps", "flags"), [(3, {}), (7, {"num_workers": 1})], ids=str)
def test_a_resumed_run_gets_the_batches_that_are_left(steps: int, flags: dict[str, Any]) -> None:
    whole = seen(epochs=2, augment=STRONG, **flags).train
    seed_everything(1)
    datamodule, rest = digits(batch_size=300, augment=STRONG, **flags), Batches()
    stopped = trainer(StopAfter(steps), max_epochs=2)
    stopped.fit(ConvNet(channels=[2]), datamodule)
    seed_everything(1)
    again = digits(batch_size=300, augment=STRONG, **flags)
    trainer(rest, max_epochs=2).fit(ConvNet(channels=[2]), again, ckpt_path="stopped.ckpt")
    assert equal(whole[steps:], rest.train)


# Several processes


def test_processes_share_an_epoch(processes: Callable[..., list[MNISTDataModule]]) -> None:
    shares = [torch.cat([images for images, _ in each.train_dataloader()]) for each in processes(3)]
    assert [len(share) for share in shares] == [1_237 // 3] * 3
    assert len(as_set(torch.cat(shares))) == 1_237 // 3 * 3


# Shares that differ by an image or do not, whole batches, and fewer images than processes.
@pytest.mark.parametrize(("num", "val_size", "batch_size"), [(2, 200, 50), (2, 201, 50), (3, 199, 66), (4, 2, 1)])
def test_processes_validate_each_image_once_in_as_many_batches(
    processes: Callable[..., list[MNISTDataModule]], num: int, val_size: int, batch_size: int
) -> None:
    datamodules = processes(num, val_size=val_size, eval_batch_size=batch_size)
    shares = [[len(batch[0]) for batch in datamodule.val_dataloader()] for datamodule in datamodules]
    assert sum(map(sum, shares)) == val_size
    assert len({len(share) for share in shares}) == 1
