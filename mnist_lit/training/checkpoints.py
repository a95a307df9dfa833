"""Checkpoints: find the one that is meant, read it without trusting it, write it as a whole."""

import atexit
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from mnist_lit.command_line import read_config, walk
from mnist_lit.errors import MNISTLitError, UsageError
from mnist_lit.formatting import flatten, format_value
from mnist_lit.training.run_dir import atomic_write, is_global_zero

BEST, LAST = "best.ckpt", "last.ckpt"
LINKED = ("image_size", "in_channels")  # arguments of a model that the data has, too
# Classes that only training needs; whoever uses the weights may not have them.
TRAINING_KEYS = ("optimizer", "schedule", "callbacks", "logger", "plugins", "profiler")
UNTRUSTED_PATHS = ("data_dir", "mirrors", "predict_paths")
EVALUATION_KEYS = (
    "model.tta_distort",
    "data.dataset",
    "data.val_size",
    "data.test_size",
    "trainer.limit_val_batches",
    "trainer.limit_test_batches",
)
OTHER_NETWORK = (
    "data.image_size, or another key that shapes it, differs; "
    "a class of one's own needs the command that trained it, as `python -m mynet`"
)
PLAIN_HTTP = re.compile(r"http://(?!(localhost|127\.0\.0\.1)(:\d+)?/)")


@dataclass(frozen=True, kw_only=True)
class ResolvedCheckpoint:
    """Holds what a command needs to know of the checkpoint that it starts from."""

    file: Path | None  # None if the run was stopped before its first checkpoint
    run_dir: Path | None = None  # the run directory that it lies in
    config: dict[str, Any] = field(default_factory=dict)  # without what a stranger could do harm with
    step: int = 0  # optimizer steps done
    shapes: dict[str, torch.Size] = field(default_factory=dict)

    @property
    def dataset(self) -> str | None:
        """Return the data set that it was trained on, if that is known."""
        return (self.config.get("data") or {}).get("dataset")

    def evaluates_like(self, config: Mapping[str, Any]) -> bool:
        """Check whether a configuration evaluates on the data of this checkpoint's run, and in the same way."""
        here, recorded = flatten(config), flatten(self.config)
        # A data set that is downloaded is the same in each folder.
        keys = [*EVALUATION_KEYS, "data.data_dir"] if self.dataset == "folder" else EVALUATION_KEYS
        return all(recorded.get(key, here.get(key)) == here.get(key) for key in keys)


def find_checkpoint(path: str, *, for_fit: bool = False, key: str = "ckpt_path") -> ResolvedCheckpoint:
    """Find the checkpoint of a file, a URL or a run directory: its best one, for fit its last; errors name the key."""
    path = os.path.expanduser(path)  # noqa: PTH111
    try:
        if path.startswith(("http://", "https://")):
            return _read(_download(path), None, for_fit=for_fit)
        if os.path.isdir(path):  # noqa: PTH112  # also false for a name that is too long
            return _read_run_dir(Path(path), for_fit=for_fit)
        if not os.path.isfile(path):  # noqa: PTH113
            raise UsageError(f"'{path}' does not exist\ngive a checkpoint file, a URL or a run directory")
        folder = Path(path).parent if Path(path).parent.name else Path.cwd()
        is_of_run = folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file()
        return _read(Path(path), folder.parent if is_of_run else None, for_fit=for_fit)
    except MNISTLitError as error:
        raise type(error)(f"{key}: {error}") from error


def _read_run_dir(run_dir: Path, *, for_fit: bool) -> ResolvedCheckpoint:
    files = [run_dir / "checkpoints" / name for name in ((LAST,) if for_fit else (BEST, LAST))]
    if file := next(filter(Path.is_file, files), None):
        return _read(file, run_dir, for_fit=for_fit)
    config = run_dir / "config.yaml"
    if for_fit and config.is_file():
        return ResolvedCheckpoint(file=None, run_dir=run_dir, config=read_config(config))
    raise UsageError(f"{run_dir} holds no checkpoint\nexpected {' or '.join(map(str, files))}")


def _read(file: Path, run_dir: Path | None, *, for_fit: bool) -> ResolvedCheckpoint:
    content = read_checkpoint(file)
    model = content.get("hyper_parameters") or {}
    # One that was made without the command line has no config.
    data = {key: model[key] for key in LINKED if key in model}
    config = content.get("config") or {"model": _without(model, (*LINKED, "num_classes")), "data": data}
    if run_dir is None:
        # Whoever made it chooses network and data only: no paths, no classes, no settings of the training.
        config = {name: _plain_values(config.get(name)) for name in ("model", "data")}
    elif not for_fit:
        config |= {name: _without(config.get(name, {}), TRAINING_KEYS) for name in ("model", "trainer")}
        config.pop("init_from", None)
    shapes = {name: tensor.shape for name, tensor in content["state_dict"].items()}
    return ResolvedCheckpoint(
        file=file, run_dir=run_dir, config=config, step=content.get("global_step") or 0, shapes=shapes
    )


