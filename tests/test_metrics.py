"""The metrics of a run: metrics.json, TensorBoard's curves, hyper-parameters and graph, CSV, MLflow, other loggers."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONFIGS, SMALL, WORSE
from lightning.pytorch import Callback
from runs import curves, ended, metrics, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mnist_lit import main

SCALARS = {"train/loss", "train/acc", "val/loss", "val/acc", "val/f1", "val/acc_best"}
TEST_SCALARS = {"test/loss", "test/acc", "test/f1"}
MLFLOW = f"--config={CONFIGS / 'mlflow.yaml'}"
ANOTHER = [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "elsewhere"}}]
RUNS = {
    "first": ["--pictures.enabled=true", "--test_after_fit=true", "--trainer.log_every_n_steps=5"],
    "second": ["--pictures.enabled=true", "--model.residual=true", "--model.lr=0.1", "--seed_everything=7"],
}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two finished runs."""
    folder = tmp_path_factory.mktemp("logs")
    for name, flags in RUNS.items():
        main(["fit", *SMALL, *flags, f"--run_dir={folder / name}"])
    return folder


def hparams(run_dir: Path, part: str) -> Any:
    """Return what TensorBoard's page of hyper-parameters has of a run."""
    summary = EventAccumulator(str(run_dir)).Reload().SummaryMetadata(f"_hparams_/{part}")
    return getattr(HParamsPluginData.FromString(summary.plugin_data.content), part)


def test_curves_have_every_scalar_of_the_contract_and_no_other(logs: Path) -> None:
    first, second = (curves(logs / name) for name in RUNS)
    assert first.keys() == SCALARS | TEST_SCALARS | {"lr"}
    assert second.keys() == SCALARS | {"lr"}
    assert all([step for step, _ in first[tag]] == [9, 19] for tag in SCALARS)
    assert [step for step, _ in first["lr"]] == [0, 5, 10, 15]
    assert [lr for _, lr in first["lr"]] == pytest.approx([0.01] * 4)


def test_metrics_that_are_not_finite_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *SMALL, "--model.lr=1e30", "--run_dir=run"])
    assert json.loads(Path("run/metrics.json").read_text(), parse_constant=pytest.fail)["val/loss"] is None
    with pytest.raises(SystemExit, match="0"):
        main(["compare", "run", str(shutil.copytree("run", "copy"))])
    assert "nan" in capsys.readouterr().out


def test_metrics_file_has_the_values_of_the_curves_and_the_facts_of_the_run(logs: Path) -> None:
    record, points = metrics(logs / "first"), curves(logs / "first")
    for tag in ("val/acc", "val/loss", "val/f1"):
        assert record[tag] == pytest.approx(points[tag][record["epoch"]][1])
    for tag in TEST_SCALARS:
        assert [value for _, value in points[tag]] == pytest.approx([record[tag]])
    assert record["images_per_second"] * record["seconds"] == pytest.approx(2 * 1238, rel=0.01)
    second, config = metrics(logs / "second"), yaml.safe_load((logs / "second" / "config.yaml").read_text())
    assert (second["seed"], second["dataset"]) == (7, "digits")
    assert second["precision"] == config["trainer"]["precision"] in ("32-true", "bf16-mixed", "16-mixed")
    assert second["device"] in ("cpu", "cuda", "mps")
    assert f"python {sys.version_info.major}." in second["versions"]


class Late(Callback):
    times: list[float] = []

    def on_train_start(self, *_: Any) -> None:
        self.times.append(time.monotonic())

    def on_train_end(self, *_: Any) -> None:
        self.times.append(time.monotonic())
        time.sleep(0.5)


def test_seconds_are_those_of_training_without_what_callbacks_do_at_its_end(fit: Callable[..., Any]) -> None:
    cli = fit("--trainer.max_epochs=1", "--trainer.callbacks=[{class_path: test_metrics.Late}]")
    start, end = Late.times
    assert 0 < metrics(cli.run_dir)["seconds"] <= end - start + 0.001  # it is rounded


def test_hyperparameters_are_those_that_differ_and_those_that_always_count(logs: Path) -> None:
    first, second = (hparams(logs / name, "session_start_info").hparams for name in RUNS)
    always = {"model.lr", "model.channels", "model.optimizer", "data.batch_size", "trainer.max_epochs", "seed"}
    assert always <= set(first)
    assert (first["model.lr"].number_value, second["model.lr"].number_value) == (0.01, 0.1)
    assert (first["seed"].number_value, second["seed"].number_value) == (42, 7)
    assert (first["model.channels"].string_value, first["model.optimizer"].string_value) == ("[4]", "AdamW")
    assert "model.residual" not in first
    assert second["model.residual"].string_value == "true"
    assert not {"model.dropout", "ema.enabled", "run_dir"} & (set(first) | set(second))
    shown = hparams(logs / "first", "experiment").metric_infos
    assert [metric.name.tag for metric in shown] == ["val/acc_best"]


