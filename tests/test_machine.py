"""What becomes of a command when the machine refuses: a full disk, no memory, a lost folder, a closed terminal."""

import errno
import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL
from lightning.pytorch import Callback
from optuna.trial import TrialState
from test_datasets import FILES, LABELS, Mirror, mirror, zipped
from test_runs import (
    CHANCE,
    STEPS_PER_EPOCH,
    assert_as_whole,
    curves,
    learned,
    metrics,
    read,
    resume,
    rows,
    signals,
    stop,
)
from test_search import search, trials

from mnist_lit import main
from mnist_lit.data.datasets import prepare
from mnist_lit.errors import MNISTLitError

__all__ = ["mirror", "zipped"]

NO_SPACE = os.strerror(errno.ENOSPC)
GIGABYTE = 2**30


class Fill(Callback):
    """Fill the disk `disk` in the middle of a run, but for some bytes."""

    def __init__(self, leave: int) -> None:
        self.leave = leave
        self.num_batches = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.num_batches += 1
        if self.num_batches == STEPS_PER_EPOCH + 3:
            fill(Path("disk"), self.leave)


class Delete(Callback):
    """Delete a folder in the middle of a run."""

    def __init__(self, folder: str, batch: int) -> None:
        self.folder = folder
        self.batch = batch
        self.num_batches = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.num_batches += 1
        if self.num_batches == self.batch:
            shutil.rmtree(self.folder)


def callback(name: str, **init_args: Any) -> str:
    return "--trainer.callbacks=" + json.dumps([{"class_path": f"test_machine.{name}", "init_args": init_args}])


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def fill(disk: Path, leave: int = 0) -> None:
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    (disk / "filler").write_bytes(bytes(max(free - leave, 0)))


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has stopped."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    main(["fit", *SMALL, *CHANCE, f"--run_dir={run_dir}"])
    return run_dir


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


# A disk that is full


@pytest.mark.parametrize("leave", [0, slow(5_000), 20_000, slow(60_000)])
def test_full_disk_ends_a_run_which_goes_on_when_there_is_room(
    leave: int, disk: Path, whole: Path, fails: Callable[..., str]
) -> None:
    error = fails("fit", *SMALL, *CHANCE, "--run_dir=disk/run", callback("Fill", leave=leave), code=1)

    assert NO_SPACE in error
    assert "make room" in error
    assert "fit --ckpt_path disk/run" in error
    assert read(disk / "run", "best")["global_step"] == read(disk / "run")["global_step"] == STEPS_PER_EPOCH
    assert metrics(disk / "run")["epoch"] in (0, 1)
    (disk / "filler").unlink()
    resume(disk / "run")
    assert_as_whole(disk / "run", whole)
    assert rows(disk / "run") == rows(whole)


def test_run_does_not_begin_on_a_full_disk(disk: Path, fails: Callable[..., str]) -> None:
    fill(disk)

    assert NO_SPACE in fails("fit", *SMALL, "--run_dir=disk/run", code=1)

    assert names(disk) == {"filler"}


@pytest.mark.parametrize(
    ("command", "leave"),
    [
        (["predict"], 8192),
        (["test"], 0),
        (["validate"], 0),
        slow(["export", "--output=disk/model.onnx"], 20_000),
        (["export", "--output=disk/model.pt2"], 20_000),
    ],
    ids=lambda value: "".join(value[-1:]) if isinstance(value, list) else "",
)
def test_full_disk_leaves_nothing_half_written(
    command: list[str], leave: int, disk: Path, whole: Path, fails: Callable[..., str]
) -> None:
    run_dir = shutil.copytree(whole, disk / "run")
    before = names(disk) | {"filler", "run/config.predict.yaml"}
    record = metrics(run_dir)
    fill(disk, leave)

    error = fails(*command, "--ckpt_path=disk/run", "--report=false", code=1)

    assert NO_SPACE in error
    assert {name for name in names(disk) if "events" not in name} <= before
    assert metrics(run_dir) == record
    (disk / "filler").unlink()
    main([*command, "--ckpt_path=disk/run", "--report=false"])


