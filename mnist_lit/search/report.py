"""The report of a search: plots and all trials on one page that loads nothing from elsewhere."""

import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import plot_intermediate_values, plot_optimization_history, plot_pareto_front
from plotly.graph_objects import Bar, Figure, Scatter
from plotly.offline import get_plotlyjs

from mnist_lit.formatting import format_score, format_value, short_names
from mnist_lit.reports.template import render
from mnist_lit.search.settings import Settings
from mnist_lit.search.study import ranked, sign_of
from mnist_lit.training.run_dir import write_text

MAX_LINES = 100  # a browser takes seconds for more, and nobody can tell them apart


def write_report(study: optuna.Study, settings: Settings) -> Path:
    """Write `report/index.html` into the directory of a study, and return its path."""
    order, trials = ranked(study), study.get_trials(deepcopy=False)
    ranks = {trial.number: rank for rank, trial in enumerate(order)}
    with warnings.catch_warnings(action="ignore"):  # that trials are few, or constant
        plots = {metric: _draw(study, settings, index) for index, metric in enumerate(settings.metrics)}
        if order and len(settings.metrics) in (2, 3):
            plots = {"": {"pareto": [_pareto(study, settings)]}, **plots}
    page = render(
        "search/report.html.jinja",
        settings=settings,
        names=short_names(settings.space),
        order=order,
        trials=sorted(trials, key=lambda trial: ranks.get(trial.number, len(ranks))),
        front=sorted(trial.number for trial in (study.best_trials if len(settings.metrics) > 1 else order[:1])),
        confirmed=study.user_attrs.get("confirmed", {}),
        plots=plots,
        plotly=get_plotlyjs(),
    )
    (settings.folder / "report").mkdir(parents=True, exist_ok=True)
    write_text(file := settings.folder / "report" / "index.html", page)
    return file


def _draw(study: optuna.Study, settings: Settings, index: int) -> dict[str, list[Figure]]:
    """Draw what the trials allow of one objective: figures by the kind of plot."""
    sign, trials = sign_of(study, index), study.get_trials(deepcopy=False)
    complete = sorted(ranked(study), key=lambda trial: -sign * trial.values[index])  # the best first
    scores = [trial.values[index] for trial in complete] or [score for trial in trials for score in trial.values or []]
    if not scores:
        return {}
    axis = _axis(settings.metrics[index], scores, sign)
    plots = {"history": [_history(study, index, axis, complete[:1])]}
    if any(len(trial.intermediate_values) > 1 for trial in trials):
        plots["curves"] = [_curves(study, complete[:1])]
    keys = {key for trial in complete for key in trial.user_attrs["params"]} if len(complete) > 1 else ()
    plots["slices"] = [_slice(complete, index, key, settings) for key in settings.space if key in keys]
    for figure in chain(*plots.values()):
        figure.update_yaxes(axis)
    if len(set(scores)) > 3 and keys:  # with fewer different ones it would be chance
        plots["importance"] = [_importance(study, index, settings)]
    return plots


def _axis(metric: str, scores: list[float], sign: int) -> dict[str, Any]:
    """Choose title, unit and range; far worse scores, beyond the whisker of a box plot, are left out."""
    scores = [score for score in scores if np.isfinite(score)] or [0.0]
    low, high = np.quantile(np.multiply(sign, scores), [0.25, 0.75])
    near = [score for score in scores if sign * score >= low - 1.5 * (high - low)]
    margin = 0.08 * (max(near) - min(near)) or 0.01 * abs(near[0]) or 1
    tick_format = ".2~%" if format_score(metric, 0.0).endswith("%") else ""
    return {"title": metric, "range": [min(near) - margin, max(near) + margin], "tickformat": tick_format}


