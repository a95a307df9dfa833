"""Open the storage of a study: a journal on a disk that may be full, or a database that may be away."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from filelock import FileLock
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy import Dialect, event, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, ProgrammingError, SQLAlchemyError

from mnist_lit.errors import MNISTLitError, UsageError
from mnist_lit.search.settings import Settings, hide_password
from mnist_lit.signals import raise_if_stopped

# Seconds between two heartbeats, seconds without one after which a trial is stale, and seconds to wait for a database.
HEARTBEAT, GRACE_PERIOD, PATIENCE = 10, 60, 600
# On a cut network, a client would wait a quarter of an hour for each answer, and a server would keep the locks of a
# client that is gone for two hours. The first three are for the client, the others for the server.
POSTGRESQL = {
    "connect_timeout": "10",
    "tcp_user_timeout": "20000",
    "keepalives_idle": "10",
    "options": "-c idle_in_transaction_session_timeout=30s -c tcp_user_timeout=20s -c tcp_keepalives_idle=10",
}


class DatabaseGoneError(MNISTLitError):
    """Report that a database has been waited for long enough."""


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
        text = f"storage: {url} needs a driver that is not installed\npip install 'mnist_lit[postgresql]'"
        raise UsageError(text) from error
    except SQLAlchemyError as error:
        raise MNISTLitError(f"storage: {url} cannot be used: {_reason(error)}") from error


def open_database(url: str) -> RDBStorage:
    """Open a database, and make Optuna's tables where there are none; one that is away now is not waited for."""
    backend, given = make_url(url).get_backend_name(), make_url(url).query
    defaults: dict[str, Any] = {"postgresql": POSTGRESQL, "sqlite": {"timeout": 60}}
    args = {name: value for name, value in defaults.get(backend, {}).items() if name not in given}
    kwargs: dict[str, Any] = {"heartbeat_interval": HEARTBEAT, "grace_period": GRACE_PERIOD}
    kwargs["heartbeat_stale_trial_callback"] = RetryHeartbeatStaleTrialCallback()
    kwargs["engine_kwargs"] = {"connect_args": args, "pool_pre_ping": True}
    try:
        storage = RDBStorage(url, **kwargs)
    except (IntegrityError, ProgrammingError):  # another driver has made the tables in the same moment
        time.sleep(3)
        storage = RDBStorage(url, **kwargs)
    if backend != "sqlite":
        event.listen(storage.engine, "do_connect", _wait_for_database)
    return storage


def _wait_for_database(dialect: Dialect, _record: Any, args: Any, kwargs: Any) -> Any:
    """Connect to a database, and wait for it while it is away."""
    deadline, is_waiting = time.monotonic() + PATIENCE, False
    while True:
        try:
            return dialect.connect(*args, **kwargs)
        except dialect.loaded_dbapi.OperationalError as error:
            if time.monotonic() > deadline:
                reason = f"storage: the database does not come back: {_reason(error)}"
                raise DatabaseGoneError(f"{reason}\nwhat was done is kept; the same command goes on") from error
            if not is_waiting:
                print(f"waiting for the database: {_reason(error)}", file=sys.stderr, flush=True)
        is_waiting = True
        raise_if_stopped()
        time.sleep(1)


def _reason(error: BaseException) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]
