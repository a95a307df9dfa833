"""Pictures of a run: what they are drawn from, when they are drawn, and that they can be seen."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist_lit import main
from mnist_lit.training.plots import Mistakes, Pictures, draw_confusion, draw_digits

DRAW = "--pictures.enabled=true"
FIT_FILES = {"training_images.png", "val_confusion.png", "val_mistakes.png"}
TEST_FILES = {"test_confusion.png", "test_mistakes.png"}
# A learning rate at which there is something to see.
SLOW = "--model.lr=0.001"


def names(run_dir: Path) -> set[str]:
    return {file.name for file in run_dir.glob("pictures/*")}


def pictures(cli: Any) -> Pictures:
    return next(callback for callback in cli.trainer.callbacks if isinstance(callback, Pictures))


def steps_of(run_dir: Path, kind: str) -> dict[str, list[int]]:
    """Of each TensorBoard tag of a kind, images or histograms, the steps at which it was written."""
    steps: dict[str, list[int]] = {}
    for file in sorted(run_dir.glob("events*")):
        events = EventAccumulator(str(file), size_guidance={kind: 0}).Reload()
        for tag in events.Tags()[kind]:
            values = events.Images(tag) if kind == "images" else events.Histograms(tag)
            steps.setdefault(tag, []).extend(value.step for value in values)
    return steps


def on_test_split(cli: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All test images in [0, 1] and their labels, and what the network makes of them."""
    dataset = cli.datamodule.splits["test"]
    images, labels = dataset.__getitems__(list(range(len(dataset))))
    images = images / 255
    with torch.no_grad():
        return images, labels, cli.model.eval()(images)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of two epochs and its test, with pictures: its directory and the command line's result."""
    run_dir = tmp_path_factory.mktemp("pictures") / "run"
    flags = [DRAW, SLOW, "--test_after_fit=true", "--trainer.precision=32-true"]
    return run_dir, main(["fit", *SMALL, *flags, f"--run_dir={run_dir}"])


def test_fit_and_test_leave_their_pictures(drawn: Any) -> None:
    run_dir, _ = drawn

    assert names(run_dir) == FIT_FILES | TEST_FILES


@pytest.mark.parametrize("name", sorted(FIT_FILES | TEST_FILES))
def test_picture_is_a_png_with_something_on_it(name: str, drawn: Any) -> None:
    run_dir, _ = drawn

    with Image.open(run_dir / "pictures" / name) as picture:
        pixels = np.asarray(picture.convert("L"))
        assert picture.format == "PNG"
    assert 600 <= pixels.shape[1] <= 1300
    assert 200 <= pixels.shape[0] <= 1300
    assert 0.5 < (pixels > 230).mean() < 0.99
    assert (pixels < 64).mean() > 0.005


def test_picture_keeps_its_margins_free(drawn: Any) -> None:
    run_dir, _ = drawn

    for file in (run_dir / "pictures").iterdir():
        pixels = np.asarray(Image.open(file).convert("L"))
        edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert edges.min() == 255, file.name


def test_tensorboard_has_every_picture_once(drawn: Any) -> None:
    run_dir, _ = drawn

    steps = steps_of(run_dir, "images")

    assert {f"{tag}.png" for tag in steps} == FIT_FILES | TEST_FILES
    assert steps["training_images"] == [0]
    assert steps["val_confusion"] == steps["val_mistakes"] == [20]


def test_all_validation_images_are_counted_and_the_diagonal_is_the_accuracy(fit: Callable[..., Any]) -> None:
    cli = fit(DRAW, SLOW)

    counts = pictures(cli).confusion.compute()

    assert int(counts.sum()) == 200
    right = float(counts.trace() / counts.sum())
    assert right == pytest.approx(float(cli.trainer.callback_metrics["val/acc"]))
    assert 0.2 < right < 1


def test_labels_are_rows_and_predictions_are_columns(drawn: Any) -> None:
    _, cli = drawn
    _, labels, logits = on_test_split(cli)

    expected = torch.zeros(10, 10, dtype=torch.long)
    expected.index_put_((labels, logits.argmax(dim=1)), torch.tensor(1), accumulate=True)
    assert pictures(cli).confusion.compute().tolist() == expected.tolist()


