"""Open a study in its journal or database, and decide which of its trials count and which run again."""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.pruners import NopPruner
from optuna.samplers import BaseSampler, BruteForceSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages import RetryHeartbeatStaleTrialCallback as Retry
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError, SQLAlchemyError

from mnist_lit.class_paths import accepted_parameters, instantiate
from mnist_lit.errors import MNISTLitError, UsageError
from mnist_lit.formatting import flatten
from mnist_lit.search.settings import Settings, hide_password
from mnist_lit.search.space import Space
from mnist_lit.search.worker import Result

HEARTBEAT, GRACE_PERIOD = 10, 60  # seconds between two heartbeats, seconds without one after which a trial is stale
# On a cut network, a client would wait a quarter of an hour for each answer, and a server would keep the locks of a
# client that is gone for two hours. The first three are for the client, the others for the server.
POSTGRESQL = {
    "connect_timeout": "10",
    "tcp_user_timeout": "20000",
    "keepalives_idle": "10",
    "options": "-c idle_in_transaction_session_timeout=30s -c tcp_user_timeout=20s -c tcp_keepalives_idle=10",
}


class Study(optuna.Study):
    """Runs trials by ask and tell."""

    storage: BaseStorage

    def stop(self) -> None:
        """Note that the sampler has proposed all points; Optuna's method works in `optimize` only."""
        self.set_user_attr("exhausted", type(self.sampler).__name__)  # also for later starts

    def finish(self, number: int, result: Result) -> None:
        """Tell how a trial has ended, unless another driver has failed it as stale."""
        with contextlib.suppress(UpdateFinishedTrialError):
            for name, value in {"seconds": result.seconds, "error": result.error or None}.items():
                if value is not None:
                    self.storage.set_trial_user_attr(self.trial_id(number), name, value)
            self.tell(number, result.values, result.state, skip_if_finished=True)

    def trial_id(self, number: int) -> int:
        """Return the key of a trial in the storage."""
        study_id = self.storage.get_study_id_from_name(self.study_name)
        return self.storage.get_trial_id_from_study_id_trial_number(study_id, number)


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """List the trials that `n_trials` counts: begun, and of retried ones only the retry."""
    trials = study.get_trials(deepcopy=False)
    skipped = {number for trial in trials for number in Retry.retry_history(trial)}
    return [trial for trial in trials if trial.state != TrialState.WAITING and trial.number not in skipped]


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """List the complete trials without duplicates: the Pareto front first, then by the first objective."""
    front = {trial.number for trial in study.best_trials} if len(study.directions) > 1 else set()
    sign = -1 if study.directions[0] == StudyDirection.MAXIMIZE else 1
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    originals = [trial for trial in complete if "duplicate_of" not in trial.user_attrs]
    return sorted(originals, key=lambda trial: (trial.number not in front, sign * trial.values[0], trial.number))


def fail_and_retry(study: Study, number: int, reason: str, *, max_retries: int | None = None) -> None:
    """Fail a trial whose process is gone, and enqueue its parameters again, for the same reason `max_retries` times."""
    trials = study.get_trials(deepcopy=False)
    is_counted = any(trial.number == number for trial in counted(study))
    earlier = [trials[retried].user_attrs.get("error") for retried in Retry.retry_history(trials[number])]
    # First the retry: should this process die in between, nothing is lost, and `counted` sees the retry.
    if is_counted and (max_retries is None or earlier.count(reason) < max_retries):
        Retry()(study, trials[number])
    study.finish(number, Result(TrialState.FAIL, error=reason))


def open_study(settings: Settings, space: Space, about: Mapping[str, Any], *, fresh: bool) -> Study:
    """Make a study, or load it to go on; `about` is what makes its trials comparable."""
    sampler, about = _sampler(settings, space), json.loads(json.dumps(about))
    name, directions = str(settings.study_name), [objective.direction for objective in settings.objectives]
    if fresh:
        _archive(settings)
    settings.folder.mkdir(parents=True, exist_ok=True)
    storage = open_storage(settings)
    try:
        optuna.create_study(study_name=name, storage=storage, directions=directions)
    except DuplicatedStudyError:
        sampler.reseed_rng()  # or it would propose its first points again
    study = Study(name, storage, sampler, settings.pruner or NopPruner())
    study.storage = storage
    earlier = study.user_attrs.get("about", about)
    if earlier != about:
        if all(trial.state in (TrialState.FAIL, TrialState.WAITING) for trial in study.trials):
            return open_study(settings, space, about, fresh=True)  # a first attempt that had a mistake
        old, new = flatten(earlier), flatten(about)
        key = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        difference = f"{key} was {json.dumps(old.get(key, 'absent'))}, is {json.dumps(new.get(key, 'absent'))}"
        hint = "begin anew with --fresh, or give another --study_name"
        raise UsageError(f"the study {name} is about something else\n{difference}\n{hint}")
    study.set_user_attr("about", about)
    study.set_metric_names(settings.metrics)
    return study


