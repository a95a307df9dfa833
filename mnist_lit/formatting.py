"""Values, scores and times as people read them."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

__all__ = [
    "METRICS",
    "escape_unprintable",
    "format_duration",
    "format_percent",
    "format_score",
    "format_value",
    "short_names",
    "shorten",
]

# In the order in which people are told of them.
METRICS = ("val/acc", "val/loss", "val/f1", "test/acc", "test/loss", "test/f1")


def format_value(value: object) -> str:
    """A value as a config has it, in few characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e+")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, dict):
        return _text_of_class(value) if "class_path" in value else _text_of_items(value, ": ", "{}")
    return str(value)


def _text_of_class(value: dict[str, Any]) -> str:
    arguments = value.get("init_args") or {}
    return str(value["class_path"]).rpartition(".")[2] + (_text_of_items(arguments, "=", "()") if arguments else "")


def _text_of_items(items: dict[str, Any], sign: str, brackets: str) -> str:
    return brackets[0] + ", ".join(f"{key}{sign}{format_value(value)}" for key, value in items.items()) + brackets[1]


def shorten(text: str, limit: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def escape_unprintable(text: str) -> str:
    """A text on one line, with escapes for what a terminal cannot show or would obey."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def format_duration(seconds: float) -> str:
    """A time for people."""
    for size, unit, small_size, small_unit in ((3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            small = int(seconds % size // small_size)
            return f"{int(seconds // size):,} {unit}" + (f" {small} {small_unit}" if small else "")
    return f"{seconds:.3g} s"


def format_percent(share: float) -> str:
    """A share of one, in per cent."""
    return f"{100 * share:.2f} %"


def format_score(name: str, score: float) -> str:
    """A metric's value: accuracies and F1 scores in per cent."""
    return format_percent(score) if name.endswith(("acc", "f1", "acc_best")) else format_value(float(score))


def short_names(keys: Iterable[str], separator: str = ".") -> dict[str, str]:
    """For each key (or path) the shortest end that no other has."""
    ends = {key: _ends(key, separator) for key in keys}
    counts = Counter(end for of_key in ends.values() for end in of_key)
    return {key: next((end for end in of_key if counts[end] == 1), key) for key, of_key in ends.items()}


def _ends(key: str, separator: str) -> list[str]:
    parts = key.split(separator)
    return [separator.join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
