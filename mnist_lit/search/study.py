"""Open a study in its journal or database, and decide which of its trials count and which run again."""

import contextlib
import itertools
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages import RetryHeartbeatStaleTrialCallback as Retry
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError, SQLAlchemyError

from mnist_lit.class_paths import accepted_parameters, instantiate
from mnist_lit.errors import MNISTLitError, UsageError
from mnist_lit.formatting import flatten
from mnist_lit.search.settings import Settings, hide_password
from mnist_lit.search.space import Space
from mnist_lit.search.worker import DIED, Result

# Keys in which two starts of a search may differ: its trials stay comparable.
IGNORED = {"run_dir", "ckpt_path", "test_after_fit", "num_threads", "num_gpus", "csv", "report", "pictures"}
IGNORED |= {f"data.{name}" for name in ("data_dir", "download", "mirrors", "timeout", "num_workers", "pin_memory")}
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
        """Tell how a trial has ended; if it is to run again, enqueue its parameters and fail it."""
        state = result.state
        if state == TrialState.WAITING:
            trials, state = self.get_trials(deepcopy=False), TrialState.FAIL
            is_counted = any(trial.number == number for trial in counted(self))
            earlier = [trials[retried].user_attrs.get("error") for retried in Retry.retry_history(trials[number])]
            # The parameters may be the cause of a death, but not of a stop. First the retry: should this process die
            # in between, nothing is lost, and `counted` sees the retry.
            if is_counted and (result.error != DIED or DIED not in earlier):
                Retry()(self, trials[number])
        with contextlib.suppress(UpdateFinishedTrialError):  # another driver has failed it as stale
            for name, value in {"seconds": result.seconds, "error": result.error or None}.items():
                if value is not None:
                    self.storage.set_trial_user_attr(self.trial_id(number), name, value)
            self.tell(number, result.values, state, skip_if_finished=True)

    def trial_id(self, number: int) -> int:
        """Return the key of a trial in the storage."""
        study_id = self.storage.get_study_id_from_name(self.study_name)
        return self.storage.get_trial_id_from_study_id_trial_number(study_id, number)


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """List the trials that `n_trials` counts: begun, and of retried ones only the retry."""
    trials = study.get_trials(deepcopy=False)
    skipped = {number for trial in trials for number in Retry.retry_history(trial)}
    return [trial for trial in trials if trial.state != TrialState.WAITING and trial.number not in skipped]


def sign_of(study: optuna.Study, index: int = 0) -> int:
    """Return 1 where more of an objective is better, else -1."""
    return 1 if study.directions[index] == optuna.study.StudyDirection.MAXIMIZE else -1


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """List the complete trials without duplicates: the Pareto front first, then by the first objective."""
    front = {trial.number for trial in study.best_trials}
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    originals = [trial for trial in complete if "duplicate_of" not in trial.user_attrs]
    sign = sign_of(study)
    return sorted(originals, key=lambda trial: (trial.number not in front, -sign * trial.values[0], trial.number))


def open_study(settings: Settings, space: Space, base: Mapping[str, Any], *, fresh: bool) -> Study:
    """Make a study, or load it to go on; `base` is the configuration that its trials start from."""
    name, sampler = str(settings.study_name), _sampler(settings, space)
    objectives = [asdict(objective) for objective in settings.objectives]
    comparable = {key: value for key, value in flatten(base).items() if not IGNORED & {key, key.split(".")[0]}}
    about = json.loads(json.dumps({"space": settings.space, "objective": objectives, "base": comparable}))
    if fresh:
        _archive(settings)
    settings.folder.mkdir(parents=True, exist_ok=True)
    storage = open_storage(settings)
    try:
        optuna.create_study(study_name=name, storage=storage, directions=[one.direction for one in settings.objectives])
    except DuplicatedStudyError:
        sampler.reseed_rng()  # or it would propose its first points again
    study = Study(name, storage, sampler, settings.pruner or optuna.pruners.NopPruner())
    study.storage = storage
    old, new = flatten(study.user_attrs.get("about", about)), flatten(about)
    if key := next((key for key in {**old, **new} if old.get(key) != new.get(key)), None):
        if all(trial.state in (TrialState.FAIL, TrialState.WAITING) for trial in study.trials):
            return open_study(settings, space, base, fresh=True)  # a first attempt that had a mistake
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
    # Without its grid, a brute-force sampler would find out in the middle of a search that a space is infinite.
    needs_grid = {"search_space", "avoid_premature_stop"} & accepted_parameters(settings.sampler)
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
        hint = "pip install 'mnist_lit[postgresql]'" if isinstance(error, ImportError) and "postgresql" in url else ""
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
