"""What a search's processes do: rehearse a command line, train a trial, report as it goes."""

import gc
import json
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mnist_lit.app import Request, main
from mnist_lit.errors import MNISTLitError, Stopped
from mnist_lit.machine_errors import is_disk_full
from mnist_lit.search.settings import Objective, Settings
from mnist_lit.search.space import Params, nested
from mnist_lit.search.workers import print_to
from mnist_lit.training.run_dir import write_text

__all__ = ["Ask", "Outcome", "Rehearsal", "Rehearsed", "Training", "training", "trial_args"]

# Tells the search a trial's scores at a validation, and is told whether the trial is hopeless.
Ask = Callable[[int, list[float]], bool]


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal has found.

    Args:
        config: The complete configuration.
        num_threads: Threads of torch in a process of its own.
        num_gpus: GPUs of this machine.
    """

    config: dict[str, Any]
    num_threads: int
    num_gpus: int


@dataclass(frozen=True)
class Rehearsal:
    """Build what a command line asks for and run nothing.

    Args:
        args: What follows `python -m mnist_lit`.
        fetches: Whether the data is made sure of, too.
    """

    args: list[str]
    fetches: bool = False

    def run(self, ask: Ask) -> Rehearsed:
        """The command line's configuration.

        Raises:
            MNISTLitError: If it cannot work.
        """
        import torch

        from mnist_lit.cli import rehearse

        num_threads = torch.get_num_threads()
        cli = rehearse(Request(self.args))
        if self.fetches:
            cli.datamodule.fetch("fit")
        return Rehearsed(cli.plain_config, num_threads, torch.cuda.device_count())


@dataclass(frozen=True)
class Outcome:
    """How a trial has ended.

    Args:
        scores: The score for each objective; None where there is none.
        is_pruned: Whether it was stopped as hopeless.
        seconds: Seconds of training.
        error: Why it failed, in one line; empty if it did not.
        traceback: The whole story of that.
        is_hopeless: Whether every other trial would fail for the same reason.
        is_disk_full: Whether it failed as the disk is full, which says nothing about its parameters.
    """

    scores: list[float] | None = None
    is_pruned: bool = False
    seconds: float = 0.0
    error: str = ""
    traceback: str = ""
    is_hopeless: bool = False
    is_disk_full: bool = False


@dataclass(frozen=True)
class Training:
    """Train one trial through the one door.

    Args:
        args: What follows `python -m mnist_lit`.
        objectives: What the search wants.
        log: The file that takes what is printed.
    """

    args: list[str]
    objectives: list[Objective]
    log: Path

    def run(self, ask: Ask) -> Outcome:
        """The trial's outcome; whatever goes wrong in it is part of that.

        Raises:
            Stopped: If this process is asked to end.
        """
        from mnist_lit.search.pruning import Pruning

        print_to(self.log)
        pruning = Pruning(self.objectives, ask)
        try:
            run_dir = main(self.args, callbacks=[pruning]).run_dir
            facts = json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))
            return _outcome(self.objectives, pruning.scores(facts), facts["seconds"], is_pruned=pruning.is_pruned)
        except (Exception, SystemExit) as error:
            return _failure(error)
        finally:
            # The trainer and what it trains hold each other.
            gc.collect()


def trial_args(settings: Settings, overlay: Path) -> list[str]:
    """The command line of a trial, but for its directory.

    Args:
        settings: Those of the search.
        overlay: The config of the trial's own.
    """
    wanted = {key.partition(".")[0] for key in settings.overrides}
    switches = {"pictures": "--pictures.enabled=false", "report": "--report=false"}
    flags = ["--test_after_fit=false", *(flag for group, flag in switches.items() if group not in wanted)]
    return ["fit", *(f"--config={config}" for config in [*settings.configs, overlay]), *flags]


def training(settings: Settings, overlay: Params, name: str) -> Training:
    """The job of a trial.

    Args:
        settings: Those of the search.
        overlay: The keys in which the trial differs from the configs that it starts from.
        name: Its directory, below that of the study.
    """
    run_dir = settings.folder / name
    file = settings.folder / "overlays" / f"{run_dir.name}.yaml"
    file.parent.mkdir(exist_ok=True)
    write_text(file, yaml.safe_dump(nested(overlay), sort_keys=False))
    args = [*trial_args(settings, file), f"--run_dir={run_dir}"]
    return Training(args, settings.objectives, settings.folder / "workers.log")


def _outcome(objectives: list[Objective], scores: list[float], seconds: float, *, is_pruned: bool) -> Outcome:
    for objective, score in zip(objectives, scores, strict=True):
        if math.isnan(score):
            return Outcome(error=f"{objective.metric} is not a number", seconds=seconds)
    return Outcome(scores, is_pruned=is_pruned, seconds=seconds)


def _failure(error: BaseException) -> Outcome:
    from mnist_lit.search.pruning import UnknownMetricError

    cause = error.__cause__ if isinstance(error, SystemExit) and error.__cause__ else error
    if isinstance(cause, Stopped):
        raise cause
    summary = str(cause) if isinstance(cause, MNISTLitError) else f"{type(cause).__name__}: {cause}"
    return Outcome(
        error=summary.strip(),
        traceback="".join(traceback.format_exception(cause)),
        is_hopeless=isinstance(cause, UnknownMetricError),
        is_disk_full=is_disk_full(cause),
    )
