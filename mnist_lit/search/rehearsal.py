"""Before trial 0: every key and every bound of a search is tried on the real command line."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mnist_lit.errors import UsageError
from mnist_lit.search.settings import Settings
from mnist_lit.search.space import Params, Space, flat, is_key, lookup, nested
from mnist_lit.search.trial import Rehearsal, Rehearsed, trial_args
from mnist_lit.search.workers import Pool

__all__ = ["rehearse"]

# What a search decides itself, for all its trials.
RESERVED = ("config", "run_dir", "ckpt_path", "test_after_fit", "num_threads")


def rehearse(pool: Pool, settings: Settings) -> tuple[Rehearsed, Space]:
    """Make sure that trials can run, and of the data.

    Returns:
        What the trials start from, and the space that they vary.

    Raises:
        UsageError: If a key does not exist, or a value at the end of its range is refused.
    """
    space = Space.parse(settings.space)
    _check_keys(settings)
    base = _try(pool, settings, {}, fetches=True)
    _check(base.config)
    _check_groups(settings, space, base.config)
    space.check(base.config)
    found: Params = {}
    for params in space.settled({}).rehearsals(base.config):
        config = _try(pool, settings, params).config
        _check(config)
        found |= {key: lookup(config, key) for key in params}
    # A key whose value is a fraction, or has become one in the parser, takes fractions.
    fractions = {key: value for key in found if isinstance(value := lookup(base.config, key), float)}
    return base, space.settled(nested({**found, **fractions}))


def _check_keys(settings: Settings) -> None:
    if wrong := next((key for key in settings.overrides if not is_key(key)), None):
        raise UsageError(f"overrides: {wrong!r} is no key")
    overrides = flat(settings.overrides)
    for place, keys in (("space", settings.space), ("overrides", overrides)):
        if reserved := next((key for key in keys if key.split(".")[0] in RESERVED), None):
            raise UsageError(f"{place}.{reserved}: a search decides on {reserved} itself")
    if twice := next((key for key in overrides if key in settings.space), None):
        raise UsageError(f"overrides.{twice}: the space varies it\nleave it out in one of the two")


def _check_groups(settings: Settings, space: Space, base: Mapping[str, Any]) -> None:
    """The parser takes a value for a whole group of keys without a word, and leaves the group as it is."""
    values = {f"overrides.{key}": [value] for key, value in settings.overrides.items()}
    values |= {f"space.{key}": kind.ends() for key, kind in space.kinds.items()}
    for place, ends in values.items():
        group = lookup(base, place.partition(".")[2])
        is_group = isinstance(group, Mapping) and "class_path" not in group
        if is_group and not all(isinstance(end, Mapping) for end in ends):
            raise UsageError(f"{place}: is a group of keys, vary or set one of them: {place}.{next(iter(group))}, …")


def _try(pool: Pool, settings: Settings, params: Params, *, fetches: bool = False) -> Rehearsed:
    with tempfile.TemporaryDirectory() as folder:
        overlay = Path(folder) / "overlay.yaml"
        overlay.write_text(yaml.safe_dump(nested({**settings.overrides, **params})), encoding="utf-8")
        try:
            rehearsed: Rehearsed = pool.call(Rehearsal(trial_args(settings, overlay), fetches))
        except UsageError as error:
            raise UsageError(_in_terms_of_the_search(str(error), str(overlay), params)) from error
    return rehearsed


def _in_terms_of_the_search(message: str, overlay: str, params: Params) -> str:
    """A complaint with the place in the search's settings that it is about."""
    found = re.match(rf"{re.escape(overlay)}, line \d+: (?P<key>[\w.]+)", message)
    if not found:
        point = ", ".join(f"{key} {value}" for key, value in params.items())
        return f"{message}\nthat is at this point of the space: {point}" if params else message
    key = found["key"]
    is_varied = any(f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}.") for name in params)
    return f"{'space' if is_varied else 'overrides'}.{key}{message[found.end() :]}"


def _check(config: Mapping[str, Any]) -> None:
    devices = config["trainer"]["devices"]
    if devices not in ("auto", 1, "1", [0]):
        raise UsageError(
            f"trainer.devices: a trial has one device, got {devices}\nfor more trials at a time use --workers"
        )
    if isinstance(config["seed_everything"], bool):
        raise UsageError("seed_everything: trials are compared with the same seed: give a number")
    if not config["data"]["val_size"]:
        raise UsageError("data.val_size: 0 leaves nothing to compare trials by")
