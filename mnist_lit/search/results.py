"""What a search has found: trials.csv for programs, best.yaml for `fit`, a table for people."""

import csv
import functools
import io
import json
import shlex
import shutil
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import yaml
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mnist_lit.formatting import escape_unprintable
from mnist_lit.search.settings import Settings
from mnist_lit.search.space import Space, nested
from mnist_lit.search.study import COPY_OF, ERROR, LOST, OVERLAY, PARAMS, SECONDS, Study
from mnist_lit.training.run_dir import write_text

__all__ = [
    "Confirmation",
    "Entry",
    "Summary",
    "confirmations",
    "ranked",
    "shown_score",
    "summarize",
    "table",
    "write_results",
]

STATES: dict[TrialState, Literal["complete", "pruned", "failed"]] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
NUM_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One finished trial.

    Args:
        number: Its number in the study.
        state: How it ended.
        values: Its score for each objective; empty unless it is complete.
        params: The values of the space's keys that it was given; a key with an unmet condition is absent.
        steps: Its score at each validation, counted from 0; empty with several objectives.
        started: When it began (UTC).
        ended: When it ended (UTC).
        seconds: Seconds of training.
        error: Why it failed, in one line.
    """

    number: int
    state: Literal["complete", "pruned", "failed"]
    values: list[float]
    params: dict[str, Any]
    steps: dict[int, float]
    started: datetime
    ended: datetime
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """One of the best trials, trained again with other seeds.

    Args:
        number: The trial.
        scores: The first objective's score for each seed.
    """

    number: int
    scores: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything that a search's tables and pictures show.

    Args:
        study_name: Name of the study.
        metrics: Name of each objective's metric, for example `val/acc`.
        directions: `maximize` or `minimize`, for each.
        value: Whether a trial's score is that of its best or of its last epoch.
        entries: All finished trials by number.
        best: Numbers of the best trials: one, or with several objectives all of the Pareto front.
        importances: For each objective the share, 0 to 1, of its variation that each key of the space explains;
            empty when there are too few trials to tell.
        logarithmic: The keys of the space that are searched on a logarithmic scale.
        confirmations: The best trials, trained again with other seeds.
    """

    study_name: str
    metrics: list[str]
    directions: list[str]
    value: str
    entries: list[Entry]
    best: list[int]
    importances: list[dict[str, float]]
    logarithmic: list[str] = field(default_factory=list)
    confirmations: list[Confirmation] = field(default_factory=list)


def summarize(study: Study, settings: Settings, space: Space) -> Summary:
    """Everything that is known of a study."""
    return Summary(
        study_name=study.study_name,
        metrics=settings.metrics,
        directions=[objective.direction for objective in settings.objectives],
        value=settings.objectives[0].value,
        entries=[_entry(trial) for trial in study.finished()],
        best=[trial.number for trial in _best(study)],
        importances=_importances(study, list(space.kinds)),
        logarithmic=space.logarithmic(),
        confirmations=[Confirmation(number=number, scores=scores) for number, scores in study.confirmed().items()],
    )


def ranked(study: Study) -> list[FrozenTrial]:
    """The complete trials, the best first: with several objectives the Pareto front, then by the first objective."""
    front = {trial.number for trial in _best(study)}
    sign = -1 if study.directions[0] == StudyDirection.MAXIMIZE else 1
    complete = [trial for trial in study.finished() if trial.state == TrialState.COMPLETE]
    originals = [trial for trial in complete if COPY_OF not in trial.user_attrs]
    return sorted(originals, key=lambda trial: (trial.number not in front, sign * trial.values[0], trial.number))


def write_results(study: Study, settings: Settings) -> None:
    """Write trials.csv and best.yaml, and delete the checkpoints of all but the best trials."""
    order = ranked(study)
    write_text(settings.folder / "trials.csv", _csv(study, settings))
    if order:
        write_text(settings.folder / "best.yaml", _best_overlay(order[0], study, settings))
    kept = {trial.number for trial in order[: settings.keep_checkpoints]}
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished() and trial.number not in kept:
            shutil.rmtree(settings.run_dir(trial.number) / "checkpoints", ignore_errors=True)


