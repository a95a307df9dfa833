"""Drive a search: ask Optuna for trials, hand them to workers, record how they end, and confirm the best."""

import contextlib
import pickle
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from mnist_lit.command_line import program_name
from mnist_lit.errors import MNISTLitError, Stopped, UsageError
from mnist_lit.search.results import fit_command, format_outcome, format_results, write_results
from mnist_lit.search.settings import Confirm, Settings, hide_password, parse
from mnist_lit.search.space import Params, Space, check
from mnist_lit.search.study import HEARTBEAT, Study, counted, open_study, ranked, reason_of
from mnist_lit.search.worker import Result, Worker, kill_workers, new_workers, result_of, train, trial_args
from mnist_lit.signals import defer_signals
from mnist_lit.training.run_dir import write_text

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
            study = open_study(settings, space, base, fresh=is_fresh)
            write_text(settings.folder / "search.yaml", yaml_text)
            try:
                Driver(settings, study, space, base, program).run()
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


class Driver:
    """Runs trials until the study has enough of them, and trains the best ones again."""

    def __init__(
        self, settings: Settings, study: Study, space: Space, base: Params, program: Callable[..., Any]
    ) -> None:
        self.settings, self.study, self.space, self.program = settings, study, space, program
        self.seed, self.num_threads = base["seed_everything"], max(1, base["num_threads"] // settings.workers)
        self.pickled_study = pickle.dumps(study)
        self.deadline = time.monotonic() + (settings.timeout or float("inf"))
        self.idle = new_workers(settings.workers, base["num_gpus"], settings.folder / "workers.log")
        self.running: dict[Future[Result], tuple[optuna.Trial, Worker]] = {}
        self.own: set[int] = set()  # trials that this driver has begun
        self.seen: set[int] = set()  # trials that have had a heartbeat from here
        self.updated_at = 0.0

    def run(self) -> None:
        """Run trials until there are enough or time is up, then confirm; whatever ends it, none is left RUNNING."""
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
        if self.settings.confirm is not None:
            self._confirm(self.settings.confirm)

    def _confirm(self, confirm: Confirm) -> None:
        """Train the best trials with the seeds after that of the search, and note their scores in the study."""
        seeds = range(self.seed + 1, self.seed + 1 + confirm.seeds)
        pairs = [(trial, seed) for trial in ranked(self.study)[: confirm.top] for seed in seeds]
        with FileLock(self.settings.folder / ".confirm.lock"):  # another machine may train them in the same directory
            confirmed: dict[str, dict[str, float]] = self.study.user_attrs.get("confirmed", {})
            missing = [(trial, seed) for trial, seed in pairs if str(seed) not in confirmed.get(str(trial.number), {})]
            # One training for each worker at a time: what waits behind another one is lost if their worker dies.
            for first in range(0, len(missing), len(self.idle)):
                batch = missing[first : first + len(self.idle)]
                futures = [self._retrain(*pair, worker) for pair, worker in zip(batch, self.idle, strict=False)]
                for (trial, seed), result in zip(batch, map(result_of, futures), strict=True):
                    if result.values:
                        confirmed.setdefault(str(trial.number), {})[str(seed)] = result.values[0]
                        self.study.set_user_attr("confirmed", confirmed)
                    print(f"trial {trial.number} with seed {seed}: {format_outcome(self.settings, result)}", flush=True)

    def _retrain(self, trial: FrozenTrial, seed: int, worker: Worker) -> Future[Result]:
        run_dir = self.settings.folder / "confirm" / f"{trial.number:04d}_seed_{seed}"
        shutil.rmtree(run_dir, ignore_errors=True)  # of a start that was stopped
        args = trial_args(self.settings, run_dir, {**trial.user_attrs["overrides"], "seed_everything": seed})
        return worker.submit(train, self.program, args, self.settings.objectives)

    def _run_all(self) -> None:
        give_up_at = float("inf")
        while True:
            delay = 1  # seconds, until something may have happened
            try:
                with defer_signals():
                    for future in [future for future in self.running if future.done()]:
                        self._finish(future)
                    self._update()
                    is_late = time.monotonic() >= self.deadline
                    if self.idle and not is_late and self._has_more():
                        self._start()
                        delay = 0  # signals and heartbeats have their turn, then the next trial begins
                    # Asked last: what another machine has begun meanwhile is RUNNING.
                    elif not self.running and (
                        is_late or all(trial.state.is_finished() for trial in counted(self.study))
                    ):
                        return
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
                self.study.finish(trial.number, Result(TrialState.COMPLETE, other.values, 0.0))
                print(f"trial {trial.number}: the parameters of trial {other.number}, and its result", flush=True)
                return
        overrides = {**self.settings.overrides, **params, "num_threads": self.num_threads}
        trial.set_user_attr("overrides", overrides)
        args = trial_args(self.settings, self.settings.run_dir(trial.number), overrides)
        trial_id = self.study.trial_id(trial.number)
        worker = self.idle.pop(0)  # last: the storage may be away before
        future = worker.submit(train, self.program, args, self.settings.objectives, self.pickled_study, trial_id)
        self.running[future] = trial, worker

    def _finish(self, future: Future[Result]) -> None:
        trial, worker = self.running[future]
        result = result_of(future)
        self.study.finish(trial.number, result)
        del self.running[future]
        self.idle.append(worker)
        print(f"trial {trial.number}: {format_outcome(self.settings, result)}", flush=True)
        states = [trial.state for trial in counted(self.study)]
        is_hopeless = states[:NUM_FAILURES] == [TrialState.FAIL] * NUM_FAILURES and TrialState.COMPLETE not in states
        if result.error and is_hopeless:
            raise MNISTLitError(f"the first {NUM_FAILURES} trials have failed; this one with:\n{result.error}")

    def _update(self) -> None:
        """Write the results; on a database show others that this driver is alive, and fail the trials of dead ones."""
        if time.monotonic() - self.updated_at < HEARTBEAT:
            return
        if isinstance(self.study.storage, RDBStorage):
            alive = {trial.number for trial, _ in self.running.values()}
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                # A trial whose driver died before its first heartbeat would never be stale: it gets one from here.
                if trial.number in alive or trial.number not in self.seen:
                    self.study.storage.record_heartbeat(self.study.trial_id(trial.number))
                    self.seen.add(trial.number)
            fail_stale_trials(self.study)
        write_results(self.study, self.settings)
        self.updated_at = time.monotonic()

    def _retry_running(self, reason: str) -> None:
        """Enqueue again what this driver was training; on a journal, also what an earlier one was."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self.settings.storage is None or trial.number in self.own:
                self.study.finish(trial.number, Result(TrialState.WAITING, error=reason))
