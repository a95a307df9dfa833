"""Values, scores, durations and names as text."""

import copy
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

METRICS = ("val/acc", "val/loss", "val/f1", "test/acc", "test/loss", "test/f1")  # in the order of tables
MAX_WIDTH = 40  # of a column
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")  # of a class in a configuration


def format_value(value: object) -> str:
    """Format a value of a config in few characters."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e+")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, dict) and "class_path" in value:
        arguments = ", ".join(f"{key}={format_value(item)}" for key, item in (value.get("init_args") or {}).items())
        return str(value["class_path"]).rpartition(".")[2] + (f"({arguments})" if arguments else "")
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {format_value(item)}' for key, item in value.items())}}}"
    return str(value)


def flatten(config: Mapping[Any, Any], leaves: Collection[str] = (), prefix: str = "") -> dict[str, Any]:
    """Join nested keys with dots; a mapping that has one of the names of `leaves` stays as it is."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        key, is_branch = f"{prefix}{name}", isinstance(value, Mapping) and value and not set(leaves) & value.keys()
        flat |= flatten(value, leaves, f"{key}.") if is_branch else {key: value}
    return flat


def flag_names(config: Mapping[Any, Any]) -> dict[str, Any]:
    """Name the keys of a configuration as flags do: those of a class without `class_path` and `init_args`."""
    flat = {key: value for key, value in flatten(config).items() if value != {}}
    return {key.removesuffix(".class_path").replace(".init_args.", "."): value for key, value in flat.items()}


def nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """Turn keys with dots into mappings of mappings; a class beside its arguments gets `class_path` and `init_args`."""
    tree: dict[str, Any] = {}
    for key in sorted(config, key=lambda key: (key.count("."), not key.endswith(".class_path"))):
        parts, branch = key.split("."), tree
        for part, child in itertools.pairwise(parts):
            if not isinstance(branch.setdefault(part, {}), dict):
                branch[part] = {"class_path": branch[part]}
            branch = branch[part]
            if "class_path" in branch and child not in CLASS_KEYS:
                branch = branch.setdefault("init_args", {})
        branch[parts[-1]] = copy.deepcopy(config[key])
    return tree


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Align the cells of each column; the first row holds headings, the first column names."""
    cells = [[name, *(escape_unprintable(shorten(cell, MAX_WIDTH)) for cell in row)] for name, *row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def shorten(text: str, limit: int) -> str:
    """Cut a text to at most `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def escape_unprintable(text: str) -> str:
    """Escape line ends and characters that control a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def format_duration(seconds: float) -> str:
    """Format seconds, from a minute on as hours:minutes:seconds."""
    return f"{seconds:.3g} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def format_score(name: str, score: float | None) -> str:
    """Format a metric: accuracies and F1 scores in per cent; null is a number that is not finite."""
    if score is None:
        return "nan"
    return f"{100 * score:.2f} %" if name.endswith(("acc", "f1", "acc_best")) else format_value(float(score))


def short_names(keys: Iterable[str], separator: str = ".") -> dict[str, str]:
    """Map each key or path to its shortest ending that no other has."""
    parts = {key: key.split(separator) for key in keys}
    endings = {key: [separator.join(parts[key][-n:]) for n in range(1, len(parts[key]) + 1)] for key in parts}
    counts = Counter(ending for of_key in endings.values() for ending in of_key)
    return {key: next((ending for ending in endings[key] if counts[ending] == 1), key) for key in endings}
