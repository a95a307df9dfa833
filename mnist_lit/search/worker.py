"""Train trials in processes of their own."""

import errno
import functools
import gc
import json
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

from mnist_lit.command_line import DEBUG_VARIABLE
from mnist_lit.errors import MNISTLitError, Stopped, describe_machine_error, is_disk_full
from mnist_lit.formatting import flatten, nested
from mnist_lit.search.settings import Objective, Settings, UnknownMetricError
from mnist_lit.signals import defer_signals, ignore_sigint
from mnist_lit.training.run_dir import write_yaml

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


def trial_args(settings: Settings, run_dir: Path, overrides: dict[str, Any]) -> list[str]:
    """Write the config of a trial's own, and return the trial's command line."""
    overlay = run_dir.parents[1] / "overlays" / f"{run_dir.name}.yaml"
    overlay.parent.mkdir(exist_ok=True)
    # No flags: `--model.options.a=3` would keep the other items of a dict, and best.yaml would not repeat the trial.
    content = {"report": False, "pictures.enabled": False, "test_after_fit": False, **flatten(overrides)}
    write_yaml(overlay, nested(content))
    return ["fit", *(f"--config={config}" for config in [*settings.configs, overlay]), f"--run_dir={run_dir}"]


def dry_run(program: Callable[..., Any], args: list[str], *, fetch: bool) -> dict[str, Any]:
    """Build what a command line asks for in this process, and run nothing."""
    import torch

    cli = program(args, is_dry=True)
    if fetch:
        cli.datamodule.fetch("fit")
    return {**cli.plain_config, "num_threads": torch.get_num_threads(), "num_gpus": torch.cuda.device_count()}


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
    except Stopped:
        return Result(TrialState.WAITING, error="its worker was stopped")
    except UnknownMetricError:
        raise
    except (Exception, SystemExit) as error:
        if is_disk_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        traceback.print_exception(error)  # into the log of the workers
        message = str(error) if isinstance(error, MNISTLitError) else describe_machine_error(error)
        return Result(TrialState.FAIL, error=(message or f"{type(error).__name__}: {error}").strip().splitlines()[0])
    finally:
        gc.collect()  # the trainer and the model refer to each other
    if pruning.is_pruned:
        return Result(TrialState.PRUNED, None, metrics["seconds"])
    return Result(TrialState.COMPLETE, scores, metrics["seconds"])


def _start_worker(log: Path, gpu: str | None) -> None:
    """Leave Ctrl-C to the driver, print to the log, and end with the driver."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ[DEBUG_VARIABLE] = "1"  # errors arrive as they are
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
