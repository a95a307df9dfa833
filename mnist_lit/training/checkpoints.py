"""Checkpoints: find the one that is meant, read it without trusting it, write it as a whole."""

import atexit
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from mnist_lit.command_line import read_config
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
    state_dict: dict[str, Tensor] = field(default_factory=dict)

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
    try:
        file, run_dir = _locate(os.path.expanduser(path), (LAST,) if for_fit else (BEST, LAST))  # noqa: PTH111
        if file is None and run_dir is not None:
            return ResolvedCheckpoint(file=None, run_dir=run_dir, config=read_config(run_dir / "config.yaml"))
        assert file is not None
        content = read_checkpoint(file)
    except MNISTLitError as error:
        raise type(error)(f"{key}: {error}") from error
    step, state_dict = content.get("global_step") or 0, content["state_dict"]
    config = _read_config(content, is_own=run_dir is not None, for_fit=for_fit)
    return ResolvedCheckpoint(file=file, run_dir=run_dir, config=config, step=step, state_dict=state_dict)


def _locate(path: str, names: Sequence[str]) -> tuple[Path | None, Path | None]:
    """Find a checkpoint's file and its run directory; there is no file where fit was stopped before its first one."""
    if path.startswith(("http://", "https://")):
        return _download(path), None
    if os.path.isdir(path):  # noqa: PTH112  # also false for a name that is too long
        files = [Path(path, "checkpoints", name) for name in names]
        file = next(filter(Path.is_file, files), None)
        if file is None and not (names == (LAST,) and Path(path, "config.yaml").is_file()):
            raise UsageError(f"{path} holds no checkpoint\nexpected {' or '.join(map(str, files))}")
        return file, Path(path)
    if not os.path.isfile(path):  # noqa: PTH113
        raise UsageError(f"'{path}' does not exist\ngive a checkpoint file, a URL or a run directory")
    folder = Path(path).parent if Path(path).parent.name else Path.cwd()
    is_of_run = folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file()
    return Path(path), folder.parent if is_of_run else None


def _read_config(content: dict[str, Any], *, is_own: bool, for_fit: bool) -> dict[str, Any]:
    """Read the configuration of a checkpoint; of a stranger's only what can do no harm."""
    model = content.get("hyper_parameters") or {}
    # One that was made without the command line has no config.
    data = {key: model[key] for key in LINKED if key in model}
    config: dict[str, Any] = content.get("config") or {"model": _without(model, (*LINKED, "num_classes")), "data": data}
    if not is_own:
        # Whoever made it chooses network and data only: no paths, no classes, no settings of the training.
        return {name: _plain_values(config.get(name)) for name in ("model", "data")}
    if not for_fit:
        config |= {name: _without(config.get(name, {}), TRAINING_KEYS) for name in ("model", "trainer")}
        config.pop("init_from", None)
    return config


def _without(group: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in keys}


def _plain_values(group: Any) -> dict[str, Any]:
    """Select the values that name no class, no function and no file."""
    others = _without(group if isinstance(group, dict) else {}, (*TRAINING_KEYS, *UNTRUSTED_PATHS))
    return {key: value for key, value in others.items() if key == "class_names" or _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    # The parser takes names of classes as text only.
    return not {".", "/", "\\"} & set(value) if isinstance(value, str) else not isinstance(value, dict)


def load_weights(checkpoint: ResolvedCheckpoint, model: nn.Module, config: Mapping[str, Any], num_classes: int) -> None:
    """Load a checkpoint's weights into a new model, but for layers of another number of classes.

    Raises:
        UsageError: If the checkpoint is of another network.
    """
    own = model.state_dict()
    new = {
        name: own[name]
        for name, tensor in checkpoint.state_dict.items()
        if name in own and own[name].shape == (num_classes, *tensor.shape[1:]) != tensor.shape
    }
    weights = checkpoint.state_dict | new
    check_network(replace(checkpoint, state_dict=weights), own, config, key="init_from")
    model.load_state_dict(weights)
    if new and is_global_zero():
        print(f"note: new for {num_classes} classes: {', '.join(new)}", file=sys.stderr)


def check_network(
    checkpoint: ResolvedCheckpoint, state_dict: Mapping[str, Tensor], config: Mapping[str, Any], key: str = "ckpt_path"
) -> None:
    """Refuse a checkpoint of another network before anything is written; `config` is that of the network."""
    shapes, own = ({name: tensor.shape for name, tensor in of.items()} for of in (checkpoint.state_dict, state_dict))
    if checkpoint.file is None or shapes == own:
        return
    theirs = checkpoint.config.get("model", {})
    pairs = {name: (format_value(theirs[name]), format_value(config[name])) for name in theirs if name in config}
    reasons = [f"model.{name} is {a} in the checkpoint, {b} here" for name, (a, b) in pairs.items() if a != b]
    reason = "; ".join(reasons) or OTHER_NETWORK
    raise UsageError(f"{key}: the checkpoint is of another network\n{reason}")


def _download(url: str) -> Path:
    """Download a checkpoint; what follows `#sha256=` in its URL is the digest that it must have."""
    address, _, digest = url.partition("#sha256=")
    if PLAIN_HTTP.match(address) and not digest:
        raise UsageError(f"{url} could be exchanged on its way\nuse https://, or add its digest: http://…#sha256=…")
    if digest and not re.fullmatch("[0-9a-f]{64}", digest.lower()):
        raise UsageError(f"{url}: a digest of SHA-256 has 64 hexadecimal digits")
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
        raise UsageError(f"{file} is not a checkpoint of mnist_lit: {reason.splitlines()[0]}") from error
    if damaged:
        raise UsageError(f"{file} is not a checkpoint of mnist_lit: its {damaged[0]} is damaged or missing")
    return dict(content)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint as a whole or not at all, and reads plain data only.

    Lightning writes through the system's temporary folder; from another disk the file would be copied, not renamed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        Path(path).parent.mkdir(exist_ok=True)
        with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))
