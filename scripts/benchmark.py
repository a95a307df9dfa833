"""Measure, and print tables.

`fit` prints the README's table, `overhead` what Lightning costs beside a bare loop, `busy` what a second run at once
costs, `start` how long a command takes to begin, `search` what searching costs, `growth` how times grow with images and
trials. What is compared is measured in turns, in processes of their own, as a user starts them.
"""

import contextlib
import io
import itertools
import json
import math
import os
import platform
import pty
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import torch
import yaml
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from torch.nn import functional as F

from mnist_lit import main
from mnist_lit.command_line import find_config
from mnist_lit.data.datasets import DATASETS, ImageDataset, stratified_split

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
    "peak memory beyond imports",
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
    print(f"\n{_machine(runs[-1]['versions'])}")


def _measure(recipe: str, seed: int, flags: list[str]) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "mnist_lit", "fit", *_configs(recipe), *flags]
        start = time.monotonic()
        memory = _peak_memory([*command, f"--seed_everything={seed}", f"--run_dir={run_dir}"])
        run: Run = json.loads((run_dir / "metrics.json").read_text())
        trainer = yaml.safe_load((run_dir / "config.yaml").read_text())["trainer"]
    share = trainer["limit_train_batches"]
    epochs = trainer["max_epochs"] * (share if isinstance(share, float) else 1)
    return {**run, "whole": time.monotonic() - start, "memory": memory, "epochs": epochs}


def _configs(recipe: str) -> list[str]:
    return [f"--config={CONFIGS / name}.yaml" for name in recipe.split("+")]


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
        f"{runs[0]['epochs']:g}",
        f"{statistics.mean(accuracies):.2f} ± {deviation:.2f} % ({len(runs)})",
        f"{statistics.median(run['seconds'] for run in runs):.1f} s",
        f"{statistics.median(run['whole'] for run in runs):.1f} s",
        f"{statistics.median(run['images_per_second'] for run in runs):,.0f}",
        f"{max(run['memory'] for run in runs) - imports:.0f} MB",
    ]


def overhead(recipe: str = "base", repeats: PositiveInt = 5, flags: list[str] = []) -> None:
    """Compare `fit`, its bar and its logs on, with a bare PyTorch loop of the same network, recipe and validation.

    Args:
        recipe: Names of configs, joined with a plus sign, that leave optimizer and schedule as base.yaml has them.
        repeats: Pairs of runs, 1 or more, one after the other.
        flags: Flags for all runs, for example `["--trainer.max_epochs=2"]`.
    """
    args = ["fit", *_configs(recipe), "--test_after_fit=false", *flags]
    print("| images/s | fit | bare loop | ratio |\n| --- | --- | --- | --- |")
    pairs = []
    for number in range(1, repeats + 1):
        pairs.append((ours := _speed_of_fit(args), bare := _speed_of_bare_loop(args)))
        print(f"| {number} | {ours:,.0f} | {bare:,.0f} | {ours / bare:.3f} |", flush=True)
    ratios = [ours / bare for ours, bare in pairs]
    ours, bare = (statistics.median(speeds) for speeds in zip(*pairs, strict=True))
    print(f"| median (least to most) | {ours:,.0f} | {bare:,.0f} | {_spread(ratios, 3)} |\n\n{_machine()}")


