"""The command `compare`: the metrics of runs, and the keys in which their configurations differ, as a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mnist_lit.errors import UsageError
from mnist_lit.formatting import METRICS, escape_unprintable, flatten, format_score, format_value, short_names, shorten
from mnist_lit.reports.run_data import read_run

__all__ = ["compare"]

USAGE = "usage: python -m mnist_lit compare RUN RUN...    run directories, or those of a search's trials"
RESULTS = (*METRICS, "epoch", "seconds", "images_per_second", "parameters", "device")
MAX_WIDTH = 40
ABSENT = "\N{EN DASH}"


def compare(args: Sequence[str]) -> None:
    """Print a table of runs: what they reached, and what differs in their configurations.

    Args:
        args: The command line after `python -m mnist_lit compare`.

    Raises:
        UsageError: If there are fewer than two runs, or a directory holds none.
    """
    if {"-h", "--help"} & set(args):
        print(USAGE)
        return
    if options := [arg for arg in args if arg.startswith("-")]:
        raise UsageError(f"compare has no option {options[0]}\n{USAGE}")
    paths = {Path(arg).resolve().as_posix(): Path(arg) for arg in args}
    if len(paths) < 2:
        raise UsageError(f"compare needs two different runs or more\n{USAGE}")
    configs, results = [], []
    for path in paths.values():
        config, metrics = read_run(path)
        configs.append({str(key): format_value(value) for key, value in flatten(config).items()})
        texts = {name: format_score(name, metrics[name]) for name in METRICS if name in metrics}
        results.append(
            texts | {name: format_value(metrics[name]) for name in RESULTS if name in metrics.keys() - texts}
        )
    differing = [key for key in _keys(configs) if len({config.get(key) for config in configs}) > 1]
    rows = [["", *short_names(paths, "/").values()]]
    rows += [[name, *(result.get(name, ABSENT) for result in results)] for name in _keys(results)]
    rows += [[key, *(config.get(key, ABSENT) for config in configs)] for key in differing]
    print(_table(rows))


def _keys(mappings: Sequence[Mapping[str, str]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _table(rows: Sequence[Sequence[str]]) -> str:
    cells = [[name, *(escape_unprintable(shorten(cell, MAX_WIDTH)) for cell in row)] for name, *row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    return "\n".join(lines)
