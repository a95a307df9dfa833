"""Train trials in processes of their own."""

import errno
import gc
import json
import math
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from optuna.trial import TrialState
from tqdm import tqdm

from mnist_lit.errors import MNISTLitError, Stopped, describe_machine_error, is_disk_full
from mnist_lit.search.settings import Objective, UnknownMetricError
from mnist_lit.signals import defer_signals, ignore_sigint

__all__ = ["Base", "Result", "Worker", "dry_run", "kill_workers", "new_workers", "train"]

Returned = TypeVar("Returned")
# Imported once: a worker is a fork of the process that has done so.
multiprocessing.set_forkserver_preload(["mnist_lit.commands", "mnist_lit.search.pruning"])


class WorkerProcess(ForkServerProcess):
    """Tell workers from other children of this process."""


class WorkerContext(ForkServerContext):
    """Start worker processes."""

    Process = WorkerProcess


class Base(NamedTuple):
    """Describe what a search starts from.

    Args:
        config: The complete configuration of `fit`.
        num_threads: Threads of torch in a process of its own.
        num_gpus: GPUs of this machine.
    """

    config: dict[str, Any]
    num_threads: int
    num_gpus: int


class Result(NamedTuple):
    """Describe how a training has ended.

    Args:
        state: COMPLETE, PRUNED, FAIL, or WAITING where it was stopped and has to run again.
        values: The score for each objective.
        seconds: Seconds of training.
        error: Why it failed, in one line.
    """

    state: TrialState
    values: list[float] | None = None
    seconds: float | None = None
    error: str = ""


class Worker:
    """Run functions in a process of its own; where that has died, the next call starts another.

    Args:
        log: The file that takes what it prints.
        gpu: The one GPU that it sees; None for all.
    """

    def __init__(self, log: Path, gpu: str | None = None) -> None:
        self.arguments = (log, gpu)
        self.executor = self._new_executor()

    def submit(self, function: Callable[..., Returned], *args: Any, **kwargs: Any) -> Future[Returned]:
        with defer_signals(), ignore_sigint():  # while the process starts
            try:
                return self.executor.submit(function, *args, **kwargs)
            except BrokenProcessPool:
                self.executor = self._new_executor()
                return self.executor.submit(function, *args, **kwargs)

    def _new_executor(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, WorkerContext(), _start_worker, self.arguments)


def new_workers(number: int, num_gpus: int, log: Path) -> list[Worker]:
    """Make workers, each with a GPU of its own as long as there are enough."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_gpus)))
    gpus: list[Any] = visible.split(",")[:num_gpus] or [None]
    return [Worker(log, gpus[position % len(gpus)]) for position in range(number)]


def kill_workers() -> None:
    """Kill all workers of this process, and wait for their end."""
    processes = [process for process in multiprocessing.active_children() if isinstance(process, WorkerProcess)]
    for process in processes:
        process.kill()
    for process in processes:
        connection.wait([process.sentinel], timeout=10)


def dry_run(program: Callable[..., Any], args: list[str], *, fetch: bool = False) -> Base:
    """Build what a command line asks for, and run nothing.

    Args:
        program: The `main` of the program.
        args: The command line.
        fetch: Whether missing data is downloaded, too.
    """
    import torch

    num_threads = torch.get_num_threads()
    try:
        cli = program(args, is_dry=True)
    except SystemExit as error:
        raise error.__cause__ or error from None
    if fetch:
        cli.datamodule.fetch("fit")
    return Base(cli.plain_config, num_threads, torch.cuda.device_count())


def train(
    program: Callable[..., Any], args: list[str], objectives: Sequence[Objective], pickled_trial: bytes
) -> Result:
    """Train one configuration; what goes wrong with it is part of the result.

    Args:
        program: The `main` of the program.
        args: The command line.
        objectives: What is scored.
        pickled_trial: The trial to report to, or None, pickled.

    Raises:
        UnknownMetricError: If no run logs the metric of an objective.
        OSError: If the disk is full.
    """
    from mnist_lit.search.pruning import Pruning  # torch

    try:
        pruning = Pruning(objectives, pickle.loads(pickled_trial))
        run_dir = program(args, callbacks=[pruning]).run_dir
        metrics = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
        scores, seconds = pruning.scores(metrics), metrics["seconds"]
    except (Exception, SystemExit, Stopped) as error:
        return _failure(error.__cause__ if isinstance(error, SystemExit) and error.__cause__ else error)
    finally:
        gc.collect()  # the trainer and the model refer to each other
    if wrong := [objective.metric for objective, score in zip(objectives, scores, strict=True) if math.isnan(score)]:
        return Result(TrialState.FAIL, None, seconds, f"{wrong[0]} is not a number")
    return (
        Result(TrialState.PRUNED, None, seconds) if pruning.is_pruned else Result(TrialState.COMPLETE, scores, seconds)
    )


def _failure(error: BaseException) -> Result:
    if isinstance(error, Stopped):
        return Result(TrialState.WAITING, error="its worker was stopped")
    if isinstance(error, UnknownMetricError):
        raise UnknownMetricError(str(error))
    if is_disk_full(error):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    traceback.print_exception(error)  # into the log of the workers
    message = str(error) if isinstance(error, MNISTLitError) else describe_machine_error(error)
    return Result(TrialState.FAIL, error=(message or f"{type(error).__name__}: {error}").strip().splitlines()[0])


def _start_worker(log: Path, gpu: str | None) -> None:
    """Leave Ctrl-C to the driver, print to the log, and end with the driver."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    file = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    tqdm.set_lock(threading.RLock())  # the default is a semaphore, which a killed process leaves behind
    gc.freeze()  # a collection over all that was imported would take a quarter of a second after each trial
    threading.Thread(target=_end_with_driver, daemon=True).start()


def _end_with_driver() -> None:
    if driver := multiprocessing.parent_process():
        driver.join()
        os.kill(os.getpid(), signal.SIGKILL)
