"""Parse a search config and its flags into typed settings."""

import re
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveFloat, PositiveInt, restricted_string_type
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, TPESampler

from mnist_lit.class_paths import called_functions
from mnist_lit.command_line import PARSER_KWARGS, PREFIX, CommandLine, find_config, program_name, read_environment
from mnist_lit.errors import UsageError
from mnist_lit.formatting import flag_names, flatten
from mnist_lit.parser_errors import explain, explain_object

ENTRY = ("low", "high", "step", "log", "choices", "items", "length", "when")  # what an entry of a space may hold
ITEM = re.compile(r"^(--(?:space|overrides)\.)([^=]+)")
StudyName = restricted_string_type("StudyName", r"^[A-Za-z0-9][\w.-]{0,99}$", docstring="The name of a folder.")


class SamplerFactory(Protocol):
    """Builds a sampler; a class is given those of these arguments that it takes, so that they are no keys."""

    def __call__(self, *, search_space: dict[str, list[Any]]) -> BaseSampler: ...


class UnknownMetricError(UsageError):
    """No run logs the metric of an objective: all trials would fail."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """An objective of a search.

    Args:
        metric: A metric that is logged at each validation, or `parameters`, `seconds` or `images_per_second` of a run.
        direction: Whether more or less of it is better.
        value: Whether the best or the last epoch of a trial counts.
    """

    metric: str = "val/acc"
    direction: Literal["maximize", "minimize"] = "maximize"
    value: Literal["best", "last"] = "best"


@dataclass(frozen=True, kw_only=True)
class Confirm:
    """Train the best trials again with other seeds: the best of many noisy scores is optimistic.

    Args:
        top: Number of trials, 1 or more.
        seeds: Trainings of each, 1 or more.
    """

    top: PositiveInt = 3
    seeds: PositiveInt = 3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Search for the best configuration of `fit`.

    Args:
        space: The keys of `fit` that vary: `{low, high}`, with `step` or `log: true`; `{choices: [1, 2]}`; or, for a
            list, `{length: {low: 1, high: 3}, items: {choices: [16, 32]}}`. With `when: {other.key: value}` a key
            varies only where another key has that value, or one of a list of values.
        study_name: Name of the study and of its directory, logs/search/STUDY_NAME.
        objective: The metric and its direction; or a list of them.
        n_trials: Trials in all, also after the search has been stopped and started again.
        timeout: Seconds after which no further trial begins.
        workers: Processes that train trials. They share the threads; each uses one GPU, which several may share.
        configs: Configs that the trials start from; later ones win. Each is looked for beside the search config, in the
            working directory, and among the shipped configs.
        overrides: Keys of `fit` that all trials have on top of that; single ones as `--overrides.model.lr 0.1`.
        sampler: Any class of `optuna.samplers`. A grid sampler is given the space.
        pruner: Any class of `optuna.pruners`; default MedianPruner, which leaves the first validation alone; null stops
            no trial early.
        storage: URL of a database, for example postgresql://user@host/database, on which several machines search
            together by the same command; default a journal file in the study's directory.
        confirm: Which trials are trained again with other seeds when the search is done, if any.
    """

    # A plain dict keeps what was typed: of dict[str, Any] the parser would import the classes and add their arguments.
    space: dict = field(default_factory=dict)  # type: ignore[type-arg]
    study_name: StudyName = "mnist"  # type: ignore[valid-type]
    objective: Objective | list[Objective] = field(default_factory=Objective)
    n_trials: PositiveInt = 50
    timeout: PositiveFloat | None = None
    workers: PositiveInt = 1
    configs: list[str] = field(default_factory=lambda: ["configs/base.yaml"])
    overrides: dict = field(default_factory=dict)  # type: ignore[type-arg]
    sampler: SamplerFactory = TPESampler  # type: ignore[assignment]  # it is given the arguments that it takes
    pruner: BasePruner | None = None
    storage: str | None = None
    confirm: Confirm | None = None

    @property
    def objectives(self) -> list[Objective]:
        return self.objective if isinstance(self.objective, list) else [self.objective]

    @property
    def metrics(self) -> list[str]:
        return [objective.metric for objective in self.objectives]

    @property
    def folder(self) -> Path:
        return Path("logs") / "search" / str(self.study_name)

    def run_dir(self, number: int) -> Path:
        """Return the run directory of a trial."""
        return self.folder / "trials" / f"{number:04d}"


