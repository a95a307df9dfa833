"""What is answered before torch is imported, how errors end a command, and what the package offers."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS

import mnist_lit
from mnist_lit import ConvNet, MNISTDataModule, main
from mnist_lit.app import COMMANDS

Fails = Callable[..., str]


def answer(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a command that only answers prints before it ends with exit code 0."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(capsys, "--version") == f"mnist_lit {version('mnist_lit')}\n"


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_help_lists_every_command_with_what_it_does(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split(maxsplit=1) for line in answer(capsys, *args).splitlines()]

    assert set(COMMANDS) == {"fit", "validate", "test", "predict", "export", "demo", "compare"}
    for command, description in COMMANDS.items():
        assert [command, description] in lines


def test_arguments_default_to_those_of_the_process(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mnist_lit", "--version"])

    with pytest.raises(SystemExit) as stop:
        main()

    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("mnist_lit ")


@pytest.mark.parametrize(("typed", "meant"), [("fti", "fit"), ("tset", "test"), ("predcit", "predict")])
def test_mistyped_command_gets_the_nearest_one(typed: str, meant: str, fails: Fails) -> None:
    error = fails(typed)

    assert error.splitlines()[0] == f"error: {typed!r} is no command"
    assert f"did you mean {meant}" in error


def test_command_like_no_other_gets_them_all(fails: Fails) -> None:
    assert fails("xyzzy").splitlines()[1] == "commands: fit, validate, test, predict, export, demo, compare"


def test_command_comes_before_its_options(fails: Fails) -> None:
    error = fails("--config", "base.yaml", "fit")

    assert error.startswith("error: the command comes first, got '--config'\n")
    assert "python -m mnist_lit fit --config" in error


def test_config_without_a_file_says_so(fails: Fails) -> None:
    assert fails("fit", "--config") == "error: --config needs the path of a YAML file\n"


@pytest.mark.parametrize("typed", ["bse.yaml", "base.yml", "base"])
def test_missing_config_gets_the_nearest_file(typed: str, tmp_path: Path, fails: Fails) -> None:
    tmp_path.joinpath("base.yaml").write_text("model: {lr: 0.1}\n")

    error = fails("fit", "--config", typed)

    assert error == f"error: --config: {typed} does not exist\ndid you mean base.yaml?\n"


def test_missing_config_in_a_folder_gets_the_nearest_file_of_that_folder(fails: Fails) -> None:
    error = fails("fit", f"--config={CONFIGS / 'digit.yaml'}")

    assert f"did you mean {CONFIGS / 'digits.yaml'}" in error


def test_missing_config_in_a_missing_folder_says_what_to_give(fails: Fails) -> None:
    error = fails("fit", "--config", "nowhere/base.yaml")

    assert error.startswith("error: --config: nowhere/base.yaml does not exist\n")
    assert "for example configs/base.yaml" in error


def test_every_config_is_checked(tmp_path: Path, fails: Fails) -> None:
    tmp_path.joinpath("good.yaml").write_text("model: {lr: 0.1}\n")

    assert "worse.yaml does not exist" in fails("fit", "--config", "good.yaml", "-c", "worse.yaml")


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"model:\n  lr: 0.1\n hidden: [3]\n", "broken.yaml, line 3, column 2"),
        (b"model: {lr: 0.1\ndata: {}\n", "broken.yaml, line 2, column 5"),
        (b"model:\n  channels: [1, 2\n", "broken.yaml, line 3, column 1"),
        (b"model:\n\tlr: 0.1\n", "broken.yaml, line 2, column 1"),
        (b"model: 'open\n", "broken.yaml, line 2, column 1"),
    ],
    ids=["indentation", "brace", "bracket", "tab", "quote"],
)
def test_broken_yaml_is_named_with_line_and_column(content: bytes, place: str, tmp_path: Path, fails: Fails) -> None:
    tmp_path.joinpath("broken.yaml").write_bytes(content)

    error = fails("fit", "--config", "broken.yaml")

    assert error.startswith(f"error: {place}: ")
    assert error.splitlines()[1] == "the file is no valid YAML"


@pytest.mark.parametrize(
    "content",
    [b"", b"# only a comment\n", b"- model\n- data\n", b"just text\n", b"3\n", b"null\n"],
    ids=["empty", "comment", "list", "text", "number", "null"],
)
def test_config_without_keys_is_shown_what_keys_look_like(content: bytes, tmp_path: Path, fails: Fails) -> None:
    tmp_path.joinpath("keyless.yaml").write_bytes(content)

    error = fails("fit", "--config", "keyless.yaml")

    assert error == "error: --config: keyless.yaml holds no keys\nit needs lines like 'model:' and '  lr: 0.01'\n"


@pytest.mark.parametrize(
    "content",
    ["model: {lr: 0.1}  # für alle\n".encode("latin-1"), b"\x89PNG\r\n\x1a\n\x00\x00", b"model:\x00 {}\n", b"[" * 5000],
    ids=["latin-1", "picture", "NUL", "bottomless"],
)
def test_config_that_is_no_text_cannot_be_read(content: bytes, tmp_path: Path, fails: Fails) -> None:
    tmp_path.joinpath("binary.yaml").write_bytes(content)

    assert fails("fit", "--config", "binary.yaml").startswith("error: --config: binary.yaml cannot be read: ")


def test_directory_is_no_config(tmp_path: Path, fails: Fails) -> None:
    tmp_path.joinpath("configs").mkdir()

    error = fails("fit", "--config", "configs")

    assert error.startswith("error: --config: configs cannot be read: ")
    assert "directory" in error


@pytest.mark.parametrize("args", [["--ckpt_path", "nowhere.ckpt"], ["--ckpt_path=nowhere.ckpt"]])
@pytest.mark.parametrize("command", ["fit", "test"])
def test_missing_checkpoint_says_what_to_give(command: str, args: list[str], fails: Fails) -> None:
    error = fails(command, *args)

    assert error.startswith("error: ckpt_path: 'nowhere.ckpt' does not exist\n")
    assert "a checkpoint file, a URL or a run directory" in error


def test_missing_config_from_the_environment_is_an_error_too(monkeypatch: pytest.MonkeyPatch, fails: Fails) -> None:
    monkeypatch.setenv("MNIST_LIT_CONFIG", "nowhere.yaml")

    assert "nowhere.yaml does not exist" in fails("fit")


@pytest.mark.parametrize("content", [None, b"model: [\n"], ids=["missing", "malformed"])
def test_bad_config_is_answered_without_torch(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        tmp_path.joinpath("config.yaml").write_bytes(content)
    command = [sys.executable, "-X", "importtime", "-m", "mnist_lit", "fit", "--config", "config.yaml"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 2
    imported = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line]
    assert "mnist_lit.app" in imported
    assert [name for name in imported if name.partition(".")[0] in ("torch", "torchvision", "lightning")] == []
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, mnist_lit; print('yaml' in sys.modules, 'torch' in sys.modules, 'lightning' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.split() == ["True", "False", "False"]


def test_error_of_a_process_is_short_and_on_stderr(shell: Callable[..., Any]) -> None:
    done = shell("fit", "--config", "nowhere.yaml")

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: --config: nowhere.yaml does not exist\n")
    assert len(done.stderr.splitlines()) == 2


def test_debug_variable_shows_the_traceback(shell: Callable[..., Any]) -> None:
    done = shell("fit", "--config", "nowhere.yaml", env={**os.environ, "MNIST_LIT_DEBUG": "1"})

    assert done.returncode != 0
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert "UsageError: --config: nowhere.yaml does not exist" in done.stderr


def test_debug_variable_is_no_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MNIST_LIT_DEBUG", "1")

    assert "max_epochs" in answer(capsys, "fit", "--print_config")


def test_package_offers_main_and_the_two_classes() -> None:
    assert mnist_lit.__all__ == ["ConvNet", "MNISTDataModule", "main"]
    assert mnist_lit.ConvNet is ConvNet
    assert mnist_lit.MNISTDataModule is MNISTDataModule
    assert mnist_lit.main is main


def test_package_offers_nothing_else() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LeNet'"):
        mnist_lit.LeNet  # noqa: B018
