"""The report of a run, the last lines on the console, and `compare`: what they show, whatever there is of a run."""

import json
import re
import shlex
import shutil
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL
from runs import metrics
from test_report import EVIL, Page

from mnist_lit import main
from mnist_lit.reports.run_report import write_run_report

ADAM = ["--model.optimizer=AdamW", "--model.optimizer.weight_decay=0.05", "--test_after_fit=true"]
SHOW = ["--report=true", "--pictures.enabled=true"]
SGD = ["--model.optimizer=SGD", "--model.optimizer.momentum=0.9", "--trainer.max_epochs=1"]
ABSENT = "\N{EN DASH}"
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two runs: `adam` has pictures, a page and test metrics, `sgd` has none."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"adam": [*ADAM, *SHOW], "sgd": SGD}.items():
        main(["fit", *SMALL, *flags, f"--run_dir={folder / name}"])
    return folder


@pytest.fixture
def folder(runs: Path, tmp_path: Path) -> Path:
    """The same as `logs` in the working directory."""
    return Path(shutil.copytree(runs, tmp_path / "logs"))


def rows_of(output: str) -> dict[str, list[str]]:
    """The cells of each line by its first one."""
    return {name: cells for name, *cells in (re.split(r"  +", line) for line in output.splitlines())}


def test_page_shows_the_run_and_loads_nothing_from_elsewhere(runs: Path) -> None:
    record, page = metrics(runs / "adam"), Page(runs / "adam" / "report.html")

    for name in ("test/acc", "val/acc", "test/f1", "val/f1"):
        assert f"{100 * record[name]:.2f} %" in page.text
    assert f"best epoch {record['epoch'] + 1} of 2" in page.text
    assert f"{record['parameters']:,}" in page.text
    embedded = {b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.all("img")}
    assert embedded == {file.read_bytes() for file in (runs / "adam" / "pictures").iterdir()}
    assert all(image["alt"] for image in page.all("img"))
    assert len(page.all("svg")) == 3
    keys = {key: (default, here) for key, default, here in page.tables[-1]}
    assert keys["model.lr"] == ("0.001", "0.01")
    assert keys["model.optimizer.weight_decay"][1] == "0.05"
    assert not {"data.batch_size", "model.dropout", "trainer.precision"} & set(keys)
    assert {name for name, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "a"})
    [policy] = [tag["content"] for tag in page.all("meta") if "http-equiv" in tag]
    assert policy.startswith("default-src 'none'")


def test_whatever_stands_in_a_run_directory_is_only_text(folder: Path) -> None:
    run_dir = (folder / "adam").rename(folder / "<b>run")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**config, EVIL: EVIL}, sort_keys=False))
    (run_dir / "metrics.json").write_text(json.dumps({**metrics(run_dir), "dataset": EVIL, "versions": EVIL}))
    page = Page(write_run_report(run_dir, {}))
    assert not {"script", "b"} & {name for name, _ in page.tags}
    assert "Run <b>run" in page.text
    assert [EVIL, "", EVIL] in page.tables[-1]


def test_what_a_run_does_not_have_is_left_out(folder: Path) -> None:
    (folder / "early").mkdir()
    shutil.copy(folder / "adam" / "config.yaml", folder / "early")
    page = Page(write_run_report(folder / "early", {}))
    assert not page.all("img") + page.all("svg")
    assert "accuracy" not in page.text.lower()
    assert ["model.lr", "", "0.01"] in page.tables[-1]


def test_evaluation_renews_the_page_but_not_the_curves(folder: Path, capsys: Capsys) -> None:
    before = Page(folder / "adam" / "report.html")
    (folder / "adam" / "report.html").unlink()
    cli = main(["validate", f"--ckpt_path={folder / 'adam'}"])  # logs at step 0
    after, output = Page(folder / "adam" / "report.html"), capsys.readouterr().out
    assert (after.tables, after.source.count("<path")) == (before.tables, before.source.count("<path"))
    rows = rows_of(output)
    assert list(rows)[1:] == ["val/acc", "val/loss", "val/f1", str(folder / "adam")]
    assert rows["val/acc"] == [f"{100 * float(cli.trainer.callback_metrics['val/acc']):.2f} %"]


def test_run_outlives_a_page_that_cannot_be_written(folder: Path, capsys: Capsys) -> None:
    (folder / "adam" / "report.html").unlink()
    (folder / "adam" / "report.html").mkdir()
    main(["test", f"--ckpt_path={folder / 'adam'}"])
    printed = capsys.readouterr()
    assert printed.err.startswith("note: report.html")
    assert printed.out.splitlines()[-1] == str(folder / "adam")


def test_end_of_fit_shows_how_it_went(tmp_path: Path, capsys: Capsys, fit: Callable[..., Any]) -> None:
    run_dir = tmp_path / "my run"
    first = fit("--report=true", "--test_after_fit=true", "--trainer.max_epochs=1", f"--run_dir={run_dir}")
    output, record = capsys.readouterr().out, metrics(run_dir)
    rows = rows_of(output)
    assert rows["best epoch"] == ["1 of 1"]
    for name in ("val/acc", "test/acc"):
        assert rows[name] == [f"{100 * record[name]:.2f} %"]
    assert shlex.split(rows["report"][0]) == [str(run_dir / "report.html")]
    assert output.splitlines()[-1] == str(run_dir)
    assert main(shlex.split(rows["go on"][0])[3:]).trainer.global_step == 2 * first.trainer.global_step


def test_table_shows_metrics_and_what_differs(folder: Path, capsys: Capsys) -> None:
    trial = shutil.copytree(folder / "sgd", folder / "search" / "s" / "trials" / "sgd")
    (folder / "killed").mkdir()
    shutil.copy(folder / "adam" / "config.yaml", folder / "killed")
    with (folder / "killed" / "config.yaml").open("a") as config:
        config.write('novelty: 0.0123456\nb: "<b>\\u001b[31m"\n')
    trial.joinpath("config.yaml").write_text(trial.joinpath("config.yaml").read_text() + "novelty: 0.0123457\n")

    with pytest.raises(SystemExit, match="0"):
        main(["compare", "logs/adam", "logs/sgd", str(trial), "logs/killed"])

    table = rows_of(capsys.readouterr().out)
    assert table[""] == ["adam", "logs/sgd", "trials/sgd", "killed"]
    assert [cell.endswith(" %") for cell in table["val/acc"]] == [True, True, True, False]
    assert table["test/acc"][1:] == [ABSENT, ABSENT, ABSENT]
    assert table["trainer.max_epochs"] == ["2", "1", "1", "2"]
    assert table["model.optimizer"][:2] == ["torch.optim.AdamW", "torch.optim.SGD"]
    assert table["model.optimizer.weight_decay"][:2] == ["0.05", "0"]
    assert table["model.optimizer.momentum"][:2] == [ABSENT, "0.9"]
    assert (table["novelty"][2:], table["b"][2:]) == (["0.0123457", "0.0123456"], [ABSENT, "<b>\\x1b[31m"])
    assert not {"model.lr", "data.dataset"} & set(table)


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ([], "RUN RUN"),
        (["logs/adam", "logs/sgd/../adam/"], "two different runs"),
        (["logs/adam", "logs/nowhere"], "logs/nowhere"),
        (["logs/adam", "logs"], "logs is not a run directory"),
        (["logs/adam", "logs/sgd"], "logs/sgd/config.yaml"),
    ],
)
def test_mistake_names_what_is_wrong(args: list[str], names: str, folder: Path, fails: Callable[..., str]) -> None:
    (folder / "sgd" / "config.yaml").write_text("- 1")
    assert names in fails("compare", *args)
