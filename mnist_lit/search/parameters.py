"""Turn entries of a search space into Optuna distributions."""

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from optuna import Trial
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from mnist_lit.app import did_you_mean
from mnist_lit.errors import UsageError

__all__ = ["Parameter", "ParameterList", "check_mapping", "parse_parameter"]

NUMBER = ("low", "high", "step", "log")
SCALARS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Parameter:
    """Suggest a number or a choice.

    Args:
        distribution: The distribution of its values.
        choices: The values that the categories stand for; empty for numbers.
    """

    distribution: CategoricalDistribution | FloatDistribution | IntDistribution
    choices: tuple[Any, ...] = ()

    def suggest(self, trial: Trial, name: str) -> Any:
        match self.distribution:
            case CategoricalDistribution(choices=names):
                return self.choices[names.index(trial.suggest_categorical(name, names))]
            case FloatDistribution(low=low, high=high, log=log, step=step):
                return trial.suggest_float(name, low, high, log=log, step=step)
            case IntDistribution(low=low, high=high, log=log, step=step):
                return trial.suggest_int(name, low, high, log=log, step=step)

    def bounds(self) -> list[Any]:
        """List all choices, or the two ends of the numbers."""
        if isinstance(self.distribution, CategoricalDistribution):
            return list(self.choices)
        return [self.distribution.low, self.distribution.high]

    def contains(self, value: Any) -> bool:
        if isinstance(self.distribution, CategoricalDistribution):
            return value in self.choices
        return isinstance(value, int | float) and self.distribution.low <= value <= self.distribution.high

    def grid(self, name: str) -> dict[str, list[Any]]:
        match self.distribution:
            case CategoricalDistribution(choices=names):
                return {name: list(names)}
            case IntDistribution(low=low, high=high, step=step):
                return {name: list(range(low, high + 1, step))}
            case FloatDistribution(low=low, high=high, step=float(step)):
                num_steps = round((high - low) / step)
                return {name: [round(low + number * step, 12) for number in range(num_steps + 1)]}
        raise UsageError(f"space.{name}: a grid needs a step or choices, an interval has no end of values")


@dataclass(frozen=True)
class ParameterList:
    """Suggest a list, each item of which is a parameter.

    Args:
        items: The parameters, one for each position.
        length: How many of them are used; None for all.
    """

    items: list[Parameter]
    length: Parameter | None = None

    def suggest(self, trial: Trial, name: str) -> list[Any]:
        length = self.length.suggest(trial, f"{name}.length") if self.length else len(self.items)
        return [item.suggest(trial, f"{name}.{position}") for position, item in enumerate(self.items[:length])]

    def bounds(self) -> list[Any]:
        """List the shortest and the longest lists with all bounds of the items."""
        lengths = self.length.bounds() if self.length else [len(self.items)]
        columns = [item.bounds() for item in self.items]
        num_rows = max(map(len, columns), default=1)
        rows = [[column[number % len(column)] for column in columns] for number in range(num_rows)]
        return [row[:length] for length in lengths for row in rows]

    def contains(self, value: Any) -> bool:
        return isinstance(value, list)

    def grid(self, name: str) -> dict[str, list[Any]]:
        parameters = {f"{name}.{position}": item for position, item in enumerate(self.items)}
        if self.length:
            parameters[f"{name}.length"] = self.length
        return {part: values for key, parameter in parameters.items() for part, values in parameter.grid(key).items()}


def parse_parameter(where: str, entry: Mapping[str, Any], default: Any) -> Parameter | ParameterList:
    """Parse the entry of a key.

    Args:
        where: The name of the entry in messages.
        entry: Its `{low, high, step, log}`, `{choices}` or `{length, items}`.
        default: The value of the key without a search; where it is a fraction, so are all values.

    Raises:
        UsageError: If it is none of these.
    """
    if "items" not in entry and "length" not in entry:
        return _parameter(where, entry, default)
    _check_names(where, entry, ("items", "length"))
    items = entry.get("items")
    if isinstance(items, list):
        if not items or "length" in entry:
            raise UsageError(f"{where}: needs items and no length, or a length and items that are no list")
        return ParameterList([_parameter(f"{where}.items.{number}", item, None) for number, item in enumerate(items)])
    length = _parameter(f"{where}.length", entry.get("length"), None)
    if any(not isinstance(number, int) or number < 0 for number in length.bounds()):
        raise UsageError(f"{where}.length: must be whole numbers from 0")
    first = default[0] if isinstance(default, list) and default else None
    return ParameterList([_parameter(f"{where}.items", items, first)] * max(length.bounds()), length)


def _parameter(where: str, entry: Any, default: Any) -> Parameter:
    entry = check_mapping(where, entry)
    names = ("choices",) if "choices" in entry else NUMBER
    _check_names(where, entry, names)
    try:
        return _choice(entry["choices"]) if "choices" in entry else _number(entry, default)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error


def _choice(choices: Any) -> Parameter:
    if not isinstance(choices, list):
        raise ValueError(f"choices must be a list, got {choices}")
    texts = [json.dumps(choice, default=str) for choice in choices]
    if twice := next((text for text in texts if texts.count(text) > 1), None):
        raise ValueError(f"{twice} stands twice in choices")
    # Optuna takes scalars only, and 1, 1.0 and true are equal to it.
    are_distinct = all(isinstance(choice, SCALARS) for choice in choices) and len(set(choices)) == len(choices)
    return Parameter(CategoricalDistribution(choices if are_distinct else texts), tuple(choices))


def _number(entry: Mapping[str, Any], default: Any) -> Parameter:
    log, step = entry.get("log", False), entry.get("step")
    if not isinstance(log, bool):
        raise ValueError(f"log must be true or false, got {log}")
    numbers = {"low": entry.get("low"), "high": entry.get("high"), **({"step": step} if "step" in entry else {})}
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{name} must be a finite number, got {number}")
    with warnings.catch_warnings(action="ignore"):  # that high is no multiple of the step
        if all(isinstance(number, int) for number in numbers.values()) and not isinstance(default, float):
            return Parameter(IntDistribution(entry["low"], entry["high"], log=log, step=1 if step is None else step))
        return Parameter(FloatDistribution(entry["low"], entry["high"], log=log, step=step))


def check_mapping(where: str, entry: Any) -> Mapping[str, Any]:
    """Return the entry if it is a mapping."""
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where}: must be like {{low: 0.1, high: 0.5}} or {{choices: [1, 2]}}, got {entry!r}")
    return entry


def _check_names(where: str, entry: Mapping[str, Any], names: Iterable[str]) -> None:
    if unknown := next((name for name in entry if name not in names), None):
        hint = did_you_mean(str(unknown), names) or f"there are {', '.join(names)}"
        raise UsageError(f"{where}: there is no {unknown}\n{hint}")
