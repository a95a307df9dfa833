"""Run directories: whose they are, and how files in them are written."""

import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from lightning_utilities.core.rank_zero import rank_zero_only

from mnist_lit.app import exists
from mnist_lit.errors import UsageError

__all__ = ["LOGS", "Claim", "atomic_write", "claimed", "is_first_process", "write_bytes", "write_text"]

LOGS = Path("logs")
LOCK = ".fit.lock"
PART = ".part"


def is_first_process() -> bool:
    """Whether this process is the one of its run that writes; known before the processes find each other."""
    # Where Lightning's own variables name the machines, its rank is 0 on each of them until there is a trainer.
    return getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"


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
        with suppress(OSError):  # what others have put something into stays, and somebody may have removed it
            for path in self.run_dir.iterdir() if self.is_ours else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            for folder in self.made:
                folder.rmdir()


@contextmanager
def claimed(run_dir: Path | None, *, existing: Path | None, goes_on: bool = False) -> Iterator[Claim]:
    """Have a run's directory, alone where it is trained in.

    Args:
        run_dir: The directory that the user wants; None for the next free `logs/run_N`.
        existing: The directory of the run that the command belongs to, which may hold files already.
        goes_on: Whether the run itself goes on in `existing`.

    Raises:
        UsageError: If the directory holds another run, is trained in by another process, or cannot be made.
    """
    if not is_first_process():
        yield Claim(run_dir or existing or LOGS)
        return
    if existing is not None and (run_dir is None or run_dir.resolve() == existing.resolve()):
        with _alone(existing) if goes_on else nullcontext():
            yield Claim(existing)
        return
    wanted = run_dir or LOGS
    new = [folder for folder in (wanted, *wanted.parents) if not exists(folder)]
    run_dir = _make(run_dir)
    made = new if run_dir == wanted else [run_dir, *new]
    try:
        with _alone(run_dir):
            _refuse_occupied(run_dir)
            yield Claim(run_dir, made, is_ours=True)
    except BaseException:
        Claim(run_dir, made).give_up()  # what is still empty
        raise


def _make(run_dir: Path | None) -> Path:
    try:
        if run_dir is None:
            return _next_free(LOGS)
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(error.filename or run_dir or LOGS, error) from error
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


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training in the same directory, and clear away what a killed one was writing."""
    lock = FileLock(run_dir / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(f"run_dir: {run_dir} is trained in by another process\ngive another --run_dir") from None
    except OSError as error:
        raise _unusable(run_dir, error) from error
    try:
        for leftover in run_dir.glob(f"checkpoints/.*{PART}"):
            leftover.unlink()
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _refuse_occupied(run_dir: Path) -> None:
    if any(file.name != LOCK and not file.match(f".*{PART}") for file in run_dir.iterdir()):
        raise UsageError(
            f"run_dir: {run_dir} is not empty, and nothing is overwritten\n"
            f"go on with `fit --ckpt_path {run_dir}` if it holds a run, or give another --run_dir"
        )


def _unusable(folder: Path | str, error: OSError) -> UsageError:
    return UsageError(f"run_dir: {folder}: {error.strerror}\ngive another --run_dir")


def write_text(path: Path, text: str) -> None:
    """Write a file that others may read: it is there as a whole or not at all."""
    write_bytes(path, text.encode(errors="backslashreplace"))  # names of files need not be UTF-8


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for what is no text."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A name to write to; what is there when the block ends gets the name of the file at once.

    Raises:
        OSError: If the disk is full or the like.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        yield temporary
        temporary.replace(path)
    except Exception as error:
        # torch says something else when the disk is full; what the system has said is the context of that.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise OSError(reason.errno, reason.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
