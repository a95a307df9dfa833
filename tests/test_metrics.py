"""The metrics of a run: what TensorBoard shows over HTTP, metrics.json, the profiler's trace."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest
import yaml
from conftest import CONFIGS, SMALL, WORSE

from mnist_lit import main

SCALARS = {"train/loss", "train/acc", "val/loss", "val/acc", "val/f1", "val/acc_best"}
TEST_SCALARS = {"test/loss", "test/acc", "test/f1"}
RUNS = {
    "first": ["--pictures.enabled=true", "--test_after_fit=true", "--trainer.log_every_n_steps=5"],
    "second": ["--pictures.enabled=true", "--pictures.histograms=true", "--model.lr=0.1", "--seed_everything=7"],
}


def read(run_dir: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run_dir / "metrics.json").read_text())
    return metrics


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two finished runs."""
    folder = tmp_path_factory.mktemp("logs")
    for name, flags in RUNS.items():
        main(["fit", *SMALL, *flags, f"--run_dir={folder / name}"])
    return folder


@pytest.fixture(scope="module")
def ask(logs: Path) -> Iterator[Callable[..., Any]]:
    """`ask(path, body, **query)`: the answer of a TensorBoard that shows the two runs."""
    options = ["--logdir", str(logs), "--host", "127.0.0.1", "--port", "0", "--load_fast", "false"]
    command = [sys.executable, "-m", "tensorboard.main", *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            addresses = (re.search(r"http://127\.0\.0\.1:\d+/", line) for line in server.stderr)
            address = next(found[0] for found in addresses if found)

            def get(path: str, body: Any = None, **query: str) -> Any:
                data = None if body is None else json.dumps(body).encode()
                url = f"{address}data/plugin/{path}?{urlencode(query)}"
                with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=60) as answer:
                    text = answer.read().decode()
                return text if path == "graphs/graph" else json.loads(text)

            yield get
        finally:
            server.kill()


@pytest.fixture(scope="module")
def sessions(ask: Callable[..., Any]) -> dict[str, Any]:
    """Of each run, its entry on the page of hyper-parameters."""
    columns = [{"metric": {"tag": "val/acc_best"}}]
    body = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": columns,
        "startIndex": 0,
        "sliceSize": 10,
    }
    groups = ask("hparams/session_groups", body)["sessionGroups"]
    return {group["sessions"][0]["name"]: group for group in groups}


def test_tensorboard_has_every_scalar_of_the_contract_and_no_other(ask: Callable[..., Any]) -> None:
    tags = ask("scalars/tags")

    assert set(tags["first"]) == SCALARS | TEST_SCALARS | {"lr"}
    assert set(tags["second"]) == SCALARS | {"lr"}


def test_tensorboard_has_a_point_for_each_epoch_and_the_learning_rate_by_step(ask: Callable[..., Any]) -> None:
    points = {tag: ask("scalars/scalars", run="first", tag=tag) for tag in SCALARS | {"lr"}}

    steps = {tag: [step for _, step, _ in points[tag]] for tag in points}
    assert steps == {**{tag: [9, 19] for tag in SCALARS}, "lr": [0, 5, 10, 15]}
    assert [lr for _, _, lr in points["lr"]] == pytest.approx([0.01] * 4)


def test_metrics_file_has_the_values_of_the_curves(logs: Path, ask: Callable[..., Any]) -> None:
    metrics = read(logs / "first")

    points = {tag: ask("scalars/scalars", run="first", tag=tag) for tag in SCALARS | TEST_SCALARS}

    for tag in ("val/acc", "val/loss", "val/f1"):
        assert metrics[tag] == pytest.approx(points[tag][metrics["epoch"]][2])
    for tag in TEST_SCALARS:
        assert [value for _, _, value in points[tag]] == pytest.approx([metrics[tag]])


@pytest.mark.parametrize("name", RUNS)
def test_hyperparameters_stand_beside_the_best_accuracy(name: str, logs: Path, sessions: dict[str, Any]) -> None:
    values = {value["name"]["tag"]: value["value"] for value in sessions[name]["metricValues"]}

    assert values == {"val/acc_best": pytest.approx(read(logs / name)["val/acc_best"])}
    assert 0 < values["val/acc_best"] <= 1


