"""Make the command lines of trials, and try every key and every bound before trial 0."""

import re
import tempfile
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import yaml

from mnist_lit.errors import UsageError
from mnist_lit.formatting import flag_names, flatten, nested
from mnist_lit.search.settings import Settings
from mnist_lit.search.space import Params, Space
from mnist_lit.search.worker import Worker
from mnist_lit.training.run_dir import write_text

# Keys that the search sets for all its trials.
RESERVED = ("config", "run_dir", "ckpt_path", "test_after_fit", "num_threads")
OWN_CLASSES = "a class of your own needs a file, in which main is called below: if __name__ == '__main__'"


def check(settings: Settings, program: Callable[..., Any]) -> tuple[Params, Space]:
    """Build each bound of the space with the real program, in a process of its own.

    Returns:
        The configuration that the trials start from, with the machine's `num_threads` and `num_gpus`; and the space.
    """
    overrides = flatten(settings.overrides)
    for key in [*settings.space, *overrides]:
        if key.split(".")[0] in RESERVED:
            raise UsageError(f"{'space' if key in settings.space else 'overrides'}.{key}: the search sets it itself")
        if key in settings.space and key in overrides:
            raise UsageError(f"overrides.{key}: the space varies it\nleave it out in one of the two")
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Path(folder, "log"))

        def build(params: Params) -> Params:
            args = trial_args(settings, Path(folder, "trials", "0"), {**settings.overrides, **params})
            try:
                base: Params = worker.submit(_dry_run, program, args, fetch=not params).result()
            except UsageError as error:
                # Users do not know the overlay, which is deleted.
                where = "space" if params else "overrides"
                raise UsageError(re.sub(rf"^{re.escape(folder)}\S+, line \d+: ", f"{where}.", str(error))) from error
            except BrokenProcessPool as error:  # it could not import what `main` was given
                raise UsageError(f"search: a process has ended while it started\n{OWN_CLASSES}") from error
            if base["trainer"]["devices"] not in ("auto", 1, "1", [0]):
                raise UsageError("trainer.devices: a trial has one device\nfor more trials at a time use --workers")
            if isinstance(base["seed_everything"], bool):
                raise UsageError("seed_everything: give a number: trials are compared with the same seed")
            if not base["data"].get("val_size", True):
                raise UsageError("data.val_size: 0 leaves nothing to compare trials by")
            return base

        base = build({})
        known = flatten(base) | flag_names(base)
        for params in Space(settings.space, known).corners():
            # Some keys exist in some trials only, for example the momentum of one of several optimizers.
            built = build(params)
            keys = flatten(built) | flag_names(built)
            known = {key: keys[key] for key in settings.space if key in keys} | known
    return base, Space(settings.space, known)


def trial_args(settings: Settings, run_dir: Path, overrides: Params) -> list[str]:
    """Write the config of a trial's own, and return the trial's command line."""
    overlay = run_dir.parents[1] / "overlays" / f"{run_dir.name}.yaml"
    overlay.parent.mkdir(exist_ok=True)
    # No flags: `--model.options.a=3` would keep the other items of a dict, and best.yaml would not repeat the trial.
    content = {"report": False, "pictures.enabled": False, "test_after_fit": False, **flatten(overrides)}
    write_text(overlay, yaml.safe_dump(nested(content), sort_keys=False))
    return ["fit", *(f"--config={config}" for config in [*settings.configs, overlay]), f"--run_dir={run_dir}"]


def _dry_run(program: Callable[..., Any], args: list[str], *, fetch: bool) -> Params:
    """Build what a command line asks for in this process, and run nothing."""
    import torch

    try:
        cli = program(args, is_dry=True)
    except SystemExit as error:
        raise error.__cause__ or error from None
    if fetch:
        cli.datamodule.fetch("fit")
    return {**cli.plain_config, "num_threads": torch.get_num_threads(), "num_gpus": torch.cuda.device_count()}
