"""The search space: entries of a search config as Optuna's distributions."""

import copy
import itertools
import json
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from optuna import Trial
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from mnist_lit.errors import UsageError, did_you_mean

__all__ = ["Params", "Space", "flat", "nested"]

Params = dict[str, Any]
MAX_REPEATS = 200  # corners in a row that show no new bound, which may stand below rare conditions
SCALARS = (bool, int, float, str, type(None))


class Corner:
    """Suggests bounds in place of a trial, those first that no corner has had."""

    def __init__(self, seen: set[tuple[str, Any]], wanted: Mapping[str, list[Any]], random: Random) -> None:
        self.seen = seen
        self.wanted = wanted
        self.random = random
        self.is_new = False

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        unseen = [choice for choice in choices if (name, choice) not in self.seen]
        value = unseen[0] if unseen else self.random.choice(choices)
        self.seen.add((name, value))
        self.is_new |= bool(unseen)
        return value

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> Any:
        wanted = [value for value in self.wanted.get(name, []) if isinstance(value, int | float)]
        return self.suggest_categorical(name, [low, high, *(value for value in wanted if low < value < high)])

    suggest_int = suggest_float


@dataclass(frozen=True)
class Scalar:
    """A number, or one of the choices that the categories of its distribution stand for."""

    distribution: CategoricalDistribution | FloatDistribution | IntDistribution
    choices: tuple[Any, ...] = ()

    def suggest(self, trial: Trial | Corner, name: str) -> Any:
        match self.distribution:
            case CategoricalDistribution(choices=names):
                return self.choices[names.index(trial.suggest_categorical(name, names))]
            case FloatDistribution(low=low, high=high, log=log, step=step):
                return trial.suggest_float(name, low, high, log=log, step=step)
            case IntDistribution(low=low, high=high, log=log, step=step):
                return trial.suggest_int(name, low, high, log=log, step=step)

    def grid(self, name: str) -> dict[str, list[Any]]:
        match self.distribution:
            case CategoricalDistribution(choices=names):
                return {name: list(names)}
            case IntDistribution(low=low, high=high, step=step):
                return {name: list(range(low, high + 1, step))}
            case FloatDistribution(low=low, high=high, step=float(step)):
                return {name: [round(low + number * step, 12) for number in range(round((high - low) / step) + 1)]}
        raise UsageError(f"space.{name}: a grid needs a step or choices, an interval has no end of values")


@dataclass(frozen=True)
class ScalarList:
    """A list of scalars, of which `length` says how many are used; None for all."""

    items: list[Scalar]
    length: Scalar | None = None

    def suggest(self, trial: Trial | Corner, name: str) -> list[Any]:
        length = self.length.suggest(trial, f"{name}.length") if self.length else len(self.items)
        return [item.suggest(trial, f"{name}.{position}") for position, item in enumerate(self.items[:length])]

    def grid(self, name: str) -> dict[str, list[Any]]:
        parts = {f"{name}.{position}": item for position, item in enumerate(self.items)}
        parts |= {f"{name}.length": self.length} if self.length else {}
        return {part: values for key, scalar in parts.items() for part, values in scalar.grid(key).items()}


class Space:
    """The keys of `fit` that a search varies."""

    def __init__(self, declared: Mapping[str, Any], base: Mapping[str, Any]) -> None:
        self.base = base
        self.dimensions: dict[str, Scalar | ScalarList] = {}
        self.conditions: dict[str, dict[str, list[Any]]] = {}
        for key, entry in declared.items():
            where = f"space.{key}"
            _check_names(where, entry, ["low", "high", "step", "log", "choices", "items", "length", "when"])
            when = entry.get("when", {})
            _check_names(f"{where}.when", when, when)
            self.conditions[key] = {
                other: value if isinstance(value, list) else [value] for other, value in when.items()
            }
            for other, values in self.conditions[key].items():
                self._check_condition(f"{where}.when.{other}", other, values, is_later=other in declared)
            rest = {name: value for name, value in entry.items() if name != "when"}
            self.dimensions[key] = _parse(where, rest, base.get(key))

    def suggest(self, trial: Trial | Corner) -> Params:
        """Suggest a value for each key whose condition is met."""
        params: Params = {}
        for key, dimension in self.dimensions.items():
            if self._is_met(key, params):
                params[key] = dimension.suggest(trial, key)
        return params

    def corners(self) -> Iterator[Params]:
        """List points in which every bound of every key occurs: if these are valid, those between them are."""
        wanted: dict[str, list[Any]] = {}
        for other, values in itertools.chain.from_iterable(map(dict.items, self.conditions.values())):
            wanted.setdefault(other, []).extend(values)
        seen: set[tuple[str, Any]] = set()
        random, num_repeats = Random(0), 0
        while num_repeats < MAX_REPEATS:
            corner = Corner(seen, wanted, random)
            point = self.suggest(corner)
            num_repeats = 0 if corner.is_new else num_repeats + 1
            if corner.is_new:
                yield point

    def grid(self) -> dict[str, list[Any]]:
        """List all values of each of Optuna's parameters."""
        return {name: values for key, part in self.dimensions.items() for name, values in part.grid(key).items()}

    def _is_met(self, key: str, params: Params) -> bool:
        for other, values in self.conditions[key].items():
            known = params if other in self.dimensions else self.base
            if other not in known or known[other] not in values:
                return False
        return True

    def _check_condition(self, where: str, other: str, values: list[Any], *, is_later: bool) -> None:
        if other in self.dimensions:
            choices = getattr(self.dimensions[other], "choices", ())
            if choices and (wrong := [value for value in values if value not in choices]):
                raise UsageError(f"{where}: space.{other} is never {wrong[0]}")
        elif is_later:
            raise UsageError(f"{where}: {other} has to stand above it in the space")
        elif other not in self.base:
            raise UsageError(f"{where}: there is no such key\n{did_you_mean(other, self.base)}")


