"""A search's scores, keys and times as its axes show them."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from mnist_lit.formatting import format_value, short_names
from mnist_lit.reports.drawing import drawable
from mnist_lit.reports.metric import Metric, metric_of
from mnist_lit.search.results import Confirmation, Entry, Summary

__all__ = [
    "ABSENT",
    "MAX_KEYS",
    "Scale",
    "busy_seconds",
    "complete_ones",
    "linear_ticks",
    "mean_and_spread",
    "metrics_of",
    "scales_of",
    "score_of",
    "scores_of",
    "spans_of",
    "times_of",
    "wrapped",
]

MAX_KEYS = 12
MAX_PLACES = 8
# Where a trial lies on the axis, from 0 to 1, of a key that it does not have.
ABSENT = -0.15
GOLDEN = 0.618034


def metrics_of(summary: Summary, *, pruned: bool = False) -> list[Metric]:
    """The objectives of a search; their axes are for the scores of complete trials, or those of pruned ones, too."""
    entries = summary.entries if pruned else complete_ones(summary)
    return [
        metric_of(name, scores_of(entries, objective), maximize=direction == "maximize")
        for objective, (name, direction) in enumerate(zip(summary.metrics, summary.directions, strict=True))
    ]


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


def wrapped(text: str, width: int, num_lines: int) -> str:
    """A text in lines of that many characters, cut where it is longer."""
    return fill(text.replace("(", " ("), width, max_lines=num_lines, placeholder="…")


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
    if len(set(map(format_value, values.values()))) <= MAX_PLACES or not all(map(_is_numbers, values.values())):
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
    num_kinds = len(set(map(format_value, values.values())))
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
        {place(tick): format_value(tick) for tick in ticks},
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
    texts = {number: format_value(value) for number, value in values.items()}
    by_text = {format_value(value): value for value in values.values()}
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
    return 2, [], format_value(value)


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
