"""Make the command lines of trials, and try every key and every bound before trial 0."""

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mnist_lit.errors import UsageError
from mnist_lit.search.settings import Settings
from mnist_lit.search.space import Params, Space, flat, lookup, nested
from mnist_lit.search.worker import Base, Worker, dry_run
from mnist_lit.training.run_dir import write_text

__all__ = ["check", "trial_args", "write_overlay"]

# Keys that the search sets for all its trials.
RESERVED = ("config", "run_dir", "ckpt_path", "test_after_fit", "num_threads")


def check(settings: Settings, program: Callable[..., Any]) -> tuple[Base, Space]:
    """Build each bound of the space with the real program, in a process of its own.

    Returns:
        What the trials start from, and the space that they vary.

    Raises:
        UsageError: If a key does not exist, or a value is refused.
    """
    overrides = flat(settings.overrides)
    _check_keys("space", settings.space)
    _check_keys("overrides", overrides)
    if twice := next((key for key in overrides if key in settings.space), None):
        raise UsageError(f"overrides.{twice}: the space varies it\nleave it out in one of the two")
    with tempfile.TemporaryDirectory() as folder:
        return _build_bounds(settings, program, Worker(Path(folder, "log")), Path(folder, "overlay.yaml"))


def trial_args(settings: Settings, overlay: Path) -> list[str]:
    """Return the command line of a trial without its directory.

    Args:
        settings: The settings of the search.
        overlay: The config of the trial's own.
    """
    switches = {"pictures": "--pictures.enabled=false", "report": "--report=false"}
    wanted = {key.partition(".")[0] for key in settings.overrides}
    flags = [flag for key, flag in switches.items() if key not in wanted]
    return ["fit", *(f"--config={config}" for config in [*settings.configs, overlay]), "--test_after_fit=false", *flags]


def _build_bounds(settings: Settings, program: Callable[..., Any], worker: Worker, overlay: Path) -> tuple[Base, Space]:
    def build(params: Params) -> Base:
        overlay.write_text(yaml.safe_dump(nested({**settings.overrides, **params})), encoding="utf-8")
        try:
            base = worker.submit(dry_run, program, trial_args(settings, overlay), fetch=not params).result()
        except UsageError as error:
            raise UsageError(_shorten(str(error), str(overlay), params)) from error
        _check_comparable(base.config)
        return base

    base = build({})
    _check_groups({f"overrides.{key}": [value] for key, value in settings.overrides.items()}, base.config)
    space = Space(settings.space, base.config)
    bounds = {f"space.{key}": parameter.bounds() for key, parameter in space.parameters.items()}
    _check_groups(bounds, base.config)
    values = flat(base.config)
    for params in space.corners():
        config = build(params).config
        # A key that holds a whole number may take fractions: what the parser has made of its bounds shows it.
        values |= {key: found for key in params if isinstance(found := lookup(config, key), float)}
    return base, Space(settings.space, nested(values))


def write_overlay(settings: Settings, name: str, overrides: Params) -> Path:
    """Write the config of a trial's own.

    Returns:
        The file, in the directory `overlays` of the study.
    """
    file = settings.folder / "overlays" / f"{name}.yaml"
    file.parent.mkdir(exist_ok=True)
    write_text(file, yaml.safe_dump(nested(overrides), sort_keys=False))
    return file


def _check_keys(where: str, keys: Iterable[Any]) -> None:
    for key in keys:
        if not isinstance(key, str) or not all(key.split(".")):
            raise UsageError(f"{where}: {key!r} is no key")
        if key.split(".")[0] in RESERVED:
            raise UsageError(f"{where}.{key}: the search sets it itself")


def _check_groups(values: Mapping[str, list[Any]], config: Mapping[str, Any]) -> None:
    """Refuse a value for a group of keys, of which the parser takes no notice."""
    for where, options in values.items():
        group = lookup(config, where.partition(".")[2])
        is_group = isinstance(group, Mapping) and "class_path" not in group
        if is_group and not all(isinstance(option, Mapping) for option in options):
            raise UsageError(f"{where}: is a group of keys, give one of them: {where}.{next(iter(group))}, …")


def _check_comparable(config: Mapping[str, Any]) -> None:
    if config["trainer"]["devices"] not in ("auto", 1, "1", [0]):
        raise UsageError("trainer.devices: a trial has one device\nfor more trials at a time use --workers")
    if isinstance(config["seed_everything"], bool):
        raise UsageError("seed_everything: give a number: trials are compared with the same seed")
    if not config["data"]["val_size"]:
        raise UsageError("data.val_size: 0 leaves nothing to compare trials by")


def _shorten(message: str, overlay: str, params: Params) -> str:
    """Name the key of the search in place of the line of an overlay."""
    if found := re.match(rf"{re.escape(overlay)}, line \d+: (?P<key>[\w.]+)", message):
        key = found["key"]
        is_varied = any(f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.") for name in params)
        return f"{'space' if is_varied else 'overrides'}.{key}{message[found.end() :]}"
    point = ", ".join(f"{key} {value}" for key, value in params.items())
    return f"{message}\nat this point of the space: {point}" if params else message
