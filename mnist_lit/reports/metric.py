"""A metric on an axis: its name, its unit, its numbers, and the part of it that matters."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axis import Axis
from matplotlib.ticker import MaxNLocator

from mnist_lit.formatting import format_percent, format_value
from mnist_lit.reports.drawing import drawable

__all__ = ["Metric", "metric_of"]


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
        return format_percent(score) if self.percent else format_value(score)

    def spread_text(self, mean: float, spread: float) -> str:
        """A mean and its standard deviation for people."""
        if not self.percent:
            return f"{format_value(mean)} ± {spread:.2g}"
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
        return f"{100 * score:.6g}" if self.percent else format_value(float(f"{score:.6g}"))

    def write_on(self, axis: Axis) -> None:
        """Give an axis the metric's name and numbers."""
        axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter(self.tick)
        axis.set_label_text(drawable(self.label))


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
