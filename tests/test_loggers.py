"""Loggers besides TensorBoard: metrics.csv, MLflow, a logger of one's own, none."""

import csv
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, SMALL, WORSE
from lightning.pytorch.loggers import CSVLogger
from runs import resume, signals, stop

MLFLOW = f"--config={CONFIGS / 'mlflow.yaml'}"
SCALARS = {"train/loss", "train/acc", "val/loss", "val/acc", "val/f1", "val/acc_best"}
TEST_SCALARS = {"test/loss", "test/acc", "test/f1"}
ANOTHER = [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "elsewhere"}}]


class Refusing(CSVLogger):
    """A logger that cannot be made."""

    def __init__(self) -> None:
        raise ValueError("there is no server at this address")


def columns(file: Path) -> dict[str, dict[int, float]]:
    """Of each column of a CSV file, its values by step."""
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    names = [name for name in rows[0] if name != "step"]
    return {name: {int(row["step"]): float(row[name]) for row in rows if row[name]} for name in names}


def metrics_of(run_dir: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run_dir / "metrics.json").read_text())
    return metrics


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


def test_csv_has_every_scalar(tmp_path: Path, fit: Callable[..., Any]) -> None:
    fit("--csv=true", "--test_after_fit=true", f"--run_dir={tmp_path / 'run'}")

    table = columns(tmp_path / "run" / "metrics.csv")
    assert table.keys() == SCALARS | TEST_SCALARS | {"lr"}
    assert all(len(table[name]) == 2 for name in SCALARS)
    assert max(table["val/acc"].values()) == pytest.approx(metrics_of(tmp_path / "run")["val/acc_best"])


def test_csv_and_curves_of_a_resumed_run_are_those_of_one_that_was_not_stopped(
    tmp_path: Path, fit: Callable[..., Any]
) -> None:
    flags = ["--csv=true", "--trainer.log_every_n_steps=3"]
    fit(*flags, "--run_dir=whole")

    stop("fit", *SMALL, *flags, "--run_dir=stopped", signals(signum=signal.SIGTERM, batch=13))
    resume(tmp_path / "stopped")

    first, second = (tmp_path / name / "metrics.csv" for name in ("whole", "stopped"))
    assert second.read_text() == first.read_text()


def test_another_logger_works_beside_tensorboard(tmp_path: Path, fit: Callable[..., Any]) -> None:
    fit(f"--trainer.logger={json.dumps(ANOTHER)}", "--pictures.enabled=true", f"--run_dir={tmp_path / 'run'}")

    [file] = (tmp_path / "elsewhere").rglob("metrics.csv")
    assert columns(file).keys() >= SCALARS | {"lr"}
    assert "lr: 0.01" in file.with_name("hparams.yaml").read_text()
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_without_loggers_the_record_is_kept_all_the_same(tmp_path: Path, fit: Callable[..., Any]) -> None:
    fit("--trainer.logger=false", "--pictures.enabled=true", f"--run_dir={tmp_path / 'run'}")

    assert not list(tmp_path.rglob("events.out.tfevents.*"))
    assert 0 < metrics_of(tmp_path / "run")["val/acc_best"] <= 1
    assert (tmp_path / "run" / "pictures" / "val_confusion.png").is_file()


def test_mlflow_has_the_parameters_and_the_state(tracked: Any) -> None:
    _, run, _, _ = tracked

    expected = {"model.lr": "0.05", "model.channels": "[4]", "data.batch_size": "128", "trainer.max_epochs": "3"}
    assert {key: run.data.params[key] for key in expected} == expected
    assert run.data.params["seed"] == "42"
    assert run.info.status == "FINISHED"


def test_mlflow_has_the_metrics_of_every_epoch(tracked: Any) -> None:
    folder, run, client, _ = tracked

    assert run.data.metrics.keys() - {"epoch"} == SCALARS | TEST_SCALARS | {"lr"}
    history = client.get_metric_history(run.info.run_id, "val/acc")
    assert [metric.step for metric in history] == [9, 19, 29]
    record = metrics_of(folder / "run")
    assert history[record["epoch"]].value == pytest.approx(record["val/acc"])
    assert run.data.metrics["test/acc"] == pytest.approx(record["test/acc"])


def test_mlflow_has_the_best_checkpoint_and_not_the_last(tracked: Any) -> None:
    folder, run, _, _ = tracked
    artifacts = folder / "mlruns" / run.info.experiment_id / run.info.run_id / "artifacts"

    [file] = artifacts.rglob("*.ckpt")

    checkpoint = torch.load(file, weights_only=True)
    assert file.name == "best.ckpt"
    assert file.read_bytes() == (folder / "run" / "checkpoints" / "best.ckpt").read_bytes()
    assert checkpoint["epoch"] == metrics_of(folder / "run")["epoch"] < 2


def test_mlflow_has_the_pictures(tracked: Any) -> None:
    folder, run, client, _ = tracked

    names = {Path(artifact.path).name for artifact in client.list_artifacts(run.info.run_id, "pictures")}

    assert names == {file.name for file in (folder / "run" / "pictures").iterdir()}
    assert len(names) == 5


def test_mlflow_adds_nothing_to_the_console(tracked: Any) -> None:
    _, _, _, ended = tracked

    assert ended.stderr == ""
    assert len(ended.stdout.splitlines()) == 8


@pytest.mark.parametrize(
    ("package", "class_name", "advice"),
    [
        ("mlflow", "MLFlowLogger", "pip install 'mnist_lit[mlflow]'"),
        ("wandb", "WandbLogger", "pip install wandb"),
    ],
)
def test_a_tracker_that_is_not_installed_is_named(package: str, class_name: str, advice: str, tmp_path: Path) -> None:
    flags = [*SMALL, f"--trainer.logger+=lightning.pytorch.loggers.{class_name}", "--run_dir=run"]
    program = f"import sys; sys.modules[{package!r}] = None; from mnist_lit import main; main(['fit', *sys.argv[1:]])"

    command = [sys.executable, "-c", program, *flags]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [
        f"error: lightning.pytorch.loggers.{class_name} needs the package {package}",
        advice,
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_logger_that_refuses_its_arguments_says_why_in_a_line(fails: Callable[..., str]) -> None:
    logger = [{"class_path": "test_loggers.Refusing"}]

    error = fails("fit", *SMALL, f"--trainer.logger={json.dumps(logger)}")

    assert error.splitlines() == ["error: there is no server at this address"]
