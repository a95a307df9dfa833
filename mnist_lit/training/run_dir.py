"""Run directories, and files that are written as a whole or not at all."""

import csv
import io
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from lightning_utilities.core.rank_zero import rank_zero_only

from mnist_lit.errors import UsageError

LOGS = Path("logs")
LOCK = ".fit.lock"
PART = ".part"


def is_global_zero() -> bool:
    """Check whether this process writes for its run, before there is a trainer to ask."""
    # Where only the machines are numbered, Lightning takes each of them for rank zero until there is a trainer.
    return getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"


class RunDir:
    """Locks the directory of a run while it is trained in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_new = False
        self.lock = FileLock(path / LOCK, timeout=0)

    @classmethod
    def make(cls, wanted: Path | None) -> "RunDir":
        """Make and lock the directory of a new run, which must hold no files; None for the next free `logs/run_N`."""
        run_dir = cls(wanted or _make_next())
        run_dir.acquire()
        if any(file.name != LOCK and not file.match(f".*{PART}") for file in run_dir.path.iterdir()):
            run_dir.release()
            raise UsageError(
                f"run_dir: {run_dir.path} is not empty, and nothing is overwritten\n"
                f"go on with `fit --ckpt_path {run_dir.path}` if it holds a run, or give another --run_dir"
            )
        run_dir.is_new = True
        return run_dir

    def acquire(self) -> None:
        """Lock the directory, and remove what a killed process has left half written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
        except OSError as error:
            reason = "another process trains in it" if isinstance(error, Timeout) else error.strerror
            raise UsageError(f"run_dir: {self.path}: {reason}\ngive another --run_dir") from error
        for leftover in self.path.glob(f"checkpoints/.*{PART}"):
            leftover.unlink()

    def release(self) -> None:
        """Unlock the directory."""
        if self.lock.is_locked:
            Path(self.lock.lock_file).unlink(missing_ok=True)
            self.lock.release()

    def remove(self) -> None:
        """Remove the directory of a new run that has not begun."""
        if self.is_new:
            with suppress(OSError):  # it may be gone already; `logs` may hold other runs
                shutil.rmtree(self.path)
                LOGS.rmdir()


def _make_next() -> Path:
    for number in itertools.count(1):
        with suppress(FileExistsError):
            path = LOGS / f"run_{number}"
            path.mkdir(parents=True)
            break
    return path


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files need not be UTF-8


def write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write a YAML file atomically, with the keys in their order."""
    write_text(path, yaml.safe_dump(content, sort_keys=False))


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` when the block ends."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        yield temporary
        temporary.replace(path)
    except Exception as error:
        # torch raises an error of its own when the disk is full; its context is the system's.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise OSError(reason.errno, reason.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
