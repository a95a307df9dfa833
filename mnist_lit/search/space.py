"""The space of a search: what may vary, declared in YAML, drawn by Optuna."""

import copy
import json
import math
import re
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from typing import Any

from jsonargparse import ArgumentParser
from optuna import Trial

from mnist_lit.app import did_you_mean
from mnist_lit.errors import UsageError

__all__ = ["Choice", "Interval", "Kind", "ListOf", "Places", "Range", "Space", "flat", "is_key", "lookup", "nested"]

Params = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Any number from `low` to `high`.

    Args:
        low: The smallest.
        high: The largest, above `low`.
        log: Whether it is searched on a logarithmic scale; needs a `low` above 0.
        when: Other keys with the value, or a list of the values, that they must have.
    """

    low: int | float
    high: int | float
    log: bool = False
    when: Params = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high, log=self.log)
        if self.low == self.high:
            raise ValueError(f"low and high are both {self.low}: there is nothing to search")

    def draw(self, trial: Trial, name: str) -> float:
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def ends(self) -> list[float]:
        # The third is no whole number: a key that takes only those refuses it.
        return [self.low, self.high, self.low + (self.high - self.low) / math.e]

    def has(self, value: Any) -> bool:
        return _is_number(value) and self.low <= value <= self.high

    def grid(self, name: str) -> dict[str, list[Any]]:
        raise UsageError(f"space.{name}: a grid needs a step or choices, an interval has no end of values")


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers `low`, `low + step`, … up to `high`; whole ones if all three are.

    Args:
        low: The smallest.
        high: The largest, not below `low`.
        step: The distance between two, above 0.
        log: Whether it is searched on a logarithmic scale; needs a `low` above 0, whole numbers and a step of 1.
        when: Other keys with the value, or a list of the values, that they must have.
    """

    low: int | float
    high: int | float
    step: int | float = 1
    log: bool = False
    when: Params = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_bounds(self.low, self.high, log=self.log)
        if not (math.isfinite(self.step) and self.step > 0):
            raise ValueError(f"step must be above 0, got {self.step}")
        if self.step > self.high - self.low > 0:
            raise ValueError(f"step {self.step} is larger than the range from {self.low} to {self.high}")
        if self.log and not (self._is_whole() and self.step == 1):
            raise ValueError("log and step exclude each other: leave one out")

    def draw(self, trial: Trial, name: str) -> float:
        if self._is_whole():
            return trial.suggest_int(name, int(self.low), int(self._last()), step=int(self.step), log=self.log)
        return trial.suggest_float(name, self.low, float(self._last()), step=self.step)

    def ends(self) -> list[float]:
        if self._is_whole():
            return [self.low, int(self._last())]
        return [float(self.low), float(self._last()), float(self.low + self.step)]

    def has(self, value: Any) -> bool:
        if not (_is_number(value) and self.low <= value <= self._last()):
            return False
        return (Decimal(str(value)) - Decimal(str(self.low))) % Decimal(str(self.step)) == 0

    def grid(self, name: str) -> dict[str, list[Any]]:
        low, step = Decimal(str(self.low)), Decimal(str(self.step))
        convert = int if self._is_whole() else float
        return {name: [convert(low + step * place) for place in range(self._num_steps() + 1)]}

    def _is_whole(self) -> bool:
        return all(isinstance(number, int) for number in (self.low, self.high, self.step))

    def _num_steps(self) -> int:
        # In decimals, as they were written: in binary 0.1 goes into 0.3 less than three times.
        low, high, step = (Decimal(str(number)) for number in (self.low, self.high, self.step))
        return int((high - low) / step)

    def _last(self) -> Decimal:
        return Decimal(str(self.low)) + self._num_steps() * Decimal(str(self.step))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of some values of any kind.

    Args:
        choices: The values, at least one.
        when: Other keys with the value, or a list of the values, that they must have.
    """

    choices: list[Any]
    when: Params = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.choices:
            raise ValueError("choices are empty")
        texts = [json.dumps(choice) for choice in self.choices]
        if twice := next((text for text in texts if texts.count(text) > 1), None):
            raise ValueError(f"{twice} stands twice in choices")

    def draw(self, trial: Trial, name: str) -> Any:
        names = self._names()
        return self.choices[names.index(trial.suggest_categorical(name, names))]

    def ends(self) -> list[Any]:
        return self.choices

    def has(self, value: Any) -> bool:
        return value in self.choices

    def grid(self, name: str) -> dict[str, list[Any]]:
        return {name: self._names()}

    def _names(self) -> list[Any]:
        """The choices for Optuna, which takes scalars only and holds 1, 1.0 and true for the same."""
        are_scalars = all(choice is None or isinstance(choice, bool | int | float | str) for choice in self.choices)
        if are_scalars and len(set(self.choices)) == len(self.choices):
            return self.choices
        return [json.dumps(choice) for choice in self.choices]


@dataclass(frozen=True, kw_only=True)
class ListOf:
    """A list: how long it is, and each of its items.

    Args:
        length: The range of its length, from 0.
        items: What each item may be.
        when: Other keys with the value, or a list of the values, that they must have.
    """

    length: Range
    items: Interval | Range | Choice
    when: Params = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.length.when or self.items.when:
            raise ValueError("when stands beside length and items")
        if self.length.low < 0 or not all(isinstance(end, int) for end in self.length.ends()):
            raise ValueError(f"length must be whole numbers from 0, got {self.length.low} to {self.length.high}")

    def draw(self, trial: Trial, name: str) -> list[Any]:
        length = int(self.length.draw(trial, f"{name}.length"))
        return [self.items.draw(trial, f"{name}.{place}") for place in range(length)]

    def ends(self) -> list[Any]:
        lists = [[item] * int(length) for length in self.length.ends() for item in self.items.ends()]
        return [value for place, value in enumerate(lists) if value not in lists[:place]]

    def has(self, value: Any) -> bool:
        return isinstance(value, list) and self.length.has(len(value)) and all(map(self.items.has, value))

    def grid(self, name: str) -> dict[str, list[Any]]:
        places = range(int(self.length.ends()[-1]))
        grids = [self.length.grid(f"{name}.length"), *(self.items.grid(f"{name}.{place}") for place in places)]
        return {parameter: values for grid in grids for parameter, values in grid.items()}


@dataclass(frozen=True, kw_only=True)
class Places:
    """A list of fixed length, each place of which has values of its own.

    Args:
        items: What the item at each place may be, at least one.
        when: Other keys with the value, or a list of the values, that they must have.
    """

    items: list[Interval | Range | Choice]
    when: Params = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.items:
            raise ValueError("items are empty")
        if any(item.when for item in self.items):
            raise ValueError("when stands beside items")

    def draw(self, trial: Trial, name: str) -> list[Any]:
        return [item.draw(trial, f"{name}.{place}") for place, item in enumerate(self.items)]

    def ends(self) -> list[Any]:
        ends = [item.ends() for item in self.items]
        return [[values[number % len(values)] for values in ends] for number in range(max(map(len, ends)))]

    def has(self, value: Any) -> bool:
        is_list = isinstance(value, list) and len(value) == len(self.items)
        return is_list and all(item.has(part) for item, part in zip(self.items, value, strict=True))

    def grid(self, name: str) -> dict[str, list[Any]]:
        grids = [item.grid(f"{name}.{place}") for place, item in enumerate(self.items)]
        return {parameter: values for grid in grids for parameter, values in grid.items()}


# Each can `draw` a value from Optuna, names its `ends` (if these are good values, the others are, too), says whether it
# `has` a value, and lists all values of Optuna's parameters as a `grid` where they are finite in number.
Kind = Interval | Range | Choice | ListOf | Places


class Space:
    """Keys of the configuration with what their values may be.

    Args:
        kinds: What the values of each key may be, in the order in which they are drawn.
    """

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self.kinds = dict(kinds)

    @classmethod
    def parse(cls, declared: Mapping[str, Any]) -> "Space":
        """Read a space as it is declared in YAML.

        Args:
            declared: For each key the fields of an `Interval`, a `Range` (it has `step`), a `Choice`, a `ListOf`, or
                `Places` (its `items` are a list).

        Raises:
            UsageError: If one is none of these, or a condition names a key that is drawn later.
        """
        if not declared:
            raise UsageError("space: there is nothing to search\nadd for example  model.dropout: {low: 0.0, high: 0.5}")
        kinds: dict[str, Kind] = {}
        for key, entry in declared.items():
            if not is_key(key):
                raise UsageError(f"space: {key!r} is no key")
            kinds[key] = kind = _parse(f"space.{key}", entry)
            if late := next(
                (other for other in kind.when if other in declared and (other == key or other not in kinds)), None
            ):
                raise UsageError(f"space.{key}.when: {late} has to stand above {key}")
        return cls(kinds)

    def settled(self, config: Mapping[str, Any]) -> "Space":
        """The same space, in which intervals from whole number to whole number are ranges of whole numbers.

        Args:
            config: A configuration; where it holds a fraction or a list of them, the interval is one of fractions.
        """
        return Space({key: _settled(kind, lookup(config, key)) for key, kind in self.kinds.items()})

    def check(self, base: Mapping[str, Any]) -> None:
        """Make sure that each condition can be met.

        Args:
            base: The configuration that the trials start from.

        Raises:
            UsageError: If one can not.
        """
        for key, kind in self.kinds.items():
            for other, value in kind.when.items():
                place = f"space.{key}.when.{other}"
                if other not in self.kinds and lookup(base, other, missing := object()) is missing:
                    hint = did_you_mean(other, {*self.kinds, *flat(base)})
                    raise UsageError(f"{place}: there is no such key\n{hint}")
                for option in _options(value):
                    if other in self.kinds and not self.kinds[other].has(option):
                        raise UsageError(f"{place}: space.{other} is never {option}")
                if other not in self.kinds and lookup(base, other) not in _options(value):
                    raise UsageError(f"{place}: is {lookup(base, other)} in all trials, never {value}")

    def draw(self, trial: Trial, base: Mapping[str, Any]) -> Params:
        """A value for each key whose conditions are met.

        Args:
            trial: Optuna's.
            base: The configuration that the trials start from, for conditions on keys outside of the space.
        """
        params: Params = {}
        for key, kind in self.kinds.items():
            if self._is_met(kind.when, params, base):
                params[key] = kind.draw(trial, key)
        return params

    def rehearsals(self, base: Mapping[str, Any]) -> Iterator[Params]:
        """Some points of the space in which each end of each key occurs: if all are good, the others should be."""
        ends = {key: kind.ends() for key, kind in self.kinds.items()}
        for place in range(max(len(values) for values in ends.values())):
            yield self._point({key: values[place % len(values)] for key, values in ends.items()}, base)
        firsts = {key: values[0] for key, values in ends.items()}
        for key, kind in self.kinds.items():
            num_options = [len(_options(value)) for other, value in kind.when.items() if other in self.kinds]
            for place in range(max(len(ends[key]), *num_options)) if num_options else []:
                point = {**firsts, **self._needs(kind, place), key: ends[key][place % len(ends[key])]}
                yield self._point(point, base)

    def grid(self) -> dict[str, list[Any]]:
        """All values of each of Optuna's parameters.

        Raises:
            UsageError: If there are infinitely many.
        """
        return {name: values for key, kind in self.kinds.items() for name, values in kind.grid(key).items()}

    def logarithmic(self) -> list[str]:
        """The keys that are searched on a logarithmic scale."""
        return [key for key, kind in self.kinds.items() if getattr(kind, "log", False)]

    def _needs(self, kind: Kind, place: int) -> Params:
        """Values of other keys with which the conditions are met, and the conditions of those, too."""
        needs: Params = {}
        for other, value in kind.when.items():
            if other in self.kinds:
                options = _options(value)
                needs |= {**self._needs(self.kinds[other], 0), other: options[place % len(options)]}
        return needs

    def _point(self, params: Params, base: Mapping[str, Any]) -> Params:
        point: Params = {}
        for key, kind in self.kinds.items():
            if self._is_met(kind.when, point, base):
                point[key] = params[key]
        return point

    def _is_met(self, when: Params, params: Params, base: Mapping[str, Any]) -> bool:
        return all(
            (params[key] if key in params else key not in self.kinds and lookup(base, key)) in _options(options)
            for key, options in when.items()
        )


def is_key(key: Any) -> bool:
    """Whether it has the form of a key: names with dots between them."""
    return isinstance(key, str) and all(key.split("."))


def lookup(config: Mapping[str, Any], key: str, missing: Any = None) -> Any:
    """The value of a key with dots; `missing` if there is no such key."""
    value: Any = config
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return missing
        value = value[name]
    return value


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Mappings of mappings as keys with dots."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
        )
    return leaves


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with dots as mappings of mappings, as a config has them; a class beside its arguments is a class_path."""
    tree: dict[str, Any] = {}
    for key in sorted(flat, key=lambda key: key.count(".")):
        *path, name = key.split(".")
        branch = tree
        for part in path:
            if not isinstance(branch.setdefault(part, {}), dict):
                branch[part] = {"class_path": branch[part]}
            branch = branch[part]
        branch[name] = copy.deepcopy(flat[key])
    return tree


