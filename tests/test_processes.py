"""Runs on several processes: one result, one directory, one message, and nobody waits for ever for one who is gone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from conftest import PROJECT, SMALL
from lightning.pytorch import Callback, Trainer
from test_runs import assert_same, learned, read

from mnist_lit import main

DDP = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.precision=32-true", "--num_threads=1"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
FOREVER = "--trainer.max_epochs=5000"
EVALUATED = ("val/acc", "val/f1", "val/loss")


class Trouble(Callback):
    """Makes trouble in one of the processes before a batch, counted from 1."""

    def __init__(self, rank: int, batch: int, kind: str) -> None:
        self.rank = rank
        self.batch = batch
        self.kind = kind
        self.num_batches = 0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.num_batches += 1
        if (trainer.global_rank, self.num_batches) != (self.rank, self.batch):
            return
        if self.kind == "raise":
            raise LookupError("this process has had enough")
        if self.kind == "sleep":
            time.sleep(600)
        os.kill(os.getpid(), getattr(signal, self.kind))


def trouble(*those: tuple[int, int, str]) -> str:
    names = ("rank", "batch", "kind")
    callbacks = [
        {"class_path": "test_processes.Trouble", "init_args": dict(zip(names, one, strict=True))} for one in those
    ]
    return f"--trainer.callbacks={json.dumps(callbacks)}"


class Command:
    """A command with all processes that come of it.

    Args:
        args: What follows `python`.
        environment: Environment variables beside those of this process.
        prefix: What stands before the command line, to start it in another place.
    """

    def __init__(self, args: Sequence[str], environment: Mapping[str, str], prefix: Sequence[str] = ()) -> None:
        path = os.pathsep.join(map(str, [PROJECT, PROJECT / "tests"]))
        # All of its processes have it in their environment; torchrun gives each a session of its own.
        self.mark = f"COMMAND={uuid4().hex}"
        marked = dict([self.mark.split("=")])
        self.process = subprocess.Popen(
            [*prefix, sys.executable, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment, **marked},
        )

    def alive(self) -> list[int]:
        """All of its processes."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if self.mark in (folder / "environ").read_text().split("\0"):  # a zombie has none
                    found.append(int(folder.name))
        return found

    def ranks(self) -> dict[int, int]:
        """The processes of the run by their local ranks."""
        found = {}
        for pid in self.alive():
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
                if command[1:3] in (["-m", "mnist_lit"], ["-u", "-m"]):
                    rank = next((name for name in variables if name.startswith("LOCAL_RANK=")), "LOCAL_RANK=0")
                    found[int(rank.partition("=")[2])] = pid
        return found

    def end(self, seconds: float = 120) -> tuple[int, str, str]:
        """Exit code, output and errors; nothing may be left of it soon after."""
        output, errors = self.process.communicate(timeout=seconds)
        deadline = time.monotonic() + 30
        while self.alive():
            assert time.monotonic() < deadline, "processes are left"
            time.sleep(0.05)
        return self.process.returncode, output, errors

    def kill(self) -> str:
        """End all of its processes at once; what they have said of errors."""
        for pid in self.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return self.process.communicate()[1]


@pytest.fixture
def run() -> Iterator[Callable[..., Command]]:
    """`run(*args)`: a small fit on two processes in the background; `python=` for another launcher."""
    commands: list[Command] = []

    def start(*args: str, python: Sequence[str] = (), **environment: str) -> Command:
        flags = [*SMALL, *DDP, "--trainer.devices=2", "--run_dir=run", *args]
        commands.append(Command([*python, "-m", "mnist_lit", "fit", *flags], environment))
        return commands[-1]

    yield start
    for command in commands:
        command.kill()


def wait_for(file: Path, command: Command) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert command.process.poll() is None, command.end()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def last(run_dir: str = "run") -> Path:
    return Path(run_dir, "checkpoints", "last.ckpt")


