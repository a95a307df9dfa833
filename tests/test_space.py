"""The space of a search: what is drawn from it, what is refused, which points show that all of it works."""

import math
from typing import Any

import optuna
import pytest
from optuna.samplers import GridSampler, RandomSampler

from mnist_lit.errors import UsageError
from mnist_lit.search.space import Space, flat, nested

Declared = dict[str, Any]


def draws(declared: Declared, number: int = 200, config: Declared | None = None) -> list[Declared]:
    space = Space.parse(declared).settled(config or {})
    study = optuna.create_study(sampler=RandomSampler(seed=1))
    return [space.draw(study.ask(), config or {}) for _ in range(number)]


def values(entry: Declared, config: Declared | None = None, number: int = 200) -> list[Any]:
    return [params["key"] for params in draws({"key": entry}, number, config)]


# What is drawn


def test_interval_has_fractions() -> None:
    drawn = values({"low": 0.5, "high": 2})

    assert all(0.5 <= value <= 2 for value in drawn)
    assert len(set(drawn)) == 200


def test_logarithmic_interval_has_as_much_in_each_decade() -> None:
    drawn = values({"low": 1e-4, "high": 1e-1, "log": True}, number=600)

    decades = [math.floor(math.log10(value)) for value in drawn]
    assert all(150 < decades.count(decade) < 250 for decade in (-4, -3, -2))


@pytest.mark.parametrize(
    ("config", "expected"), [({}, int), ({"key": 3}, int), ({"key": None}, int), ({"key": 3.0}, float)]
)
def test_whole_bounds_are_of_whole_numbers_unless_the_key_holds_a_fraction(config: Declared, expected: type) -> None:
    drawn = values({"low": 1, "high": 4}, config)

    assert {type(value) for value in drawn} == {expected}
    if expected is int:
        assert set(drawn) == {1, 2, 3, 4}


def test_logarithmic_whole_numbers_favour_the_small_ones() -> None:
    drawn = values({"low": 1, "high": 1000, "log": True}, number=300)

    assert all(isinstance(value, int) for value in drawn)
    assert 100 < sum(value <= 31 for value in drawn) < 200


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"low": 0.0, "high": 0.5, "step": 0.1}, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]),
        ({"low": 0.1, "high": 0.5, "step": 0.3}, [0.1, 0.4]),
        ({"low": 0, "high": 15, "step": 5}, [0, 5, 10, 15]),
        ({"low": 1, "high": 8, "step": 3}, [1, 4, 7]),
        ({"low": 2, "high": 2, "step": 1}, [2]),
        ({"low": "1e-1", "high": "3e-1", "step": "1e-1"}, [0.1, 0.2, 0.3]),
    ],
)
def test_range_has_its_steps_and_its_last_one(entry: Declared, expected: list[float]) -> None:
    assert sorted(set(values(entry))) == pytest.approx(expected)


def test_choices_come_as_they_were_written() -> None:
    choices = [1, 1.0, True, "1", None, [8, 16], {"a": 1}]

    drawn = values({"choices": choices})

    assert {repr(value) for value in drawn} == {repr(choice) for choice in choices}


def test_list_has_every_length_and_every_item() -> None:
    drawn = values({"length": {"low": 0, "high": 3}, "items": {"choices": [8, 16]}})

    assert {len(value) for value in drawn} == {0, 1, 2, 3}
    assert {item for value in drawn for item in value} == {8, 16}


def test_places_of_a_list_have_values_of_their_own() -> None:
    drawn = values({"items": [{"choices": [64, 128]}, {"low": 1, "high": 3}, {"low": 0.5, "high": 1.0}]})

    firsts, seconds, thirds = zip(*drawn, strict=True)
    assert set(firsts) == {64, 128}
    assert set(seconds) == {1, 2, 3}
    assert len(set(thirds)) == 200


def test_grid_of_places_and_their_rehearsals_have_every_value() -> None:
    space = Space.parse({"key": {"items": [{"choices": [1, 2, 3]}, {"choices": [8, 9]}]}})

    assert space.grid() == {"key.0": [1, 2, 3], "key.1": [8, 9]}
    assert [point["key"] for point in space.rehearsals({})] == [[1, 8], [2, 9], [3, 8]]
    assert space.kinds["key"].has([3, 9])
    assert not space.kinds["key"].has([9, 3])


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"items": []}, "space.key: items are empty"),
        ({"items": [{"choices": [1]}], "length": 1}, "space.key: there is no length"),
        ({"items": [{"low": 2, "high": 1}]}, "space.key.items.0: low 2 is above high 1"),
        ({"items": [3]}, "space.key.items.0: must be like"),
        ({"items": [{"choices": [1], "when": {"a": 1}}]}, "space.key: when stands beside items"),
    ],
)
def test_bad_places_are_refused_with_the_reason(entry: Declared, complaint: str) -> None:
    with pytest.raises(UsageError) as error:
        Space.parse({"key": entry})

    assert str(error.value).startswith(complaint)


