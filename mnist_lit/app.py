"""The one door: `main(args)` checks what needs no torch, runs the command, and turns errors into short messages."""

import difflib
import gc
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from mnist_lit.config_files import find_config
from mnist_lit.environment import DEBUG_VARIABLE, Setting, read_environment
from mnist_lit.errors import MNISTLitError, Stopped, UsageError
from mnist_lit.formatting import escape_unprintable, shorten
from mnist_lit.machine_errors import describe_machine_error
from mnist_lit.signals import defer_signals, raise_on_signals

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from mnist_lit.cli import CLI

__all__ = ["COMMANDS", "CommandLine", "Request", "did_you_mean", "exists", "main", "read_config", "short_errors"]

COMMANDS = {
    "fit": "train a model, keep its best and its last checkpoint",
    "validate": "evaluate a checkpoint on the validation split",
    "test": "evaluate a checkpoint on the official test set",
    "predict": "read the digits in image files, or those of the test set",
    "export": "write a checkpoint as ONNX or .pt2 for other programs",
    "demo": "serve a page on which digits can be drawn",
    "compare": "show runs side by side: what differs, what they reached, their curves",
    "search": "search for the best configuration of fit with Optuna",
}
HELP = """usage: python -m mnist_lit COMMAND [--config FILE]... [--any.key VALUE]...

commands:
{commands}

python -m mnist_lit COMMAND --help       every key of a command: type, default, unit and range
python -m mnist_lit COMMAND --print_config    the configuration that a command line amounts to
python -m mnist_lit --version"""
MAX_ERROR_LINES, MAX_LINE = 5, 1000
# Far more than any config needs; the parser's time grows with both.
MAX_CONFIG_BYTES = 1_000_000
MAX_CONFIG_NODES = 10_000


class CommandLine:
    """Config files and flags as they were typed.

    Args:
        program: The command that they were given to.
        args: What follows it.
        environment: Settings from the environment.

    Raises:
        UsageError: If a config file is missing or no YAML.
    """

    def __init__(
        self, program: str, args: Sequence[str], environment: Mapping[str, Setting] = MappingProxyType({})
    ) -> None:
        self.program = program
        self.environment = environment
        self.configs = [setting.value for key, setting in environment.items() if key == "config"]
        self.flags: list[str] = []
        self._split(list(args))
        self.configs = [str(find_config(config)) for config in self.configs]
        for layer in self.layers():
            _check_aliases(layer)
        self.contents = [read_config(Path(config)) for config in self.configs]

    def layers(self) -> list[str]:
        """The arguments in order of precedence, the strongest last."""
        environment = [f"--{key}={setting.value}" for key, setting in self.environment.items() if key != "config"]
        return [*environment, *(f"--config={config}" for config in self.configs), *self.flags]

    def _split(self, args: list[str]) -> None:
        """Part `--config FILE` from the rest, so that the rest can be read last and wins wherever it stands."""
        while args:
            arg = args.pop(0)
            name, _, value = arg.partition("=")
            if name not in ("--config", "-c"):
                self.flags.append(arg)
            elif value or args:
                self.configs.append(value or args.pop(0))
            else:
                raise UsageError(f"{name} needs the path of a YAML file")


