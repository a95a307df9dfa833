"""The metrics of a run: TensorBoard's curves, hyper-parameters and graph, metrics.json, the profiler's trace."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL, WORSE
from runs import curves, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mnist_lit import main

SCALARS = {"train/loss", "train/acc", "val/loss", "val/acc", "val/f1", "val/acc_best"}
TEST_SCALARS = {"test/loss", "test/acc", "test/f1"}
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


@pytest.mark.parametrize("name", RUNS)
def test_tensorboard_has_the_graph_of_the_network(name: str, logs: Path) -> None:
    graph = EventAccumulator(str(logs / name)).Reload().Graph()

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
