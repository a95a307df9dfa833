"""The entry point: what is answered before torch is imported, how errors end a command, what the package offers."""

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS, SMALL, completed
from lightning.pytorch import Callback
from runs import ended

import mnist_lit
from mnist_lit import main

Capsys = pytest.CaptureFixture[str]
Fails = Callable[..., str]
MAX_FILES, MAX_FUNCTIONS = 18, 107  # more is a step back
SCRIPT = """
import json, sys, threading
from pathlib import Path
import lightning.pytorch.cli, torchvision, mnist_lit
package = str(Path(mnist_lit.__file__).parent)
functions = set()
def note(frame, event, _):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(package) and not code.co_qualname.endswith(">"):
        if code.co_flags & 1:  # optimized: a function, no body of a class or module
            functions.add((code.co_filename.removeprefix(package), code.co_qualname))
    if event == "call" and code.co_name == "optimizer_step" and "lightning" in code.co_filename:
        sys.setprofile(None)
        print("FIRST STEP", json.dumps(sorted(functions)), flush=True)
        raise SystemExit(0)
sys.setprofile(note)
mnist_lit.main(sys.argv[1:])
"""
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


@pytest.mark.parametrize("args", [["fit", "--config=x.yaml"], ["search", "--n_trails=3"], ["compare", "x", "y"]])
def test_error_of_a_process_is_short_and_comes_before_torch(args: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "mnist_lit", *args]
    done = completed(command, code=None)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    errors = [line for line in lines if not line.startswith("import time:")]
    assert (done.returncode, done.stdout) == (2, "")
    assert errors[0].startswith("error: ")
    assert len(errors) <= 2
    assert "mnist_lit.app" in imported
    assert not imported & {"torch", "torchvision", "lightning"}


def test_debug_variable_shows_the_traceback_and_is_no_key(
    shell: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: Capsys
) -> None:
    done = shell("fit", "--config", "nowhere.yaml", env={**os.environ, "MNIST_LIT_DEBUG": "1"})
    assert done.stderr.startswith("Traceback")
    monkeypatch.setenv("MNIST_LIT_DEBUG", "1")
    assert "max_epochs" in answer(capsys, ["fit", "--print_config"])


class Broken(Callback):
    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        raise KeyError("a\x1b\nmissing")


def test_mistake_in_own_code_shows_its_own_frames_and_stays_in_the_run(tmp_path: Path, capsys: Capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *SMALL, "--run_dir=run"], callbacks=[Broken()])
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert isinstance(stop.value.__cause__, KeyError)
    assert len(error.splitlines()) <= 5
    assert all(part in error for part in ("KeyError", "missing", __file__, "on_train_batch_start"))
    assert "\x1b" not in error
    assert "lightning" in (tmp_path / "run" / "error.txt").read_text()


def test_package_offers_its_public_names_and_nothing_else() -> None:
    assert {"ConvNet", "MNISTDataModule", "main"} <= set(mnist_lit.__all__)
    assert all(hasattr(mnist_lit, name) for name in mnist_lit.__all__)
    with pytest.raises(AttributeError, match="LeNet"):
        mnist_lit.LeNet  # noqa: B018


def test_installed_command_ends_like_the_module_without_bars_in_a_log(tmp_path: Path) -> None:
    command = str(Path(sys.executable).with_name("mnist_lit"))
    finder = "--trainer.callbacks=[{class_path: LearningRateFinder, init_args: {num_training_steps: 20}}]"
    args = ["fit", *SMALL, finder, "--trainer.max_epochs=1", "--run_dir=run"]
    done = completed([command, *args], cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "run"
    assert "it/s" not in done.stderr


def test_shell_completes_keys(tmp_path: Path) -> None:
    line = {"_ARGCOMPLETE": "1", "COMP_LINE": "mnist_lit fit --model.dr", "COMP_POINT": "24", "COMP_TYPE": "9"}
    code, *_ = ended(tmp_path, [], **line, _ARGCOMPLETE_STDOUT_FILENAME=str(tmp_path / "keys"))
    assert code == 0
    assert (tmp_path / "keys").read_text().split() == ["--model.dropout"]


def test_first_step_is_near(tmp_path: Path) -> None:
    args = ["fit", f"--config={CONFIGS / 'base.yaml'}", f"--config={CONFIGS / 'digits.yaml'}", "--run_dir=run"]
    run = completed([sys.executable, "-c", SCRIPT, *args], code=None, cwd=tmp_path)
    line = next((line for line in run.stdout.splitlines() if line.startswith("FIRST STEP")), "")
    assert line, run.stderr
    functions = [tuple(function) for function in json.loads(line.removeprefix("FIRST STEP"))]
    files = {file for file, _ in functions}
    assert len(files) <= MAX_FILES, sorted(files)
    assert len(functions) <= MAX_FUNCTIONS, (len(functions), functions)
