"""Charts of a search: what its trials scored, which keys made the difference, when they ran."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator
from PIL import Image

from mnist_lit.results import Confirmation, Entry, Summary

__all__ = [
    "CHARTS",
    "Metric",
    "busy_seconds",
    "draw_charts",
    "duration_text",
    "mean_and_spread",
    "metrics_of",
    "score_of",
    "short_text",
    "text_of",
]

WIDTH = 10.0
DPI = 140
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.labelcolor": "#333333",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
    "font.size": 10,
    "grid.color": "#e9e9e9",
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a name is one
    "xtick.color": "#888888",
    "xtick.labelcolor": "#333333",
    "ytick.color": "#888888",
    "ytick.labelcolor": "#333333",
}
# They differ in brightness, too, and each is drawn with a mark of its own.
BLUE, VERMILION, GREY, BLACK = "#0072b2", "#d55e00", "#9a9a9a", "#222222"
COLORS = {"complete": BLUE, "pruned": GREY, "failed": BLACK}
OTHERS = ("#56b4e9", "#009e73", "#cc79a7")
MAX_KEYS = 12
MAX_PLACES = 8
# Where a trial lies on the axis, from 0 to 1, of a key that it does not have.
ABSENT = -0.15
GOLDEN = 0.618034


# ---- Scores


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
        axis.set_label_text(_drawable(self.label))


def metrics_of(summary: Summary, *, pruned: bool = False) -> list[Metric]:
    """The objectives of a search; their axes are for the scores of complete trials, or those of pruned ones, too."""
    entries = summary.entries if pruned else _complete(summary)
    return [
        _metric(name, _scores(entries, objective), maximize=direction == "maximize")
        for objective, (name, direction) in enumerate(zip(summary.metrics, summary.directions, strict=True))
    ]


def _metric(name: str, scores: list[float], *, maximize: bool) -> Metric:
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


def _scores(entries: Iterable[Entry], objective: int = 0) -> list[float]:
    return [score for entry in entries if (score := score_of(entry, objective)) is not None]


def score_of(entry: Entry, objective: int = 0) -> float | None:
    """A trial's score; that of a pruned trial is its last one."""
    if entry.values:
        return entry.values[objective]
    return entry.steps[max(entry.steps)] if entry.state == "pruned" and entry.steps else None


# ---- Texts


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


def _drawable(text: str, limit: int = 60) -> str:
    """A text without what the font cannot draw."""
    return "".join(char if ord(char) in _glyphs() else "?" for char in short_text(" ".join(text.split()), limit))


def _wrapped(text: str, width: int, num_lines: int) -> str:
    return fill(text.replace("(", " ("), width, max_lines=num_lines, placeholder="…")


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def _short_names(keys: Iterable[str]) -> dict[str, str]:
    """For each key the shortest end that no other key has."""
    ends = {key: _ends(key) for key in keys}
    counts = Counter(end for of_key in ends.values() for end in of_key)
    return {key: next((end for end in of_key if counts[end] == 1), key) for key, of_key in ends.items()}


def _ends(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]


# ---- Keys


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


def _scales(summary: Summary, entries: list[Entry]) -> list[Scale]:
    """An axis for each key that the trials have, the most important first."""
    shares = summary.importances[0] if summary.importances else {}
    keys = dict.fromkeys(key for entry in entries for key in entry.params)
    names = _short_names(keys)
    scales = []
    for key in sorted(keys, key=lambda key: -shares.get(key, 0.0)):
        values = {entry.number: entry.params[key] for entry in entries if key in entry.params}
        for suffix, part in _parts(values).items():
            places, ticks = _places(part, logarithmic=key in summary.logarithmic)
            if len(part) < len(entries):
                places |= {e.number: ABSENT + _jitter(e.number, 0.06) for e in entries if e.number not in part}
                ticks[ABSENT] = "\N{EN DASH}"
            scales.append(Scale(_drawable(names[key], 24) + suffix, places, ticks))
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
    ticks = _log_ticks(low, high) if logarithmic else _linear_ticks(low, high)

    def place(value: float) -> float:
        return (warp(value) - warp(low)) / ((warp(high) - warp(low)) or 1.0)

    return (
        {number: place(value) for number, value in values.items()},
        {place(tick): text_of(tick) for tick in ticks},
    )


