"""Measure, and print tables: `python scripts/benchmark.py fit` the README's, `search` what searching costs.

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
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import yaml
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

PROJECT = Path(__file__).parents[1]
CONFIGS = PROJECT / "configs"
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


def fit(
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


def search(
    search_config: str = "configs/search_mlp.yaml",
    n_trials: PositiveInt = 12,
    repeats: PositiveInt = 3,
    flags: list[str] = [],
) -> None:
    """Search the same points with one and with two workers of one thread each, and print a Markdown table.

    Args:
        search_config: A config of `optuna_search.py`.
        n_trials: Trials in each study, 2 or more.
        repeats: Pairs of studies, 1 or more.
        flags: Flags for all searches, for example `["--overrides={trainer.max_epochs: 1}"]`.
    """
    pairs = [
        tuple(_measure_search(search_config, n_trials, workers, flags) for workers in (1, 2)) for _ in range(repeats)
    ]
    ones, twos = ([pair[place] for pair in pairs] for place in (0, 1))
    rows = {
        "seconds a trial, one worker": [one["seconds"] / n_trials for one in ones],
        "seconds a trial, two workers": [two["seconds"] / n_trials for two in twos],
        "seconds a trial beside its training, one worker": [extra for one in ones for extra in one["extras"]],
        "two workers are faster by": [one["seconds"] / two["seconds"] for one, two in pairs],
        "seconds until the first trial": [run["start"] for pair in pairs for run in pair],
    }
    print(f"| `{search_config}`, {n_trials} trials | median | least | most |\n| --- | --- | --- | --- |")
    for name, values in rows.items():
        print(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")
    print(f"\n{platform.processor() or platform.machine()}, {os.cpu_count()} cores; optuna {optuna.__version__}")


def _measure_search(config: str, n_trials: int, workers: int, flags: list[str]) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "configs").symlink_to(CONFIGS)
        settings = [f"--config={config}", f"--n_trials={n_trials}", f"--workers={workers}", "--study_name=benchmark"]
        # The same points for all, none of them cut short.
        points = ["--sampler=optuna.samplers.RandomSampler", "--sampler.seed=1", "--pruner=null"]
        data_dir = Path(os.environ.get("MNIST_LIT_DATA", "data")).resolve()
        environment = {**os.environ, "OMP_NUM_THREADS": str(workers), "MNIST_LIT_DATA": str(data_dir)}
        script = str(PROJECT / "scripts" / "optuna_search.py")
        start = datetime.now()
        command = [sys.executable, script, *settings, *points, *flags]
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
        journal = JournalFileBackend(f"{folder}/logs/search/benchmark/study.journal")
        trials = optuna.load_study(study_name="benchmark", storage=JournalStorage(journal)).trials
    begins = [trial.datetime_start for trial in trials if trial.datetime_start]
    ends = [trial.datetime_complete for trial in trials if trial.datetime_complete]
    # From one beginning to the next, with one worker.
    steps = zip(begins, [*begins[1:], max(ends)], trials, strict=True)
    extras = [(after - before).total_seconds() - trial.user_attrs["seconds"] for before, after, trial in steps]
    return {
        "seconds": (max(ends) - begins[0]).total_seconds(),
        "extras": extras[1:],
        "start": (begins[0] - start).total_seconds(),
    }


if __name__ == "__main__":
    auto_cli([fit, search])
