"""Checkpoints: which one is meant, what it was made with, how it is written and read."""

import atexit
import os
import re
import shutil
import socket
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from mnist_lit.command_line import read_config
from mnist_lit.errors import MNISTLitError, UsageError
from mnist_lit.training.run_dir import atomic_write

__all__ = ["BEST", "LAST", "AtomicCheckpointIO", "Checkpoint", "check_network", "find_checkpoint", "read_checkpoint"]

BEST, LAST = "best.ckpt", "last.ckpt"
TIMEOUT = 30.0  # seconds without an answer
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
# In a checkpoint from outside of a run directory, these keys could read, write or run something of its author's choice.
UNTRUSTED_KEYS = {
    "": ("ensemble", "host", "output", "port", "run_dir"),
    "data": ("data_dir", "mirrors", "predict_paths"),
    "trainer": ("accelerator", "callbacks", "logger", "plugins", "profiler", "strategy"),
}
# Classes that only training needs; whoever uses the weights may not have them.
TRAINING_KEYS = {
    "model": ("optimizer", "schedule"),
    "trainer": ("callbacks", "logger", "plugins", "profiler"),
}
TORCH_OPTIM = re.compile(r"torch\.optim\.(\w+\.)?[A-Z]\w*")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that a command starts from.

    Args:
        file: Its file; None if the run was stopped before its first checkpoint.
        run_dir: The run directory that it lies in, if any.
        config: The configuration that it was made with: all of it from a run directory, else its harmless part.
        hyper_parameters: The arguments of its model.
        step: Optimizer steps done.
        shapes: The shape of each tensor of its model.
    """

    file: Path | None
    run_dir: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    hyper_parameters: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    shapes: dict[str, torch.Size] = field(default_factory=dict)


def find_checkpoint(path: str, *, for_fit: bool = False, key: str = "ckpt_path") -> Checkpoint:
    """Find the checkpoint that a file, a URL or a run directory stands for.

    Args:
        path: A run directory stands for its best checkpoint, or for its last one if `for_fit`.
        for_fit: Whether training continues from it.
        key: The key that errors name.

    Raises:
        UsageError: If there is none, or it holds more than plain data.
        MNISTLitError: If the download fails.
    """
    try:
        if path.startswith(("http://", "https://")):
            return _read(_download(path), for_fit=for_fit)
        return _read_path(Path(path), for_fit=for_fit)
    except UsageError as error:
        raise UsageError(str(error).replace("ckpt_path", key, 1)) from error


def _read_path(path: Path, *, for_fit: bool) -> Checkpoint:
    if os.path.isdir(path):  # noqa: PTH112  # also false for a name that is too long
        return _read_run_dir(path, for_fit=for_fit)
    if not os.path.isfile(path):  # noqa: PTH113
        raise UsageError(f"ckpt_path: '{path}' does not exist\ngive a checkpoint file, a URL or a run directory")
    folder = path.parent
    is_of_run = folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file()
    return _read(path, folder.parent if is_of_run else None, for_fit=for_fit)


def _read_run_dir(run_dir: Path, *, for_fit: bool) -> Checkpoint:
    names = (LAST,) if for_fit else (BEST, LAST)
    files = [run_dir / "checkpoints" / name for name in names]
    if file := next(filter(Path.is_file, files), None):
        return _read(file, run_dir, for_fit=for_fit)
    if for_fit and (run_dir / "config.yaml").is_file():
        return Checkpoint(file=None, run_dir=run_dir, config=read_config(run_dir / "config.yaml"))
    raise UsageError(f"ckpt_path: {run_dir} holds no checkpoint\nexpected one of checkpoints/{', '.join(names)} in it")


def _read(file: Path, run_dir: Path | None = None, *, for_fit: bool) -> Checkpoint:
    content = read_checkpoint(file)
    model = content.get("hyper_parameters") or {}
    config = content.get("config") or _config_of(model)
    if not isinstance(config, dict) or not isinstance(content.get("global_step", 0), int):
        raise _refused(file, "its config holds no keys, or its global_step is no number")
    if not for_fit:
        config = _without(config, TRAINING_KEYS)
    if run_dir is None:
        config = _without(config, UNTRUSTED_KEYS)
        check_optimizer(config.get("model"), file)
    tensors = content["state_dict"]
    if damaged := next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None):
        print(f"note: weights of {file} are NaN or infinite, first in {damaged!a}", file=sys.stderr)
    return Checkpoint(
        file=file,
        run_dir=run_dir,
        config=config,
        hyper_parameters=_safe_parameters(model) if isinstance(model, dict) else {},
        step=content.get("global_step", 0),
        shapes={name: tensor.shape for name, tensor in tensors.items()},
    )


def _safe_parameters(model: dict[str, Any]) -> dict[str, Any]:
    """Drop an optimizer or a schedule that may be missing here, or that an untrusted file could run code with."""
    names = TRAINING_KEYS["model"]
    return {name: value for name, value in model.items() if name not in names or _is_torch_optim(value)}


def _config_of(model: Any) -> dict[str, Any]:
    """Make a configuration of the hyper-parameters of a checkpoint that was made without the command line."""
    if not isinstance(model, dict):
        return {}
    data = {"image_size": model["image_size"]} if "image_size" in model else {}
    return {"model": {key: model[key] for key in model if key not in ("image_size", "_instantiator")}, "data": data}


def _without(config: dict[str, Any], keys: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    def drop(content: Any, names: tuple[str, ...]) -> Any:
        return {key: content[key] for key in content if key not in names} if isinstance(content, dict) else content

    config = drop(config, keys.get("", ()))
    return {section: drop(content, keys.get(section, ())) for section, content in config.items()}


def check_optimizer(model: Any, file: object) -> None:
    """Check that the optimizer and the schedule of an untrusted checkpoint are torch's own, with plain arguments.

    Raises:
        UsageError: If they name any other class or function.
    """
    for key in ("optimizer", "schedule"):
        spec = model.get(key) if isinstance(model, dict) else None
        if spec is not None and not _is_torch_optim(spec):
            name = spec.get("class_path") if isinstance(spec, dict) else spec
            raise UsageError(
                f"ckpt_path: {file} names code that is not torch's: model.{key} is {name}\n"
                f"give --model.{key}, or use it from its run directory: RUN/checkpoints, beside RUN/config.yaml"
            )


def _is_torch_optim(spec: Any) -> bool:
    if not isinstance(spec, dict) or not TORCH_OPTIM.fullmatch(str(spec.get("class_path"))):
        return False
    arguments = spec.get("init_args") or {}
    is_known = spec.keys() <= {"class_path", "init_args"} and isinstance(arguments, dict)
    return is_known and _is_plain_value([*arguments.values()])


def _is_plain_value(value: Any) -> bool:
    """Check that a value names neither a function nor a class: those have dots or keys."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain_value, value))
    return "." not in value if isinstance(value, str) else not isinstance(value, dict)


