"""The best trials, trained again with other seeds: the best of many noisy scores is optimistic."""

import shutil

from mnist_lit.progress import Progress
from mnist_lit.results import ranked, shown_score
from mnist_lit.settings import Settings
from mnist_lit.study import OVERLAY, Study
from mnist_lit.trial import Outcome, Rehearsed, training
from mnist_lit.workers import Pool, Report

__all__ = ["confirm"]


def confirm(settings: Settings, study: Study, base: Rehearsed, pool: Pool) -> None:
    """Train the best trials with the seeds that follow the search's; what has been done is not done again."""
    if settings.confirm is None:
        return
    seed, done = base.config["seed_everything"], study.confirmed()
    best = ranked(study)[: settings.confirm.top]
    pairs = [(trial, seed + shift) for trial in best for shift in range(1, settings.confirm.seeds + 1)]
    todo = [(trial, seed) for trial, seed in pairs if seed not in done.get(trial.number, {})]
    progress = Progress(len(todo), "confirmation")
    num_left = len(todo)
    while todo or pool.is_busy:
        for worker in pool.idle(settings.workers):
            if todo:
                trial, seed = todo.pop(0)
                name = f"confirm/{trial.number:04d}_seed_{seed}"
                shutil.rmtree(settings.folder / name, ignore_errors=True)
                overlay = {**trial.user_attrs[OVERLAY], "seed_everything": seed}
                worker.start(training(settings, overlay, name), (trial.number, seed))
        for worker, (number, seed), message in pool.messages(timeout=1.0):
            if isinstance(message, Report):
                worker.answer(is_hopeless=False)
                continue
            num_left -= 1
            how = "failed"
            if isinstance(message, Outcome) and message.scores:
                study.confirm(number, seed, message.scores[0])
                how = shown_score(settings.objectives[0].metric, message.scores[0])
            progress.say(f"trial {number} with seed {seed}: {how}")
        progress.show(progress.bar.total - num_left)
    progress.close()
