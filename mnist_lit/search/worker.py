"""Train trials in processes of their own."""

import errno
import functools
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
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

from optuna.exceptions import StorageInternalError
from optuna.trial import Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError
from tqdm import tqdm

from mnist_lit.errors import MNISTLitError, Stopped, describe_machine_error, is_disk_full
from mnist_lit.search.settings import Objective, UnknownMetricError
from mnist_lit.signals import defer_signals, ignore_sigint

# Imported once: a worker is a fork of the process that has done so.
multiprocessing.set_forkserver_preload(["mnist_lit.commands", "mnist_lit.search.pruning"])
DIED = "its worker died"
load_study = functools.lru_cache(maxsize=1)(pickle.loads)  # once in a process: with it a whole journal is read


class WorkerContext(ForkServerContext):
    """Starts worker processes."""

    class Process(ForkServerProcess):
        """Tells workers from other children of this process."""


class Result(NamedTuple):
    """Holds how a training has ended: WAITING where it was stopped and has to run again."""

    state: TrialState
    values: list[float] | None = None
    seconds: float | None = None
    error: str = ""


class Worker:
    """Runs functions in a process of its own; where that has died, the next call starts another."""

    def __init__(self, log: Path, gpu: str | None = None) -> None:
        self.new_executor = functools.partial(ProcessPoolExecutor, 1, WorkerContext(), _start_worker, (log, gpu))
        self.executor = self.new_executor()

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        with defer_signals(), ignore_sigint():  # while the process starts
            try:
                return self.executor.submit(function, *args, **kwargs)
            except BrokenProcessPool:
                self.executor = self.new_executor()
                return self.executor.submit(function, *args, **kwargs)


def result_of(future: Future[Result]) -> Result:
    """Return the result of a training; WAITING where its worker has died."""
    try:
        return future.result()
    except BrokenProcessPool:
        return Result(TrialState.WAITING, error=DIED)


def new_workers(number: int, num_gpus: int, log: Path) -> list[Worker]:
    """Make workers, each with a GPU of its own as long as there are enough."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_gpus)))
    gpus: list[Any] = visible.split(",")[:num_gpus] or [None]
    return [Worker(log, gpus[position % len(gpus)]) for position in range(number)]


def kill_workers() -> None:
    """Kill all workers of this process, and wait for their end."""
    for process in multiprocessing.active_children():
        if isinstance(process, WorkerContext.Process):
            process.kill()
            process.join(10)


def train(
    program: Callable[..., Any], args: list[str], objectives: Sequence[Objective], study: bytes = b"", trial_id: int = 0
) -> Result:
    """Train one configuration, of a trial if a study is given; what goes wrong with it is part of the result."""
    from mnist_lit.search.pruning import Pruning  # torch

    try:
        trial = Trial(load_study(study), trial_id) if study else None
    except (SQLAlchemyError, StorageInternalError):
        return Result(TrialState.WAITING, error="its database was away")
    pruning = Pruning(objectives, trial)
    try:
        run_dir = program(args, callbacks=[pruning]).run_dir
        metrics = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
        scores = [pruning.score(objective, metrics) for objective in objectives]
    except (Exception, SystemExit, Stopped) as error:
        return _failure(error.__cause__ if isinstance(error, SystemExit) and error.__cause__ else error)
    finally:
        gc.collect()  # the trainer and the model refer to each other
    if pruning.is_pruned:
        return Result(TrialState.PRUNED, None, metrics["seconds"])
    for objective, score in zip(objectives, scores, strict=True):
        if math.isnan(score):
            return Result(TrialState.FAIL, None, metrics["seconds"], f"{objective.metric} is not a number")
    return Result(TrialState.COMPLETE, scores, metrics["seconds"])


def _failure(error: BaseException) -> Result:
    if isinstance(error, Stopped):
        return Result(TrialState.WAITING, error="its worker was stopped")
    if isinstance(error, UnknownMetricError):
        raise error
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
    multiprocessing.set_forkserver_preload([])  # the data workers of a trial need no more than they import
    tqdm.set_lock(threading.RLock())  # the default is a semaphore, which a killed process leaves behind
    gc.freeze()  # a collection over all that was imported would take a quarter of a second after each trial
    threading.Thread(target=_end_with_driver, daemon=True).start()


def _end_with_driver() -> None:
    if driver := multiprocessing.parent_process():
        driver.join()
        os.kill(os.getpid(), signal.SIGKILL)
