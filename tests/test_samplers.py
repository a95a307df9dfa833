"""Samplers and pruners by class path, several objectives: each is made from YAML and run."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from conftest import CONFIGS
from optuna.trial import TrialState

from mnist_lit.search.command import main
from mnist_lit.search.settings import parse
from mnist_lit.search.space import Space
from mnist_lit.search.study import COPY_OF, PARAMS, Study, open_study

# The search itself is as quiet about classes that the user has named.
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

INTERVAL = {"model.lr": {"low": 0.001, "high": 0.1, "log": True}}
LIST = {"model.channels": {"length": {"low": 1, "high": 2}, "items": {"choices": [2, 4]}}}
CHOICE = {"data.batch_size": {"choices": [64, 128]}}
RANGE = {"model.dropout": {"low": 0.0, "high": 0.2, "step": 0.1}}
MIXED = {**INTERVAL, **LIST, **CHOICE, **RANGE}
FINITE = {**LIST, **RANGE}
NUM_POINTS = 18  # of FINITE: 2 + 4 lists, 3 rates
SAMPLERS = [
    "TPESampler",
    "RandomSampler",
    "CmaEsSampler",
    "QMCSampler",
    "GPSampler",
    "NSGAIISampler",
    "GridSampler",
    "BruteForceSampler",
]
PRUNERS: dict[str, Any] = {
    "optuna.pruners.PercentilePruner": {"percentile": 1.0, "n_startup_trials": 1},
    "optuna.pruners.SuccessiveHalvingPruner": {"min_resource": 1, "reduction_factor": 2},
    "optuna.pruners.ThresholdPruner": {"lower": 0.9},
    "optuna.pruners.MedianPruner": {"n_startup_trials": 1},
    "optuna.pruners.HyperbandPruner": {"min_resource": 1, "max_resource": 4},
    "optuna.pruners.PatientPruner": {
        "patience": 0,
        "wrapped_pruner": {"class_path": "optuna.pruners.MedianPruner", "init_args": {"n_startup_trials": 1}},
    },
}


def config(**changes: Any) -> str:
    """The flag for a search of tiny trials: two batches of digits."""
    settings = {
        "n_trials": 4,
        "configs": [str(CONFIGS / "base.yaml"), str(CONFIGS / "digits.yaml")],
        "overrides": {"trainer.max_epochs": 1, "trainer.limit_train_batches": 2, "model.hidden": []},
        "space": MIXED,
        **changes,
    }
    Path("search.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return "--config=search.yaml"


def score(params: dict[str, Any], step: int = 0) -> float:
    """As if something had been trained: 0 to 1, worse at each step, best with two stages and without dropout."""
    return float(0.5 + 0.1 * len(params.get("model.channels", [])) - params.get("model.dropout", 0.0) - 0.05 * step)


def points(study: Study) -> list[str]:
    """What the trials that count were given."""
    return [str(trial.user_attrs[PARAMS]) for trial in study.counted()]


def explore(*flags: str, steps: int = 1) -> Study:
    """A whole search without training: what it opens, draws, and judges, but the score is a known function."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    settings = parse(list(flags)).settings
    space = Space.parse(settings.space)
    study = open_study(settings, {"space": settings.space}, space)
    with study.joined(settings.folder):
        while trial := study.begin(settings.n_trials):
            params = space.draw(trial, {})
            trial.set_user_attr(PARAMS, params)
            study.end(trial.number, *_result(trial, params, steps))
    return study


def _result(trial: Any, params: dict[str, Any], steps: int) -> tuple[TrialState, list[float] | None]:
    for step in range(steps):
        trial.report(score(params, step), step)
        if trial.should_prune():
            return TrialState.PRUNED, None
    return TrialState.COMPLETE, [score(params, steps - 1)]


def sampler(name: str, seed: int | None = 1) -> dict[str, Any]:
    arguments = {} if seed is None else {"seed": seed}
    return {"class_path": f"optuna.samplers.{name}", "init_args": arguments}


# ---- Samplers


