"""Bad input of every kind: a short error that names it, and a folder that is as it was."""

import contextlib
import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONFIGS, SMALL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mnist_lit import main

Fails = Callable[..., str]
HUGE = "99999999999999999999"


def contents(folder: Path) -> dict[Path, bytes]:
    """Every entry below a folder; of files, what is in them."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path: Path, fails: Fails) -> Fails:
    """As `fails`, of a command that must leave the working folder as it was."""

    def run(*args: str, code: int = 2) -> str:
        before = contents(tmp_path)
        error = fails(*args, code=code)
        assert contents(tmp_path) == before
        assert "Traceback" not in error
        return error

    return run


def odd_files(folder: Path) -> None:
    """What a name may stand for but a file of text."""
    os.mkfifo(folder / "pipe")
    folder.joinpath("loop").symlink_to("loop")
    folder.joinpath("dangling").symlink_to("nowhere")
    folder.joinpath("folder").mkdir()
    folder.joinpath("link").symlink_to("folder")


# Typical mistakes: what the error names, and what it suggests.

MISTAKES = [
    (["--model.chanels=[8]"], "--model.chanels", "model.channels"),
    (["--model.batch_size=8"], "--model.batch_size", "data.batch_size"),
    (["--lr=0.1"], "--lr", "model.lr"),
    (["--data.augment.rotate=10"], "--data.augment.rotate", "data.augment.rotation"),
    (["--early_stoping.enabled=true"], "--early_stoping.enabled", "early_stopping.enabled"),
    (["--model.lr=fast"], "--model.lr", "fast"),
    (["--model.lr=-0.1"], "--model.lr", ">0"),
    (["--model.dropout=1.5"], "--model.dropout", "<=1"),
    (["--model.pooling=maxx"], "--model.pooling", "max"),
    (["--model.optimizer=AdamX"], "--model.optimizer", "Adam"),
    (["--model.optimizer=SGD", "--model.optimizer.momentun=0.9"], "--model.optimizer.momentun", "momentum"),
    (["--model.optimizer=torch.optm.SGD"], "--model.optimizer", "torch.optm"),
    (["--model.schedule=OneCycleLR", "--model.schedule.pct_strt=0.1"], "--model.schedule.pct_strt", "pct_start"),
    (["--trainer.callbacks=[{class_path: EarlyStoping}]"], "--trainer.callbacks", "EarlyStopping"),
    (["--trainer.accelerator=gppu"], "trainer.accelerator", "gppu"),
    (["--config=bad.yaml"], "bad.yaml, line 2: model.lrr", "model.lr"),
    (["--config=class.yaml"], "class.yaml, line 4: model.optimizer", "momentum"),
    (["--config=syntax.yaml"], "syntax.yaml, line 3", "YAML"),
    (["--config=bda.yaml"], "bda.yaml", "bad.yaml"),
    (["--config=digits.yml"], "digits.yml", "digits.yaml"),
    (["--model.channels=[8, 8, 8, 8, 8]"], "model.channels", "use fewer"),
    (["--model.optimizer=SGD", "--model.optimizer.nesterov", "--model.lr=0.1"], "--model.optimizer.nesterov", "value"),
    (["--model.channels", "16", "32"], "--model.channels", "[1, 2]"),
    (["configs/base.yaml"], "configs/base.yaml", "--config"),
    (["--ckpt_path=logs/run_9"], "ckpt_path: 'logs/run_9'", "run directory"),
    (["--ckpt_path", "--model.lr=0.1"], "--ckpt_path", "value"),
    (["--data.val_size=20%"], "--data.val_size", "whole number"),
    (["--trainer.limit_train_batches=half"], "--trainer.limit_train_batches", "int or float"),
    (["--trainer.max_time=1", "--trainer.max_epochs=1"], "--trainer.max_time", "DD:HH:MM:SS"),
    (["--trainer.val_check_interval=1000"], "--trainer.val_check_interval", "1000"),
    (["--model.optimizer={class_path: SGD, momentum: 0.9}"], "--model.optimizer", "init_args"),
    (["--model.optimizer=SGD", "--model.optimizer.momentum=-1"], "model.optimizer", "momentum"),
]
FILES = {
    "bad.yaml": "model:\n  lrr: 0.1\n",
    "class.yaml": "model:\n  optimizer:\n    class_path: SGD\n    init_args: {momentun: 0.9}\n",
    "syntax.yaml": "model:\n  lr: [0.1\n",
}


@pytest.mark.parametrize(("flags", "origin", "hint"), MISTAKES, ids=[" ".join(row[0]) for row in MISTAKES])
def test_a_typical_mistake_is_named_where_it_stands(
    flags: list[str], origin: str, hint: str, tmp_path: Path, refused: Fails
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    error = refused("fit", *SMALL, *flags)
    assert origin in error.splitlines()[0]
    assert hint in error


# Configs

CONFIG_TEXTS: list[tuple[str | bytes, str]] = [
    # keys given twice
    ("model: {lr: 0.1}\nmodel: {lr: 0.2}", "line 2"),
    ("data:\n  augment:\n    crop: 1\n    scale: 0\n    crop: 2", "line 5"),
    ("trainer:\n  callbacks:\n  - class_path: A\n    class_path: B", "line 4"),
    # no YAML, or another one
    ("model: *nowhere", "line 1"),
    ("model: {lr: 1}\n---\nmodel: {}", "line 2"),
    ("model: !!python/object/apply:os.system [touch executed]", "line 1"),
    ("---", "bad.yaml"),
    ("model: &a {channels: *a}", "bad.yaml"),
    ("x0: &x0 [0]\n" + "".join(f"x{n}: &x{n} [{f'*x{n - 1},' * 10}]\n" for n in range(1, 9)), "too many values"),
    ("model: {lr: 1}\n".encode("utf-16"), "bad.yaml"),
    ("model: {}\n1: 2", "line 2"),
    # unknown keys
    ("fit: {model: {lr: 0.1}}", "line 1: fit"),
    ("lr: 0.1", "line 1: lr"),
    ("model: " + "{a: " * 200 + "1" + "}" * 200, "there is no such key"),
    # nothing where something has to be
    ("model:", "line 1: model"),
    ('run_dir: ""', "line 1: run_dir"),
    # wrong types
    ("model: {pooling: " + "x" * 100_000 + "}", "model.pooling"),
    ('model: {pooling: "\\e[31mred"}', "\\x1b[31mred"),
    # numbers out of range
    ("model: {lr: .inf}", "line 1: model.lr"),
    ("model: {dropout: .nan}", "model.dropout"),
    ("model: {optimizer: {class_path: AdamW, init_args: {betas: [0.9, .nan]}}}", "betas"),
    # no classes
    ("model: [1]", "line 1: model"),
    ("ckpt_path: [run]", "line 1: ckpt_path"),
    ("model: {optimizer: 3}", "model.optimizer"),
    ("model: {optimizer: {class_path: [SGD]}}", "model.optimizer"),
    ("model: {optimizer: {class_path: SGD, init_args: 3}}", "model.optimizer"),
    ("trainer: {callbacks: [{class_path: SGD}]}", "trainer.callbacks"),
]


@pytest.mark.parametrize(("text", "name"), CONFIG_TEXTS, ids=[ascii(text)[:50] for text, _ in CONFIG_TEXTS])
def test_bad_config(text: str | bytes, name: str, tmp_path: Path, refused: Fails) -> None:
    tmp_path.joinpath("bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert name in refused("fit", "--config=bad.yaml")


PLACES = ["pipe", "/dev/zero", "folder", "loop", "dangling", "x" * 300, "a\0b", "-", "https://localhost/a.yaml", ""]


@pytest.mark.parametrize("path", PLACES, ids=[ascii(path)[:30] for path in PLACES])
@pytest.mark.parametrize("command", ["fit", "search"])
def test_config_that_is_no_file(command: str, path: str, tmp_path: Path, refused: Fails) -> None:
    odd_files(tmp_path)
    assert "--config" in refused(command, f"--config={path}")


# Flags and variables

FLAGS = [
    ("--ckpt_path=", "ckpt_path"),
    ("--data.batch_size=null", "--data.batch_size"),
    ("--data.timeout=inf", "--data.timeout"),
    ("--data.augment.rotation=181", "--data.augment.rotation"),
    ("--data.augment.crop=0.5", "--data.augment.crop"),
    (f"--data.batch_size={HUGE}", "--data.batch_size"),
    (f"--trainer.devices={HUGE}", "trainer"),
    ("--num_threads=1000000", "--num_threads"),
    (f"--seed_everything={HUGE}", "--seed_everything"),
    ("--trainer.barebones=true", "trainer"),
    ("--model.optimizer=os.system", "--model.optimizer"),
    ("--model.optimizer=torch.optim.Optimizer", "--model.optimizer"),
    ("--trainer.callbacks=[{class_path: torch.nn.Linear}]", "--trainer.callbacks"),
    ("--trainer.logger=nope", "--trainer.logger"),
    ("--model.lr.x=3", "--model.lr"),
    ("--", "--"),
    ("--print_config=nope", "print_config"),
    ("--" + "x" * 100_000 + "=1", "there is no such key"),
    ("--run_dir=/dev/null/run", "run_dir"),
    ("--run_dir=loop", "run_dir"),
    ("--ckpt_path=pipe", "ckpt_path"),
    ("--ckpt_path=folder", "ckpt_path"),
    ("--ckpt_path=ftp://localhost/a.ckpt", "ckpt_path"),
]


@pytest.mark.parametrize(("flag", "name"), FLAGS, ids=[ascii(flag)[:60] for flag, _ in FLAGS])
def test_bad_flag(flag: str, name: str, tmp_path: Path, refused: Fails) -> None:
    odd_files(tmp_path)
    assert name in refused("fit", *SMALL, flag)


VARIABLES = [
    ("FIT", "1", "MNIST_LIT_FIT"),
    ("MODEL", "3", "MNIST_LIT_MODEL"),
    ("MODEL__LRR", "3", "MNIST_LIT_MODEL__LRR"),
    ("FIT__MODEL__LR", "nan", "MNIST_LIT_FIT__MODEL__LR"),
    ("MODEL__OPTIMIZER", "os.system", "MNIST_LIT_MODEL__OPTIMIZER"),
    ("TRAINER__CALLBACKS", "[", "MNIST_LIT_TRAINER__CALLBACKS"),
    ("CONFIG", "folder", "folder"),
]


@pytest.mark.parametrize(("variable", "value", "name"), VARIABLES)
def test_bad_variable(
    variable: str, value: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Fails
) -> None:
    odd_files(tmp_path)
    monkeypatch.setenv(f"MNIST_LIT_{variable}", value)
    assert name in refused("fit")


# Checkpoints


CHECKPOINTS: list[tuple[dict[str, Any], str]] = [
    ({"state_dict": None}, "bad.ckpt"),
    ({"state_dict": {"network.0.weight": "heavy"}}, "bad.ckpt"),
    ({"state_dict": {}}, "ckpt_path"),
    ({"state_dict": {"a": torch.ones(3)}}, "ckpt_path"),
    ({"global_step": "x"}, "bad.ckpt"),
    ({"config": "model"}, "bad.ckpt"),
    ({"config": {"model": "x"}}, "ckpt_path"),
    ({"config": {"data": None}}, "data"),
    ({"config": {"model": {"lr": -1}}}, "model.lr"),
    ({"config": {"data": {"batch_size": None}}}, "data.batch_size"),
]


@pytest.mark.parametrize(("change", "name"), CHECKPOINTS)
def test_bad_checkpoint(
    change: dict[str, Any], name: str, checkpoint: dict[str, Any], tmp_path: Path, refused: Fails
) -> None:
    torch.save({**checkpoint, **change}, tmp_path / "bad.ckpt")
    for command in ("fit", "test"):
        assert name in refused(command, "--ckpt_path=bad.ckpt", "--data.dataset=digits", "--data.val_size=200")


@pytest.mark.parametrize("text", ["", "model: [", "model: {}\nmodel: {}", "model: null", "model: {lr: -1}"])
def test_bad_config_of_a_run_that_has_not_begun(text: str, tmp_path: Path, refused: Fails) -> None:
    tmp_path.joinpath("run").mkdir()
    tmp_path.joinpath("run", "config.yaml").write_text(text)
    refused("fit", "--ckpt_path=run")


# Files of data

LABELS = "t10k-labels-idx1-ubyte"
NUM_TEST = 10_000


def idx(shape: tuple[int, ...], *, magic: int = 0x0801, body: bytes = bytes(NUM_TEST)) -> bytes:
    return struct.pack(f">I{len(shape)}I", magic, *shape) + body


DATA_FILES = {
    "empty": b"",
    "wrong magic": idx((NUM_TEST,), magic=0x0802),
    "count too large": idx((2**32 - 1,)),
    "label 255": idx((NUM_TEST,), body=b"\xff" * NUM_TEST),
    "page of a login": b"<html>Please log in</html>",
}


@pytest.fixture
def labels(tmp_path: Path, checkpoint: dict[str, Any]) -> Path:
    """Where the labels of Fashion-MNIST belong, beside good images, and a checkpoint to test."""
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    with (raw / "t10k-images-idx3-ubyte").open("wb") as file:
        file.write(struct.pack(">4I", 0x0803, NUM_TEST, 28, 28))
        file.truncate(16 + NUM_TEST * 28 * 28)  # a hole, which costs nothing
    torch.save(checkpoint, tmp_path / "good.ckpt")
    return raw / LABELS


TEST = ["test", "--ckpt_path=good.ckpt"]
TEST += ["--data.dataset=fashion_mnist", "--data.download=false", "--data.data_dir=data"]


@pytest.mark.parametrize("content", DATA_FILES.values(), ids=DATA_FILES)
def test_bad_file_of_data(content: bytes, labels: Path, refused: Fails) -> None:
    labels.write_bytes(content)
    assert "data/FashionMNIST/raw" in refused(*TEST, code=1)


@pytest.mark.parametrize("kind", ["folder", "loop", "dangling", "pipe"])
def test_data_that_is_no_file(kind: str, labels: Path, tmp_path: Path, refused: Fails) -> None:
    odd_files(tmp_path)
    labels.symlink_to(tmp_path / kind)
    assert "data/FashionMNIST/raw" in refused(*TEST, code=1)


@pytest.mark.parametrize("folder", ["good.ckpt", "loop", "/dev/null", "x" * 300])
@pytest.mark.usefixtures("labels")
def test_data_dir_that_is_none(folder: str, tmp_path: Path, refused: Fails) -> None:
    odd_files(tmp_path)
    assert folder in refused(*TEST, f"--data.data_dir={folder}", code=1)


# Files of images


def picture(ending: str, mode: str = "L", size: tuple[int, int] = (40, 40), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, ending, **options)
    return file.getvalue()


BAD_IMAGES: dict[str, bytes] = {
    "zero bytes": b"",
    "page": b"<html><body>404</body></html>",
    "PNG of a huge size": picture("PNG")[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + picture("PNG")[24:],
    "PNG cut in its pixels": picture("PNG")[:-30],
    "JPEG cut in its header": picture("JPEG")[:100],
    "AVIF without its image": picture("AVIF").replace(b"av1C", b"XXXX"),
    "BMP of a negative size": picture("BMP")[:18] + struct.pack("<ii", -(2**31), -(2**31)) + picture("BMP")[26:],
    "PPM of a huge size": b"P6 999999999 999999999 255\n",
    "EPS that runs something": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\n",
}
ODD_IMAGES: dict[str, bytes] = {
    "one pixel": picture("PNG", size=(1, 1)),
    "16 bits": picture("PNG", "I;16"),
    "CMYK": picture("JPEG", "CMYK"),
    "transparent": picture("PNG", "LA"),
    "32 bits of floats": picture("TIFF", "F"),
    "animated": picture("GIF", save_all=True, append_images=[Image.new("L", (40, 40), 255)] * 3),
    "EXIF that is none": picture("JPEG", exif=b"Exif\0\0" + bytes(range(200))),
}


def predict(*paths: str) -> None:
    main(["predict", "--ckpt_path=good.ckpt", "--run_dir=out", f"--data.predict_paths={json.dumps(paths)}"])


@pytest.fixture
def _good(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    torch.save(checkpoint, tmp_path / "good.ckpt")


@pytest.mark.usefixtures("_good")
def test_bad_images_are_named_and_skipped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    odd_files(tmp_path)
    tmp_path.joinpath("good.png").write_bytes(picture("PNG"))
    names = [f"{number}.png" for number in range(len(BAD_IMAGES))]
    for file, content in zip(names, BAD_IMAGES.values(), strict=True):
        tmp_path.joinpath(file).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        predict(*names, "good.png", "pipe", "/dev/zero")
    output, errors = capfd.readouterr()
    printed = errors.splitlines()
    assert stop.value.code == 1
    assert [line.split(": ")[1] for line in printed[:-1]] == [*names, "pipe", "/dev/zero"], printed
    assert output.splitlines()[-1] == "out"
    assert (tmp_path / "out" / "predictions.csv").read_text().count("\n") == 2


@pytest.mark.usefixtures("_good")
def test_odd_images_are_predicted(tmp_path: Path) -> None:
    for number, content in enumerate(ODD_IMAGES.values()):
        tmp_path.joinpath(f"{number}.img").write_bytes(content)
    predict("*.img")
    assert (tmp_path / "out" / "predictions.csv").read_text().count("\n") == 1 + len(ODD_IMAGES)


@pytest.mark.usefixtures("_good")
@pytest.mark.parametrize("path", ["loop", "dangling", "folder", "a\0b", "x" * 300])
def test_paths_of_images_that_lead_nowhere_are_one_error(path: str, tmp_path: Path, refused: Fails) -> None:
    odd_files(tmp_path)
    error = refused("predict", "--ckpt_path=good.ckpt", f"--data.predict_paths=[{json.dumps(path)}]")
    assert "data.predict_paths" in error


# Anything

KEYS = ["model", "data", "trainer", "lr", "channels", "optimizer", "class_path", "init_args", "batch_size", "augment"]
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates() | st.binary()
KEY = st.sampled_from(KEYS) | st.text(max_size=9) | st.integers()
ANYTHING = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3))
SHARED: Any = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],  # all examples share a folder
}
# Where bytes are overwritten, with what, and where the file ends.
DAMAGE = st.tuples(st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=9)), max_size=5), st.floats(0, 1))


def damaged(content: bytes, damage: tuple[list[tuple[float, bytes]], float]) -> bytes:
    """A file's content with some bytes overwritten, and, half of the time, cut off."""
    changes, end = damage
    changed = bytearray(content)
    for share, other in changes:
        start = round(share * len(content))
        changed[start : start + len(other)] = other
    return bytes(changed[: round(2 * end * len(content))])


