"""Drive a search: ask Optuna for trials, hand them to workers, and record how they end."""

import contextlib
import pickle
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass, field
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import TrialState

from mnist_lit.command_line import program_name
from mnist_lit.errors import MNISTLitError, Stopped, UsageError
from mnist_lit.search.check import check, trial_args
from mnist_lit.search.results import confirm, fit_command, format_outcome, format_results, write_results
from mnist_lit.search.settings import Settings, hide_password, parse
from mnist_lit.search.space import Space
from mnist_lit.search.study import HEARTBEAT, Study, counted, fail_and_retry, open_study, ranked, reason_of
from mnist_lit.search.worker import DIED, Result, Worker, kill_workers, new_workers, result_of, train
from mnist_lit.signals import defer_signals
from mnist_lit.training.run_dir import write_text

# Keys in which two starts of a search may differ: its trials stay comparable.
IGNORED_KEYS = ("run_dir", "ckpt_path", "test_after_fit", "num_threads", "num_gpus", "csv", "report", "pictures")
IGNORED_DATA_KEYS = ("data_dir", "download", "mirrors", "timeout", "num_workers", "pin_memory")
NUM_FAILURES = 3  # the search is aborted if so many trials fail at first and none succeeds
PATIENCE = 600  # seconds to wait for a database