class Request(CommandLine):
    """What was typed, checked as far as that goes without importing torch.

    Args:
        args: The command line after `python -m mnist_lit`.

    Raises:
        UsageError: If the command is unknown, or a file that it names is missing or no YAML.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.args = list(args)
        self.command = args[0]
        if self.command not in COMMANDS:
            hint = did_you_mean(self.command, COMMANDS) or f"commands: {', '.join(COMMANDS)}"
            raise UsageError(f"{self.command!r} is no command\n{hint}")
        environment = read_environment(self.command, COMMANDS)
        super().__init__(f"python -m mnist_lit {self.command}", args[1:], environment)
        self.ckpt_path = self._find_checkpoint()

    def _find_checkpoint(self) -> str | None:
        """The checkpoint that the strongest layer names: the layer of its own settings has to lie below all others."""
        setting = self.environment.get("ckpt_path")
        path = setting.value if setting else None
        for content in self.contents:
            path = content.get("ckpt_path", path)
        for flag, following in zip(self.flags, [*self.flags[1:], None], strict=False):
            name, has_value, value = flag.partition("=")
            if name == "--ckpt_path":
                path = value if has_value else following
        if path in (None, "null"):
            return None
        if path == "":
            raise UsageError("ckpt_path: is empty\ngive a checkpoint file, a URL or a run directory")
        if "://" not in str(path) and not exists(Path(str(path))):
            raise UsageError(f"ckpt_path: {path!r} does not exist\ngive a checkpoint file, a URL or a run directory")
        return str(path)


def main(args: Sequence[str] | None = None, callbacks: Sequence["Callback"] = ()) -> "CLI":
    """Run one command.

    Args:
        args: The command line after `python -m mnist_lit`; default that of this process.
        callbacks: Callbacks of the trainer beside the configured ones.

    Returns:
        The command's `trainer`, `model` and `datamodule`.

    Raises:
        SystemExit: With 0 after `compare`, `search`, `--help`, `--version` and `--print_config`, 2 if what was typed
            cannot work, 1 if something went wrong later, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, 141 if
            nobody reads the output any more. The error is printed and is its cause.
    """
    args = sys.argv[1:] if args is None else args
    with short_errors():
        _answer_at_once(args)
        request = Request(args)
        # Interrupted, torch's own imports recurse for ever or abort.
        with _without_collection(), defer_signals():
            from mnist_lit.cli import run

        return run(request, callbacks)
    raise AssertionError


def dry_run(args: list[str]) -> "CLI":
    """Build all that a command line asks for, and run nothing."""
    from mnist_lit.cli import rehearse

    return rehearse(Request(args))


@contextmanager
def short_errors() -> Iterator[None]:
    """Turn errors into short messages and exit codes: the rest of `main` and of other scripts.

    Raises:
        SystemExit: In place of any error, which is its cause.
    """
    _open_closed_outputs()
    try:
        with _exit_codes():
            yield
    finally:
        _flush()


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except Stopped as stop:
        _say(str(stop))
        raise SystemExit(stop.exit_code) from stop
    except MNISTLitError as error:
        _fail(error, str(error), error.exit_code)
    except KeyboardInterrupt as error:
        _fail(error, "interrupted", 128 + signal.SIGINT)
    except BrokenPipeError as error:
        raise SystemExit(128 + signal.SIGPIPE) from error  # who was reading the output has had enough
    except Exception as error:
        if words := describe_machine_error(error):
            _fail(error, words, 1)
        _fail(error, f"{type(error).__name__}: {error}", 1, hint=f"for the whole story: {DEBUG_VARIABLE}=1")


def _open_closed_outputs() -> None:
    """Let what is printed go nowhere when a shell has closed the output, and not into the next file that is opened."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115


