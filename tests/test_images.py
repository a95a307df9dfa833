"""Anyone's picture of a digit, in MNIST's form: hands, pens, papers, lights and scenes that MNIST never had."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGS
from drawings import KINDS, draw
from numpy.typing import NDArray
from PIL import Image
from runs import rows
from scenes import SCENES
from scipy import ndimage

from mnist_lit import main
from mnist_lit.data.datasets import DATASETS
from mnist_lit.data.digits import choose, extract_candidates

ALL_KINDS = {**KINDS, **SCENES}
HEIGHT, WIDTH = 300, 400
Y, X = np.mgrid[0 : 1 : HEIGHT * 1j, 0 : 1 : WIDTH * 1j]


@pytest.fixture(scope="module")
def predict(mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], dict[str, str]]:
    """`predict(folder)`: the label of each image file, by a network trained in seconds on MNIST and on nothing else."""
    run_dir = tmp_path_factory.mktemp("reader") / "run"
    cli = main(["fit", f"--config={CONFIGS / 'fast.yaml'}", f"--data.data_dir={mnist_dir}", f"--run_dir={run_dir}"])
    assert float(cli.trainer.callback_metrics["test/acc"]) >= 0.985, "what fast.yaml promises, but for the seed"

    def predict(folder: Path) -> dict[str, str]:
        main(["predict", f"--ckpt_path={run_dir}", f"--data.predict_paths={folder}"])
        return {Path(row["path"]).name: row["label"] for row in rows(run_dir, "predictions.csv")}

    return predict


def share_right(labels: dict[str, str], kind: str) -> float:
    """Compare labels with the last part of the files' names."""
    right = [name.split(".")[0].endswith(f"-{label}") for name, label in labels.items() if name.startswith(f"{kind}-")]
    return float(np.mean(right))


def draw_all(folder: Path, seed: int, count: int) -> None:
    for kind, function in ALL_KINDS.items():
        rng = np.random.default_rng([seed, *kind.encode()])
        for index in range(count):
            image = function(index % 10, rng)
            image.save(folder / f"{kind}-{index}-{index % 10}.png", exif=image.getexif())


