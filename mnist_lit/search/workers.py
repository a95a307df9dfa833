"""Processes that work for a search, one job at a time, and end with it."""

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any, Protocol, Self

from tqdm import tqdm

from mnist_lit.errors import MNISTLitError, Stopped, UsageError
from mnist_lit.signals import ignore_sigint

__all__ = ["Died", "Job", "Pool", "Report", "Worker", "print_to"]

PRELOADED = ["mnist_lit.cli", "mnist_lit.search.pruning"]


class Job(Protocol):
    """Something to do in another process; it and its result travel as pickles."""

    def run(self, ask: Any) -> Any:
        """Do it. `ask(step, scores)` reports to the search and waits for its answer."""


@dataclass(frozen=True)
class Report:
    """A job's scores on the way; the worker waits for an answer.

    Args:
        step: The number of the validation, from 0.
        scores: The metric of each objective that is logged.
    """

    step: int
    scores: list[float]


@dataclass(frozen=True)
class Died:
    """The message of a worker that has none any more.

    Args:
        reason: How it ended.
    """

    reason: str


class Worker:
    """One process.

    Args:
        environment: Its environment variables.

    Attributes:
        task: What it is busy with, for the caller to know; None when it is idle.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        context: Any = multiprocessing.get_context(_start_method())
        self.connection, theirs = context.Pipe()
        self.task: Any = None
        self.process = context.Process(target=_serve, args=(theirs, environment, Path.cwd()))
        self.process.start()
        theirs.close()

    def start(self, job: Job, task: Any) -> None:
        """Give it a job."""
        self.task = task
        with contextlib.suppress(OSError):  # it has died: that is its next message
            self.connection.send(job)

    def answer(self, *, is_hopeless: bool) -> None:
        """Answer its report."""
        with contextlib.suppress(OSError):
            self.connection.send(is_hopeless)

    def receive(self) -> Any:
        """Its next message: a `Report`, the result of its job, the `MNISTLitError` that it raised, or `Died`."""
        # Its children share its end of the pipe and keep it open; the sentinel tells of its death at once.
        connection.wait(self.signs)
        if not self.connection.poll():
            return self._death()
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            return self._death()
        if not isinstance(message, Report):
            self.task = None
        return message

    def _death(self) -> Died:
        self.process.join()
        code = self.process.exitcode or 0
        return Died(f"its worker died of {signal.Signals(-code).name if code < 0 else f'exit code {code}'}")

    @property
    def signs(self) -> list[Any]:
        """What becomes ready when it has a message or has died."""
        return [self.connection, self.process.sentinel]

    def kill(self) -> None:
        """End it at once, with its children, also if these are all that is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()


class Pool:
    """Workers that are made when they are needed and replaced when they die."""

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.environments: list[dict[str, str]] = [{}]
        if _start_method() == "forkserver":
            # Imported once; workers are forks of that process, which has neither threads nor a GPU.
            multiprocessing.set_forkserver_preload(PRELOADED)
            with ignore_sigint():
                forkserver.ensure_running()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End all workers at once."""
        while self.workers:
            self.workers.pop().kill()

    def spread_over_gpus(self, num_gpus: int) -> None:
        """Let each worker see one GPU; with fewer GPUs than workers some share one."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(num_gpus)]
        self.environments = [{"CUDA_VISIBLE_DEVICES": name} for name in names[:num_gpus]] or [{}]
        if num_gpus:
            self.kill()  # those that are there have seen all

    def idle(self, limit: int) -> Iterator[Worker]:
        """The workers without a task, of `limit` in all."""
        for place in range(limit):
            if place == len(self.workers):
                self.workers.append(self._new(place))
            if self.workers[place].task is None:
                yield self.workers[place]

    def messages(self, timeout: float) -> Iterator[tuple[Worker, Any, Any]]:
        """What busy workers have to say within some seconds: worker, its task, message. The dead are replaced."""
        busy = [worker for worker in self.workers if worker.task is not None]
        ready = connection.wait([sign for worker in busy for sign in worker.signs], timeout)
        for worker in busy:
            if not any(sign in ready for sign in worker.signs):
                continue
            task, message = worker.task, worker.receive()
            if isinstance(message, Died):
                worker.kill()
                place = self.workers.index(worker)
                self.workers[place] = self._new(place)
            yield worker, task, message

    def call(self, job: Job) -> Any:
        """The result of a job that is worth waiting for; raises what the job raises."""
        worker = next(self.idle(1))
        worker.start(job, "call")
        result = worker.receive()
        if isinstance(result, Died):
            raise MNISTLitError(f"no job can be done: {result.reason}")
        if isinstance(result, MNISTLitError):
            raise result
        return result

    def _new(self, place: int) -> Worker:
        extra = self.environments[place % len(self.environments)]
        return Worker({**os.environ, **extra})


def print_to(file: Path) -> None:
    """Let a file take what this process prints from now on, whatever prints it."""
    sys.stdout.flush()
    with file.open("a") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)


def _start_method() -> str:
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def _serve(pipe: Any, environment: dict[str, str], folder: Path) -> None:
    """The life of a worker."""
    # Ctrl-C is for the search, which decides what becomes of its workers.
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["mnist_lit"]
    print_to(Path(os.devnull))
    gc.freeze()  # what was imported stays; looking through it for garbage takes a quarter of a second after each trial
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(_result(job, pipe))


def _result(job: Job, pipe: Any) -> Any:
    def ask(step: int, scores: list[float]) -> Any:
        pipe.send(Report(step, scores))
        return pipe.recv()

    try:
        return job.run(ask)
    except (Exception, Stopped) as error:
        # Not every exception survives a pickle.
        kind = UsageError if isinstance(error, UsageError) else MNISTLitError
        raised = kind(str(error) if isinstance(error, (MNISTLitError, Stopped)) else f"{type(error).__name__}: {error}")
        raised.add_note(traceback.format_exc())
        return raised


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
