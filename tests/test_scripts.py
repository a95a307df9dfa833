"""The benchmark prints its tables from real runs."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import CONFIGS, PROJECT

SMALL = ["--recipe=base+digits+debug", "--repeats=1"]


def benchmark(*args: str, folder: Path) -> list[list[str]]:
    """The cells of the tables that it prints, without their headings."""
    done = subprocess.run(
        [sys.executable, PROJECT / "scripts" / "benchmark.py", *args],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(folder.glob("logs"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    return [row for row, after in itertools.pairwise([*rows, [""]]) if "---" not in (row[0], after[0])]


@pytest.mark.slow
def test_overhead_compares_fit_with_a_bare_loop_that_learns_the_same(tmp_path: Path) -> None:
    rows = benchmark("overhead", "--recipe=base+digits", "--repeats=1", folder=tmp_path)
    (_, ours, bare, ratio), *_ = rows
    ours_per_second, bare_per_second = (float(cell.replace(",", "")) for cell in (ours, bare))
    assert ours_per_second > 0
    assert float(ratio) == pytest.approx(ours_per_second / bare_per_second, rel=0.01)
    args = json.dumps(["fit", *(f"--config={CONFIGS / name}.yaml" for name in ("base", "digits"))])
    command = [sys.executable, str(PROJECT / "scripts" / "benchmark.py"), "bare_loop", args]
    accuracy = re.match(r"val/acc ([\d.]+)", subprocess.check_output(command, text=True))
    assert accuracy
    assert float(accuracy[1]) > 0.95


@pytest.mark.slow
def test_start_measures_imports_training_and_the_quick_answers(tmp_path: Path) -> None:
    rows = benchmark("start", *SMALL, folder=tmp_path)
    seconds = {row[0]: float(row[1].split()[0]) for row in rows}
    imports, begins, *answers, ratio = seconds.values()
    assert ratio == pytest.approx(begins / imports, abs=0.02)
    assert all(0 < answer < imports for answer in answers)
    assert begins > imports


@pytest.mark.slow
def test_growth_counts_images_and_trials(tmp_path: Path) -> None:
    rows = benchmark("growth", "--times=[1,6]", "--n_trials=10", "--recipe=base+digits", folder=tmp_path)
    images, trials = rows[:2], rows[-10:]
    assert int(images[1][0].replace(",", "")) == 6 * int(images[0][0].replace(",", ""))
    assert [int(row[0]) for row in trials] == list(range(1, 11))
    ends = [float(row[1]) for row in trials]
    assert ends == sorted(ends)
    assert ends[0] > 0


def test_fit_has_a_row_for_each_recipe(tmp_path: Path) -> None:
    ((name, parameters, epochs, accuracy, *measured),) = benchmark(
        "fit", "--recipes=[base+digits+debug]", "--seeds=1", folder=tmp_path
    )
    assert (name, parameters, epochs) == ("`base+digits+debug`", "29,178", "1")
    assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d % \(1\)", accuracy)
    assert len(measured) == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_search_compares_one_worker_with_two(tmp_path: Path) -> None:
    config = tmp_path / "search.yaml"
    configs = [str(CONFIGS / "base.yaml"), str(CONFIGS / "digits.yaml")]
    space = {"model.lr": {"low": 0.001, "high": 0.1, "log": True}}
    content = {"configs": configs, "overrides": {"trainer.max_epochs": 1}, "space": space}
    config.write_text(yaml.safe_dump(content))
    rows = benchmark("search", f"--search_config={config}", "--n_trials=3", "--repeats=1", folder=tmp_path)
    assert [row[0] for row in rows[:2]] == ["seconds a trial, one worker", "seconds a trial, two workers"]
    assert all(float(least) <= float(median) <= float(most) for _, median, least, most in rows)
    assert all(float(row[1]) > 0 for row in rows)
