"""Write what a search has found: trials.csv, best.yaml, and a table for the console."""

import csv
import io
import json
import shlex
import shutil
import statistics
from collections.abc import Sequence
from typing import Any

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from mnist_lit.formatting import escape_unprintable, format_score, format_value, short_names
from mnist_lit.search.settings import Settings
from mnist_lit.search.space import nested
from mnist_lit.search.study import counted, ranked
from mnist_lit.training.run_dir import write_text

__all__ = ["confirmation_lines", "format_scores", "format_trials", "write_results"]

NUM_SHOWN = 10


def write_results(study: optuna.Study, settings: Settings) -> None:
    """Write trials.csv and best.yaml, and delete what is not needed any more of the other trials."""
    finished, best = [trial for trial in counted(study) if trial.state.is_finished()], ranked(study)
    write_text(settings.folder / "trials.csv", _csv(finished, settings))
    if best:
        write_text(settings.folder / "best.yaml", _overlay(best[0], len(finished), settings))
    kept = {trial.number for trial in best[: settings.keep_checkpoints]}
    numbers = {trial.number for trial in finished}
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished() and trial.number not in kept:
            folder = settings.run_dir(trial.number)
            # A trial that was retried has left a part of a run.
            shutil.rmtree(folder / "checkpoints" if trial.number in numbers else folder, ignore_errors=True)


def format_trials(study: optuna.Study, settings: Settings) -> str:
    """Format the ten best trials as a table."""
    keys, names = list(settings.space), short_names([*settings.metrics, *settings.space])
    extra = [] if "seconds" in settings.metrics else ["seconds"]
    rows = [["trial", *settings.metrics, *(names[key] for key in keys), *extra]]
    for trial in ranked(study)[:NUM_SHOWN]:
        scores = [format_score(metric, score) for metric, score in zip(settings.metrics, trial.values, strict=True)]
        params = trial.user_attrs["params"]
        values = [escape_unprintable(format_value(params[key])) if key in params else "" for key in keys]
        rows.append([str(trial.number), *scores, *values, *(f"{trial.user_attrs.get(name, 0):.1f}" for name in extra)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def format_scores(settings: Settings, scores: Sequence[float]) -> str:
    """Format the score for each objective with its name."""
    pairs = zip(settings.metrics, scores, strict=True)
    return ", ".join(f"{metric} {format_score(metric, score)}" for metric, score in pairs)


def confirmation_lines(study: optuna.Study, settings: Settings) -> list[str]:
    """Format mean and deviation of the trials that were trained again with other seeds."""
    metric, lines = settings.metrics[0], []
    confirmed: dict[int, list[float]] = {}
    for name, score in study.user_attrs.items():
        if name.startswith("confirmed/"):
            confirmed.setdefault(int(name.split("/")[1]), []).append(score)
    for number, values in confirmed.items():
        deviation = f" ± {format_score(metric, statistics.stdev(values))}" if len(values) > 1 else ""
        first = format_score(metric, study.trials[number].values[0])
        mean = format_score(metric, statistics.mean(values))
        lines.append(
            f"trial {number}: {metric} {first} in the search, {mean}{deviation} with {len(values)} other seeds"
        )
    return lines


def _csv(trials: list[FrozenTrial], settings: Settings) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    extra = [] if "seconds" in settings.metrics else ["seconds"]
    writer.writerow(["number", "state", *settings.metrics, *settings.space, *extra, "run_dir", "error"])
    for trial in trials:
        attrs = trial.user_attrs
        scores = trial.values if trial.state == TrialState.COMPLETE else [""] * len(settings.metrics)
        params = [_cell(attrs.get("params", {}).get(key, "")) for key in settings.space]
        facts = [attrs.get(name, "") for name in (*extra, "run_dir", "error")]
        writer.writerow([trial.number, trial.state.name, *scores, *params, *facts])
    return file.getvalue()


def _cell(value: Any) -> Any:
    return value if isinstance(value, int | float | str) else json.dumps(value)


def _overlay(trial: FrozenTrial, num_trials: int, settings: Settings) -> str:
    scores = ", ".join(f"{metric} {score!r}" for metric, score in zip(settings.metrics, trial.values, strict=True))
    configs = " ".join(
        f"--config {shlex.quote(str(file))}" for file in [*settings.configs, settings.folder / "best.yaml"]
    )
    lines = [
        f"# Trial {trial.number}, the best of {num_trials} trials of the study {settings.study_name}: {scores}",
        f"# Train it again: python -m mnist_lit fit {configs}",
    ]
    return "\n".join([*lines, yaml.safe_dump(nested(trial.user_attrs["overrides"]), sort_keys=False)])