@pytest.fixture(scope="module")
def labels(predict: Callable[[Path], dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    draw_all(folder := tmp_path_factory.mktemp("drawings"), seed=2026, count=4)
    return predict(folder)


def seen(image: Image.Image) -> NDArray[np.uint8]:
    """Extract the candidate that is chosen if the network is equally sure of all."""
    candidates = extract_candidates(image)
    return candidates[choose(candidates, [1.0] * len(candidates))[0]].digit


def paper(grey: "float | NDArray[np.float64]", noise: float = 0.02) -> Image.Image:
    shot = np.broadcast_to(grey, (HEIGHT, WIDTH)) + np.random.default_rng(0).normal(0, noise, (HEIGHT, WIDTH))
    return Image.fromarray((np.clip(shot, 0, 1) * 255).astype(np.uint8))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_digits_of_every_kind_are_predicted(kind: str, labels: dict[str, str]) -> None:
    assert share_right(labels, kind) >= 0.75


def test_nearly_all_digits_are_predicted(labels: dict[str, str]) -> None:
    assert np.mean([share_right(labels, kind) for kind in ALL_KINDS]) >= 0.95


@pytest.mark.slow
def test_at_least_95_percent_of_all_are_predicted(predict: Callable[[Path], dict[str, str]], tmp_path: Path) -> None:
    draw_all(tmp_path, seed=11, count=50)
    labels = predict(tmp_path)
    assert np.mean([share_right(labels, kind) for kind in ALL_KINDS]) >= 0.95


def test_images_of_mnist_are_predicted_as_they_are(
    predict: Callable[[Path], dict[str, str]], mnist_dir: Path, tmp_path: Path
) -> None:
    digits, labels = (part[:40] for part in DATASETS["mnist"].load(mnist_dir, "test"))
    for index, (digit, label) in enumerate(zip(digits.numpy(), labels.tolist(), strict=True)):
        Image.fromarray(digit).save(tmp_path / f"same-{index}-{label}.png")
        Image.fromarray(255 - digit).save(tmp_path / f"inverted-{index}-{label}.png")
    predicted = predict(tmp_path)
    assert share_right(predicted, "same") >= 0.95
    assert share_right(predicted, "inverted") >= 0.95
    assert np.array_equal(seen(Image.fromarray(digits[0].numpy())), digits[0])


def test_a_note_tells_which_digit_and_frame_was_predicted(
    predict: Callable[[Path], dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [draw(digit, "marker", np.random.default_rng(3)).resize((200, 200)) for digit in (4, 2)]
    images[0].save(tmp_path / "frames-4.tiff", save_all=True, append_images=images[1:])
    Image.fromarray(np.hstack([np.asarray(image) for image in images])).save(tmp_path / "two.png")
    assert predict(tmp_path)["frames-4.tiff"] == "4"
    printed = capsys.readouterr().out
    assert "(frame 1 of 2)" in printed
    assert "of 2 from the left)" in printed


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_seen_has_mnists_form(kind: str) -> None:
    digit = seen(draw(4, kind, np.random.default_rng([1, *kind.encode()])))
    rows, columns = (np.flatnonzero(digit.any(axis=axis)) for axis in (1, 0))
    assert digit.shape == (28, 28)
    assert digit.dtype == np.uint8
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20
    assert np.allclose(ndimage.center_of_mass(digit), 13.5, atol=1)
    assert digit.max() == 255


@pytest.mark.parametrize(("thickness", "digit"), [("brush", 0), ("ballpoint", 7)])
def test_strokes_are_as_heavy_as_mnists(thickness: str, digit: int, mnist_dir: Path) -> None:
    images, labels = DATASETS["mnist"].load(mnist_dir, "test")
    usual = images[labels == digit].float().mean(dim=(1, 2))
    heaviness = [seen(draw(digit, thickness, np.random.default_rng(seed))).mean() for seed in range(5)]
    assert usual.quantile(0.02) < np.mean(heaviness) < usual.quantile(0.98)


@pytest.mark.parametrize(
    "image",
    [
        paper(1, noise=0),
        paper(0, noise=0),
        paper(0.8),
        paper(0.6, noise=0.1),
        paper(0.3 + 0.6 * X),
        paper(0.9 - 0.3 / (1 + np.exp(-40 * (X - 0.5)))),
        paper(np.where(np.arange(HEIGHT) % 40 < 3, 0.65, 0.9)[:, None]),
        paper(np.where((np.arange(HEIGHT) % 25 < 2)[:, None] | (np.arange(WIDTH) % 25 < 2), 0.75, 0.9)),
        Image.new("RGBA", (50, 50)),
        Image.new("L", (1, 1)),
        Image.fromarray(np.full((20, 20), np.nan, np.float32)),
        Image.fromarray(np.zeros((30, 30), np.int32)),
    ],
)
def test_without_ink_there_is_no_digit(image: Image.Image) -> None:
    assert not extract_candidates(image)


def test_the_digit_is_found_beside_smaller_ink() -> None:
    sheet = Image.new("L", (400, 300), 240)
    sheet.paste(draw(3, "marker", np.random.default_rng(0)).resize((200, 200)), (100, 50))
    spotted = sheet.copy()
    spotted.paste(20, (5, 5, 25, 12))
    assert abs(seen(spotted).astype(int) - seen(sheet)).mean() < 8


def test_pieces_of_a_digit_stay_together() -> None:
    """The bar of a 5 often does not touch the rest."""
    picture = np.full((200, 200), 1.0)
    picture[40:52, 70:140] = picture[64:160, 70:82] = 0.1
    digit = seen(Image.fromarray((picture * 255).astype(np.uint8)))
    assert ndimage.label(digit > 0)[1] == 2
