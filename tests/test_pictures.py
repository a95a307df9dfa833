"""Pictures of a run: what they are drawn from, when they are drawn, and that they can be seen."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist_lit import main
from mnist_lit.pictures import Mistakes, Pictures, draw_confusion, draw_digits

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


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of two epochs and its test, with pictures: its directory and the command line's result."""
    run_dir = tmp_path_factory.mktemp("pictures") / "run"
    return run_dir, main(["fit", *SMALL, DRAW, SLOW, "--test_after_fit=true", f"--run_dir={run_dir}"])


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
    counts = pictures(cli).confusion.compute()
    images, labels = cli.datamodule.splits["test"][list(range(360))] if False else whole_test_split(cli)

    predictions = predict(cli, images).argmax(dim=1)

    expected = torch.zeros(10, 10, dtype=torch.long)
    expected.index_put_((labels, predictions), torch.tensor(1), accumulate=True)
    assert counts.tolist() == expected.tolist()
