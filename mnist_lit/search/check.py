"""Make the command lines of trials, and try every key and every bound before trial 0."""

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mnist_lit.errors import UsageError
from mnist_lit.search.settings import Settings
from mnist_lit.search.space import Params, Space, flat, nested
from mnist_lit.search.worker import Worker
from mnist_lit.training.run_dir import write_text

__all__ = ["Base", "check", "trial_args"]

# Keys that the search sets for all its trials.
RESERVED = ("config", "run_dir", "ckpt_path", "test_after_fit", "num_threads")


class Base(NamedTuple):
    """Holds what the trials of a search start from."""

    config: dict[str, Any]
    num_threads: int
    num_gpus: int


def check(settings: Settings, program: Callable[..., Any]) -> tuple[Base, Space]:
    """Build each bound of the space with the real program, in a process of its own."""
    _check_keys("space", settings.space)
    _check_keys("overrides", flat(settings.overrides))
    if twice := settings.space.keys() & flat(settings.overrides).keys():
        raise UsageError(f"overrides.{twice.pop()}: the space varies it\nleave it out in one of the two")
    with tempfile.TemporaryDirectory() as folder:
        worker, overlay = Worker(Path(folder, "log")), Path(folder, "overlay.yaml")

        def build(params: Params) -> Base:
            args = trial_args(settings, overlay, {**settings.overrides, **params})
            try:
                base = worker.submit(_dry_run, program, args, fetch=not params).result()
            except UsageError as error:
                # Users do not know the file, which is deleted.
                where = "space" if params else "overrides"
                raise UsageError(re.sub(rf"^{re.escape(str(overlay))}, line \d+: ", f"{where}.", str(error))) from error
            _check_comparable(base.config)
            return base

        base = build({})
        known = flat(base.config)
        for params in Space(settings.space, known).corners():
            # Some keys exist in some trials only, for example the momentum of one of several optimizers.
            known = {key: value for key, value in flat(build(params).config).items() if key in settings.space} | known
    return base, Space(settings.space, known)


def trial_args(settings: Settings, overlay: Path, overrides: Params) -> list[str]:
    """Write the config of a trial's own, and return the trial's command line."""
    overlay.parent.mkdir(exist_ok=True)
    write_text(overlay, yaml.safe_dump(nested(overrides), sort_keys=False))
    switches = {"pictures": "--pictures.enabled=false", "report": "--report=false"}
    wanted = {key.partition(".")[0] for key in settings.overrides}
    flags = [flag for key, flag in switches.items() if key not in wanted]
    return ["fit", *(f"--config={config}" for config in [*settings.configs, overlay]), "--test_after_fit=false", *flags]


def _dry_run(program: Callable[..., Any], args: list[str], *, fetch: bool) -> Base:
    """Build what a command line asks for in this process, and run nothing."""
    import torch

    num_threads = torch.get_num_threads()
    try:
        cli = program(args, is_dry=True)
    except SystemExit as error:
        raise error.__cause__ or error from None
    if fetch:
        cli.datamodule.fetch("fit")
    return Base(cli.plain_config, num_threads, torch.cuda.device_count())


def _check_keys(where: str, keys: Iterable[str]) -> None:
    for key in keys:
        if key.split(".")[0] in RESERVED:
            raise UsageError(f"{where}.{key}: the search sets it itself")


def _check_comparable(config: dict[str, Any]) -> None:
    if config["trainer"]["devices"] not in ("auto", 1, "1", [0]):
        raise UsageError("trainer.devices: a trial has one device\nfor more trials at a time use --workers")
    if isinstance(config["seed_everything"], bool):
        raise UsageError("seed_everything: give a number: trials are compared with the same seed")
    if not config["data"]["val_size"]:
        raise UsageError("data.val_size: 0 leaves nothing to compare trials by")