def _parse(where: str, entry: Mapping[str, Any], default: Any) -> Scalar | ScalarList:
    if "items" not in entry and "length" not in entry:
        return _parse_scalar(where, entry, default)
    items = entry.get("items")
    if isinstance(items, list) and items and len(entry) == 1:
        scalars = [_parse_scalar(f"{where}.items.{number}", item, None) for number, item in enumerate(items)]
        return ScalarList(scalars)
    _check_names(where, entry, ["length", "items"])
    length = _parse_scalar(f"{where}.length", entry.get("length"), None)
    if not isinstance(length.distribution, IntDistribution) or length.distribution.low < 0:
        raise UsageError(f"{where}.length: must be like {{low: 1, high: 3}}, whole numbers from 0")
    first = default[0] if isinstance(default, list) and default else None
    return ScalarList([_parse_scalar(f"{where}.items", items, first)] * length.distribution.high, length)


def _parse_scalar(where: str, entry: Any, default: Any) -> Scalar:
    is_choice = isinstance(entry, Mapping) and "choices" in entry
    _check_names(where, entry, ["choices"] if is_choice else ["low", "high", "step", "log"])
    try:
        return _choice(entry["choices"]) if is_choice else _number(default, **entry)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from error


def _choice(choices: Any) -> Scalar:
    if not isinstance(choices, list):
        raise TypeError(f"choices must be a list, got {choices}")
    texts = [json.dumps(choice, default=str) for choice in choices]
    if twice := next((text for text in texts if texts.count(text) > 1), None):
        raise ValueError(f"{twice} stands twice in choices")
    # Optuna takes scalars only, for which 1, 1.0 and true are the same.
    are_distinct = all(isinstance(choice, SCALARS) for choice in choices) and len(set(choices)) == len(choices)
    return Scalar(CategoricalDistribution(choices if are_distinct else texts), tuple(choices))


def _number(default: Any, low: Any = None, high: Any = None, step: Any = None, log: Any = False) -> Scalar:
    for name, number in {"low": low, "high": high, "step": 1 if step is None else step}.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{name} must be a finite number, got {number}")
    if not isinstance(log, bool):
        raise TypeError(f"log must be true or false, got {log}")
    are_whole = all(isinstance(number, int | None) for number in (low, high, step)) and not isinstance(default, float)
    with warnings.catch_warnings(action="ignore"):  # that high is no multiple of the step
        if are_whole:
            return Scalar(IntDistribution(low, high, log=log, step=1 if step is None else step))
        return Scalar(FloatDistribution(low, high, log=log, step=step))


def _check_names(where: str, entry: Any, names: Collection[str]) -> None:
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where}: must be like {{low: 0.1, high: 0.5}} or {{choices: [1, 2]}}, got {entry!r}")
    if unknown := next((str(name) for name in entry if name not in names), None):
        hint = did_you_mean(unknown, names) or f"there are {', '.join(names)}"
        raise UsageError(f"{where}: there is no {unknown}\n{hint}")


def flat(tree: Mapping[str, Any], prefix: str = "") -> Params:
    """Turn mappings of mappings into keys with dots."""
    leaves: Params = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        leaves |= flat(value, f"{key}.") if isinstance(value, Mapping) and value else {key: value}
    return leaves


def nested(params: Mapping[str, Any]) -> Params:
    """Turn keys with dots into mappings of mappings; a class beside its arguments becomes a class_path."""
    tree: Params = {}
    for key in sorted(params, key=lambda key: key.count(".")):
        *path, name = key.split(".")
        branch = tree
        for part in path:
            if not isinstance(branch.setdefault(part, {}), dict):
                branch[part] = {"class_path": branch[part]}
            branch = branch[part]
        branch[name] = copy.deepcopy(params[key])
    return tree
