"""The report of a search: Optuna's plots and all trials on one page that loads nothing from elsewhere."""

import warnings
from collections import Counter, defaultdict
from pathlib import Path

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from plotly.offline import get_plotlyjs

from mnist_lit.formatting import short_names
from mnist_lit.reports.template import render
from mnist_lit.search.plots import draw_plots, last_score, params_of
from mnist_lit.search.settings import Settings
from mnist_lit.search.study import ranked
from mnist_lit.training.run_dir import write_text

__all__ = ["write_report"]

UNRANKED = (TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING)


def write_report(study: optuna.Study, settings: Settings) -> Path:
    """Write `report/index.html` into the directory of a study.

    Args:
        study: Its trials may have the user attributes `params`, `seconds`, `error` and `duplicate_of`.
        settings: What was searched.

    Returns:
        The file.
    """
    order = ranked(study)
    trials = order + [trial for state in UNRANKED for trial in study.get_trials(deepcopy=False, states=[state])]
    best = [_best(order, place, direction) for place, direction in enumerate(study.directions if order else [])]
    confirmed = defaultdict(list)  # the scores of trials that were trained again with new seeds
    for name, score in study.user_attrs.items():
        if name.startswith("confirmed/"):
            confirmed[int(name.split("/")[1])].append(score)
    with warnings.catch_warnings(action="ignore"):  # that trials are few, or constant
        plots = list(draw_plots(study, settings))
    page = render(
        "search/report.html.jinja",
        settings=settings,
        names=short_names(settings.space),
        trials=trials,
        params={trial.number: params_of(trial) for trial in trials},
        scores={trial.number: trial.values or last_score(trial) for trial in trials},
        counts=Counter(trial.state.name.lower() for trial in trials),
        best=best,
        front=sorted(trial.number for trial in (study.best_trials if len(best) > 1 else best)),
        confirmed=confirmed,
        plots=plots,
        plotly=get_plotlyjs(),
    )
    file = settings.folder / "report" / "index.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, page)
    return file


def _best(order: list[FrozenTrial], place: int, direction: StudyDirection) -> FrozenTrial:
    choose = max if direction == StudyDirection.MAXIMIZE else min
    return choose(order, key=lambda trial: trial.values[place])
