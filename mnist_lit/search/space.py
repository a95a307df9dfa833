"""Suggest overrides from the search space of a config."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from optuna import Trial

from mnist_lit.errors import UsageError, did_you_mean
from mnist_lit.search.parameters import Parameter, ParameterList, parse_parameter

__all__ = ["Params", "Space", "flat", "lookup", "nested"]

Params = dict[str, Any]
MISSING = object()


class Space:
    """Suggest values for the keys of `fit` that a search varies.

    Args:
        declared: The `space` of a search config.
        base: The configuration that the trials start from; a key that holds a fraction there takes fractions.

    Raises:
        UsageError: If an entry is no distribution, or a condition can never be met.
    """

    def __init__(self, declared: Mapping[str, Any], base: Mapping[str, Any]) -> None:
        self.base = base
        self.parameters: dict[str, Parameter | ParameterList] = {}
        self.conditions: dict[str, dict[str, list[Any]]] = {}
        for key, entry in declared.items():
            where = f"space.{key}"
            if not isinstance(entry, Mapping) or not isinstance(entry.get("when", {}), Mapping):
                raise UsageError(
                    f"{where}: must be like {{low: 1, high: 2, when: {{other.key: value}}}}, got {entry!r}"
                )
            conditions = entry.get("when", {}).items()
            self.conditions[key] = {other: value if isinstance(value, list) else [value] for other, value in conditions}
            for other, values in self.conditions[key].items():
                self._check_condition(f"{where}.when.{other}", other, values, is_later=other in declared)
            rest = {name: value for name, value in entry.items() if name != "when"}
            self.parameters[key] = parse_parameter(where, rest, lookup(base, key))

    def suggest(self, trial: Trial) -> Params:
        """Suggest a value for each key whose condition is met."""
        params: Params = {}
        for key, parameter in self.parameters.items():
            if self._is_met(key, params):
                params[key] = parameter.suggest(trial, key)
        return params

    def corners(self) -> Iterator[Params]:
        """List points in which every bound of every key occurs: if these are valid, those between them are."""
        bounds = {key: parameter.bounds() for key, parameter in self.parameters.items()}
        for number in range(max(map(len, bounds.values()))):
            yield self._point({key: values[number % len(values)] for key, values in bounds.items()})
        first = {key: values[0] for key, values in bounds.items()}
        for key, conditions in self.conditions.items():
            options = [values for other, values in conditions.items() if other in self.parameters]
            for number in range(max(map(len, [bounds[key], *options]))) if options else ():
                value = bounds[key][number % len(bounds[key])]
                yield self._point({**first, **self._requirements(key, number), key: value})

    def grid(self) -> dict[str, list[Any]]:
        """List all values of each of Optuna's parameters.

        Raises:
            UsageError: If there are infinitely many.
        """
        return {name: values for key, part in self.parameters.items() for name, values in part.grid(key).items()}

    def _requirements(self, key: str, number: int) -> Params:
        """Choose values of other keys that meet the conditions of a key, and the conditions of those, too."""
        required: Params = {}
        for other, values in self.conditions[key].items():
            if other in self.parameters:
                required |= {**self._requirements(other, 0), other: values[number % len(values)]}
        return required

    def _point(self, params: Params) -> Params:
        point: Params = {}
        for key in self.parameters:
            if self._is_met(key, point):
                point[key] = params[key]
        return point

    def _is_met(self, key: str, params: Params) -> bool:
        return all(
            params[other] in values
            if other in params
            else other not in self.parameters and lookup(self.base, other) in values
            for other, values in self.conditions[key].items()
        )

    def _check_condition(self, where: str, other: str, values: list[Any], *, is_later: bool) -> None:
        if other in self.parameters:
            for value in values:
                if not self.parameters[other].contains(value):
                    raise UsageError(f"{where}: space.{other} is never {value}")
        elif is_later:
            raise UsageError(f"{where}: {other} has to stand above it in the space")
        elif (value := lookup(self.base, other, MISSING)) is MISSING:
            raise UsageError(f"{where}: there is no such key\n{did_you_mean(other, flat(self.base))}")
        elif value not in values:
            raise UsageError(f"{where}: is {value} in all trials, never {values}")


def lookup(config: Mapping[str, Any], key: str, missing: Any = None) -> Any:
    """Return the value of a key with dots, or `missing`."""
    value: Any = config
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return missing
        value = value[name]
    return value


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