def test_conditional_key_is_there_only_where_its_condition_is_met() -> None:
    declared = {
        "kind": {"choices": ["a", "b", "c"]},
        "x": {"low": 0.0, "high": 1.0, "when": {"kind": ["a", "b"]}},
        "y": {"low": 0.0, "high": 1.0, "when": {"kind": "a", "base.key": 3}},
        "z": {"low": 0.0, "high": 1.0, "when": {"base.key": 4}},
    }

    drawn = draws(declared, config={"base": {"key": 3}})

    keys = {"a": {"kind", "x", "y"}, "b": {"kind", "x"}, "c": {"kind"}}
    assert {params["kind"] for params in drawn} == set(keys)
    assert all(set(params) == keys[params["kind"]] for params in drawn)


def test_grid_sampler_sees_every_point_once() -> None:
    declared = {
        "a": {"low": 0.1, "high": 0.3, "step": 0.1},
        "b": {"choices": [1, True]},
        "c": {"length": {"low": 2, "high": 2, "step": 1}, "items": {"choices": [[8], [16]]}},
    }
    space = Space.parse(declared)
    study = optuna.create_study(sampler=GridSampler(space.grid(), seed=1))
    seen = []

    def objective(trial: optuna.Trial) -> float:
        seen.append(repr(space.draw(trial, {})))
        return 0.0

    study.optimize(objective)

    assert len(seen) == len(set(seen)) == 3 * 2 * 4


def test_interval_has_no_grid() -> None:
    with pytest.raises(UsageError, match=r"space\.key: a grid needs a step or choices"):
        Space.parse({"key": {"low": 0.1, "high": 0.2}}).grid()


# What is refused

