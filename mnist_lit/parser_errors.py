"""The parser's complaints in few words: where the mistake stands, what is wrong, what was probably meant."""

import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mnist_lit.app import CommandLine, did_you_mean, exists

__all__ = ["SEARCH", "explain", "explain_object", "explain_trainer", "given_at", "unknown_key"]

# Where a complaint names a key, and how the reason that follows it is said shortly.
KEY = re.compile(r"Parser key \"(?P<key>[\w.]+)\"|argument --(?P<flag>[\w.]+)|arguments: (--)?(?P<unknown>[^ =]+)")
# What a class is not given right: an argument that it does not have, or one of the wrong type.
ARGUMENT = re.compile(r"Option '([^']+)' is not accepted|\sParser key \"(\w+)\"")
UNKNOWN_IN_GROUP = re.compile(r"(?P<kind>Subcommand|Group) '(?P<group>[^']+)' does not accept option '(?P<name>[^']+)'")
# The patterns below take the square of a word's length; no name of a file may be longer than 255 either.
LONG_WORD = re.compile(r"([^\s'\"]{200})[^\s'\"]+")
# In the replies, `name` is the word that was mistyped.
REASONS = [
    (r"Importing '([\w.]+)' is not allowed", r"\1 is not allowed, as it can run or change anything"),
    (r"(?s)Not of type \w+: does not conform to restriction ([^\n]+).*Given value: ([^\n]*)", r"must be \1, got \2"),
    (r"(\S+) does not conform to restriction (.+)", r"must be \2, got \1"),
    (r"could not convert string to float: '(.*)'", r"must be a number, got \1"),
    (r"invalid literal for int\(\) with base 10: '(.*)'", r"must be a whole number, got \1"),
    (r"(\S+) not an? (?:integer|number)", r"must be a whole number, got \1"),
    (r"int\(\) argument must be .*, not '(\w+)'", r"must be a whole number, got \1"),
    (r"Not of type \w+: (.*) does not match regular expression", r"must be a name that a folder can have, got \1"),
    (r"expected string or bytes-like object, got '(\w+)'", r"must be of type str, got \1"),
    (r"Option '(?P<name>[^']+)' is not accepted", r"there is no argument \1"),
    (r"module '([\w.]+)' has no attribute '(?P<name>\w+)'", r"there is no \2 in \1"),
    (r"the following arguments are required: (.+)", r"needs the argument \1"),
    (r"No module named '?([\w.]+)'?", r"there is no module \1"),
    (r"(?s)\.(?:Objective|Confirm)'>.*Expected a dot import path string: (\S+)", r"takes keys below it, got \1"),
    (r"Expected a dot import path string: (?P<name>\S+)", r"there is no class \1"),
    (r"Expected '([\w.]+)' to be a subclass of <class '(?:[\w.]*\.)?(\w+)'>", r"\1 is no \2"),
    (r"Expected '([\w.]+)' to be a function that returns (\w+)", r"\1 makes no \2"),
    (r"(?s)does not correspond to a subclass of (\w+).*Given value: ([\w.]+)", r"\2 is no \1"),
    (r"(?s)Expected an instantiatable class.*Given value: ([^\n]*)", r"needs a class_path (and init_args), got \1"),
    (r"Multiple subclasses with name (\w+)\..*ambiguity: (.+)\.", r"there are several \1, name one in full: \2"),
    (r"ignored explicit argument", r"takes no value"),
    (r"expected one argument", r"needs a value"),
    (r"(?:Given|Got) value: Namespace\(((?!class_path).*)\)", r"needs a class_path (and init_args), got \1"),
    (r"Unable to load config ['\"](\S+)['\"]", r"takes keys below it or a YAML file, got \1"),
]
# Why an object cannot be made: the first reason that is given, or the package that is not installed.
PROBLEM = re.compile(
    r"^ *- (?!Not a |Expected a |an? )(?:Problem with given class_path '([\w.]+)':\s+)?(.+)", re.MULTILINE
)
MISSING = re.compile(r"(?:Module not found: '|No module named '|Requirement ')(\w+)")
EXTRAS = ("mlflow",)
# Where the classes are that a key takes.
CLASSES = {
    "model.optimizer": "torch.optim",
    "model.schedule": "torch.optim.lr_scheduler",
    "trainer.callbacks": "lightning.pytorch.callbacks",
    "trainer.logger": "lightning.pytorch.loggers",
    "trainer.profiler": "lightning.pytorch.profilers",
    "trainer.strategy": "lightning.pytorch.strategies",
    "sampler": "optuna.samplers",
    "pruner": "optuna.pruners",
}
SEARCH = "python -m mnist_lit search"
# Arguments of optimizers and schedules that the model knows, and from where.
FILLED_IN = dict.fromkeys(("lr", "max_lr"), "it is taken from model.lr") | dict.fromkeys(
    ("total_steps", "total_iters", "T_max"), "it is filled in: the number of steps of the run"
)


