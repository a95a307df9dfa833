"""Run directories and checkpoints: where a run lies, which checkpoint is meant, how it is written and read."""

import atexit
import itertools
import os
import shutil
import tempfile
import urllib.error
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_utilities.core.rank_zero import rank_zero_only

from mnist_lit.errors import MNISTLitError, UsageError

__all__ = ["AtomicCheckpointIO", "Source", "claim", "is_first_process", "read_checkpoint", "write_text"]

LOGS = Path("logs")
BEST, LAST = "best.ckpt", "last.ckpt"


class Source:
    """The checkpoint that a command starts from.

    Args:
        path: A checkpoint file, a URL or a run directory, as the user gave it.
        for_fit: Whether a run directory means its last checkpoint (to go on) instead of its best (to use).

    Attributes:
        file: The checkpoint file; None when the run was stopped before its first one.
        run_dir: The run directory that the checkpoint belongs to, if any.
        goes_on: Whether the command continues that run in its own directory.
        dataset: What the checkpoint was trained on, where it says so.

    Raises:
        UsageError: If there is no such file, or nothing in the directory to start from.
        MNISTLitError: If the download fails.
    """

    def __init__(self, path: str, *, for_fit: bool) -> None:
        self.file: Path | None
        self.run_dir: Path | None = None
        self.goes_on = False
        self.dataset: str | None = None
        if path.startswith(("http://", "https://")):
            self.file = _download(path)
        elif Path(path).is_dir():
            self.run_dir = Path(path)
            self.goes_on = for_fit
            self.file = _in_run_dir(self.run_dir, for_fit=for_fit)
        elif Path(path).is_file():
            self.file = Path(path)
            if self.file.parent.name == "checkpoints" and not for_fit:
                self.run_dir = self.file.parent.parent
        else:
            raise UsageError(f"ckpt_path: {path!r} does not exist\ngive a checkpoint file, a URL or a run directory")


def _in_run_dir(run_dir: Path, *, for_fit: bool) -> Path | None:
    names = [LAST] if for_fit else [BEST, LAST]
    for name in names:
        if (run_dir / "checkpoints" / name).is_file():
            return run_dir / "checkpoints" / name
    if for_fit and (run_dir / "config.yaml").is_file():
        return None
    raise UsageError(f"ckpt_path: {run_dir} holds no checkpoint\nexpected one of checkpoints/{', '.join(names)} in it")


def _download(url: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mnist_lit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = folder / "downloaded.ckpt"
    try:
        torch.hub.download_url_to_file(url, str(file), progress=False)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise MNISTLitError(f"ckpt_path: {url} cannot be downloaded: {error}") from error
    return file


def read_checkpoint(file: Path) -> dict[str, Any]:
    """The content of a checkpoint; nothing in it is ever executed.

    Raises:
        UsageError: If the file is no checkpoint of plain data.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        is_whole = zipfile.is_zipfile(file) and "weights_only" in str(error)
        reason = "it holds more than plain data" if is_whole else "it is damaged or something else"
        raise UsageError(f"ckpt_path: {file} is no checkpoint of mnist_lit: {reason}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UsageError(f"ckpt_path: {file} is no checkpoint of mnist_lit: it has no state_dict")
    return checkpoint


def is_first_process() -> bool:
    """Whether this process is the one of its run that writes; known before the processes find each other."""
    return getattr(rank_zero_only, "rank", 0) == 0


def claim(run_dir: Path | None, *, existing: Path | None) -> Path:
    """Make a run's directory; at most one process gets a new one.

    Args:
        run_dir: The directory that the user wants; None for the next free `logs/run_N`.
        existing: The directory of the run that the command belongs to, which may hold files already.

    Raises:
        UsageError: If the directory holds another run or cannot be made.
    """
    if existing is not None and (run_dir is None or run_dir.resolve() == existing.resolve()):
        return existing
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
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are there as a whole or not at all, and from which nothing is executed.

    Lightning writes through the system's temporary folder, from which a file is copied, not renamed, when that lies
    on another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))
