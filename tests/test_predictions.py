"""`predict` on image files: which are found, what is written, and files that are no images."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from drawings import draw
from PIL import Image
from runs import rows

from mnist_lit import main

Fails = Callable[..., str]
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run_dir(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(small_run, tmp_path_factory.mktemp("source") / "run"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three digits, one of them in a folder below, and an empty sheet."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    draw(3, "marker", rng).save(folder / "three.png")
    draw(7, "blackboard", rng).save(folder / "seven.jpg")
    draw(1, "transparent", rng).save(folder / "more" / "one [1].png")
    Image.new("L", (50, 50), "white").save(folder / "empty.png")
    return folder


def predict(run_dir: Path, paths: str, *flags: str) -> list[dict[str, str]]:
    main(["predict", f"--ckpt_path={run_dir}", f"--data.predict_paths={paths}", *flags])
    return rows(run_dir, "predictions.csv")


def test_every_image_has_a_row(run_dir: Path, photos: Path) -> None:
    read = {Path(row.pop("path")).name: row for row in predict(run_dir, str(photos))}
    assert list(read) == ["empty.png", "one [1].png", "seven.jpg", "three.png"]
    assert read["empty.png"] == {name: "no digit" if name == "label" else "" for name in read["empty.png"]}
    for name in ("one [1].png", "seven.jpg", "three.png"):
        shares = [float(read[name][f"p{label}"]) for label in range(10)]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert read[name]["label"] == str(np.argmax(shares))
        assert float(read[name]["confidence"]) == max(shares)


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize(
    ("paths", "names"),
    [
        ("photos/*.png", ["empty.png", "three.png"]),
        ("photos/**/o*.png", ["one [1].png"]),
        ("photos/more/one [1].png", ["one [1].png"]),
        ("[photos/seven.jpg, photos/*.jpg, photos/more]", ["seven.jpg", "one [1].png"]),
    ],
)
def test_files_folders_and_patterns_are_found(paths: str, names: list[str], run_dir: Path) -> None:
    assert [Path(row["path"]).name for row in predict(run_dir, paths)] == names


def test_names_need_not_be_text(run_dir: Path, photos: Path, capsys: Capsys) -> None:
    (photos / "three.png").rename(photos / os.fsdecode(b"\xe9\n\x1b[31m.png"))
    read = predict(run_dir, "photos/*31m*")
    assert [row["path"] for row in read] == ["photos/\\udce9\n\x1b[31m.png"]
    assert "photos/\\udce9\\n\\x1b[31m.png  " in capsys.readouterr().out


def test_several_processes_are_refused_before_anything_is_made(run_dir: Path, tmp_path: Path, fails: Fails) -> None:
    flags = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--run_dir=new"]
    error = fails("predict", f"--ckpt_path={run_dir}", *flags)
    assert "--trainer.devices 1" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("photos")
def test_the_console_has_a_table_and_the_run_has_a_picture(run_dir: Path, photos: Path, capsys: Capsys) -> None:
    for number in range(20):
        shutil.copy(photos / "three.png", photos / f"{number}.png")
    predictions = predict(run_dir, "photos")
    output = capsys.readouterr().out
    assert len(predictions) == 24
    assert len(output.splitlines()) < 30
    assert predictions[0]["path"] in output
    with Image.open(run_dir / "pictures" / "predictions.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert (abs(pixels[..., 1] - pixels[..., 0]) < 3).mean() > 0.9
    predict(run_dir, "null")
    assert not (run_dir / "pictures" / "predictions.png").exists()  # it would show other images than the table


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize(
    ("paths", "named"),
    [
        (["photos/*.gif"], "photos/*.gif"),
        ([""], "''"),
        (["~nobody_of_that_name/x.png"], "~nobody_of_that_name"),
        (["photos/empty.png", "photos/three.png"], "photos/three.png"),  # a pattern without quotes
    ],
    ids=["none", "empty", "home", "shell"],
)
def test_impossible_paths_are_errors_before_anything_is_made(
    paths: list[str], named: str, run_dir: Path, tmp_path: Path, fails: Fails
) -> None:
    error = fails("predict", f"--ckpt_path={run_dir}", "--run_dir=new", "--data.predict_paths", *paths)
    assert named in error
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("photos")
def test_no_data_set_is_needed(run_dir: Path, tmp_path: Path) -> None:
    flags = ["--data.dataset=mnist", f"--data.data_dir={tmp_path / 'nothing'}", "--run_dir=elsewhere"]
    main(["predict", f"--ckpt_path={run_dir}", "--data.predict_paths=photos/three.png", *flags])
    assert [row["path"] for row in rows(tmp_path / "elsewhere", "predictions.csv")] == ["photos/three.png"]