def table(study: Study, settings: Settings) -> str:
    """The best trials, for the console."""
    keys = list(settings.space)
    metrics = settings.metrics
    facts = [] if SECONDS in metrics else [SECONDS]
    rows = [["trial", *metrics, *keys, *facts]]
    for trial in ranked(study)[:NUM_SHOWN]:
        params = trial.user_attrs.get(PARAMS, {})
        scores = [shown_score(metric, score) for metric, score in zip(metrics, trial.values, strict=True)]
        values = [_shown(params[key]) if key in params else "" for key in keys]
        rows.append([str(trial.number), *scores, *values, *(f"{trial.user_attrs.get(name, 0):.1f}" for name in facts)])
    # The last part of a key says enough, where it is the only one of that name.
    names = [key.rpartition(".")[2] for key in rows[0]]
    rows[0] = [name if names.count(name) == 1 else key for name, key in zip(names, rows[0], strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def confirmations(study: Study, settings: Settings) -> list[str]:
    """A line for each trial that was trained again with other seeds."""
    metric = settings.metrics[0]
    lines = []
    for number, scores in study.confirmed().items():
        values = list(scores.values())
        deviation = f" ± {shown_score(metric, statistics.stdev(values))}" if len(values) > 1 else ""
        first = study.trials[number].values[0]
        lines.append(
            f"trial {number}: {metric} {shown_score(metric, first)} in the search, "
            f"{shown_score(metric, statistics.mean(values))}{deviation} with {len(values)} other seeds"
        )
    return lines


def shown_score(metric: str, score: float) -> str:
    """A score as people read it: accuracies and their like in per cent."""
    if metric.endswith(("acc", "f1", "acc_best")):
        return f"{score:.2%}"
    return f"{score:,.0f}" if score.is_integer() and abs(score) >= 1 else f"{score:.5g}"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else escape_unprintable(str(value))


def _entry(trial: FrozenTrial) -> Entry:
    assert trial.datetime_start is not None
    assert trial.datetime_complete is not None
    state = STATES[trial.state]
    return Entry(
        number=trial.number,
        state=state,
        values=list(trial.values) if state == "complete" else [],
        params=trial.user_attrs.get(PARAMS, trial.params),
        steps=dict(trial.intermediate_values),
        # Optuna's have no time zone, but are local.
        started=trial.datetime_start.astimezone(UTC),
        ended=trial.datetime_complete.astimezone(UTC),
        seconds=trial.user_attrs.get(SECONDS, 0.0),
        error=trial.user_attrs.get(ERROR) or trial.user_attrs.get(LOST, ""),
    )


def _best(study: Study) -> list[FrozenTrial]:
    if len(study.directions) > 1:
        return study.best_trials
    try:
        return [study.best_trial]
    except ValueError:
        return []


def _importances(study: Study, keys: list[str]) -> list[dict[str, float]]:
    """For each objective and key; a list's length and items count together."""
    shares: list[dict[str, float]] = []
    for place, direction in enumerate(study.directions):
        # The evaluator asks what makes the target low.
        sign = -1 if direction == StudyDirection.MAXIMIZE else 1
        by_name = _shares(study, functools.partial(_target, place=place, sign=sign))
        of_key = {key: [by_name[name] for name in by_name if f"{name}.".startswith(f"{key}.")] for key in keys}
        shares.append({key: sum(parts) for key, parts in of_key.items() if parts})
    return shares


def _shares(study: Study, target: Callable[[FrozenTrial], float]) -> dict[str, float]:
    from optuna.importance import get_param_importances  # takes seconds

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that few trials tell little
        try:
            return get_param_importances(study, target=target)
        except (RuntimeError, ValueError):
            return {}


def _target(trial: FrozenTrial, *, place: int, sign: int) -> float:
    return sign * float(trial.values[place])


def _csv(study: Study, settings: Settings) -> str:
    metrics = settings.metrics
    keys = list(settings.space)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    facts = [] if SECONDS in metrics else [SECONDS]  # one column of a name
    writer.writerow(["number", "state", *metrics, *keys, *facts, "started", "ended", "run_dir", "error"])
    for trial in study.finished():
        entry = _entry(trial)
        scores: list[Any] = entry.values or [""] * len(metrics)
        values = [_cell(entry.params[key]) if key in entry.params else "" for key in keys]
        times = [entry.started.isoformat(timespec="seconds"), entry.ended.isoformat(timespec="seconds")]
        run_dir = settings.run_dir(trial.user_attrs.get(COPY_OF, trial.number))
        seconds = [entry.seconds] * len(facts)
        writer.writerow([entry.number, entry.state, *scores, *values, *seconds, *times, run_dir, entry.error])
    return file.getvalue()


def _cell(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else json.dumps(value)


def _best_overlay(trial: FrozenTrial, study: Study, settings: Settings) -> str:
    scores = ", ".join(f"{metric} {score!r}" for metric, score in zip(settings.metrics, trial.values, strict=True))
    assert trial.datetime_complete is not None
    configs = [*settings.configs, str(settings.folder / "best.yaml")]
    comment = [
        f"# The best of {len(study.finished())} trials of the study {study.study_name}: {scores}",
        f"# (trial {trial.number}, {trial.datetime_complete:%Y-%m-%d}). To train it again:",
        f"# python -m mnist_lit fit {' '.join(f'--config {shlex.quote(config)}' for config in configs)}",
    ]
    overlay = yaml.safe_dump(nested(trial.user_attrs[OVERLAY]), sort_keys=False)
    return "\n".join([*comment, overlay])
