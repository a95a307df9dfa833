"""Runs side by side: which runs can be compared, and what the table and the page tell of them."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL
from test_report import Page

from mnist_lit import main

ADAM = ["--model.optimizer=Adam", "--model.optimizer.weight_decay=0.01"]
SGD = ["--model.optimizer=SGD", "--model.optimizer.momentum=0.9", "--test_after_fit=true", "--trainer.max_epochs=3"]
EVIL = "<script>alert(1)</script>"
Fails = Callable[..., str]
Compare = Callable[..., list[str]]


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
    """`compare(*args)`: the lines that it prints before it ends with exit code 0."""

    def run(*args: object) -> list[str]:
        with pytest.raises(SystemExit) as stop:
            main(["compare", *map(str, args)])
        printed = capsys.readouterr()
        assert (stop.value.code, printed.err) == (0, "")
        return printed.out.splitlines()

    return run


def table_of(lines: list[str]) -> dict[str, list[str]]:
    """The cells of each row of the table on the console, by the row's name."""
    rows = [re.split(r"  +", line) for line in lines]
    return {name: cells for name, *cells in rows}


def edited(run_dir: Path, **changes: Any) -> Path:
    """The run's config with other keys."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**config, **changes}))
    return run_dir


def test_console_tells_metrics_and_what_differs(folder: Path, compare: Compare) -> None:
    head, *rows, last = compare(folder / "adam", folder / "sgd")

    table = table_of(rows)
    assert head.split() == ["adam", "sgd"]
    assert all(cell.endswith(" %") for cell in table["val/acc"])
    assert table["test/acc"][0] == "\N{EN DASH}"
    assert [cell[-4:] for cell in table["best epoch"]] == ["of 2", "of 3"]
    assert table["trainer.max_epochs"] == ["2", "3"]
    assert table["model.optimizer"] == ["Adam", "SGD"]
    assert table["model.optimizer.weight_decay"] == ["0.01", "0"]
    assert table["model.optimizer.momentum"] == ["\N{EN DASH}", "0.9"]
    assert not {"model.lr", "data.dataset", "run_dir"} & set(table)
    assert last == "logs/comparison.html"


def test_page_has_the_same_table_and_the_curves(folder: Path, compare: Compare) -> None:
    _, *rows, file = compare(folder / "adam", folder / "sgd")

    page = Page(Path(file))
    assert [row for table in page.tables for row in table[1:]] == [
        [name, *cells] for name, cells in table_of(rows).items()
    ]
    assert [table[0][1:] for table in page.tables] == [["adam", "sgd"]] * 2
    assert [image["alt"].partition(" at ")[0] for image in page.all("img")] == ["val/acc", "val/loss", "train/loss"]
    assert [cell.get("class") for cell in page.all("td")].count("best") >= 4


def test_nothing_is_loaded_from_elsewhere(folder: Path, compare: Compare) -> None:
    page = Page(Path(compare(folder / "adam", folder / "sgd")[-1]))

    assert {name for name, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "a"})
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert not re.search(r"@import|url\(|https?:", page.source)
    assert any(tag.get("content", "").startswith("default-src 'none'") for tag in page.all("meta"))


def test_page_is_written_where_it_is_wanted_and_replaces_the_one_before(folder: Path, compare: Compare) -> None:
    for runs in (["logs/adam", "logs/sgd"], ["logs/sgd", "logs/adam"]):
        assert compare(runs[0], "--output", "some/where.html", runs[1])[-1] == "some/where.html"

    assert Page(Path("some/where.html")).tables[0][0] == ["", "sgd", "adam"]
    assert [path.name for path in Path("some").iterdir()] == ["where.html"]
    assert not (folder / "comparison.html").exists()


def test_equal_configs_are_said_to_be_equal(folder: Path, compare: Compare) -> None:
    shutil.copytree(folder / "adam", folder / "again")

    page = Page(Path(compare("logs/adam", "logs/again")[-1]))

    assert "The configs of these runs are the same." in page.text
    assert len(page.tables) == 1


def test_classes_of_one_name_differ(folder: Path, compare: Compare) -> None:
    text = (shutil.copytree(folder / "adam", folder / "mine") / "config.yaml").read_text()
    (folder / "mine" / "config.yaml").write_text(text.replace("torch.optim.Adam", "mine.Adam"))

    assert "model.optimizer" in table_of(compare("logs/adam", "logs/mine"))


def test_runs_of_one_name_are_told_apart(folder: Path, compare: Compare) -> None:
    shutil.copytree(folder / "adam", folder / "other" / "adam")

    assert compare("logs/adam", "logs/other/adam", "logs/sgd")[0].split() == ["logs/adam", "other/adam", "sgd"]


def test_trials_and_unfinished_runs_are_runs(folder: Path, compare: Compare) -> None:
    trial = shutil.copytree(folder / "adam", folder / "search" / "s" / "trials" / "0007")
    (folder / "killed").mkdir()
    shutil.copy(folder / "sgd" / "config.yaml", folder / "killed")

    head, *rows = compare(trial, "logs/killed")

    assert head.split() == ["0007", "killed"]
    assert table_of(rows)["val/acc"][1] == "\N{EN DASH}"


def test_runs_without_any_measurement_can_be_compared(folder: Path, compare: Compare) -> None:
    for name in ("one", "two"):
        (folder / name).mkdir()
        shutil.copy(folder / "adam" / "config.yaml", folder / name)

    page = Page(Path(compare("logs/one", "logs/two")[-1]))

    assert not page.all("img")


def test_run_from_before_a_key_was_made_lacks_it(folder: Path, compare: Compare) -> None:
    edited(folder / "sgd", novelty=3)

    assert table_of(compare("logs/adam", "logs/sgd"))["novelty"] == ["\N{EN DASH}", "3"]


def test_ten_runs_are_drawn(folder: Path, compare: Compare) -> None:
    many = [shutil.copytree(folder / "adam", folder / f"run_{number}") for number in range(10)]

    page = Page(Path(compare(*many)[-1]))

    assert page.tables[0][0] == ["", *(f"run_{number}" for number in range(10))]
    assert len(page.all("img")) == 3


def test_best_is_marked_beside_a_run_that_has_diverged(folder: Path, compare: Compare) -> None:
    metrics = folder / "adam" / "metrics.json"
    metrics.write_text(json.dumps({**json.loads(metrics.read_text()), "val/loss": float("nan")}))

    text = Path(compare("logs/adam", "logs/sgd")[-1]).read_text()

    assert re.search(r'>val/loss</th><td>nan</td><td class="best">', text)


def test_keys_of_a_config_need_not_be_text(folder: Path, compare: Compare) -> None:
    with (folder / "adam" / "config.yaml").open("a") as config:
        config.write("1: 2\nnull: 3\n")

    assert table_of(compare("logs/adam", "logs/sgd"))["1"] == ["2", "\N{EN DASH}"]


def test_whatever_stands_in_a_config_is_only_text(folder: Path, compare: Compare) -> None:
    edited(folder / "adam", **{EVIL: EVIL})
    evil = (folder / "adam").rename(folder / "<b>run")

    page = Page(Path(compare(evil, "logs/sgd")[-1]))

    assert not {"script", "b"} & {name for name, _ in page.tags}
    assert [EVIL, EVIL, "\N{EN DASH}"] in page.tables[-1]


@pytest.mark.parametrize(
    ("args", "first", "second"),
    [
        ([], "compare needs two different runs or more", "logs/run_1 logs/run_2"),
        (["logs/adam"], "compare needs two different runs or more", "logs/run_1 logs/run_2"),
        (["logs/adam", "logs/sgd/../adam/"], "compare needs two different runs or more", "logs/run_1 logs/run_2"),
        (["logs/adam", "logs/nowhere"], "logs/nowhere does not exist", "give a run directory"),
        (["logs/adam", "logs"], "logs is no run directory: it holds no config.yaml", "give one that fit has made"),
        (["logs/adam", "logs/adam/config.yaml"], "logs/adam/config.yaml is no run directory", "give one"),
        (["logs/adam", "logs/sgd", "--ouput=x"], "compare: unrecognized arguments: --ouput=x", "usage: "),
        (["logs/adam", "logs/sgd", "--output", "logs"], "--output: logs is a directory", "give the page's file"),
        (["logs/adam", "logs/sgd", "--output="], "--output: . is a directory", "give the page's file"),
        (["logs/adam", "logs/sgd", "--output", "logs/adam/config.yaml/x"], "--output: logs/adam/config.yaml/x", ""),
    ],
)  # fmt: skip
def test_mistake_is_explained(args: list[str], first: str, second: str, folder: Path, fails: Fails) -> None:
    error = fails("compare", *args)

    lines = error.splitlines()
    assert lines[0].startswith(f"error: {first}")
    assert second in " ".join(lines[1:])
    assert not (folder / "comparison.html").exists()


def test_damaged_run_is_named(folder: Path, fails: Fails) -> None:
    (folder / "sgd" / "metrics.json").write_text("{")

    assert fails("compare", "logs/adam", "logs/sgd").startswith("error: logs/sgd/metrics.json cannot be read: ")


def test_help_says_how_it_is_used(compare: Compare) -> None:
    text = " ".join(compare("--help"))

    assert text.startswith("usage: python -m mnist_lit compare RUN RUN... [--output FILE]")
    assert "default logs/comparison.html" in text


def test_mistyped_command_gets_it(fails: Fails) -> None:
    assert "did you mean compare" in fails("comapre", "a", "b")


def test_comparison_needs_no_torch(folder: Path) -> None:
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "mnist_lit",
        "compare",
        str(folder / "adam"),
        str(folder / "sgd"),
    ]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "mnist_lit.reports.comparison" in imported
    assert not {"torch", "lightning", "optuna"} & imported
