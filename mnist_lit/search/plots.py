"""Optuna's plots of a study, with one axis for each key of the space and the best trial marked."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import optuna
from optuna import visualization
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.importance import get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from plotly.colors import sample_colorscale
from plotly.graph_objects import Bar, Figure, Scatter

from mnist_lit.formatting import format_score, format_value, short_names
from mnist_lit.search.settings import Settings
from mnist_lit.search.study import ranked

__all__ = ["Chart", "draw_charts", "last_score", "params_of"]

MAX_LINES = 100  # a browser takes seconds for more, and nobody can tell them apart
MAX_TICKS = 12
ABSENT = "\N{EN DASH}"
MIN_SCORES = 4  # different ones; the importance of keys is chance with fewer
# Legible on white and on black.
BEST, COMPLETE, PRUNED, FAIL = "#e8590c", "#2f7fd6", "#8b96a1", "#d6336c"
SHADES = ["#a9b4bf", COMPLETE]
LAYOUT = {
    "template": "none",
    "title": None,
    "paper_bgcolor": "rgba(0, 0, 0, 0)",
    "plot_bgcolor": "rgba(0, 0, 0, 0)",
    "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#808a94"},
    "hoverlabel": {"bgcolor": "#1d2127", "font": {"color": "#ffffff"}, "align": "left"},
    "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
    "margin": {"l": 8, "r": 16, "t": 16, "b": 8},
    "dragmode": False,  # or a finger on a plot could not scroll the page
}
AXIS = {
    "automargin": True,
    "zeroline": False,
    "gridcolor": "#808a94",
    "title_font_size": 13,
    "exponentformat": "none",
    "ticks": "outside",  # a distance to the labels
    "tickcolor": "rgba(0, 0, 0, 0)",
}


class Chart(NamedTuple):
    """Figures below one heading.

    Args:
        heading: What they show.
        caption: How they are read.
        figures: HTML of each.
        min_width: Width, in rem, below which a figure scrolls instead of shrinking.
    """

    heading: str
    caption: str
    figures: list[str]
    min_width: float = 16


def draw_charts(study: optuna.Study, settings: Settings) -> Iterator[Chart]:
    """Draw all charts that a study has trials for."""
    metrics = settings.metrics
    labels = [f"{metric} (%)" if _scale(metric) > 1 else metric for metric in metrics]
    view = _view(study, settings, range(len(labels)))
    with warnings.catch_warnings(action="ignore"):  # that trials are few, or constant
        if len(labels) in (2, 3) and ranked(study):
            yield _pareto(view, labels)
        for objective, label in enumerate(labels):
            for chart in _charts_of(objective, label, study, settings):
                suffix = f": {metrics[objective]}" if len(labels) > 1 else ""
                yield chart._replace(heading=chart.heading + suffix)
        if len(view.trials) > 1:
            yield _timeline(view)


def _charts_of(objective: int, label: str, study: optuna.Study, settings: Settings) -> Iterator[Chart]:
    view = _view(study, settings, [objective])
    complete = ranked(view)
    scores = [trial.values[0] for trial in complete] or [score for trial in view.trials for score in last_score(trial)]
    if not scores:
        return
    span = _span(scores, view.direction)
    yield _history(view, label, span)
    if len(set(scores)) >= MIN_SCORES:
        yield _importance(study, settings, objective)
    if len(complete) > 1 and complete[0].params:
        yield _parallel(view, label, span)
        yield _slices(view, label, span)
    if any(len(trial.intermediate_values) > 1 for trial in view.get_trials(deepcopy=False)):
        yield _learning_curves(view, label, span)


# ---- What the plots show


def params_of(trial: FrozenTrial) -> dict[str, Any]:
    """Return the values of the space's keys; lists are whole."""
    params: dict[str, Any] = trial.user_attrs.get("params", trial.params)
    return params


def last_score(trial: FrozenTrial) -> list[float]:
    """Return the last intermediate value, if there is one."""
    return [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)[-1:]]


