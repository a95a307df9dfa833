"""The benchmark prints the README's table from real runs."""

import re
import subprocess
import sys
from pathlib import Path

from conftest import PROJECT


def test_benchmark_prints_a_row_for_each_recipe(tmp_path: Path) -> None:
    script = PROJECT / "scripts" / "benchmark.py"

    done = subprocess.run(
        [sys.executable, script, "fit", "--recipes=[base+digits+debug]", "--seeds=2"],
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
    assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d % \(2\)", cells[3])
    assert not list(tmp_path.iterdir())
