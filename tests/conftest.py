"""What all tests share: a working directory of their own, small runs through the one door, real MNIST where it is."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The processes of the tests share the cores: each, and each that it starts, computes with one thread.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # only a CPU repeats runs to the last bit

import pytest
import torch
from lightning.pytorch import Callback, Trainer

import mnist_lit.search.worker  # noqa: F401  # sets a list of its own, which PRELOADED replaces
from mnist_lit import MNISTDataModule, main

PROJECT = Path(__file__).parents[1]
CONFIGS = PROJECT / "configs"
MNIST_DIR = Path(os.environ.get("MNIST_LIT_DATA", PROJECT.parent / "shared" / "data"))

# The smallest run that is still a run: the embedded digits, one small stage, two epochs, no pictures and no page.
SMALL = [
    "--data.dataset=digits",
    "--data.val_size=200",
    "--data.batch_size=128",
    "--model.channels=[4]",
    "--model.lr=0.01",
    "--trainer.max_epochs=2",
    "--pictures.enabled=false",
    "--report=false",
]
CHANCE = ["--model.dropout=0.3", "--data.augment.rotation=10", "--data.augment.translation=0.1", "--csv=true"]
# With these its last epoch is the worst on any hardware: the learning rate grows until nothing is left of the weights.
WORSE = [
    "--model.optimizer=SGD",
    "--model.lr=0.05",
    "--model.schedule=ExponentialLR",
    "--model.schedule.gamma=1.3",
    "--trainer.max_epochs=3",
]

# Other processes are forked from a server that has imported what takes time: torch, and the digits with pandas.
PRELOADED = ["mnist_lit.commands", "mnist_lit.search.pruning", "sklearn.datasets"]
multiprocessing.set_forkserver_preload(PRELOADED)


@pytest.fixture(scope="session", autouse=True)
def _untouched() -> None:
    """What starts the tests has no influence, not even on runs that tests share, which are made before `_isolated`."""
    for variable in list(os.environ):
        if variable.startswith(("MNIST_LIT_", "PL_")):
            del os.environ[variable]
    # Tests send signals to themselves; a shell's job in the background is made deaf to Ctrl-C, by nohup to SIGHUP.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test has a folder of its own, and leaves one thread to the next."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mnist_lit"])
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """The folder that holds the real `MNIST/raw`."""
    if not (MNIST_DIR / "MNIST" / "raw").is_dir():
        if os.environ.get("CI"):
            pytest.fail("CI has real MNIST; set MNIST_LIT_DATA to its folder")
        pytest.skip("needs real MNIST; set MNIST_LIT_DATA to its folder")
    return MNIST_DIR


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small run of one epoch; tests that change it take a copy."""
    run_dir = tmp_path_factory.mktemp("small") / "run"
    main(["fit", *SMALL, "--trainer.max_epochs=1", f"--run_dir={run_dir}"])
    return run_dir


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small run with chance in it, that nothing has stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    main(["fit", *SMALL, *CHANCE, f"--run_dir={run_dir}"])
    return run_dir


@pytest.fixture(scope="session")
def checkpoint(small_run: Path) -> dict[str, Any]:
    """What a good checkpoint holds."""
    content: dict[str, Any] = torch.load(small_run / "checkpoints" / "last.ckpt", weights_only=True)
    return content


@pytest.fixture
def fit() -> Callable[..., Any]:
    """`fit(*flags)`: a small run in this process; the command line's result."""
    return lambda *flags: main(["fit", *SMALL, *flags])


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`fails(*args, code=2)`: a command that must end with that exit code; its short error without a traceback."""

    def run(*args: str, code: int = 2) -> str:
        with pytest.raises(SystemExit) as stop:
            main(list(args))
        error = capsys.readouterr().err
        assert stop.value.code == code, error
        assert error.startswith("error: ")
        assert len(error.splitlines()) <= 5, error
        return error

    return run


@pytest.fixture
def shell() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """`shell(*args)`: `python -m mnist_lit *args` as a process of its own."""

    return lambda *args, **kwargs: completed([sys.executable, "-m", "mnist_lit", *args], code=None, **kwargs)


@pytest.fixture
def processes() -> Iterator[list["subprocess.Popen[Any]"]]:
    """Processes in this list end with the test."""
    processes: list[subprocess.Popen[Any]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def completed(command: Any, code: int | None = 0, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
    """Run a program, which must end with that exit code; None for any."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **kwargs)
    assert code in (None, done.returncode), done.stderr
    return done


def digits(**kwargs: Any) -> MNISTDataModule:
    """The embedded digits, for use from Python."""
    return MNISTDataModule(dataset="digits", **{"val_size": 200, **kwargs})


def trainer(*callbacks: Callback, **kwargs: Any) -> Trainer:
    """A plain Trainer of one epoch that leaves nothing behind."""
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **kwargs})
