"""What a search is asked to do: YAML and flags as typed settings."""

import json
import math
import re
import shlex
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import yaml
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt, restricted_string_type
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, MedianPruner
from optuna.samplers import BaseSampler

from mnist_lit.app import CommandLine
from mnist_lit.errors import UsageError
from mnist_lit.parser_errors import SEARCH, explain, explain_object, given_at, unknown_key
from mnist_lit.trust import called_functions

__all__ = ["Confirm", "Objective", "SamplerFactory", "Settings", "Typed", "parse", "without_password"]

DEFAULT_CONFIG = "configs/search.yaml"
DESCRIPTION = f"Search for the best configuration of `fit`. Without --config it is {DEFAULT_CONFIG}."
SEARCHES = Path("logs") / "search"
StudyName = restricted_string_type(
    "StudyName", r"^[A-Za-z0-9][\w.-]{0,99}$", docstring="A name that a folder can have."
)


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
            scale; from whole number to whole number it has whole numbers only where the key takes no fractions),
            with `step: 0.1` a range, `{choices: [1, 2]}` a choice of any values, and
            `{length: {low: 1, high: 3}, items: {choices: [16, 32]}}` a list (without `length`, `items` is a list with
            the values of each place). With `when: {other.key: value}` a key
            varies only where another one has that value, or one of a list of values.
        study_name: Name of the study, of up to 100 letters, digits, dots, dashes and underscores; its directory is
            logs/search/STUDY_NAME.
        objective: The metric and its direction; or a list of them.
        n_trials: Trials in all, 1 or more, also after the search has been stopped and started again.
        timeout: Seconds, above 0, after which no trial is begun any more.
        workers: Processes that train trials, 1 or more; they share the threads, and each has a GPU of its own.
        configs: The configs that the trials start from, in order of precedence.
        overrides: Keys of `fit` that all trials have on top of that; single ones as `--overrides.model.lr 0.1`.
        sampler: Any class of `optuna.samplers`; default TPESampler. A grid sampler is given the space.
        pruner: Any class of `optuna.pruners`, which stops hopeless trials; default MedianPruner, which leaves the first
            validation alone; null stops none.
        storage: URL of a database, for example postgresql://user@host/database; default a journal file in the
            study's directory. Several machines search together by the same command on the same database.
        keep_checkpoints: Number of the best trials, 0 or more, whose checkpoints are kept.
        confirm: Which trials are trained again with other seeds when the search is done, if any.
    """

    space: dict[str, Any] = field(default_factory=dict)
    study_name: StudyName = "mnist"  # type: ignore[valid-type]
    objective: Objective | list[Objective] = field(default_factory=Objective)
    n_trials: PositiveInt = 50
    timeout: PositiveFloat | None = None
    workers: PositiveInt = 1
    configs: list[str] = field(default_factory=lambda: ["configs/base.yaml"])
    overrides: dict[str, Any] = field(default_factory=dict)
    sampler: SamplerFactory | None = None
    pruner: BasePruner | None = field(default_factory=lambda: MedianPruner(n_warmup_steps=1))
    storage: str | None = None
    keep_checkpoints: NonNegativeInt = 3
    confirm: Confirm | None = None

    def __post_init__(self) -> None:
        if self.timeout == math.inf:
            raise ValueError("timeout: must be finite; null is no limit")
        if not self.objectives:
            raise ValueError("objective: needs a metric")
        for name, part in [*(("objective", objective) for objective in self.objectives), ("confirm", self.confirm)]:
            if part and (missing := next((key for key, value in vars(part).items() if value is None), None)):
                raise ValueError(f"{name}.{missing}: must not be null")

    @property
    def objectives(self) -> list[Objective]:
        return self.objective if isinstance(self.objective, list) else [self.objective]

    @property
    def metrics(self) -> list[str]:
        """The metric of each objective."""
        return [objective.metric for objective in self.objectives]

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
    typed = CommandLine(SEARCH, args)
    if not typed.configs and Path(DEFAULT_CONFIG).is_file():
        typed = CommandLine(SEARCH, [f"--config={DEFAULT_CONFIG}", *args])
    parser = _parser(typed)
    _check(typed)
    mappings, flags = _mappings(typed)
    files = [{key: value for key, value in content.items() if key not in mappings} for content in typed.contents]
    printing = [flag for flag in flags if flag.startswith("--print_config")]
    layers = [*(f"--config={json.dumps(file, default=str)}" for file in files if file), *flags]
    try:
        config = parser.parse_args([layer for layer in layers if layer not in printing])
    except (ArgumentError, TypeError, ValueError) as error:
        raise UsageError(explain(str(error), [*KEYS, "fresh"], typed)) from error
    for key, class_path in called_functions(config.as_dict()):
        raise UsageError(f"{given_at(key, typed) or key}: {class_path} is no class")
    dumped = _dumped(parser, config, mappings)
    if printing:
        print(dumped, end="")
        raise SystemExit(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # of classes that the user has named
            made = parser.instantiate(config)
    except (ImportError, TypeError, ValueError) as error:
        # Of the keys, only the pruner's makes an object by now.
        raise UsageError(f"{given_at('pruner', typed) or 'pruner'}: {explain_object(str(error))}") from error
    try:
        settings = Settings(**{part.name: made[part.name] for part in fields(Settings)} | mappings)
    except ValueError as error:
        raise UsageError(str(error)) from error
    command = shlex.join([*SEARCH.split(), *(arg for arg in args if arg != "--fresh")])
    return Typed(settings=settings, fresh=config.fresh, yaml=dumped, command=command)


KEYS = [
    *(part.name for part in fields(Settings)),
    *(f"objective.{part.name}" for part in fields(Objective)),
    *(f"confirm.{part.name}" for part in fields(Confirm)),
]


def _check(typed: CommandLine) -> None:
    """Make sure of the files' keys; of a config for `fit` the parser would complain in words of its own."""
    nullable = {part.name: type(None) in get_args(part.type) for part in fields(Settings)}
    for content in typed.contents:
        for key, value in content.items():
            name = str(key).split(".")[0]
            if name == "fresh" and value is False:  # --print_config prints it
                continue
            if name not in nullable:
                raise UsageError(unknown_key(str(key), KEYS, typed))
            if value is None and not nullable[name]:
                raise UsageError(f"{given_at(str(key), typed) or key}: must not be null")


