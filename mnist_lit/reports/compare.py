"""Run directories: what they hold, and the command `compare`, a table of metrics and of keys that differ."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnist_lit.command_line import read_config
from mnist_lit.errors import UsageError
from mnist_lit.formatting import METRICS, flag_names, format_score, format_table, format_value, short_names

USAGE = "usage: python -m mnist_lit compare RUN RUN...    run directories, or those of a search's trials"
RESULTS = (*METRICS, "epoch", "seconds", "images_per_second", "parameters", "device")
ABSENT = "\N{EN DASH}"


def read_run(run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read config.yaml, and metrics.json if there is one."""
    config, metrics = run_dir / "config.yaml", run_dir / "metrics.json"
    if not config.is_file():
        raise UsageError(f"{run_dir} is not a run directory: it holds no config.yaml\ngive one that fit has made")
    try:
        return read_config(config), dict(json.loads(metrics.read_text(encoding="utf-8"))) if metrics.is_file() else {}
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(f"{metrics} cannot be read: {error}") from error


def compare(args: Sequence[str]) -> None:
    """Print a table of runs: what they reached, and what differs in their configurations."""
    if {"-h", "--help"} & set(args):
        print(USAGE)
        return
    paths = {Path(arg).resolve().as_posix(): Path(arg) for arg in args}
    if len(paths) < 2:
        raise UsageError(f"compare needs two different runs or more\n{USAGE}")
    runs = [read_run(path) for path in paths.values()]
    configs = [{key: _format_exactly(value) for key, value in flag_names(config).items()} for config, _ in runs]
    results = [{name: _format(name, metrics[name]) for name in RESULTS if name in metrics} for _, metrics in runs]
    names = [name for name in RESULTS if any(name in result for result in results)]
    keys = dict.fromkeys(key for config in configs for key in config)
    differing = [key for key in keys if len({config.get(key) for config in configs}) > 1]
    rows = [["", *short_names(paths, "/").values()]]
    rows += [[name, *(result.get(name, ABSENT) for result in results)] for name in names]
    rows += [[key, *(config.get(key, ABSENT) for config in configs)] for key in differing]
    print(format_table(rows))


def _format_exactly(value: object) -> str:
    return f"{value:.12g}" if isinstance(value, float) else format_value(value)


def _format(name: str, value: object) -> str:
    return format_score(name, value) if isinstance(value, int | float | None) else format_value(value)
