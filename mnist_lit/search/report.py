"""The report of a search: Optuna's plots and all trials on one page that loads nothing from elsewhere."""

from collections import Counter, defaultdict
from pathlib import Path

import optuna
from optuna.trial import TrialState
from plotly.offline import get_plotlyjs

from mnist_lit.formatting import short_names
from mnist_lit.reports.template import render
from mnist_lit.search.plots import draw_charts, last_score, params_of
from mnist_lit.search.settings import Settings
from mnist_lit.search.study import ranked
from mnist_lit.training.run_dir import write_text

__all__ = ["write_report"]

MAX_ROWS = 1000
STATES = (TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING)


def write_report(study: optuna.Study, settings: Settings) -> Path:
    """Write `report/index.html` into the directory of a study.

    Args:
        study: Its trials may have the user attributes `params`, `seconds`, `error` and `duplicate_of`.
        settings: What was searched.

    Returns:
        The file.
    """
    order = ranked(study)
    trials = order + [trial for state in STATES for trial in study.get_trials(deepcopy=False, states=[state])]
    front = study.best_trials if len(study.directions) > 1 else order[:1]
    best = [
        (max if objective.direction == "maximize" else min)(order, key=lambda trial, place=place: trial.values[place])
        for place, objective in enumerate(settings.objectives if order else [])
    ]
    counts = Counter(trial.state.name.lower() for trial in trials)
    page = render(
        "search/report.html.jinja",
        title=f"Search {study.study_name}",
        lead=", ".join(f"{objective.direction} {objective.metric}" for objective in settings.objectives),
        metrics=settings.metrics,
        names=short_names(settings.space),
        trials=trials,
        params={trial.number: params_of(trial) for trial in trials},
        scores={trial.number: trial.values or last_score(trial) for trial in trials},
        best=best,
        front=sorted(trial.number for trial in front),
        confirmed=_confirmed(study),
        counts=", ".join(f"{count} {state}" for state, count in counts.items()),
        charts=list(draw_charts(study, settings)),
        max_rows=MAX_ROWS,
        plotly=get_plotlyjs(),
    )
    file = settings.folder / "report" / "index.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, page)
    return file


def _confirmed(study: optuna.Study) -> dict[int, list[float]]:
    """Collect the scores of trials that were trained again with new seeds."""
    scores = defaultdict(list)
    for name, score in study.user_attrs.items():
        if name.startswith("confirmed/"):
            scores[int(name.split("/")[1])].append(score)
    return scores