def _linear_ticks(low: float, high: float) -> list[float]:
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
    return places, {place: _drawable(text, 40) for text, place in middle.items()}


def _jitter(number: int, room: float) -> float:
    return room * (number * GOLDEN % 1 - 0.5)


def _rank(value: object) -> tuple[int, list[float], str]:
    if _is_number(value):
        return 0, [float(str(value))], ""
    if _is_numbers(value):
        assert isinstance(value, (list, tuple))
        return 1, [len(value), *value], ""
    return 2, [], text_of(value)


# ---- Times


def busy_seconds(entries: list[Entry]) -> float:
    """For how long at least one trial ran."""
    return sum(end - start for start, end in _spans(entries))


def _spans(entries: list[Entry]) -> list[tuple[float, float]]:
    """The times in which trials ran, in seconds since the first start."""
    spans: list[tuple[float, float]] = []
    for start, end in sorted(map(_times(entries), entries)):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


def _times(entries: list[Entry]) -> Callable[[Entry], tuple[float, float]]:
    first = min((entry.started for entry in entries), default=None)

    def times(entry: Entry) -> tuple[float, float]:
        assert first is not None
        start = (entry.started - first).total_seconds()
        return start, max(start, (entry.ended - first).total_seconds())

    return times


# ---- The charts


def draw_charts(summary: Summary) -> dict[str, bytes]:
    """The charts that a search has something for, as PNG files by name."""
    # Neither a user's matplotlibrc nor a notebook's settings.
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        figures = {name: draw(summary) for name, draw in CHARTS.items()}
        return {name: _png(figure) for name, figure in figures.items() if figure is not None}


def _png(figure: Figure) -> bytes:
    canvas, file = FigureCanvasAgg(figure), BytesIO()
    canvas.draw()  # type: ignore[no-untyped-call]
    # In 256 colors, a difference that no eye sees, it takes a third of the room.
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")  # type: ignore[no-untyped-call]
    picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(file, "png")
    return file.getvalue()


def _figure(height: float, width: float = WIDTH) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI)


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def _legend(axes: Axes, **options: Any) -> None:
    options = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 6, "borderaxespad": 0.2, **options}
    if axes.get_legend_handles_labels()[0]:
        axes.legend(handletextpad=0.4, columnspacing=1.5, **options)


def _ramp(*, reverse: bool = False) -> Colormap:
    """Viridis without its brightest, which cannot be seen on white."""
    colors = colormaps["viridis"](np.linspace(0, 0.92, 256))
    return ListedColormap(colors[::-1] if reverse else colors)


def _complete(summary: Summary) -> list[Entry]:
    return [entry for entry in summary.entries if entry.values]


def _best(entries: list[Entry], metric: Metric, objective: int = 0) -> Entry | None:
    by_score = {entry.values[objective]: entry for entry in reversed(entries)}
    return by_score[metric.best(by_score)] if by_score else None


def _points(axes: Axes, metric: Metric, x: Sequence[float], scores: Sequence[float], **style: Any) -> bool:
    """Points, those beyond the axis as triangles at its end; whether there are any of these."""
    colors = style.pop("c", None)
    places, heights, shown = np.asarray(x), metric.cut(scores), np.asarray(scores, dtype=float)
    inside = heights == shown
    marks: tuple[Any, ...] = ((inside, {}), (shown < heights, {"marker": "v"}), (shown > heights, {"marker": "^"}))
    for chosen, mark in marks:
        # The first of them also stands in the legend for all.
        if chosen.any() or (chosen is inside and len(scores)):
            shades = {} if colors is None else {"c": np.asarray(colors)[chosen]}
            axes.scatter(places[chosen], heights[chosen], **{"clip_on": False, **style, **shades, **mark})
            style["label"] = None
    return not bool(inside.all())


def _history(summary: Summary) -> Figure | None:
    if all(score_of(entry) is None for entry in summary.entries):
        return None
    metrics = metrics_of(summary, pruned=True)
    figure = _figure(1.2 + 3.2 * len(metrics))
    rows = figure.subplots(len(metrics), 1, sharex=True, squeeze=False)[:, 0]
    for objective, (axes, metric) in enumerate(zip(rows, metrics, strict=True)):
        _history_of(axes, summary, metric, objective)
    rows[-1].set_xlabel("trial")
    rows[-1].xaxis.set_major_locator(_whole_numbers())
    _legend(rows[0])
    return figure


