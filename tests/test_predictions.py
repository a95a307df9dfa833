"""`predict` on files of one's own: which are meant, what is written, what is said of those that are no images."""

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL
from drawings import draw
from PIL import Image

from mnist_lit import main

Fails = Callable[..., str]
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("source") / "run"
    main(["fit", *SMALL, f"--run_dir={run_dir}"])
    return run_dir


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
    return rows(run_dir)


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


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
        ("photos/three.png", ["three.png"]),
        ("photos/*.png", ["empty.png", "three.png"]),
        ("photos/**/o*.png", ["one [1].png"]),
        ("photos/more/one [1].png", ["one [1].png"]),
        ("[photos/seven.jpg, photos/*.jpg, photos/more]", ["seven.jpg", "one [1].png"]),
    ],
)
def test_files_folders_and_patterns_are_found(paths: str, names: list[str], run_dir: Path) -> None:
    assert [Path(row["path"]).name for row in predict(run_dir, paths)] == names


@pytest.mark.usefixtures("photos")
def test_the_console_shows_what_is_read(run_dir: Path, capsys: Capsys) -> None:
    read = predict(run_dir, "photos")

    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(run_dir)
    for row in read:
        confidence = f", {float(row['confidence']):.1%}" if row["confidence"] else ""
        assert any(line.split("  ")[0] == row["path"] and line.endswith(row["label"] + confidence) for line in lines)


def test_many_images_make_a_short_table(run_dir: Path, photos: Path, capsys: Capsys) -> None:
    for number in range(60):
        Image.open(photos / "three.png").save(photos / f"{number}.png")

    assert len(predict(run_dir, "photos")) == 64
    assert len(capsys.readouterr().out.splitlines()) < 30