def test_tensorboard_has_the_graph_of_the_network(logs: Path) -> None:
    graph = EventAccumulator(str(logs / "first")).Reload().Graph()
    assert any("Network/" in node.name and "Conv2d" in node.name for node in graph.node)


def test_metrics_file_is_of_the_best_epoch_and_evaluations_agree(tmp_path: Path, fit: Callable[..., Any]) -> None:
    run_dir = tmp_path / "run"
    cli = fit(*WORSE, "--trainer.precision=64-true", f"--run_dir={run_dir}")
    before = metrics(run_dir)
    assert before["epoch"] < 2
    assert before["precision"] == "64-true"
    assert before["val/acc"] == before["val/acc_best"] > float(cli.trainer.callback_metrics["val/acc"])
    assert cli.trainer.callback_metrics["val/acc_best"] == pytest.approx(before["val/acc_best"])

    tested = main(["test", f"--ckpt_path={run_dir}"]).trainer.callback_metrics
    main(["validate", f"--ckpt_path={run_dir}"])

    after = metrics(run_dir)
    expected = {**before, **{name: float(tested[name]) for name in TEST_SCALARS}}
    assert after.keys() == expected.keys()
    for name, value in expected.items():
        assert after[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), name


# Other loggers


def columns(run_dir: Path) -> dict[str, list[float]]:
    """The values of each column of a run's `metrics.csv`."""
    table = rows(run_dir)
    return {name: [float(row[name]) for row in table if row[name]] for name in table[0] if name != "step"}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The directory of a run with MLflow, the run as MLflow's client has it, the client, and what was printed."""
    client_class = pytest.importorskip("mlflow").tracking.MlflowClient
    folder = tmp_path_factory.mktemp("mlflow")
    flags = ["--pictures.enabled=true", "--test_after_fit=true", *WORSE]
    printed = ended(folder, ["fit", *SMALL, MLFLOW, *flags, "--run_dir=run"])
    client = client_class(f"sqlite:///{folder}/mlflow.db")
    [experiment] = client.search_experiments(filter_string="name = 'mnist_lit'")
    [run] = client.search_runs([experiment.experiment_id])
    return folder, run, client, printed


def test_csv_and_another_logger_have_every_scalar_and_without_any_the_record_is_kept(
    tmp_path: Path, fit: Callable[..., Any]
) -> None:
    another = f"--trainer.logger={json.dumps(ANOTHER)}"
    fit("--csv=true", another, "--pictures.enabled=true", "--test_after_fit=true", f"--run_dir={tmp_path / 'run'}")

    table = columns(tmp_path / "run")
    assert table.keys() == SCALARS | TEST_SCALARS | {"lr"}
    assert all(len(table[name]) == 2 for name in SCALARS)
    assert max(table["val/acc"]) == pytest.approx(metrics(tmp_path / "run")["val/acc_best"])
    [file] = (tmp_path / "elsewhere").rglob("metrics.csv")
    assert columns(file.parent).keys() >= table.keys()
    assert "lr: 0.01" in file.with_name("hparams.yaml").read_text()
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))

    fit("--trainer.logger=false", "--pictures.enabled=true", "--trainer.max_epochs=1", "--run_dir=none")
    assert not list(Path("none").rglob("events.out.tfevents.*"))
    assert 0 < metrics(Path("none"))["val/acc_best"] <= 1
    assert Path("none", "pictures", "val_confusion.png").is_file()


def test_mlflow_has_the_parameters_and_the_metrics_of_every_epoch(tracked: Any) -> None:
    folder, run, client, (code, _, errors) = tracked
    expected = {"model.lr": "0.05", "model.channels": "[4]", "data.batch_size": "128", "trainer.max_epochs": "3"}
    assert {key: run.data.params[key] for key in expected} == expected
    assert run.info.status == "FINISHED"
    assert run.data.metrics.keys() - {"epoch"} == SCALARS | TEST_SCALARS | {"lr"}
    history = client.get_metric_history(run.info.run_id, "val/acc")
    assert [point.step for point in history] == [9, 19, 29]
    record = metrics(folder / "run")
    assert history[record["epoch"]].value == pytest.approx(record["val/acc"])
    assert run.data.metrics["test/acc"] == pytest.approx(record["test/acc"])
    assert (code, errors) == (0, "")


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
