"""Pruning: what a trial reports of itself, and how it is stopped."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from conftest import SMALL
from test_search import search

from mnist_lit import main
from mnist_lit.search.pruning import Pruning, UnknownMetricError
from mnist_lit.search.settings import Objective

LIMITED = [*SMALL, "--trainer.limit_train_batches=4", "--trainer.limit_val_batches=1", "--checkpoint.enabled=false"]
LAST = {"data.batch_size": 64, "trainer.max_epochs": 3}


class Asked:
    """Takes reports, and finds a training hopeless from some step on."""

    def __init__(self, hopeless_from: float = math.inf) -> None:
        self.reports: list[tuple[int, list[float]]] = []
        self.hopeless_from = hopeless_from

    def __call__(self, step: int, scores: list[float]) -> bool:
        self.reports.append((step, scores))
        return step >= self.hopeless_from


def train(pruning: Pruning, *flags: str) -> Any:
    return main(["fit", *LIMITED, *flags], callbacks=[pruning])


def test_each_validation_is_reported_with_its_metrics() -> None:
    asked = Asked()

    cli = train(Pruning([Objective(metric="val/loss", direction="minimize"), Objective()], asked))

    assert [step for step, _ in asked.reports] == [0, 1]
    last = cli.trainer.callback_metrics
    assert asked.reports[-1][1] == [float(last["val/loss"]), float(last["val/acc"])]


def test_validations_within_an_epoch_count() -> None:
    asked = Asked()

    train(Pruning([Objective()], asked), "--trainer.val_check_interval=2")

    assert [step for step, _ in asked.reports] == [0, 1, 2, 3]


def test_sanity_check_is_no_validation() -> None:
    asked = Asked()

    train(Pruning([Objective()], asked), "--trainer.num_sanity_val_steps=2")

    assert [step for step, _ in asked.reports] == [0, 1]


@pytest.mark.parametrize(
    ("flags", "hopeless_from", "steps"),
    [
        (["--trainer.max_epochs=5"], 1, 8),
        (["--trainer.max_epochs=5", "--trainer.val_check_interval=2"], 2, 6),
    ],
)
def test_hopeless_training_ends_at_once(flags: list[str], hopeless_from: int, steps: int) -> None:
    pruning = Pruning([Objective()], Asked(hopeless_from))

    cli = train(pruning, *flags)

    assert pruning.is_pruned
    assert cli.trainer.global_step == steps


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--trainer.max_steps=4"],
        ["--trainer.val_check_interval=2"],
        ["--trainer.accumulate_grad_batches=2"],
    ],
)
def test_training_that_is_at_its_end_is_not_pruned(flags: list[str]) -> None:
    asked = Asked()
    train(Pruning([Objective()], asked), *flags)
    pruning = Pruning([Objective()], Asked(hopeless_from=asked.reports[-1][0]))

    train(pruning, *flags)

    assert not pruning.is_pruned


def test_unknown_metric_is_refused_with_those_that_exist() -> None:
    with pytest.raises(SystemExit) as stop:
        train(Pruning([Objective(metric="val/los")], Asked()))

    assert isinstance(stop.value.__cause__, UnknownMetricError)
    message = str(stop.value.__cause__)
    assert "did you mean val/loss" in message
    assert "val/acc" in message.splitlines()[-1]
    assert "parameters" in message.splitlines()[-1]


@pytest.mark.parametrize(("value", "expected"), [("best", 0.5), ("last", 0.25)])
def test_score_is_that_of_the_best_or_of_the_last_validation(value: Any, expected: float) -> None:
    pruning = Pruning([Objective(value=value)], Asked())
    pruning.history = [{"val/acc": math.nan}, {"val/acc": 0.5}, {"val/acc": 0.25}]

    assert pruning.scores({}) == [expected]


def test_number_of_the_record_is_an_objective() -> None:
    pruning = Pruning([Objective(metric="parameters", direction="minimize")], Asked())

    train(pruning)

    assert pruning.scores({"parameters": 12}) == [12.0]


def test_search_without_validations_says_so() -> None:
    with pytest.raises(UnknownMetricError, match="no trial is validated"):
        Pruning([Objective()], Asked()).scores({})


# In a search

THRESHOLD = {"class_path": "optuna.pruners.ThresholdPruner", "init_args": {"lower": 2.0}}


@pytest.fixture
def prunes() -> Callable[..., Any]:
    """A search whose pruner finds everything hopeless."""
    return lambda **changes: search(n_trials=2, pruner=THRESHOLD, trial=LAST, **changes)


def test_pruned_trials_run_for_fewer_epochs(prunes: Callable[..., Any]) -> None:
    ended = prunes()

    assert ended.code == 1  # nothing is complete
    assert [row["state"] for row in ended.rows] == ["pruned", "pruned"]
    assert [list(trial.intermediate_values) for trial in ended.trials] == [[0], [0]]
    assert "(pruned)" in ended.output


def test_nothing_is_pruned_with_several_objectives(prunes: Callable[..., Any]) -> None:
    ended = prunes(objective=[{"metric": "val/acc"}, {"metric": "parameters", "direction": "minimize"}])

    assert ended.code == 0, ended.errors
    assert [row["state"] for row in ended.rows] == ["complete", "complete"]
    assert all(
        trial.values == [float(row["val/acc"]), float(row["parameters"])]
        for trial, row in zip(ended.trials, ended.rows, strict=True)
    )
