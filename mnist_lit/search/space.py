"""The search space: entries of a search config as Optuna's distributions."""

import json
import math
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from random import Random
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FixedTrial, Trial

from mnist_lit.errors import UsageError, did_you_mean

Params = dict[str, Any]
ENTRY = ("low", "high", "step", "log", "choices", "items", "length", "when")  # what an entry of a space may hold
NUM_DRAWS = 500  # of corners: a bound may stand below rare conditions


@dataclass(frozen=True)
class Scalar:
    """A number, or one of the choices that the categories of its distribution stand for."""

    distribution: CategoricalDistribution | FloatDistribution | IntDistribution
    choices: tuple[Any, ...] = ()

    def suggest(self, trial: Trial | FixedTrial, name: str) -> Any:
        match self.distribution:
            case CategoricalDistribution(choices=names):
                return self.choices[names.index(trial.suggest_categorical(name, names))]
            case FloatDistribution(low=low, high=high, log=log, step=step):
                return trial.suggest_float(name, low, high, log=log, step=step)
            case IntDistribution(low=low, high=high, log=log, step=step):
                return trial.suggest_int(name, low, high, log=log, step=step)

    def bounds(self, named: Sequence[Any] = ()) -> list[Any]:
        """List all choices, or the ends of a range and the numbers between them that conditions name."""
        if isinstance(self.distribution, CategoricalDistribution):
            return list(self.distribution.choices)
        low, high = self.distribution.low, self.distribution.high
        return [low, high, *(value for value in named if isinstance(value, int | float) and low < value < high)]

    def values(self, name: str) -> list[Any]:
        """List all values."""
        if isinstance(self.distribution, CategoricalDistribution):
            return self.bounds()
        low, high, step = self.distribution.low, self.distribution.high, self.distribution.step
        if step is None:
            raise UsageError(f"space.{name}: a grid needs a step or choices, an interval has no end of values")
        return [round(low + number * step, 12) for number in range(round((high - low) / step) + 1)]

    def parts(self, name: str) -> "dict[str, Scalar]":
        return {name: self}


@dataclass(frozen=True)
class ScalarList:
    """A list of scalars, of which `length` says how many are used; None for all."""

    items: list[Scalar]
    length: Scalar | None = None

    def suggest(self, trial: Trial | FixedTrial, name: str) -> list[Any]:
        length = self.length.suggest(trial, f"{name}.length") if self.length else len(self.items)
        return [item.suggest(trial, f"{name}.{position}") for position, item in enumerate(self.items[:length])]

    def parts(self, name: str) -> dict[str, Scalar]:
        """Name the parameters of Optuna that make up the list."""
        length = {f"{name}.length": self.length} if self.length else {}
        return length | {f"{name}.{position}": item for position, item in enumerate(self.items)}


class Space:
    """The keys of `fit` that a search varies."""

    def __init__(self, declared: Mapping[str, Any], base: Mapping[str, Any]) -> None:
        self.fixed = {key: value for key, value in base.items() if key not in declared}
        self.dimensions: dict[str, Scalar | ScalarList] = {}
        self.conditions: dict[str, dict[str, list[Any]]] = {}
        for key, entry in declared.items():
            where = f"space.{key}"
            _check_names(where, entry, ENTRY)
            when = entry.get("when", {})
            _check_names(f"{where}.when", when, when)
            self.conditions[key] = {name: value if isinstance(value, list) else [value] for name, value in when.items()}
            for other, values in self.conditions[key].items():
                self._check_condition(f"{where}.when.{other}", other, values)
            self.dimensions[key] = _parse(where, {name: entry[name] for name in entry if name != "when"}, base.get(key))

    def suggest(self, trial: Trial | FixedTrial) -> Params:
        """Suggest a value for each key whose condition is met."""
        params: Params = {}
        for key, dimension in self.dimensions.items():
            known = {**self.fixed, **params}
            if all(other in known and known[other] in values for other, values in self.conditions[key].items()):
                params[key] = dimension.suggest(trial, key)
        return params

    def corners(self) -> Iterator[Params]:
        """List points in which every bound of every key occurs: if these are valid, those between them are."""
        named: dict[str, list[Any]] = {}
        for other, values in chain(*(condition.items() for condition in self.conditions.values())):
            named.setdefault(other, []).extend(values)
        bounds = {name: part.bounds(named.get(name, ())) for name, part in self._parts().items()}
        seen: set[tuple[str, Any]] = set()
        random = Random(0)
        for _ in range(NUM_DRAWS):
            unseen = {name: [end for end in ends if (name, end) not in seen] or ends for name, ends in bounds.items()}
            point = self.suggest(trial := FixedTrial({name: random.choice(ends) for name, ends in unseen.items()}))
            if not trial.params.items() <= seen:
                seen.update(trial.params.items())
                yield point

    def grid(self) -> dict[str, list[Any]]:
        """List all values of each of Optuna's parameters."""
        return {name: part.values(name) for name, part in self._parts().items()}

    def _parts(self) -> dict[str, Scalar]:
        return dict(chain(*(dimension.parts(key).items() for key, dimension in self.dimensions.items())))

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
    if not isinstance(choices, list):
        raise TypeError(f"choices must be a list, got {choices}")
    texts = [json.dumps(choice, default=str) for choice in choices]
    if twice := next((text for text in texts if texts.count(text) > 1), None):
        raise ValueError(f"{twice} stands twice in choices")
    # Optuna takes scalars only, for which 1, 1.0 and true are the same.
    are_scalars = all(isinstance(choice, int | float | str | None) for choice in choices)
    are_distinct = are_scalars and len(set(choices)) == len(choices)
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
