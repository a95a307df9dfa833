"""The study of a search: where it is stored, what it is about, which of its trials count and which are lost."""

import contextlib
import itertools
import json
import re
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, BruteForceSampler, CmaEsSampler, GridSampler, QMCSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from mnist_lit.errors import UsageError
from mnist_lit.model.optim import accepted_parameters, instantiate
from mnist_lit.search.database import Database, open_database
from mnist_lit.search.journal import open_journal
from mnist_lit.search.settings import Settings
from mnist_lit.search.space import Space, flat

__all__ = ["Study", "open_study", "ranked", "set_aside"]

# What a trial says of itself, beside Optuna's record.
ABOUT = "about"  # of the study: its space, its objectives, and the configuration that its trials start from
OWNER = "owner"  # the lock file of the search that runs the trial
PULSE = "pulse"  # changes as long as that search is alive, for those who do not see its lock file
LOST = "lost"  # why the trial ended without a result
RETRY_OF = "retry_of"  # the lost trial whose parameters this one has
NUM_LOSSES = "num_losses"  # how many times workers have died of these parameters
VOID = "void"  # it never ran: killed before it had parameters, or begun by two searches when one more was wanted
COPY_OF = "copy_of"  # the trial that had the same parameters, and has given its result
PARAMS = "params"  # the values of the space's keys
OVERLAY = "overlay"  # all keys in which its configuration differs from the configs that the trials start from
SECONDS = "seconds"  # of training
ERROR = "error"  # why it failed
TRACEBACK = "traceback"
FIXED = "fixed_params"  # Optuna's, of a trial that was enqueued: what it is to have
CONFIRMED = "confirmed"  # of the study: confirmed/TRIAL/SEED is the score with that seed
LOCK = re.compile(r"\.search-\w+\.lock")
# Workers that may die of the same parameters.
MAX_LOSSES = 2
# Seconds without a pulse after which a search that cannot be seen is taken for dead; of a trial that nobody owns (its
# search was killed between two lines of this file) much fewer.
SILENCE = 60.0
SILENCE_WITHOUT_OWNER = 5.0
PULSE_SECONDS = 10.0


