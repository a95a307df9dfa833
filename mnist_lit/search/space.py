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


class Space:
    """The keys of `fit` that a search varies."""

    def __init__(self, declared: Mapping[str, Any], base: Mapping[str, Any]) -> None:
        self.fixed = {key: value for key, value in base.items() if key not in declared}
        self.scalars: dict[str, Scalar] = {}  # by Optuna's names: of a list those of its length and of each item
        self.conditions: dict[str, dict[str, list[Any]]] = {}
        for key, entry in declared.items():
            _check_names(f"space.{key}", entry, ENTRY)
            when = entry.get("when", {})
            if not isinstance(when, Mapping):
                raise UsageError(f"space.{key}.when: must be like {{other.key: value}}, got {when!r}")
            condition = {name: value if isinstance(value, list) else [value] for name, value in when.items()}
            for other, values in condition.items():
                self._check_condition(f"space.{key}.when.{other}", other, values)
            self.conditions[key] = condition
            self.scalars |= _parse(key, {name: entry[name] for name in entry if name != "when"}, base.get(key))

    def suggest(self, trial: Trial | FixedTrial) -> Params:
        """Suggest a value for each key whose condition is met."""
        params: Params = {}
        for key, condition in self.conditions.items():
            known = {**self.fixed, **params}
            if all(other in known and known[other] in values for other, values in condition.items()):
                params[key] = self._suggest(trial, key)
        return params

    def corners(self) -> Iterator[Params]:
        """List points in which every bound of every key occurs: if these are valid, those between them are."""
        named: dict[str, list[Any]] = {}
        for other, values in chain(*(condition.items() for condition in self.conditions.values())):
            named.setdefault(other, []).extend(values)
        bounds = {name: scalar.bounds(named.get(name, ())) for name, scalar in self.scalars.items()}
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
        return {name: scalar.values(name) for name, scalar in self.scalars.items()}

    def _suggest(self, trial: Trial | FixedTrial, key: str) -> Any:
        """Suggest a value; of a list first the length, then as many items."""
        if key in self.scalars:
            return self.scalars[key].suggest(trial, key)
        length = self.scalars[f"{key}.length"].suggest(trial, f"{key}.length")
        names = [f"{key}.{position}" for position in range(length)]
        return [self.scalars[name].suggest(trial, name) for name in names]

    def _check_condition(self, where: str, other: str, values: list[Any]) -> None:
        if other not in self.conditions and other not in self.fixed:
            hint = did_you_mean(other, [*self.conditions, *self.fixed])
            raise UsageError(f"{where}: is neither a key above it in the space nor another key of fit\n{hint}")
        choices = getattr(self.scalars.get(other), "choices", ())
        if choices and (wrong := [value for value in values if value not in choices]):
            raise UsageError(f"{where}: space.{other} is never {wrong[0]}")


def _parse(key: str, entry: Mapping[str, Any], default: Any) -> dict[str, Scalar]:
    where, items = f"space.{key}", entry.get("items")
    if "items" not in entry and "length" not in entry:
        return {key: _parse_scalar(where, entry, default)}
    _check_names(where, entry, ["length", "items"])
    if isinstance(items, list) and "length" not in entry:
        length = Scalar(IntDistribution(len(items), len(items)))
        scalars = [_parse_scalar(f"{where}.items.{number}", item, None) for number, item in enumerate(items)]
    else:
        length = _parse_scalar(f"{where}.length", entry.get("length"), None)
        if not isinstance(length.distribution, IntDistribution) or length.distribution.low < 0:
            raise UsageError(f"{where}.length: must be like {{low: 1, high: 3}}, whole numbers from 0")
        first = default[0] if isinstance(default, list) and default else None
        scalars = [_parse_scalar(f"{where}.items", items, first)] * length.distribution.high
    return {f"{key}.length": length, **{f"{key}.{position}": scalar for position, scalar in enumerate(scalars)}}


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
