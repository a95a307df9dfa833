"""Kinds of searches: pruners, several objectives, any sampler, GPUs, and another working directory."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CONFIGS
from optuna.trial import TrialState
from test_search import FOLDER, GRID, TINY_TRIAL, rows, search, trials

from mnist_lit import ConvNet, main
from mnist_lit.search.worker import kill_workers, new_workers

WHOLE_EPOCHS = {"trainer.max_epochs": 3, "trainer.limit_train_batches": 1.0}
SIZES = {"model.hidden": {"items": [{"choices": [2, 4]}]}}
FRACTIONS = {"model.lr": {"low": 0.01, "high": 0.1}, "model.dropout": {"low": 0.0, "high": 0.5}}


def optuna_class(path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": f"optuna.{path}", "init_args": init_args}


# Pruners


def test_pruner_stops_the_trial_that_learns_nothing() -> None:
    pruner, space = optuna_class("pruners.ThresholdPruner", lower=0.2), {"model.lr": {"choices": [0.02, 1e-9]}}
    ended = search(n_trials=2, trial=WHOLE_EPOCHS, pruner=pruner, sampler=GRID, space=space)
    assert ended.code == 0, ended.errors
    found = {row["model.lr"]: row for row in ended.rows}
    assert (found["0.02"]["state"], found["1e-09"]["state"]) == ("COMPLETE", "PRUNED")
    assert found["1e-09"]["val/acc"] == found["1e-09"]["error"] == ""
    assert yaml.safe_load((FOLDER / "best.yaml").read_text())["model"]["lr"] == 0.02


def test_class_that_no_other_process_can_import_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one that a notebook defines."""
    own = type("Own", (ConvNet,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Own", own, raising=False)
    with pytest.raises(SystemExit, match="2"):
        main(["search"], model_class=own)
    assert "__main__" in capsys.readouterr().err


# Objectives


def test_several_objectives_rank_the_pareto_front_first() -> None:
    objectives = [{"metric": "val/loss", "direction": "minimize"}, {"metric": "parameters", "direction": "minimize"}]
    ended = search(
        n_trials=3, objective=objectives, sampler=optuna_class("samplers.NSGAIISampler", seed=1), space=SIZES
    )

    assert ended.code == 0, ended.errors
    assert list(ended.rows[0])[:4] == ["number", "state", "val/loss", "parameters"]
    for row, trial in zip(ended.rows, ended.trials, strict=True):
        metrics = json.loads((Path(row["run_dir"]) / "metrics.json").read_text())
        assert [float(row["val/loss"]), float(row["parameters"])] == trial.values
        assert float(row["parameters"]) == metrics["parameters"]
    # Nothing is smaller than the smallest, and nothing has a lower loss than the best.
    best = min(ended.trials, key=lambda trial: (trial.values[0], trial.values[1]))
    overlay = yaml.safe_load((FOLDER / "best.yaml").read_text())
    assert overlay["model"]["hidden"] == best.user_attrs["params"]["model.hidden"]
    assert "Trade-off" in (FOLDER / "report" / "index.html").read_text()


# Samplers


@pytest.mark.parametrize("name", ["GridSampler", "BruteForceSampler"])
def test_sampler_of_all_points_ends_the_search_after_them_and_refuses_a_space_without_end(name: str) -> None:
    sampler = optuna_class(f"samplers.{name}", seed=1)
    endless = search(sampler=sampler, space=FRACTIONS)
    ended, again = (search(n_trials=num_trials, sampler=sampler, space=SIZES) for num_trials in (4, 5))
    assert (endless.code, "space.model." in endless.errors) == (2, True)
    assert ended.code == again.code == 0, ended.errors + again.errors
    assert sorted(row["model.hidden"] for row in ended.rows) == ["[2]", "[4]"]
    assert again.rows == ended.rows


@pytest.mark.parametrize("name", ["CmaEsSampler", "GPSampler"])
def test_sampler_proposes_points_within_the_space(name: str) -> None:
    ended = search(sampler=optuna_class(f"samplers.{name}", seed=1, n_startup_trials=1), space=FRACTIONS)
    assert ended.code == 0, ended.errors
    assert ended.states == [TrialState.COMPLETE] * 3
    assert len({str(trial.params) for trial in ended.trials}) == 3
    assert all(0.01 <= trial.params["model.lr"] <= 0.1 for trial in ended.trials)


@pytest.mark.parametrize(
    ("visible", "num_gpus", "seen"), [(None, 2, ["0", "1", "0"]), ("4,7", 2, ["4", "7", "4"]), (None, 0, [None] * 3)]
)
def test_each_worker_sees_one_gpu(
    visible: str | None, num_gpus: int, seen: list[str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    try:
        workers = new_workers(3, num_gpus, tmp_path / "log")
        assert [worker.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result() or None for worker in workers] == seen
    finally:
        kill_workers()


def test_search_mlp_works_in_any_folder() -> None:
    """As search.yaml does by a command of the README."""
    small = json.dumps({key: TINY_TRIAL[key] for key in ("data.dataset", "data.val_size", "trainer.max_epochs")})
    flags = [f"--config={CONFIGS / 'search_mlp.yaml'}", f"--overrides={small}"]
    study = main(["search", *flags, "--study_name=s", "--n_trials=1"])
    assert [trial.value for trial in study.trials] == [trial.value for trial in trials()]
    assert [row["state"] for row in rows()] == ["COMPLETE"]
