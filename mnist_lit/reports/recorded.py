"""A run as its directory tells it: its config, its metrics, its curves."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator, ScalarEvent

from mnist_lit.errors import UsageError
from mnist_lit.formatting import METRICS

__all__ = ["Curve", "Recorded", "flat", "read_run"]

NUMBERS = (*METRICS, "epoch", "seconds", "images_per_second", "parameters")


@dataclass(frozen=True)
class Curve:
    """A metric as training went on.

    Args:
        epochs: When it was measured: epochs of training by then, 1.0 at the end of the first.
        values: What it was.
    """

    epochs: list[float]
    values: list[float]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What is known of a run, whether it has ended or not.

    Args:
        run_dir: Its directory.
        config: Its complete configuration.
        metrics: The content of metrics.json; empty where a run has not come so far.
        curves: What was logged, by name; empty until the first epoch has ended.
    """

    run_dir: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    curves: dict[str, Curve]

    @property
    def num_epochs(self) -> int | None:
        """Epochs that were trained to their end."""
        return round(self.curves["train/loss"].epochs[-1]) if "train/loss" in self.curves else None

    @property
    def best_epoch(self) -> int | None:
        """The epoch that the validation metrics are of, counted from 1; metrics.json counts from 0."""
        is_validated = any(name.startswith("val/") for name in self.metrics)
        return self.metrics["epoch"] + 1 if is_validated and "epoch" in self.metrics else None


def read_run(run_dir: Path) -> Recorded:
    """Read a run's directory.

    Raises:
        UsageError: If it is none, or a file in it is damaged.
    """
    if not run_dir.exists():
        raise UsageError(f"{run_dir} does not exist\ngive a run directory, for example logs/run_1")
    if not (run_dir / "config.yaml").is_file():
        raise UsageError(f"{run_dir} is no run directory: it holds no config.yaml\ngive one that fit has made")
    metrics = run_dir / "metrics.json"
    return Recorded(
        run_dir=run_dir,
        config=_mapping(run_dir / "config.yaml", yaml.safe_load),
        metrics=_metrics(metrics) if metrics.is_file() else {},
        curves=_curves(run_dir),
    )


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined with dots, as flags name them; arguments of a class have keys of their own."""
    settings: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and "class_path" in value:
            settings[f"{prefix}{name}"] = {"class_path": value["class_path"]}
            settings |= flat(value.get("init_args") or {}, f"{prefix}{name}.")
        elif isinstance(value, Mapping):
            settings |= flat(value, f"{prefix}{name}.")
        else:
            settings[f"{prefix}{name}"] = value
    return settings


def _metrics(file: Path) -> dict[str, Any]:
    metrics = _mapping(file, json.loads)
    for name in NUMBERS:
        if not isinstance(metrics.get(name, 0), (int, float)):
            raise UsageError(f"{file} is damaged: {name} is no number, but {metrics[name]!r}")
    return metrics


def _mapping(file: Path, load: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} holds no keys")
    return content


def _curves(run_dir: Path) -> dict[str, Curve]:
    events = EventAccumulator(str(run_dir), size_guidance={SCALARS: 0})
    events.Reload()
    lines = {tag: _line(events.Scalars(tag)) for tag in events.Tags()[SCALARS]}
    ends = [(point.step + 1, float(number)) for number, point in enumerate(lines.get("train/loss", []), start=1)]
    if not ends:
        return {}
    return {tag: _curve(line, [(0, 0.0), *ends]) for tag, line in lines.items()}


def _line(points: list[ScalarEvent]) -> list[ScalarEvent]:
    """The points that training has logged: later validations of a finished run stand at step 0."""
    line: list[ScalarEvent] = []
    for point in points:
        if not line or point.step > line[-1].step:
            line.append(point)
    return line


def _curve(line: list[ScalarEvent], ends: list[tuple[int, float]]) -> Curve:
    steps, epochs = zip(*ends, strict=True)
    # The last epoch may have no end; then it is taken to be as long as the one before.
    steps, epochs = (*steps, 2 * steps[-1] - steps[-2]), (*epochs, 2 * epochs[-1] - epochs[-2])
    places = np.interp([point.step + 1 for point in line], steps, epochs)
    return Curve([float(place) for place in places], [point.value for point in line])
