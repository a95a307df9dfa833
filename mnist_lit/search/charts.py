"""Charts of a search: what its trials scored, which keys made the difference, when they ran."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure

from mnist_lit.formatting import format_duration, format_value, short_names, shorten
from mnist_lit.reports.drawing import (
    BLACK,
    BLUE,
    GREY,
    OTHERS,
    VERMILION,
    WIDTH,
    add_legend,
    drawable,
    new_figure,
    own_style,
    png,
    whole_numbers,
)
from mnist_lit.reports.metric import Metric, metric_of
from mnist_lit.search.results import Confirmation, Entry, Summary
from mnist_lit.search.scales import (
    ABSENT,
    MAX_KEYS,
    Scale,
    busy_seconds,
    complete_ones,
    linear_ticks,
    mean_and_spread,
    metrics_of,
    scales_of,
    score_of,
    scores_of,
    spans_of,
    times_of,
    wrapped,
)

__all__ = ["CHARTS", "draw_charts"]

COLORS = {"complete": BLUE, "pruned": GREY, "failed": BLACK}


def draw_charts(summary: Summary) -> dict[str, bytes]:
    """The charts that a search has something for, as PNG files by name."""
    with own_style():
        figures = {name: draw(summary) for name, draw in CHARTS.items()}
        return {name: png(figure) for name, figure in figures.items() if figure is not None}


def _ramp(*, reverse: bool = False) -> Colormap:
    """Viridis without its brightest, which cannot be seen on white."""
    colors = colormaps["viridis"](np.linspace(0, 0.92, 256))
    return ListedColormap(colors[::-1] if reverse else colors)


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
    figure = new_figure(1.2 + 3.2 * len(metrics))
    rows = figure.subplots(len(metrics), 1, sharex=True, squeeze=False)[:, 0]
    for objective, (axes, metric) in enumerate(zip(rows, metrics, strict=True)):
        _history_of(axes, summary, metric, objective)
    rows[-1].set_xlabel("trial")
    rows[-1].xaxis.set_major_locator(whole_numbers())
    add_legend(rows[0])
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
        is_cut |= _points(axes, metric, shown, scores_of(entries, objective), label=state, **mark)
    failed = [entry.number for entry in summary.entries if entry.state == "failed"]
    if failed:
        style: dict[str, Any] = {"color": BLACK, "marker": "|", "s": 110, "clip_on": False, "zorder": 4}
        axes.scatter(failed, [metric.low] * len(failed), label="failed", **style)
    _best_so_far(axes, complete_ones(summary), metric, objective, until=max(numbers))
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
    figure = new_figure(1.1 + len(order) * (0.2 + 0.2 * len(metrics)))
    axes = figure.subplots()
    thickness = 0.76 / len(metrics)
    for place, (metric, shares) in enumerate(zip(metrics, summary.importances, strict=False)):
        heights = np.arange(len(order)) + (place - (len(metrics) - 1) / 2) * thickness
        widths = [100 * shares.get(key, 0.0) for key in order]
        color = (BLUE, *OTHERS)[place % 4]
        bars = axes.barh(heights, widths, thickness * 0.92, color=color, label=f"for {drawable(metric.name)}")
        axes.bar_label(bars, [f"{width:.0f} %" for width in widths], padding=4, color="#333333", fontsize=9)
    names = short_names(order)
    axes.set_yticks(range(len(order)), [drawable(names[key], 36) for key in order])
    axes.set_xlabel(f"share of the variation of {drawable(metrics[0].name) if len(metrics) == 1 else 'each score'} (%)")
    axes.set_xlim(0, 1.08 * max(1.0, *(100 * share for shares in summary.importances for share in shares.values())))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    if len(metrics) > 1:
        add_legend(axes)
    return figure


def _parallel(summary: Summary) -> Figure | None:
    entries, metric = complete_ones(summary), metrics_of(summary)[0]
    scales = scales_of(summary, entries)
    best = _best(entries, metric)
    if len(entries) < 2 or best is None or not scales:
        return None
    scores = metric.places([entry.values[0] for entry in entries])
    heights = np.column_stack([scores, *(scale.of(entries) for scale in scales)])
    figure = new_figure(4.8, max(WIDTH, 1.25 * (len(scales) + 1)))
    axes = figure.subplots()
    _lines(axes, heights, scores if metric.maximize else -scores)
    place = entries.index(best)
    across = _curves(heights[place : place + 1])[0]
    axes.plot(across[:, 0], across[:, 1], color=VERMILION, linewidth=2.6, zorder=4)
    label = f"best: #{best.number}, {drawable(metric.name)} {metric.text(best.values[0])}"
    axes.text(-0.42, ABSENT, label, color=VERMILION, weight="bold", va="center")
    ticks = {float(metric.places([tick])[0]): metric.tick(tick) for tick in linear_ticks(metric.low, metric.high)}
    _uprights(axes, [Scale(drawable(metric.label, 24), {}, ticks), *scales])
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
            axes.text(x - 0.05, place, wrapped(text, 12, 2), ha="right", va="center", fontsize=9, zorder=5, bbox=box)
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
    entries, metric = complete_ones(summary), metrics_of(summary)[0]
    scales = scales_of(summary, entries)
    best = _best(entries, metric)
    if len(entries) < 2 or best is None or not scales:
        return None
    num_columns = min(len(scales), 3)
    num_rows = -(-len(scales) // num_columns)
    figure = new_figure(0.7 + 2.5 * num_rows)
    grid = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
    panels = grid.ravel()
    cuts = [_slice(axes, metric, entries, scale, best) for axes, scale in zip(panels, scales, strict=False)]
    for axes in panels[len(scales) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        metric.write_on(axes.yaxis)
        axes.set_ylim(metric.low, metric.high)
    bar = figure.colorbar(panels[0].collections[0], ax=grid, label="trial", aspect=40, pad=0.01)
    bar.locator = whole_numbers()
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
    texts = [wrapped(text, 32 // len(scale.ticks) + 1, 4) for text in scale.ticks.values()]
    axes.set_xticks(list(scale.ticks), texts, fontsize=8)
    axes.set_xlabel(scale.label)
    return is_cut


def _intermediate(summary: Summary) -> Figure | None:
    entries = [entry for entry in summary.entries if entry.steps]
    if max((len(entry.steps) for entry in entries), default=0) < 2:
        return None
    scores = [score for entry in entries for score in entry.steps.values()]
    metric = metric_of(summary.metrics[0], scores, maximize=summary.directions[0] == "maximize")
    figure = new_figure(4.4)
    axes = figure.subplots()
    for state in ("complete", "pruned", "failed"):
        _learning_curves(axes, [entry for entry in entries if entry.state == state], state)
    best = _best([entry for entry in complete_ones(summary) if entry.steps], metric)
    if best is not None:
        label = f"best: #{best.number}"
        axes.plot(*_curve(best), color=VERMILION, linewidth=2.4, zorder=5, label=label, marker=".")
    metric.write_on(axes.yaxis)
    axes.set_ylim(metric.low, metric.high)
    axes.set_xlabel("validation")
    axes.xaxis.set_major_locator(whole_numbers())
    add_legend(axes)
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
    figure = new_figure(1.3 + min(0.36 * num_lanes, 8))
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
        lengths = shorten(", ".join(format_duration(seconds) for _, seconds in pauses), 40)
        axes.plot([], [], color=VERMILION, linestyle=":", linewidth=1.8, label=f"pause left out: {lengths}")
    axes.set_xlim(-0.002 * total / size, 1.005 * total / size)
    axes.set_xlabel(f"{unit} since the first start")
    axes.xaxis.set_major_formatter(lambda time, _: format_value(float(time)))
    axes.set_ylim(num_lanes - 0.5, -0.5)
    axes.set_yticks([])
    axes.grid(visible=False, axis="y")
    add_legend(axes)
    return figure


def _without_pauses(entries: list[Entry]) -> tuple[dict[int, tuple[float, float]], list[tuple[float, float]], float]:
    """When each trial ran, in seconds; where long pauses were left out, and their lengths; when the last one ended."""
    spans, times = spans_of(entries), times_of(entries)
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
    entries = complete_ones(summary)
    if len(summary.metrics) < 2 or not entries:
        return None
    first, second = metrics_of(summary)[:2]
    figure = new_figure(5.4)
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
    add_legend(axes)
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
    figure = new_figure(1.4 + 0.5 * len(confirmed))
    axes = figure.subplots()
    _of_new_seeds(axes, confirmed)
    _of_the_search(axes, confirmed, {entry.number: entry for entry in complete_ones(summary)})
    axes.set_yticks(range(len(confirmed)), [f"#{confirmation.number}" for confirmation in confirmed])
    axes.set_ylim(len(confirmed) - 0.4, -0.6)
    axes.set_ylabel("trial")
    metric.write_on(axes.xaxis)
    axes.margins(x=0.06)
    add_legend(axes)
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