def _view(study: optuna.Study, settings: Settings, objectives: Sequence[int]) -> optuna.Study:
    """Copy a study: one parameter for each key of the space, accuracies in per cent, some of the objectives."""
    scales = [_scale(settings.metrics[objective]) for objective in objectives]
    names, distributions = short_names(settings.space), _distributions(study, settings)
    view = optuna.create_study(directions=[study.directions[objective] for objective in objectives])
    for trial in study.get_trials(deepcopy=False):
        shown = copy.copy(trial)
        keys = [key for key in distributions if key in params_of(trial)]
        shown.distributions = {names[key]: distributions[key] for key in keys}
        shown.params = {names[key]: _axis_value(trial, key, distributions[key]) for key in keys}
        if trial.values:
            shown.values = [trial.values[place] * scale for place, scale in zip(objectives, scales, strict=True)]
        shown.intermediate_values = {step: value * scales[0] for step, value in trial.intermediate_values.items()}
        shown.user_attrs = {}
        view.add_trial(shown)
    return view


def _distributions(study: optuna.Study, settings: Settings) -> dict[str, BaseDistribution]:
    """Keep those of numbers; of anything else, as lists are, make a choice of texts."""
    distributions: dict[str, BaseDistribution] = {}
    trials = study.get_trials(deepcopy=False)
    for key in settings.space:
        drawn = [trial.distributions[key] for trial in trials if key in trial.distributions]
        values = [params_of(trial)[key] for trial in trials if key in params_of(trial)]
        if drawn and not isinstance(drawn[0], CategoricalDistribution):
            distributions[key] = drawn[0]
        elif values:
            labels = map(_label, sorted(values, key=_order))
            distributions[key] = CategoricalDistribution(list(dict.fromkeys(labels)))
    return distributions


def _axis_value(trial: FrozenTrial, key: str, distribution: BaseDistribution) -> Any:
    return _label(params_of(trial)[key]) if isinstance(distribution, CategoricalDistribution) else trial.params[key]


def _label(value: Any) -> Any:
    return value if isinstance(value, int | float) else format_value(value)


def _order(value: Any) -> tuple[Any, ...]:
    """Sort numbers by size, and lists by length and then by their items."""
    items = value if isinstance(value, list) else [value]
    return len(items), [item if isinstance(item, int | float) else 0 for item in items], format_value(value)


def _scale(metric: str) -> int:
    return 100 if format_score(metric, 0.0).endswith("%") else 1


def _span(scores: Sequence[float], direction: StudyDirection) -> list[float]:
    """Choose the range of an axis; far worse scores, beyond the whisker of a box plot, are left out."""
    quarter, three_quarters = np.quantile(scores, [0.25, 0.75])
    whisker = 1.5 * (three_quarters - quarter)
    if direction == StudyDirection.MAXIMIZE:
        near = [score for score in scores if score >= quarter - whisker]
    else:
        near = [score for score in scores if score <= three_quarters + whisker]
    margin = 0.08 * (max(near) - min(near)) or 0.01 * abs(near[0]) or 1
    return [min(near) - margin, max(near) + margin]


# ---- The plots


def _html(figure: Figure, height: int, **layout: Any) -> str:
    figure.update_layout(**LAYOUT, height=height, width=None)
    figure.update_layout(**layout)
    figure.update_xaxes(**AXIS)
    figure.update_yaxes(**AXIS)
    config = {"responsive": True, "displayModeBar": False}
    html: str = figure.to_html(full_html=False, include_plotlyjs=False, config=config)
    return html


def _dtick(count: int) -> int | None:
    """Choose the distance of ticks at whole numbers; of many the plot chooses it."""
    return 1 if count <= MAX_TICKS else None


def _star(figure: Figure, x: Any, y: float) -> None:
    marker = {"symbol": "star", "size": 15, "color": BEST}
    figure.add_trace(Scatter(x=[x], y=[y], mode="markers", name="best", marker=marker, showlegend=False))


