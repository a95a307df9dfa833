"""Averaged predictions: test-time augmentation, and ensembles of checkpoints."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from runs import metrics, rows
from torch import Tensor

from mnist_lit import ConvNet, main
from mnist_lit.model.ensemble import distortions

VERSION = {"pytorch-lightning_version": "2.6.0"}
Fit = Callable[..., Any]
Fails = Callable[..., str]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs of different seeds; the last two are of other networks, the last one for larger images."""
    folder = tmp_path_factory.mktemp("runs")
    architectures = [["--model.channels=[4]"], ["--model.channels=[3,5]"], ["--data.image_size=32"]]
    for seed, flags in enumerate(architectures):
        main(["fit", *SMALL, f"--run_dir={folder / str(seed)}", f"--seed_everything={seed}", *flags])
    return sorted(folder.iterdir())


def probabilities(folder: Path) -> Tensor:
    """Read the probabilities in predictions.csv."""
    table = rows(folder, "predictions.csv")
    return torch.tensor([[float(row[f"p{label}"]) for label in range(10)] for row in table])


def test_distortions_are_turns_changes_of_size_slants_and_moves() -> None:
    place = torch.arange(28) - 13.5
    points = torch.tensor([[8.0, 0.0], [0.0, 8.0], [0.0, 0.0]])
    dots = torch.stack([torch.exp(-((place[None] - x) ** 2 + (place[:, None] - y) ** 2) / 4) for x, y in points])

    for copies in distortions(dots.unsqueeze(1)):
        ink = copies.sum(dim=(1, 2, 3))
        right, down, centre = (
            torch.stack([(copies * place).sum((1, 2, 3)), (copies * place[:, None]).sum((1, 2, 3))]).T / ink[:, None]
        )
        assert centre.abs().tolist() == pytest.approx([1, 1], abs=0.05)
        right, down = right - centre, down - centre
        assert (right.norm() / 8).item() == pytest.approx(1.09 if right.norm() > 8 else 0.91, abs=0.01)
        assert abs(math.degrees(math.atan2(right[1], right[0]))) == pytest.approx(9, abs=0.3)
        between = math.degrees(math.acos(right @ down / right.norm() / down.norm()))
        assert abs(between - 90) == pytest.approx(8, abs=0.3)


def test_evaluation_averages_over_changed_copies_and_training_does_not(images: Tensor) -> None:
    model = ConvNet(channels=[4], tta_distort=True).eval()
    copies = [images, *distortions(images)]
    expected = torch.stack([model.network(copy).softmax(1) for copy in copies]).mean(0)
    assert len(copies) == 9
    assert model(images).softmax(1).allclose(expected, atol=1e-6)
    assert not model.network(images).softmax(1).allclose(expected, atol=1e-6)
    model.train()
    assert model(images).equal(model.network(images))


def test_an_ensemble_averages_the_probabilities_of_its_members_and_has_a_record_of_its_own(
    runs: list[Path], tmp_path: Path
) -> None:
    first, second, _ = runs
    exact = "--trainer.precision=32-true"
    for run_dir in (first, second):
        main(["predict", f"--ckpt_path={run_dir}", exact])
    mean = (probabilities(first) + probabilities(second)) / 2
    before = [(run_dir / "metrics.json").read_text() for run_dir in (first, second)]
    ensemble = [f"--ckpt_path={first}", f"--ensemble=['{second}']", exact]

    main(["predict", *ensemble, "--run_dir=predicted"])
    cli = main(["test", *ensemble, "--run_dir=tested"])

    assert probabilities(tmp_path / "predicted").allclose(mean, atol=1e-5)
    assert [(run_dir / "metrics.json").read_text() for run_dir in (first, second)] == before
    record = json.loads((tmp_path / "tested" / "metrics.json").read_text())
    assert record["test/acc"] == pytest.approx(float(cli.trainer.callback_metrics["test/acc"]))
    assert record["parameters"] == sum(json.loads(text)["parameters"] for text in before)


@pytest.mark.parametrize("member", ["nowhere", ".", "other size", "other classes", "no list"])
def test_a_wrong_member_is_an_error_that_names_it(member: str, runs: list[Path], fails: Fails, tmp_path: Path) -> None:
    value = {"other size": f"['{runs[2]}']", "no list": "3"}.get(member, f"[{member}]")
    if member == "other classes":
        model, value = ConvNet(channels=[4], num_classes=3), "[three.ckpt]"
        torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)} | VERSION, "three.ckpt")
    error = fails("test", f"--ckpt_path={runs[0]}", f"--ensemble={value}")
    assert "ensemble" in error
    assert {path.name for path in tmp_path.iterdir()} <= {"three.ckpt"}


def test_test_after_fit_is_of_the_averaged_weights_as_the_checkpoint_is(fit: Fit) -> None:
    fit("--ema.enabled=true", "--ema.decay=0.9", "--test_after_fit=true", "--run_dir=run")
    after_fit = metrics(Path("run"))["test/loss"]
    main(["test", "--ckpt_path=run"])
    assert metrics(Path("run"))["test/loss"] == after_fit
