"""What a run directory holds: its configuration and its metrics."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mnist_lit.errors import UsageError
from mnist_lit.formatting import METRICS

__all__ = ["read_run"]

NUMBERS = (*METRICS, "epoch", "seconds", "images_per_second", "parameters")


def read_run(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read config.yaml, and metrics.json if there is one.

    Returns:
        The configuration, nested, and the metrics.

    Raises:
        UsageError: If the directory holds no run, or a file in it is damaged.
    """
    file = run_dir / "metrics.json"
    if not (run_dir / "config.yaml").is_file():
        raise UsageError(f"{run_dir} is no run directory: it holds no config.yaml\ngive one that fit has made")
    metrics = _read(file, json.loads) if file.is_file() else {}
    for name in NUMBERS:
        if not isinstance(metrics.get(name, 0), int | float):
            raise UsageError(f"{file} is damaged: {name} is {metrics[name]!r}")
    return _read(run_dir / "config.yaml", yaml.safe_load), metrics


def _read(file: Path, load: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} holds no keys")
    return content
