"""Scores, values and times as axes and texts show them."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axis import Axis
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator

from mnist_lit.results import Confirmation, Entry, Summary

__all__ = [
    "ABSENT",
    "MAX_KEYS",
    "Metric",
    "Scale",
    "busy_seconds",
    "complete_ones",
    "drawable",
    "duration_text",
    "linear_ticks",
    "mean_and_spread",
    "metric_of",
    "metrics_of",
    "scales_of",
    "score_of",
    "scores_of",
    "short_names",
    "short_text",
    "spans_of",
    "text_of",
    "times_of",
    "wrapped",
]

MAX_KEYS = 12
MAX_PLACES = 8
# Where a trial lies on the axis, from 0 to 1, of a key that it does not have.
ABSENT = -0.15
GOLDEN = 0.618034


@dataclass(frozen=True, kw_only=True)
class Metric:
    """An objective: how its scores are told, and the part of its axis that is worth showing.

    Args:
        name: Name of the metric.
        maximize: Whether more is better.
        percent: Whether scores are shares, told in per cent.
        low: Where its axis begins.
        high: Where it ends.
    """

    name: str
    maximize: bool
    percent: bool
    low: float
    high: float

    @property
    def label(self) -> str:
        """Its name and unit."""
        return f"{self.name} (%)" if self.percent else self.name

    def text(self, score: float) -> str:
        """A score for people."""
        return f"{score:.2%}".replace("%", " %") if self.percent else text_of(score)

    def spread_text(self, mean: float, spread: float) -> str:
        """A mean and its standard deviation for people."""
        if not self.percent:
            return f"{text_of(mean)} ± {spread:.2g}"
        return f"{100 * mean:.2f} ± {100 * spread:.2f} %"

    def best(self, scores: Iterable[float]) -> float:
        """The best of some scores."""
        return max(scores) if self.maximize else min(scores)

    def cut(self, scores: Sequence[float]) -> "np.ndarray[Any, Any]":
        """Scores, those beyond the axis moved to its ends."""
        return np.asarray(np.clip(np.asarray(scores, dtype=float), self.low, self.high))

    def places(self, scores: Sequence[float]) -> "np.ndarray[Any, Any]":
        """Scores from 0, where the axis begins, to 1."""
        return (self.cut(scores) - self.low) / (self.high - self.low)

    def tick(self, score: float, _: float = 0) -> str:
        """A score on an axis."""
        return f"{100 * score:.6g}" if self.percent else text_of(float(f"{score:.6g}"))

    def write_on(self, axis: Axis) -> None:
        """Give an axis the metric's name and numbers."""
        axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter(self.tick)
        axis.set_label_text(drawable(self.label))


def metrics_of(summary: Summary, *, pruned: bool = False) -> list[Metric]:
    """The objectives of a search; their axes are for the scores of complete trials, or those of pruned ones, too."""
    entries = summary.entries if pruned else complete_ones(summary)
    return [
        metric_of(name, scores_of(entries, objective), maximize=direction == "maximize")
        for objective, (name, direction) in enumerate(zip(summary.metrics, summary.directions, strict=True))
    ]


def metric_of(name: str, scores: list[float], *, maximize: bool) -> Metric:
    """A metric whose axis is for these scores."""
    scores = [score for score in scores if math.isfinite(score)] or [0.0]
    percent = name.endswith(("acc", "accuracy", "f1")) and all(0 <= score <= 1 for score in scores)
    low, high = _window(scores, maximize=maximize)
    return Metric(name=name, maximize=maximize, percent=percent, low=low, high=high)


def _window(scores: list[float], *, maximize: bool) -> tuple[float, float]:
    best, worst = (max(scores), min(scores)) if maximize else (min(scores), max(scores))
    # A few trials that went astray must not squash all the others.
    edge = best - 3 * (best - float(np.median(scores)))
    if edge == best or abs(best - worst) < abs(best - edge):
        edge = worst
    span = abs(best - edge)
    margin = 0.06 * span if span > 1e-9 * abs(best) else 0.01 * abs(best) or 1.0
    return min(best, edge) - margin, max(best, edge) + margin