def assert_goes_on(errors: str) -> None:
    """What the message advises works, on one process."""
    advice = errors.partition("go on with: python -m mnist_lit ")[2].splitlines()[0].split()
    num_steps = read(Path("run"))["global_step"]
    epochs = read(Path("run"))["epoch"] + 2
    cli = main(
        [
            *advice,
            "--trainer.devices=1",
            "--trainer.num_nodes=1",
            "--trainer.strategy=auto",
            f"--trainer.max_epochs={epochs}",
            "--trainer.callbacks=null",
        ]
    )
    assert cli.trainer.global_step > num_steps
    assert cli.run_dir.resolve() == Path("run").resolve()


# One result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    main(["fit", *SMALL, f"--run_dir={run_dir}", "--trainer.precision=32-true"])
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("num_images", [1, 2, 3, 7, 101, 1_001])
def test_metrics_are_those_of_one_process_for_any_number_of_images(
    num_images: int, num_processes: int, trained: Path, shell: Callable[..., Any]
) -> None:
    args = ["validate", f"--ckpt_path={trained}", f"--data.val_size={num_images}", "--data.eval_batch_size=5"]
    args += ["--report=false", "--pictures.enabled=true", "--run_dir"]
    alone = main([*args, "alone", "--trainer.devices=1"]).trainer.callback_metrics
    done = shell(*args, "together", *DDP, f"--trainer.devices={num_processes}")
    assert done.returncode == 0, done.stderr
    together = json.loads(Path("together/metrics.json").read_text())
    assert together["val/acc"] == float(alone["val/acc"])
    assert together["val/f1"] == pytest.approx(float(alone["val/f1"]), abs=1e-6)
    assert together["val/loss"] == pytest.approx(float(alone["val/loss"]), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 3])
