"""Checkpoints: which one is meant, what it says of itself, how it is written and read."""

import atexit
import hashlib
import os
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from mnist_lit.app import read_config
from mnist_lit.data.downloads import download
from mnist_lit.errors import MNISTLitError, UsageError
from mnist_lit.formatting import escape_unprintable
from mnist_lit.training.run_dir import atomic_write
from mnist_lit.trust import check_classes

__all__ = ["BEST", "LAST", "AtomicCheckpointIO", "Source", "read_checkpoint"]

BEST, LAST = "best.ckpt", "last.ckpt"
TIMEOUT = 30.0  # seconds without an answer
MAX_BYTES = 2**31  # of a checkpoint that is downloaded
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
SHAPES = (
    "channels",
    "hidden",
    "kernel_size",
    "convs_per_stage",
    "residual",
    "pooling",
    "pool_at_end",
    "unpadded_stages",
    "global_pool",
    "norm",
)


class Source:
    """What a command starts from.

    Args:
        path: A checkpoint file, a URL or a run directory, as the user gave it.
        for_fit: Whether a run directory means its last checkpoint (to go on) instead of its best (to use).

    Attributes:
        file: The checkpoint file; None when the run was stopped before its first one.
        run_dir: The run directory that the checkpoint belongs to, if any.
        goes_on: Whether the command continues that run in its own directory.
        is_of_run: Whether the file lies in a run's directory, and not just anywhere.
        config: The configuration that it was made with, as plain data.
        hyper_parameters: The arguments of its model.
        step: Optimizer steps that it has behind it.

    Raises:
        UsageError: If there is no such file, or nothing in the directory to start from.
        MNISTLitError: If the download fails.
    """

    def __init__(self, path: str, *, for_fit: bool) -> None:
        self.file: Path | None
        self.run_dir: Path | None = None
        self.goes_on = False
        self.hyper_parameters: Any = None
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
        folder = self.file.parent if self.file is not None else None
        lies_in_run = folder is not None and folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file()
        self.is_of_run = self.file is None or lies_in_run
        self._read()

    def _read(self) -> None:
        if self.file is None:
            assert self.run_dir is not None
            self.config = _recorded(self.run_dir / "config.yaml")
            self.step = 0
            self.shapes: dict[str, torch.Size] | None = None
            return
        checkpoint = read_checkpoint(self.file)
        self.hyper_parameters = checkpoint.get("hyper_parameters")
        self.config = checkpoint.get("config") or _from_hyper_parameters(self.hyper_parameters)
        if not isinstance(self.config, dict):
            raise UsageError(f"ckpt_path: {self.file} is no checkpoint of mnist_lit: its config holds no keys")
        if not self.is_of_run:
            for model in (self.config.get("model"), self.hyper_parameters):
                check_classes(model, self.file)
        self.step = checkpoint.get("global_step", 0)
        if not isinstance(self.step, int):
            raise _refused(self.file, "its global_step is no number")
        self.shapes = _shapes(checkpoint["state_dict"])
        damaged = [name for name, tensor in checkpoint["state_dict"].items() if not tensor.isfinite().all()]
        if damaged:
            print(
                f"note: weights of {self.file} are NaN or infinite, first in {escape_unprintable(damaged[0])}",
                file=sys.stderr,
            )

    def check_network(self, state_dict: Mapping[str, Tensor], config: dict[str, Any]) -> None:
        """Before anything is written: the checkpoint is of this network.

        Args:
            state_dict: The network's.
            config: The model's configuration.

        Raises:
            UsageError: If it is not, with what differs.
        """
        if self.shapes in (None, _shapes(state_dict)):
            return
        theirs = self.config["model"]
        names = [name for name in SHAPES if name in theirs and theirs[name] != config.get(name)]
        differences = [f"model.{name} is {theirs[name]} in the checkpoint, {config[name]} here" for name in names]
        reason = "; ".join(differences) or "data.image_size, or another key that shapes it, differs"
        raise UsageError(f"ckpt_path: the checkpoint is of another network\n{reason}")