def _history_of(axes: Axes, summary: Summary, metric: Metric, objective: int) -> None:
    numbers = [entry.number for entry in summary.entries]
    margin = 0.6 + 0.01 * (max(numbers) - min(numbers))
    metric.write_on(axes.yaxis)
    axes.set_ylim(metric.low, metric.high)
    axes.set_xlim(min(numbers) - margin, max(numbers) + margin)
    size = 42 if len(numbers) <= 100 else 18
    marks: dict[str, dict[str, Any]] = {
        "complete": {"color": BLUE, "s": size, "alpha": 0.85, "linewidths": 0, "zorder": 3},
        "pruned": {"color": GREY, "s": size, "marker": "x", "linewidths": 1.2, "zorder": 2},
    }
    is_cut = False
    for state, mark in marks.items():
        entries = [
            entry for entry in summary.entries if entry.state == state and score_of(entry, objective) is not None
        ]
        shown = [entry.number for entry in entries]
        is_cut |= _points(axes, metric, shown, _scores(entries, objective), label=state, **mark)
    failed = [entry.number for entry in summary.entries if entry.state == "failed"]
    if failed:
        style: dict[str, Any] = {"color": BLACK, "marker": "|", "s": 110, "clip_on": False, "zorder": 4}
        axes.scatter(failed, [metric.low] * len(failed), label="failed", **style)
    _best_so_far(axes, _complete(summary), metric, objective, until=max(numbers))
    if is_cut:
        axes.scatter([], [], marker="v" if metric.maximize else "^", color=GREY, label="beyond the axis")


def _best_so_far(axes: Axes, entries: list[Entry], metric: Metric, objective: int, *, until: int) -> None:
    best = _best(entries, metric, objective)
    if best is None:
        return
    scores = [entry.values[objective] for entry in entries]
    records = (np.maximum if metric.maximize else np.minimum).accumulate(scores)
    steps = [*(entry.number for entry in entries), until]
    heights = metric.cut([*records, records[-1]])
    axes.step(steps, heights, where="post", color=VERMILION, linewidth=1.4, zorder=1, label="best so far")
    _star(axes, best.number, best.values[objective], best, metric)


def _star(axes: Axes, x: float, y: float, best: Entry, metric: Metric) -> None:
    axes.scatter([x], [y], marker="*", s=190, color=VERMILION, edgecolors="white", zorder=6, label="best")
    # Towards the inside of the axes, whichever end of the axis is the good one.
    side, room = ("top", -12) if metric.maximize else ("bottom", 12)
    _note(axes, f"#{best.number}", (x, y), (0, room), va=side)


def _note(axes: Axes, text: str, place: tuple[float, float], offset: tuple[float, float], **options: Any) -> None:
    box: dict[str, Any] = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    options = {"ha": "center", "color": VERMILION, "weight": "bold", "zorder": 7, "bbox": box, **options}
    axes.annotate(text, place, offset, textcoords="offset points", **options)


def _importances(summary: Summary) -> Figure | None:
    keys = dict.fromkeys(key for shares in summary.importances for key in shares)
    if not keys:
        return None
    metrics = metrics_of(summary)[: len(summary.importances)]
    order = sorted(keys, key=lambda key: -max(shares.get(key, 0.0) for shares in summary.importances))[:MAX_KEYS]
    figure = _figure(1.1 + len(order) * (0.2 + 0.2 * len(metrics)))
    axes = figure.subplots()
    thickness = 0.76 / len(metrics)
    for place, (metric, shares) in enumerate(zip(metrics, summary.importances, strict=False)):
        heights = np.arange(len(order)) + (place - (len(metrics) - 1) / 2) * thickness
        widths = [100 * shares.get(key, 0.0) for key in order]
        color = (BLUE, *OTHERS)[place % 4]
        bars = axes.barh(heights, widths, thickness * 0.92, color=color, label=f"for {_drawable(metric.name)}")
        axes.bar_label(bars, [f"{width:.0f} %" for width in widths], padding=4, color="#333333", fontsize=9)
    names = _short_names(order)
    axes.set_yticks(range(len(order)), [_drawable(names[key], 36) for key in order])
    axes.set_xlabel(
        f"share of the variation of {_drawable(metrics[0].name) if len(metrics) == 1 else 'each score'} (%)"
    )
    axes.set_xlim(0, 1.08 * max(1.0, *(100 * share for shares in summary.importances for share in shares.values())))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    if len(metrics) > 1:
        _legend(axes)
    return figure


