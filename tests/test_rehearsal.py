"""Before trial 0: what the command line of `fit` would refuse, and what kind of numbers its keys take."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CONFIGS

from mnist_lit.errors import UsageError
from mnist_lit.search.rehearsal import rehearse
from mnist_lit.search.settings import Settings
from mnist_lit.search.space import Interval, ListOf, Range, Space
from mnist_lit.search.workers import Pool

Rehearse = Callable[..., Space]
INTERVAL = {"low": 0.1, "high": 0.2}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool() as pool:
        yield pool


@pytest.fixture
def rehearsed(pool: Pool, tmp_path: Path) -> Rehearse:
    """`rehearsed(space, overrides)`: the space as it is found after a rehearsal that wrote nothing."""

    def run(space: dict[str, Any], overrides: dict[str, Any] | None = None) -> Space:
        configs = [str(CONFIGS / "base.yaml"), str(CONFIGS / "digits.yaml")]
        try:
            return rehearse(pool, Settings(space=space, configs=configs, overrides=overrides or {}))[1]
        finally:
            assert list(tmp_path.iterdir()) == []

    return run


@pytest.mark.parametrize(
    ("space", "overrides", "complaint"),
    [
        ({"model.lrr": INTERVAL}, {}, r"^space\.model\.lrr: there is no such key\ndid you mean model\.lr"),
        ({"model.lr": {"low": -1, "high": 0.1}}, {}, r"^space\.model\.lr: must be >0, got -1"),
        ({"model.dropout": {"low": 0.5, "high": 1.5}}, {}, r"^space\.model\.dropout: must be >=0 and <=1, got 1\.5"),
        ({"data.batch_size": {"low": 16.5, "high": 20.5}}, {}, r"size: must be a whole number, got 16\.5"),
        ({"data.batch_size": {"low": 16.0, "high": 64.0}}, {}, r"size: must be a whole number, got 33\.\d+"),
        ({"data.batch_size": {"choices": [16, "abc"]}}, {}, r"size: must be a whole number, got abc"),
        ({"model.norm": {"choices": ["batch", "btach"]}}, {}, "did you mean batch"),
        ({"model.channels": {"length": {"low": 1, "high": 9}, "items": {"choices": [8]}}}, {}, "at this point"),
        ({"model": {"choices": [1]}}, {}, r"^space\.model: is a group of keys"),
        ({"model.optimizer": {"choices": ["SGD", "Adm"]}}, {}, "there is no class Adm\ndid you mean Adam"),
        ({"model.optimizer.init_args.momentum": INTERVAL}, {}, "there is no argument momentum"),
        ({"model.optimizer.init_args.lr": INTERVAL}, {}, r"it is taken from model\.lr"),
        ({"model.lr": {**INTERVAL, "when": {"model.drpout": 0}}}, {}, r"did you mean model\.dropout"),
        ({"trainer.devices": {"choices": [1, 2]}}, {}, "a trial has one device, got 2"),
        ({"model.lr": INTERVAL}, {"model.dropot": 0}, r"^overrides\.model\.dropot: .*\ndid you mean model\.dropout"),
        ({"model.lr": INTERVAL}, {"trainer": {"max_epochs": "two"}}, r"^overrides\.trainer\.max_epochs: must be"),
        ({"model.lr": INTERVAL}, {"model": 3}, r"^overrides\.model: takes keys below it"),
        ({"model.lr": INTERVAL}, {"data.val_size": 0}, "0 leaves nothing to compare trials by"),
    ],
)
def test_what_trials_would_be_refused_for(
    space: dict[str, Any], overrides: dict[str, Any], complaint: str, rehearsed: Rehearse
) -> None:
    with pytest.raises(UsageError, match=complaint):
        rehearsed(space, overrides)


def test_numbers_are_fractions_where_the_key_takes_them(rehearsed: Rehearse) -> None:
    numbers = {"low": 1, "high": 2}
    space = rehearsed(
        {
            "model.lr": numbers,
            "model.dropout": {"low": 0, "high": 1},
            "early_stopping.min_delta": numbers,
            "data.batch_size": {"low": 16, "high": 64},
            "early_stopping.patience": numbers,
            "model.channels": {"length": numbers, "items": {"low": 8, "high": 16}},
        }
    )

    kinds = {key: type(kind) for key, kind in space.kinds.items()}
    channels = space.kinds["model.channels"]
    assert kinds == {
        "model.lr": Interval,
        "model.dropout": Interval,
        "early_stopping.min_delta": Interval,
        "data.batch_size": Range,
        "early_stopping.patience": Range,
        "model.channels": ListOf,
    }
    assert isinstance(channels, ListOf)
    assert isinstance(channels.items, Range)


def test_optimizers_with_arguments_of_their_own_can_be_searched(rehearsed: Rehearse) -> None:
    optimizer = {"model.optimizer": {"choices": ["SGD", "AdamW"]}}
    decay = {"model.optimizer.init_args.weight_decay": {"low": 1e-5, "high": 1e-2, "log": True}}
    momentum = {"model.optimizer.init_args.momentum": {"low": 0, "high": 1}}
    momentum_of_sgd = {key: {**entry, "when": {"model.optimizer": "SGD"}} for key, entry in momentum.items()}

    space = rehearsed({**optimizer, **decay, **momentum_of_sgd})

    assert isinstance(space.kinds["model.optimizer.init_args.momentum"], Interval)
    with pytest.raises(UsageError, match="there is no argument momentum"):
        rehearsed({**optimizer, **decay, **momentum})
