"""Run directories: whose they are, and how files in them are written."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only

from mnist_lit.entry import exists
from mnist_lit.errors import UsageError

__all__ = ["LOGS", "claimed", "is_first_process", "write_bytes", "write_text"]

LOGS = Path("logs")


def is_first_process() -> bool:
    """Whether this process is the one of its run that writes; known before the processes find each other."""
    # Where Lightning's own variables name the machines, its rank is 0 on each of them until there is a trainer.
    return getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"


@contextmanager
def claimed(run_dir: Path | None, *, existing: Path | None) -> Iterator[Path]:
    """Make a run's directory; at most one process gets a new one. After an error, what was made and is empty goes.

    Args:
        run_dir: The directory that the user wants; None for the next free `logs/run_N`.
        existing: The directory of the run that the command belongs to, which may hold files already.

    Raises:
        UsageError: If the directory holds another run or cannot be made.
    """
    if not is_first_process():
        yield run_dir or existing or LOGS
        return
    if existing is not None and (run_dir is None or run_dir.resolve() == existing.resolve()):
        yield existing
        return
    wanted = run_dir or LOGS
    new = [folder for folder in (wanted, *wanted.parents) if not exists(folder)]
    run_dir = _make(run_dir)
    try:
        yield run_dir
    except BaseException:
        for folder in new if run_dir == wanted else [run_dir, *new]:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def _make(run_dir: Path | None) -> Path:
    try:
        if run_dir is None:
            return _next_free(LOGS)
        run_dir.mkdir(parents=True, exist_ok=True)
        occupied = any(run_dir.iterdir())
    except OSError as error:
        raise UsageError(f"run_dir: {error.filename or run_dir}: {error.strerror}\ngive another --run_dir") from error
    if occupied:
        raise UsageError(
            f"run_dir: {run_dir} is not empty, and nothing is overwritten\n"
            f"go on with `fit --ckpt_path {run_dir}` if it holds a run, or give another --run_dir"
        )
    return run_dir


def _next_free(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        run_dir = folder / f"run_{number}"
        try:
            run_dir.mkdir()
        except FileExistsError:
            continue
        return run_dir
    raise AssertionError


def write_text(path: Path, text: str) -> None:
    """Write a file that others may read: it is there as a whole or not at all."""
    write_bytes(path, text.encode(errors="backslashreplace"))  # names of files need not be UTF-8


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for what is no text."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
