"""The report of a search: Optuna's plots and all trials on one page that needs no other file and no network."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from optuna.visualization import (
    plot_intermediate_values,
    plot_optimization_history,
    plot_parallel_coordinate,
    plot_param_importances,
    plot_pareto_front,
    plot_slice,
    plot_timeline,
)
from plotly.graph_objects import Figure

from mnist_lit.formatting import format_score as score_text
from mnist_lit.formatting import format_value as text_of
from mnist_lit.formatting import short_names
from mnist_lit.search.settings import Settings
from mnist_lit.search.study import ranked
from mnist_lit.training.run_dir import write_text

__all__ = ["write_report"]

SLICES = 4  # side by side
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
h2 {{ margin: 2rem 0 0 }} .best {{ font-size: 2rem; font-weight: 700 }} .table {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: 14px }} td, th {{ padding: .2rem .6rem; text-align: right }}
tr:nth-child(even) {{ background: #f4f4f4 }} tr:first-child td {{ font-weight: 700 }}
</style></head><body><h1>{title}</h1><p>{facts}</p><p class="best">{best}</p>{figures}
<h2>All trials</h2><div class="table">{table}</div></body></html>"""


def write_report(study: optuna.Study, settings: Settings) -> Path:
    """Write report/index.html.

    Returns:
        The page.
    """
    metrics = [objective.metric for objective in settings.objectives]
    plotly, figures = True, []  # plotly itself is written once
    for heading, figure in _figures(study, settings, metrics):
        figure.update_layout(title=None, template="plotly_white", margin={"t": 40}, width=None)
        html = figure.to_html(full_html=False, include_plotlyjs=plotly, config={"displaylogo": False})
        figures.append((f"<h2>{escape(heading)}</h2>" if heading else "") + html)
        plotly = False
    states = [trial.state.name.lower() for trial in study.get_trials(deepcopy=False)]
    best = [(metric, trial.values[place]) for trial in ranked(study)[:1] for place, metric in enumerate(metrics)]
    page = PAGE.format(
        title=f"Search {escape(study.study_name)}",
        facts=f"{len(states)} trials: "
        + ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)),
        best=", ".join(f"{metric} {score_text(metric, value)}" for metric, value in best) or "no trial is complete",
        figures="".join(figures),
        table=_table(study, settings, metrics),
    )
    file = settings.folder / "report" / "index.html"
    file.parent.mkdir(exist_ok=True)
    write_text(file, page)
    return file


def _figures(study: optuna.Study, settings: Settings, metrics: list[str]) -> Iterator[tuple[str, Figure]]:
    joined = _joined(study, settings)
    names = list(dict.fromkeys(name for trial in joined.trials for name in trial.params))
    plots: list[tuple[str, Callable[..., Figure]]] = []
    if len(metrics) > 1:
        plots.append(("Trade-off", partial(plot_pareto_front, study, target_names=metrics)))
    for place, metric in enumerate(metrics):
        target = None if len(metrics) == 1 else partial(_value, place)
        kwargs: dict[str, Any] = {"target": target, "target_name": metric}
        plots.append((f"History: {metric}", partial(plot_optimization_history, study, **kwargs)))
        plots.append((f"Importance: {metric}", partial(plot_param_importances, study, **kwargs)))
        plots.append((f"Combinations: {metric}", partial(plot_parallel_coordinate, joined, **kwargs)))
        for first in range(0, len(names), SLICES):
            heading = "" if first else f"Key by key: {metric}"
            plots.append((heading, partial(plot_slice, joined, params=names[first : first + SLICES], **kwargs)))
    if len(metrics) == 1:
        plots.append((f"Learning curves: {metrics[0]}", partial(plot_intermediate_values, study)))
    plots.append(("Timeline", partial(plot_timeline, study)))
    for heading, plot in plots:
        with warnings.catch_warnings(action="ignore"):
            try:
                yield heading, plot()
            except (RuntimeError, ValueError):
                continue  # too few trials for it


def _value(place: int, trial: FrozenTrial) -> float:
    return trial.values[place]


def _params(trial: FrozenTrial, settings: Settings) -> dict[str, Any]:
    """The value of each key of the space: of a list all places together."""
    params: dict[str, Any] = {}
    for key in settings.space:
        places = [
            value for name, value in trial.params.items() if name.rpartition(".")[0] == key and name[-1].isdigit()
        ]
        if key in trial.params or f"{key}.length" in trial.params or places:
            params[key] = trial.params.get(key, places)
    return params


def _joined(study: optuna.Study, settings: Settings) -> optuna.Study:
    """The complete trials with one parameter for each key; Optuna's plots would show each place of a list as one."""
    names = short_names(settings.space)
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    rows = [
        {key: text_of(value) if isinstance(value, list) else value for key, value in _params(trial, settings).items()}
        for trial in trials
    ]
    joined = optuna.create_study(directions=study.directions)
    for trial, row in zip(trials, rows, strict=True):
        distributions: dict[str, BaseDistribution] = {}
        for key in row:
            texts = sorted(
                {str(other[key]) for other in rows if key in other}, key=lambda text: (text.count(","), text)
            )
            distributions[names[key]] = trial.distributions.get(key) or CategoricalDistribution(texts)
        params = {names[key]: value for key, value in row.items()}
        joined.add_trial(create_trial(values=trial.values, params=params, distributions=distributions))
    return joined


def _table(study: optuna.Study, settings: Settings, metrics: list[str]) -> str:
    rest = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.COMPLETE]
    rows = [["trial", "state", *metrics, *settings.space, "seconds", "error"]]
    for trial in [*ranked(study), *rest]:
        params = _params(trial, settings)
        values = [score_text(metric, value) for metric, value in zip(metrics, trial.values or [])] or [""] * len(
            metrics
        )
        seconds = f"{trial.duration.total_seconds():.1f}" if trial.duration else ""
        cells = [text_of(params[key]) if key in params else "" for key in settings.space]
        error = trial.user_attrs.get("error", "")
        rows.append([str(trial.number), trial.state.name.lower(), *values, *cells, seconds, error])
    head, *body = [[escape(cell) for cell in row] for row in rows]
    lines = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in body)
    return f"<table><thead><tr><th>{'</th><th>'.join(head)}</th></tr></thead><tbody>{lines}</tbody></table>"
