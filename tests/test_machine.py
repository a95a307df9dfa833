"""Errors of the machine: a full disk, no memory, a deleted folder, a closed terminal, a wrong clock."""

import errno
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHANCE, SMALL
from lightning.pytorch import Callback, Trainer
from runs import STEPS_PER_EPOCH, assert_as_whole, callback, curves, metrics, read, resume, signals, slow

from mnist_lit import main

NO_SPACE = os.strerror(errno.ENOSPC)


class Shell(Callback):
    """Run a command of the shell before a training batch, counted from 1."""

    def __init__(self, command: str, batch: int) -> None:
        self.command = command
        self.batch = batch

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step + 1 == self.batch:
            subprocess.run(self.command, shell=True, check=True)


def fill(leave: int = 0) -> str:
    """Return the command that fills the disk but for some bytes."""
    return f"cat /dev/zero > disk/filler 2> /dev/null; truncate -s -{leave} disk/filler"


def mount(*args: str | Path) -> None:
    mounted = subprocess.run(["mount", *args], capture_output=True, text=True, check=False)
    if mounted.returncode:  # also for root in a container
        pytest.skip(f"needs a disk of its own: {mounted.stderr}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for two small runs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=700k", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


# A disk that is full


@pytest.mark.parametrize("leave", [0, slow(5_000), 20_000, slow(60_000)])
def test_full_disk_ends_a_run_which_goes_on_when_there_is_room(
    leave: int, disk: Path, whole_run: Path, fails: Callable[..., str]
) -> None:
    full = callback("test_machine.Shell", batch=STEPS_PER_EPOCH + 3, command=fill(leave))
    error = fails("fit", *SMALL, *CHANCE, "--run_dir=disk/run", full, code=1)
    assert NO_SPACE in error
    assert "fit --ckpt_path disk/run" in error
    assert read(disk / "run", "best")["global_step"] == read(disk / "run")["global_step"] == STEPS_PER_EPOCH
    assert metrics(disk / "run")["epoch"] in (0, 1)
    (disk / "filler").unlink()
    resume(disk / "run")
    assert_as_whole(disk / "run", whole_run)


def test_run_does_not_begin_on_a_full_disk(disk: Path, fails: Callable[..., str]) -> None:
    subprocess.run(fill(), shell=True, check=True)
    assert NO_SPACE in fails("fit", *SMALL, "--run_dir=disk/run", code=1)
    assert names(disk) == {"filler"}


@pytest.mark.parametrize(
    ("command", "leave"), [(["predict"], 8192), (["test"], 0), (["export", "--output=disk/model.pt2"], 20_000)]
)
def test_full_disk_leaves_nothing_half_written(
    command: list[str], leave: int, disk: Path, whole_run: Path, fails: Callable[..., str]
) -> None:
    run_dir = shutil.copytree(whole_run, disk / "run")
    before = names(disk) | {"filler", "run/config.predict.yaml"}
    record = metrics(run_dir)
    subprocess.run(fill(leave), shell=True, check=True)
    assert NO_SPACE in fails(*command, "--ckpt_path=disk/run", "--report=false", code=1)
    assert {name for name in names(disk) if "events" not in name} <= before
    assert metrics(run_dir) == record
    (disk / "filler").unlink()
    main([*command, "--ckpt_path=disk/run", "--report=false"])


# Folders that cannot be written, or are gone


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["fit", *SMALL, "--run_dir=disk/new"], 2),
        (["fit", "--ckpt_path=disk/run"], 2),
        (["test", "--ckpt_path=disk/run"], 1),
        (["export", "--ckpt_path=disk/run", "--output=disk/model.onnx"], 2),
    ],
)
def test_read_only_disk_is_an_error_before_anything_is_computed(
    command: list[str], code: int, disk: Path, whole_run: Path, fails: Callable[..., str]
) -> None:
    shutil.copytree(whole_run, disk / "run")
    mount("-o", "remount,ro", disk)
    assert "disk" in fails(*command, code=code)


@pytest.mark.parametrize(
    ("batch", "flag"), [(STEPS_PER_EPOCH + 2, "--pictures.enabled=true"), (STEPS_PER_EPOCH, "--data.val_size=0")]
)
def test_run_directory_that_is_deleted_ends_the_run(
    batch: int, flag: str, fails: Callable[..., str], tmp_path: Path
) -> None:
    deleted = callback("test_machine.Shell", batch=batch, command="rm -r run")
    assert "run was deleted" in fails("fit", *SMALL, "--run_dir=run", flag, deleted, code=1)
    assert not (tmp_path / "run").exists()


def test_network_that_is_far_too_large(fails: Callable[..., str], tmp_path: Path) -> None:
    error = fails("fit", *SMALL, "--run_dir=run", "--model.channels=[1000000,1000000]", code=1)
    assert "out of memory" in error
    assert "data.batch_size" in error
    assert not (tmp_path / "run").exists()


# Terminals


def test_nohup_is_respected(whole_run: Path, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        main(["fit", *SMALL, *CHANCE, "--run_dir=run", signals(signum=signal.SIGHUP, batch=3)])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert_as_whole(tmp_path / "run", whole_run)


@pytest.mark.slow
def test_closed_terminal_loses_nothing(tmp_path: Path) -> None:
    flags = [*SMALL, "--trainer.max_epochs=2000", "--num_threads=1", f"--run_dir={tmp_path / 'run'}"]
    process, terminal = pty.fork()
    if not process:
        os.execv(sys.executable, [sys.executable, "-m", "mnist_lit", "fit", *flags])
    os.set_blocking(terminal, False)
    while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.01)
    before = read(tmp_path / "run")["global_step"]
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert read(tmp_path / "run")["global_step"] > before


# Clock, processors, permissions


def test_container_gets_no_more_threads_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # it counts as the quota of a container does
    torch.set_num_threads(2)
    main(["fit", *SMALL], is_dry=True)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("seconds", [0, 10**9])
def test_clock_that_was_set_back_leaves_the_curves_in_order(seconds: int, whole_run: Path, tmp_path: Path) -> None:
    main(["fit", *SMALL, *CHANCE, "--run_dir=run", "--trainer.max_epochs=1"])
    (first,) = tmp_path.glob("run/events.*")
    # As if it had been made by a clock that was later than ours, by a process with a later number.
    first.rename(tmp_path / "run" / f"events.out.tfevents.{int(time.time()) + seconds:010d}.zzz.9.0")
    resume(tmp_path / "run", "--trainer.max_epochs=2")
    assert_as_whole(tmp_path / "run", whole_run)
    assert [step for step, _ in curves(tmp_path / "run")["val/acc"]] == [9, 19]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any file")
@pytest.mark.parametrize("args", [["fit", "--config=unreadable"], ["test", "--ckpt_path=unreadable"]])
def test_file_that_may_not_be_read(args: list[str], fails: Callable[..., str]) -> None:
    Path("unreadable").touch(mode=0o000)
    error = fails(*args)
    assert "unreadable" in error
    assert os.strerror(errno.EACCES) in error
