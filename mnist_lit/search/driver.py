"""Drive a search from its command line to its report."""

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import ExperimentalWarning

from mnist_lit.errors import MNISTLitError, Stopped, UsageError
from mnist_lit.search.check import check
from mnist_lit.search.confirm import confirm
from mnist_lit.search.results import confirmation_lines, format_trials
from mnist_lit.search.runner import Runner
from mnist_lit.search.settings import Settings, parse
from mnist_lit.search.study import Study, open_study, ranked
from mnist_lit.search.worker import kill_workers, new_workers
from mnist_lit.training.run_dir import write_text

__all__ = ["search"]

# Keys in which two starts of a search may differ while its trials stay comparable.
COMPARABLE = ("run_dir", "ckpt_path", "test_after_fit", "num_threads", "csv", "report", "pictures")
COMPARABLE_DATA = ("data_dir", "download", "mirrors", "timeout", "num_workers", "pin_memory")


def search(args: Sequence[str], program: Callable[..., Any]) -> optuna.Study:
    """Search for the best configuration of `fit`.

    Args:
        args: The command line after `search`.
        program: The `main` that the workers run.

    Returns:
        The study.

    Raises:
        UsageError: If what was typed cannot work.
        MNISTLitError: If no trial can succeed.
        Stopped: If it is asked to stop; what was done is kept.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats, retries and some samplers are experimental
    warnings.filterwarnings("ignore", "Heartbeat of storage is supposed")  # to be used with `optimize`
    settings, is_fresh, yaml_text, command = parse(args)
    try:
        base, space = check(settings, program)
        with _lock(settings, is_fresh=is_fresh) as owner:
            study = open_study(settings, space, _about(settings, base.config), fresh=is_fresh)
            write_text(settings.folder / "search.yaml", yaml_text)
            workers = new_workers(settings.workers, base.num_gpus, settings.folder / "workers.log")
            try:
                Runner(settings, study, space, base, program, workers, owner).run()
                confirm(settings, study, base, program, workers)
            except Stopped as stop:
                raise Stopped(stop.signum, f"what was done is kept; go on with: {command}") from stop
    finally:
        kill_workers()
    _print_results(settings, study)
    return study


def _about(settings: Settings, config: Mapping[str, Any]) -> dict[str, Any]:
    """Collect what makes the trials of a study comparable."""
    base = {name: value for name, value in config.items() if name not in COMPARABLE}
    base["data"] = {name: value for name, value in config["data"].items() if name not in COMPARABLE_DATA}
    return {
        "space": settings.space,
        "objective": [asdict(objective) for objective in settings.objectives],
        "base": base,
    }


def _print_results(settings: Settings, study: Study) -> None:
    from mnist_lit.search.report import write_report  # plotly

    page = write_report(study, settings)
    if not (best := ranked(study)[:1]):
        raise MNISTLitError(f"no trial has ended with a score\nsee {page}")
    print(format_trials(study, settings))
    print(f"best: trial {best[0].number}; train it again with --config {settings.folder / 'best.yaml'}")
    for line in confirmation_lines(study, settings):
        print(line)
    print(f"report: {page}\n{settings.folder}")


@contextlib.contextmanager
def _lock(settings: Settings, *, is_fresh: bool) -> Iterator[str]:
    """Lock the directory of a study: of a journal for one driver, of a database for one of several.

    Yields:
        The name of the driver: trials that are RUNNING under it when it starts have died.
    """
    folder = settings.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        lock = FileLock(folder.with_name(f".{folder.name}.{number}.lock"))
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            if settings.storage is None or is_fresh:
                raise UsageError(f"a search of {folder} is running\nfor more trials at a time use --workers") from None
    try:
        yield f"{os.uname().nodename}:{os.path.abspath(lock.lock_file)}"  # noqa: PTH100
    finally:
        lock.release()