def test_hyperparameters_are_those_that_differ_and_those_that_always_count(sessions: dict[str, Any]) -> None:
    first, second = (sessions[name]["hparams"] for name in RUNS)

    always = {"model.lr", "model.channels", "model.optimizer", "data.batch_size", "trainer.max_epochs", "seed"}
    assert always <= first.keys()
    assert (first["model.lr"], second["model.lr"]) == (0.01, 0.1)
    assert (first["seed"], second["seed"]) == (42, 7)
    assert (first["model.channels"], first["model.optimizer"]) == ("[4]", "AdamW")
    assert "pictures.histograms" not in first
    assert second["pictures.histograms"] == "True"
    assert not {"model.dropout", "ema.enabled", "run_dir"} & (first.keys() | second.keys())
    assert len(first) <= 14


@pytest.mark.parametrize("name", RUNS)
def test_tensorboard_has_the_graph_of_the_network(name: str, ask: Callable[..., Any]) -> None:
    assert ask("graphs/info")[name]["run_graph"] is True
    nodes = re.findall(r'name: "(Network/[^"]+)"', ask("graphs/graph", run=name))
    assert any("Conv2d" in node for node in nodes), nodes


def test_metrics_file_has_the_facts_of_the_run(logs: Path) -> None:
    first, second = (read(logs / name) for name in RUNS)

    config = yaml.safe_load((logs / "second" / "config.yaml").read_text())
    assert (second["seed"], second["dataset"]) == (7, "digits")
    assert second["precision"] == config["trainer"]["precision"] in ("32-true", "bf16-mixed", "16-mixed")
    assert second["device"] in ("cpu", "cuda", "mps")
    assert f"python {sys.version_info.major}." in second["versions"]
    assert first["seconds"] > 0
    assert first["images_per_second"] * first["seconds"] == pytest.approx(2 * 1238, rel=0.01)


def test_metrics_file_is_of_the_best_epoch_and_evaluations_agree_with_it(
    tmp_path: Path, fit: Callable[..., Any], fails: Callable[..., str]
) -> None:
    run_dir = tmp_path / "run"
    cli = fit(*WORSE, "--trainer.precision=64-true", f"--run_dir={run_dir}")
    before = read(run_dir)
    assert before["epoch"] < 2
    assert before["precision"] == "64-true"
    assert before["val/acc"] == before["val/acc_best"] > float(cli.trainer.callback_metrics["val/acc"])
    assert cli.trainer.callback_metrics["val/acc_best"] == pytest.approx(before["val/acc_best"])

    tested = main(["test", f"--ckpt_path={run_dir}"]).trainer.callback_metrics
    main(["validate", f"--ckpt_path={run_dir}"])

    after = read(run_dir)
    expected = {**before, **{name: float(tested[name]) for name in TEST_SCALARS}}
    assert after.keys() == expected.keys()
    for name, value in expected.items():
        assert after[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), name
    (run_dir / "metrics.json").write_text("{")
    for command in ("validate", "test"):
        assert "metrics.json is damaged" in fails(command, f"--ckpt_path={run_dir}", code=1)
        assert (run_dir / "metrics.json").read_text() == "{"


def test_without_validation_the_metrics_file_has_the_rest(tmp_path: Path, fit: Callable[..., Any]) -> None:
    fit("--data.val_size=0", "--test_after_fit=true", f"--run_dir={tmp_path / 'run'}")

    metrics = read(tmp_path / "run")
    assert metrics.keys() >= TEST_SCALARS
    assert not any(name.startswith("val/") for name in metrics)
    assert metrics["images_per_second"] > 0


def test_profile_leaves_a_trace_and_a_table(tmp_path: Path) -> None:
    configs = [f"--config={CONFIGS / name}.yaml" for name in ("base", "digits", "profile")]

    main(["fit", *configs, f"--run_dir={tmp_path / 'run'}"])

    traces = list((tmp_path / "run").glob("*.json*"))
    trace = next(file for file in traces if file.name != "metrics.json")
    assert len(json.loads(trace.read_text())["traceEvents"]) > 100
    assert "Self CPU" in next((tmp_path / "run").glob("*profile*.txt")).read_text()
