"""A study in a file: lines that several searches add, on a disk that may be full."""

import os
from pathlib import Path
from typing import Any

from filelock import FileLock
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

__all__ = ["open_journal"]


def open_journal(folder: Path) -> JournalStorage:
    """The journal in the directory of a search; both are made where there are none."""
    folder.mkdir(parents=True, exist_ok=True)
    journal, lock = folder / "study.journal", JournalLock(folder / ".journal.lock")
    _mend(journal, lock)
    return JournalStorage(Journal(journal, lock))


class JournalLock(JournalFileOpenLock):
    """A lock that ends with the process that holds it; Optuna's own would keep others waiting for half a minute.

    Args:
        path: The lock file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.lock = FileLock(path)

    def acquire(self) -> bool:
        self.lock.acquire()
        return True

    def release(self) -> None:
        self.lock.release()


class Journal(JournalFileBackend):
    """A journal on a disk that may be full: what cannot be written as a whole is taken back.

    The next line would be joined to a part of one, and could not be read any more.

    Args:
        path: The file.
        lock: Its lock.
    """

    def __init__(self, path: Path, lock: JournalLock) -> None:
        super().__init__(str(path), lock_obj=lock)
        self.path = path
        self.lock = lock.lock

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with self.lock:
            size = self.path.stat().st_size
            try:
                super().append_logs(logs)
            except OSError as error:
                os.truncate(self.path, size)
                raise OSError(error.errno, error.strerror, str(self.path)) from error


def _mend(journal: Path, lock: JournalLock) -> None:
    """Drop a last line that was cut off by a power failure or a kill: the next one would be joined to it."""
    if not journal.exists():
        return
    with lock.lock, journal.open("r+b") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