def explain(message: str, keys: Iterable[str], request: CommandLine) -> str:
    """Say a complaint of the parser in at most four lines.

    Args:
        message: The complaint.
        keys: All keys of the command.
        request: What was typed.
    """
    message = LONG_WORD.sub(r"\1…", message)
    if unknown := UNKNOWN_IN_GROUP.search(message):
        prefix = "" if unknown["kind"] == "Subcommand" else f"{unknown['group']}."
        return unknown_key(prefix + unknown["name"], keys, request)
    if message.startswith("Key must be a string"):
        return f"{', '.join(request.configs)}: {message}"
    if not (found := KEY.search(message)):
        return message
    if found["unknown"]:
        return unknown_key(found["unknown"], keys, request)
    if found["flag"]:
        typed = next((flag for flag in reversed(request.flags) if flag.startswith(f"--{found['flag']}")), found["flag"])
        return f"{typed.split('=')[0]}: {_reason(message, found['flag'], keys)}"
    key = found["key"]
    # Of keys that are given as one mapping, the complaint names the mapping first.
    key = next(iter(re.findall(rf"Parser key \"({re.escape(key)}\.[\w.]+)\"", message)), key)
    argument = "".join(next(iter(ARGUMENT.findall(message)), ()))
    arguments = [f"{key}.init_args.{argument}", f"{key}.{argument}"] if argument else []
    names = [*arguments, key]
    places = [*(_flag(name, request) for name in names), *(given_at(name, request) for name in names)]
    return f"{next(filter(None, places), key)}: {_reason(message, key, keys)}"


def explain_object(message: str) -> str:
    """Say in at most two lines why an object of the configuration could not be made."""
    if not (problem := PROBLEM.search(message)):
        return message
    class_path, reason = problem.groups()
    if not class_path:
        return reason
    if not (missing := MISSING.match(reason)):
        return f"{class_path}: {reason}"
    package = missing[1]
    wanted = f"'mnist_lit[{package}]'" if package in EXTRAS else package
    return f"{class_path} needs the package {package}\npip install {wanted}"


def explain_trainer(message: str, settings: Mapping[str, Any], request: CommandLine) -> str:
    """Say a complaint of the Trainer with the key that it is about.

    Args:
        message: The complaint, which has the name of the key somewhere in it, or at least its value.
        settings: The keys of the trainer and their values.
        request: What was typed.
    """
    words = set(re.findall(r"\w+", message))
    named = [name for name in settings if name in words] or [name for name in settings if str(settings[name]) in words]
    places = (given_at(f"trainer.{name}", request) for name in named)
    place = next(filter(None, places), f"trainer.{named[0]}" if named else "trainer")
    value = settings[named[0]] if named else ""
    got = f" Got {value}" if isinstance(value, str) and value not in message else ""
    return f"{place}: {message}{got}"