@pytest.mark.usefixtures("photos")
def test_the_picture_shows_image_and_what_was_seen(run_dir: Path) -> None:
    predict(run_dir, "photos/seven.jpg")

    with Image.open(run_dir / "pictures" / "predictions.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    image, seen = pixels[100:, 20:120], pixels[100:, 150:250]
    assert (image[..., 1] > image[..., 0] + 5).any()  # a blackboard is green
    assert not (seen[..., 1] > seen[..., 0] + 5).any()
    assert (seen.sum(axis=2) < 30).any()


def test_what_is_no_image_is_named_and_skipped(run_dir: Path, photos: Path, capsys: Capsys) -> None:
    (photos / "notes.txt").write_text("seven")
    whole = (photos / "seven.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(SystemExit) as stop:
        predict(run_dir, "photos")

    printed = capsys.readouterr()
    assert stop.value.code == 1
    assert "skipped: photos/cut.jpg: " in printed.err
    assert "skipped: photos/notes.txt: it is no image" in printed.err
    assert printed.err.splitlines()[-1] == "error: 2 of 6 files cannot be read as images"
    assert printed.out.splitlines()[-1] == str(run_dir)
    assert len(rows(run_dir)) == 4


def test_a_pipe_is_not_waited_for(run_dir: Path, photos: Path, capsys: Capsys) -> None:
    os.mkfifo(photos / "pipe.png")

    with pytest.raises(SystemExit):
        predict(run_dir, "photos")

    assert "skipped: photos/pipe.png: it is no file" in capsys.readouterr().err
    assert len(rows(run_dir)) == 4


def test_names_need_not_be_text(run_dir: Path, photos: Path, capsys: Capsys) -> None:
    (photos / "three.png").rename(photos / os.fsdecode(b"\xe9\n\x1b[31m.png"))

    read = predict(run_dir, "photos/*31m*")

    assert [row["path"] for row in read] == ["photos/\\udce9\n\x1b[31m.png"]
    assert "photos/\\udce9\\n\\x1b[31m.png  " in capsys.readouterr().out


@pytest.mark.parametrize("size", [(1, 2000), (2000, 1)])
def test_a_line_of_pixels_is_an_image(size: tuple[int, int], run_dir: Path, tmp_path: Path) -> None:
    Image.new("L", size, "white").save(tmp_path / "line.png")

    assert [row["label"] for row in predict(run_dir, "line.png")] == ["no digit"]


@pytest.mark.usefixtures("photos")
def test_a_limit_leaves_the_other_images_out(run_dir: Path) -> None:
    read = predict(run_dir, "photos", "--trainer.limit_predict_batches=1", "--data.eval_batch_size=2")

    assert [Path(row["path"]).name for row in read] == ["empty.png", "one [1].png", "seven.jpg"]


@pytest.mark.usefixtures("photos")
def test_no_picture_of_other_images_stays_beside_the_table(run_dir: Path) -> None:
    predict(run_dir, "photos")

    predict(run_dir, "null")

    assert not (run_dir / "pictures" / "predictions.png").exists()


def test_only_what_is_no_image_leaves_no_rows(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("seven")

    with pytest.raises(SystemExit) as stop:
        predict(run_dir, "notes.txt")

    assert stop.value.code == 1
    assert rows(run_dir) == []


def test_a_path_to_nothing_is_an_error_before_anything_is_made(run_dir: Path, tmp_path: Path, fails: Fails) -> None:
    error = fails("predict", f"--ckpt_path={run_dir}", "--data.predict_paths=photos/*.gif", "--run_dir=new")

    assert "there is no file 'photos/*.gif'" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        ("", "there is no file ''"),
        ("[]", "there is no file ''"),
        ("x" * 300, "File name too long"),
        ("~nobody_of_that_name/x.png", "Could not determine home directory"),
    ],
)
def test_a_path_that_cannot_be_is_explained(paths: str, reason: str, run_dir: Path, fails: Fails) -> None:
    error = fails("predict", f"--ckpt_path={run_dir}", f"--data.predict_paths={paths}")

    assert error.startswith("error: data.predict_paths: ")
    assert reason in error


@pytest.mark.usefixtures("photos")
def test_a_pattern_without_quotes_is_explained(run_dir: Path, fails: Fails) -> None:
    files = ["photos/empty.png", "photos/three.png"]

    error = fails("predict", f"--ckpt_path={run_dir}", "--data.predict_paths", *files)

    assert error.splitlines() == [
        "error: photos/three.png: belongs to no key",
        "put patterns in quotes, for example: --data.predict_paths 'photos/*.jpg'",
    ]


@pytest.mark.usefixtures("photos")
def test_no_data_set_is_needed(run_dir: Path, tmp_path: Path) -> None:
    flags = ["--data.dataset=mnist", f"--data.data_dir={tmp_path / 'nothing'}", "--run_dir=elsewhere"]

    main(["predict", f"--ckpt_path={run_dir}", "--data.predict_paths=photos/three.png", *flags])

    assert [row["path"] for row in rows(tmp_path / "elsewhere")] == ["photos/three.png"]


@pytest.mark.usefixtures("photos")
def test_an_ensemble_with_shifts_reads_photographs_too(run_dir: Path, fit: Callable[..., Any]) -> None:
    fit("--seed_everything=2", "--run_dir=second")
    one, other = (predict(folder, "photos/three.png")[0] for folder in (run_dir, Path("second")))

    main(["predict", f"--ckpt_path={run_dir}", "--ensemble=[second]", "--data.predict_paths=photos/three.png"])

    both = rows(Path("logs/run_1"))[0]
    assert float(both["p3"]) == pytest.approx((float(one["p3"]) + float(other["p3"])) / 2, abs=1e-2)


def test_several_processes_are_refused_before_anything_is_made(run_dir: Path, tmp_path: Path, fails: Fails) -> None:
    flags = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--run_dir=new"]

    error = fails("predict", f"--ckpt_path={run_dir}", *flags)

    assert "one process" in error
    assert not (tmp_path / "new").exists()


def test_a_large_jpeg_is_read_as_a_small_one(tmp_path: Path, run_dir: Path) -> None:
    image = draw(7, "marker", np.random.default_rng(3))
    image.resize((4000, 4000 * image.height // image.width)).save(tmp_path / "large.jpg")
    image.save(tmp_path / "small.jpg")

    large, small = predict(run_dir, "[large.jpg, small.jpg]")

    assert large["label"] == small["label"]
    assert float(large["confidence"]) == pytest.approx(float(small["confidence"]), abs=0.1)