def _pareto(study: optuna.Study, settings: Settings) -> Figure:
    figure, axes = plot_pareto_front(study), {}
    for trace, name in zip(figure.data, ("trial", "front"), strict=True):
        # Optuna's text is a whole trial as JSON, its colors are the numbers.
        trace.update(meta=name, text=[f"trial {number}" for number in trace.marker.color], marker_color=None)
    for index, (metric, letter) in enumerate(zip(settings.metrics, "xyz", strict=False)):
        axes[f"{letter}axis"] = _axis(metric, [trial.values[index] for trial in ranked(study)], sign_of(study, index))
    return figure.update_layout(axes if len(axes) == 2 else {"scene": axes})


def _history(study: optuna.Study, index: int, axis: dict[str, Any], best: list[FrozenTrial]) -> Figure:
    # With a target, which several objectives need, Optuna draws no line of the best so far.
    target = (lambda trial: trial.values[index]) if len(study.directions) > 1 else None
    figure, (low, high) = plot_optimization_history(study, target=target), axis["range"]
    figure.update_traces(name="complete", selector={"mode": "markers"})
    for state in (TrialState.PRUNED, TrialState.FAIL):
        trials = study.get_trials(deepcopy=False, states=[state])
        scores = [(trial.values or [-np.inf * sign_of(study, index)])[0] for trial in trials]
        figure.add_scatter(x=[trial.number for trial in trials], y=np.clip(scores, low, high).tolist(), mode="markers")
        figure.data[-1].update(name=state.name.lower(), cliponaxis=False)
    for trial in best:
        figure.add_scatter(x=[trial.number], y=[trial.values[index]], name="best")
    return figure


def _curves(study: optuna.Study, best: list[FrozenTrial]) -> Figure:
    figure, sign = plot_intermediate_values(study), sign_of(study, 0)
    kinds = {f"Trial{trial.number}": trial.state.name.lower() for trial in study.get_trials(deepcopy=False)}
    kinds |= {f"Trial{trial.number}": "front" for trial in best}
    # The best is drawn last, over the others.
    figure.data = sorted(figure.data, key=lambda line: (kinds[line.name] == "front", sign * line.y[-1]))[-MAX_LINES:]
    for line in figure.data:
        line.update(meta=kinds[line.name], marker_size=4)
    return figure


def _slice(trials: list[FrozenTrial], index: int, key: str, settings: Settings) -> Figure:
    # To Optuna's plot_slice, each part of a list is a parameter of its own.
    space, drawn = settings.space[key], [trial for trial in trials if key in trial.user_attrs["params"]]
    x, y = [trial.user_attrs["params"][key] for trial in drawn], [trial.values[index] for trial in drawn]
    axis: dict[str, Any] = {"title": short_names(settings.space)[key], "type": "log" if space.get("log") else "linear"}
    if "low" not in space:
        x = [format_value(value) for value in x]
        order = sorted(set(x), key=lambda text: (text.count(","), len(text), text))  # short lists and small numbers
        axis |= {"type": "category", "categoryarray": order, "nticks": 12}
    numbers = [trial.number for trial in drawn]
    marks = Scatter(x=x, y=y, text=numbers, mode="markers", marker_color=numbers, name="trial")
    figure = Figure(marks, {"xaxis": axis})
    return figure.add_scatter(x=x[:1], y=y[:1], name="best") if drawn[0] is trials[0] else figure


def _importance(study: optuna.Study, index: int, settings: Settings) -> Figure:
    sums, sign = dict.fromkeys(settings.space, 0.0), sign_of(study, index)
    # With a target, Optuna asks what makes it low.
    shares = optuna.importance.get_param_importances(study, target=lambda trial: -sign * trial.values[index])
    for name, share in shares.items():  # model.channels.length and model.channels.0 are parts of model.channels
        sums[name if name in sums else name.rpartition(".")[0]] += share
    names, keys = short_names(sums), sorted(sums, key=lambda key: sums[key])
    bars = Bar(x=[sums[key] for key in keys], y=[names[key] for key in keys], orientation="h", name="complete")
    bars.update(texttemplate="%{x:.0%}", textposition="outside", cliponaxis=False)
    return Figure(bars, {"xaxis": {"title": "share", "tickformat": ".0%", "range": [0, 1.1]}})
