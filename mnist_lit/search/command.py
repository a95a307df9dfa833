"""The search from its command line to its report."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning

from mnist_lit.app import short_errors
from mnist_lit.errors import MNISTLitError, Stopped
from mnist_lit.search.confirmation import confirm
from mnist_lit.search.driver import Driver
from mnist_lit.search.rehearsal import rehearse
from mnist_lit.search.results import confirmations, ranked, table
from mnist_lit.search.settings import Settings, Typed, parse
from mnist_lit.search.space import Space
from mnist_lit.search.study import Study, open_study, set_aside
from mnist_lit.search.workers import Pool
from mnist_lit.signals import raise_on_signals
from mnist_lit.training.run_dir import write_text

__all__ = ["main", "search"]

# What may differ between two starts of a search and leaves their trials comparable.
HARMLESS = ("run_dir", "ckpt_path", "test_after_fit", "num_threads", "csv", "report", "pictures")
PLACES = ("data_dir", "download", "mirrors", "timeout", "num_workers", "pin_memory")


def main(args: Sequence[str] | None = None) -> Study:
    """Search for the best configuration of `fit`.

    Args:
        args: The command line after `python scripts/optuna_search.py`; default that of this process.

    Returns:
        The study.

    Raises:
        SystemExit: As `mnist_lit.main` does.
    """
    with short_errors(), raise_on_signals():
        return search(parse(sys.argv[1:] if args is None else args))
    raise AssertionError


def search(typed: Typed) -> Study:
    """Run trials until there are enough, train the best again where that is wanted, and say what was found."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", ExperimentalWarning)  # of classes that the user has named
    settings = typed.settings
    with Pool() as pool:
        base, space = rehearse(pool, settings)
        pool.spread_over_gpus(base.num_gpus)
        if typed.fresh:
            set_aside(settings)
        study = open_study(settings, _about(settings, base.config), space)
        settings.folder.mkdir(parents=True, exist_ok=True)
        write_text(settings.folder / "search.yaml", typed.yaml)
        try:
            with study.joined(settings.folder):
                Driver(settings, study, space, base, pool).run()
                confirm(settings, study, base, pool)
        except Stopped as stop:
            raise Stopped(stop.signum, f"what was done is kept; go on with: {typed.command}") from stop
    _tell(study, settings)
    return study


def _about(settings: Settings, config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes the trials of a study comparable."""
    data = {name: value for name, value in config["data"].items() if name not in PLACES}
    base = {name: value for name, value in config.items() if name not in HARMLESS}
    objectives = [asdict(objective) for objective in settings.objectives]
    return {"space": settings.space, "objective": objectives, "base": {**base, "data": data}}


def _tell(study: Study, settings: Settings) -> None:
    from mnist_lit.search.report import write_report  # plotly

    page = write_report(study, settings)
    if not (best := ranked(study)[:1]):
        raise MNISTLitError(f"no trial has ended with a score\nsee {page}")
    print(table(study, settings))
    print(f"best: trial {best[0].number}; train it again with --config {settings.folder / 'best.yaml'}")
    for line in confirmations(study, settings):
        print(line)
    print(f"report: {page}")
    print(settings.folder)
