"""Run the trials of a study: ask Optuna, hand them to workers, and record how they end."""

import contextlib
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from mnist_lit.errors import MNISTLitError, Stopped
from mnist_lit.search.check import trial_args, write_overlay
from mnist_lit.search.results import format_scores, write_results
from mnist_lit.search.settings import Settings, UnknownMetricError
from mnist_lit.search.space import Params, Space
from mnist_lit.search.storage import HEARTBEAT, DatabaseGoneError
from mnist_lit.search.study import Study, counted, fail_and_retry, ranked
from mnist_lit.search.worker import Base, Result, Worker, kill_workers, train
from mnist_lit.signals import defer_signals

__all__ = ["Runner"]

NUM_FAILURES = 3  # the search is aborted if so many trials fail at first and none succeeds
NUM_RETRIES = 20  # of a step in the middle of which a database goes away


class Runner:
    """Run trials until the study has enough of them.

    Args:
        settings: The settings of the search.
        study: The study.
        space: What the trials vary.
        base: What they start from.
        program: The `main` that the workers run.
        workers: The workers.
        owner: The name of this driver.
    """

    def __init__(
        self,
        settings: Settings,
        study: Study,
        space: Space,
        base: Base,
        program: Callable[..., Any],
        workers: Sequence[Worker],
        owner: str,
    ) -> None:
        self.settings = settings
        self.study = study
        self.space = space
        self.program = program
        self.owner = owner
        self.idle = list(workers)
        self.num_threads = max(1, base.num_threads // len(workers))
        self.deadline = time.monotonic() + (settings.timeout or float("inf"))
        self.pending: list[optuna.Trial] = []  # asked for, and not trained: some wait for a trial that they repeat
        self.running: dict[Future[Result], tuple[optuna.Trial, Worker]] = {}
        self.foreign: set[int] = set()
        self.last_heartbeat = 0.0

    def run(self) -> None:
        """Run trials until there are enough, or time is up; whatever ends it, none is left RUNNING.

        Raises:
            MNISTLitError: If no trial can succeed.
        """
        with defer_signals():
            self._retry_own("its search was killed")
        num_trials = self.settings.n_trials
        with tqdm(total=num_trials, unit="trial", disable=None, dynamic_ncols=True) as self.bar:
            try:
                self._run_all()
            except DatabaseGoneError:
                raise  # and is not waited for once more
            except BaseException:
                with defer_signals(), contextlib.suppress(StorageInternalError, Stopped):
                    kill_workers()  # or they would write into directories that are deleted
                    self._retry_own("its search was stopped")
                    write_results(self.study, self.settings)
                raise
        write_results(self.study, self.settings)

    def _run_all(self) -> None:
        num_failures = 0
        while True:
            try:
                with defer_signals():
                    self._send_heartbeats()
                    self._start_trials()
                    if self._is_over():
                        return
                if not self.running:
                    time.sleep(1)  # until trials of other machines end
                wait(self.running, timeout=1, return_when=FIRST_COMPLETED)
                with defer_signals():
                    for future in [future for future in self.running if future.done()]:
                        self._finish(future)
                num_failures = 0
            except StorageInternalError as error:  # a database went away; the next step waits for it
                num_failures += 1
                if num_failures > NUM_RETRIES:
                    raise MNISTLitError(f"storage: {error.__cause__ or error}") from error
                time.sleep(1)

    def _is_over(self) -> bool:
        if self.running or self.pending:
            return False
        others = any(trial.state == TrialState.RUNNING for trial in counted(self.study))
        return self._is_late() or not (others or self._has_more())

    def _is_late(self) -> bool:
        return time.monotonic() >= self.deadline

    def _has_more(self) -> bool:
        if len(counted(self.study)) >= self.settings.n_trials:
            return False
        return not self.study.is_exhausted or bool(self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))

    def _start_trials(self) -> None:
        for trial in list(self.pending):
            self._start(trial)
        while self.idle and not self._is_late() and self._has_more():
            self.pending.append(self.study.ask())
            self._start(self.pending[-1])

    def _start(self, trial: optuna.Trial) -> None:
        """Train a pending trial, or give it the result of an earlier one with the same parameters."""
        trials = counted(self.study)
        numbers = [other.number for other in trials]
        if trial.number not in numbers:
            pass  # another driver has failed it as stale, and retries it
        elif numbers.index(trial.number) >= self.settings.n_trials:  # another driver has begun one in the same moment
            trial.set_user_attr("surplus", 1)
            self._tell(trial, Result(TrialState.FAIL))
        else:
            params = self._suggest(trial)
            original = next((other for other in trials if self._is_original(other, trial)), None)
            if original is None and self.idle:
                self._train(trial, params)
            elif original is not None and original.state.is_finished():
                self._copy(original, trial)
            else:
                return
        self.pending.remove(trial)

    def _is_original(self, other: FrozenTrial, trial: optuna.Trial) -> bool:
        is_earlier = other.number < trial.number and "duplicate_of" not in other.user_attrs
        return is_earlier and other.params == trial.params

    def _suggest(self, trial: optuna.Trial) -> Params:
        if trial.user_attrs.get("owner") == self.owner and (known := trial.user_attrs.get("params")):
            return dict(known)
        trial.set_user_attr("owner", self.owner)
        try:
            params = self.space.suggest(trial)
        except StorageInternalError:
            raise
        except Exception as error:
            raise MNISTLitError(f"sampler: {type(error).__name__}: {' '.join(str(error).split())}") from error
        trial.set_user_attr("params", params)
        return params

    def _train(self, trial: optuna.Trial, params: Params) -> None:
        run_dir = self.settings.run_dir(trial.number)
        overrides = {**self.settings.overrides, **params, "num_threads": self.num_threads}
        trial.set_user_attr("overrides", overrides)
        trial.set_user_attr("run_dir", str(run_dir))
        overlay = write_overlay(self.settings, run_dir.name, overrides)
        args = [*trial_args(self.settings, overlay), f"--run_dir={run_dir}"]
        worker = self.idle.pop(0)
        # Pickled here, as the executor would do it in a thread while the study changes.
        future = worker.submit(train, self.program, args, self.settings.objectives, pickle.dumps(trial))
        self.running[future] = trial, worker

    def _copy(self, original: FrozenTrial, trial: optuna.Trial) -> None:
        for name in ("overrides", "run_dir"):
            if name in original.user_attrs:
                trial.set_user_attr(name, original.user_attrs[name])
        for step, value in original.intermediate_values.items():
            trial.report(value, step)
        trial.set_user_attr("duplicate_of", original.number)
        values = original.values if original.state == TrialState.COMPLETE else None
        self._tell(trial, Result(original.state, values, 0.0, original.user_attrs.get("error", "")))
        self._print(trial.number, f"the parameters of trial {original.number}, and its result")

    def _finish(self, future: Future[Result]) -> None:
        trial, worker = self.running[future]
        try:
            result = future.result()
        except BrokenProcessPool:
            result = Result(TrialState.WAITING, error="its worker died")
            fail_and_retry(self.study, trial.number, result.error, once=True)
        except UnknownMetricError as error:
            self._tell(trial, Result(TrialState.FAIL, error=str(error).splitlines()[0]))
            raise
        else:
            if result.state == TrialState.WAITING:
                fail_and_retry(self.study, trial.number, result.error)
            else:
                self._tell(trial, result)
        del self.running[future]
        self.idle.append(worker)
        self._show(trial.number, result)
        self._stop_if_all_failed()
        write_results(self.study, self.settings)

    def _tell(self, trial: optuna.Trial, result: Result) -> None:
        with contextlib.suppress(UpdateFinishedTrialError):  # another driver has failed it as stale
            if result.seconds is not None:
                trial.set_user_attr("seconds", result.seconds)
            if result.error:
                trial.set_user_attr("error", result.error)
            self.study.tell(trial, result.values, result.state, skip_if_finished=True)

    def _stop_if_all_failed(self) -> None:
        trials = [trial for trial in counted(self.study) if "duplicate_of" not in trial.user_attrs]
        has_succeeded = any(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials)
        first = trials[:NUM_FAILURES]
        if not has_succeeded and [trial.state for trial in first] == [TrialState.FAIL] * NUM_FAILURES:
            error = first[-1].user_attrs.get("error", "")
            raise MNISTLitError(f"the first {NUM_FAILURES} trials have failed, the last of them with:\n{error}")

    def _send_heartbeats(self) -> None:
        """Show other machines that this driver is alive, then fail the trials of those that are not."""
        if not isinstance(self.study.storage, RDBStorage) or time.monotonic() - self.last_heartbeat < HEARTBEAT:
            return
        own = {trial.number for trial in [*self.pending, *(trial for trial, _ in self.running.values())]}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # A trial whose driver died before its first heartbeat would never be stale: it gets one from here.
            if trial.number in own or trial.number not in self.foreign:
                self.study.storage.record_heartbeat(self.study.trial_id(trial.number))
                self.foreign.add(trial.number)
        fail_stale_trials(self.study)
        self.last_heartbeat = time.monotonic()

    def _retry_own(self, reason: str) -> None:
        """Enqueue again what a driver of this name was training."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if self.settings.storage is None or trial.user_attrs.get("owner") == self.owner:
                fail_and_retry(self.study, trial.number, reason)

    def _show(self, number: int, result: Result) -> None:
        if result.state == TrialState.COMPLETE:
            text = format_scores(self.settings, result.values or [])
        else:
            text = result.state.name.lower() if result.state == TrialState.PRUNED else f"failed: {result.error}"
        self._print(number, text if result.seconds is None else f"{text}, {result.seconds:.1f} s")
        self.bar.n = sum(trial.state.is_finished() for trial in counted(self.study))
        for best in ranked(self.study)[:1]:
            self.bar.set_postfix_str(f"best {format_scores(self.settings, best.values)} (trial {best.number})")

    def _print(self, number: int, text: str) -> None:
        if self.bar.disable:  # there is no terminal
            print(f"trial {number}: {text}", flush=True)
