"""The command line as it was typed: flags, config files and environment variables."""

import argparse
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mnist_lit.errors import UsageError, did_you_mean

COMMANDS = {
    "fit": "train a model, keep its best and its last checkpoint",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the official test set",
    "predict": "predict the classes of image files, or of the test set",
    "export": "write a checkpoint as ONNX or .pt2 for other programs",
    "demo": "serve a page that predicts what is drawn or dropped on it",
    "compare": "print the metrics of runs and the keys in which they differ",
    "search": "search for the best configuration of fit with Optuna",
}
USAGE = "%(prog)s [--config FILE]... [--any.key VALUE]..."
# Arguments of a command's parser: with these its help does not begin with each key.
PARSER_KWARGS: dict[str, dict[str, Any]] = {
    name: {"usage": USAGE, "description": text[0].upper() + text[1:]} for name, text in COMMANDS.items()
}
PREFIX = "MNIST_LIT_"
DATA_DIR_VARIABLE = f"{PREFIX}DATA"
DEBUG_VARIABLE = f"{PREFIX}DEBUG"
MAX_VALUES = 100_000  # of a config file
PACKAGE = Path(__file__).parent
SHIPPED_CONFIGS = (PACKAGE / "configs", PACKAGE.parent / "configs")  # of an installed wheel, of a clone


class Variable(NamedTuple):
    """An environment variable that sets a key."""

    name: str
    value: str


class CommandLine:
    """Flags, config files and environment variables of a command.

    Args:
        program: The command as it is typed in a shell.
        args: What follows it.
        environment: The environment variable of each key that has one.

    Attributes:
        configs: Paths of the config files, the strongest last.
        contents: What these files hold.
        nodes: The same as YAML nodes, which know their lines.
        flags: All other arguments.

    Raises:
        UsageError: If a config file is missing or no YAML.
    """

    def __init__(self, program: str, args: Sequence[str], environment: dict[str, Variable] | None = None) -> None:
        self.program = program
        self.environment = dict(environment or {})
        configs = [self.environment.pop("config").value] if "config" in self.environment else []
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("-c", "--config", action="append", default=configs)
        try:
            known, self.flags = parser.parse_known_args(args)
        except argparse.ArgumentError:
            raise UsageError("--config needs the path of a YAML file") from None
        self.configs = [str(find_config(config)) for config in known.config]
        self.contents = [read_config(Path(config)) for config in self.configs]
        self.nodes = [yaml.compose(Path(config).read_text(encoding="utf-8")) for config in self.configs]

    def layers(self) -> list[str]:
        """List all arguments in order of precedence, the strongest last."""
        environment = [f"--{key}={variable.value}" for key, variable in self.environment.items()]
        return [*environment, *(f"--config={config}" for config in self.configs), *self.flags]

    def value_of(self, key: str) -> str | None:
        """Find the value of a key that is needed before the parser has run."""
        value = next((value for _, value in self._origins(key)), "null")
        return None if value == "null" else value

    def origin(self, key: str, message: str = "") -> str:
        """Name the flag, the file and line or the variable that gives a key; the key itself if none does.

        Args:
            key: The key.
            message: Of several origins, the one is named whose value is in this message, else the strongest.
        """
        origins = dict(self._origins(key))
        named = (origin for origin, value in origins.items() if value and value in message)
        return next(named, next(iter(origins), key))

    def is_given(self, key: str) -> bool:
        """Check whether any layer gives a key."""
        return self.origin(key) != key

    def _origins(self, key: str) -> Iterator[tuple[str, str]]:
        """List where a key is given and its value there, the strongest first."""
        for flag, following in zip(reversed(self.flags), ["", *reversed(self.flags)], strict=False):
            name, is_joined, value = flag.partition("=")
            if name.rstrip("+") == f"--{key}" and (is_joined or not following.startswith("--")):
                yield name, value if is_joined else following
        for config, document in zip(reversed(self.configs), reversed(self.nodes), strict=True):
            if found := _find(document, key.split(".")):
                line, node = found[0].start_mark.line + 1, found[1]
                is_text = isinstance(node, yaml.ScalarNode) and not node.tag.endswith(":null")
                yield f"{config}, line {line}: {key}", str(node.value) if is_text else "null"
        if key in self.environment:
            yield f"{self.environment[key].name}: {key}", self.environment[key].value


