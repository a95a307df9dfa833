"""The search at work: proposes trials, hands them to workers, judges them on the way, records how they end."""

import math
import shutil
import time
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from mnist_lit.errors import MNISTLitError, UsageError
from mnist_lit.progress import Progress
from mnist_lit.results import ranked, shown_score, write_results
from mnist_lit.settings import Settings
from mnist_lit.space import Space
from mnist_lit.study import COPY_OF, ERROR, OVERLAY, PARAMS, SECONDS, TRACEBACK, Study
from mnist_lit.trial import Outcome, Rehearsed, training
from mnist_lit.workers import Died, Pool, Report, Worker

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
        self.running: dict[int, optuna.Trial] = {}
        self.twins: list[optuna.Trial] = []  # they wait for the trial that has their parameters
        self.states: list[TrialState] = []
        self.written = 0.0

    def run(self) -> None:
        """Run trials until the study has enough of them, or time is up.

        Raises:
            MNISTLitError: If no trial can succeed.
        """
        self.progress = Progress(self.settings.n_trials, "trial")
        try:
            while not self._is_over():
                self._look_after_the_study()
                self._hand_out()
                for worker, trial, message in self.pool.messages(timeout=1.0):
                    self._take(worker, trial, message)
                self._show()
        except BaseException:
            for trial in [*self.running.values(), *self.twins]:
                self.study.lose(trial.number, "the search was stopped", is_its_fault=False)
                self._forget(trial)
            raise
        finally:
            self.progress.close()
            write_results(self.study, self.settings)

    def _is_over(self) -> bool:
        if self.running or self.twins:
            return False
        return not self._may_begin() or len(self.study.finished()) >= self.settings.n_trials

    def _may_begin(self) -> bool:
        return time.monotonic() < self.deadline and not self.study.is_exhausted

    def _look_after_the_study(self) -> None:
        self.study.pulse()
        for number in self.study.take_over():
            self.progress.say(f"trial {number}: its search has died; its parameters run again")

    def _hand_out(self) -> None:
        for worker in self.pool.idle(self.settings.workers):
            if (trial := self._next()) is None:
                return
            self.running[trial.number] = trial
            overlay = {**self.settings.overrides, **trial.user_attrs[PARAMS], "num_threads": self.num_threads}
            trial.set_user_attr(OVERLAY, overlay)
            worker.start(training(self.settings, overlay, f"trials/{trial.number:04d}"), trial)

    def _next(self) -> optuna.Trial | None:
        """The next trial that has to be trained."""
        for twin in list(self.twins):
            if self._is_original(twin):
                self.twins.remove(twin)
                return twin
        while self._may_begin() and (trial := self.study.begin(self.settings.n_trials)):
            self._draw(trial)
            if self._is_original(trial):
                return trial
        return None

    def _draw(self, trial: optuna.Trial) -> None:
        try:
            trial.set_user_attr(PARAMS, self.space.draw(trial, self.base.config))
        except Exception as error:
            self.study.lose(trial.number, "its sampler failed", is_its_fault=False)
            hint = "\npip install 'mnist_lit[samplers]'" if isinstance(error, ImportError) else ""
            raise MNISTLitError(f"sampler: {type(error).__name__}: {str(error).splitlines()[0]}{hint}") from error

    def _is_original(self, trial: optuna.Trial) -> bool:
        """Whether the trial has parameters of its own; if not, it gets the result of the other, now or later."""
        twin = self.study.twin(trial)
        if twin is None:
            return True
        if not twin.state.is_finished():
            if trial not in self.twins:
                self.twins.append(trial)
            return False
        if trial in self.twins:
            self.twins.remove(trial)
        trial.set_user_attr(COPY_OF, twin.number)
        trial.set_user_attr(OVERLAY, twin.user_attrs.get(OVERLAY, {}))
        for name in (ERROR, TRACEBACK):
            if name in twin.user_attrs:
                trial.set_user_attr(name, twin.user_attrs[name])
        for step, score in twin.intermediate_values.items():
            trial.report(score, step)
        self.study.end(trial.number, twin.state, twin.values if twin.state == TrialState.COMPLETE else None)
        self.progress.say(f"trial {trial.number}: the parameters of trial {twin.number}, and its result")
        return False

    def _take(self, worker: Worker, trial: optuna.Trial, message: Any) -> None:
        if isinstance(message, Report):
            worker.answer(is_hopeless=self._judge(trial, message))
            return
        del self.running[trial.number]
        if isinstance(message, Outcome):
            self._finish(trial, message)
            return
        reason = message.reason if isinstance(message, Died) else str(message)
        self.study.lose(trial.number, reason, is_its_fault=isinstance(message, Died))
        self._forget(trial)
        self.progress.say(f"trial {trial.number}: {reason}")

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
        self.study.set_trial_attr(trial.number, SECONDS, outcome.seconds)
        state, scores = TrialState.FAIL, None
        if outcome.error:
            self.study.set_trial_attr(trial.number, ERROR, outcome.error.splitlines()[0])
            self.study.set_trial_attr(trial.number, TRACEBACK, outcome.traceback)
        elif outcome.is_pruned:
            state = TrialState.PRUNED
        else:
            state, scores = TrialState.COMPLETE, outcome.scores
        self.study.end(trial.number, state, scores)
        self.states.append(state)
        self._say_how(trial, outcome)
        self._stop_if_hopeless(outcome)
        if time.monotonic() - self.written > SECONDS_BETWEEN_WRITES:
            write_results(self.study, self.settings)
            self.written = time.monotonic()

    def _stop_if_hopeless(self, outcome: Outcome) -> None:
        if outcome.is_hopeless:
            raise UsageError(outcome.error)
        if self.states == [TrialState.FAIL] * NUM_FAILURES:
            raise MNISTLitError(f"the first {NUM_FAILURES} trials have failed, the last of them with:\n{outcome.error}")

    def _forget(self, trial: optuna.Trial) -> None:
        """A lost trial runs again from its beginning, in a directory of its own."""
        shutil.rmtree(self.settings.run_dir(trial.number), ignore_errors=True)

    def _say_how(self, trial: optuna.Trial, outcome: Outcome) -> None:
        metrics = [objective.metric for objective in self.settings.objectives]
        scores = [
            f"{metric} {shown_score(metric, score)}"
            for metric, score in zip(metrics, outcome.scores or [], strict=False)
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
        metric = self.settings.objectives[0].metric
        facts: dict[str, Any] = {"pruned": num_pruned, "failed": num_failed, "running": len(self.running)}
        if best:
            facts[f"best {metric}"] = f"{shown_score(metric, best[0].values[0])} (trial {best[0].number})"
        self.progress.show(len(finished), **facts)