def _flush() -> None:
    """Write out what was printed, here, where it can still be said that it cannot be."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python tries again when it ends
        if isinstance(error, BrokenPipeError):
            raise SystemExit(128 + signal.SIGPIPE) from error
        _fail(error, f"standard output: {error.strerror}", 1)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """A line that suggests the names nearest to `word`, or nothing."""
    nearest = difflib.get_close_matches(word, list(names), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(nearest)}?" if nearest else ""


@contextmanager
def _without_collection() -> Iterator[None]:
    """Import without looking for garbage, of which there is none: that takes a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _answer_at_once(args: Sequence[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(HELP.format(commands="\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())))
    elif args[0] == "--version":
        print(f"mnist_lit {version('mnist_lit')}")
    elif args[0].startswith("-"):
        raise UsageError(f"the command comes first, got {args[0]!r}\nfor example: python -m mnist_lit fit {args[0]} …")
    elif args[0] == "compare":
        from mnist_lit.reports.comparison import compare

        compare(args[1:])
    elif args[0] == "search":
        from mnist_lit.search.driver import search
        from mnist_lit.search.worker import Program

        with raise_on_signals():
            search(args[1:], Program(main, dry_run))
    else:
        return
    raise SystemExit(0)


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; of a name that is too long there is none."""
    try:
        return path.exists()
    except OSError:
        return False


def read_config(path: Path) -> dict[str, Any]:
    """The content of a YAML file of keys.

    Raises:
        UsageError: If there is no such file, or something else in it.
    """
    try:
        text = _text(path)
        _check(yaml.compose(text, Loader=yaml.SafeLoader), path)
        content = yaml.safe_load(text)
    except FileNotFoundError:
        neighbours = {str(file) for file in path.parent.glob("*.yaml")} if path.parent.is_dir() else set()
        hint = did_you_mean(str(path), neighbours) or "give the path of a YAML file, for example configs/base.yaml"
        raise UsageError(f"--config: {path} does not exist\n{hint}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        raise UsageError(f"{place}: {error.problem}\nthe file is no valid YAML") from None
    # Of a date that is none, PyYAML says AttributeError.
    except (AttributeError, OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"--config: {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config: {path} holds no keys\nit needs lines like 'model:' and '  lr: 0.01'")
    return content


def _text(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise ValueError("it is no file but a directory, a pipe or a device")
    if path.exists() and path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"it has more than {MAX_CONFIG_BYTES:,} bytes")
    return path.read_text(encoding="utf-8")


def _check_aliases(flag: str) -> None:
    """As `_check`, of a flag or the value that follows one."""
    name, _, text = flag.partition("=") if flag.startswith("-") else (flag, "", flag)
    if not {"&", "*"} <= set(text):
        return
    try:
        _check(yaml.compose(text, Loader=yaml.SafeLoader), name)
    except ValueError as error:
        raise UsageError(f"{shorten(name, 100)}: {error}") from None
    except (yaml.YAMLError, RecursionError):
        return  # the parser says what is wrong with it


def _check(root: yaml.Node | None, path: object) -> None:
    """Make sure that no key is given twice, and that aliases do not blow a few lines up to a full memory."""
    nodes = [("", root)]
    num_nodes = 1
    while nodes:
        prefix, node = nodes.pop()
        children = _children(node, prefix, path)
        nodes += children
        num_nodes += len(children)
        if num_nodes > MAX_CONFIG_NODES:
            raise ValueError(f"with its aliases written out, it holds more than {MAX_CONFIG_NODES:,} values")


def _children(node: yaml.Node | None, prefix: str, path: object) -> list[tuple[str, yaml.Node | None]]:
    if isinstance(node, yaml.SequenceNode):
        return [(prefix, item) for item in node.value]
    if not isinstance(node, yaml.MappingNode):
        return []
    lines: dict[str, int] = {}
    for name, _ in node.value:
        key, line = f"{prefix}{name.value}", name.start_mark.line + 1
        if key in lines:
            raise UsageError(
                f"{path}, line {line}: {key}: is given already in line {lines[key]}\nleave one of them out"
            )
        lines[key] = line
    return [(f"{prefix}{name.value}.", value) for name, value in node.value]


def _fail(error: BaseException, message: str, exit_code: int, hint: str = "") -> NoReturn:
    if os.environ.get(DEBUG_VARIABLE):
        raise error
    lines = [escape_unprintable(shorten(line, MAX_LINE)) for line in message.splitlines() if line.strip()] or [
        "unknown"
    ]
    del lines[MAX_ERROR_LINES - bool(hint) :]
    _say("\n".join([f"error: {lines[0]}", *lines[1:], *[hint] * bool(hint)]))
    raise SystemExit(exit_code) from error


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may have been closed
        # In one piece: other processes of the run may say something in the same moment.
        print(f"{text}\n", end="", file=sys.stderr)