def _recorded(file: Path) -> dict[str, Any]:
    try:
        return read_config(file)
    except UsageError as error:
        raise UsageError(str(error).replace("--config", "ckpt_path", 1)) from error


def _from_hyper_parameters(model: Any) -> dict[str, Any]:
    """The configuration that a checkpoint stands for which was made without the command line."""
    if not isinstance(model, dict):
        return {}
    names = [name for name in model if name not in ("image_size", "_instantiator")]
    data = {"image_size": model["image_size"]} if "image_size" in model else {}
    return {"model": {name: model[name] for name in names}, "data": data}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _in_run_dir(run_dir: Path, *, for_fit: bool) -> Path | None:
    names = [LAST] if for_fit else [BEST, LAST]
    for name in names:
        if (run_dir / "checkpoints" / name).is_file():
            return run_dir / "checkpoints" / name
    if for_fit and (run_dir / "config.yaml").is_file():
        return None
    raise UsageError(f"ckpt_path: {run_dir} holds no checkpoint\nexpected one of checkpoints/{', '.join(names)} in it")


def _download(url: str) -> Path:
    """Fetch a checkpoint; what follows `#sha256=` is the digest that it has to have."""
    address, _, digest = url.partition("#sha256=")
    folder = Path(tempfile.mkdtemp(prefix="mnist_lit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = folder / "downloaded.ckpt"
    try:
        parts = urlsplit(address)
        if parts.scheme == "http" and parts.hostname not in THIS_MACHINE and not digest:
            raise UsageError(
                f"ckpt_path: on its way from {parts.hostname} anyone could exchange it\n"
                "use https://, or add the file's digest: http://…#sha256=…"
            )
        download(address, file, timeout=TIMEOUT, max_bytes=MAX_BYTES)
    except (OSError, HTTPException, ValueError) as error:
        raise MNISTLitError(f"ckpt_path: {url} cannot be downloaded: {' '.join(str(error).split())}") from error
    if digest and hashlib.sha256(file.read_bytes()).hexdigest() != digest.lower():
        raise MNISTLitError(f"ckpt_path: {url} is another file: its SHA-256 is not that")
    return file


def read_checkpoint(file: Path) -> dict[str, Any]:
    """The content of a checkpoint; nothing in it is ever executed.

    Raises:
        UsageError: If the file is no checkpoint of plain data.
    """
    if _is_compressed(file):
        raise _refused(file, "it is compressed")
    try:
        with warnings.catch_warnings(action="ignore"):  # of what it is instead
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UsageError(f"ckpt_path: {file} cannot be read: {error.strerror}") from error
    except Exception as error:
        raise _refused(file, _what_is_wrong(file, str(error))) from error
    state_dict = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise _refused(file, "it has no state_dict")
    if not all(map(_is_plain, _tensors([state_dict, checkpoint.get("optimizer_states")]))):
        raise _refused(file, "a tensor in it is sparse, quantised, complex or larger than what is stored of it")
    return dict(checkpoint)


def _refused(file: Path, reason: str) -> UsageError:
    return UsageError(f"ckpt_path: {file} is no checkpoint of mnist_lit: {reason}")


def _is_compressed(file: Path) -> bool:
    """Whether it is an archive of more than its own size, which torch's are not: a small one could fill the memory."""
    try:
        with zipfile.ZipFile(file) as archive:
            return sum(part.file_size for part in archive.infolist()) > file.stat().st_size
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False  # torch says what it is


def _what_is_wrong(file: Path, message: str) -> str:
    if found := re.search(r"GLOBAL (\S+)", message):
        return f"it holds more than plain data: {found[1]}"
    is_whole = zipfile.is_zipfile(file) and "weights_only" in message
    return "it holds more than plain data" if is_whole else "it is damaged or something else"


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (dict, list, tuple)):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _tensors(part)


def _is_plain(tensor: Tensor) -> bool:
    if tensor.is_nested or tensor.is_quantized or tensor.is_complex() or tensor.layout != torch.strided:
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes() and not tensor.is_meta


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are there as a whole or not at all, and from which nothing is executed.

    Lightning writes through the system's temporary folder, from which a file is copied, not renamed, when that lies
    on another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))