def test_run_of_several_processes_leaves_what_a_run_leaves(num_processes: int, run: Callable[..., Command]) -> None:
    flags = [f"--trainer.devices={num_processes}", "--csv=true", "--pictures.enabled=true", "--report=true"]
    code, output, errors = run(*flags, "--data.val_size=7", "--test_after_fit=true").end()
    assert (code, errors) == (0, "")
    assert output.splitlines()[-1] == "run"
    files = [path.relative_to("run") for path in Path("run").rglob("*") if path.is_file()]
    writers = {path.name.split(".")[-2] for path in files if path.name.startswith("events")}
    assert len(writers) == 1
    names = {str(path) for path in files if not path.name.startswith("events")}
    assert {"config.yaml", "metrics.json", "metrics.csv", "report.html"} <= names
    assert not [name for name in names if "-v" in name or Path(name).name.startswith(".")]
    assert [path.name for path in Path().iterdir()] == ["run"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("rank", [0, 1])
def test_stopped_run_goes_on_as_if_it_had_not_been(kind: str, rank: int, run: Callable[..., Command]) -> None:
    """Whichever of two processes gets the signal, all stop after the same batch."""
    if (kind, rank) == ("SIGINT", 1):
        pytest.skip("a terminal's Ctrl-C comes to all; the first process obeys")
    assert run("--run_dir=whole").end()[0] == 0
    code, _, errors = run(trouble((rank, 7, kind))).end()
    assert code == 128 + getattr(signal, kind)
    assert errors.startswith(f"stopped by {kind}\nwhat was done is kept; go on with: ")
    assert len(errors.splitlines()) == 2
    assert read(Path("run"))["global_step"] % 5, "in the middle of an epoch"
    args = ["--ckpt_path=run", *DDP, "--trainer.devices=2", "--trainer.callbacks=null"]
    go_on = Command(["-m", "mnist_lit", "fit", *args], {})
    assert go_on.end()[0] == 0
    assert_same(learned(Path("run")), learned(Path("whole")))


# One of them is gone


def test_killed_process_ends_the_run_by_name(run: Callable[..., Command]) -> None:
    command = run(FOREVER, trouble((1, 8, "SIGKILL")))
    code, _, errors = command.end(60)
    assert code == 1
    assert errors.splitlines() == [
        "error: process 1 of 2 was ended by SIGKILL",
        "what was done is kept; go on with: python -m mnist_lit fit --ckpt_path run",
    ]
    assert_goes_on(errors)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_processes", "rank"), [(2, 0), (2, 1), (3, 0), (3, 2)])
def test_process_that_is_killed_at_any_moment_ends_the_others(
    num_processes: int, rank: int, seed: int, run: Callable[..., Command]
) -> None:
    command = run(FOREVER, f"--trainer.devices={num_processes}")
    wait_for(last(), command)
    time.sleep(random.Random(seed).uniform(0, 3))
    os.kill(command.ranks()[rank], signal.SIGKILL)
    start = time.monotonic()
    code, _, errors = command.end(60)
    assert time.monotonic() - start < 60
    assert code == (1 if rank else -signal.SIGKILL)
    how = "was ended by SIGKILL" if rank else "is gone"
    assert errors.startswith(f"error: process {rank} of {num_processes} {how}\nwhat was done is kept; ")
    assert_goes_on(errors)


@pytest.mark.slow
def test_process_that_waits_for_one_that_is_gone_is_ended(run: Callable[..., Command]) -> None:
    """As in an exchange between GPUs, which waits for ever: the first process does not notice by itself."""
    start = time.monotonic()
    code, _, errors = run(trouble((0, 8, "sleep"), (1, 8, "SIGKILL"))).end(120)
    assert time.monotonic() - start < 90
    assert (code, errors) == (1, "error: process 1 of 2 was ended by SIGKILL\n")
    assert read(Path("run"))["global_step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_process_that_fails_alone_says_why(rank: int, run: Callable[..., Command]) -> None:
    code, _, errors = run(FOREVER, trouble((rank, 8, "raise"))).end(60)
    assert code == 1
    assert "error: LookupError: this process has had enough\n" in errors
    assert ("error: process 1 of 2 has failed with exit code 1\n" in errors) == bool(rank)
    assert_goes_on(errors)


# Other launchers


@pytest.mark.slow
def test_torchrun_trains_as_two_processes_do(run: Callable[..., Command]) -> None:
    assert run("--run_dir=ours").end()[0] == 0
    code, output, _ = run(python=TORCHRUN).end()
    assert code == 0
    assert output.splitlines()[-1] == "run"
    assert_same(learned(Path("run")), learned(Path("ours")))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_process_of_torchrun_that_is_killed_ends_the_other(rank: int, run: Callable[..., Command]) -> None:
    command = run(FOREVER, trouble((rank, 8, "SIGKILL")), python=TORCHRUN)
    start = time.monotonic()
    code, _, errors = command.end(60)
    assert time.monotonic() - start < 60
    assert code == 1
    assert f"rank      : {rank} (local_rank: {rank})" in errors  # what torchrun itself says
    assert "Signal 9 (SIGKILL)" in errors
    torch.load(last(), weights_only=True)


@pytest.fixture
def slurm(run: Callable[..., Command]) -> Callable[..., list[Command]]:
    """`slurm(*args)`: two processes with the variables that `srun --ntasks 2` gives them; SLURM itself is not there."""

    def start(*args: str) -> list[Command]:
        job = {
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": "mnist",
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_NNODES": "1",
            "SLURM_NODELIST": "127.0.0.1",
            "SLURM_NODEID": "0",
        }
        ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
        return [run(*args, **job, **rank) for rank in ranks]

    return start


@pytest.mark.slow
def test_variables_of_slurm_make_one_run_of_two_processes(
    slurm: Callable[..., list[Command]], run: Callable[..., Command]
) -> None:
    assert run("--run_dir=ours").end()[0] == 0
    first, second = [command.end() for command in slurm()]
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert first[1].splitlines()[-1] == "run"
    assert second[1:] == ("", "")
    assert_same(learned(Path("run")), learned(Path("ours")))


@pytest.mark.slow
def test_task_of_slurm_that_is_killed_ends_the_other(slurm: Callable[..., list[Command]]) -> None:
    first, second = slurm(FOREVER, trouble((1, 8, "SIGKILL")))
    assert second.end()[0] == -signal.SIGKILL
    code, _, errors = first.end(60)
    assert code == 1
    assert errors.startswith("error: another of the 2 processes is gone or silent: RuntimeError: ")
    assert_goes_on(errors)
