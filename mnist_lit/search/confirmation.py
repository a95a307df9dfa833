"""The best trials, trained again with other seeds: the best of many noisy scores is optimistic."""

import shutil

from optuna.trial import FrozenTrial

from mnist_lit.search.progress import Progress
from mnist_lit.search.results import ranked, shown_score
from mnist_lit.search.settings import Settings
from mnist_lit.search.study import OVERLAY, Study
from mnist_lit.search.trial import Outcome, Rehearsed, training
from mnist_lit.search.workers import Pool, Report, Worker

__all__ = ["confirm"]


def confirm(settings: Settings, study: Study, base: Rehearsed, pool: Pool) -> None:
    """Train the best trials with the seeds that follow the search's; what has been done is not done again."""
    if settings.confirm is None:
        return
    first_seed, done = base.config["seed_everything"] + 1, study.confirmed()
    seeds = range(first_seed, first_seed + settings.confirm.seeds)
    best = ranked(study)[: settings.confirm.top]
    todo = [(trial, seed) for trial in best for seed in seeds if seed not in done.get(trial.number, {})]
    num_left = total = len(todo)
    with Progress(total, "confirmation") as progress:
        while num_left:
            for worker in pool.idle(settings.workers):
                if todo:
                    _start(worker, settings, *todo.pop(0))
            for worker, (trial, seed), message in pool.messages(timeout=1.0):
                if isinstance(message, Report):
                    worker.answer(is_hopeless=False)
                    continue
                num_left -= 1
                how = "failed"
                if isinstance(message, Outcome) and message.scores:
                    study.confirm(trial.number, seed, message.scores[0])
                    how = shown_score(settings.objectives[0].metric, message.scores[0])
                progress.say(f"trial {trial.number} with seed {seed}: {how}")
            progress.show(total - num_left)


def _start(worker: Worker, settings: Settings, trial: FrozenTrial, seed: int) -> None:
    name = f"confirm/{trial.number:04d}_seed_{seed}"
    shutil.rmtree(settings.folder / name, ignore_errors=True)
    overlay = {**trial.user_attrs[OVERLAY], "seed_everything": seed}
    worker.start(training(settings, overlay, name), (trial, seed))
