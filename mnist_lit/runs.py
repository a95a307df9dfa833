"""Run directories: whose they are, and how files in them are written."""

import contextlib
import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only

from mnist_lit.entry import exists
from mnist_lit.errors import UsageError

__all__ = ["LOGS", "Claim", "claimed", "is_first_process", "write_bytes", "write_text"]

LOGS = Path("logs")


def is_first_process() -> bool:
    """Whether this process is the one of its run that writes; known before the processes find each other."""
    return getattr(rank_zero_only, "rank", 0) == 0


@dataclass(frozen=True)
class Claim:
    """The directory of a run.

    Args:
        run_dir: Its path.
        made: The folders that were made for it, the innermost first.
        is_ours: Whether it was empty, and nobody else writes in it.
    """

    run_dir: Path
    made: Sequence[Path] = ()
    is_ours: bool = False

    def give_up(self) -> None:
        """Remove what was made and written: nothing has come of the run."""
        if self.is_ours:
            for path in self.run_dir.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        with contextlib.suppress(OSError):  # what others have put something into stays
            for folder in self.made:
                folder.rmdir()


def claimed(run_dir: Path | None, *, existing: Path | None) -> Claim:
    """Make a run's directory; at most one process gets a new one.

    Args:
        run_dir: The directory that the user wants; None for the next free `logs/run_N`.
        existing: The directory of the run that the command belongs to, which may hold files already.

    Raises:
        UsageError: If the directory holds another run or cannot be made.
    """
    if not is_first_process():
        return Claim(run_dir or existing or LOGS)
    if existing is not None and (run_dir is None or run_dir.resolve() == existing.resolve()):
        return Claim(existing)
    wanted = run_dir or LOGS
    new = [folder for folder in (wanted, *wanted.parents) if not exists(folder)]
    run_dir = _make(run_dir)
    return Claim(run_dir, new if run_dir == wanted else [run_dir, *new], is_ours=True)


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