@pytest.fixture
def quiet(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Nothing on the console."""
    yield
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sampler_proposes_points_of_a_space_of_all_kinds(name: str) -> None:
    space = FINITE if name in ("GridSampler", "BruteForceSampler") else MIXED
    flag = config(space=space, sampler=sampler(name))
    study = explore(flag, "--n_trials=12")
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 12
    for trial in study.trials:
        assert list(trial.user_attrs[PARAMS]) == list(space)
    assert len(set(points(study))) > 6


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("seed", [1, None])
def test_a_resumed_study_goes_on_to_new_points(name: str, seed: int | None) -> None:
    space = FINITE if name in ("GridSampler", "BruteForceSampler") else {**INTERVAL, **LIST}
    flag = config(space=space, sampler=sampler(name, seed))
    first = points(explore(flag, "--n_trials=4"))
    second = points(explore(flag, "--n_trials=8"))
    assert second[:4] == first
    assert len(set(second)) == (8 if space != FINITE or name == "BruteForceSampler" else len(set(second)))


def test_a_seed_makes_the_same_points_and_another_other_ones() -> None:
    def drawn(seed: int, name: str) -> list[str]:
        return points(explore(config(sampler=sampler("TPESampler", seed)), f"--study_name={name}"))

    assert drawn(1, "a") == drawn(1, "b") != drawn(2, "c")


def test_a_stopped_sequence_goes_on_where_it_was() -> None:
    """With seed and without pause the points are the same: the sequence is not begun anew, nor left."""
    flag = config(space=INTERVAL, sampler=sampler("QMCSampler"))
    whole = points(explore(flag, "--study_name=whole", "--n_trials=9"))
    explore(flag, "--study_name=parts", "--n_trials=3")
    explore(flag, "--study_name=parts", "--n_trials=5")
    assert points(explore(flag, "--study_name=parts", "--n_trials=9")) == whole


@pytest.mark.parametrize("seed", [1, None])
@pytest.mark.parametrize("pauses", [[50], [5, 11, 50]])
def test_a_grid_is_filled_in_and_tried_as_a_whole(seed: int | None, pauses: list[int]) -> None:
    flag = config(space=FINITE, sampler=sampler("GridSampler", seed))
    for pause in pauses:
        study = explore(flag, f"--n_trials={pause}")
    assert len(set(points(study))) == NUM_POINTS
    assert study.is_exhausted


@pytest.mark.parametrize("pauses", [[50], [5, 11, 50]])
def test_brute_force_tries_each_point_once_and_stops(pauses: list[int]) -> None:
    flag = config(space=FINITE, sampler=sampler("BruteForceSampler"))
    for pause in pauses:
        study = explore(flag, f"--n_trials={pause}")
    assert len(points(study)) == len(set(points(study))) == NUM_POINTS
    assert study.is_exhausted


@pytest.mark.parametrize("name", ["GridSampler", "BruteForceSampler"])
def test_the_last_point_of_a_grid_runs_again_when_it_is_lost(name: str) -> None:
    settings = parse([config(space=RANGE, sampler=sampler(name))]).settings
    space = Space.parse(settings.space)
    study = open_study(settings, {}, space)
    with study.joined(settings.folder):
        for _ in range(3):
            trial = study.begin(10)
            assert trial
            trial.set_user_attr(PARAMS, space.draw(trial, {}))
            if trial.number < 2:
                study.end(trial.number, TrialState.COMPLETE, [0.5])
        study.lose(2, "it has died", is_its_fault=True)
        again = study.begin(10)
        assert again
        assert space.draw(again, {}) == study.trials[2].user_attrs[PARAMS]


# ---- Through the door


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    """`refused(*flags)`: the short error of a search that cannot begin; nothing has been written."""

    def run(*flags: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(flags)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert len(error.splitlines()) <= 2
        assert not Path("logs").exists()
        return error

    return run


def test_a_grid_search_ends_when_everything_was_tried(capfd: pytest.CaptureFixture[str]) -> None:
    space = {**CHOICE, "model.channels": {"choices": [[2], [2, 2]]}}
    study = main([config(space=space, sampler=sampler("GridSampler"), n_trials=50)])
    printed = capfd.readouterr()
    assert printed.err == ""
    assert sorted(points(study)) == sorted(
        str({"data.batch_size": size, "model.channels": channels}) for size in (64, 128) for channels in ([2], [2, 2])
    )
    assert "best: trial" in printed.out


@pytest.mark.parametrize("name", ["GridSampler", "BruteForceSampler"])
def test_an_interval_is_no_grid(name: str, refused: Any) -> None:
    error = refused(config(space=INTERVAL, sampler=sampler(name)))
    assert error.startswith("error: space.model.lr: a grid needs a step or choices")


def test_cma_es_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)  # as if it were not installed
    assert refused(config(sampler=sampler("CmaEsSampler"))) == (
        "error: sampler: CmaEsSampler needs the package cmaes\npip install 'mnist_lit[samplers]'\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sampler_trains(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    space = FINITE if name in ("GridSampler", "BruteForceSampler") else MIXED
    flag = config(space=space, sampler=sampler("TPESampler"))
    study = main([flag, f"--sampler=optuna.samplers.{name}"])
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4
    assert capfd.readouterr().err == ""


# ---- Pruners


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("class_path", PRUNERS)
def test_each_pruner_stops_bad_trials(class_path: str) -> None:
    pruner = {"class_path": class_path, "init_args": PRUNERS[class_path]}
    study = explore(config(space=FINITE, sampler=sampler("RandomSampler"), pruner=pruner, n_trials=20), steps=4)
    assert type(study.pruner).__name__ == class_path.rpartition(".")[2]
    states = [trial.state for trial in study.trials]
    assert states.count(TrialState.PRUNED) >= 3
    assert states.count(TrialState.PRUNED) + states.count(TrialState.COMPLETE) == 20
    if "Threshold" not in class_path:
        assert TrialState.COMPLETE in states


def test_without_a_pruner_nothing_is_stopped() -> None:
    study = explore(config(space=FINITE, sampler=sampler("RandomSampler"), pruner=None, n_trials=12), steps=4)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 12


def test_training_is_pruned(capfd: pytest.CaptureFixture[str]) -> None:
    """Successive halving that lets nobody pass its first step but the best so far."""
    halving = {"min_resource": 1, "reduction_factor": 4}
    pruner = {"class_path": "optuna.pruners.SuccessiveHalvingPruner", "init_args": halving}
    overrides = {"trainer.max_epochs": 3, "trainer.limit_train_batches": 2, "model.hidden": []}
    space = {"model.lr": {"choices": [0.1, 0.0001, 0.0002, 0.0003]}}
    settings = {"space": space, "overrides": overrides, "pruner": pruner, "sampler": sampler("GridSampler")}
    study = main([config(**settings, n_trials=4)])
    num_pruned = sum(trial.state == TrialState.PRUNED for trial in study.trials)
    assert study.trials[0].state == TrialState.COMPLETE
    assert num_pruned > 0
    for trial in study.trials:
        assert len(trial.intermediate_values) == (3 if trial.state == TrialState.COMPLETE else 2)
    printed = capfd.readouterr()
    assert printed.err == ""
    assert printed.out.count("(pruned)") == num_pruned


# ---- Several objectives


def test_accuracy_against_parameters_and_seconds(capfd: pytest.CaptureFixture[str]) -> None:
    objective = [
        {"metric": "val/acc", "direction": "maximize"},
        {"metric": "parameters", "direction": "minimize"},
        {"metric": "seconds", "direction": "minimize"},
    ]
    pruner = {"class_path": "optuna.pruners.ThresholdPruner", "init_args": {"lower": 2.0}}
    study = main([config(objective=objective, space=LIST, pruner=pruner, study_name="trade"), "--n_trials=4"])
    folder = Path("logs/search/trade")
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4  # the pruner does not count
    with (folder / "trials.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, trial in zip(rows, study.trials, strict=True):
        assert [float(row[one["metric"]]) for one in objective] == trial.values
    overlay = yaml.safe_load((folder / "best.yaml").read_text(encoding="utf-8"))
    originals = [trial for trial in study.best_trials if COPY_OF not in trial.user_attrs]
    best = max(originals, key=lambda trial: trial.values[0])
    assert overlay["model"]["channels"] == best.user_attrs[PARAMS]["model.channels"]
    assert (folder / "report" / "pareto.png").is_file()
    printed = capfd.readouterr()
    assert printed.err == ""
    head = next(line for line in printed.out.splitlines() if line.split()[:1] == ["trial"] and "channels" in line)
    assert head.split() == ["trial", "val/acc", "parameters", "seconds", "channels"]
