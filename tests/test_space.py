"""The search space: what is suggested, and what is refused before trial 0."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import CONFIGS

from mnist_lit import main
from mnist_lit.errors import UsageError
from mnist_lit.search.settings import Settings
from mnist_lit.search.space import Space, check

Declared = dict[str, Any]
INTERVAL = {"low": 0.1, "high": 0.2}


def suggested(declared: Declared, base: Mapping[str, Any] | None = None, n: int = 60) -> list[Declared]:
    """The points that a random sampler finds."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    space = Space(declared, base or {})
    return [space.suggest(study.ask()) for _ in range(n)]


def values(entry: Declared, **kwargs: Any) -> list[Any]:
    return [point["k"] for point in suggested({"k": entry}, **kwargs)]


# What is suggested


@pytest.mark.parametrize(
    ("entry", "base", "expected"),
    [
        ({"low": 1, "high": 3}, None, {1, 2, 3}),
        ({"low": 0, "high": 10, "step": 4}, None, {0, 4, 8}),
        ({"low": 0, "high": 15, "step": 5}, 1.0, {0.0, 5.0, 10.0, 15.0}),
    ],
)
def test_number_has_the_values_of_its_range(entry: Declared, base: Any, expected: set[float]) -> None:
    found = set(values(entry, base={"k": base}))
    assert {round(value, 9) for value in found} == expected
    assert {type(value) for value in found} == {type(value) for value in expected}


def test_choices_come_as_they_were_written() -> None:
    choices = [1, 1.0, True, "1", None, [8, 16], {"class_path": "A"}]
    found = values({"choices": choices})
    assert {(type(value), str(value)) for value in found} == {(type(value), str(value)) for value in choices}


def test_list_has_every_length_and_every_item() -> None:
    found = values({"length": {"low": 0, "high": 2}, "items": {"choices": [8, 16]}})
    fixed = values({"items": [{"choices": [1, 2]}, {"low": 3, "high": 4}]})
    assert {tuple(value) for value in found} == {(), (8,), (16,), (8, 8), (8, 16), (16, 8), (16, 16)}
    assert {tuple(value) for value in fixed} == {(1, 3), (1, 4), (2, 3), (2, 4)}


def test_conditional_key_is_there_only_where_its_condition_is_met() -> None:
    declared = {
        "a": {"choices": [1, 2, 3]},
        "b": {"low": 0.0, "high": 1.0, "when": {"a": [1, 2]}},
        "c": {"choices": [True], "when": {"b": [0.5], "fixed": "x"}},
        "d": {"choices": [True], "when": {"fixed": ["x", "y"]}},
    }
    points = suggested(declared, {"fixed": "x"})
    assert all(("b" in point) == (point["a"] != 3) for point in points)
    assert not any("c" in point for point in points)
    assert all("d" in point for point in points)


def test_grid_has_every_value_of_every_parameter() -> None:
    declared = {
        "a": {"low": 0.0, "high": 0.3, "step": 0.1},
        "b": {"low": 1, "high": 3},
        "c": {"length": {"low": 1, "high": 2}, "items": {"choices": [8]}},
    }
    grid = Space(declared, {}).grid()
    assert grid == {"a": [0.0, 0.1, 0.2, 0.3], "b": [1, 2, 3], "c.length": [1, 2], "c.0": [8], "c.1": [8]}
    with pytest.raises(UsageError, match=r"^space\.k: "):
        Space({"k": INTERVAL}, {}).grid()


# Entries that are refused


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        (3, "3"),
        ({"low": 1}, "high"),
        ({"low": 0, "high": float("inf")}, "high"),
        ({"low": 0.0, "high": 1.0, "log": True}, "log"),
        ({"choices": []}, "choices"),
        ({"choices": 3}, "choices"),
        ({"length": {"low": -1, "high": 2}, "items": {"choices": [1]}}, "length"),
        ({"choices": [1], "when": {"b": 1}}, "b"),
        ({"choices": [1], "when": {"first": 7}}, "7"),
    ],
)
def test_bad_entry_is_refused_with_its_key(entry: Any, part: str) -> None:
    declared = {"first": {"choices": [1, 2]}, "k": entry, "later": {"choices": [1]}}
    with pytest.raises(UsageError) as error:
        Space(declared, {"fixed": "x"})
    assert str(error.value).startswith("space.k")
    assert part in str(error.value)


# What the real command line refuses


@pytest.fixture
def checked(tmp_path: Path) -> Any:
    """`checked(space, overrides)`: the space after a dry run that wrote nothing."""

    def run(space: Declared, overrides: Declared | None = None) -> Space:
        configs = [str(CONFIGS / "base.yaml"), str(CONFIGS / "digits.yaml")]
        try:
            settings = Settings(space=space, configs=configs, overrides=overrides or {})
            return check(settings, main)[1]
        finally:
            assert list(tmp_path.iterdir()) == []

    return run


@pytest.mark.parametrize(
    ("space", "overrides", "start", "part"),
    [
        ({"model.lrr": INTERVAL}, {}, "space.model.lrr", "model.lr"),
        ({"model.lr": {"low": -1, "high": 0.1}}, {}, "space.model.lr", "-1"),
        ({"model.norm": {"choices": ["batch", "btach"]}}, {}, "", "btach"),
        ({"model.channels": {"length": {"low": 1, "high": 9}, "items": {"choices": [8]}}}, {}, "", "model.channels"),
        ({"model.lr": {**INTERVAL, "when": {"model.drpout": 0}}}, {}, "space.model.lr.when", "model.dropout"),
        ({"trainer.devices": {"choices": [1, 2]}}, {}, "trainer.devices", ""),
        ({"model.lr": INTERVAL}, {"run_dir": "a"}, "overrides.run_dir", ""),
        ({"model.lr": INTERVAL}, {"data.val_size": 0}, "data.val_size", ""),
    ],
)
def test_what_trials_would_be_refused_for(
    space: Declared, overrides: Declared, start: str, part: str, checked: Any
) -> None:
    with pytest.raises(UsageError) as error:
        checked(space, overrides)
    assert str(error.value).startswith(start)
    assert part in str(error.value)


def test_numbers_are_fractions_where_the_key_takes_them(checked: Any) -> None:
    numbers = {"low": 1, "high": 2}
    decay = {"model.optimizer": {"choices": ["SGD", "AdamW"]}, "model.optimizer.init_args.weight_decay": numbers}
    momentum = {"model.optimizer.momentum": {"low": 0, "high": 1, "when": {"model.optimizer": "SGD"}}}
    others = {"model.dropout": {"low": 0, "high": 1}, "data.batch_size": {"low": 16, "high": 64}}
    channels = {"model.channels": {"length": numbers, "items": {"low": 8, "high": 16}}}
    space = checked({**decay, **momentum, **others, **channels})
    study = optuna.create_study()
    point = {key: value for _ in range(20) for key, value in space.suggest(study.ask()).items()}
    kinds = {key.rpartition(".")[2]: type(value) for key, value in point.items()}
    assert kinds["weight_decay"] is kinds["momentum"] is kinds["dropout"] is float
    assert kinds["batch_size"] is int
    assert {type(item) for item in point["model.channels"]} == {int}