@pytest.mark.parametrize("leave", [slow(10_000), 30_000, slow(150_000), slow(300_000)])
def test_full_disk_ends_a_search_which_goes_on_when_there_is_room(
    leave: int, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(disk)
    fill(disk, leave)

    ended = search(n_trials=4)

    assert ended.code == 1
    assert NO_SPACE in ended.errors
    assert "Traceback" not in ended.errors
    (disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
    assert search(n_trials=4).code == 0
    assert [trial.state for trial in trials()].count(TrialState.COMPLETE) == 4
    yaml.safe_load((disk / "logs" / "search" / "s" / "best.yaml").read_text())


def test_full_disk_is_no_fault_of_a_mirror(disk: Path, mnist_dir: Path, mirror: Mirror) -> None:
    raw = disk / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in set(FILES) - {LABELS}:
        (raw / name).symlink_to(mnist_dir / "MNIST" / "raw" / name)
    arguments: dict[str, Any] = {"mirrors": [mirror.url("good")] * 2, "download": True, "timeout": 30}
    fill(disk)

    with pytest.raises(MNISTLitError, match=NO_SPACE):
        prepare("mnist", disk, **arguments)

    assert len(mirror.requests) == 1
    assert {file.name for file in raw.iterdir()} - {".lock"} == set(FILES) - {LABELS}
    (disk / "filler").unlink()
    prepare("mnist", disk, **arguments)


# Folders that cannot be written, or are gone


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["fit", *SMALL, "--run_dir=disk/new"], 2),
        (["fit", "--ckpt_path=disk/run"], 2),
        (["test", "--ckpt_path=disk/run"], 1),
        (["export", "--ckpt_path=disk/run", "--output=disk/model.onnx"], 2),
    ],
    ids=["new", "goes on", "test", "export"],
)
def test_read_only_disk_is_said_before_anything_is_computed(
    command: list[str], code: int, disk: Path, whole: Path, fails: Callable[..., str]
) -> None:
    shutil.copytree(whole, disk / "run")
    mount("-o", "remount,ro", disk)

    error = fails(*command, code=code)

    assert os.strerror(errno.EROFS) in error or "no folder to write to" in error
    assert "give another" in error


@pytest.mark.parametrize(
    ("batch", "flag"),
    [
        (2, "--pictures.enabled=true"),
        (STEPS_PER_EPOCH + 2, "--pictures.enabled=true"),
        (STEPS_PER_EPOCH, "--data.val_size=0"),
        slow(2, "--csv=true"),
        slow(STEPS_PER_EPOCH, "--csv=true"),
    ],
)
def test_run_directory_that_is_deleted_ends_the_run(
    batch: int, flag: str, fails: Callable[..., str], tmp_path: Path
) -> None:
    error = fails("fit", *SMALL, "--run_dir=run", flag, callback("Delete", folder="run", batch=batch), code=1)

    assert "run is gone, and with it what was done" in error
    assert not (tmp_path / "run").exists()


def test_data_that_is_deleted_is_missed_only_where_it_is_needed(
    mnist_dir: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "data" / "MNIST" / "raw").mkdir(parents=True)
    for file in (mnist_dir / "MNIST" / "raw").iterdir():
        (tmp_path / "data" / "MNIST" / "raw" / file.name).symlink_to(file)
    flags = ["--data.dataset=mnist", "--data.data_dir=data", "--data.download=false", "--trainer.limit_train_batches=4"]
    lost = callback("Delete", folder="data", batch=6)

    error = fails("fit", *SMALL, *flags, "--test_after_fit=true", "--run_dir=run", lost, code=1)

    assert "mnist: missing or damaged in data/MNIST/raw: t10k" in error
    assert read(tmp_path / "run")["global_step"] == 8
    assert read(tmp_path / "run", "best")["epoch"] == metrics(tmp_path / "run")["epoch"]


# Memory


@pytest.mark.parametrize("flag", ["--model.channels=[1000000,1000000]", "--data.image_size=3000000"])
def test_network_that_is_far_too_large(flag: str, fails: Callable[..., str], tmp_path: Path) -> None:
    error = fails("fit", *SMALL, "--run_dir=run", flag, code=1)

    assert error.startswith("error: out of memory\nmake data.batch_size")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_batch_that_is_far_too_large(shell: Callable[..., Any]) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 * GIGABYTE, 6 * GIGABYTE))

    done = shell("fit", *SMALL, "--data.batch_size=1000", "--data.image_size=1000", "--run_dir=run", preexec_fn=limit)

    assert done.returncode == 1
    assert done.stderr.startswith("error: out of memory\nmake data.batch_size")
    assert len(done.stderr.splitlines()) == 2
    assert not Path("run").exists()