def _speed_of_fit(args: list[str]) -> float:
    """Images per second from the first batch to the last validation, in a process with a terminal, which has a bar."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mnist_lit", *args, f"--run_dir={folder}/run"]
        outside, inside = pty.openpty()
        with subprocess.Popen(command, stdout=inside, stderr=inside) as process:
            os.close(inside)
            output = _read_all(outside)
        if process.returncode:
            raise SystemExit(output)
        speed: float = json.loads(Path(folder, "run", "metrics.json").read_text())["images_per_second"]
    return speed


def _read_all(terminal: int) -> str:
    output = b""
    # Linux says with an error that nobody is left at the other end.
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 65536):
            output += part
    os.close(terminal)
    return output.decode()


def _speed_of_bare_loop(args: list[str]) -> float:
    command = [sys.executable, __file__, "bare_loop", json.dumps(args)]
    environment = {"GOMP_SPINCOUNT": "4000", **os.environ}  # which `fit` sets before it imports torch
    return float(subprocess.check_output(command, text=True, env=environment).split()[-1])


def bare_loop(args: list[str]) -> None:
    """Train without Lightning what `fit` would train with these arguments, and print the images per second.

    Args:
        args: The command line after `python -m mnist_lit`.
    """
    cli = main(args, is_dry=True)
    data, network, smoothing = cli.datamodule, cli.model.network, cli.model.label_smoothing
    device = cli.trainer.strategy.root_device
    network.to(device)
    images, labels = DATASETS[data.dataset].load(data.data_dir, "train")
    train, val = (split.to(device) for split in stratified_split(labels, data.val_size))
    images, labels = images.to(device), labels.to(device)
    epochs = cli.trainer.max_epochs or 1
    steps = epochs * math.ceil(len(train) / data.batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=cli.model.lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=cli.model.lr, total_steps=steps)
    precision = torch.autocast(device.type, torch.bfloat16, enabled=cli.trainer.precision == "bf16-mixed")
    generator = torch.Generator(device).manual_seed(1)
    start = time.monotonic()
    for _ in range(epochs):
        network.train()
        for batch in torch.split(train[torch.randperm(len(train), device=device)], data.batch_size):
            inputs = data.augment(images[batch].unsqueeze(1).float() / 255, generator)
            with precision:
                loss = F.cross_entropy(network(inputs), labels[batch], label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.inference_mode(), precision:
            chunks = torch.split(val, data.eval_batch_size)
            right = [network(images[chunk].unsqueeze(1) / 255).argmax(1) == labels[chunk] for chunk in chunks]
    acc = float(torch.cat(right).float().mean())  # before the clock is read: a GPU computes on meanwhile
    speed = epochs * len(train) / (time.monotonic() - start)
    print(f"val/acc {acc:.4f}, images per second: {speed:.1f}")


def _spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _machine(versions: str = f"torch {torch.__version__}") -> str:
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; {versions}"


def busy(
    settings: list[str] = ["", "GOMP_SPINCOUNT=300000", "OMP_WAIT_POLICY=PASSIVE", "OMP_NUM_THREADS=1"],
    recipe: str = "fast",
    repeats: PositiveInt = 3,
    flags: list[str] = [],
) -> None:
    """Compare one run with two runs at once, under settings of OpenMP's waiting and threads.

    Args:
        settings: Environment variables, joined with spaces; empty for what `mnist_lit` sets by itself. Libgomp's own
            default is `GOMP_SPINCOUNT=300000`.
        recipe: Names of configs, joined with a plus sign.
        repeats: Rounds, 1 or more; each measures all settings once.
        flags: Flags for all runs, for example `["--data.data_dir=data"]`.
    """
    command = [sys.executable, "-m", "mnist_lit", "fit", *_configs(recipe), "--test_after_fit=false", *flags]
    rounds = [{name: [_training(command, name, num) for num in (1, 2)] for name in settings} for _ in range(repeats)]
    print("| seconds of training | alone | two at once | ratio |\n| --- | --- | --- | --- |")
    for name in settings:
        alone, both = ([each[name][place] for each in rounds] for place in (0, 1))
        ratios = [two / one for one, two in zip(alone, both, strict=True)]
        print(f"| {name or 'as it is'} | {_spread(alone)} | {_spread(both)} | {_spread(ratios)} |")
    print(f"\n{_machine()}")


def _training(command: list[str], setting: str, num_runs: int) -> float:
    """Start runs at once; the most seconds that one of them has trained."""
    variables = os.environ | dict(variable.split("=") for variable in setting.split())
    with tempfile.TemporaryDirectory() as folder:
        run_dirs = [Path(folder, str(number)) for number in range(num_runs)]
        started = [
            subprocess.Popen([*command, f"--run_dir={run_dir}"], env=variables, stdout=subprocess.DEVNULL)
            for run_dir in run_dirs
        ]
        if any(process.wait() for process in started):
            raise SystemExit(1)
        seconds: list[float] = [json.loads((path / "metrics.json").read_text())["seconds"] for path in run_dirs]
    return max(seconds)


# Both end at once: what a process takes to end is no part of its start.
IMPORTS = "import os, lightning.pytorch.cli, torchvision; os._exit(0)"
BEGIN = """
import os, sys
from mnist_lit import main
from lightning.pytorch import Callback
class Stop(Callback):
    def on_train_start(self, trainer, model):
        os._exit(0)
main(sys.argv[1:], callbacks=[Stop()])
"""


def start(recipe: str = "base", repeats: PositiveInt = 5, flags: list[str] = []) -> None:
    """Measure how long it takes until training begins, beside the imports alone, and the commands that train nothing.

    Args:
        recipe: Names of configs, joined with a plus sign.
        repeats: Measurements of each, 1 or more, one after the other.
        flags: Flags of the run, for example `["--data.data_dir=data"]`.
    """
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder, "broken.yaml")
        broken.write_text("model: [")
        module = ["-m", "mnist_lit"]
        commands = {
            "imports": ["-c", IMPORTS],
            "until training begins": ["-c", BEGIN, "fit", *_configs(recipe), f"--run_dir={folder}/run", *flags],
            "`--version`": [*module, "--version"],
            "`--help`": [*module, "--help"],
            "a config that does not exist": [*module, "fit", "--config=nowhere.yaml"],
            "a config that is no YAML": [*module, "fit", f"--config={broken}"],
        }
        rounds = []
        for _ in range(repeats):
            rounds.append({name: _seconds([sys.executable, *command]) for name, command in commands.items()})
            shutil.rmtree(f"{folder}/run", ignore_errors=True)
    print("| seconds | median (least to most) |\n| --- | --- |")
    for name in commands:
        print(f"| {name} | {_spread([each[name] for each in rounds])} |")
    ratios = [each["until training begins"] / each["imports"] for each in rounds]
    print(f"| ratio of the second to the first | {_spread(ratios)} |\n\n{_machine()}")


def _seconds(command: list[str]) -> float:
    begin = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - begin
    # What is typed wrong on purpose ends with 2; a run that fails must not be taken for one that begins.
    if done.returncode not in (0, 2):
        raise SystemExit(done.stderr)
    return seconds


class Enlarged(Callback):
    """Make a training split several times as large, with images that are generated from its own.

    Args:
        times: How many times as large, 1 or more.
    """

    def __init__(self, times: int) -> None:
        self.times = times

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the split that was loaded."""
        splits = trainer.datamodule.splits  # type: ignore[attr-defined]
        train = splits["train"]
        images, labels = train.images[train.indices], train.labels[train.indices]
        # Mirrored and turned upside down, so that none is there twice.
        variants = [images, images.flip(1), images.flip(2), images.flip(1, 2), images.mT]
        both = [
            variant.roll(shift, 2) for shift in range(math.ceil(self.times / len(variants))) for variant in variants
        ]
        splits["train"] = ImageDataset(torch.cat(both[: self.times]), labels.repeat(self.times))


