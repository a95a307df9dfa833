"""`data.dataset: folder`: images of any kind by class, from training to predictions, export and pages."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import SMALL
from onnxruntime import InferenceSession
from PIL import Image, ImageDraw
from runs import rows

from mnist_lit import MNISTDataModule, main
from mnist_lit.errors import UsageError

SHAPES = ("box", "cross", "disc")
FOLDER = [flag for flag in SMALL if not flag.startswith("--data.")]
FOLDER += ["--data.dataset=folder", "--data.data_dir=images", "--data.val_size=9", "--data.batch_size=16"]


def draw(shape: str, rng: np.random.Generator, mode: str = "L", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A bright shape on a dark ground, slightly different each time."""
    image = Image.new("RGB", size)
    x, y = size[0] / 2 + rng.integers(-4, 5), size[1] / 2 + rng.integers(-3, 4)
    box, colour = (x - 9, y - 9, x + 9, y + 9), tuple(rng.integers(150, 256, 3).tolist())
    pen = ImageDraw.Draw(image)
    if shape == "cross":
        pen.line((x - 9, y, x + 9, y), colour, 4)
        pen.line((x, y - 9, x, y + 9), colour, 4)
    else:
        (pen.rectangle if shape == "box" else pen.ellipse)(box, colour)
    return image.convert(mode)