# Outputs and terminals


@pytest.mark.parametrize("is_buffered", [True, False])
@pytest.mark.parametrize("command", [["--help"], ["compare", "whole", "copy"], slow(["test", "--ckpt_path=whole"])])
def test_reader_that_has_had_enough_is_no_error(
    command: list[str], is_buffered: bool, whole: Path, tmp_path: Path
) -> None:
    for name in ("whole", "copy"):
        shutil.copytree(whole, tmp_path / name)
    reader, output = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if is_buffered else "1"}
    arguments = [sys.executable, "-m", "mnist_lit", *command]
    done = subprocess.run(arguments, stdout=output, stderr=subprocess.PIPE, env=environment, timeout=120, check=False)
    os.close(output)

    assert done.stderr == b""
    assert done.returncode == 128 + signal.SIGPIPE


def test_outputs_that_are_closed_or_full(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    command = f"{sys.executable} -m mnist_lit compare {whole} copy"

    full = subprocess.run(["sh", "-c", f"{command} > /dev/full"], capture_output=True, text=True, check=False)
    closed = subprocess.run(["sh", "-c", f"{command} >&- 2>&-"], check=False)

    assert (full.returncode, full.stderr.startswith("error: ")) == (1, True)
    assert NO_SPACE in full.stderr
    assert closed.returncode == 0


@pytest.mark.parametrize("batch", [1, STEPS_PER_EPOCH + 3])
def test_run_whose_terminal_is_gone_goes_on_as_if_it_had_not_been(batch: int, whole: Path, tmp_path: Path) -> None:
    code = stop("fit", *SMALL, *CHANCE, "--run_dir=run", signals(signum=signal.SIGHUP, batch=batch))
    assert code == 128 + signal.SIGHUP
    assert read(tmp_path / "run")["global_step"] == batch

    resume(tmp_path / "run")

    assert_as_whole(tmp_path / "run", whole)


def test_nohup_is_meant(whole: Path, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        main(["fit", *SMALL, *CHANCE, "--run_dir=run", signals(signum=signal.SIGHUP, batch=3)])
    finally:
        signal.signal(signal.SIGHUP, before)

    assert_as_whole(tmp_path / "run", whole)


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


# The clock


@pytest.mark.parametrize("seconds", [0, 3600, 10**9])
def test_clock_that_was_set_back_leaves_the_curves_in_order(seconds: int, whole: Path, tmp_path: Path) -> None:
    main(["fit", *SMALL, *CHANCE, "--run_dir=run", "--trainer.max_epochs=1"])
    (first,) = tmp_path.glob("run/events.*")
    # As if it had been made by a clock that was later than ours, by a process with a later number.
    first.rename(tmp_path / "run" / f"events.out.tfevents.{int(time.time()) + seconds:010d}.zzz.9.0")

    resume(tmp_path / "run", "--trainer.max_epochs=2")

    assert_as_whole(tmp_path / "run", whole)
    assert learned(tmp_path / "run")["epoch"] == 1
    assert [step for step, _ in curves(tmp_path / "run")["val/acc"]] == [9, 19]


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["fit", "--config=unreadable"], 2),
        (["test", "--ckpt_path=unreadable"], 2),
        (["predict", "--ckpt_path={whole}", "--run_dir=run", "--data.predict_paths=unreadable"], 1),
    ],
)
def test_file_that_may_not_be_read(args: list[str], code: int, whole: Path) -> None:
    Path("unreadable").touch(mode=0o000)
    powers = "-dac_override,-dac_read_search"  # with which root reads it all the same
    as_anyone = ["setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}"] if os.geteuid() == 0 else []
    if as_anyone and not (
        shutil.which("setpriv") and subprocess.run([*as_anyone, "true"], check=False).returncode == 0
    ):
        pytest.skip("root cannot give up its powers here")
    command = [*as_anyone, sys.executable, "-m", "mnist_lit", *(arg.format(whole=whole) for arg in args)]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == code, done.stderr
    assert "unreadable" in done.stderr
    assert "Permission denied" in done.stderr
    assert len(done.stderr.splitlines()) <= 5
