"""The last lines of a command on the console: the results, and the next commands."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_lit.formatting import METRICS, format_score

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["fit_lines", "format_summary", "metric_lines"]


def fit_lines(run_dir: Path, trainer: "Trainer", report: Path | None) -> dict[str, str]:
    """Collect the results of a run and what can be done next, by the names of the lines.

    Args:
        run_dir: Directory of the run.
        trainer: Its trainer.
        report: Its report.html, if there is one.
    """
    file = run_dir / "metrics.json"
    metrics = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    lines = {}
    if "val/acc" in metrics and "epoch" in metrics:
        lines["best epoch"] = f"{metrics['epoch'] + 1} of {trainer.current_epoch}"
    lines |= {name: format_score(name, metrics[name]) for name in ("val/acc", "test/acc") if name in metrics}
    if "seconds" in metrics:
        lines["seconds"] = f"{metrics['seconds']:.1f}"
    if report is not None:
        lines["report"] = shlex.quote(str(report))
    if any(run_dir.glob("events.out.tfevents.*")):
        lines["look"] = shlex.join(["tensorboard", "--logdir", str(run_dir)])
    if (run_dir / "checkpoints" / "last.ckpt").is_file():
        command = ["python", "-m", "mnist_lit", "fit", "--ckpt_path", str(run_dir)]
        lines["go on"] = shlex.join([*command, *_higher_limit(trainer)])
    return lines


def metric_lines(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Format the metrics of an evaluation, by name."""
    return {name: format_score(name, float(metrics[name])) for name in METRICS if name in metrics}


def format_summary(lines: Mapping[str, str]) -> str:
    """Align names and values in two columns."""
    width = max(map(len, lines), default=0)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines.items())


def _higher_limit(trainer: "Trainer") -> list[str]:
    """Double the limit that has ended the run."""
    if 0 < trainer.max_steps <= trainer.global_step:
        return ["--trainer.max_steps", str(2 * trainer.max_steps)]
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        return ["--trainer.max_epochs", str(2 * trainer.max_epochs)]
    return []