def write(folder: Path, num: int = 20, shapes: tuple[str, ...] = SHAPES, mode: str = "L") -> Path:
    rng = np.random.default_rng(0)
    for shape in shapes:
        (folder / shape).mkdir(parents=True)
        for number in range(num):
            draw(shape, rng, mode).save(folder / shape / f"{number}.png")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with train and test images of three shapes."""
    write(tmp_path / "images" / "train")
    write(tmp_path / "images" / "test", num=5)
    return tmp_path / "images"


def loaded(folder: Path, **kwargs: Any) -> MNISTDataModule:
    datamodule = MNISTDataModule(data_dir=str(folder), dataset="folder", val_size=6, **kwargs)
    datamodule.fetch("fit", "test")
    datamodule.setup("fit")
    datamodule.setup("test")
    return datamodule


def test_three_classes_are_named_from_training_to_predictions(images: Path, capsys: Any) -> None:
    flags = ["--trainer.max_epochs=8", "--test_after_fit=true", "--pictures.enabled=true", "--report=true"]
    cli = main(["fit", *FOLDER, *flags, "--run_dir=run"])
    assert cli.trainer.callback_metrics["test/acc"] > 0.5
    assert "train: 60 images" in capsys.readouterr().out
    assert {file.stem for file in Path("run/pictures").iterdir()} >= {"test_confusion", "training_images"}
    images.rename("elsewhere")  # neither prediction nor demo needs them

    main(["predict", "--ckpt_path=run", "--data.predict_paths=elsewhere/test"])

    predictions = rows(Path("run"), "predictions.csv")
    assert list(predictions[0]) == ["path", "label", "confidence", "pbox", "pcross", "pdisc"]
    right = [row["label"] == Path(row["path"]).parent.name for row in predictions]
    assert sum(right) / len(right) == pytest.approx(float(cli.trainer.callback_metrics["test/acc"]))
    main(["predict", "--ckpt_path=run", "--data.data_dir=elsewhere"])
    assert [row["label"] for row in rows(Path("run"), "predictions.csv")] == [row["label"] for row in predictions]


def test_fifty_classes_in_one_folder_are_shared_out(tmp_path: Path) -> None:
    names = tuple(f"class {number}" for number in range(50))
    write(tmp_path / "images" / "train", num=6, shapes=names)
    flags = ["--data.test_size=50", "--data.val_size=100", "--trainer.max_epochs=1", "--test_after_fit=true"]
    flags += ["--pictures.enabled=true"]
    cli = main(["fit", *FOLDER, *flags])
    splits = cli.datamodule.splits
    assert [len(splits[name]) for name in ("train", "val", "test")] == [150, 100, 50]
    assert splits["test"].labels.bincount().tolist() == [1] * 50
    assert cli.model.num_classes == 50


def test_colours_from_training_to_export(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "images" / "train", mode="RGB")
    colours = ["--data.in_channels=3", "--data.image_size=32", "--data.test_size=12", "--trainer.max_epochs=3"]
    cli = main(["fit", *FOLDER, *colours, "--run_dir=run"])
    train = cli.datamodule.splits["train"]
    pixels = train.images[train.indices].double() / 255
    assert pixels.shape[1:] == (3, 32, 32)
    state = torch.load("run/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    assert state["network.mean"].flatten().tolist() == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist())
    assert state["network.std"].flatten().tolist() == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist())

    main(["export", "--ckpt_path=run"])

    assert "12 of 12" in capsys.readouterr().out
    metadata = {entry.key: entry.value for entry in onnx.load("model.onnx").metadata_props}
    assert json.loads(metadata["classes"]) == list(SHAPES)
    [entry] = InferenceSession("model.onnx").get_inputs()
    assert entry.shape == ["n", 3, 32, 32]
    main(["predict", "--ckpt_path=run", "--data.predict_paths=images/train/disc"])
    assert len(rows(Path("run"), "predictions.csv")) == 20


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "I", "I;16", "F"])
def test_images_of_any_mode_and_size_become_grey_squares(mode: str, images: Path) -> None:
    picture = draw("box", np.random.default_rng(0), "L" if mode == "I;16" else mode, size=(31, 80))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 200)
    picture.save(images / "test" / "box" / "0.tif")
    split = loaded(images, image_size=20).splits["test"]
    assert split.images.shape == (16, 20, 20)
    assert split.images[0].max() > 140
    assert split.images[0, :, 0].max() == 0  # padded on both sides
    assert split.images[0, 10, 9:11].min() > 140


@pytest.mark.parametrize("ink", [0, 255])
def test_ink_is_seen_where_the_ground_is_transparent(ink: int, images: Path) -> None:
    picture = Image.new("LA", (30, 30))
    picture.paste((ink, 255), (5, 5, 25, 25))
    picture.save(images / "test" / "box" / "0.png")
    assert np.ptp(loaded(images).splits["test"].images[0].numpy()) == 255


def test_a_gif_is_an_image_a_file_of_another_type_is_said_and_changed_images_are_read_again(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (9, 9)).save(images / "train" / "box" / "new.gif")
    (images / "train" / "disc" / "photo.heic").touch()
    first = loaded(images).splits["train"].images
    assert len(first) == 61
    assert capsys.readouterr().err.endswith("train: photo.heic\n")
    Image.new("L", (9, 9), 255).save(images / "train" / "box" / "new.gif")
    assert not torch.equal(loaded(images).splits["train"].images, first)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("rm train/disc/*", "images/train/disc"),
        ("mv train/box train/cross .", "disc"),
        ("mv train/box/0.png train", "images/train/0.png"),
        ("for number in 0 1 2 3 4; do echo > train/cross/$number.png; done", "images/train/cross/0.png"),
        ("mkfifo train/box/pipe.png", "images/train/box/pipe.png"),
        ("mkdir test/star", "images/test/star"),
        ("mv train training", "images/train"),
        ("mv test tests", "data.test_size"),
    ],
)
def test_a_folder_that_cannot_be_used_is_a_short_error(
    change: str, named: str, images: Path, fails: Callable[..., str]
) -> None:
    subprocess.run(change, shell=True, cwd=images, check=True)
    assert named in fails("fit", *FOLDER, "--test_after_fit=true")
    assert not Path("logs").exists()


def test_images_that_do_not_fit_into_memory_are_refused(images: Path) -> None:
    with pytest.raises(UsageError, match="do not fit"):
        loaded(images, image_size=1_000_000)


def test_names_of_all_kinds_and_a_variable_that_stands_for_other_data(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("-dash", "$\\frac", "a b", "a,b", "x.y", "über", "日本")
    write(tmp_path / "images" / "train", num=6, shapes=names)
    (tmp_path / "images" / "train" / "x.y" / "notes.txt").touch()
    (tmp_path / "images" / "train" / "x.y" / "._0.png").touch()
    write(tmp_path / "images" / "train" / "x.y", num=1, shapes=(".cache",))
    main(["fit", *FOLDER, "--data.test_size=7", "--pictures.enabled=true", "--trainer.max_epochs=1", "--run_dir=run"])
    monkeypatch.setenv("MNIST_LIT_DATA", "elsewhere")

    main(["test", "--ckpt_path=run"])
    main(["predict", "--ckpt_path=run", "--data.predict_paths=images/train/a b/0.png"])

    shutil.copy("run/checkpoints/best.ckpt", "copy.ckpt")
    main(["predict", "--ckpt_path=copy.ckpt", "--data.predict_paths=images/train/a b/0.png", "--run_dir=other"])

    output, errors = capfd.readouterr()
    assert errors.endswith("train: notes.txt\n")
    assert "train: 35 images" in output
    for run_dir in ("run", "other"):
        assert list(rows(Path(run_dir), "predictions.csv")[0])[3:] == [f"p{name}" for name in sorted(names)]


def test_other_data_sets_have_one_channel(fails: Callable[..., str]) -> None:
    assert "data.in_channels 3" in fails("fit", *SMALL, "--data.in_channels=3")