def parse(args: Sequence[str]) -> tuple[Settings, bool, str]:
    """Parse a command line.

    Returns:
        The settings, whether the study begins anew, and all keys as YAML, without passwords.
    """
    # Others, such as MNIST_LIT_MODEL__LR, are for the trials.
    given = {key: one for key, one in read_environment("search").items() if one.name.startswith(f"{PREFIX}SEARCH__")}
    typed = CommandLine(f"{program_name()} search", args, given)
    if not typed.configs:
        typed = CommandLine(typed.program, ["--config=configs/search.yaml", *args], given)
    parser = ArgumentParser(
        prog=typed.program, exit_on_error=False, allow_abbrev=False, print_config=None, **PARSER_KWARGS["search"]
    )
    parser.add_argument("-c", "--config", action="config", help="A YAML file of the keys below; may be repeated.")
    parser.add_argument("--print_config", action="store_true", help="Print all keys as they are set, and exit.")
    parser.add_argument("--fresh", action="store_true", help="Begin anew; an earlier study of that name is renamed.")
    parser.add_class_arguments(Settings, as_group=False)
    parser.set_defaults(pruner={"class_path": "optuna.pruners.MedianPruner", "init_args": {"n_warmup_steps": 1}})
    # Of several items below one name, such as `trainer`, the parser would keep the last alone: it gets other dots.
    layers = [ITEM.sub(lambda found: found[1] + found[2].replace(".", ":"), flag) for flag in typed.layers()]
    try:
        config = parser.parse_args(layers)
        # The parser does not check a null of a file.
        parser.parse_args([f"--{key}=null" for content in typed.contents for key in content if content[key] is None])
    except (ArgumentError, TypeError, ValueError) as error:
        raise UsageError(explain(str(error), flag_names(parser.get_defaults().as_dict()), typed)) from error
    for key, class_path in called_functions({"sampler": config.sampler.as_dict()}):
        raise UsageError(f"{typed.origin(key)}: {class_path} is not a class")
    file = typed.origin("configs").partition(", line ")
    config.configs = [str(find_config(name, Path(file[0]).parent if file[1] else Path())) for name in config.configs]
    # A flag gives `{model:lr: ...}`, a file `{model.lr: ...}` or `{model: {lr: ...}}`.
    for name, leaves in {"space": ENTRY, "overrides": ("class_path",)}.items():
        config[name] = {key.replace(":", "."): value for key, value in flatten(config[name], leaves).items()}
    _, is_fresh, is_printed = (config.pop(name) for name in ("config", "fresh", "print_config"))
    try:
        objects = parser.instantiate(config)
    except (ImportError, TypeError, ValueError) as error:  # of the pruner: the sampler is made later
        raise UsageError(f"{typed.origin('pruner')}: {explain_object(str(error))}") from error
    config.storage = config.storage and hide_password(config.storage)
    dump = parser.dump(config, skip_unset=False)
    if is_printed:
        print(dump, end="")
        raise SystemExit(0)
    settings = Settings(**vars(objects))
    if not (settings.space and settings.objectives):
        raise UsageError("space, objective: a search needs both\nfor example --space.model.lr='{low: 0.1, high: 0.2}'")
    return settings, is_fresh, dump


def hide_password(text: str) -> str:
    """Replace the password in the URL of a database."""
    return re.sub(r"(\bpassword=)[^&]*", r"\1***", re.sub(r"(://[^:/@]*):.*@", r"\1:***@", text))
