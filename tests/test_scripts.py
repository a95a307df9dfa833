"""The benchmark prints its tables from real runs."""

import itertools
import re
import sys
from pathlib import Path

import pytest
import yaml
from conftest import CONFIGS, PROJECT, completed

pytestmark = pytest.mark.slow
SMALL = ["--recipe=base+digits+debug", "--repeats=1"]


def benchmark(*args: str, folder: Path) -> list[list[str]]:
    """The cells of the tables that it prints, without their headings."""
    done = completed([sys.executable, PROJECT / "scripts" / "benchmark.py", *args], cwd=folder)
    assert not list(folder.glob("logs"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    return [row for row, after in itertools.pairwise([*rows, [""]]) if "---" not in (row[0], after[0])]


def test_fit_has_a_row_for_each_recipe(tmp_path: Path) -> None:
    ((name, parameters, epochs, accuracy, *measured),) = benchmark(
        "fit", "--recipes=[base+digits+debug]", "--seeds=1", folder=tmp_path
    )
    assert (name, parameters, epochs) == ("`base+digits+debug`", "29,178", "1")
    assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d % \(1\)", accuracy)
    assert len(measured) == 4
    assert not list(tmp_path.iterdir())


SEARCH = {
    "configs": [str(CONFIGS / "base.yaml"), str(CONFIGS / "digits.yaml")],
    "overrides": {"trainer.max_epochs": 1},
    "space": {"model.lr": {"low": 0.001, "high": 0.1, "log": True}},
}


@pytest.mark.parametrize(
    ("args", "num_rows"),
    [
        (["overhead", "--recipe=base+digits", "--repeats=1"], 1),
        (["start", *SMALL], 6),
        (["growth", "--times=[1,6]", "--n_trials=10", "--recipe=base+digits"], 12),
        (["search", "--search_config=search.yaml", "--n_trials=3", "--repeats=1"], 2),
    ],
    ids=lambda args: str(args).split("'")[1] if "'" in str(args) else "",
)
def test_each_measurement_is_a_row_of_numbers(args: list[str], num_rows: int, tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(SEARCH))
    rows = benchmark(*args, folder=tmp_path)
    assert len(rows) >= num_rows
    assert all(float(row[1].split()[0].replace(",", "")) > 0 for row in rows)
