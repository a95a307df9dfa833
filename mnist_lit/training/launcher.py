"""The processes of a run on several devices: started together, ended together, and one of them says what happened."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry

from mnist_lit.environment import FIRST_PROCESS_VARIABLE
from mnist_lit.signals import ignore_sigint

__all__ = ["Companions", "companions", "is_loss_of_another"]

# Without a sign of another process for so long it is taken for gone; torch waits for half an hour.
PATIENCE = timedelta(minutes=5)
# What a process has to end by itself when another one is gone; it may be stuck in the middle of an exchange.
GRACE_SECONDS = 30.0
# Its errors have no class of their own.
SIGNS_OF_GLOO = ("gloo/", "caused pair closure")

StrategyRegistry.register(
    "ddp", DDPStrategy, "DDP that notices when a process is gone", override=True, timeout=PATIENCE, start_method="popen"
)


class Companions:
    """The other processes of a run on this machine, as far as this one knows them.

    Args:
        args: What follows `python -m mnist_lit`, in those that this process starts.
        environments: The environment variables of each of them.
        num_processes: Processes of the run, on all machines.
    """

    def __init__(self, args: Sequence[str], environments: Sequence[Mapping[str, str]], num_processes: int) -> None:
        self.num_processes = num_processes
        self.ranks = [environment["RANK"] for environment in environments]
        command = [sys.executable, "-m", "mnist_lit", *args]
        with ignore_sigint():  # Ctrl-C is for the first process, which tells the others
            self.processes = [subprocess.Popen(command, env=environment) for environment in environments]

    def loss(self, seconds: float) -> str:
        """Which process is gone before its time, looked for so long; empty if none is known to be."""
        knows_any = self.processes or FIRST_PROCESS_VARIABLE in os.environ
        deadline = time.monotonic() + (seconds if knows_any else 0.0)
        while not (lost := self._lost()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return lost

    @property
    def are_led(self) -> bool:
        """Whether the process that has started this one is there to say what happens."""
        return os.environ.get(FIRST_PROCESS_VARIABLE) == str(os.getppid())

    def end(self) -> None:
        """Let them end, as this one does."""
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End them at once."""
        for process in self.processes:
            process.kill()
            process.wait()

    def watch(self, is_over: threading.Event) -> None:
        """End this process, too, when another one is gone and this one waits for it for ever."""
        while not (lost := self._lost()):
            if is_over.wait(1.0):
                return
        if not is_over.wait(GRACE_SECONDS):
            self.kill()
            print(f"error: {lost}", file=sys.stderr, flush=True)
            os._exit(1)

    def _lost(self) -> str:
        for rank, process in zip(self.ranks, self.processes, strict=True):
            if process.poll():
                return f"process {rank} of {self.num_processes} {_how(process.returncode)}"
        first = os.environ.get(FIRST_PROCESS_VARIABLE, "")
        return f"process 0 of {self.num_processes} is gone" if first and not self.are_led else ""


@contextmanager
def companions(trainer: Trainer, args: Sequence[str]) -> Iterator[Companions]:
    """The other processes of a run; those that it is for this one to start begin and end with the block.

    Lightning would start them, too, but ends this process without a word when one of them is gone.

    Args:
        trainer: What needs them.
        args: What follows `python -m mnist_lit`.
    """
    is_over = threading.Event()
    own, *others = _environments(trainer) or [{}]
    with _added(own):
        them = Companions(args, [{**os.environ, **other} for other in others], trainer.world_size)
        threading.Thread(target=them.watch, args=[is_over], daemon=True).start()
        try:
            yield them
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()  # a thing that all of them do, or each waits for the others
            them.end()
        finally:
            is_over.set()
            them.kill()


def is_loss_of_another(error: BaseException) -> bool:
    """Whether an error is that of a process that waits for another one."""
    return isinstance(error, torch.distributed.DistError) or any(sign in str(error) for sign in SIGNS_OF_GLOO)


def _environments(trainer: Trainer) -> list[dict[str, str]]:
    """What each process on this machine has to know, if it is for this one to start them."""
    # Only launchers that work by command lines have one.
    environment = getattr(trainer.strategy.launcher, "cluster_environment", None)
    if environment is None or environment.creates_processes_externally:
        return []
    shared = {
        "MASTER_ADDR": environment.main_address,
        "MASTER_PORT": str(environment.main_port),
        "NODE_RANK": str(environment.node_rank()),
        "WORLD_SIZE": str(trainer.world_size),
    }
    each = [
        {**shared, "LOCAL_RANK": str(place), "RANK": str(trainer.global_rank + place)}
        for place in range(trainer.num_devices)
    ]
    return [each[0], *({**one, FIRST_PROCESS_VARIABLE: str(os.getpid())} for one in each[1:])]


@contextmanager
def _added(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"has failed with exit code {code}"
