"""Checkpoints: find the one that is meant, read it without trusting it, write it as a whole."""

import atexit
import os
import re
import shutil
import socket
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from mnist_lit.command_line import read_config
from mnist_lit.errors import MNISTLitError, UsageError
from mnist_lit.training.run_dir import atomic_write

__all__ = ["BEST", "LAST", "AtomicCheckpointIO", "Checkpoint", "check_network", "find_checkpoint", "read_checkpoint"]

BEST, LAST = "best.ckpt", "last.ckpt"
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
# In a checkpoint from outside of a run directory, these keys could read, write or run something of its author's choice.
UNTRUSTED_KEYS = {
    "": ("ensemble", "host", "output", "port", "run_dir"),
    "data": ("data_dir", "mirrors", "predict_paths"),
    "trainer": ("accelerator", "callbacks", "logger", "plugins", "profiler", "strategy"),
}
# Classes that only training needs; whoever uses the weights may not have them.
TRAINING_KEYS = {"model": ("optimizer", "schedule"), "trainer": ("callbacks", "logger", "plugins", "profiler")}
TORCH_OPTIM = re.compile(r"torch\.optim\.(\w+\.)?[A-Z]\w*")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Holds what a command needs to know of the checkpoint that it starts from."""

    file: Path | None  # None if the run was stopped before its first checkpoint
    run_dir: Path | None = None  # the run directory that it lies in
    config: dict[str, Any] = field(default_factory=dict)  # without what a stranger could do harm with
    hyper_parameters: dict[str, Any] = field(default_factory=dict)
    step: int = 0  # optimizer steps done
    shapes: dict[str, torch.Size] = field(default_factory=dict)


def find_checkpoint(path: str, *, for_fit: bool = False, key: str = "ckpt_path") -> Checkpoint:
    """Find the checkpoint of a file, a URL or a run directory: its best one, for fit its last; errors name the key."""
    try:
        if path.startswith(("http://", "https://")):
            return _read(_download(path), None, for_fit=for_fit)
        if os.path.isdir(path):  # noqa: PTH112  # also false for a name that is too long
            return _read_run_dir(Path(path), for_fit=for_fit)
        if not os.path.isfile(path):  # noqa: PTH113
            raise UsageError(f"'{path}' does not exist\ngive a checkpoint file, a URL or a run directory")
        folder = Path(path).parent
        is_of_run = folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file()
        return _read(Path(path), folder.parent if is_of_run else None, for_fit=for_fit)
    except MNISTLitError as error:
        raise type(error)(f"{key}: {error}") from error


def _read_run_dir(run_dir: Path, *, for_fit: bool) -> Checkpoint:
    files = [run_dir / "checkpoints" / name for name in ((LAST,) if for_fit else (BEST, LAST))]
    if file := next(filter(Path.is_file, files), None):
        return _read(file, run_dir, for_fit=for_fit)
    config = run_dir / "config.yaml"
    if for_fit and config.is_file():
        return Checkpoint(file=None, run_dir=run_dir, config=read_config(config))
    raise UsageError(f"{run_dir} holds no checkpoint\nexpected {' or '.join(map(str, files))}")


def _read(file: Path, run_dir: Path | None, *, for_fit: bool) -> Checkpoint:
    content = read_checkpoint(file)
    model = content.get("hyper_parameters") or {}
    if not isinstance(model, dict):
        raise _refusal(file, "its hyper_parameters hold no keys")
    config, step = content.get("config") or _make_config(model), content.get("global_step", 0)
    if not isinstance(config, dict) or not isinstance(step, int):
        raise _refusal(file, "its config holds no keys, or its global_step is no number")
    if not for_fit:
        _drop(config, TRAINING_KEYS)
    if run_dir is None:
        _drop(config, UNTRUSTED_KEYS)
        for key, code in _named_code(config.get("model")).items():
            raise UsageError(
                f"{file} names code that is not torch's: model.{key} is {code}\n"
                "use it from its run directory: RUN/checkpoints, beside RUN/config.yaml"
            )
    return Checkpoint(
        file=file,
        run_dir=run_dir,
        config=config,
        hyper_parameters={key: value for key, value in model.items() if key not in _named_code(model)},
        step=step,
        shapes={name: tensor.shape for name, tensor in content["state_dict"].items()},
    )


def _make_config(model: dict[str, Any]) -> dict[str, Any]:
    """Make a configuration of the hyper-parameters of a checkpoint that was made without the command line."""
    linked = ("image_size", "in_channels")
    data = {key: model[key] for key in linked if key in model}
    return {"model": {key: model[key] for key in model if key not in (*linked, "_instantiator")}, "data": data}


def _drop(config: dict[str, Any], keys: Mapping[str, tuple[str, ...]]) -> None:
    for section, names in keys.items():
        group: Any = config.get(section) if section else config
        for name in names if isinstance(group, dict) else ():
            group.pop(name, None)


def _named_code(model: Any) -> dict[str, Any]:
    """Find the optimizer and the schedule of a model unless they are torch's, with plain arguments."""
    specs = {key: model.get(key) for key in TRAINING_KEYS["model"]} if isinstance(model, dict) else {}
    names = {key: spec.get("class_path") if isinstance(spec, dict) else spec for key, spec in specs.items()}
    return {key: names[key] for key, spec in specs.items() if spec and not _is_torch_optim(spec)}


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
    """Refuse a checkpoint of another network before anything is written; `config` is that of the model."""
    if checkpoint.file is None or checkpoint.shapes == {name: tensor.shape for name, tensor in state_dict.items()}:
        return
    theirs = checkpoint.config.get("model", {})
    differing = [key for key in theirs if key in config and theirs[key] != config[key]]
    reasons = [f"model.{key} is {theirs[key]} in the checkpoint, {config[key]} here" for key in differing]
    reason = "; ".join(reasons) or "data.image_size, or another key that shapes it, differs"
    raise UsageError(f"ckpt_path: the checkpoint is of another network\n{reason}")