def _pareto(view: optuna.Study, labels: list[str]) -> Chart:
    figure = visualization.plot_pareto_front(view, target_names=labels)
    for trace, color in zip(figure.data, (PRUNED, BEST), strict=True):
        trace.marker = {"color": color, "size": 9 if len(labels) == 2 else 5}
    scores = zip(*(trial.values for trial in ranked(view)), strict=True)
    spans = zip("xyz", map(_span, scores, view.directions), strict=False)
    scene = "" if len(labels) == 2 else "scene_"
    layout = {f"{scene}{axis}axis_range": span for axis, span in spans}
    caption = "Of the orange trials no other is better in every objective: choose among them."
    return Chart("Trade-off", caption, [_html(figure, 420, **layout)])


def _history(view: optuna.Study, label: str, span: list[float]) -> Chart:
    figure = visualization.plot_optimization_history(view, target_name=label)
    figure.data[0].update(name="complete", marker={"color": COMPLETE, "size": 7})
    figure.data[1].update(name="best so far", line={"color": COMPLETE, "shape": "hv"})
    worst = span[0] if view.direction == StudyDirection.MAXIMIZE else span[1]
    for state, color, symbol in ((TrialState.PRUNED, PRUNED, "x"), (TrialState.FAIL, FAIL, "triangle-up")):
        if trials := view.get_trials(deepcopy=False, states=[state]):
            scores = [float(np.clip((*last_score(trial), worst)[0], *span)) for trial in trials]
            numbers, name = [trial.number for trial in trials], state.name.lower()
            marker = {"color": color, "symbol": symbol, "size": 8}
            figure.add_trace(Scatter(x=numbers, y=scores, mode="markers", name=name, marker=marker, cliponaxis=False))
    for best in ranked(view)[:1]:
        _star(figure, best.number, best.values[0])
    caption = "Each mark is a trial; the star is the best. Pruned trials show their last score, failed ones stand at the edge."
    layout = {"xaxis_title": "trial", "xaxis_dtick": _dtick(len(view.trials)), "yaxis_range": span, "margin_t": 36}
    return Chart("History", caption, [_html(figure, 380, **layout)])


def _importance(study: optuna.Study, settings: Settings, objective: int) -> Chart:
    # With a target, the evaluator asks what makes it low.
    sign = -1 if study.directions[objective] == StudyDirection.MAXIMIZE else 1
    shares = get_param_importances(study, target=lambda trial: sign * trial.values[objective])
    names, sums = short_names(settings.space), dict.fromkeys(settings.space, 0.0)
    for name, share in shares.items():  # model.channels.length and model.channels.0 are parts of model.channels
        key = name if name in sums else name.rpartition(".")[0]
        sums[key] += share
    keys = sorted(sums, key=lambda key: sums[key])
    percent = [100 * sums[key] for key in keys]
    texts = [f"{share:.0f} %" for share in percent]
    figure = Figure(Bar(x=percent, y=[names[key] for key in keys], text=texts, orientation="h", marker_color=COMPLETE))
    figure.update_traces(textposition="outside", cliponaxis=False, hoverinfo="skip")
    caption = "How much each key matters for a trial to be among the best; the shares sum to 100 %."
    height = 100 + 32 * len(keys)
    return Chart("Importance", caption, [_html(figure, height, xaxis_title="share (%)", xaxis_range=[0, 110])])