def search(args: Sequence[str], program: Callable[..., Any]) -> optuna.Study:
    """Search for the best configuration of `fit`.

    Args:
        args: The command line after `search`.
        program: The `main` that the workers run; it can be pickled.

    Returns:
        The study.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats, retries and some samplers are experimental
    warnings.filterwarnings("ignore", "Heartbeat of storage is supposed")  # to be used with `optimize`
    settings, is_fresh, yaml_text = parse(args)
    try:
        base, space = check(settings, program)
        # One driver of a journal; a database takes several.
        lock = FileLock(settings.folder.with_name(f".{settings.study_name}.lock"), timeout=0)
        with lock if settings.storage is None else contextlib.nullcontext():
            study = open_study(settings, space, _about(settings, base), fresh=is_fresh)
            write_text(settings.folder / "search.yaml", yaml_text)
            workers = new_workers(settings.workers, base["num_gpus"], settings.folder / "workers.log")
            num_threads = max(1, base["num_threads"] // settings.workers)
            try:
                Driver(settings, study, space, num_threads, program, workers).run()
                confirm(settings, study, base["seed_everything"], program, workers)
            except Stopped as stop:
                command = shlex.join(hide_password(arg) for arg in args if arg != "--fresh")
                stop.add_note(f"what was done is kept; go on with: {program_name()} search {command}")
                raise
    except Timeout:
        raise UsageError(f"a search of {settings.folder} is running\nfor more trials at a time use --workers") from None
    except StorageInternalError as error:
        raise MNISTLitError(f"storage: {reason_of(error)}\nwhat was done is kept; the same command goes on") from error
    finally:
        kill_workers()
    from mnist_lit.search.report import write_report  # plotly

    page = write_report(study, settings)
    if not (best := ranked(study)):
        raise MNISTLitError(f"no trial has ended with a score\nsee {page}")
    print(format_results(study, settings))
    print(f"best: trial {best[0].number}; train it again with: {fit_command(settings)}")
    print(f"report: {page}\n{settings.folder}")
    return study


def _about(settings: Settings, config: Mapping[str, Any]) -> dict[str, Any]:
    """Collect what makes the trials of a study comparable."""
    base = {name: value for name, value in config.items() if name not in IGNORED_KEYS}
    base["data"] = {name: value for name, value in config["data"].items() if name not in IGNORED_DATA_KEYS}
    objectives = [asdict(objective) for objective in settings.objectives]
    return {"space": settings.space, "objective": objectives, "base": base}


@dataclass
class Driver:
    """Runs trials until the study has enough of them."""

    settings: Settings
    study: Study
    space: Space
    num_threads: int  # of each worker
    program: Callable[..., Any]
    idle: list[Worker]
    running: dict[Future[Result], tuple[optuna.Trial, Worker]] = field(default_factory=dict)
    own: set[int] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)
    last_heartbeat: float = 0.0
    written_at: float = 0.0

    def run(self) -> None:
        """Run trials until there are enough, or time is up; whatever ends it, none is left RUNNING."""
        self.pickled_study = pickle.dumps(self.study)
        self.deadline = time.monotonic() + (self.settings.timeout or float("inf"))
        with defer_signals():
            self._retry_running("its search was killed")
        try:
            self._run_all()
        except BaseException:
            with defer_signals(), contextlib.suppress(StorageInternalError):
                kill_workers()  # or they would write into directories that are deleted
                self._retry_running("its search was stopped")
                write_results(self.study, self.settings)
            raise
        write_results(self.study, self.settings)

    def _run_all(self) -> None:
        give_up_at = float("inf")
        while True:
            delay = 1  # seconds, until something may have happened
            try:
                with defer_signals():
                    for future in [future for future in self.running if future.done()]:
                        self._finish(future)
                    self._send_heartbeats()
                    if self._is_over():
                        return
                    if self.idle and time.monotonic() < self.deadline and self._has_more():
                        self._start()
                        delay = 0  # signals and heartbeats have their turn, then the next trial begins
                give_up_at = float("inf")
            except StorageInternalError as error:  # the next step begins with what the storage holds
                if give_up_at == float("inf"):
                    print(f"waiting for the database: {reason_of(error)}", file=sys.stderr, flush=True)
                    give_up_at = time.monotonic() + PATIENCE
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(1)
            wait(self.running, timeout=delay, return_when=FIRST_COMPLETED)
            if not self.running:
                time.sleep(delay)  # until trials of other machines end

    def _is_over(self) -> bool:
        if self.running:
            return False
        has_more = self._has_more()  # asked first: what another machine begins after it is RUNNING below
        others = any(trial.state == TrialState.RUNNING for trial in counted(self.study))
        return time.monotonic() >= self.deadline or not (others or has_more)

    def _has_more(self) -> bool:
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        is_exhausted = self.study.user_attrs.get("exhausted") == type(self.study.sampler).__name__
        return len(counted(self.study)) < self.settings.n_trials and bool(waiting or not is_exhausted)

    def _start(self) -> None:
        """Train a trial, or give it the values of a complete one with the same parameters."""
        trial = self.study.ask()
        self.own.add(trial.number)
        params = self.space.suggest(trial)
        trial.set_user_attr("params", params)
        for other in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if other.params == trial.params:
                trial.set_user_attr("duplicate_of", other.number)
                trial.set_user_attr("run_dir", other.user_attrs["run_dir"])
                self.study.finish(trial.number, Result(TrialState.COMPLETE, other.values, 0.0))
                print(f"trial {trial.number}: the parameters of trial {other.number}, and its result", flush=True)
                return
        run_dir = self.settings.run_dir(trial.number)
        overrides = {**self.settings.overrides, **params, "num_threads": self.num_threads}
        trial.set_user_attr("overrides", overrides)
        trial.set_user_attr("run_dir", str(run_dir))
        args = trial_args(self.settings, run_dir, overrides)
        worker = self.idle.pop(0)
        trial_id = self.study.trial_id(trial.number)
        future = worker.submit(train, self.program, args, self.settings.objectives, self.pickled_study, trial_id)
        self.running[future] = trial, worker

    def _finish(self, future: Future[Result]) -> None:
        trial, worker = self.running[future]
        result = result_of(future)
        if result.state == TrialState.WAITING:
            # The parameters may be the cause of a death, but not of a stop.
            fail_and_retry(self.study, trial.number, result.error, max_retries=1 if result.error == DIED else None)
        else:
            self.study.finish(trial.number, result)
        del self.running[future]
        self.idle.append(worker)
        seconds = "" if result.seconds is None else f", {result.seconds:.1f} s"
        print(f"trial {trial.number}: {format_outcome(self.settings, result)}{seconds}", flush=True)
        states = [trial.state for trial in counted(self.study)]
        is_hopeless = states[:NUM_FAILURES] == [TrialState.FAIL] * NUM_FAILURES and TrialState.COMPLETE not in states
        if result.error and is_hopeless:
            raise MNISTLitError(f"the first {NUM_FAILURES} trials have failed; this one with:\n{result.error}")
        if time.monotonic() - self.written_at > 1:  # the files of a thousand tiny trials take longer than the next one
            write_results(self.study, self.settings)
            self.written_at = time.monotonic()

    def _send_heartbeats(self) -> None:
        """Show other machines that this driver is alive, then fail the trials of those that are not."""
        if not isinstance(self.study.storage, RDBStorage) or time.monotonic() - self.last_heartbeat < HEARTBEAT:
            return
        alive = {trial.number for trial, _ in self.running.values()}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # A trial whose driver died before its first heartbeat would never be stale: it gets one from here.
            if trial.number in alive or trial.number not in self.seen:
                self.study.storage.record_heartbeat(self.study.trial_id(trial.number))
                self.seen.add(trial.number)
        fail_stale_trials(self.study)
        self.last_heartbeat = time.monotonic()

    def _retry_running(self, reason: str) -> None:
        """Enqueue again what this driver was training; on a journal, also what an earlier one was."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self.settings.storage is None or trial.number in self.own:
                fail_and_retry(self.study, trial.number, reason)
