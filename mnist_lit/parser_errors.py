"""The parser's messages in few lines: where the mistake stands, the reason, the nearest valid names."""

import functools
import inspect
import itertools
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from mnist_lit.command_line import CommandLine
from mnist_lit.errors import did_you_mean

UNKNOWN = re.compile(
    r"unrecognized arguments: (?:--)?([^\s=]+)|(?:Group '([^']+)' )?does not accept option '([^']+)'|^Option '([^']+)'"
)
KEY = re.compile(r"Parser key \"([\w.]+)\":?|argument --([\w.]+):?")
ARGUMENT = re.compile(r"Option '([\w.]+)' is not accepted|\s- Parser key \"([\w.]+)\"")
# Lines of the parser's that name no reason.
NOISE = re.compile(
    r"$|Does not val|Subtypes|Errors:|Given|Expected a path but|.*NoneType'>$|Problem with|Not a val|Subclass|an? "
)
PYTHON = [
    (r"int\(\) argument must be .*, not 'NoneType'", "must be a whole number, got null"),
    (r"float\(\) argument must be .*, not 'NoneType'", "must be a number, got null"),
    (r"invalid literal for int\(\) with base 10", "must be a whole number, got"),
    (r"could not convert string to float", "must be a number, got"),
    (r"does not conform to restriction", "must be"),
    (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    (r"typing\.Literal\[(.*?)\]", r"one of \1"),
    (r"Not of type \w+: ", ""),
    (r"\bv(?=[<>])", ""),
]
MODULES = (
    "torch.optim",
    "torch.optim.lr_scheduler",
    "lightning.pytorch.callbacks",
    "optuna.samplers",
    "optuna.pruners",
)
TYPE = re.compile(r"Expected a (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.*?)\])")
LONG_WORD = re.compile(r"([^\s'\"]{200})[^\s'\"]+")
LIST = ("must be of type list", "Expected a List")
STEPS = "it is filled in: the number of steps of the run"
# The arguments of `main` that replace what these keys configure.
OWN_CLASSES = {"model": "model_class", "data": "datamodule_class"}
# Arguments of optimizers and schedules that stand elsewhere.
FILLED_IN = {
    "lr": "it is model.lr",
    "max_lr": "it is model.lr",
    "total_steps": STEPS,
    "total_iters": STEPS,
    "T_max": STEPS,
    "class_path": "the arguments of a class stand below init_args",
}


def explain(message: str, keys: Iterable[str], command_line: CommandLine) -> str:
    """Explain a message of the parser in at most three lines.

    Args:
        message: The message.
        keys: All keys of the command.
        command_line: What was typed.
    """
    message = LONG_WORD.sub(r"\1…", message)
    if unknown := UNKNOWN.search(message):
        return unknown_key(unknown[1] or ".".join(filter(None, unknown.groups()[1:])), keys, command_line)
    if "expected one argument" in message:
        pairs = itertools.pairwise([*command_line.flags, "--"])
        names = [name for name, value in pairs if name[:2] == value[:2] == "--" and "=" not in name]
        return f"{next((name for name in names if name != '--print_config'), message)}: needs a value"
    key, *inner = ["".join(found) for found in KEY.findall(message)] or [""]
    arguments = [*inner, *("".join(found) for found in ARGUMENT.findall(message))]
    names = [name for argument in arguments for name in (argument, f"{key}.{argument}", f"{key}.init_args.{argument}")]
    if hint := "Unable to load config" in message and _own_class(key, command_line):
        return f"{command_line.origin(key)}: {command_line.value_of(key)} is not a config file\n{hint}"
    given = next((name for name in [*names, key] if command_line.is_given(name)), key)
    keys_below = [name.removeprefix(f"{key}.") for name in keys if name.startswith(f"{key}.")]
    return f"{command_line.origin(given, message)}: {explain_object(message, keys_below)}" if key else message


def explain_object(message: str, keys_below: Iterable[str] = ()) -> str:
    """Explain in at most two lines why a value or an object of the configuration is refused.

    Args:
        message: The message of the parser.
        keys_below: The keys below the one that it is about.
    """
    lines = [line.strip(" -") for line in KEY.sub("", message).splitlines()]
    reasons = list(dict.fromkeys(line for line in lines if not NOISE.match(line))) or lines
    reason = min(reasons, key=lambda text: text.startswith(("Expected a <", "Expected a typing")))
    types = [f"of type {name}" if name else f"one of {values}" for name, values in TYPE.findall(message)]
    wanted = " or ".join(kind for kind in dict.fromkeys(types) if kind != "of type NoneType")
    reason = TYPE.sub(lambda _: f"must be {wanted.replace(' or of type ', ' or ')}", reason)
    value = next((line.removeprefix("Given value: ") for line in lines if line.startswith("Given value: ")), "")
    for pattern, words in PYTHON:
        reason = re.sub(pattern, words, reason)
    argument = re.search(r"(?:Option|has no attribute) '(\w+)'", reason)
    word = argument[1] if argument else (re.findall(r"\w+", value or reason) or [""])[-1]
    options = [] if argument else re.findall(r"'(\w+)'", reason.partition("Got value")[0])
    got = f" (given: {value})" if value not in reason and not re.match(r"\{|\[|Namespace|NestedArg", value) else ""
    classes = (
        _class_names() if not (options or keys_below) and re.search("class|Option|attribute|import", reason) else ()
    )
    names = {*options, *keys_below, *classes} - {word}
    hint = FILLED_IN.get(word, "") if argument else "write a list as [1, 2]" if reason.startswith(LIST) else ""
    return f"{reason}{got}\n{hint or did_you_mean(word, names)}".strip()


@functools.cache
def _class_names() -> frozenset[str]:
    """List the classes that the configuration may name, and their arguments."""
    modules = [sys.modules[name] for name in MODULES if name in sys.modules]
    classes = [(name, getattr(module, name)) for module in modules for name in module.__all__]
    arguments = (inspect.signature(value).parameters for _, value in classes if inspect.isclass(value))
    return frozenset({"class_path", "init_args"}.union((name for name, _ in classes), *arguments))


def explain_trainer(message: str, settings: Mapping[str, Any], command_line: CommandLine) -> str:
    """Name the key of the Trainer that its message is about."""
    words = set(re.findall(r"\w+", message))
    texts = {name: value for name, value in settings.items() if isinstance(value, str)}
    named = [name for name in settings if name in words] or [name for name in texts if texts[name] in words]
    key = next((f"trainer.{name}" for name in named if command_line.is_given(f"trainer.{name}")), None)
    return f"{command_line.origin(key) if key else 'trainer'}: {message.strip()}"


def _own_class(key: str, command_line: CommandLine) -> str:
    """Say how a class of one's own takes the place of the model or the data; empty for other keys."""
    group, _, argument = key.partition(".")
    if group not in OWN_CLASSES or argument.partition(".")[0] not in ("", "class_path", "init_args"):
        return ""
    path = command_line.value_of(f"{group}.class_path") or command_line.value_of(group) or "Mine"
    name = path.rpartition(".")[2]
    return f"for a class of your own run a file that calls main({OWN_CLASSES[group]}={name}): docs/your_own.md"


def unknown_key(key: str, keys: Iterable[str], command_line: CommandLine) -> str:
    """Name an unknown key, where it was given, and the nearest keys."""
    if not command_line.is_given(key) and key in command_line.flags:
        hint = "did you mean --config?" if key.endswith((".yaml", ".yml")) else "write a list as '[a, b]', with quotes"
        return f"{key}: is not the value of a key\n{hint}"
    if hint := _own_class(key, command_line):
        return f"{command_line.origin(key)}: there is no such key\n{hint}"
    known = set(keys)
    groups = {name.rpartition(".")[0] for name in known if "." in name}
    ends = sorted(name for name in known if name.endswith(f".{key}"))
    hint = f"did you mean {' or '.join(ends)}?" if ends else did_you_mean(key, known | groups)
    help_line = f"all keys: {command_line.program} --help"
    if command_line.program.endswith(" search"):
        help_line = f"keys of fit go into overrides or space\n{help_line}"
    elif key.startswith("space."):
        help_line = "a config with a space is for the command search"
    return f"{command_line.origin(key)}: there is no such key\n{hint or help_line}"