def complete_ones(summary: Summary) -> list[Entry]:
    """The trials that have scores of their own."""
    return [entry for entry in summary.entries if entry.values]


def scores_of(entries: Iterable[Entry], objective: int = 0) -> list[float]:
    """The scores of the trials that have one."""
    return [score for entry in entries if (score := score_of(entry, objective)) is not None]


def score_of(entry: Entry, objective: int = 0) -> float | None:
    """A trial's score; that of a pruned trial is its last one."""
    if entry.values:
        return entry.values[objective]
    return entry.steps[max(entry.steps)] if entry.state == "pruned" and entry.steps else None


def text_of(value: object) -> str:
    """A value as a config has it, in few characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e+")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(text_of, value))}]"
    if isinstance(value, dict):
        return _text_of_class(value) if "class_path" in value else _text_of_items(value, ": ", "{}")
    return str(value)


def _text_of_class(value: dict[str, Any]) -> str:
    arguments = value.get("init_args") or {}
    return str(value["class_path"]).rpartition(".")[2] + (_text_of_items(arguments, "=", "()") if arguments else "")


def _text_of_items(items: dict[str, Any], sign: str, brackets: str) -> str:
    return brackets[0] + ", ".join(f"{key}{sign}{text_of(value)}" for key, value in items.items()) + brackets[1]


def short_text(text: str, limit: int) -> str:
    """A text of at most so many characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def drawable(text: str, limit: int = 60) -> str:
    """A text without what the font cannot draw."""
    return "".join(char if ord(char) in _glyphs() else "?" for char in short_text(" ".join(text.split()), limit))


def wrapped(text: str, width: int, num_lines: int) -> str:
    """A text in lines of that many characters, cut where it is longer."""
    return fill(text.replace("(", " ("), width, max_lines=num_lines, placeholder="…")


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """For each key the shortest end that no other key has."""
    ends = {key: _ends(key) for key in keys}
    counts = Counter(end for of_key in ends.values() for end in of_key)
    return {key: next((end for end in of_key if counts[end] == 1), key) for key, of_key in ends.items()}


def _ends(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


@dataclass(frozen=True)
class Scale:
    """An axis for the values of a key.

    Args:
        label: Its name.
        places: Where each trial lies, from 0 to 1.
        ticks: What is written at some of the places.
    """

    label: str
    places: dict[int, float]
    ticks: dict[float, str]

    def of(self, entries: Iterable[Entry]) -> list[float]:
        """Where trials lie."""
        return [self.places[entry.number] for entry in entries]


def scales_of(summary: Summary, entries: list[Entry]) -> list[Scale]:
    """An axis for each key that the trials have, the most important first."""
    shares = summary.importances[0] if summary.importances else {}
    keys = dict.fromkeys(key for entry in entries for key in entry.params)
    names = short_names(keys)
    scales = []
    for key in sorted(keys, key=lambda key: -shares.get(key, 0.0)):
        values = {entry.number: entry.params[key] for entry in entries if key in entry.params}
        for suffix, part in _parts(values).items():
            places, ticks = _places(part, logarithmic=key in summary.logarithmic)
            if len(part) < len(entries):
                places |= {e.number: ABSENT + _jitter(e.number, 0.06) for e in entries if e.number not in part}
                ticks[ABSENT] = "\N{EN DASH}"
            scales.append(Scale(drawable(names[key], 24) + suffix, places, ticks))
    return scales[:MAX_KEYS]


def _parts(values: dict[int, Any]) -> dict[str, dict[int, Any]]:
    """Lists of numbers of too many kinds, told by their length and sum."""
    if len(set(map(text_of, values.values()))) <= MAX_PLACES or not all(map(_is_numbers, values.values())):
        return {"": values}
    return {
        " (length)": {number: len(value) for number, value in values.items()},
        " (sum)": {number: sum(value) for number, value in values.items()},
    }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_numbers(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_number, value))


