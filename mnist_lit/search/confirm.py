"""Train the best trials again with other seeds."""

import pickle
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from optuna.trial import FrozenTrial
from tqdm import tqdm

from mnist_lit.search.check import trial_args, write_overlay
from mnist_lit.search.results import format_scores
from mnist_lit.search.settings import Settings
from mnist_lit.search.study import Study, ranked
from mnist_lit.search.worker import Base, Worker, train

__all__ = ["confirm"]


def confirm(
    settings: Settings, study: Study, base: Base, program: Callable[..., Any], workers: Sequence[Worker]
) -> None:
    """Train the best trials with the seeds after that of the search, and note their scores in the study.

    Args:
        settings: The settings of the search.
        study: The study.
        base: What its trials started from.
        program: The `main` that the workers run.
        workers: The workers.
    """
    if settings.confirm is None:
        return
    first_seed = base.config["seed_everything"] + 1
    seeds = range(first_seed, first_seed + settings.confirm.seeds)
    pairs = [(trial, seed) for trial in ranked(study)[: settings.confirm.top] for seed in seeds]
    todo = [(trial, seed) for trial, seed in pairs if f"confirmed/{trial.number}/{seed}" not in study.user_attrs]
    futures = {}
    for position, (trial, seed) in enumerate(todo):
        worker = workers[position % len(workers)]
        args = _args(settings, trial, seed)
        futures[worker.submit(train, program, args, settings.objectives, pickle.dumps(None))] = trial.number, seed
    with tqdm(total=len(todo), unit="confirmation", disable=None if todo else True, dynamic_ncols=True) as bar:
        for future in as_completed(futures):
            number, seed = futures[future]
            try:
                result = future.result()
                text = format_scores(settings, result.values) if result.values else f"failed: {result.error}"
                if result.values:
                    study.set_user_attr(f"confirmed/{number}/{seed}", result.values[0])
            except BrokenProcessPool:
                text = "failed: its worker died"
            bar.update()
            if bar.disable:
                print(f"trial {number} with seed {seed}: {text}", flush=True)


def _args(settings: Settings, trial: FrozenTrial, seed: int) -> list[str]:
    name = f"{trial.number:04d}_seed_{seed}"
    run_dir = settings.folder / "confirm" / name
    shutil.rmtree(run_dir, ignore_errors=True)  # what was stopped begins anew
    overlay = write_overlay(settings, name, {**trial.user_attrs["overrides"], "seed_everything": seed})
    return [*trial_args(settings, overlay), f"--run_dir={run_dir}"]