def _download(url: str) -> Path:
    """Download a checkpoint; what follows `#sha256=` in its URL is the digest that it must have."""
    address, _, digest = url.partition("#sha256=")
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise UsageError(f"{url} is no address: {error}") from error
    if parts.scheme == "http" and parts.hostname not in THIS_MACHINE and not digest:
        raise UsageError(f"{url} could be exchanged on its way\nuse https://, or add its digest: http://…#sha256=…")
    folder = Path(tempfile.mkdtemp(prefix="mnist_lit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file, timeout = folder / "downloaded.ckpt", socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(30)  # torch would wait for ever
        torch.hub.download_url_to_file(address, str(file), hash_prefix=digest.lower() or None, progress=False)
    except (OSError, HTTPException, RuntimeError, ValueError) as error:
        raise MNISTLitError(f"{url} cannot be downloaded: {' '.join(str(error).split())}") from error
    finally:
        socket.setdefaulttimeout(timeout)
    return file


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint of plain data without running anything in it; refuse any other file."""
    if _is_compressed(file):
        raise _refusal(file, "it is compressed")
    try:
        with warnings.catch_warnings(action="ignore"):  # of other formats
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds more than plain data: {name[1]}" if name else f"it cannot be read: {str(error)[:200]}"
        raise _refusal(file, reason.partition("\n")[0]) from error
    state_dict = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise _refusal(file, "it has no state_dict")
    try:
        apply_to_collection([state_dict, content.get("optimizer_states")], Tensor, _check_tensor)
    except (ValueError, RecursionError) as error:
        raise _refusal(file, "a tensor in it is sparse, quantised, complex or larger than what is stored") from error
    return dict(content)


def _refusal(file: Path, reason: str) -> UsageError:
    return UsageError(f"{file} is no checkpoint of mnist_lit: {reason}")


def _is_compressed(file: Path) -> bool:
    """Check for an archive of more than its own size: torch writes none, and a small one could fill the memory."""
    try:
        with zipfile.ZipFile(file) as archive:
            return sum(part.file_size for part in archive.infolist()) > file.stat().st_size
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False  # torch refuses it


def _check_tensor(tensor: Tensor) -> Tensor:
    is_plain = tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_complex())
    if not is_plain or tensor.is_meta or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise ValueError
    return tensor


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
