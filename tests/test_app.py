"""The entry point: what is answered before torch is imported, how errors end a command, what the package offers."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from lightning.pytorch import Callback

import mnist_lit
from mnist_lit import main

Capsys = pytest.CaptureFixture[str]
Fails = Callable[..., str]
COMMANDS = {"fit", "validate", "test", "predict", "export", "demo", "compare"}


def answer(capsys: Capsys, args: list[str] | None) -> str:
    """Return what a command prints that ends with exit code 0 without a run."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("args", [["--version"], None])
def test_version_is_that_of_the_package(args: Any, capsys: Capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mnist_lit", "--version"])

    assert answer(capsys, args) == f"mnist_lit {version('mnist_lit')}\n"


@pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(args: list[str], capsys: Capsys) -> None:
    assert {line.split()[0] for line in answer(capsys, args).splitlines() if line} >= COMMANDS


@pytest.mark.parametrize(
    ("args", "hint"),
    [(["fti"], "fit"), (["predcit"], "predict"), (["xyzzy"], "validate, test"), (["-c", "a.yaml", "fit"], "fit -c")],
)
def test_wrong_command_is_named_with_a_way_out(args: list[str], hint: str, fails: Fails) -> None:
    first, second = fails(*args).splitlines()

    assert args[0] in first
    assert hint in second


@pytest.mark.parametrize("args", [["fit", "--config"], ["fit", "--config=nowhere.yaml"]])
def test_error_of_a_process_is_short_and_comes_before_torch(args: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "mnist_lit", *args]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    errors = [line for line in lines if not line.startswith("import time:")]
    assert (done.returncode, done.stdout) == (2, "")
    assert errors[0].startswith("error: --config")
    assert len(errors) <= 2
    assert "mnist_lit.app" in imported
    assert not imported & {"torch", "torchvision", "lightning", "optuna"}


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, mnist_lit; print('yaml' in sys.modules, 'torch' in sys.modules, 'lightning' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.split() == ["True", "False", "False"]


def test_debug_variable_shows_the_traceback_and_is_no_key(
    shell: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    done = shell("fit", "--config", "nowhere.yaml", env={**os.environ, "MNIST_LIT_DEBUG": "1"})

    assert done.returncode != 0
    assert done.stderr.startswith("Traceback")
    monkeypatch.setenv("MNIST_LIT_DEBUG", "1")
    assert "max_epochs" in answer(capsys, ["fit", "--print_config"])


@pytest.mark.parametrize(
    ("typed", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(
    typed: dict[str, str], spins: str | None, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in typed.items():
        monkeypatch.setenv(name, value)

    answer(capsys, ["fit", "--print_config"])

    assert os.environ.get("GOMP_SPINCOUNT") == spins


class Broken(Callback):
    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        raise KeyError("a\x1b\nmissing")


def test_mistake_in_own_code_shows_its_own_frames_and_stays_in_the_run(tmp_path: Path, capsys: Capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *SMALL, "--run_dir=run"], callbacks=[Broken()])

    first, frame, *rest = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1
    assert isinstance(stop.value.__cause__, KeyError)
    assert first.startswith("error: KeyError: ")
    assert "missing" in first
    assert "\x1b" not in first
    assert __file__ in frame
    assert "on_train_batch_start" in frame
    assert "MNIST_LIT_DEBUG" in rest[-1]
    assert len(rest) <= 3
    trace = (tmp_path / "run" / "error.txt").read_text()
    assert "KeyError" in trace
    assert "lightning" in trace


def test_package_offers_its_public_names_and_nothing_else() -> None:
    assert {"ConvNet", "MNISTDataModule", "main"} <= set(mnist_lit.__all__)
    assert all(hasattr(mnist_lit, name) for name in mnist_lit.__all__)
    with pytest.raises(AttributeError, match="LeNet"):
        mnist_lit.LeNet  # noqa: B018


def test_installed_command_ends_like_the_module_without_bars_in_a_log(tmp_path: Path) -> None:
    command = str(Path(sys.executable).with_name("mnist_lit"))
    finder = "--trainer.callbacks=[{class_path: LearningRateFinder, init_args: {num_training_steps: 20}}]"
    args = ["fit", *SMALL, finder, "--trainer.max_epochs=1", "--run_dir=run"]

    good = subprocess.run([command, *args], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    bad = subprocess.run([command, "fit", "--lr=1"], cwd=tmp_path, capture_output=True, timeout=120, check=False)

    assert (good.returncode, bad.returncode) == (0, 2), good.stderr
    assert good.stdout.splitlines()[-1] == "run"
    assert "it/s" not in good.stderr