class Study(optuna.Study):
    """Optuna's study, shared by any number of searches at a time.

    Args:
        name: Its name.
        storage: Where it is.
        pruner: What stops hopeless trials, if anything.

    Attributes:
        is_exhausted: Whether the sampler has seen the whole of a finite space.
    """

    def __init__(self, name: str, storage: BaseStorage, pruner: BasePruner | None) -> None:
        super().__init__(name, storage, pruner=pruner or NopPruner())
        self.storage = storage
        self.is_exhausted = False

    def stop(self) -> None:
        """Samplers of finite spaces ask for it; Optuna's own works in `optimize` only."""
        self.is_exhausted = True

    @contextlib.contextmanager
    def joined(self, folder: Path) -> Iterator[None]:
        """Take part in the study as one of its searches, visible for others by a lock that dies with this process."""
        self.lock = FileLock(folder / f".search-{uuid4().hex[:8]}.lock")
        self.owner = str(Path(self.lock.lock_file).resolve())
        self.signs_of_life: dict[int, tuple[Any, float]] = {}
        self.last_pulse = 0.0
        self.own: set[int] = set()
        with self.lock:
            try:
                yield
            finally:
                # When the disk is full, a trial may get no end; the file tells the next search that it is nobody's.
                if not isinstance(sys.exception(), OSError):
                    Path(self.owner).unlink(missing_ok=True)

    def counted(self) -> list[FrozenTrial]:
        """The trials of which there are to be `n_trials`: for one that was lost and runs again, only the latter."""
        trials = self.get_trials(deepcopy=False)
        retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        return [
            trial
            for trial in trials
            if trial.state != TrialState.WAITING and trial.number not in retried and VOID not in trial.user_attrs
        ]

    def finished(self) -> list[FrozenTrial]:
        """The trials with a result, also if that is a failure."""
        return [trial for trial in self.counted() if trial.state.is_finished() and not self.runs_again(trial)]

    def has_all(self, limit: int) -> bool:
        """Whether the study has as many results as it is to have, or as there can be."""
        return len(self.finished()) >= limit or self._is_empty()

    def begin(self, limit: int) -> optuna.Trial | None:
        """The next trial of this search, if the study is to have one more."""
        if len(self.counted()) >= limit or self._is_empty():
            return None
        trial = self.ask()
        self.own.add(trial.number)
        self.note(trial.number, OWNER, self.owner)
        if [counted.number for counted in self.counted()].index(trial.number) < limit:
            return trial
        # Another search has begun one in the same moment.
        self._void(trial.number)
        return None

    def end(self, number: int, state: TrialState, scores: list[float] | None = None) -> bool:
        """Give a trial of this search its end; whether it had none yet."""
        self.own.discard(number)
        if self.get_trials(deepcopy=False)[number].state.is_finished():
            return False
        try:
            self.tell(number, scores, state)
        except UpdateFinishedTrialError:
            return False
        except KeyError:
            pass  # the grid sampler's, about a trial that was enqueued; the end has been written all the same
        return True

    def lose(self, number: int, reason: str, *, is_its_fault: bool) -> bool:
        """End a trial without a result.

        Args:
            number: The trial.
            reason: What has happened.
            is_its_fault: Whether its worker has died, maybe of the parameters: they run again only once then.

        Returns:
            Whether its parameters run again.
        """
        trial = self.get_trials(deepcopy=False)[number]
        if PARAMS not in trial.user_attrs and FIXED not in trial.system_attrs:
            self._void(number)
            return True
        num_losses = trial.user_attrs.get(NUM_LOSSES, 0) + is_its_fault
        self.note(number, NUM_LOSSES, num_losses)
        self.note(number, LOST, reason)
        # Of several searches that notice, the one that can still end the trial is the one that repeats it.
        if self.end(number, TrialState.FAIL) and num_losses < MAX_LOSSES:
            self._repeat(trial, num_losses)
        return bool(num_losses < MAX_LOSSES)

    def take_over(self) -> list[int]:
        """Let the trials of dead searches run again.

        Returns:
            Their numbers.
        """
        trials = self.get_trials(deepcopy=False)
        retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        abandoned = [trial for trial in trials if trial.number not in self.own and self._is_abandoned(trial, retried)]
        for trial in abandoned:
            if trial.state == TrialState.RUNNING:
                self.lose(trial.number, "its search has died", is_its_fault=False)
            else:
                self._repeat(trial, trial.user_attrs[NUM_LOSSES])
        return [trial.number for trial in abandoned]

    def runs_again(self, trial: FrozenTrial) -> bool:
        """Whether the trial was lost, and its parameters get another one."""
        attrs = trial.user_attrs
        return trial.state == TrialState.FAIL and LOST in attrs and attrs[NUM_LOSSES] < MAX_LOSSES

    def twin(self, trial: optuna.Trial) -> FrozenTrial | None:
        """An earlier trial with the same parameters, whose result is that of this one."""
        for other in self.counted():
            is_original = COPY_OF not in other.user_attrs and not self.runs_again(other)
            if other.number < trial.number and is_original and other.params == trial.params:
                return other
        return None

    def confirm(self, number: int, seed: int, score: float) -> None:
        """Note the score of a trial with another seed."""
        self.set_user_attr(f"{CONFIRMED}/{number}/{seed}", score)

    def confirmed(self) -> dict[int, dict[int, float]]:
        """The scores by trial and seed."""
        scores: dict[int, dict[int, float]] = {}
        for name, score in self.user_attrs.items():
            if name.startswith(f"{CONFIRMED}/"):
                _, number, seed = name.split("/")
                scores.setdefault(int(number), {})[int(seed)] = score
        return scores

    def pulse(self) -> None:
        """Show that this search is alive."""
        if time.monotonic() - self.last_pulse > PULSE_SECONDS:
            self.last_pulse = time.monotonic()
            for number in self.own:
                self.note(number, PULSE, uuid4().hex[:8])

    def note(self, number: int, name: str, value: Any) -> None:
        """Note something about a running trial, whoever runs it."""
        study_id = self.storage.get_study_id_from_name(self.study_name)
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(study_id, number)
        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial_id, name, value)

    def _void(self, number: int) -> None:
        self.note(number, VOID, value=True)
        self.end(number, TrialState.FAIL)

    def _repeat(self, trial: FrozenTrial, num_losses: int) -> None:
        params = {**trial.system_attrs.get(FIXED, {}), **trial.params}
        self.enqueue_trial(params, user_attrs={RETRY_OF: trial.number, NUM_LOSSES: num_losses})
        self.is_exhausted = False  # the last point of a grid counts when it was lost, too

    def _is_empty(self) -> bool:
        """Whether neither the sampler nor the queue of lost trials has anything more."""
        return self.is_exhausted and not self.get_trials(deepcopy=False, states=(TrialState.WAITING,))

    def _is_abandoned(self, trial: FrozenTrial, retried: Collection[int | None]) -> bool:
        """Whether its search has died, in the middle of it or between its end and its repetition."""
        if trial.state != TrialState.RUNNING and (not self.runs_again(trial) or trial.number in retried):
            return False
        owner = trial.user_attrs.get(OWNER)
        # A journal may be anybody's, and many a filelock empties the file that it tries.
        if owner is not None and LOCK.fullmatch(Path(owner).name) and Path(owner).exists():
            return not _is_held(Path(owner))
        sign = (owner, trial.user_attrs.get(PULSE))
        seen, since = self.signs_of_life.get(trial.number, (None, 0.0))
        if sign != seen:
            self.signs_of_life[trial.number] = sign, time.monotonic()
            return False
        if isinstance(self.storage, Database):
            since = max(since, self.storage.back_since)  # while it was away, nobody could show a sign
        return time.monotonic() - since > (SILENCE if owner else SILENCE_WITHOUT_OWNER)


