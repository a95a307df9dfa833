"""The console: logging levels, warning filters, and the summary of a command."""

import json
import logging
import shlex
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnist_lit.formatting import METRICS, format_score

LOG_LEVELS = {
    "lightning.pytorch": logging.WARNING,
    "lightning.fabric": logging.WARNING,
    "lightning.pytorch.loggers.mlflow": logging.ERROR,  # reports that it creates the experiment
    "tensorboard": logging.ERROR,  # reports which events of a resumed run it drops
    "mlflow.store.db.utils": logging.WARNING,  # reports that it creates its tables
}
# Warnings that need no action, each with the reason.
IGNORED_WARNINGS = (
    "does not have many workers",  # the data is in memory
    "smaller than the logging interval",  # metrics are logged by epoch
    "Checkpoint directory .* exists and is not empty",  # a resumed run
    "The dirpath has changed",  # a resumed run that was moved
    "could not find the monitored key in the returned metrics",  # the run ends before its first validation
    "WeightAveraging callback, but loading a checkpoint outside",  # a test uses the average in the checkpoint
    "Total length of `.*` across ranks is zero",  # data.val_size: 0, or images without a digit
    "Experiment logs directory .* exists and is not empty",  # it is the run directory; nothing is deleted
    "PyTorch Profiler default schedule will be overridden",  # a profile has few steps
    "Profiler clears events at the end of each cycle",
    "overfit but enabled train dataloader shuffling",  # Lightning turns it off
    "`isinstance.treespec, LeafSpec.` is deprecated",  # in Lightning's call of torch
    "Using padding='same' with even kernel lengths",  # the copy is small
    "`torch.jit.trace",  # TensorBoard's graph
    r"Glyph .* missing from font",  # names of classes in other scripts
    "__array__ implementation doesn't accept a copy keyword",  # torchmetrics gives matplotlib a tensor
    "callbacks used to create the checkpoint need to be provided",  # only training needs them
)


def configure_logging() -> None:
    """Configure logging levels, warning filters and the threads' excepthook."""
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", f".*{message}")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    threading.excepthook = _ignore_os_errors


def _ignore_os_errors(args: threading.ExceptHookArgs) -> None:
    # TensorBoard's writer raises the error of its thread again in the main thread, at the next event.
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


def fit_lines(
    run_dir: Path, more: tuple[str, str], num_epochs: int, report: Path | None, program: str
) -> dict[str, str]:
    """Collect the results of a run and the commands that go on from it, by the names of their lines.

    Args:
        run_dir: The run directory.
        more: The limit of the trainer that ended the run, and twice its value.
        num_epochs: The epochs that are done.
        report: The run's page, if there is one.
        program: The command as it is typed.
    """
    file = run_dir / "metrics.json"
    metrics = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    lines = {}
    if "val/acc" in metrics and "epoch" in metrics:
        lines["best epoch"] = f"{metrics['epoch'] + 1}" + (f" of {num_epochs}" if more[0] == "max_epochs" else "")
    lines |= {name: format_score(name, metrics[name]) for name in ("val/acc", "test/acc") if name in metrics}
    if "seconds" in metrics:
        lines["seconds"] = f"{metrics['seconds']:.1f}"
    if report is not None:
        lines["report"] = shlex.quote(str(report))
    if any(run_dir.glob("events.out.tfevents.*")):
        lines["look"] = f"tensorboard --logdir {shlex.quote(str(run_dir))}"
    if (run_dir / "checkpoints" / "last.ckpt").is_file():
        lines["go on"] = f"{program} --ckpt_path {shlex.quote(str(run_dir))} --trainer.{more[0]} {more[1]}"
    return lines


def metric_lines(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Format the metrics of an evaluation, by name."""
    return {name: format_score(name, float(metrics[name])) for name in METRICS if name in metrics}


def format_summary(lines: Mapping[str, str]) -> str:
    """Align names and values in two columns."""
    width = max(map(len, lines), default=0)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())
