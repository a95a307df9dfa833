"""The search at work: proposes trials, hands them to workers, judges them on the way, records how they end."""

import math
import shutil
import time
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from mnist_lit.errors import MNISTLitError, UsageError
from mnist_lit.search.progress import Progress
from mnist_lit.search.results import ranked, shown_score, write_results
from mnist_lit.search.settings import Settings
from mnist_lit.search.space import Space
from mnist_lit.search.study import COPY_OF, ERROR, LOST, OVERLAY, PARAMS, SECONDS, TRACEBACK, Study
from mnist_lit.search.trial import Outcome, Rehearsed, training
from mnist_lit.search.workers import Died, Pool, Report, Worker
from mnist_lit.signals import defer_signals, raise_if_stopped

__all__ = ["Driver"]

SECONDS_BETWEEN_WRITES = 5.0
# As many trials that fail, and nothing else before them, are no bad luck.
NUM_FAILURES = 3


class Driver:
    """One of the searches of a study.

    Args:
        settings: What it is asked to do.
        study: What it adds trials to.
        space: What the trials vary.
        base: What they start from.
        pool: Who trains them.
    """

    def __init__(self, settings: Settings, study: Study, space: Space, base: Rehearsed, pool: Pool) -> None:
        self.settings = settings
        self.study = study
        self.space = space
        self.base = base
        self.pool = pool
        self.num_threads = max(1, base.num_threads // settings.workers)
        self.deadline = time.monotonic() + (settings.timeout or math.inf)
        self.running: set[int] = set()
        self.twins: list[optuna.Trial] = []  # they wait for the trial that has their parameters
        self.states: list[TrialState] = []
        self.written = 0.0

    def run(self) -> None:
        """Run trials until the study has enough of them, or time is up.

        Raises:
            MNISTLitError: If no trial can succeed.
        """
        with Progress(self.settings.n_trials, "trial", len(self.study.finished())) as self.progress:
            try:
                self._work()
            except BaseException:
                with defer_signals():
                    self._give_up()
                raise
            finally:
                self._forget_the_lost()
                write_results(self.study, self.settings)

    def _work(self) -> None:
        while True:
            with defer_signals():
                self._look_after_the_study()
                if self._is_over():
                    return
                self._hand_out()
            messages = list(self.pool.messages(timeout=1.0))
            raise_if_stopped()
            with defer_signals():
                for worker, trial, message in messages:
                    self._take(worker, trial, message)
                self._show()

    def _give_up(self) -> None:
        self.pool.kill()  # or they would write into directories that are deleted
        for number in sorted(self.study.own):
            self.study.lose(number, "the search was stopped", is_its_fault=False)

    def _is_over(self) -> bool:
        if self.running or self.twins:
            return False
        return self._is_late() or self.study.has_all(self.settings.n_trials)

    def _is_late(self) -> bool:
        return time.monotonic() >= self.deadline

    def _look_after_the_study(self) -> None:
        self.study.pulse()
        for number in self.study.take_over():
            self.progress.say(f"trial {number}: its search has died; its parameters run again")

    def _hand_out(self) -> None:
        for worker in self.pool.idle(self.settings.workers):
            if (trial := self._next()) is None:
                return
            self.running.add(trial.number)
            overlay = {**self.settings.overrides, **trial.user_attrs[PARAMS], "num_threads": self.num_threads}
            self.study.note(trial.number, OVERLAY, overlay)
            worker.start(training(self.settings, overlay, f"trials/{trial.number:04d}"), trial)

    def _next(self) -> optuna.Trial | None:
        """The next trial that has to be trained."""
        waiting, self.twins = self.twins, []
        for place, twin in enumerate(waiting):
            if self._is_original(twin):
                self.twins += waiting[place + 1 :]
                return twin
        while not self._is_late() and (trial := self.study.begin(self.settings.n_trials)):
            self._draw(trial)
            if self._is_original(trial):
                return trial
        return None

    def _draw(self, trial: optuna.Trial) -> None:
        try:
            params = self.space.draw(trial, self.base.config)
        except Exception as error:
            hint = "\npip install 'mnist_lit[samplers]'" if isinstance(error, ImportError) else ""
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise MNISTLitError(f"sampler: {reason}{hint}") from error
        trial.set_user_attr(PARAMS, params)

    def _is_original(self, trial: optuna.Trial) -> bool:
        """Whether the trial has parameters of its own; if not, it gets the result of the other, now or later."""
        twin = self.study.twin(trial)
        if twin is None:
            return True
        if twin.state.is_finished():
            self._copy(twin, trial)
        else:
            self.twins.append(trial)
        return False

    def _copy(self, twin: FrozenTrial, trial: optuna.Trial) -> None:
        self.study.note(trial.number, COPY_OF, twin.number)
        for name in (OVERLAY, ERROR, TRACEBACK):
            if name in twin.user_attrs:
                self.study.note(trial.number, name, twin.user_attrs[name])
        if LOST in twin.user_attrs and twin.state == TrialState.FAIL:
            self.study.note(trial.number, ERROR, twin.user_attrs[LOST])
        for step, score in twin.intermediate_values.items():
            trial.report(score, step)
        self.study.end(trial.number, twin.state, twin.values if twin.state == TrialState.COMPLETE else None)
        self.progress.say(f"trial {trial.number}: the parameters of trial {twin.number}, and its result")

    def _take(self, worker: Worker, trial: optuna.Trial, message: Any) -> None:
        if isinstance(message, Report):
            worker.answer(is_hopeless=self._judge(trial, message))
            return
        self.running.remove(trial.number)
        if isinstance(message, Outcome):
            self._finish(trial, message)
            return
        is_its_fault = isinstance(message, Died)
        reason = message.reason if isinstance(message, Died) else str(message)
        self.progress.say(f"trial {trial.number}: {reason}")
        runs_again = self.study.lose(trial.number, reason, is_its_fault=is_its_fault)
        if not runs_again:
            self._stop_if_hopeless(TrialState.FAIL, reason)

    def _judge(self, trial: optuna.Trial, report: Report) -> bool:
        """Whether the trial is hopeless."""
        if len(self.study.directions) > 1 or not report.scores or math.isnan(report.scores[0]):
            return False
        try:
            trial.report(report.scores[0], report.step)
        except UpdateFinishedTrialError:
            return True  # another search has taken this one for dead
        return trial.should_prune()

    def _finish(self, trial: optuna.Trial, outcome: Outcome) -> None:
        if outcome.is_disk_full:
            raise MNISTLitError(outcome.error)  # the trial runs again when the search goes on
        self.study.note(trial.number, SECONDS, outcome.seconds)
        state, scores = TrialState.FAIL, None
        if outcome.error:
            self.study.note(trial.number, ERROR, outcome.error.splitlines()[0])
            self.study.note(trial.number, TRACEBACK, outcome.traceback)
        elif outcome.is_pruned:
            state = TrialState.PRUNED
        else:
            state, scores = TrialState.COMPLETE, outcome.scores
        self.study.end(trial.number, state, scores)
        self._say_how(trial, outcome)
        if outcome.is_hopeless:
            raise UsageError(outcome.error)
        self._stop_if_hopeless(state, outcome.error)
        if time.monotonic() - self.written > SECONDS_BETWEEN_WRITES:
            write_results(self.study, self.settings)
            self.written = time.monotonic()

    def _stop_if_hopeless(self, state: TrialState, error: str) -> None:
        self.states.append(state)
        if self.states == [TrialState.FAIL] * NUM_FAILURES:
            raise MNISTLitError(f"the first {NUM_FAILURES} trials have failed, the last of them with:\n{error}")

    def _forget_the_lost(self) -> None:
        """Trials that run again have begun anew, each in a directory of its own."""
        for trial in self.study.get_trials(deepcopy=False):
            if self.study.runs_again(trial):
                shutil.rmtree(self.settings.run_dir(trial.number), ignore_errors=True)

    def _say_how(self, trial: optuna.Trial, outcome: Outcome) -> None:
        scores = [
            f"{metric} {shown_score(metric, score)}"
            for metric, score in zip(self.settings.metrics, outcome.scores or [], strict=False)
        ]
        how = "failed: " + outcome.error.splitlines()[0] if outcome.error else ", ".join(scores)
        self.progress.say(
            f"trial {trial.number}: {how}{' (pruned)' if outcome.is_pruned else ''}, {outcome.seconds:.1f} s"
        )

    def _show(self) -> None:
        finished = self.study.finished()
        num_pruned, num_failed = (
            sum(trial.state == state for trial in finished) for state in (TrialState.PRUNED, TrialState.FAIL)
        )
        best = ranked(self.study)[:1]
        metric = self.settings.metrics[0]
        facts: dict[str, Any] = {"pruned": num_pruned, "failed": num_failed, "running": len(self.running)}
        if best:
            facts[f"best {metric}"] = f"{shown_score(metric, best[0].values[0])} (trial {best[0].number})"
        self.progress.show(len(finished), **facts)
