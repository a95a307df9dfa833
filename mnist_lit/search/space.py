"""The search space: entries of a search config as Optuna's distributions, and a dry run at each of their bounds."""

import json
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from random import Random
from typing import Any

from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import BaseTrial, FixedTrial

from mnist_lit.errors import UsageError, did_you_mean
from mnist_lit.formatting import flag_names, flatten
from mnist_lit.search.settings import ENTRY, Settings
from mnist_lit.search.worker import Worker, dry_run, trial_args

Params = dict[str, Any]
Scalar = dict[Any, Any] | FloatDistribution | IntDistribution  # choices by their categories, or a number
RESERVED = ("config", "run_dir", "ckpt_path", "test_after_fit", "num_threads")  # the search sets them for all trials
OWN_CLASSES = "a class of your own needs a file, in which main is called below: if __name__ == '__main__'"


class Space:
    """The keys of `fit` that a search varies."""

    def __init__(self, declared: Mapping[str, Any], base: Mapping[str, Any]) -> None:
        self.fixed = {key: value for key, value in base.items() if key not in declared}
        self.scalars: dict[str, Scalar] = {}  # by Optuna's names: of a list those of its length and of each item
        self.conditions: dict[str, dict[str, list[Any]]] = {}
        for key, entry in declared.items():
            _check_names(f"space.{key}", entry, ENTRY)
            self.conditions[key] = self._parse_condition(f"space.{key}.when", entry.get("when", {}))
            self.scalars |= _parse(key, {name: entry[name] for name in entry if name != "when"}, base.get(key))

    def suggest(self, trial: BaseTrial) -> Params:
        """Suggest a value for each key whose condition is met."""
        params: Params = {}
        for key, condition in self.conditions.items():
            known = {**self.fixed, **params}
            if all(other in known and known[other] in values for other, values in condition.items()):
                params[key] = self._suggest(trial, key)
        return params

    def corners(self) -> Iterator[Params]:
        """List points in which every bound of every key occurs: if these are valid, those between them are.

        The bounds are all choices, or the ends of a range and the numbers between them that conditions name.
        """
        bounds: dict[str, list[Any]] = {}
        for name, scalar in self.scalars.items():
            if isinstance(scalar, dict):
                bounds[name] = list(scalar)
            else:
                named = [value for condition in self.conditions.values() for value in condition.get(name, [])]
                between = [
                    value for value in named if isinstance(value, int | float) and scalar.low < value < scalar.high
                ]
                bounds[name] = [scalar.low, scalar.high, *between]
        seen: set[tuple[str, Any]] = set()
        random = Random(0)
        for _ in range(500):  # a bound may stand below rare conditions
            unseen = {name: [end for end in ends if (name, end) not in seen] or ends for name, ends in bounds.items()}
            point = self.suggest(trial := FixedTrial({name: random.choice(ends) for name, ends in unseen.items()}))
            if not trial.params.items() <= seen:
                seen.update(trial.params.items())
                yield point

    def grid(self) -> dict[str, list[Any]]:
        """List all values of each of Optuna's parameters."""
        values: dict[str, list[Any]] = {}
        for name, scalar in self.scalars.items():
            if isinstance(scalar, dict):
                values[name] = list(scalar)
            elif scalar.step is None:
                raise UsageError(f"space.{name}: a grid needs a step or choices, an interval has no end of values")
            else:
                num_steps = round((scalar.high - scalar.low) / scalar.step)
                values[name] = [round(scalar.low + number * scalar.step, 12) for number in range(num_steps + 1)]
        return values

    def _suggest(self, trial: BaseTrial, name: str) -> Any:
        """Suggest a value; of a list first the length, then as many items."""
        if name not in self.scalars:
            length = self._suggest(trial, f"{name}.length")
            return [self._suggest(trial, f"{name}.{position}") for position in range(length)]
        scalar = self.scalars[name]
        if isinstance(scalar, dict):
            return scalar[trial.suggest_categorical(name, list(scalar))]
        suggest: Any = trial.suggest_int if isinstance(scalar, IntDistribution) else trial.suggest_float
        return suggest(name, scalar.low, scalar.high, step=scalar.step, log=scalar.log)

    def _parse_condition(self, where: str, when: Any) -> dict[str, list[Any]]:
        if not isinstance(when, Mapping):
            raise UsageError(f"{where}: must be like {{other.key: value}}, got {when!r}")
        condition = {other: value if isinstance(value, list) else [value] for other, value in when.items()}
        for other, values in condition.items():
            if other not in self.conditions and other not in self.fixed:
                hint = did_you_mean(other, [*self.conditions, *self.fixed])
                raise UsageError(f"{where}.{other}: is neither a key above it in the space nor another of fit\n{hint}")
            choices = self.scalars.get(other)
            if isinstance(choices, dict) and (wrong := [value for value in values if value not in choices.values()]):
                raise UsageError(f"{where}.{other}: space.{other} is never {wrong[0]}")
        return condition