def _without(group: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in keys}


def _plain_values(group: Any) -> dict[str, Any]:
    """Select the values that name no class, no function and no file."""
    others = _without(group if isinstance(group, dict) else {}, (*TRAINING_KEYS, *UNTRUSTED_PATHS))
    # The parser takes names of classes as text only.
    return {
        key: value
        for key, value in others.items()
        if key == "class_names" or all(_is_plain(part) for _, part in walk(value))
    }


def _is_plain(value: Any) -> bool:
    return not {".", "/", "\\"} & set(value) if isinstance(value, str) else not isinstance(value, dict)


def load_weights(checkpoint: ResolvedCheckpoint, model: nn.Module, config: Mapping[str, Any], num_classes: int) -> None:
    """Load a checkpoint's weights into a new model, but for layers of another number of classes.

    Raises:
        UsageError: If the checkpoint is of another network.
    """
    assert checkpoint.file is not None
    own, weights = model.state_dict(), read_checkpoint(checkpoint.file)["state_dict"]
    new = {
        name: own[name]
        for name, tensor in weights.items()
        if name in own and own[name].shape[:1] == (num_classes,) and own[name].shape[1:] == tensor.shape[1:]
        if own[name].shape != tensor.shape
    }
    weights |= new
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    check_network(replace(checkpoint, shapes=shapes), own, config, key="init_from")
    model.load_state_dict(weights)
    if new and is_global_zero():
        print(f"note: new for {num_classes} classes: {', '.join(new)}", file=sys.stderr)


def check_network(
    checkpoint: ResolvedCheckpoint, state_dict: Mapping[str, Tensor], config: Mapping[str, Any], key: str = "ckpt_path"
) -> None:
    """Refuse a checkpoint of another network before anything is written; `config` is that of the network."""
    if checkpoint.file is None or checkpoint.shapes == {name: tensor.shape for name, tensor in state_dict.items()}:
        return
    theirs = checkpoint.config.get("model", {})
    differing = [name for name in theirs if name in config and theirs[name] != config[name]]
    pairs = {name: (format_value(theirs[name]), format_value(config[name])) for name in differing}
    reasons = [f"model.{name} is {before} in the checkpoint, {now} here" for name, (before, now) in pairs.items()]
    reason = "; ".join(reasons) or OTHER_NETWORK
    raise UsageError(f"{key}: the checkpoint is of another network\n{reason}")


def _download(url: str) -> Path:
    """Download a checkpoint; what follows `#sha256=` in its URL is the digest that it must have."""
    address, _, digest = url.partition("#sha256=")
    if PLAIN_HTTP.match(address) and not digest:
        raise UsageError(f"{url} could be exchanged on its way\nuse https://, or add its digest: http://…#sha256=…")
    folder = Path(tempfile.mkdtemp(prefix="mnist_lit-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = folder / "downloaded.ckpt"
    try:
        torch.hub.download_url_to_file(address, str(file), hash_prefix=digest.lower() or None, progress=False)
    except (OSError, HTTPException, RuntimeError, ValueError) as error:
        raise MNISTLitError(f"{url} cannot be downloaded: {' '.join(str(error).split())}") from error
    return file


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint of plain data without running anything in it; refuse any other file."""
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(part.file_size for part in archive.infolist())
        # torch compresses nothing, and what a small archive holds could fill the memory.
        is_compressed = size > file.stat().st_size
        content = {} if is_compressed else torch.load(file, map_location="cpu", weights_only=True)
        kinds: dict[str, Any] = {"state_dict": dict, "pytorch-lightning_version": str, "global_step": int | None}
        kinds |= {"hyper_parameters": dict | None, "config": dict | None}
        damaged = [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]
        damaged += [
            name for name, tensor in (content.get("state_dict") or {}).items() if not isinstance(tensor, Tensor)
        ]
    except Exception as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds more than plain data: {name[1]}" if name else f"it cannot be read: {str(error)[:200]}"
        raise UsageError(f"{file} is no checkpoint of mnist_lit: {reason.splitlines()[0]}") from error
    if damaged:
        raise UsageError(f"{file} is no checkpoint of mnist_lit: its {damaged[0]} is damaged or missing")
    return dict(content)


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