def growth(
    times: list[PositiveInt] = [1, 2, 5, 10],
    n_trials: PositiveInt = 1000,
    recipe: str = "base",
    flags: list[str] = [],
) -> None:
    """Train one epoch of more and more images, search with more and more trials, and print both curves.

    Args:
        times: Multiples of the training split; what is added is generated.
        n_trials: Trials of the search, each of a few tiny steps; 10 or more.
        recipe: Names of configs, joined with a plus sign.
        flags: Flags for all runs, for example `["--data.data_dir=data"]`.
    """
    print("| images | seconds | seconds per 10,000 images |\n| --- | --- | --- |")
    args = ["fit", *_configs(recipe), "--trainer.max_epochs=1", "--test_after_fit=false", *flags]
    for factor in times:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            main([*args, f"--run_dir={folder}/run"], callbacks=[Enlarged(factor)])
            run: Run = json.loads(Path(folder, "run", "metrics.json").read_text())
        num_images = run["seconds"] * run["images_per_second"]
        print(f"| {num_images:,.0f} | {run['seconds']:.1f} | {1e4 * run['seconds'] / num_images:.2f} |", flush=True)
    print("\n| trials | seconds | seconds per trial since the row above |\n| --- | --- | --- |")
    ends = _ends_of_tiny_trials(n_trials)
    rows = [ends[n_trials * tenth // 10 - 1] for tenth in range(1, 11)]
    for tenth, (before, after) in enumerate(itertools.pairwise([0.0, *rows]), start=1):
        print(f"| {n_trials * tenth // 10} | {after:.1f} | {(after - before) / (n_trials / 10):.3f} |")
    print(f"\n{_machine()}")


def _ends_of_tiny_trials(n_trials: int) -> list[float]:
    """Seconds after the first trial's beginning, in order."""
    tiny = {
        "model.channels": [4],
        "trainer.max_epochs": 1,
        "trainer.limit_train_batches": 2,
        "trainer.limit_val_batches": 1,
        "pictures.enabled": False,
        "checkpoint.enabled": False,
    }
    content = {
        "study_name": "growth",
        "configs": [str(CONFIGS / name) for name in ("base.yaml", "digits.yaml")],
        "overrides": tiny,
        "pruner": None,
        "workers": 2,
        "space": {"model.lr": {"low": 1e-4, "high": 0.1, "log": True}, "model.dropout": {"low": 0.0, "high": 0.5}},
    }
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "search.yaml")
        config.write_text(yaml.safe_dump(content))
        trials = _trials(folder, [f"--config={config}", f"--n_trials={n_trials}"], "growth")
    begin = min(trial.datetime_start for trial in trials if trial.datetime_start)
    return sorted((trial.datetime_complete - begin).total_seconds() for trial in trials if trial.datetime_complete)


def _trials(folder: str, args: list[str], study_name: str, **environment: str) -> list[FrozenTrial]:
    """Search in this folder; the trials."""
    script = str(PROJECT / "scripts" / "optuna_search.py")
    data_dir = Path(os.environ.get("MNIST_LIT_DATA", "data")).resolve()
    variables = {**os.environ, **environment, "MNIST_LIT_DATA": str(data_dir)}
    done = subprocess.run(
        [sys.executable, script, *args], cwd=folder, env=variables, stdout=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    journal = JournalFileBackend(f"{folder}/logs/search/{study_name}/study.journal")
    return optuna.load_study(study_name=study_name, storage=JournalStorage(journal)).trials


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
    print(f"\n{_machine(f'optuna {optuna.__version__}')}")


def _measure_search(config: str, n_trials: int, workers: int, flags: list[str]) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        file = find_config(config).resolve()
        settings = [f"--config={file}", f"--n_trials={n_trials}", f"--workers={workers}", "--study_name=benchmark"]
        # The same points for all, none of them cut short.
        points = ["--sampler=optuna.samplers.RandomSampler", "--sampler.seed=1", "--pruner=null"]
        start = datetime.now()
        trials = _trials(folder, [*settings, *points, *flags], "benchmark", OMP_NUM_THREADS=str(workers))
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
    auto_cli([fit, overhead, bare_loop, busy, start, growth, search])