def test_mistakes_are_the_misread_images_with_the_least_probable_label_first(drawn: Any) -> None:
    _, cli = drawn
    images, labels, logits = on_test_split(cli)
    of_label = logits.softmax(dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)
    wrong = (logits.argmax(dim=1) != labels).nonzero().squeeze(1)
    worst = wrong[of_label[wrong].argsort()][:36]

    mistakes = pictures(cli).mistakes

    assert 1 < len(worst) <= 36
    assert torch.equal(mistakes.labels, labels[worst])
    assert torch.equal(mistakes.images, images[worst])


def test_mistakes_are_told_with_label_prediction_and_confidence() -> None:
    logits = torch.zeros(3, 10)
    logits[0, 7] = logits[1, 2] = logits[2, 3] = 9.0
    logits[1, 5] = 8.9
    mistakes = Mistakes(5)

    mistakes.update(torch.zeros(3, 1, 28, 28), torch.tensor([1, 5, 3]), logits)

    assert mistakes.texts() == ["1 read as 7, 100%", "5 read as 2, 52%"]


def test_no_more_mistakes_are_shown_than_wanted(fit: Callable[..., Any]) -> None:
    cli = fit(DRAW, SLOW, "--pictures.num_images=3", "--trainer.max_epochs=1")

    assert len(pictures(cli).mistakes.images) == 3


@pytest.mark.parametrize("num_images", [0, 1, 9, 10])
def test_grid_has_as_many_rows_as_it_needs(num_images: int, tmp_path: Path) -> None:
    figure = draw_digits("title", "caption", torch.ones(num_images, 1, 28, 28), ["7"] * num_images)

    figure.savefig(tmp_path / "grid.png")

    num_rows = {0: 0, 1: 1, 9: 1, 10: 2}[num_images]
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (1128, 60 + 144 * num_rows)
        ink = np.asarray(picture.convert("L")) == 0
    assert ink.sum() // 11_500 == num_images  # of the 112 x 112 pixels of each, and some of its text


def test_each_pixel_of_a_digit_is_a_sharp_square(tmp_path: Path) -> None:
    chessboard = (torch.arange(28)[:, None] + torch.arange(28)) % 2

    draw_digits("", "", chessboard[None, None].float(), [""]).savefig(tmp_path / "grid.png")

    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))[-124:-12, 12:124]
    inside = pixels[4:-4, 4:-4]
    assert set(np.unique(inside)) == {0, 255}
    assert (inside[::4].repeat(4, axis=0) == inside).all()
    assert (inside[:, ::4].repeat(4, axis=1) == inside).all()


def test_a_confusion_without_images_can_be_drawn(tmp_path: Path) -> None:
    draw_confusion("nothing", np.zeros((10, 10), dtype=int)).savefig(tmp_path / "confusion.png")

    assert (tmp_path / "confusion.png").stat().st_size > 5000


def test_right_and_wrong_differ_in_more_than_their_hue() -> None:
    counts = np.eye(10, dtype=int) * 100 + 1

    mesh = draw_confusion("", counts).axes[0].collections[0]

    colors = np.asarray(mesh.to_rgba(np.asarray(mesh.get_array()))).reshape(10, 10, 4)
    brightness = colors[..., :3].mean(axis=2)
    assert brightness[0, 0] < 0.3
    assert brightness[0, 1] > 0.7


def test_training_images_are_shown_as_they_were_augmented(tmp_path: Path, fit: Callable[..., Any]) -> None:
    once = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", DRAW]
    turned = ["--data.augment.rotation=40"]

    for name, flags in {"plain": [], "turned": turned, "turned again": turned}.items():
        fit(*once, *flags, f"--run_dir={tmp_path / name}")

    def shown(name: str) -> bytes:
        return (tmp_path / name / "pictures" / "training_images.png").read_bytes()

    assert shown("turned") != shown("plain")
    assert shown("turned") == shown("turned again")


def test_pictures_can_be_turned_off(tmp_path: Path, fit: Callable[..., Any]) -> None:
    fit("--pictures.enabled=false", "--test_after_fit=true", f"--run_dir={tmp_path / 'run'}")

    assert not (tmp_path / "run" / "pictures").exists()
    assert steps_of(tmp_path / "run", "images") == {}


def test_pictures_are_drawn_in_between_where_wanted(tmp_path: Path, fit: Callable[..., Any]) -> None:
    fit(DRAW, "--pictures.every_n_epochs=2", "--trainer.max_epochs=5", f"--run_dir={tmp_path / 'run'}")

    assert steps_of(tmp_path / "run", "images")["val_mistakes"] == [20, 40, 50]