def _parallel(view: optuna.Study, label: str, span: list[float]) -> Chart:
    few = optuna.create_study(direction=view.direction)
    few.add_trials([trial for trial in ranked(view) if span[0] <= trial.values[0] <= span[1]][:MAX_LINES])
    figure = visualization.plot_parallel_coordinate(few, target_name=label)
    is_better_low = view.direction == StudyDirection.MINIMIZE
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    figure.data = sorted(lines, key=lambda line: line.y[0], reverse=is_better_low)  # the best is drawn last
    for line, shade in zip(figure.data, sample_colorscale(SHADES, np.linspace(0, 1, len(lines))), strict=True):
        line.line = {"color": shade, "width": 1.5}
    figure.data[-1].update(line={"color": BEST, "width": 3}, opacity=1)
    caption = f"Each line is one of the best {len(lines)} trials, the bluer the better; the best of all is orange."
    axes = figure.layout.xaxis.tickvals
    notes = [[note for note in figure.layout.annotations if note.x == axis] for axis in axes]
    figure.layout.annotations = [note for on_axis in notes for note in on_axis[:: 1 + len(on_axis) // MAX_TICKS]]
    figure.update_annotations({"text": ABSENT}, selector={"text": "None"})
    layout = {"xaxis_range": [-0.5, len(axes) - 0.7]}
    return Chart("Combinations", caption, [_html(figure, 420, **layout)], min_width=8 * len(axes))


def _slices(view: optuna.Study, label: str, span: list[float]) -> Chart:
    trials, figures = ranked(view), []
    best = trials[0]
    for name in dict.fromkeys(name for trial in trials for name in trial.params):
        figure = visualization.plot_slice(view, params=[name], target_name=label)
        marker = {"colorscale": SHADES, "showscale": False, "size": 7, "line": {"width": 0}}
        figure.update_traces(marker=marker, hovertemplate="%{x}: %{y}<extra></extra>")
        is_text = figure.layout.xaxis.type == "category"
        if figure.layout.xaxis.type == "log":
            figure.update_xaxes(nticks=5)
        if is_text:
            categories = figure.layout.xaxis.categoryarray
            some = categories[:: 1 + len(categories) // MAX_TICKS]
            figure.update_xaxes(tickvals=some, ticktext=[text.strip("'") for text in some])
        if name in best.params:
            _star(figure, repr(best.params[name]) if is_text else best.params[name], best.values[0])
        figures.append(_html(figure, 280, yaxis_range=span))
    caption = (
        "Each dot is a complete trial, the bluer the later; the star is the best. Blue dots show where the search went."
    )
    return Chart("Key by key", caption, figures)


def _learning_curves(view: optuna.Study, label: str, span: list[float]) -> Chart:
    figure = visualization.plot_intermediate_values(view)
    sign = 1 if view.direction == StudyDirection.MAXIMIZE else -1
    pruned = {f"Trial{trial.number}" for trial in view.get_trials(deepcopy=False, states=[TrialState.PRUNED])}
    for line in figure.data:
        color = PRUNED if line.name in pruned else COMPLETE
        line.update(marker={"size": 4, "color": color}, line={"width": 1.5, "color": color}, opacity=0.6)
    best = [f"Trial{trial.number}" for trial in ranked(view)[:1]]
    figure.data = sorted(figure.data, key=lambda line: (line.name in best, sign * line.y[-1]))[-MAX_LINES:]
    if best:
        figure.data[-1].update(marker={"color": BEST}, line={"color": BEST, "width": 3}, opacity=1)
    caption = (
        f"Each line is one of the best {len(figure.data)} trials, from where it enters the range that matters: "
        "the best orange, pruned ones grey."
    )
    layout = {"xaxis_title": "validation, counted from 0", "yaxis_title": label, "yaxis_range": span}
    dtick = _dtick(max(len(line.x) for line in figure.data))
    return Chart("Learning curves", caption, [_html(figure, 380, **layout, xaxis_dtick=dtick)])


def _timeline(view: optuna.Study) -> Chart:
    figure = visualization.plot_timeline(view)
    colors = {"COMPLETE": COMPLETE, "PRUNED": PRUNED, "FAIL": FAIL}
    for bars in figure.data:
        bars.update(name=bars.name.lower(), marker={"color": colors.get(bars.name, BEST), "line": {"width": 0}})
    layout = {"xaxis_title": None, "yaxis_title": "trial", "yaxis_dtick": _dtick(len(view.trials)), "margin_t": 36}
    caption = "Each bar is a trial; those above each other ran at the same time."
    return Chart("Timeline", caption, [_html(figure, 340, **layout)])