def outcome(*args: str) -> tuple[int, str]:
    """The exit code and the errors of a command; 0 when it works."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main(list(args))
        except SystemExit as stop:
            return int(stop.code or 0), errors.getvalue()
        return 0, errors.getvalue()


def check_config(content: bytes, folder: Path) -> None:
    """It is a configuration or a short error."""
    file = folder / "any.yaml"
    file.write_bytes(content)
    code, errors = outcome("fit", f"--config={file}", "--print_config")
    assert code in (0, 2), errors
    assert len(errors.splitlines()) <= 5
    assert list(folder.iterdir()) == [file]


@given(config=st.dictionaries(KEY, ANYTHING, max_size=3))
@settings(max_examples=60, **SHARED)
def test_any_config_is_a_configuration_or_a_short_error(config: dict[Any, Any], tmp_path: Path) -> None:
    check_config(yaml.safe_dump(config, allow_unicode=True).encode(), tmp_path)


@given(damage=DAMAGE)
@settings(max_examples=30, **SHARED)
def test_any_damage_to_a_config_is_a_configuration_or_a_short_error(damage: Any, tmp_path: Path) -> None:
    check_config(damaged((CONFIGS / "base.yaml").read_bytes(), damage), tmp_path)


@pytest.mark.parametrize("command", ["test", pytest.param("fit", marks=pytest.mark.slow)])
@given(damage=DAMAGE)
@settings(max_examples=40, **SHARED)
def test_any_damage_to_a_checkpoint_is_a_short_error(
    command: str, damage: Any, tmp_path: Path, checkpoint: dict[str, Any]
) -> None:
    good = io.BytesIO()
    torch.save(checkpoint, good)
    file = tmp_path / "any.ckpt"
    file.write_bytes(damaged(good.getvalue(), damage))

    code, errors = outcome(
        command, f"--ckpt_path={file}", "--run_dir=out", *["--trainer.max_epochs=2"] * (command == "fit")
    )

    assert code in (0, 1, 2), errors
    assert len(errors.splitlines()) <= 5, errors
    assert "Traceback" not in errors
    if code == 0:
        shutil.rmtree("out", ignore_errors=True)
    assert list(tmp_path.iterdir()) == [file], errors