def test_the_last_epoch_is_drawn_once(tmp_path: Path, fit: Callable[..., Any]) -> None:
    fit(DRAW, "--pictures.every_n_epochs=1", f"--run_dir={tmp_path / 'run'}")

    assert steps_of(tmp_path / "run", "images")["val_confusion"] == [10, 20]


def test_histograms_are_of_every_weight_and_every_epoch(tmp_path: Path, fit: Callable[..., Any]) -> None:
    cli = fit(DRAW, "--pictures.histograms=true", f"--run_dir={tmp_path / 'run'}")

    steps = steps_of(tmp_path / "run", "histograms")
    assert steps == {f"weights/{name}": [10, 20] for name, _ in cli.model.network.named_parameters()}


def test_histograms_are_not_made_unasked(drawn: Any) -> None:
    run_dir, _ = drawn

    assert steps_of(run_dir, "histograms") == {}


@pytest.mark.parametrize(
    "flags",
    [
        ["--ema.enabled=true", "--ema.decay=0.5"],
        ["--trainer.precision=bf16-mixed", "--pictures.histograms=true"],
        ["--trainer.precision=bf16-true", "--pictures.histograms=true"],
        ["--data.image_size=20"],
        ["--data.batch_size=5", "--trainer.limit_train_batches=3"],
    ],
    ids=["ema", "bf16-mixed", "bf16-true", "other size", "less than a row"],
)
def test_pictures_are_drawn_in_any_kind_of_run(flags: list[str], tmp_path: Path, fit: Callable[..., Any]) -> None:
    cli = fit(DRAW, *flags, "--trainer.max_epochs=1", "--test_after_fit=true", f"--run_dir={tmp_path / 'run'}")

    assert names(tmp_path / "run") == FIT_FILES | TEST_FILES
    assert int(pictures(cli).confusion.compute().sum()) == 360


def test_without_validation_there_is_nothing_of_it_to_draw(tmp_path: Path, fit: Callable[..., Any]) -> None:
    fit(DRAW, "--data.val_size=0", "--trainer.max_epochs=1", f"--run_dir={tmp_path / 'run'}")

    assert names(tmp_path / "run") == {"training_images.png"}


def test_drawing_leaves_the_weights_as_they_are_without_it(fit: Callable[..., Any]) -> None:
    with_pictures = fit(DRAW, "--pictures.histograms=true", "--model.dropout=0.3").model.network.state_dict()

    without = fit("--model.dropout=0.3").model.network.state_dict()

    assert all(torch.equal(with_pictures[name], without[name]) for name in without)


class CountMistakes(Callback):
    """Write what the pictures of a run count, from the first process."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shown = next(callback for callback in trainer.callbacks if isinstance(callback, Pictures))  # type: ignore[attr-defined]
        counts = shown.confusion.compute()
        mistakes = shown.mistakes.of_all_processes()
        if trainer.is_global_zero:
            wrong = int(counts.sum() - counts.trace())
            shares = mistakes.logits.softmax(dim=1)
            of_label = [float(row[label]) for row, label in zip(shares, mistakes.labels, strict=True)]
            Path("counts.json").write_text(json.dumps([int(counts.sum()), wrong, of_label]))


@pytest.mark.slow
def test_two_processes_show_the_images_of_both(tmp_path: Path, shell: Callable[..., Any]) -> None:
    callback = '--trainer.callbacks=[{"class_path": "test_pictures.CountMistakes"}]'
    two = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}

    ended = shell(
        "fit", *SMALL, DRAW, SLOW, *two, callback, "--pictures.num_images=150", "--run_dir=run", env=environment
    )

    assert ended.returncode == 0, ended.stderr
    assert names(tmp_path / "run") == FIT_FILES
    num_images, num_wrong, of_label = json.loads((tmp_path / "counts.json").read_text())
    assert num_images == 200
    assert len(of_label) == min(num_wrong, 150) > 20
    assert of_label == sorted(of_label)


@pytest.mark.slow
def test_a_compiled_network_is_drawn_too(tmp_path: Path) -> None:
    flags = [flag for flag in SMALL if not flag.startswith("--pictures")]

    main(["fit", *flags, "--trainer.max_epochs=1", "--model.compile=true", "--run_dir=run"])

    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert any("Conv2d" in node.name for node in events.Graph().node)
    assert (tmp_path / "run" / "pictures" / "val_confusion.png").is_file()