def _parse(key: str, entry: Mapping[str, Any], default: Any) -> dict[str, Scalar]:
    where, items = f"space.{key}", entry.get("items")
    if "items" not in entry and "length" not in entry:
        return {key: _parse_scalar(where, entry, default)}
    _check_names(where, entry, ["length", "items"])
    if isinstance(items, list) and "length" not in entry:
        length: Scalar = IntDistribution(len(items), len(items))
        scalars = [_parse_scalar(f"{where}.items.{number}", item, None) for number, item in enumerate(items)]
    else:
        length = _parse_scalar(f"{where}.length", entry.get("length"), None)
        if not isinstance(length, IntDistribution) or length.low < 0:
            raise UsageError(f"{where}.length: must be like {{low: 1, high: 3}}, whole numbers from 0")
        first = default[0] if isinstance(default, list) and default else None
        scalars = [_parse_scalar(f"{where}.items", items, first)] * length.high
    return {f"{key}.length": length, **{f"{key}.{position}": scalar for position, scalar in enumerate(scalars)}}


def _parse_scalar(where: str, entry: Any, default: Any) -> Scalar:
    is_choice = isinstance(entry, Mapping) and "choices" in entry
    _check_names(where, entry, ["choices"] if is_choice else ["low", "high", "step", "log"])
    try:
        return _choice(entry["choices"]) if is_choice else _number(default, **entry)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from error


def _choice(choices: Any) -> dict[Any, Any]:
    if not isinstance(choices, list) or not choices:
        raise TypeError(f"choices must be a list, got {choices}")
    # Optuna's categories are scalars, of which 1, 1.0 and true are the same.
    are_scalars = all(isinstance(choice, int | float | str | None) for choice in choices)
    are_distinct = are_scalars and len(set(choices)) == len(choices)
    return {choice if are_distinct else json.dumps(choice, default=str): choice for choice in choices}


def _number(default: Any, low: Any = None, high: Any = None, step: Any = None, log: bool = False) -> Scalar:
    for name, number in {"low": low, "high": high, "step": step or 1}.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{name} must be a finite number, got {number}")
    are_whole = all(isinstance(number, int | None) for number in (low, high, step)) and not isinstance(default, float)
    with warnings.catch_warnings(action="ignore"):  # that high is no multiple of the step
        if are_whole:
            return IntDistribution(low, high, log=log, step=1 if step is None else step)
        return FloatDistribution(low, high, log=log, step=step)


def _check_names(where: str, entry: Any, names: Collection[str]) -> None:
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where}: must be like {{low: 0.1, high: 0.5}} or {{choices: [1, 2]}}, got {entry!r}")
    if unknown := next((str(name) for name in entry if name not in names), None):
        hint = did_you_mean(unknown, names) or f"there are {', '.join(names)}"
        raise UsageError(f"{where}: there is no {unknown}\n{hint}")


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
                base: Params = worker.submit(dry_run, program, args, fetch=not params).result()
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