def program_name() -> str:
    """Name the program as it is typed: a project of one's own has a name of its own."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else ""
    return f"python -m {name}" if name and not name.startswith(("pytest", "multiprocessing")) else "python -m mnist_lit"


def read_environment(command: str) -> dict[str, Variable]:
    """Find the keys that environment variables set.

    Args:
        command: The command that runs; `MNIST_LIT_FIT__MODEL__LR` is for `fit` alone, `MNIST_LIT_MODEL__LR` for all.
    """
    variables: dict[str, Variable] = {}
    for name, value in sorted(os.environ.items()):
        if name.startswith(PREFIX) and name not in (DATA_DIR_VARIABLE, DEBUG_VARIABLE):
            key = name.removeprefix(PREFIX).lower().replace("__", ".")
            first, _, rest = key.partition(".")
            if first not in COMMANDS or not rest:
                variables.setdefault(key, Variable(name, value))
            elif first == command:
                variables[rest] = Variable(name, value)
    if data_dir := os.environ.get(DATA_DIR_VARIABLE):
        variables.setdefault("data.data_dir", Variable(DATA_DIR_VARIABLE, data_dir))
    return variables


def find_config(path: str | Path, relative_to: Path = Path()) -> Path:
    """Find a config file beside another file, in the working directory, or among the shipped ones.

    Args:
        path: As it was typed; of a shipped config with or without `configs/`.
        relative_to: A folder to look in first; default the working directory.

    Returns:
        The first file of that name, or `path` itself where there is none.
    """
    path = Path(path).expanduser()
    name = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    candidates = [relative_to / path, path, *(folder / name for folder in SHIPPED_CONFIGS)]
    # Path.is_file raises where a name is too long.
    return next((file for file in candidates if os.path.isfile(file)), path)  # noqa: PTH113


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys.

    Raises:
        UsageError: If there is no such file, or it holds something else.
    """
    if not os.path.isfile(path):  # noqa: PTH113
        names = {file.name for folder in SHIPPED_CONFIGS for file in folder.glob("*.yaml")}
        names |= {str(file) for file in path.parent.glob("*.yaml")} if os.path.isdir(path.parent) else set()  # noqa: PTH112
        hint = did_you_mean(str(path), names) or "give the path of a YAML file, for example configs/base.yaml"
        raise UsageError(f"--config: there is no file {path}\n{hint}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
        is_too_large = next(itertools.islice(walk(content), MAX_VALUES, None), None) is not None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        raise UsageError(f"{where}: {error.problem}\nthe file is not valid YAML") from None
    # PyYAML raises AttributeError for an impossible date.
    except (AttributeError, OSError, TypeError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"--config: {path} cannot be read: {str(error).splitlines()[0]}") from None
    if is_too_large:  # aliases of aliases would fill the memory
        raise UsageError(f"--config: {path} cannot be read: it holds too many values")
    if not isinstance(content, dict):
        raise UsageError(f"--config: {path} holds no keys\nit needs lines like 'model:' and '  lr: 0.01'")
    return content


def walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """List a nested value and all its parts, each after its key."""
    yield key, value
    if isinstance(value, dict):
        for name, part in value.items():
            yield from walk(part, f"{key}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from walk(part, key)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not key.tag.endswith(":str"):
                problem = f"{key.value!r} is not a name; texts like '1' and 'on' need quotes"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if key.value in lines:
                problem = f"{key.value}: is given already in line {lines[key.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _find(node: yaml.Node | None, path: Sequence[str]) -> tuple[yaml.Node, yaml.Node] | None:
    """Find the name and the value of a key in a YAML document; a name may have dots, as in a search space."""
    if isinstance(node, yaml.SequenceNode):
        return next(filter(None, (_find(item, path) for item in node.value)), None)
    for name, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if name.value == ".".join(path):
            return name, value
        if name.value == path[0]:
            return _find(value, path[1:])
    return None
