"""Measure shipped configs and print the README's table: `python scripts/benchmark.py --seeds 3`.

Every run is a process of its own, as a user starts it: imports, data, training, test and checkpoints included.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt

CONFIGS = Path(__file__).parents[1] / "configs"
HEADER = [
    "config",
    "parameters",
    "epochs",
    "test accuracy, mean ± sd (n)",
    "training",
    "whole process",
    "images/s",
    "memory above imports",
]
Run = dict[str, Any]


def benchmark(
    recipes: list[str] = ["base", "base+mlp", "base+digits"],
    seeds: PositiveInt = 3,
    flags: list[str] = [],
) -> None:
    """Train each recipe with several seeds and print a Markdown table.

    Args:
        recipes: Names of configs, overlays joined with a plus sign.
        seeds: Runs of each recipe, 1 or more, with the seeds 1, 2, …
        flags: Flags for all runs, for example `["--data.data_dir=data"]`.
    """
    imports = _peak_memory([sys.executable, "-c", "import torch, lightning.pytorch"])
    print("| " + " | ".join(HEADER) + " |")
    print("|" + " --- |" * len(HEADER))
    for recipe in recipes:
        runs = [_measure(recipe, seed, flags) for seed in range(1, seeds + 1)]
        print("| " + " | ".join(_row(recipe, runs, imports)) + " |", flush=True)
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {runs[-1]['versions']}")


def _measure(recipe: str, seed: int, flags: list[str]) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        configs = [f"--config={CONFIGS / name}.yaml" for name in recipe.split("+")]
        command = [sys.executable, "-m", "mnist_lit", "fit", *configs, *flags]
        start = time.monotonic()
        memory = _peak_memory([*command, f"--seed_everything={seed}", f"--run_dir={run_dir}"])
        run: Run = json.loads((run_dir / "metrics.json").read_text())
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
    return {**run, "whole": time.monotonic() - start, "memory": memory, "epochs": config["trainer"]["max_epochs"]}


def _peak_memory(command: list[str]) -> float:
    """Run a command; the most memory that it had at a time, in MB."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


def _row(recipe: str, runs: list[Run], imports: float) -> list[str]:
    accuracies = [100 * run["test/acc"] for run in runs]
    deviation = statistics.stdev(accuracies) if len(runs) > 1 else 0.0
    return [
        f"`{recipe}`",
        f"{runs[0]['parameters']:,}",
        f"{runs[0]['epochs']}",
        f"{statistics.mean(accuracies):.2f} ± {deviation:.2f} % ({len(runs)})",
        f"{statistics.median(run['seconds'] for run in runs):.1f} s",
        f"{statistics.median(run['whole'] for run in runs):.1f} s",
        f"{statistics.median(run['images_per_second'] for run in runs):,.0f}",
        f"{max(run['memory'] for run in runs) - imports:.0f} MB",
    ]


if __name__ == "__main__":
    auto_cli(benchmark)
