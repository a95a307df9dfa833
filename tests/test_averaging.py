"""Averaged predictions: over small shifts of the images, and over the checkpoints of an ensemble."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mnist_lit import ConvNet, main
from mnist_lit.model.ensemble import Ensemble, distortions, mean_probabilities, shifts

Fit = Callable[..., Any]
Fails = Callable[..., str]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def runs(fit: Fit, tmp_path: Path) -> list[Path]:
    """Three runs of different seeds, the last of another network."""
    folders = [tmp_path / name for name in "abc"]
    for seed, (folder, channels) in enumerate(zip(folders, ["[4]", "[4]", "[3, 5]"], strict=True)):
        fit(f"--run_dir={folder}", f"--seed_everything={seed}", f"--model.channels={channels}")
    return folders


def probabilities(folder: Path) -> Tensor:
    """Those of predictions.csv."""
    with (folder / "predictions.csv").open(newline="") as rows:
        return torch.tensor([[float(row[f"p{label}"]) for label in range(10)] for row in csv.DictReader(rows)])


def test_mean_of_probabilities_is_taken_after_the_softmax() -> None:
    logits = [torch.tensor([[0.0, 5.0]]), torch.tensor([[100.0, 0.0]])]
    expected = torch.stack([each.softmax(1) for each in logits]).mean(0)
    assert mean_probabilities(logits).softmax(1).allclose(expected)
    assert mean_probabilities([each.bfloat16() for each in logits]).dtype == torch.float32


def test_shifts_are_all_the_ways_to_move_an_image(images: Tensor) -> None:
    moved = list(shifts(images, 1))
    assert len(moved) == 9
    assert moved[4].equal(images)
    down_right = moved[0]
    assert down_right[..., 1:, 1:].equal(images[..., :-1, :-1])
    assert not down_right[..., 0, :].any()
    assert not down_right[..., :, 0].any()


def test_evaluation_averages_over_shifts_and_training_does_not(images: Tensor) -> None:
    model = ConvNet(channels=[4], tta_shift=1)
    model.eval()
    expected = torch.stack([model.network(moved).softmax(1) for moved in shifts(images, 1)]).mean(0)
    assert model(images).softmax(1).allclose(expected, atol=1e-6)
    assert not model.network(images).softmax(1).allclose(expected, atol=1e-6)
    model.train()
    assert model(images).equal(model.network(images))


def test_distortions_move_a_dot_every_way_and_together_leave_it_in_place() -> None:
    place = torch.arange(28) - 13.5
    x, y = place[None, :], place[:, None]
    for right, down in ((8.0, 0.0), (0.0, -8.0)):
        dot = torch.exp(-((x - right) ** 2 + (y - down) ** 2) / 4).view(1, 1, 28, 28)

        copies = torch.cat(list(distortions(dot)))

        ink = copies.sum(dim=(1, 2, 3))
        moved = torch.stack([(copies * x).sum((1, 2, 3)) / ink - right, (copies * y).sum((1, 2, 3)) / ink - down])
        assert copies.shape == (8, 1, 28, 28)
        assert len(moved.round(decimals=1).unique(dim=1).T) == 8  # type: ignore[no-untyped-call]
        assert moved.norm(dim=0).min() > 0.1
        assert moved.norm(dim=0).max() < 4
        assert moved.mean(dim=1).norm() < 0.2


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


@pytest.mark.parametrize("tta_shift", [0, 1])
def test_evaluation_averages_over_distortions_too(tta_shift: int, images: Tensor) -> None:
    model = ConvNet(channels=[4], tta_shift=tta_shift, tta_distort=True)
    model.eval()

    copies = [*shifts(images, tta_shift), *distortions(images)]
    expected = torch.stack([model.network(copy).softmax(1) for copy in copies]).mean(0)
    assert model(images).softmax(1).allclose(expected, atol=1e-6)
    model.train()
    assert model(images).equal(model.network(images))


def test_shifts_can_be_asked_for_when_a_run_is_tested(fit: Fit, tmp_path: Path) -> None:
    fit("--run_dir=run")
    plain = main(["predict", "--ckpt_path=run"])
    assert plain.model.tta_shift == 0
    without = probabilities(tmp_path / "run")
    shifted = main(["predict", "--ckpt_path=run", "--model.tta_shift=1"])
    assert shifted.model.tta_shift == 1
    assert not probabilities(tmp_path / "run").allclose(without, atol=1e-4)


def test_an_ensemble_is_as_good_as_its_mean(images: Tensor) -> None:
    networks = [ConvNet(channels=[4]).network.eval() for _ in range(3)]
    expected = torch.stack([network(images).softmax(1) for network in networks]).mean(0)
    assert Ensemble(networks).eval()(images).softmax(1).allclose(expected, atol=1e-6)


def test_predictions_of_an_ensemble_are_the_mean_of_its_members(runs: list[Path], tmp_path: Path) -> None:
    for folder in runs:
        main(["predict", f"--ckpt_path={folder}", "--trainer.precision=32-true"])
    members = torch.stack([probabilities(folder) for folder in runs])
    others = json.dumps([str(folder) for folder in runs[1:]])
    main(
        [
            "predict",
            f"--ckpt_path={runs[0]}",
            f"--ensemble={others}",
            "--run_dir=together",
            "--trainer.precision=32-true",
        ]
    )
    assert probabilities(tmp_path / "together").allclose(members.mean(0), atol=1e-5)


def test_test_of_an_ensemble_has_a_record_of_its_own(runs: list[Path], tmp_path: Path) -> None:
    before = [(folder / "metrics.json").read_text() for folder in runs]
    cli = main(["test", f"--ckpt_path={runs[0]}", f"--ensemble=['{runs[1]}', '{runs[2]}']", "--run_dir=together"])
    assert [(folder / "metrics.json").read_text() for folder in runs] == before
    record = json.loads((tmp_path / "together" / "metrics.json").read_text())
    assert record["test/acc"] == pytest.approx(float(cli.trainer.callback_metrics["test/acc"]))
    sizes = [json.loads(text)["parameters"] for text in before]
    assert record["parameters"] == sum(sizes)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ensemble=[nowhere]"], "ensemble: 'nowhere' does not exist"),
        (["--ensemble=[.]"], "ensemble: . holds no checkpoint"),
        (["--ensemble=3"], "ensemble"),
        (["--ensemble=[larger]"], "images of another size"),
    ],
)
def test_a_wrong_member_is_named(flags: list[str], message: str, fit: Fit, fails: Fails, tmp_path: Path) -> None:
    fit("--run_dir=run")
    if flags == ["--ensemble=[larger]"]:
        fit("--run_dir=larger", "--data.image_size=32")
    before = sorted(tmp_path.rglob("*"))
    assert message in fails("test", "--ckpt_path=run", *flags)
    assert sorted(tmp_path.rglob("*")) == before


def test_training_knows_no_ensemble(fails: Fails) -> None:
    assert "ensemble: there is no such key" in fails("fit", "--data.dataset=digits", "--ensemble=[run]")
