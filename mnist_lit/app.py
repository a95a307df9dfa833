"""The entry point: `main(args)` runs a command and turns errors into short messages and exit codes."""

import functools
import gc
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

from mnist_lit.command_line import COMMANDS, DEBUG_VARIABLE, CommandLine, program_name, read_environment
from mnist_lit.errors import MNISTLitError, Stopped, UsageError, describe_machine_error, did_you_mean, format_own_frames
from mnist_lit.formatting import escape_unprintable, shorten
from mnist_lit.process import set_import_variables
from mnist_lit.signals import defer_signals, ignore_sigint, raise_on_signals
from mnist_lit.version import __version__

if TYPE_CHECKING:
    from lightning.pytorch import Callback

    from mnist_lit.data.datamodule import MNISTDataModule
    from mnist_lit.model.classifier import Classifier


HELP = """usage: {program} COMMAND [--config FILE]... [--any.key VALUE]...

commands:
{commands}

{program} COMMAND --help       every key of a command: type, default, unit and range
{program} COMMAND --print_config    the configuration that a command line amounts to
{program} --version"""
MAX_ERROR_LINES, MAX_LINE = 5, 1000


def main(
    args: Sequence[str] | None = None,
    *,
    model_class: "type[Classifier] | None" = None,
    datamodule_class: "type[MNISTDataModule] | None" = None,
    callbacks: Sequence["Callback"] = (),
    is_dry: bool = False,
) -> Any:
    """Run one command.

    Args:
        args: The command line after `python -m mnist_lit`; default that of this process.
        model_class: The model; its `__init__` arguments are the keys below `model`. Default ConvNet.
        datamodule_class: The data; its `__init__` arguments are the keys below `data`. Default MNISTDataModule.
        callbacks: Callbacks of the trainer beside the configured ones.
        is_dry: Whether everything is built, and nothing is run or written.

    Returns:
        The command's CLI with its `trainer`, `model` and `datamodule`; of `search` Optuna's study.

    Raises:
        SystemExit: With 0 after `compare`, `--help`, `--version` and `--print_config`, 2 if what was typed cannot
            work, 1 if something went wrong later, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP. The error is
            printed and is its cause.
    """
    if "_ARGCOMPLETE" in os.environ:  # for the completion in a shell, jsonargparse lists the keys when it parses
        args = os.environ["COMP_LINE"].split()[1:2]
    command, *flags = (sys.argv[1:] if args is None else args) or ["--help"]
    # A terminal sends Ctrl-C to all processes of a run; the first one stops the others.
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    classes: dict[str, Any] = {"model_class": model_class, "datamodule_class": datamodule_class}
    with short_errors(), raise_on_signals() if is_first else ignore_sigint():
        _answer_without_torch(command, flags)
        set_import_variables()
        if command == "search":
            from mnist_lit.search.driver import search

            return search(flags, functools.partial(main, **classes))
        command_line = CommandLine(f"{program_name()} {command}", flags, read_environment(command))
        # torch's imports abort or recurse endlessly when they are interrupted. Garbage collection takes a fifth of
        # their time and finds nothing.
        with defer_signals():
            gc.disable()
            from mnist_lit.commands import run

            gc.enable()
        return run(command, command_line, callbacks=callbacks, is_dry=is_dry, **classes)
    raise AssertionError


def _answer_without_torch(command: str, flags: Sequence[str]) -> None:
    """Answer what needs no import of torch, which takes seconds; return if there is more to do."""
    if command in ("-h", "--help"):
        commands = "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())
        print(HELP.format(program=program_name(), commands=commands))
    elif command == "--version":
        print(f"mnist_lit {__version__}")
    elif command == "compare":
        from mnist_lit.reports.compare import compare

        compare(flags)
    elif command.startswith("-"):
        raise UsageError(f"the command comes first, got {command!r}\nfor example: {program_name()} fit {command} …")
    elif command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS) or f"commands: {', '.join(COMMANDS)}"
        raise UsageError(f"{command!r} is not a command\n{hint}")
    else:
        return
    raise SystemExit(0)


@contextmanager
def short_errors() -> Iterator[None]:
    """Turn errors into short messages and exit codes.

    Raises:
        SystemExit: In place of any error, which is its cause.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        _fail(error, "interrupted", 128 + signal.SIGINT)
    except BrokenPipeError as error:
        raise SystemExit(128 + signal.SIGPIPE) from error
    except (MNISTLitError, Stopped) as error:
        _fail(error, str(error), error.exit_code)
    except Exception as error:
        _fail(error, describe_machine_error(error), 1)


def _fail(error: BaseException, message: str, exit_code: int) -> NoReturn:
    """Print a short message, or for an error of code its own frames, and exit."""
    if os.environ.get(DEBUG_VARIABLE):
        raise error
    frames: list[str] = []
    hints = getattr(error, "__notes__", [])
    if not message:
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        frames = format_own_frames(error).splitlines()
        hints = [*hints, f"{DEBUG_VARIABLE}=1 shows the whole traceback"]
    lines = [line for line in message.splitlines() if line.strip()] or ["unknown"]
    lines = [*lines[: MAX_ERROR_LINES - len(hints)], *frames, *hints]
    lines[0] = lines[0] if isinstance(error, Stopped) else f"error: {lines[0]}"
    with suppress(OSError):  # the terminal may have been closed
        # In one write: other processes of the run may print at the same moment.
        print("".join(f"{escape_unprintable(shorten(line, MAX_LINE))}\n" for line in lines), end="", file=sys.stderr)
    raise SystemExit(exit_code) from error