def _parallel(summary: Summary) -> Figure | None:
    entries, metric = _complete(summary), metrics_of(summary)[0]
    scales = _scales(summary, entries)
    best = _best(entries, metric)
    if len(entries) < 2 or best is None or not scales:
        return None
    scores = metric.places([entry.values[0] for entry in entries])
    heights = np.column_stack([scores, *(scale.of(entries) for scale in scales)])
    figure = _figure(4.8, max(WIDTH, 1.25 * (len(scales) + 1)))
    axes = figure.subplots()
    _lines(axes, heights, scores if metric.maximize else -scores)
    place = entries.index(best)
    across = _curves(heights[place : place + 1])[0]
    axes.plot(across[:, 0], across[:, 1], color=VERMILION, linewidth=2.6, zorder=4)
    label = f"best: #{best.number}, {_drawable(metric.name)} {metric.text(best.values[0])}"
    axes.text(-0.42, ABSENT, label, color=VERMILION, weight="bold", va="center")
    ticks = {float(metric.places([tick])[0]): metric.tick(tick) for tick in _linear_ticks(metric.low, metric.high)}
    _uprights(axes, [Scale(_drawable(metric.label, 24), {}, ticks), *scales])
    return figure


def _lines(axes: Axes, heights: "np.ndarray[Any, Any]", goodness: "np.ndarray[Any, Any]") -> None:
    order = np.argsort(goodness, kind="stable")
    ranks = np.linspace(0, 1, len(order))
    colors = _ramp(reverse=True)(ranks)
    # The more lines, the fainter those that are not good.
    faintest = min(0.6, 12 / len(order))
    colors[:, 3] = faintest + (0.9 - faintest) * ranks**3
    axes.add_collection(LineCollection(list(_curves(heights[order])), colors=colors, linewidths=1.2, zorder=2))


