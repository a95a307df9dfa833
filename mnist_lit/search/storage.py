"""Open the storage of a study: a journal on a disk that may be full, or a database on a network."""

import os
import time
from pathlib import Path
from typing import Any

from filelock import FileLock
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, ProgrammingError, SQLAlchemyError

from mnist_lit.errors import MNISTLitError, UsageError
from mnist_lit.search.settings import Settings, hide_password

HEARTBEAT, GRACE_PERIOD = 10, 60  # seconds between two heartbeats, seconds without one after which a trial is stale
# On a cut network, a client would wait a quarter of an hour for each answer, and a server would keep the locks of a
# client that is gone for two hours. The first three are for the client, the others for the server.
POSTGRESQL = {
    "connect_timeout": "10",
    "tcp_user_timeout": "20000",
    "keepalives_idle": "10",
    "options": "-c idle_in_transaction_session_timeout=30s -c tcp_user_timeout=20s -c tcp_keepalives_idle=10",
}


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
    except (ArgumentError, NoSuchModuleError) as error:
        raise UsageError(f"storage: {url} is no URL of a database: {error}") from error
    except ImportError as error:
        hint = "pip install 'mnist_lit[postgresql]'" if url.startswith("postgresql") else ""
        raise UsageError(f"storage: {url} needs a driver that is not installed: {error}\n{hint}") from error
    except SQLAlchemyError as error:
        raise MNISTLitError(f"storage: {url} cannot be used: {reason_of(error)}") from error


def open_database(url: str) -> RDBStorage:
    """Open a database, and make Optuna's tables where there are none."""
    backend, given = make_url(url).get_backend_name(), make_url(url).query
    defaults: dict[str, Any] = {"postgresql": POSTGRESQL, "sqlite": {"timeout": 60}}
    args = {name: value for name, value in defaults.get(backend, {}).items() if name not in given}
    kwargs: dict[str, Any] = {"heartbeat_interval": HEARTBEAT, "grace_period": GRACE_PERIOD}
    kwargs["heartbeat_stale_trial_callback"] = RetryHeartbeatStaleTrialCallback()
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
