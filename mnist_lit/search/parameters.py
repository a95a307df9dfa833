"""Turn entries of a search space into Optuna distributions."""

import json
import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from optuna import Trial
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from mnist_lit.errors import UsageError, did_you_mean

__all__ = ["Parameter", "ParameterList", "parse_parameter"]

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
        if self.choices:
            return value in self.choices
        low, high = self.bounds()
        return isinstance(value, int | float) and bool(low <= value <= high)

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
        parts = {f"{name}.{position}": item for position, item in enumerate(self.items)}
        parts |= {f"{name}.length": self.length} if self.length else {}
        return {part: values for key, parameter in parts.items() for part, values in parameter.grid(key).items()}


def parse_parameter(where: str, entry: Mapping[str, Any], default: Any) -> Parameter | ParameterList:
    """Parse the entry of a key.

    Args:
        where: The name of the entry in messages.
        entry: Its `{low, high, step, log}`, `{choices}` or `{length, items}`.
        default: The value of the key without a search; where it is a fraction, so are all values.

    Raises:
        UsageError: If it is none of these.
    """
    items = entry.get("items")
    if isinstance(items, list) and items:
        _check_names(where, entry, ["items"])
        return ParameterList(
            [_parse_scalar(f"{where}.items.{number}", item, None) for number, item in enumerate(items)]
        )
    if "items" not in entry and "length" not in entry:
        return _parse_scalar(where, entry, default)
    _check_names(where, entry, ["length", "items"])
    length = _parse_scalar(f"{where}.length", entry.get("length"), None)
    if not isinstance(length.distribution, IntDistribution) or length.distribution.low < 0:
        raise UsageError(f"{where}.length: must be like {{low: 1, high: 3}}, whole numbers from 0")
    first = default[0] if isinstance(default, list) and default else None
    return ParameterList([_parse_scalar(f"{where}.items", items, first)] * length.distribution.high, length)


def _parse_scalar(where: str, entry: Any, default: Any) -> Parameter:
    is_choice = isinstance(entry, Mapping) and "choices" in entry
    _check_names(where, entry, ["choices"] if is_choice else ["low", "high", "step", "log"])
    try:
        return _choice(entry["choices"]) if is_choice else _number(default, **entry)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from error


def _choice(choices: Any) -> Parameter:
    if not isinstance(choices, list):
        raise TypeError(f"choices must be a list, got {choices}")
    texts = [json.dumps(choice, default=str) for choice in choices]
    if twice := next((text for text in texts if texts.count(text) > 1), None):
        raise ValueError(f"{twice} stands twice in choices")
    # Optuna takes scalars only, for which 1, 1.0 and true are the same.
    are_distinct = all(isinstance(choice, SCALARS) for choice in choices) and len(set(choices)) == len(choices)
    return Parameter(CategoricalDistribution(choices if are_distinct else texts), tuple(choices))


def _number(default: Any, low: Any = None, high: Any = None, step: Any = None, log: Any = False) -> Parameter:
    for name, number in {"low": low, "high": high, "step": 1 if step is None else step}.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{name} must be a finite number, got {number}")
    if not isinstance(log, bool):
        raise TypeError(f"log must be true or false, got {log}")
    are_whole = all(isinstance(number, int | None) for number in (low, high, step)) and not isinstance(default, float)
    with warnings.catch_warnings(action="ignore"):  # that high is no multiple of the step
        if are_whole:
            return Parameter(IntDistribution(low, high, log=log, step=1 if step is None else step))
        return Parameter(FloatDistribution(low, high, log=log, step=step))


def _check_names(where: str, entry: Any, names: Collection[str]) -> None:
    if not isinstance(entry, Mapping):
        raise UsageError(f"{where}: must be like {{low: 0.1, high: 0.5}} or {{choices: [1, 2]}}, got {entry!r}")
    if unknown := next((str(name) for name in entry if name not in names), None):
        hint = did_you_mean(unknown, names) or f"there are {', '.join(names)}"
        raise UsageError(f"{where}: there is no {unknown}\n{hint}")
