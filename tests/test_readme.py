"""Every command of the README is executed as it stands there, in order, in a working directory of its own."""

import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import PROJECT, completed
from test_folder import write as write_images

from mnist_lit import main

README = (PROJECT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
OURS = "python -m mnist_lit "  # runs in this process: importing torch takes seconds
LIMITS = {f"MNIST_LIT_TRAINER__LIMIT_{split}_BATCHES": "2" for split in ("VAL", "TEST", "PREDICT")}
LIMITS["MNIST_LIT_TRAINER__LIMIT_TRAIN_BATCHES"] = "5"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    for name in ("README.md", "configs", "docs", "mnist_lit", "pyproject.toml", "scripts", "tests"):
        (folder / name).symlink_to(PROJECT / name)
    write_images(folder / "drawings" / "train", num=20)
    return folder


def run(command: str, workspace: Path, mnist_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command in the workspace with short training: what it leaves open may come from the environment."""
    monkeypatch.chdir(workspace)
    for name, value in {**LIMITS, "MNIST_LIT_DATA": str(mnist_dir)}.items():
        monkeypatch.setenv(name, value)
    command = command.removeprefix("uv run ").replace("--n_trials 20", "--n_trials 1")
    if command.startswith(OURS):
        main(shlex.split(command.removeprefix(OURS)))
    else:  # a search of its own: its workers have its variables
        completed([sys.executable, *shlex.split(command)[1:]])


def test_readme_has_its_two_first_commands() -> None:
    assert COMMANDS[0] == "uv run python -m mnist_lit fit --config configs/base.yaml --config configs/digits.yaml"
    assert COMMANDS[1] == "uv run pytest"


# The tests are running already; servers run until Ctrl-C, and have tests of their own.
NOT_TRIED = ("uv run pytest", "tensorboard", "mnist_lit demo")


@pytest.mark.parametrize("command", [command for command in COMMANDS if not any(name in command for name in NOT_TRIED)])
def test_command_works(command: str, workspace: Path, mnist_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_prints = command.endswith(("--help", "--print_config"))
    with pytest.raises(SystemExit, match="0") if only_prints else nullcontext():
        run(command, workspace, mnist_dir, monkeypatch)


def test_tensorboard_serves_the_runs(workspace: Path) -> None:
    (command,) = [command.removeprefix("uv run ") for command in COMMANDS if "tensorboard" in command]
    local = [sys.executable, "-m", "tensorboard.main", *shlex.split(command)[1:], "--port=0"]
    with subprocess.Popen(local, cwd=workspace, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        served = any("http://localhost" in line for line in server.stderr)
        server.terminate()
    assert served


def test_python_example_works(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("MNIST_LIT_TRAINER__LIMIT_TRAIN_BATCHES", "5")
    exec(code, {})
    assert "tensor(" in capsys.readouterr().out


def test_error_is_printed_as_shown(
    workspace: Path, mnist_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *shown = re.findall(r"```text\n\$ (python -m .*?)```", README, re.DOTALL)[0].splitlines()
    with pytest.raises(SystemExit) as stop:
        run(command, workspace, mnist_dir, monkeypatch)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == shown


def test_every_config_and_every_folder_is_in_the_readme_and_its_pictures_are_there() -> None:
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", README)
    configs = {f"`{path.stem}`" for path in (PROJECT / "configs").glob("*.yaml")}
    folders = {f"{path.name}/" for path in (PROJECT / "mnist_lit").iterdir() if path.joinpath("__init__.py").is_file()}
    assert {name for name in configs | folders if name not in README} == set()
    assert pictures
    assert all((PROJECT / picture).is_file() for picture in pictures)