def _archive(settings: Settings) -> None:
    """Rename an earlier study and its directory."""
    folder, name = settings.folder, str(settings.study_name)
    storage = None if settings.storage is None else open_storage(settings)
    studies = [] if storage is None else optuna.get_all_study_names(storage)
    names = (f"{name}.{number}" for number in itertools.count(1))
    archive = next(other for other in names if not folder.with_name(other).exists() and other not in studies)
    if folder.exists():
        folder.rename(folder.with_name(archive))
    if storage is not None and name in studies:
        optuna.copy_study(from_study_name=name, from_storage=storage, to_storage=storage, to_study_name=archive)
        optuna.delete_study(study_name=name, storage=storage)


def _sampler(settings: Settings, space: Space) -> BaseSampler:
    # The parser makes a partial function of a class path. Without its grid, a brute-force sampler would find out in the
    # middle of a search that a space is infinite.
    is_brute_force = BruteForceSampler in getattr(settings.sampler, "args", ())
    needs_grid = is_brute_force or "search_space" in accepted_parameters(settings.sampler)
    try:
        sampler: BaseSampler = instantiate(settings.sampler, **{"search_space": space.grid()} if needs_grid else {})
    except (ImportError, TypeError, ValueError) as error:
        raise UsageError(f"sampler: {error}") from error
    return sampler


class JournalLock(JournalFileOpenLock):
    """Locks a journal for writing; unlike Optuna's own locks, it ends with the process that holds it."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal

    def acquire(self) -> bool:
        self.lock = FileLock(self.journal.with_name(".journal.lock"))
        self.lock.acquire()
        with self.journal.open("r+b") as file:
            file.seek(-min(1, file.seek(0, os.SEEK_END)), os.SEEK_END)
            if file.read() not in (b"", b"\n"):  # cut off by a full disk or a kill: the next line would be joined to it
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self.lock.release()
        del self.lock  # which cannot be pickled


def open_storage(settings: Settings) -> BaseStorage:
    """Open the journal or the database of a study, and make what is not there."""
    if settings.storage is None:
        journal = settings.folder / "study.journal"
        return JournalStorage(JournalFileBackend(str(journal), lock_obj=JournalLock(journal)))
    url = hide_password(settings.storage)
    try:
        return open_database(settings.storage)
    except (ArgumentError, ImportError) as error:
        needs_extra = isinstance(error, ImportError) and url.startswith("postgresql")
        hint = "pip install 'mnist_lit[postgresql]'" if needs_extra else ""
        raise UsageError(f"storage: {url} cannot be used: {error}\n{hint}") from error
    except SQLAlchemyError as error:
        raise MNISTLitError(f"storage: {url} cannot be used: {reason_of(error)}") from error


def open_database(url: str) -> RDBStorage:
    """Open a database, and make Optuna's tables where there are none."""
    backend, given = make_url(url).get_backend_name(), make_url(url).query
    defaults: dict[str, Any] = {"postgresql": POSTGRESQL, "sqlite": {"timeout": 60}}
    args = {name: value for name, value in defaults.get(backend, {}).items() if name not in given}
    kwargs: dict[str, Any] = {"heartbeat_interval": HEARTBEAT, "grace_period": GRACE_PERIOD}
    kwargs["heartbeat_stale_trial_callback"] = Retry()
    kwargs["engine_kwargs"] = {"connect_args": args, "pool_pre_ping": True}
    try:
        return RDBStorage(url, **kwargs)
    except (IntegrityError, ProgrammingError):  # another driver has made the tables in the same moment
        time.sleep(3)
        return RDBStorage(url, **kwargs)


def reason_of(error: BaseException) -> str:
    """Return the first line of the message of a database."""
    cause = error.__cause__ or error  # Optuna's errors have SQLAlchemy's as cause, and these the driver's
    return str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
