"""Helpers for runs on several processes: commands with all their processes, and trouble in one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from conftest import PROJECT
from lightning.pytorch import Callback, Trainer
from runs import read

from mnist_lit import main

DDP = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.precision=32-true", "--num_threads=1"]
ALONE = ["--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto", "--trainer.callbacks=null"]
FOREVER = "--trainer.max_epochs=5000"


class Trouble(Callback):
    """Make trouble, `raise`, `sleep` or a signal, in the process of a rank before a batch, counted from 1."""

    def __init__(self, rank: int, batch: int, kind: str) -> None:
        self.moment = (rank, batch)
        self.kind = kind

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self.moment != (trainer.global_rank, trainer.global_step + 1):
            return
        if self.kind == "raise":
            raise LookupError("trouble")
        if self.kind == "sleep":
            time.sleep(600)
        os.kill(os.getpid(), getattr(signal, self.kind))


def trouble(*troubles: tuple[int, int, str]) -> str:
    names = ("rank", "batch", "kind")
    arguments = [dict(zip(names, values, strict=True)) for values in troubles]
    callbacks = [{"class_path": "launch.Trouble", "init_args": each} for each in arguments]
    return f"--trainer.callbacks={json.dumps(callbacks)}"


class Command:
    """A command, of what follows `python`, with all processes that come of it."""

    def __init__(self, args: Sequence[str], environment: Mapping[str, str]) -> None:
        path = os.pathsep.join(map(str, [PROJECT, PROJECT / "tests"]))
        # All of its processes have it in their environment; torchrun gives each a session of its own.
        self.mark = f"COMMAND={uuid4().hex}"
        marked = dict([self.mark.split("=")])
        self.process = subprocess.Popen(
            [sys.executable, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment, **marked},
        )

    def alive(self) -> list[int]:
        """List all of its processes."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self.mark in (folder / "environ").read_text().split("\0"):  # a zombie has none
                    found.append(int(folder.name))
        return found

    def end(self, seconds: float = 240) -> tuple[int, str, str]:
        """Return exit code, output and errors; none of its processes may be left soon after."""
        output, errors = self.process.communicate(timeout=seconds)
        deadline = time.monotonic() + 30
        while self.alive():
            assert time.monotonic() < deadline, "processes are left"
            time.sleep(0.05)
        return self.process.returncode, output, errors

    def kill(self) -> str:
        """Kill all of its processes and return what was written to standard error."""
        for pid in self.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return self.process.communicate()[1]


def last(run_dir: str = "run") -> Path:
    return Path(run_dir, "checkpoints", "last.ckpt")


def wait_for(file: Path, command: Command) -> None:
    deadline = time.monotonic() + 240
    while not file.exists():
        assert command.process.poll() is None, command.end()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_goes_on(errors: str = "") -> None:
    """Go on with `run` on one process, by the command that an error names if there is one."""
    advice = (errors.partition("go on with: python -m mnist_lit ")[2] or "fit --ckpt_path run").splitlines()[0]
    num_steps, epochs = read(Path("run"))["global_step"], read(Path("run"))["epoch"] + 2
    cli = main([*advice.split(), *ALONE, f"--trainer.max_epochs={epochs}"])
    assert cli.trainer.global_step > num_steps
    assert cli.run_dir.resolve() == Path("run").resolve()
