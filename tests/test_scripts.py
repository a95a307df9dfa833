"""The benchmark prints the README's table from real runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import CONFIGS, PROJECT


def test_benchmark_prints_a_row_for_each_recipe(tmp_path: Path) -> None:
    script = PROJECT / "scripts" / "benchmark.py"

    done = subprocess.run(
        [sys.executable, script, "fit", "--recipes=[base+digits+debug]", "--seeds=1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    header, _, row, *_ = done.stdout.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == header.count("|") - 1
    assert cells[:3] == ["`base+digits+debug`", "29,178", "1"]
    assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d % \(1\)", cells[3])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_benchmark_of_a_search_compares_one_worker_with_two(tmp_path: Path) -> None:
    config = tmp_path / "search.yaml"
    configs = [str(CONFIGS / "base.yaml"), str(CONFIGS / "digits.yaml")]
    space = {"model.lr": {"low": 0.001, "high": 0.1, "log": True}}
    content = {"configs": configs, "overrides": {"trainer.max_epochs": 1}, "space": space}
    config.write_text(yaml.safe_dump(content))
    script = PROJECT / "scripts" / "benchmark.py"

    done = subprocess.run(
        [sys.executable, script, "search", f"--search_config={config}", "--n_trials=3", "--repeats=1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:7]]
    assert [row[0] for row in rows[:2]] == ["seconds a trial, one worker", "seconds a trial, two workers"]
    assert all(float(least) <= float(median) <= float(most) for _, median, least, most in rows)
    assert all(float(row[1]) > 0 for row in rows)
