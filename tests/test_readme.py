"""Every command of the README is executed as it stands there, in order, in a working directory of its own."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROJECT

README = (PROJECT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
# The tests run inside the environment that `uv run` would make.
PYTHON = f"{shlex.quote(sys.executable)} -m "
PREFIXES = {
    "uv run python -m ": PYTHON,
    "uv run python scripts/": f"{shlex.quote(sys.executable)} scripts/",
    "uv run pytest": f"{PYTHON}pytest --collect-only -q",
    "uv run ": PYTHON,
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    for name in ("README.md", "configs", "docs", "mnist_lit", "pyproject.toml", "scripts", "tests"):
        (folder / name).symlink_to(PROJECT / name)
    return folder


def run(command: str, folder: Path, data_dir: Path) -> "subprocess.CompletedProcess[str]":
    # Short training of the full job: what the command line leaves open may come from the environment.
    limits = {f"MNIST_LIT_TRAINER__LIMIT_{split}_BATCHES": "2" for split in ("VAL", "TEST", "PREDICT")}
    limits |= {"MNIST_LIT_TRAINER__LIMIT_TRAIN_BATCHES": "20", "MNIST_LIT_DATA": str(data_dir)}
    return subprocess.run(
        shlex.split(command),
        cwd=folder,
        env={**os.environ, **limits},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def here(command: str) -> str:
    prefix = next(prefix for prefix in PREFIXES if command.startswith(prefix))
    return PREFIXES[prefix] + command.removeprefix(prefix).replace("--n_trials 20", "--n_trials 4")


def test_readme_has_its_two_first_commands() -> None:
    assert COMMANDS[0] == "uv run python -m mnist_lit fit --config configs/base.yaml --config configs/digits.yaml"
    assert COMMANDS[1] == "uv run pytest"


# Until Ctrl-C; the page has tests of its own.
SERVERS = ("tensorboard", "mnist_lit demo")


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if not any(server in command for server in SERVERS)]
)
def test_command_works(command: str, workspace: Path, mnist_dir: Path) -> None:
    done = run(here(command), workspace, mnist_dir)

    assert done.returncode == 0, done.stderr


def test_tensorboard_serves_the_runs(workspace: Path) -> None:
    (command,) = [command for command in COMMANDS if "tensorboard" in command]
    local = here(command).replace("-m tensorboard", "-m tensorboard.main")

    with subprocess.Popen(shlex.split(f"{local} --port 0"), cwd=workspace, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        served = any("http://localhost" in line for line in server.stderr)
        server.terminate()

    assert served


def test_pictures_are_there() -> None:
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", README)

    assert pictures
    assert all((PROJECT / picture).is_file() for picture in pictures)


def test_python_example_works(workspace: Path, mnist_dir: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)

    done = run(f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}", workspace, mnist_dir)

    assert done.returncode == 0, done.stderr
    assert "tensor(" in done.stdout


def test_error_is_printed_as_shown(workspace: Path, mnist_dir: Path) -> None:
    command, *shown = re.findall(r"```text\n\$ python -m (.*?)```", README, re.DOTALL)[0].splitlines()

    done = run(PYTHON + command, workspace, mnist_dir)

    assert done.returncode == 2
    assert done.stderr.splitlines() == shown


def test_every_config_and_every_folder_is_in_the_readme() -> None:
    configs = {f"`{path.stem}`" for path in (PROJECT / "configs").glob("*.yaml")}
    folders = {f"{path.name}/" for path in (PROJECT / "mnist_lit").iterdir() if path.joinpath("__init__.py").is_file()}

    assert {name for name in configs | folders if name not in README} == set()


def test_the_package_installs_by_pip_too() -> None:
    """Plain `pip install -e .`: the metadata builds and holds what the code imports."""
    done = subprocess.run(
        [sys.executable, "-c", "import importlib.metadata as m; print(m.requires('mnist_lit'))"],
        capture_output=True,
        text=True,
        check=True,
    )

    for name in ("torch", "torchvision", "lightning", "jsonargparse", "optuna", "torchmetrics", "tensorboard"):
        assert f"'{name}" in done.stdout
