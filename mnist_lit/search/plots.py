"""Optuna's plots of a study: one axis for each key of the space, accuracies in per cent, the best trial marked."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import optuna
from optuna import visualization
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.importance import get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from plotly.colors import sample_colorscale
from plotly.graph_objects import Bar, Figure

from mnist_lit.formatting import format_score, format_value, short_names
from mnist_lit.search.settings import Settings
from mnist_lit.search.study import ranked

__all__ = ["draw_plots", "last_score", "params_of"]

MAX_LINES = 100  # a browser takes seconds for more, and nobody can tell them apart
MAX_TICKS = 12
MIN_SCORES = 4  # with fewer different ones the importance of keys is chance
BEST, COMPLETE, PRUNED, FAIL = "#e8590c", "#2f7fd6", "#8b96a1", "#d6336c"  # legible on white and on black
SHADES = ["#a9b4bf", COMPLETE]


def draw_plots(study: optuna.Study, settings: Settings) -> Iterator[tuple[str, str, list[Figure]]]:
    """Draw what a study has trials for.

    Yields:
        The kind of a plot, the metric that it shows if it is of one, and its figures.
    """
    labels = [f"{metric} (%)" if _scale(metric) > 1 else metric for metric in settings.metrics]
    if len(labels) in (2, 3) and ranked(study):
        yield "pareto", "", [_pareto(_view(study, settings, range(len(labels))), labels)]
    for place, (metric, label) in enumerate(zip(settings.metrics, labels, strict=True)):
        view = _view(study, settings, [place])
        trials, complete = view.get_trials(deepcopy=False), ranked(view)
        scores = [trial.values[0] for trial in complete] or [score for trial in trials for score in last_score(trial)]
        span = _span(scores, view.direction) if scores else []
        names = list(dict.fromkeys(name for trial in complete for name in trial.params))
        if scores:
            yield "history", metric, [_history(view, label, span)]
        if any(len(trial.intermediate_values) > 1 for trial in trials):
            yield "curves", metric, [_learning_curves(view, label, span)]
        if len(set(scores)) >= MIN_SCORES and names:
            yield "importance", metric, [_importance(study, settings, place)]
        if len(complete) > 1 and names:
            yield "slices", metric, [_slice(view, name, label, span) for name in names]
            yield "parallel", metric, [_parallel(view, label, span)]


def params_of(trial: FrozenTrial) -> dict[str, Any]:
    """Return the values of the space's keys; lists are whole."""
    params: dict[str, Any] = trial.user_attrs.get("params", trial.params)
    return params


def last_score(trial: FrozenTrial) -> list[float]:
    """Return the last intermediate value, if there is one."""
    return [trial.intermediate_values[step] for step in sorted(trial.intermediate_values)[-1:]]


# ---- The trials as the plots show them


def _view(study: optuna.Study, settings: Settings, objectives: Sequence[int]) -> optuna.Study:
    view = optuna.create_study(directions=[study.directions[place] for place in objectives])
    scales = {place: _scale(settings.metrics[place]) for place in objectives}
    names, distributions = short_names(settings.space), _distributions(study, settings)
    for trial in study.get_trials(deepcopy=False):
        shown, params = copy.copy(trial), params_of(trial)
        shown.distributions = {names[key]: distributions[key] for key in distributions if key in params}
        shown.params = {
            names[key]: format_value(params[key]) if _is_choice(distributions[key]) else trial.params[key]
            for key in distributions
            if key in params
        }
        if trial.values:
            shown.values = [trial.values[place] * scale for place, scale in scales.items()]
        shown.intermediate_values = {
            step: value * scales[objectives[0]] for step, value in trial.intermediate_values.items()
        }
        shown.user_attrs = {}
        view.add_trial(shown)
    return view


def _distributions(study: optuna.Study, settings: Settings) -> dict[str, BaseDistribution]:
    """Keep those of numbers; of anything else, as lists are, make a choice of texts."""
    distributions: dict[str, BaseDistribution] = {}
    trials = study.get_trials(deepcopy=False)
    for key in settings.space:
        drawn = [trial.distributions[key] for trial in trials if key in trial.distributions]
        texts = {format_value(params_of(trial)[key]) for trial in trials if key in params_of(trial)}
        if drawn and not _is_choice(drawn[0]):
            distributions[key] = drawn[0]
        elif texts:  # short lists and small numbers come first
            choices = sorted(texts, key=lambda text: (text.count(","), len(text), text))
            distributions[key] = CategoricalDistribution(choices)
    return distributions


def _is_choice(distribution: BaseDistribution) -> bool:
    return isinstance(distribution, CategoricalDistribution)


def _scale(metric: str) -> int:
    return 100 if format_score(metric, 0.0).endswith("%") else 1


def _span(scores: Sequence[float], direction: StudyDirection) -> list[float]:
    """Choose the range of an axis; far worse scores, beyond the whisker of a box plot, are left out."""
    sign = 1 if direction == StudyDirection.MAXIMIZE else -1
    scores = [score for score in scores if np.isfinite(score)] or [0.0]
    low, high = np.quantile(np.multiply(sign, scores), [0.25, 0.75])
    near = [score for score in scores if sign * score >= low - 1.5 * (high - low)]
    margin = 0.08 * (max(near) - min(near)) or 0.01 * abs(near[0]) or 1
    return [min(near) - margin, max(near) + margin]


# ---- The plots


