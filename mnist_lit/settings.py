"""What a search is asked to do: YAML and flags as typed settings."""

import re
import shlex
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt, restricted_string_type
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler

from mnist_lit.complaints import explain, explain_object
from mnist_lit.entry import CommandLine
from mnist_lit.errors import UsageError

__all__ = ["Confirm", "Objective", "SamplerFactory", "Settings", "Typed", "parse", "without_password"]

PROGRAM = "python scripts/optuna_search.py"
DEFAULT_CONFIG = "configs/search.yaml"
SEARCHES = Path("logs") / "search"
StudyName = restricted_string_type("StudyName", r"^[A-Za-z0-9][\w.-]*$", docstring="A name that a folder can have.")


class SamplerFactory(Protocol):
    """Builds a sampler; what the search knows (the grid of its space) is filled in and therefore no key of it."""

    def __call__(self, *, search_space: dict[str, list[Any]]) -> BaseSampler:
        """Build the sampler; only the arguments that its class has are given."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a search wants.

    Args:
        metric: A metric that is logged at each validation (`val/acc`, `val/loss`, `val/f1`, …), or a number of the
            run's metrics.json (`parameters`, `seconds`).
        direction: Whether more or less of it is better.
        value: Whether the best or the last epoch of a trial counts.
    """

    metric: str = "val/acc"
    direction: Literal["maximize", "minimize"] = "maximize"
    value: Literal["best", "last"] = "best"


@dataclass(frozen=True, kw_only=True)
class Confirm:
    """Which trials are trained again with other seeds: the best of many noisy scores is optimistic.

    Args:
        top: How many of the best trials, 1 or more.
        seeds: Trainings of each, 1 or more.
    """

    top: PositiveInt = 3
    seeds: PositiveInt = 3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Search for the best configuration of `fit`.

    Args:
        space: The keys of `fit` that vary. `{low: 0.1, high: 1.0}` is an interval (`log: true` for a logarithmic
            scale), with `step: 0.1` a range, `{choices: [1, 2]}` a choice of any values, and
            `{length: {low: 1, high: 3}, items: {choices: [16, 32]}}` a list. With `when: {other.key: value}` a key
            varies only where another one has that value, or one of a list of values.
        study_name: Name of the study; its directory is logs/search/STUDY_NAME.
        objective: The metric and its direction; or a list of them.
        n_trials: Trials in all, 1 or more, also after the search has been stopped and started again.
        timeout: Seconds, above 0, after which no trial is begun any more.
        workers: Processes that train trials, 1 or more; they share the threads, and each has a GPU of its own.
        configs: The configs that the trials start from, in order of precedence.
        overrides: Keys of `fit` that all trials have on top of that.
        sampler: Any class of `optuna.samplers`; default TPESampler. A grid sampler is given the space.
        pruner: Any class of `optuna.pruners`, which stops hopeless trials; null stops none.
        storage: URL of a database, for example postgresql://user@host/database; default a journal file in the
            study's directory. Several machines search together by the same command on the same database.
        keep_checkpoints: Number of the best trials, 0 or more, whose checkpoints are kept.
        confirm: Which trials are trained again with other seeds when the search is done, if any.
    """

    space: dict[str, Any]
    study_name: StudyName = "mnist"  # type: ignore[valid-type]
    objective: Objective | list[Objective] = field(default_factory=Objective)
    n_trials: PositiveInt = 50
    timeout: PositiveFloat | None = None
    workers: PositiveInt = 1
    configs: list[str] = field(default_factory=lambda: ["configs/base.yaml"])
    overrides: dict[str, Any] = field(default_factory=dict)
    sampler: SamplerFactory | None = None
    pruner: BasePruner | None = None
    storage: str | None = None
    keep_checkpoints: NonNegativeInt = 3
    confirm: Confirm | None = None

    @property
    def objectives(self) -> list[Objective]:
        return self.objective if isinstance(self.objective, list) else [self.objective]

    @property
    def folder(self) -> Path:
        """The study's directory."""
        return SEARCHES / str(self.study_name)

    def run_dir(self, number: int) -> Path:
        """The run directory of a trial."""
        return self.folder / "trials" / f"{number:04d}"


@dataclass(frozen=True, kw_only=True)
class Typed:
    """A search as it was typed.

    Args:
        settings: Its settings.
        fresh: Whether its study is begun anew.
        yaml: The settings in full, as YAML; the password of a database is left out.
        command: The command line that goes on with it.
    """

    settings: Settings
    fresh: bool
    yaml: str
    command: str


def parse(args: Sequence[str]) -> Typed:
    """Read settings from a command line.

    Args:
        args: What follows `python scripts/optuna_search.py`; without `--config` it is configs/search.yaml.

    Raises:
        UsageError: If there is no such key or value.
        SystemExit: After `--help` and `--print_config`.
    """
    typed = CommandLine(PROGRAM, args)
    if not typed.configs and Path(DEFAULT_CONFIG).is_file():
        typed = CommandLine(PROGRAM, [f"--config={DEFAULT_CONFIG}", *args])
    parser = _parser()
    try:
        config = parser.parse_args(typed.layers())
    except (ArgumentError, TypeError, ValueError) as error:
        keys = [*parser.get_defaults().keys(), "fresh", "space"]
        raise UsageError(explain(str(error), keys, typed)) from error
    try:
        settings = parser.instantiate(config)
    except (ImportError, TypeError, ValueError) as error:
        raise UsageError(explain_object(str(error))) from error
    command = shlex.join([*PROGRAM.split(), *(arg for arg in args if arg != "--fresh")])
    return Typed(
        settings=Settings(**{part.name: settings[part.name] for part in fields(Settings)}),
        fresh=config.fresh,
        yaml=_dumped(parser, config),
        command=command,
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=PROGRAM, description=Settings.__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="A YAML file of the keys below; may be repeated.")
    parser.add_argument("--fresh", action="store_true", help="Begin anew; an earlier study of that name is set aside.")
    parser.add_class_arguments(Settings, as_group=False)
    return parser


def _dumped(parser: ArgumentParser, config: Namespace) -> str:
    config = config.clone()
    del config["fresh"]
    if config.storage:
        config.storage = without_password(config.storage)
    dumped: str = parser.dump(config, skip_unset=False)
    return dumped


def without_password(url: str) -> str:
    """A database's URL as it may be shown."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)
