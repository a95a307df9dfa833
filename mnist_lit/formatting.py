"""Values, scores, durations and names as text."""

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

__all__ = [
    "METRICS",
    "escape_unprintable",
    "flatten",
    "format_duration",
    "format_percent",
    "format_score",
    "format_value",
    "short_names",
    "shorten",
]

METRICS = ("val/acc", "val/loss", "val/f1", "test/acc", "test/loss", "test/f1")  # in the order of tables


def format_value(value: object) -> str:
    """Format a value of a config in few characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
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


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Join nested keys with dots, as flags do; the arguments of a class get keys of their own."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if not isinstance(value, Mapping):
            flat[prefix + name] = value
        elif "class_path" in value:
            flat[prefix + name] = value["class_path"]
            flat |= flatten(value.get("init_args") or {}, f"{prefix}{name}.")
        else:
            flat |= flatten(value, f"{prefix}{name}.")
    return flat


def shorten(text: str, limit: int) -> str:
    """Cut a text to at most `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def escape_unprintable(text: str) -> str:
    """Escape line ends and characters that control a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def format_duration(seconds: float) -> str:
    """Format seconds, from a minute on as hours:minutes:seconds."""
    return f"{seconds:.3g} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def format_percent(share: float) -> str:
    """Format a share, 0 to 1, in per cent."""
    return f"{100 * share:.2f} %"


def format_score(name: str, score: float) -> str:
    """Format a metric: accuracies and F1 scores in per cent."""
    return format_percent(score) if name.endswith(("acc", "f1", "acc_best")) else format_value(float(score))


def short_names(keys: Iterable[str], separator: str = ".") -> dict[str, str]:
    """Map each key or path to its shortest ending that no other has."""
    endings = {}
    for key in keys:
        parts = key.split(separator)
        endings[key] = [separator.join(parts[start:]) for start in reversed(range(len(parts)))]
    counts = Counter(ending for of_key in endings.values() for ending in of_key)
    return {key: next((ending for ending in of_key if counts[ending] == 1), key) for key, of_key in endings.items()}
