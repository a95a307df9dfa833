"""The command `compare`: which runs can be compared, and what the table shows of them."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL

from mnist_lit import main

ADAM = ["--model.optimizer=Adam", "--model.optimizer.weight_decay=0.01", "--trainer.max_epochs=1"]
SGD = ["--model.optimizer=SGD", "--model.optimizer.momentum=0.9", "--test_after_fit=true"]
ABSENT = "\N{EN DASH}"
Compare = Callable[..., dict[str, list[str]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two runs, `adam` and `sgd`."""
    folder = tmp_path_factory.mktemp("runs")
    for name, flags in {"adam": ADAM, "sgd": SGD}.items():
        main(["fit", *SMALL, *flags, f"--run_dir={folder / name}"])
    return folder


@pytest.fixture
def folder(runs: Path, tmp_path: Path) -> Path:
    """The same as `logs` in the working directory."""
    return Path(shutil.copytree(runs, tmp_path / "logs"))


@pytest.fixture
def compare(capsys: pytest.CaptureFixture[str]) -> Compare:
    """`compare(*args)`: the cells of each row by its name; the head's name is empty."""

    def run(*args: object) -> dict[str, list[str]]:
        with pytest.raises(SystemExit) as stop:
            main(["compare", *map(str, args)])
        printed = capsys.readouterr()
        assert (stop.value.code, printed.err) == (0, "")
        rows = [re.split(r"  +", line) for line in printed.out.splitlines()]
        return {name: cells for name, *cells in rows}

    return run


def test_table_shows_metrics_and_what_differs(folder: Path, compare: Compare) -> None:
    table = compare(folder / "adam", folder / "sgd")

    assert table[""] == ["adam", "sgd"]
    assert all(cell.endswith(" %") for cell in table["val/acc"])
    assert table["test/acc"][0] == ABSENT
    assert table["trainer.max_epochs"] == ["1", "2"]
    assert table["model.optimizer"] == ["torch.optim.Adam", "torch.optim.SGD"]
    assert table["model.optimizer.weight_decay"] == ["0.01", "0"]
    assert table["model.optimizer.momentum"] == [ABSENT, "0.9"]
    assert not {"model.lr", "data.dataset", "run_dir"} & set(table)


def test_runs_that_lack_something_are_compared(folder: Path, compare: Compare) -> None:
    trial = shutil.copytree(folder / "adam", folder / "search" / "s" / "trials" / "adam")
    (folder / "killed").mkdir()
    shutil.copy(folder / "sgd" / "config.yaml", folder / "killed")
    with (folder / "killed" / "config.yaml").open("a") as config:
        config.write('novelty: 3\n1: "<b>\\u001b[31m"\n')

    table = compare("logs/adam", trial, "logs/killed")

    assert table[""] == ["logs/adam", "trials/adam", "killed"]
    assert table["val/acc"][2] == ABSENT
    assert table["novelty"] == [ABSENT, ABSENT, "3"]
    assert table["1"] == [ABSENT, ABSENT, "<b>\\x1b[31m"]


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ([], "RUN RUN"),
        (["logs/adam"], "two different runs"),
        (["logs/adam", "logs/sgd/../adam/"], "two different runs"),
        (["logs/adam", "logs/nowhere"], "logs/nowhere"),
        (["logs/adam", "logs"], "logs is no run directory"),
        (["logs/adam", "logs/sgd", "--ouput=x"], "--ouput=x"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_mistake_names_what_is_wrong(args: list[str], names: str, fails: Callable[..., str]) -> None:
    assert names in fails("compare", *args)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "a: [1\nb"),
        ("config.yaml", "- 1"),
        ("metrics.json", "{"),
        ("metrics.json", "3"),
        ("metrics.json", '{"val/acc": null}'),
    ],
)
def test_damaged_file_is_named(name: str, content: str, folder: Path, fails: Callable[..., str]) -> None:
    (folder / "sgd" / name).write_text(content)

    assert f"logs/sgd/{name}" in fails("compare", "logs/adam", "logs/sgd")


@pytest.mark.usefixtures("folder")
def test_comparison_needs_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "mnist_lit", "compare", "logs/adam", "logs/sgd"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "mnist_lit.reports.compare" in imported
    assert not {"torch", "lightning", "optuna", "matplotlib"} & imported
