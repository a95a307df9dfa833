"""Anyone's picture of a digit, in MNIST's form: hands, pens, papers and lights that MNIST never had."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS
from drawings import KINDS, draw
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from mnist_lit import ConvNet, main
from mnist_lit.data.datasets import load
from mnist_lit.data.digits import extract_digit

NUM_OF_A_KIND = 10
HEIGHT, WIDTH = 300, 400
Y, X = np.mgrid[0 : 1 : HEIGHT * 1j, 0 : 1 : WIDTH * 1j]


@pytest.fixture(scope="module")
def model(mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ConvNet:
    """Trained in seconds on MNIST, and on nothing else."""
    run_dir = tmp_path_factory.mktemp("reader") / "run"
    main(["fit", f"--config={CONFIGS / 'fast.yaml'}", f"--data.data_dir={mnist_dir}", f"--run_dir={run_dir}"])
    model: ConvNet = ConvNet.load_from_checkpoint(run_dir / "checkpoints" / "best.ckpt", map_location="cpu")
    return model.eval()


def seen(image: Image.Image) -> NDArray[np.uint8]:
    digit = extract_digit(image)
    assert digit is not None
    return digit


def share_read(model: ConvNet, images: list[Image.Image], labels: list[int]) -> float:
    """How many of them are read right; what is taken for no digit is not."""
    digits = [extract_digit(image) for image in images]
    found = [np.zeros((28, 28), np.uint8) if digit is None else digit for digit in digits]
    with torch.inference_mode():
        read = model(torch.from_numpy(np.stack(found)).unsqueeze(1) / 255).argmax(dim=1).tolist()
    right = [digit is not None and one == label for digit, one, label in zip(digits, read, labels, strict=True)]
    return float(np.mean(right))


def paper(grey: "float | NDArray[np.float64]", noise: float = 0.02) -> Image.Image:
    shot = np.broadcast_to(grey, (HEIGHT, WIDTH)) + np.random.default_rng(0).normal(0, noise, (HEIGHT, WIDTH))
    return Image.fromarray((np.clip(shot, 0, 1) * 255).astype(np.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_digits_of_every_kind_are_read(kind: str, model: ConvNet) -> None:
    rng = np.random.default_rng([2026, *kind.encode()])
    labels = [index % 10 for index in range(NUM_OF_A_KIND)]

    assert share_read(model, [draw(label, kind, rng) for label in labels], labels) >= 0.8


@pytest.mark.slow
def test_at_least_95_percent_of_all_are_read(model: ConvNet) -> None:
    rng = np.random.default_rng(11)
    drawn = [(draw(index % 10, kind, rng), index % 10) for kind in KINDS for index in range(100)]

    assert share_read(model, [image for image, _ in drawn], [label for _, label in drawn]) >= 0.95


@pytest.mark.parametrize("is_inverted", [False, True])
def test_images_of_mnist_itself_are_read_as_before(is_inverted: bool, model: ConvNet, mnist_dir: Path) -> None:
    digits, labels = (part[:200] for part in load("mnist", mnist_dir, "test"))
    images = [Image.fromarray(255 - digit if is_inverted else digit) for digit in digits.numpy()]

    assert share_read(model, images, labels.tolist()) >= 0.97


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_seen_has_mnists_form(kind: str) -> None:
    digit = seen(draw(4, kind, np.random.default_rng([1, *kind.encode()])))

    rows, columns = (np.flatnonzero(digit.any(axis=axis)) for axis in (1, 0))
    assert digit.shape == (28, 28)
    assert digit.dtype == np.uint8
    assert max(np.ptp(rows), np.ptp(columns)) + 1 == 20
    assert np.allclose(ndimage.center_of_mass(digit), 13.5, atol=1)
    assert digit.max() == 255


@pytest.mark.parametrize(("thickness", "digit"), [("ballpoint", 0), ("brush", 0), ("ballpoint", 7), ("marker", 7)])
def test_strokes_are_as_heavy_as_mnists(thickness: str, digit: int, mnist_dir: Path) -> None:
    images, labels = load("mnist", mnist_dir, "test")
    usual = images[labels == digit].float().mean(dim=(1, 2))
    heaviness = [seen(draw(digit, thickness, np.random.default_rng(seed))).mean() for seed in range(10)]

    assert usual.quantile(0.02) < np.mean(heaviness) < usual.quantile(0.98)


@pytest.mark.parametrize(
    "image",
    [
        paper(1, noise=0),
        paper(0, noise=0),
        paper(0.8),
        paper(0.6, noise=0.1),
        paper(0.3 + 0.6 * X),
        paper(0.9 - 0.8 * ((X - 0.5) ** 2 + (Y - 0.5) ** 2)),
        paper(0.9 - 0.3 / (1 + np.exp(-40 * (X - 0.5)))),
        paper(np.where(np.arange(HEIGHT) % 40 < 3, 0.65, 0.9)[:, None]),
        paper(np.where((np.arange(HEIGHT) % 25 < 2)[:, None] | (np.arange(WIDTH) % 25 < 2), 0.75, 0.9)),
        Image.new("RGBA", (50, 50)),
        Image.new("L", (1, 1)),
        Image.new("RGB", (1, 500)),
        Image.new("CMYK", (40, 30)),
        Image.fromarray(np.full((20, 20), np.nan, np.float32)),
        Image.fromarray(np.zeros((30, 30), np.int32)),
    ],
    ids=[
        "white", "black", "paper", "noise", "slope", "vignette", "shadow", "ruled", "squared", "transparent", "pixel",
        "column", "cmyk", "nan", "32 bits",
    ],
)  # fmt: skip
def test_without_ink_there_is_no_digit(image: Image.Image) -> None:
    assert extract_digit(image) is None


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
