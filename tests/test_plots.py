"""Pictures of a run: what they show, when they are made, and that they can be seen."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, WORSE
from PIL import Image
from runs import metrics, resume, signals, stop
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from mnist_lit import Classifier, main
from mnist_lit.training.plots import Evaluation, Pictures

PLOT = "--pictures.enabled=true"
FIT_FILES = {"training_images.png", "val_confusion.png", "val_mistakes.png"}
TEST_FILES = {"test_confusion.png", "test_mistakes.png"}
# A learning rate that leaves misclassified images.
SLOW = ["--model.lr=0.001", "--model.dropout=0.3", "--test_after_fit=true"]


def names(run_dir: Path) -> set[str]:
    return {file.name for file in run_dir.glob("pictures/*")}


def best(trainer: Any) -> Evaluation:
    (pictures,) = [callback for callback in trainer.callbacks if isinstance(callback, Pictures)]
    assert pictures.validation is not None
    return pictures.validation


@pytest.fixture(scope="module")
def plotted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of two epochs and its test, with pictures."""
    return main(["fit", *SMALL, PLOT, *SLOW, f"--run_dir={tmp_path_factory.mktemp('pictures') / 'run'}"])


class Growing(nn.Flatten):
    """A network that is another one at each call, which no tracer can follow."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(images)[:, :10] + sum([images.mean()] * (self.calls % 3))


class Untraceable(Classifier):
    def __init__(self, num_classes: int = 10, **kwargs: Any) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(1, 1, 3), Growing()), num_classes, **kwargs)


def test_network_that_cannot_be_traced_has_no_graph_and_ends_well(tmp_path: Path, capsys: Any) -> None:
    flags = [flag for flag in SMALL if "channels" not in flag]
    main(["fit", *flags, PLOT, "--run_dir=run"], model_class=Untraceable)
    output, errors = capsys.readouterr()
    assert "graph" in errors
    assert "aten::" not in output
    assert names(tmp_path / "run") == FIT_FILES


def test_pictures_are_files_with_something_on_them(plotted: Any) -> None:
    assert names(plotted.run_dir) == FIT_FILES | TEST_FILES
    for name in FIT_FILES | TEST_FILES:
        pixels = np.asarray(Image.open(plotted.run_dir / "pictures" / name, formats=["PNG"]).convert("L"))
        assert 600 <= pixels.shape[1] <= 1300
        assert 0.5 < (pixels > 230).mean() < 0.99
        assert (pixels < 64).mean() > 0.005


def test_tensorboard_has_every_picture_once(plotted: Any) -> None:
    events = EventAccumulator(str(plotted.run_dir), size_guidance={"images": 0}).Reload()
    steps = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
    assert steps == {
        "training/images": [0],
        **{f"val/{name}": [20] for name in ("confusion", "mistakes")},
        **{f"test/{name}": [20] for name in ("confusion", "mistakes")},
    }


def test_the_confusion_matrix_and_the_top_losses_are_those_of_the_split(plotted: Any) -> None:
    val = plotted.datamodule.splits["val"]
    images, labels = val.__getitems__(list(range(len(val))))
    with torch.no_grad():
        logits = plotted.model.eval()(images / 255)
    evaluation = best(plotted.trainer)
    counts = (10 * labels + logits.argmax(dim=1)).bincount(minlength=100)
    assert evaluation.counts.flatten().tolist() == counts.tolist()
    of_label = logits.softmax(dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)
    wrong = (logits.argmax(dim=1) != labels).nonzero().squeeze(1)
    top = wrong[of_label[wrong].argsort()][:36]
    assert len(top) > 1
    assert torch.equal(evaluation.top_losses[0], images[top])
    assert torch.equal(evaluation.top_losses[1], labels[top])


def test_the_pictures_of_validation_are_of_the_best_epoch_also_after_a_resume(
    tmp_path: Path, fit: Callable[..., Any]
) -> None:
    cli = fit(*WORSE, PLOT, "--run_dir=run")
    record = metrics(tmp_path / "run")
    assert best(cli.trainer).epoch == record["epoch"] < 2
    assert int(best(cli.trainer).counts.trace()) == round(200 * record["val/acc"])
    stop("fit", *SMALL, *WORSE, PLOT, "--run_dir=stopped", signals(signum=signal.SIGINT, batch=25))
    assert names(tmp_path / "stopped") == set()
    resume(tmp_path / "stopped")
    picture = Path("pictures", "val_mistakes.png")
    assert (tmp_path / "stopped" / picture).read_bytes() == (tmp_path / "run" / picture).read_bytes()


@pytest.mark.parametrize(
    "flags",
    [
        ["--ema.enabled=true", "--trainer.precision=bf16-true", "--data.batch_size=5", "--pictures.num_images=3"],
        ["--data.image_size=20", "--data.val_size=0"],
    ],
    ids=["ema, half precision", "other size, no validation"],
)
def test_pictures_are_made_in_any_kind_of_run(flags: list[str], tmp_path: Path, fit: Callable[..., Any]) -> None:
    once = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=3"]
    fit(PLOT, *once, *flags, "--test_after_fit=true", f"--run_dir={tmp_path / 'run'}")
    expected = {"training_images.png"} if "--data.val_size=0" in flags else FIT_FILES
    assert names(tmp_path / "run") == expected | TEST_FILES


def test_pictures_change_no_weight(plotted: Any, fit: Callable[..., Any]) -> None:
    without = fit(*SLOW).model.state_dict()
    assert all(torch.equal(weights, without[name]) for name, weights in plotted.model.state_dict().items())
    assert not list(Path().rglob("pictures"))
