"""Results of a search: trials.csv, best.yaml, and a table for the console."""

import csv
import io
import json
import shlex
import shutil
import statistics

import optuna
import yaml
from optuna.trial import FrozenTrial, TrialState

from mnist_lit.command_line import program_name
from mnist_lit.formatting import format_score, format_table, format_value, nested, short_names
from mnist_lit.search.settings import Settings
from mnist_lit.search.study import counted, ranked
from mnist_lit.search.worker import Result
from mnist_lit.training.run_dir import write_text

NUM_CHECKPOINTS = 3  # trials whose checkpoints are kept


def write_results(study: optuna.Study, settings: Settings) -> None:
    """Write trials.csv and best.yaml, and delete what is not needed any more of the other trials."""
    finished, best = [trial for trial in counted(study) if trial.state.is_finished()], ranked(study)
    write_text(settings.folder / "trials.csv", _csv(finished, settings))
    if best:
        number, overrides = best[0].number, dict(best[0].user_attrs["overrides"])
        scores = ", ".join(f"{name} {score!r}" for name, score in zip(settings.metrics, best[0].values, strict=True))
        command = f"{fit_command(settings)} --num_threads {overrides.pop('num_threads')}"
        lines = [
            f"# Trial {number}, the best of {len(finished)} trials of the study {settings.study_name}: {scores}",
            f"# {command} repeats the score to the last digit",
            "# It holds the overrides of the search, too, such as its trainer.max_epochs",
            yaml.safe_dump(nested(overrides), sort_keys=False),
        ]
        write_text(settings.folder / "best.yaml", "\n".join(lines))
    kept, numbers = {trial.number for trial in best[:NUM_CHECKPOINTS]}, {trial.number for trial in finished}
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished() and trial.number not in kept:
            folder = settings.run_dir(trial.number)
            # A trial that was retried has left a part of a run.
            shutil.rmtree(folder / "checkpoints" if trial.number in numbers else folder, ignore_errors=True)


def format_results(study: optuna.Study, settings: Settings) -> str:
    """Format the ten best trials, and those that were trained again, for the console."""
    names = short_names([*settings.metrics, *settings.space])
    rows = [["trial", *settings.metrics, *(names[key] for key in settings.space), "seconds"]]
    for trial in ranked(study)[:10]:
        scores = [format_score(metric, score) for metric, score in zip(settings.metrics, trial.values, strict=True)]
        params = trial.user_attrs["params"]
        values = [format_value(params[key]) if key in params else "" for key in settings.space]
        rows.append([str(trial.number), *scores, *values, f"{trial.user_attrs.get('seconds', 0):.1f}"])
    lines, metric, trials = [format_table(rows)], settings.metrics[0], study.get_trials(deepcopy=False)
    for number, by_seed in study.user_attrs.get("confirmed", {}).items():
        first, new = trials[int(number)].values[0], list(by_seed.values())
        deviation = f" ± {format_score(metric, statistics.stdev(new))}" if len(new) > 1 else ""
        text = f"{format_score(metric, first)} in the search, {format_score(metric, statistics.mean(new))}"
        lines.append(f"trial {number}: {metric} {text}{deviation} with {len(new)} other seeds")
    return "\n".join(lines)


def format_outcome(settings: Settings, result: Result) -> str:
    """Format how a training has ended: the score for each objective and its time, or what went wrong."""
    if not result.values:
        return "pruned" if result.state == TrialState.PRUNED else f"failed: {result.error}"
    pairs = zip(settings.metrics, result.values, strict=True)
    scores = [f"{metric} {format_score(metric, score)}" for metric, score in pairs]
    return f"{', '.join(scores)}, {result.seconds:.1f} s"


def _csv(trials: list[FrozenTrial], settings: Settings) -> str:
    file = io.StringIO()
    names = ["number", "state", *settings.metrics, *settings.space, "seconds", "run_dir", "error"]
    writer = csv.DictWriter(file, list(dict.fromkeys(names)), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for trial in trials:
        run_dir = settings.run_dir(trial.user_attrs.get("duplicate_of", trial.number))
        row = {"number": trial.number, "state": trial.state.name, **trial.user_attrs, "run_dir": run_dir}
        for key, value in trial.user_attrs.get("params", {}).items():
            row[key] = value if isinstance(value, int | float | str) else json.dumps(value)
        if trial.state == TrialState.COMPLETE:  # a pruned one has its last value
            row |= zip(settings.metrics, trial.values, strict=True)
        writer.writerow(row)
    return file.getvalue()


def fit_command(settings: Settings) -> str:
    """Return the command that trains the best trial again."""
    configs = [*settings.configs, str(settings.folder / "best.yaml")]
    return f"{program_name()} fit {' '.join(f'--config {shlex.quote(config)}' for config in configs)}"