def _places(values: dict[int, Any], *, logarithmic: bool) -> tuple[dict[int, float], dict[float, str]]:
    num_kinds = len(set(map(text_of, values.values())))
    is_choice = num_kinds == 1 or (num_kinds <= 6 and 2 * num_kinds <= len(values))
    if is_choice or not all(map(_is_number, values.values())):
        return _places_of_choices(values)
    low, high = min(values.values()), max(values.values())
    logarithmic = logarithmic and low > 0
    warp: Callable[[float], float] = math.log10 if logarithmic else float
    ticks = _log_ticks(low, high) if logarithmic else linear_ticks(low, high)

    def place(value: float) -> float:
        return (warp(value) - warp(low)) / ((warp(high) - warp(low)) or 1.0)

    return (
        {number: place(value) for number, value in values.items()},
        {place(tick): text_of(tick) for tick in ticks},
    )


def linear_ticks(low: float, high: float) -> list[float]:
    """A few round numbers between two."""
    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=isinstance(low + high, int)).tick_values(low, high)
    return [float(tick) for tick in ticks if low <= tick <= high]


def _log_ticks(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        ticks = [float(f"{digit}e{exponent}") for exponent in exponents for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // 6)]
    return [float(f"{end:.2g}") for end in (low, high)]


def _places_of_choices(values: dict[int, Any]) -> tuple[dict[int, float], dict[float, str]]:
    texts = {number: text_of(value) for number, value in values.items()}
    by_text = {text_of(value): value for value in values.values()}
    kinds = sorted(by_text, key=lambda text: _rank(by_text[text]))
    if len(kinds) > MAX_PLACES:
        common = {text for text, _ in Counter(texts.values()).most_common(MAX_PLACES - 1)}
        kinds = [*(text for text in kinds if text in common), "rest"]
    middle = {text: (place + 0.5) / len(kinds) for place, text in enumerate(kinds)}
    # Trials with the same value lie side by side.
    room = min(0.4 / len(kinds), 0.12)
    places = {number: middle.get(text, middle[kinds[-1]]) + _jitter(number, room) for number, text in texts.items()}
    return places, {place: drawable(text, 40) for text, place in middle.items()}


def _jitter(number: int, room: float) -> float:
    return room * (number * GOLDEN % 1 - 0.5)


def _rank(value: object) -> tuple[int, list[float], str]:
    if _is_number(value):
        return 0, [float(str(value))], ""
    if _is_numbers(value):
        assert isinstance(value, (list, tuple))
        return 1, [len(value), *value], ""
    return 2, [], text_of(value)


def busy_seconds(entries: list[Entry]) -> float:
    """For how long at least one trial ran."""
    return sum(end - start for start, end in spans_of(entries))


def spans_of(entries: list[Entry]) -> list[tuple[float, float]]:
    """The times in which trials ran, in seconds since the first start."""
    spans: list[tuple[float, float]] = []
    for start, end in sorted(map(times_of(entries), entries)):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


def times_of(entries: list[Entry]) -> Callable[[Entry], tuple[float, float]]:
    """What tells the beginning and the end of a trial, in seconds since the first began."""
    first = min((entry.started for entry in entries), default=None)

    def times(entry: Entry) -> tuple[float, float]:
        assert first is not None
        start = (entry.started - first).total_seconds()
        return start, max(start, (entry.ended - first).total_seconds())

    return times


def mean_and_spread(confirmation: Confirmation) -> tuple[float, float]:
    """Mean and standard deviation of the scores with new seeds; that of a single one is 0."""
    scores = list(confirmation.scores.values())
    return float(np.mean(scores)), float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0


def duration_text(seconds: float) -> str:
    """A time for people."""
    for size, unit, small_size, small_unit in ((3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            small = int(seconds % size // small_size)
            return f"{int(seconds // size):,} {unit}" + (f" {small} {small_unit}" if small else "")
    return f"{seconds:.3g} s"