INTERVAL = {"low": 0.1, "high": 0.2}
LENGTH = {"low": 1, "high": 2}


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"low": 0.2, "high": 0.1}, r"space\.key: low 0.2 is above high 0.1"),
        ({"low": 0.1, "high": 0.1}, "there is nothing to search"),
        ({"low": 0, "high": 0.1, "log": True}, "log needs a low above 0, got 0"),
        ({"low": -1.0, "high": 0.1, "log": True}, "log needs a low above 0, got -1.0"),
        ({"low": math.nan, "high": 0.1}, "must be finite"),
        ({"low": 0.1, "high": math.inf}, "must be finite"),
        ({"low": 0.1, "high": "abc"}, r"space\.key\.high: must be of type int or float, got abc"),
        ({"low": True, "high": 2}, r"space\.key\.low: must be of type int or float, got True"),
        ({"low": 0.1}, "needs high"),
        ({}, "needs low, high"),
        ({"low": None, "high": 1}, r"space\.key\.low: must not be null"),
        ({**INTERVAL, "setp": 0.1}, "there is no setp"),
        ({**INTERVAL, "hihg": 0.1}, "did you mean high"),
        ({**INTERVAL, "step": 0}, "step must be above 0, got 0"),
        ({**INTERVAL, "step": -0.1}, "step must be above 0"),
        ({**INTERVAL, "step": 1}, "step 1 is larger than the range"),
        ({**INTERVAL, "step": None}, r"space\.key\.step: must not be null"),
        ({**INTERVAL, "step": 0.1, "log": True}, "log and step exclude each other"),
        ({**INTERVAL, "log": "maybe"}, r"space\.key\.log: must be of type bool, got maybe"),
        ({**INTERVAL, "when": 3}, r"space\.key\.when: must be of type dict, got 3"),
        ({**INTERVAL, "when": {"key": 1}}, "key has to stand above key"),
        ({**INTERVAL, "when": {"later": 1}}, "later has to stand above key"),
        ({"choices": []}, "choices are empty"),
        ({"choices": 3}, r"space\.key\.choices: must be of type list, got 3"),
        ({"choices": [16, 32, 16]}, "16 stands twice"),
        ({"choices": [1, 2], "low": 1}, "there is no low"),
        ({"items": {"choices": [8]}}, r"space\.key\.length: needs low, high"),
        ({"length": LENGTH}, r"space\.key\.items: needs low, high"),
        ({"length": 3, "items": {"choices": [8]}}, r"space\.key\.length: must be like"),
        ({"length": LENGTH, "items": 8}, r"space\.key\.items: must be like"),
        ({"length": {"low": -1, "high": 2}, "items": {"choices": [8]}}, "length must be whole numbers from 0"),
        ({"length": {"low": 0.5, "high": 2}, "items": {"choices": [8]}}, "length must be whole numbers from 0"),
        ({"lenght": LENGTH, "items": {"choices": [8]}}, "did you mean length"),
        ({"length": LENGTH, "items": {**INTERVAL, "when": {"a": 1}}}, "when stands beside length and items"),
        (3, r"space\.key: must be like"),
        (None, r"space\.key: must be like"),
        ([0.1, 0.2], r"space\.key: must be like"),
    ],
)
def test_bad_entry_is_refused_with_the_reason(entry: Any, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        Space.parse({"key": entry, "later": INTERVAL})


@pytest.mark.parametrize("key", ["", ".", "model.", "model..lr", 1])
def test_what_is_no_key_is_refused(key: Any) -> None:
    with pytest.raises(UsageError, match="is no key"):
        Space.parse({key: INTERVAL})


def test_empty_space_is_refused() -> None:
    with pytest.raises(UsageError, match="there is nothing to search"):
        Space.parse({})


@pytest.mark.parametrize(
    ("when", "complaint"),
    [
        ({"bsae.key": 3}, r"space\.x\.when\.bsae\.key: there is no such key\ndid you mean base\.key"),
        ({"chioce": 1}, "did you mean choice"),
        ({"base.key": 4}, "is 3 in all trials, never 4"),
        ({"choice": 3}, r"space\.choice is never 3"),
        ({"choice": [1, 3]}, r"space\.choice is never 3"),
        ({"range": 4}, r"space\.range is never 4"),
        ({"interval": 7}, r"space\.interval is never 7"),
        ({"list": [[8, 9]]}, r"space\.list is never \[8, 9\]"),
    ],
)
def test_condition_that_cannot_be_met_is_refused(when: Declared, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        conditional(when).check({"base": {"key": 3}})


@pytest.mark.parametrize(
    "when",
    [{"base.key": [3, 4]}, {"choice": 1}, {"choice": [1, 2]}, {"range": 3}, {"interval": 0.15}, {"list": [[8], [16]]}],
)
def test_condition_that_can_be_met_is_accepted(when: Declared) -> None:
    conditional(when).check({"base": {"key": 3}})


def conditional(when: Declared) -> Space:
    declared = {
        "choice": {"choices": [1, 2]},
        "range": {"low": 1, "high": 5, "step": 2},
        "interval": INTERVAL,
        "list": {"length": LENGTH, "items": {"choices": [8, 16]}},
        "x": {**INTERVAL, "when": when},
    }
    return Space.parse(declared)


# Which points show that all of it works


def test_rehearsals_reach_every_end_also_below_conditions_on_conditions() -> None:
    declared = {
        "a": {"choices": [1, 2, 3]},
        "b": {"choices": ["x", "y"], "when": {"a": [2, 3]}},
        "c": {"low": 5, "high": 9, "when": {"b": "y"}},
    }

    points = list(Space.parse(declared).settled({}).rehearsals({}))

    assert {point["a"] for point in points} == {1, 2, 3}
    assert {(point["a"], point["b"]) for point in points if "b" in point} >= {(2, "x"), (3, "y")}
    assert {point["c"] for point in points if "c" in point} == {5, 9}
    assert all(point["b"] == "y" for point in points if "c" in point)


def test_interval_is_rehearsed_with_a_fraction_between_its_ends() -> None:
    points = Space.parse({"key": {"low": 16.0, "high": 64.0}}).rehearsals({})

    assert any(point["key"] % 1 for point in points)


def test_class_beside_its_arguments_is_a_class_path_in_any_order() -> None:
    expected = {"model": {"optimizer": {"class_path": "SGD", "init_args": {"momentum": 0.9}}}}
    keys = {"model.optimizer.init_args.momentum": 0.9, "model.optimizer": "SGD"}

    assert nested(keys) == nested(dict(reversed(keys.items()))) == expected


def test_nesting_leaves_what_it_was_given_alone() -> None:
    given = {"model": {"lr": 0.1}, "model.dropout": 0.5}

    assert nested(given) == {"model": {"lr": 0.1, "dropout": 0.5}}
    assert given == {"model": {"lr": 0.1}, "model.dropout": 0.5}
    assert flat(nested(given)) == {"model.lr": 0.1, "model.dropout": 0.5}