def _mappings(typed: CommandLine) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """`space` and `overrides` as they were typed, and the other flags.

    The parser would take the classes in them for its own: import them, and add all of their arguments.
    """
    mappings: dict[str, Any] = {"space": {}, "overrides": {}}
    for content in typed.contents:
        mappings |= {name: content[name] for name in mappings if name in content}
    others: list[str] = []
    flags = iter(typed.flags)
    for flag in flags:
        name, has_value, text = flag.partition("=")
        group, _, key = name.removeprefix("--").partition(".")
        if group not in mappings:
            others.append(flag)
            continue
        text = text if has_value else next(flags, "")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"{name}: {text!r} is no valid YAML") from error
        mappings[group] = {**mappings[group], key: value} if key else value
    for name, mapping in mappings.items():
        if not isinstance(mapping, dict):
            raise UsageError(f"{given_at(name, typed) or name}: must be of type dict, got {mapping}")
    return mappings, others


def _parser(typed: CommandLine) -> ArgumentParser:
    parser = ArgumentParser(prog=SEARCH, description=DESCRIPTION, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="A YAML file of the keys below; may be repeated.")
    parser.add_argument("--fresh", action="store_true", help="Begin anew; an earlier study of that name is set aside.")
    parser.add_class_arguments(Settings, as_group=False)
    # Another class would inherit the arguments of this one that it has, too.
    names_pruner = any("pruner" in content for content in typed.contents) or any(
        flag.partition("=")[0] in ("--pruner", "--pruner.class_path") for flag in typed.flags
    )
    default = {"class_path": "optuna.pruners.MedianPruner", "init_args": {"n_warmup_steps": 1}}
    parser.set_defaults(pruner=None if names_pruner else default)
    return parser


def _dumped(parser: ArgumentParser, config: Namespace, mappings: dict[str, Any]) -> str:
    plain = yaml.safe_load(parser.dump(config, skip_unset=False))
    del plain["fresh"]
    if plain["storage"]:
        plain["storage"] = without_password(plain["storage"])
    dumped: str = yaml.safe_dump({**plain, **mappings}, sort_keys=False)
    return dumped


def without_password(url: str) -> str:
    """A database's URL as it may be shown."""
    return re.sub(
        r"(://[^:/@]*):.*@|(\bpassword=)[^&]*", lambda found: f"{found[1]}:***@" if found[1] else f"{found[2]}***", url
    )