def check_network(checkpoint: Checkpoint, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Check that a checkpoint has the shapes of this network, before anything is written.

    Args:
        checkpoint: The checkpoint.
        state_dict: The model's.
        config: The configuration of the model.

    Raises:
        UsageError: If it has not, with the keys that differ.
    """
    shapes = {name: tensor.shape for name, tensor in state_dict.items()}
    if checkpoint.file is None or checkpoint.shapes == shapes:
        return
    theirs = checkpoint.config.get("model", {})
    keys = [key for key in theirs if key in config and theirs[key] != config[key]]
    differences = [f"model.{key} is {theirs[key]} in the checkpoint, {config[key]} here" for key in keys]
    reason = "; ".join(differences) or "data.image_size, or another key that shapes it, differs"
    raise UsageError(f"ckpt_path: the checkpoint is of another network\n{reason}")


def _download(url: str) -> Path:
    """Download a checkpoint; what follows `#sha256=` in its URL is the digest that it must have."""
    address, _, digest = url.partition("#sha256=")
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise UsageError(f"ckpt_path: {url} is no URL: {error}") from error
    if parts.scheme == "http" and parts.hostname not in THIS_MACHINE and not digest:
        raise UsageError(
            f"ckpt_path: on its way from {parts.hostname} anyone could exchange it\n"
            "use https://, or add the file's digest: http://…#sha256=…"
        )
    folder = Path(tempfile.mkdtemp(prefix="mnist_lit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = folder / "downloaded.ckpt"
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(TIMEOUT)  # torch would wait for ever
        torch.hub.download_url_to_file(address, str(file), hash_prefix=digest.lower() or None, progress=False)
    except (OSError, HTTPException, RuntimeError, ValueError) as error:
        raise MNISTLitError(f"ckpt_path: {url} cannot be downloaded: {' '.join(str(error).split())}") from error
    finally:
        socket.setdefaulttimeout(before)
    return file


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint of plain data, without running anything in it.

    Raises:
        UsageError: If the file is something else.
    """
    if _is_compressed(file):
        raise _refused(file, "it is compressed")
    try:
        with warnings.catch_warnings(action="ignore"):  # of other formats
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UsageError(f"ckpt_path: {file} cannot be read: {error.strerror}") from error
    except Exception as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        is_whole = zipfile.is_zipfile(file) and "weights_only" in str(error)
        reason = f"it holds more than plain data{f': {name[1]}' if name else ''}"
        raise _refused(file, reason if name or is_whole else "it is damaged or something else") from error
    state_dict = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise _refused(file, "it has no state_dict")
    if not all(map(_is_plain_tensor, _tensors([state_dict, checkpoint.get("optimizer_states")]))):
        raise _refused(file, "a tensor in it is sparse, quantised, complex or larger than what is stored of it")
    return dict(checkpoint)


def _refused(file: Path, reason: str) -> UsageError:
    return UsageError(f"ckpt_path: {file} is no checkpoint of mnist_lit: {reason}")


def _is_compressed(file: Path) -> bool:
    """Check for an archive of more than its own size, which torch's are not: a small one could fill the memory."""
    try:
        with zipfile.ZipFile(file) as archive:
            return sum(part.file_size for part in archive.infolist()) > file.stat().st_size
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False  # torch refuses it


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (dict, list, tuple)):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _tensors(part)


def _is_plain_tensor(tensor: Tensor) -> bool:
    if tensor.is_nested or tensor.is_quantized or tensor.is_complex() or tensor.layout != torch.strided:
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes() and not tensor.is_meta


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint as a whole or not at all, and reads plain data only.

    Lightning writes through the system's temporary folder; from another disk the file would be copied, not renamed.
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
