"""Read what a run directory holds: its configuration and its metrics."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mnist_lit.errors import UsageError

__all__ = ["read_run"]


def read_run(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read config.yaml, and metrics.json if there is one."""
    config, metrics = run_dir / "config.yaml", run_dir / "metrics.json"
    if not config.is_file():
        raise UsageError(f"{run_dir} is no run directory: it holds no config.yaml\ngive one that fit has made")
    return _read(config, yaml.safe_load), _read(metrics, json.loads) if metrics.is_file() else {}


def _read(file: Path, load: Callable[[str], Any]) -> dict[str, Any]:
    try:
        return dict(load(file.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
