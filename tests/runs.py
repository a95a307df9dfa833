"""Helpers for tests of run directories: signals at a known moment, processes, and comparison to the last bit."""

import csv
import importlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist_lit import main

# 1,238 training images make 10 steps in each of the two epochs of a small run.
STEPS_PER_EPOCH = 10
LEARNED = {"state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "val_acc_best"}
LEARNED |= {"current_model_state", "averaging_state"}
CHILDREN = get_context("forkserver")  # see PRELOADED


class Signals(Callback):
    """Send a signal to the own process in a part of the run, when as many training batches have begun."""

    def __init__(self, signum: int, batch: int, during: str = "training", times: int = 1) -> None:
        self.moment = (during, batch)
        self.signum = signum
        self.times = times
        self.num_batches = 0

    def on_fit_start(self, *args: Any) -> None:
        self._send("preparation")

    def on_train_batch_start(self, *args: Any) -> None:
        self.num_batches += 1
        self._send("training")

    def on_validation_batch_start(self, *args: Any) -> None:
        self._send("validation")

    def on_train_epoch_end(self, *args: Any) -> None:
        self._send("end of epoch")

    def on_test_batch_start(self, *args: Any) -> None:
        self._send("test")

    def _send(self, during: str) -> None:
        if (during, self.num_batches) == self.moment:
            for _ in range(self.times):
                os.kill(os.getpid(), self.signum)


class Failing(Callback):
    """Fail at the first batch."""

    def on_train_batch_start(self, *args: Any) -> None:
        raise LookupError("failing")


def callback(class_path: str, **init_args: Any) -> str:
    return "--trainer.callbacks=" + json.dumps([{"class_path": class_path, "init_args": init_args}])


def signals(**init_args: Any) -> str:
    return callback("runs.Signals", **init_args)


def slow(*values: Any) -> Any:
    """Mark one case of a test as slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def stop(*args: str) -> int:
    """Run a command that ends by itself with an exit code."""
    with pytest.raises(SystemExit) as stopped:
        main(list(args))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def resume(run_dir: Path, *flags: str) -> Any:
    return main(["fit", f"--ckpt_path={run_dir}", "--trainer.callbacks=null", *flags])


def child(*args: str) -> BaseProcess:
    """Start a command in a process of its own."""
    process = CHILDREN.Process(target=_in_child, args=(list(args),))
    process.start()
    return process


def begun(folder: Path, args: list[str], **variables: str) -> BaseProcess:
    """Start a command in a process and a folder of its own."""
    for number in (1, 2):
        folder.with_name(f"{folder.name}.{number}").touch()
    process = CHILDREN.Process(target=_in_child, args=(args, folder, variables))
    process.start()
    return process


def printed(folder: Path) -> tuple[str, str]:
    """The output and the errors of a command that was begun in a folder."""
    output, errors = (folder.with_name(f"{folder.name}.{number}").read_text() for number in (1, 2))
    return output, errors


def ended(folder: Path, args: list[str], **variables: str) -> tuple[int | None, str, str]:
    """The exit code, output and errors of a command in a process and a folder of its own."""
    process = begun(folder, args, **variables)
    process.join(300)
    return (process.exitcode, *printed(folder))


def _in_child(args: list[str], folder: Path | None = None, variables: Mapping[str, str] | None = None) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(variables or {})
    if folder is not None:
        os.chdir(folder)
        for number in (1, 2):  # also what libraries write there that are not Python
            os.dup2(os.open(folder.with_name(f"{folder.name}.{number}"), os.O_WRONLY), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = ["mnist_lit", *args]
    importlib.import_module("mnist_lit.__main__").command()  # imported here: runpy warns of a module that is already


def read(run_dir: Path, name: str = "last") -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return checkpoint


def saved(run_dir: Path) -> int:
    """Return the time at which the last checkpoint was written, 0 while there is none."""
    file = run_dir / "checkpoints" / "last.ckpt"
    return file.stat().st_mtime_ns if file.exists() else 0


def learned(run_dir: Path, name: str = "last") -> dict[str, Any]:
    """Return all that training has changed, without paths and seconds."""
    return {key: value for key, value in read(run_dir, name).items() if key in LEARNED}


def metrics(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "metrics.json").read_text())
    return content


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def rows(run_dir: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    with (run_dir / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(run_dir: Path) -> set[str]:
    names = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    return {"events" if name.startswith("events.out.tfevents.") else name for name in names}


def assert_same(actual: Any, expected: Any, key: str = "") -> None:
    """Check that two nested values are equal to the last bit."""
    assert type(actual) is type(expected), key
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), key
        for name, value in expected.items():
            assert_same(actual[name], value, f"{key}.{name}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), key
        for index, value in enumerate(expected):
            assert_same(actual[index], value, f"{key}.{index}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), key
    else:
        assert actual == expected, key


def assert_as_whole(run_dir: Path, whole: Path) -> None:
    """Check that a run ended as one that nothing has stopped: weights, curves and metrics."""
    assert_same(learned(run_dir), learned(whole))
    assert curves(run_dir) == curves(whole)
    timing = {"seconds", "images_per_second"}
    assert {key: value for key, value in metrics(run_dir).items() if key not in timing} == {
        key: value for key, value in metrics(whole).items() if key not in timing
    }
    if (whole / "metrics.csv").exists():
        assert rows(run_dir) == rows(whole)