def _check_bounds(low: float, high: float, *, log: bool) -> None:
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"low and high must be finite, got {low} and {high}")
    if low > high:
        raise ValueError(f"low {low} is above high {high}")
    if log and low <= 0:
        raise ValueError(f"log needs a low above 0, got {low}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _options(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _settled(kind: Kind, value: Any) -> Any:
    if isinstance(kind, ListOf):
        item = value[0] if isinstance(value, list) and value else None
        return replace(kind, items=_settled(kind.items, item))
    if isinstance(kind, Places):
        values = value if isinstance(value, list) and len(value) == len(kind.items) else [None] * len(kind.items)
        return replace(kind, items=[_settled(item, part) for item, part in zip(kind.items, values, strict=True)])
    has_whole_ends = isinstance(kind, Interval) and isinstance(kind.low, int) and isinstance(kind.high, int)
    return Range(**vars(kind)) if has_whole_ends and not isinstance(value, float) else kind


def _parse(place: str, entry: Any) -> Any:
    if not isinstance(entry, dict):
        raise UsageError(f"{place}: must be like {{low: 0.1, high: 0.5}} or {{choices: [1, 2]}}, got {entry!r}")
    if isinstance(entry.get("items"), list):
        _check_names(Places, place, entry)
        items = [_parse(f"{place}.items.{number}", item) for number, item in enumerate(entry["items"])]
        return _made(Places, place, {**entry, "items": items})
    if "length" in entry or "items" in entry:
        _check_names(ListOf, place, entry)
        length = _parse_as(Range, f"{place}.length", entry.get("length", {}))
        items = _parse(f"{place}.items", entry.get("items", {}))
        return _made(ListOf, place, {**entry, "length": length, "items": items})
    return _parse_as(Choice if "choices" in entry else Range if "step" in entry else Interval, place, entry)


def _parse_as(kind: type[Any], place: str, entry: Any) -> Any:
    if not isinstance(entry, dict):
        raise UsageError(f"{place}: must be like {{low: 1, high: 3}}, got {entry!r}")
    if nothing := next((name for name, value in entry.items() if value is None), None):
        raise UsageError(f"{place}.{nothing}: must not be null")
    _check_names(kind, place, entry)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        parsed = parser.parse_object(copy.deepcopy(entry))
    except ArgumentError as error:
        raise UsageError(_reason(place, str(error))) from error
    # The parser reads texts among any values once more: "1" would be 1.
    untouched = {name: value for name, value in entry.items() if isinstance(value, list | dict)}
    return _made(kind, place, {**parsed.as_dict(), **untouched})


def _made(kind: type[Any], place: str, arguments: Params) -> Any:
    try:
        return kind(**arguments)
    except ValueError as error:
        raise UsageError(f"{place}: {error}") from error


def _check_names(kind: type[Any], place: str, entry: Params) -> None:
    names = [part.name for part in fields(kind)]
    if unknown := next((name for name in entry if name not in names), None):
        hint = did_you_mean(unknown, names) or f"there are {', '.join(names)}"
        raise UsageError(f"{place}: there is no {unknown}\n{hint}")


def _reason(place: str, message: str) -> str:
    """A complaint of the parser in one line."""
    if missing := re.search(r"arguments are required: (.+)", message):
        return f"{place}: needs {missing[1]}"
    key = re.search(r'Parser key "(\w+)"', message)
    types = list(dict.fromkeys(re.findall(r"Expected a <class '(\w+)'>", message)))
    value = re.search(r"(?:Got value|Given value): (.*)", message)
    if not (key and types and value):
        return f"{place}: {' '.join(message.split())}"
    return f"{place}.{key[1]}: must be of type {' or '.join(types)}, got {value[1]}"
