"""Results of a search: trials.csv, best.yaml, a table for the console, and the best trials with other seeds."""

import csv
import io
import itertools
import json
import shlex
import shutil
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import optuna
import yaml
from filelock import FileLock
from optuna.trial import FrozenTrial, TrialState

from mnist_lit.command_line import program_name
from mnist_lit.formatting import format_score, format_table, format_value, nested, short_names
from mnist_lit.search.check import trial_args
from mnist_lit.search.settings import Settings
from mnist_lit.search.study import counted, ranked
from mnist_lit.search.worker import Result, Worker, result_of, train
from mnist_lit.training.run_dir import write_text

NUM_SHOWN = 10


def write_results(study: optuna.Study, settings: Settings) -> None:
    """Write trials.csv and best.yaml, and delete what is not needed any more of the other trials."""
    finished, best = [trial for trial in counted(study) if trial.state.is_finished()], ranked(study)
    write_text(settings.folder / "trials.csv", _csv(finished, settings))
    if best:
        scores = ", ".join(f"{name} {score!r}" for name, score in zip(settings.metrics, best[0].values, strict=True))
        comment = f"Trial {best[0].number}, the best of {len(finished)} trials of the study {settings.study_name}"
        overrides = dict(best[0].user_attrs["overrides"])
        exact = f"--num_threads {overrides.pop('num_threads')} repeats the score to the last digit"
        note = f"It holds the overrides of the search, too, such as its trainer.max_epochs; {exact}"
        overlay = yaml.safe_dump(nested(overrides), sort_keys=False)
        text = f"# {comment}: {scores}\n# Train it again: {fit_command(settings)}\n# {note}\n{overlay}"
        write_text(settings.folder / "best.yaml", text)
    kept = {trial.number for trial in best[: settings.keep_checkpoints]}
    numbers = {trial.number for trial in finished}
    for trial in study.get_trials(deepcopy=False):
        if trial.state.is_finished() and trial.number not in kept:
            folder = settings.run_dir(trial.number)
            # A trial that was retried has left a part of a run.
            shutil.rmtree(folder / "checkpoints" if trial.number in numbers else folder, ignore_errors=True)


def confirm(
    settings: Settings, study: optuna.Study, seed: int, program: Callable[..., Any], workers: Sequence[Worker]
) -> None:
    """Train the best trials with the seeds after that of the search, and note their scores in the study."""
    if settings.confirm is None:
        return
    trials, seeds = ranked(study)[: settings.confirm.top], range(seed + 1, seed + 1 + settings.confirm.seeds)
    with FileLock(settings.folder / ".confirm.lock"):  # another machine may be training them in the same directory
        confirmed: dict[str, dict[str, float]] = study.user_attrs.get("confirmed", {})
        pairs = itertools.product(trials, map(str, seeds))
        missing = [
            (trial, new_seed) for trial, new_seed in pairs if new_seed not in confirmed.get(str(trial.number), {})
        ]
        while missing:
            futures: dict[tuple[str, str], Future[Result]] = {}
            # One training for each worker at a time: what waits behind another one is lost if their worker dies.
            for worker, (trial, new_seed) in zip(workers, missing, strict=False):
                run_dir = settings.folder / "confirm" / f"{trial.number:04d}_seed_{new_seed}"
                shutil.rmtree(run_dir, ignore_errors=True)  # of a start that was stopped
                overrides = {**trial.user_attrs["overrides"], "seed_everything": int(new_seed)}
                args = trial_args(settings, run_dir, overrides)
                futures[str(trial.number), new_seed] = worker.submit(train, program, args, settings.objectives)
            del missing[: len(futures)]
            for (number, new_seed), future in futures.items():
                result = result_of(future)
                if result.values:
                    confirmed.setdefault(number, {})[new_seed] = result.values[0]
                    study.set_user_attr("confirmed", confirmed)
                print(f"trial {number} with seed {new_seed}: {format_outcome(settings, result)}", flush=True)


def format_results(study: optuna.Study, settings: Settings) -> str:
    """Format the ten best trials, and those that were trained again, for the console."""
    names = short_names([*settings.metrics, *settings.space])
    rows = [["trial", *settings.metrics, *(names[key] for key in settings.space), "seconds"]]
    for trial in ranked(study)[:NUM_SHOWN]:
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
    """Format how a training has ended: the score for each objective, or what went wrong."""
    if not result.values:
        return "pruned" if result.state == TrialState.PRUNED else f"failed: {result.error}"
    pairs = zip(settings.metrics, result.values, strict=True)
    return ", ".join(f"{metric} {format_score(metric, score)}" for metric, score in pairs)


def _csv(trials: list[FrozenTrial], settings: Settings) -> str:
    file = io.StringIO()
    names = ["number", "state", *settings.metrics, *settings.space, "seconds", "run_dir", "error"]
    writer = csv.DictWriter(file, list(dict.fromkeys(names)), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for trial in trials:
        row = {"number": trial.number, "state": trial.state.name, **trial.user_attrs}
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