def unknown_key(key: str, keys: Iterable[str], request: CommandLine) -> str:
    """Say that there is no such key, where it stands, and which ones are near."""
    if key.startswith("space.") and request.program != SEARCH:
        return f"{_place('space', request)}: there is no such key\na config with a space is for {SEARCH}"
    if key and exists(Path(key)):
        return f"{key}: belongs to no key\nput patterns in quotes, for example: --data.predict_paths 'photos/*.jpg'"
    known = set(keys)
    groups = {".".join(name.split(".")[:end]) for name in known for end in range(1, name.count(".") + 1)}
    elsewhere = sorted(name for name in known if name.endswith(f".{key}"))
    hint = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else did_you_mean(key, known | groups)
    help_line = f"all keys: {request.program} --help"
    if request.program == SEARCH:
        help_line = f"keys of fit go into overrides or space, or into a file that configs names\n{help_line}"
    return f"{_place(key, request)}: there is no such key\n{hint or help_line}"


def _reason(message: str, key: str, keys: Iterable[str]) -> str:
    for pattern, words in REASONS:
        if found := re.search(pattern, message):
            name = found.groupdict().get("name", "")
            hint = _hint(name, key, keys) if name else ""
            reply = re.sub(r"\bv(?=[<>])", "", found.expand(words))
            return f"{reply}\n{hint}".replace("NoneType", "null")
    value = re.search(r"(?:Got value|Given value): (.*?)(?:\. Got value|$)", message, re.MULTILINE)
    got = value[1] if value else "something else"
    options = [option for group in re.findall(r"Literal\[([^\]]+)\]", message) for option in group.split(", ")]
    if options:
        names = list(dict.fromkeys(option.strip("'\"") for option in options))
        return f"must be one of {', '.join(names)}, got {got}\n{did_you_mean(got, names)}"
    types = list(dict.fromkeys(re.findall(r"Expected a <class '(?:[\w.]*\.)?(\w+)'>", message)))
    wanted = " or ".join(types).replace("NoneType", "null")
    return f"must be of type {wanted}, got {got}" if types else " ".join(message.split())


def _hint(name: str, key: str, keys: Iterable[str]) -> str:
    if key not in CLASSES:
        return did_you_mean(name, [other.removeprefix(f"{key}.") for other in keys if other.startswith(f"{key}.")])
    if key.startswith("model.") and name in FILLED_IN:
        return FILLED_IN[name]
    names = _names(CLASSES[key])
    return f"give {key} a class that has it" if name in names else did_you_mean(name, names)


def _names(module_name: str) -> set[str]:
    """The classes of a module and their arguments."""
    module = importlib.import_module(module_name)
    classes = {name: value for name, value in inspect.getmembers(module, inspect.isclass) if name in module.__all__}
    return set(classes).union(*(inspect.signature(value).parameters for value in classes.values()))


def _place(key: str, request: CommandLine) -> str:
    return given_at(key, request) or key


def given_at(key: str, request: CommandLine) -> str | None:
    """The key with where it was given, if it was: the file and line, the environment variable, or the flag."""
    if flag := _flag(key, request):
        return flag
    for config in reversed(request.configs):
        node = yaml.compose(Path(config).read_text(encoding="utf-8"))
        if line := _line(node, key.split(".")):
            return f"{config}, line {line}: {key}"
    setting = request.environment.get(key)
    return f"{setting.variable}: {key}" if setting else None


def _flag(key: str, request: CommandLine) -> str | None:
    names = (flag.split("=")[0] for flag in request.flags)
    return next((name for name in names if name.rstrip("+") in (key, f"--{key}")), None)


def _line(node: yaml.Node | None, path: list[str]) -> int | None:
    if path and isinstance(node, yaml.SequenceNode):
        return next(filter(None, (_line(item, path) for item in node.value)), None)
    if not path or not isinstance(node, yaml.MappingNode):
        return node.start_mark.line + 1 if node is not None and not path else None
    for name, value in node.value:
        if name.value == path[0]:
            return name.start_mark.line + 1 if len(path) == 1 else _line(value, path[1:])
    return None
