"""Loggers besides TensorBoard: metrics.csv, MLflow, a logger of one's own, none."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, SMALL, WORSE
from runs import metrics

MLFLOW = f"--config={CONFIGS / 'mlflow.yaml'}"
SCALARS = {"train/loss", "train/acc", "val/loss", "val/acc", "val/f1", "val/acc_best"}
TEST_SCALARS = {"test/loss", "test/acc", "test/f1"}
ANOTHER = [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "elsewhere"}}]


def columns(file: Path) -> dict[str, dict[int, float]]:
    """Of each column of a CSV file, its values by step."""
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    names = [name for name in rows[0] if name != "step"]
    return {name: {int(row["step"]): float(row[name]) for row in rows if row[name]} for name in names}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The directory of a run with MLflow, the run as MLflow's client has it, the client, and what was printed."""
    client_class = pytest.importorskip("mlflow").tracking.MlflowClient
    folder = tmp_path_factory.mktemp("mlflow")
    flags = ["--pictures.enabled=true", "--test_after_fit=true", *WORSE]
    command = [sys.executable, "-m", "mnist_lit", "fit", *SMALL, MLFLOW, *flags, "--run_dir=run"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    client = client_class(f"sqlite:///{folder}/mlflow.db")
    [experiment] = client.search_experiments(filter_string="name = 'mnist_lit'")
    [run] = client.search_runs([experiment.experiment_id])
    return folder, run, client, ended


def test_csv_and_another_logger_have_every_scalar(tmp_path: Path, fit: Callable[..., Any]) -> None:
    another = f"--trainer.logger={json.dumps(ANOTHER)}"
    fit("--csv=true", another, "--pictures.enabled=true", "--test_after_fit=true", f"--run_dir={tmp_path / 'run'}")

    table = columns(tmp_path / "run" / "metrics.csv")
    assert table.keys() == SCALARS | TEST_SCALARS | {"lr"}
    assert all(len(table[name]) == 2 for name in SCALARS)
    assert max(table["val/acc"].values()) == pytest.approx(metrics(tmp_path / "run")["val/acc_best"])
    [file] = (tmp_path / "elsewhere").rglob("metrics.csv")
    assert columns(file).keys() >= table.keys()
    assert "lr: 0.01" in file.with_name("hparams.yaml").read_text()
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_without_loggers_the_record_is_kept_all_the_same(tmp_path: Path, fit: Callable[..., Any]) -> None:
    fit("--trainer.logger=false", "--pictures.enabled=true", f"--run_dir={tmp_path / 'run'}")

    assert not list(tmp_path.rglob("events.out.tfevents.*"))
    assert 0 < metrics(tmp_path / "run")["val/acc_best"] <= 1
    assert (tmp_path / "run" / "pictures" / "val_confusion.png").is_file()


def test_mlflow_has_the_parameters_and_the_metrics_of_every_epoch(tracked: Any) -> None:
    folder, run, client, ended = tracked

    expected = {"model.lr": "0.05", "model.channels": "[4]", "data.batch_size": "128", "trainer.max_epochs": "3"}
    assert {key: run.data.params[key] for key in expected} == expected
    assert run.info.status == "FINISHED"
    assert run.data.metrics.keys() - {"epoch"} == SCALARS | TEST_SCALARS | {"lr"}
    history = client.get_metric_history(run.info.run_id, "val/acc")
    assert [point.step for point in history] == [9, 19, 29]
    record = metrics(folder / "run")
    assert history[record["epoch"]].value == pytest.approx(record["val/acc"])
    assert run.data.metrics["test/acc"] == pytest.approx(record["test/acc"])
    assert ended.stderr == ""


def test_mlflow_has_the_pictures_and_only_the_best_checkpoint(tracked: Any) -> None:
    folder, run, client, _ = tracked
    artifacts = folder / "mlruns" / run.info.experiment_id / run.info.run_id / "artifacts"

    [file] = artifacts.rglob("*.ckpt")

    assert file.name == "best.ckpt"
    assert file.read_bytes() == (folder / "run" / "checkpoints" / "best.ckpt").read_bytes()
    assert torch.load(file, weights_only=True)["epoch"] == metrics(folder / "run")["epoch"] < 2
    names = {Path(artifact.path).name for artifact in client.list_artifacts(run.info.run_id, "pictures")}
    assert names == {file.name for file in (folder / "run" / "pictures").iterdir()}
    assert len(names) == 5


def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)

    error = fails("fit", *SMALL, "--trainer.logger+=lightning.pytorch.loggers.WandbLogger", "--run_dir=run")

    assert "wandb" in error
    assert list(tmp_path.iterdir()) == []