def _pareto(view: optuna.Study, labels: list[str]) -> Figure:
    figure = visualization.plot_pareto_front(view, target_names=labels)
    for trace, color in zip(figure.data, (PRUNED, BEST), strict=True):
        trace.marker = {"color": color, "size": 9 if len(labels) == 2 else 5}
    scene = "" if len(labels) == 2 else "scene_"
    scores = zip(*(trial.values for trial in ranked(view)), strict=True)
    for axis, of_objective, direction in zip("xyz", scores, view.directions, strict=False):
        figure.update_layout({f"{scene}{axis}axis_range": _span(of_objective, direction)})
    return figure


def _history(view: optuna.Study, label: str, span: list[float]) -> Figure:
    figure = visualization.plot_optimization_history(view, target_name=label)
    line = {"name": "best so far", "line": {"color": COMPLETE, "shape": "hv"}}
    for trace, style in zip(figure.data, ({"name": "complete", "marker_color": COMPLETE}, line), strict=False):
        trace.update(style)
    worst = span[0] if view.direction == StudyDirection.MAXIMIZE else span[1]
    for state, color, symbol in ((TrialState.PRUNED, PRUNED, "x"), (TrialState.FAIL, FAIL, "triangle-up")):
        trials = view.get_trials(deepcopy=False, states=[state])
        scores = [min(max((*last_score(trial), worst)[0], span[0]), span[1]) for trial in trials]
        marker = {"color": color, "symbol": symbol}
        numbers, name = [trial.number for trial in trials], state.name.lower()
        figure.add_scatter(x=numbers, y=scores, mode="markers", name=name, marker=marker, cliponaxis=False)
    for best in ranked(view)[:1]:
        _mark_best(figure, best.number, best)
    return figure.update_layout(xaxis_title="trial", yaxis_range=span)


def _mark_best(figure: Figure, x: Any, best: FrozenTrial) -> None:
    marker = {"symbol": "star", "size": 15, "color": BEST}
    figure.add_scatter(x=[x], y=best.values, mode="markers", name="best", marker=marker, showlegend=False)


def _importance(study: optuna.Study, settings: Settings, place: int) -> Figure:
    # With a target, Optuna asks what makes it low.
    sign = -1 if study.directions[place] == StudyDirection.MAXIMIZE else 1
    shares = get_param_importances(study, target=lambda trial: sign * trial.values[place])
    sums = dict.fromkeys(settings.space, 0.0)
    for name, share in shares.items():  # model.channels.length and model.channels.0 are parts of model.channels
        sums[name if name in sums else name.rpartition(".")[0]] += 100 * share
    names, keys = short_names(sums), sorted(sums, key=lambda key: sums[key])
    texts = [f"{sums[key]:.0f} %" for key in keys]
    bars = Bar(x=[sums[key] for key in keys], y=[names[key] for key in keys], text=texts, orientation="h")
    bars.update(marker={"color": COMPLETE}, textposition="outside", cliponaxis=False, hoverinfo="skip")
    return Figure(bars, {"xaxis": {"title": "share (%)", "range": [0, 110]}})


def _parallel(view: optuna.Study, label: str, span: list[float]) -> Figure:
    few = optuna.create_study(direction=view.direction)
    few.add_trials([trial for trial in ranked(view) if span[0] <= trial.values[0] <= span[1]][:MAX_LINES])
    figure = visualization.plot_parallel_coordinate(few, target_name=label)
    # The best is drawn last, and the bar of colours goes.
    figure.data = [trace for trace in reversed(figure.data) if trace.mode == "lines"]
    for line, shade in zip(figure.data, sample_colorscale(SHADES, len(figure.data) + 1), strict=False):
        line.line.update(color=shade)
    figure.data[-1].update(line={"color": BEST, "width": 3}, opacity=1)
    axes = figure.layout.xaxis.tickvals
    notes = [[note for note in figure.layout.annotations if note.x == axis] for axis in axes]
    figure.layout.annotations = [note for on_axis in notes for note in on_axis[:: 1 + len(on_axis) // MAX_TICKS]]
    return figure.update_layout(xaxis_range=[-0.5, len(axes) - 0.7])


def _slice(view: optuna.Study, name: str, label: str, span: list[float]) -> Figure:
    figure, best = visualization.plot_slice(view, params=[name], target_name=label), ranked(view)[0]
    figure.update_traces(marker={"colorscale": SHADES, "showscale": False, "line": {"width": 0}}, name="trial")
    is_choice = figure.layout.xaxis.type == "category"
    if is_choice:
        choices = figure.layout.xaxis.categoryarray
        some = choices[:: 1 + len(choices) // MAX_TICKS]
        figure.update_xaxes(tickvals=some, ticktext=[text.strip("'") for text in some])
    if name in best.params:
        _mark_best(figure, repr(best.params[name]) if is_choice else best.params[name], best)
    return figure.update_layout(yaxis_range=span)


def _learning_curves(view: optuna.Study, label: str, span: list[float]) -> Figure:
    figure = visualization.plot_intermediate_values(view)
    sign = 1 if view.direction == StudyDirection.MAXIMIZE else -1
    pruned = [f"Trial{trial.number}" for trial in view.get_trials(deepcopy=False, states=[TrialState.PRUNED])]
    best = [f"Trial{trial.number}" for trial in ranked(view)[:1]]
    figure.data = sorted(figure.data, key=lambda line: (line.name in best, sign * line.y[-1]))[-MAX_LINES:]
    for line in figure.data:
        color = BEST if line.name in best else PRUNED if line.name in pruned else COMPLETE
        line.update(line={"color": color, "width": 3 if line.name in best else 1.5}, marker={"color": color, "size": 4})
    return figure.update_layout(xaxis_title="validation", yaxis_title=label, yaxis_range=span)