def open_study(settings: Settings, about: Mapping[str, Any], space: Space) -> Study:
    """Make the study, or open it to go on.

    Args:
        settings: Those of the search.
        about: What makes trials comparable: space, objectives, and the configuration that they start from.
        space: What is searched.

    Raises:
        UsageError: If there is a study of that name about something else.
        MNISTLitError: If the storage cannot be used.
    """
    _sampler(settings, space, is_new=True)  # whatever is wrong with it is said before anything is written
    name, storage = str(settings.study_name), _storage(settings)
    about = json.loads(json.dumps(about))
    directions = [objective.direction for objective in settings.objectives]
    is_new = True
    try:
        optuna.create_study(study_name=name, storage=storage, directions=directions)
    except DuplicatedStudyError:
        is_new = False
    study = Study(name, storage, settings.pruner)
    theirs = study.user_attrs.get(ABOUT)
    if theirs is None:
        study.set_user_attr(ABOUT, about)
        study.set_metric_names(settings.metrics)
    elif theirs != about:
        if not any(
            trial.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING) for trial in study.trials
        ):
            # It has nothing to lose: a first attempt with a mistake in it.
            set_aside(settings)
            return open_study(settings, about, space)
        raise UsageError("\n".join([f"the study {name} is about something else", *_differences(theirs, about)]))
    study.sampler = _sampler(settings, space, is_new=is_new)
    return study


def set_aside(settings: Settings) -> None:
    """Rename an earlier study of that name and its directory: nothing is deleted.

    Raises:
        UsageError: If a search is at work on it.
    """
    folder, name = settings.folder, str(settings.study_name)
    if any(_is_held(lock) for lock in folder.glob(".search-*.lock")):
        raise UsageError(f"a search of {folder} is running\nstop it before --fresh")
    names = (f"{name}.{number}" for number in itertools.count(1))
    aside = next(other for other in names if not folder.with_name(other).exists())
    if folder.exists():
        folder.rename(folder.with_name(aside))
    if settings.storage is None:
        return
    storage = _storage(settings)
    with contextlib.suppress(KeyError):
        optuna.copy_study(from_study_name=name, from_storage=storage, to_storage=storage, to_study_name=aside)
        optuna.delete_study(study_name=name, storage=storage)


def _storage(settings: Settings) -> BaseStorage:
    return open_journal(settings.folder) if settings.storage is None else open_database(settings.storage)


def _sampler(settings: Settings, space: Space, *, is_new: bool) -> BaseSampler:
    factory = settings.sampler or TPESampler
    classes = getattr(factory, "args", ())
    seed = getattr(factory, "keywords", {}).get("seed")
    # A sampler that begins anew with its seed would propose its first points again, and so would several searches that
    # are started together. Of a sequence or a grid, whose order is that of the seed, Optuna keeps the place itself.
    is_ordered = QMCSampler in classes or GridSampler in classes
    if seed is not None and not is_new and not is_ordered:
        seed = int(np.random.SeedSequence((seed, uuid4().int)).generate_state(1)[0])
    filled_in: dict[str, Any] = {} if seed is None else {"seed": seed}
    if BruteForceSampler in classes or "search_space" in accepted_parameters(factory):
        filled_in["search_space"] = space.grid()
    if CmaEsSampler in classes and not find_spec("cmaes"):  # Optuna would miss it in the second trial
        raise UsageError("sampler: CmaEsSampler needs the package cmaes\npip install 'mnist_lit[samplers]'")
    try:
        sampler: BaseSampler = instantiate(factory, **filled_in)
    except (TypeError, ValueError) as error:
        raise UsageError(f"sampler: {error}") from error
    return sampler


def _is_held(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    theirs, ours = flat(theirs), flat(ours)
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    lines = [f"{name} was {_shown(theirs, name)}, is {_shown(ours, name)}" for name in names[:2]]
    more = f" ({len(names) - 2} more differ)" if len(names) > 2 else ""
    return [*lines, f"begin anew with --fresh, or give another --study_name{more}"]


def _shown(leaves: Mapping[str, Any], name: str) -> str:
    return json.dumps(leaves[name]) if name in leaves else "absent"


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """Sort the complete trials, the best first; with several objectives the Pareto front leads."""
    front = {trial.number for trial in study.best_trials} if len(study.directions) > 1 else set()
    sign = -1 if study.directions[0] == optuna.study.StudyDirection.MAXIMIZE else 1
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(complete, key=lambda trial: (trial.number not in front, sign * trial.values[0], trial.number))