def _curves(heights: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Smooth lines of shape (trial, point, 2) through places of shape (trial, axis), upright at none of the axes."""
    across = np.linspace(0, heights.shape[1] - 1, 24 * (heights.shape[1] - 1) + 1)
    left = np.minimum(across.astype(int), heights.shape[1] - 2)
    share = across - left
    share = share * share * (3 - 2 * share)
    lines = heights[:, left] * (1 - share) + heights[:, left + 1] * share
    return np.stack([np.broadcast_to(across, lines.shape), lines], axis=2)


def _uprights(axes: Axes, scales: list[Scale]) -> None:
    box: dict[str, Any] = {"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.82}
    for x, scale in enumerate(scales):
        axes.plot([x, x], [0, 1], color="#555555", linewidth=1, zorder=3)
        for place, text in scale.ticks.items():
            axes.plot([x - 0.03, x], [place, place], color="#555555", linewidth=1, zorder=5)
            axes.text(x - 0.05, place, _wrapped(text, 12, 2), ha="right", va="center", fontsize=9, zorder=5, bbox=box)
    slope: dict[str, Any] = {"rotation": 20, "ha": "left"} if len(scales) > 7 else {}
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(scales)), [scale.label for scale in scales], fontsize=10, **slope)
    axes.get_xticklabels()[0].set_fontweight("bold")
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.set_xlim(-0.45, len(scales) - 0.9)
    axes.set_ylim(ABSENT - 0.07, 1.05)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)


def _slices(summary: Summary) -> Figure | None:
    entries, metric = _complete(summary), metrics_of(summary)[0]
    scales = _scales(summary, entries)
    best = _best(entries, metric)
    if len(entries) < 2 or best is None or not scales:
        return None
    num_columns = min(len(scales), 3)
    num_rows = -(-len(scales) // num_columns)
    figure = _figure(0.7 + 2.5 * num_rows)
    grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
    panels = grid.ravel()
    cuts = [_slice(axes, metric, entries, scale, best) for axes, scale in zip(panels, scales, strict=False)]
    for axes in panels[len(scales) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        metric.write_on(axes.yaxis)
        axes.set_ylim(metric.low, metric.high)
    bar = figure.colorbar(panels[0].collections[0], ax=grid, label="trial", aspect=40, pad=0.01)
    bar.locator = _whole_numbers()
    bar.outline.set_visible(False)
    panels[0].scatter([], [], marker="*", s=120, color=VERMILION, label=f"best: #{best.number}")
    if any(cuts):
        panels[0].scatter([], [], marker="v" if metric.maximize else "^", color=GREY, label="beyond the axis")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, handletextpad=0.4)
    return figure


def _slice(axes: Axes, metric: Metric, entries: list[Entry], scale: Scale, best: Entry) -> bool:
    numbers = [entry.number for entry in entries]
    axes.set_xlim(ABSENT - 0.07 if ABSENT in scale.ticks else -0.07, 1.07)
    style: dict[str, Any] = {
        "c": numbers,
        "cmap": _ramp(reverse=True),
        "vmin": min(numbers),
        "vmax": max(numbers),
        "linewidths": 0,
    }
    size = 28 if len(entries) <= 100 else 13
    scores = [entry.values[0] for entry in entries]
    is_cut = _points(axes, metric, scale.of(entries), scores, s=size, alpha=0.85, zorder=3, **style)
    star: dict[str, Any] = {
        "marker": "*",
        "s": 130,
        "color": VERMILION,
        "edgecolors": "white",
        "zorder": 6,
        "clip_on": False,
    }
    axes.scatter([scale.places[best.number]], metric.cut([best.values[0]]), **star)
    texts = [_wrapped(text, 32 // len(scale.ticks) + 1, 4) for text in scale.ticks.values()]
    axes.set_xticks(list(scale.ticks), texts, fontsize=8)
    axes.set_xlabel(scale.label)
    return is_cut


def _intermediate(summary: Summary) -> Figure | None:
    entries = [entry for entry in summary.entries if entry.steps]
    if max((len(entry.steps) for entry in entries), default=0) < 2:
        return None
    scores = [score for entry in entries for score in entry.steps.values()]
    metric = _metric(summary.metrics[0], scores, maximize=summary.directions[0] == "maximize")
    figure = _figure(4.4)
    axes = figure.subplots()
    for state in ("complete", "pruned", "failed"):
        _learning_curves(axes, [entry for entry in entries if entry.state == state], state)
    best = _best([entry for entry in _complete(summary) if entry.steps], metric)
    if best is not None:
        label = f"best: #{best.number}"
        axes.plot(*_curve(best), color=VERMILION, linewidth=2.4, zorder=5, label=label, marker=".")
    metric.write_on(axes.yaxis)
    axes.set_ylim(metric.low, metric.high)
    axes.set_xlabel("validation")
    axes.xaxis.set_major_locator(_whole_numbers())
    _legend(axes)
    return figure


def _curve(entry: Entry) -> tuple[list[int], list[float]]:
    steps = sorted(entry.steps)
    return [step + 1 for step in steps], [entry.steps[step] for step in steps]


def _learning_curves(axes: Axes, entries: list[Entry], state: str) -> None:
    alpha = max(0.12, min(0.6, 15 / max(1, len(entries))))
    for entry in entries:
        axes.plot(*_curve(entry), color=COLORS[state], linewidth=1.1, alpha=alpha, zorder=2)
    if entries and state != "complete":
        ends = [(steps[-1], scores[-1]) for steps, scores in map(_curve, entries)]
        mark = {"pruned": "x", "failed": "s"}[state]
        x, y = zip(*ends, strict=True)
        axes.scatter(x, y, color=COLORS[state], marker=mark, s=30, zorder=3, label=f"{state} here")
    elif entries:
        axes.plot([], [], color=COLORS[state], label=state)


def _timeline(summary: Summary) -> Figure | None:
    if not summary.entries:
        return None
    places, pauses, total = _without_pauses(summary.entries)
    size, unit = next(((s, u) for s, u in ((3600, "hours"), (60, "minutes")) if total >= 3 * s), (1, "seconds"))
    lanes = _lanes(places)
    num_lanes = max(lanes.values()) + 1
    figure = _figure(1.3 + min(0.36 * num_lanes, 8))
    axes = figure.subplots()
    for state, color in COLORS.items():
        found = [entry.number for entry in summary.entries if entry.state == state]
        starts = [places[number][0] / size for number in found]
        widths = [max(places[number][1] - places[number][0], total / 400) / size for number in found]
        style: dict[str, Any] = {
            "height": 0.8,
            "color": color,
            "edgecolor": "white",
            "linewidth": 0.6 if len(places) < 150 else 0.2,
        }
        if found:
            axes.barh([lanes[number] for number in found], widths, left=starts, label=state, **style)
    _bar_numbers(axes, places, lanes, total, size)
    for place, _ in pauses:
        axes.axvline(place / size, color=VERMILION, linestyle=":", linewidth=1.8)
    if pauses:
        lengths = short_text(", ".join(duration_text(seconds) for _, seconds in pauses), 40)
        axes.plot([], [], color=VERMILION, linestyle=":", linewidth=1.8, label=f"pause left out: {lengths}")
    axes.set_xlim(-0.002 * total / size, 1.005 * total / size)
    axes.set_xlabel(f"{unit} since the first start")
    axes.xaxis.set_major_formatter(lambda time, _: text_of(float(time)))
    axes.set_ylim(num_lanes - 0.5, -0.5)
    axes.set_yticks([])
    axes.grid(visible=False, axis="y")
    _legend(axes)
    return figure


def _without_pauses(entries: list[Entry]) -> tuple[dict[int, tuple[float, float]], list[tuple[float, float]], float]:
    """When each trial ran, in seconds; where long pauses were left out, and their lengths; when the last one ended."""
    spans, times = _spans(entries), _times(entries)
    longest = 0.1 * busy_seconds(entries) + 1
    gaps = [(left[1], right[0] - left[1]) for left, right in itertools.pairwise(spans)]
    gaps = [(start, length) for start, length in gaps if length > longest]

    def moved(time: float) -> float:
        return time - sum(length for start, length in gaps if start < time)

    places = {entry.number: (moved(times(entry)[0]), moved(times(entry)[1])) for entry in entries}
    pauses = [(moved(start), length) for start, length in gaps]
    return places, pauses, max(end for _, end in places.values()) or 1.0


def _lanes(places: dict[int, tuple[float, float]]) -> dict[int, int]:
    """For each trial the first lane that is free when it starts."""
    lanes: dict[int, int] = {}
    ends: list[float] = []
    for number, (start, end) in sorted(places.items(), key=lambda item: item[1]):
        lane = next((lane for lane, free in enumerate(ends) if free <= start), len(ends))
        ends[lane:] = [end, *ends[lane + 1 :]]
        lanes[number] = lane
    return lanes


def _bar_numbers(
    axes: Axes, places: dict[int, tuple[float, float]], lanes: dict[int, int], total: float, size: float
) -> None:
    for number, (start, end) in places.items():
        if end - start > (0.006 + 0.009 * len(str(number))) * total:
            middle = (start + end) / 2 / size
            axes.text(middle, lanes[number], str(number), color="white", ha="center", va="center", fontsize=8)


def _pareto(summary: Summary) -> Figure | None:
    entries = _complete(summary)
    if len(summary.metrics) < 2 or not entries:
        return None
    first, second = metrics_of(summary)[:2]
    figure = _figure(5.4)
    axes = figure.subplots()
    axes.set(xlim=(first.low, first.high), ylim=(second.low, second.high))
    for metric, axis in ((first, axes.xaxis), (second, axes.yaxis)):
        metric.write_on(axis)
        axis.set_label_text(f"{axis.label.get_text()}, {'higher' if metric.maximize else 'lower'} is better")
    within = [entry for entry in entries if first.low <= entry.values[0] <= first.high]
    beyond = [entry for entry in entries if entry not in within]
    style: dict[str, Any] = {"color": GREY, "s": 30, "linewidths": 0}
    is_cut = _points(
        axes, second, [e.values[0] for e in within], [e.values[1] for e in within], label="complete", **style
    )
    edge = first.cut([entry.values[0] for entry in beyond])
    _points(axes, second, list(edge), [e.values[1] for e in beyond], marker="<" if first.maximize else ">", **style)
    if beyond or is_cut:
        axes.scatter([], [], marker="<", label="beyond the axis", **style)
    front = sorted((entry for entry in entries if entry.number in summary.best), key=lambda entry: entry.values)
    x, y = first.cut([entry.values[0] for entry in front]), second.cut([entry.values[1] for entry in front])
    look: dict[str, Any] = {"color": VERMILION, "marker": "D", "markersize": 6, "markeredgecolor": "white", "zorder": 4}
    # With three objectives the front is a surface.
    look["linestyle"] = "-" if len(summary.metrics) == 2 else "none"
    axes.plot(x, y, **look, clip_on=False, label="best: no other is better in every objective")
    _number_the_front(axes, front, np.column_stack([x, y]), (first, second))
    _legend(axes)
    return figure


def _number_the_front(
    axes: Axes, front: list[Entry], corners: "np.ndarray[Any, Any]", metrics: tuple[Metric, Metric]
) -> None:
    """Write numbers at the members of the front that have room for one, on the side where no trial is."""
    right, up = (metric.maximize for metric in metrics)
    offset, sides = (5 if right else -5, 4 if up else -4), ("left" if right else "right", "bottom" if up else "top")
    taken: list[Any] = []
    for entry, corner, place in zip(front, corners, axes.transLimits.transform(corners), strict=True):
        if all(abs(place[0] - other[0]) > 0.04 or abs(place[1] - other[1]) > 0.045 for other in taken):
            taken.append(place)
            _note(axes, f"#{entry.number}", (corner[0], corner[1]), offset, ha=sides[0], va=sides[1])


def _confirmation(summary: Summary) -> Figure | None:
    confirmed = [confirmation for confirmation in summary.confirmations if confirmation.scores]
    if not confirmed:
        return None
    metric = metrics_of(summary)[0]
    confirmed.sort(key=lambda one: mean_and_spread(one)[0], reverse=metric.maximize)
    figure = _figure(1.4 + 0.5 * len(confirmed))
    axes = figure.subplots()
    _of_new_seeds(axes, confirmed)
    _of_the_search(axes, confirmed, {entry.number: entry for entry in _complete(summary)})
    axes.set_yticks(range(len(confirmed)), [f"#{confirmation.number}" for confirmation in confirmed])
    axes.set_ylim(len(confirmed) - 0.4, -0.6)
    axes.set_ylabel("trial")
    metric.write_on(axes.xaxis)
    axes.margins(x=0.06)
    _legend(axes)
    return figure


def _of_new_seeds(axes: Axes, confirmed: list[Confirmation]) -> None:
    dots = [(score, row) for row, confirmation in enumerate(confirmed) for score in confirmation.scores.values()]
    x, y = zip(*dots, strict=True)
    axes.scatter(x, y, color=BLUE, s=22, alpha=0.45, linewidths=0, zorder=3, label="a new seed")
    means, spreads = zip(*map(mean_and_spread, confirmed), strict=True)
    style: dict[str, Any] = {
        "color": BLACK,
        "fmt": "|",
        "markersize": 11,
        "markeredgewidth": 2,
        "capsize": 3,
        "zorder": 4,
    }
    axes.errorbar(
        means, np.arange(len(confirmed)) + 0.24, xerr=spreads, **style, label="their mean ± standard deviation"
    )


def _of_the_search(axes: Axes, confirmed: list[Confirmation], entries: dict[int, Entry]) -> None:
    found = [(entries[one.number].values[0], row) for row, one in enumerate(confirmed) if one.number in entries]
    if found:
        style: dict[str, Any] = {
            "marker": "D",
            "s": 60,
            "facecolors": "none",
            "edgecolors": VERMILION,
            "linewidths": 1.8,
            "zorder": 5,
        }
        axes.scatter(*zip(*found, strict=True), **style, label="in the search")


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


CHARTS: dict[str, Callable[[Summary], Figure | None]] = {
    "history": _history,
    "confirmation": _confirmation,
    "pareto": _pareto,
    "importances": _importances,
    "parallel": _parallel,
    "slices": _slices,
    "intermediate": _intermediate,
    "timeline": _timeline,
}
