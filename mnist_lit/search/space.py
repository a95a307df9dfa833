"""The search space: entries of a search config as Optuna's distributions."""

import copy
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

Params = dict[str, Any]
MAX_REPEATS = 200  # corners in a row that show no new bound, which may stand below rare conditions
SCALARS = (bool, int, float, str, type(None))


class Corner:
    """Suggests bounds in place of a trial: those first that no corner has had, then any values."""

    def __init__(self, seen: set[tuple[str, Any]], random: Random) -> None:
        self.seen, self.random, self.is_new = seen, random, False

    def suggest_categorical(self, name: str, bounds: Sequence[Any], values: Sequence[Any] = ()) -> Any:
        unseen = [bound for bound in bounds if (name, bound) not in self.seen]
        self.seen.update((name, bound) for bound in unseen[:1])
        self.is_new |= bool(unseen)
        return unseen[0] if unseen else self.random.choice(values or bounds)

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        return float(self.suggest_categorical(name, [low, high]))

    def suggest_int(self, name: str, low: int, high: int, step: int, **_: Any) -> int:
        # The condition of another key may name a value between the bounds.
        return int(self.suggest_categorical(name, [low, high], range(low, high + 1, step)))


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
        if isinstance(self.distribution, CategoricalDistribution):
            return {name: list(self.distribution.choices)}
        low, high, step = self.distribution.low, self.distribution.high, self.distribution.step
        if step is None:
            raise UsageError(f"space.{name}: a grid needs a step or choices, an interval has no end of values")
        return {name: [round(low + number * step, 12) for number in range(round((high - low) / step) + 1)]}


@dataclass(frozen=True)
class ScalarList:
    """A list of scalars, of which `length` says how many are used; None for all."""

    items: list[Scalar]
    length: Scalar | None = None

    def suggest(self, trial: Trial | Corner, name: str) -> list[Any]:
        length = self.length.suggest(trial, f"{name}.length") if self.length else len(self.items)
        return [item.suggest(trial, f"{name}.{position}") for position, item in enumerate(self.items[:length])]

    def grid(self, name: str) -> dict[str, list[Any]]:
        grid = self.length.grid(f"{name}.length") if self.length else {}
        for position, item in enumerate(self.items):
            grid |= item.grid(f"{name}.{position}")
        return grid


class Space:
    """The keys of `fit` that a search varies."""

    def __init__(self, declared: Mapping[str, Any], base: Mapping[str, Any]) -> None:
        self.fixed = {key: value for key, value in base.items() if key not in declared}
        self.dimensions: dict[str, Scalar | ScalarList] = {}
        self.conditions: dict[str, dict[str, list[Any]]] = {}
        for key, entry in declared.items():
            where = f"space.{key}"
            _check_names(where, entry, ["low", "high", "step", "log", "choices", "items", "length", "when"])
            when = entry.get("when", {})
            _check_names(f"{where}.when", when, when)
            self.conditions[key] = {name: value if isinstance(value, list) else [value] for name, value in when.items()}
            for other, values in self.conditions[key].items():
                self._check_condition(f"{where}.when.{other}", other, values)
            self.dimensions[key] = _parse(where, {name: entry[name] for name in entry if name != "when"}, base.get(key))

    def suggest(self, trial: Trial | Corner) -> Params:
        """Suggest a value for each key whose condition is met."""
        params: Params = {}
        for key, dimension in self.dimensions.items():
            known = {**self.fixed, **params}
            if all(other in known and known[other] in values for other, values in self.conditions[key].items()):
                params[key] = dimension.suggest(trial, key)
        return params

    def corners(self) -> Iterator[Params]:
        """List points in which every bound of every key occurs: if these are valid, those between them are."""
        seen: set[tuple[str, Any]] = set()
        random, num_repeats = Random(0), 0
        while num_repeats < MAX_REPEATS:
            point = self.suggest(corner := Corner(seen, random))
            num_repeats += 1
            if corner.is_new:
                num_repeats = 0
                yield point

    def grid(self) -> dict[str, list[Any]]:
        """List all values of each of Optuna's parameters."""
        return {name: values for key, part in self.dimensions.items() for name, values in part.grid(key).items()}

    def _check_condition(self, where: str, other: str, values: list[Any]) -> None:
        if other not in self.dimensions and other not in self.fixed:
            hint = did_you_mean(other, [*self.dimensions, *self.fixed])
            raise UsageError(f"{where}: is neither a key above it in the space nor another key of fit\n{hint}")
        choices = getattr(self.dimensions.get(other), "choices", ())
        if choices and (wrong := [value for value in values if value not in choices]):
            raise UsageError(f"{where}: space.{other} is never {wrong[0]}")


def _parse(where: str, entry: Mapping[str, Any], default: Any) -> Scalar | ScalarList:
    if "items" not in entry and "length" not in entry:
        return _parse_scalar(where, entry, default)
    _check_names(where, entry, ["length", "items"])
    items = entry.get("items")
    if isinstance(items, list) and "length" not in entry:
        return ScalarList([_parse_scalar(f"{where}.items.{number}", item, None) for number, item in enumerate(items)])
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


def _choice(choices: list[Any]) -> Scalar:
    texts = [json.dumps(choice, default=str) for choice in choices]
    if twice := next((text for text in texts if texts.count(text) > 1), None):
        raise ValueError(f"{twice} stands twice in choices")
    # Optuna takes scalars only, for which 1, 1.0 and true are the same.
    are_distinct = all(isinstance(choice, SCALARS) for choice in choices) and len(set(choices)) == len(choices)
    return Scalar(CategoricalDistribution(choices if are_distinct else texts), tuple(choices))


def _number(default: Any, low: Any = None, high: Any = None, step: Any = None, log: bool = False) -> Scalar:
    for name, number in {"low": low, "high": high, "step": step or 1}.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{name} must be a finite number, got {number}")
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
