"""Runs on several processes: one result, one directory, and an end for all when one of them is gone."""

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL
from launch import DDP, FOREVER, Command, assert_goes_on, last, trouble, wait_for
from runs import assert_same, curves, learned, read, slow

from mnist_lit import main

TORCHRUN = ["-m", "torch.distributed.run"]
SLURM = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "mnist", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
SLURM |= {"SLURM_NNODES": "1", "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0"}
SECONDS = 60  # in which a run ends when one of its processes is gone; Lightning looks every 5 seconds


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


# One result


@pytest.mark.parametrize(("num_processes", "num_images"), [slow(2, 7), slow(2, 1), slow(3, 2)])
def test_metrics_are_those_of_one_process_for_any_number_of_images(
    num_processes: int, num_images: int, small_run: Path, shell: Callable[..., Any]
) -> None:
    args = ["validate", f"--ckpt_path={small_run}", f"--data.val_size={num_images}", "--data.eval_batch_size=5"]
    args += ["--report=false", "--pictures.enabled=true", "--trainer.precision=32-true", "--run_dir"]
    alone = main([*args, "alone", "--trainer.devices=1"]).trainer.callback_metrics
    done = shell(*args, "together", *DDP, f"--trainer.devices={num_processes}")
    assert done.returncode == 0, done.stderr
    together = json.loads(Path("together/metrics.json").read_text())
    assert together["val/acc"] == float(alone["val/acc"])
    assert together["val/f1"] == pytest.approx(float(alone["val/f1"]), abs=1e-6)
    assert together["val/loss"] == pytest.approx(float(alone["val/loss"]), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rank"), [("SIGINT", 0), ("SIGTERM", 1)])
def test_stopped_run_goes_on_as_if_it_had_not_been(kind: str, rank: int, run: Callable[..., Command]) -> None:
    """Whichever of two processes gets the signal, all stop after the same batch."""
    assert run("--run_dir=whole").end()[0] == 0
    code, _, errors = run(trouble((rank, 7, kind))).end()
    assert code == 128 + getattr(signal, kind)
    assert len(errors.splitlines()) == 2
    assert read(Path("run"))["global_step"] % 5, "in the middle of an epoch"
    args = ["--ckpt_path=run", *DDP, "--trainer.devices=2", "--trainer.callbacks=null"]
    assert Command(["-m", "mnist_lit", "fit", *args], {}).end()[0] == 0
    assert_same(learned(Path("run")), learned(Path("whole")))
    resumed, whole = (dict(curves(Path(name))["train/loss"]) for name in ("run", "whole"))
    assert resumed == pytest.approx(whole)


# One of them is gone


@pytest.mark.parametrize(
    ("troubles", "codes"),
    [
        ([(1, 8, "SIGKILL")], (1, -9)),  # Lightning's launcher may be faster than the failing collective call
        slow([(0, 8, "SIGKILL")], (-9,)),
        slow([(0, 8, "sleep"), (1, 8, "SIGKILL")], (-9,)),  # as in a collective call that waits for ever
        slow([(0, 8, "raise")], (1,)),
    ],
)
def test_process_that_is_gone_ends_the_others(
    troubles: list[tuple[int, int, str]], codes: tuple[int, ...], run: Callable[..., Command]
) -> None:
    command = run(FOREVER, trouble(*troubles))
    wait_for(last(), command)
    start = time.monotonic()
    code, _, errors = command.end()
    assert time.monotonic() - start < SECONDS
    assert code in codes
    assert "Traceback" not in errors
    assert ("LookupError: trouble" in errors) == (troubles[0][2] == "raise")
    assert_goes_on(errors)


# Other launchers


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "torchrun twice", "srun"])
def test_other_launchers_train_as_two_processes_do(launcher: str, run: Callable[..., Command]) -> None:
    assert run("--run_dir=ours").end()[0] == 0
    if launcher == "torchrun":
        commands = [run(python=[*TORCHRUN, "--standalone", "--nproc_per_node=2"])]
    elif launcher == "torchrun twice":  # as on two machines
        with socket.create_server(("127.0.0.1", 0)) as listener:
            place = f"--rdzv_endpoint=127.0.0.1:{listener.getsockname()[1]}"
        python = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", place, "--rdzv_id=run"]
        commands = [run("--trainer.devices=1", "--trainer.num_nodes=2", python=python) for _ in range(2)]
    else:  # with the variables that `srun --ntasks 2` gives its tasks; SLURM itself is not needed
        ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
        commands = [run(**SLURM, **rank) for rank in ranks]
    ended = [command.end() for command in commands]
    assert [code for code, *_ in ended] == [0] * len(commands), ended
    assert "".join(output for _, output, _ in ended).splitlines()[-1] == "run"
    assert [output for _, output, _ in ended].count("") == len(commands) - 1
    assert_same(learned(Path("run")), learned(Path("ours")))
