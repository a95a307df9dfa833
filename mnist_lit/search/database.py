"""A study in a database, which is waited for while it is away, and which waits for nobody who is gone."""

import functools
import inspect
import sys
import time
from collections.abc import Callable
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import make_url
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    PendingRollbackError,
    ProgrammingError,
    SQLAlchemyError,
)
from tqdm import tqdm

from mnist_lit.errors import MNISTLitError, UsageError
from mnist_lit.search.settings import without_password
from mnist_lit.signals import raise_if_stopped

__all__ = ["Database", "open_database"]

# Seconds that a database may be away, and seconds between two tries.
PATIENCE = 600.0
PAUSE = 1.0
AWAY = (InterfaceError, OperationalError, PendingRollbackError)
# A cut network says nothing. Without these, a client waits a quarter of an hour for each answer, and what a client that
# is gone had locked stays locked for two hours. The first three are the client's, the others the server's.
POSTGRESQL = {
    "connect_timeout": "10",
    "tcp_user_timeout": "20000",
    "keepalives_idle": "10",
    "options": "-c idle_in_transaction_session_timeout=30s -c tcp_user_timeout=20s -c tcp_keepalives_idle=10",
}


class Database(RDBStorage):
    """Optuna's storage, which waits while the database is away.

    Each call is one transaction and is made again as a whole. Should the first have been committed after all, in the
    moment in which the connection was lost, then a trial may have been begun twice; one of them has no owner, and the
    study takes it for lost.

    Attributes:
        back_since: When it last came back, in seconds of the monotonic clock.
        patience: Seconds for which it is waited for.
    """

    back_since = 0.0
    patience = PATIENCE

    def wait(self, cause: BaseException, until: float) -> None:
        """Wait until the database answers again.

        Args:
            cause: The error that its absence has made.
            until: When it is given up, in seconds of the monotonic clock.

        Raises:
            MNISTLitError: If it does not come back.
            Stopped: If the search is asked to end.
        """
        tqdm.write(f"waiting for the database: {_reason(cause)}", file=sys.stderr)
        while True:
            raise_if_stopped()
            if time.monotonic() > until:
                self.patience = 0.0  # the end of a search does not wait once more
                raise MNISTLitError(
                    f"storage: the database does not come back: {_reason(cause)}\n"
                    "what was done is kept; the same command goes on"
                ) from cause
            time.sleep(PAUSE)
            try:
                self.engine.connect().close()
            except AWAY:
                continue
            self.back_since = time.monotonic()
            tqdm.write("the database is back", file=sys.stderr)
            return


def open_database(url: str) -> Database:
    """A database with Optuna's tables; they are made where there are none.

    Raises:
        UsageError: If that is no address, or its driver is not installed.
        MNISTLitError: If it cannot be used; it is not waited for.
    """
    place = without_password(url)
    try:
        return _connected(url)
    except (ArgumentError, NoSuchModuleError) as error:
        raise UsageError(f"storage: {place} is no URL of a database: {error}") from error
    except ImportError as error:
        hint = "pip install 'mnist_lit[postgresql]'" if url.startswith("postgresql") else str(error)
        raise UsageError(f"storage: {place} needs a driver that is not installed\n{hint}") from error
    except SQLAlchemyError as error:
        raise MNISTLitError(f"storage: {place} cannot be used: {_reason(error)}") from error


def _connected(url: str) -> Database:
    kwargs: dict[str, Any] = {"pool_pre_ping": True}
    parts = make_url(url)
    if parts.get_driver_name() == "psycopg":
        kwargs["connect_args"] = {name: value for name, value in POSTGRESQL.items() if name not in parts.query}
    for _ in range(5):
        try:
            return Database(url, engine_kwargs=kwargs)
        except (IntegrityError, ProgrammingError):
            # Another search has made the tables in the same moment.
            time.sleep(1)
    return Database(url, engine_kwargs=kwargs)


def _reason(error: BaseException) -> str:
    """What a database complains of, in one line."""
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]


def _patient(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Database, *args: Any, **kwargs: Any) -> Any:
        until = None
        while True:
            try:
                return method(self, *args, **kwargs)
            except StorageInternalError as error:
                cause = error.__cause__
                if not isinstance(cause, AWAY):
                    raise
                self.remove_session()  # with what is left of its transaction
                until = until or time.monotonic() + self.patience
                self.wait(cause, until)

    return call


for name, method in vars(RDBStorage).items():
    # Those with one underscore, too: Optuna's cache of trials calls them.
    if inspect.isfunction(method) and not name.startswith("__"):
        setattr(Database, name, _patient(method))
