"""The layers of configuration and their merge: command line over config over environment over checkpoint."""

import sys
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from mnist_lit.checkpoints import Source
from mnist_lit.complaints import explain
from mnist_lit.entry import Request
from mnist_lit.errors import UsageError

__all__ = ["Parser", "parse"]

# Keys of the trainer that take classes, which are called with what stands beside them. A checkpoint outside of a run's
# directory may be anybody's; the model's classes have to be optimizers and schedules.
OBJECTS = ("accelerator", "callbacks", "logger", "plugins", "profiler", "strategy")


class ParserError(Exception):
    """What the parser complains about, in its own words."""


class Parser(LightningArgumentParser):
    """Lightning's parser without abbreviations, usage and exits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Leave what to say to the caller."""
        raise ParserError(message) from ex


def parse(parser: Parser, request: Request, defaults: Namespace) -> tuple[Namespace, Source | None]:
    """Merge all layers; print the merge and exit where that is asked for.

    Args:
        parser: The parser of all commands.
        request: What was typed.
        defaults: The weakest layer: all keys of the command.

    Returns:
        The configuration, and the checkpoint that is a layer of it.

    Raises:
        UsageError: If there is no such key or value.
    """
    layers = request.layers()
    printing = [flag for flag in layers if flag.startswith("--print_config")]
    args = [request.command, *(flag for flag in layers if flag not in printing)]
    source = Source(request.ckpt_path, for_fit=request.command == "fit") if request.ckpt_path else None
    if source is not None:
        args.insert(1, _checkpoint_layer(source, defaults))
    try:
        config = parser.parse_args(args)
        if printing:
            parser.parse_args([*args, *printing])
    except ParserError as error:
        raise UsageError(explain(str(error), list(defaults.keys()), request)) from error
    if request.command != "fit" and source is None:
        raise UsageError(f"{request.command} needs a checkpoint\ngive --ckpt_path: a run directory, a file or a URL")
    return config, source


def _checkpoint_layer(source: Source, defaults: Namespace) -> str:
    known = _known(source.config, defaults.as_dict(), [])
    if source.run_dir is None:
        known["trainer"] = {key: value for key, value in known.get("trainer", {}).items() if key not in OBJECTS}
    config = {**known, "ckpt_path": None}
    return f"--config={yaml.safe_dump(config, default_flow_style=True, width=10**9)}"


def _known(config: dict[str, Any], defaults: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """The part of a checkpoint's configuration that this version still has; says what it leaves out."""
    known = {}
    for name, value in config.items():
        if name not in defaults:
            key = ".".join([*path, name])
            print(f"note: {key} of the checkpoint is no option any more and is left out", file=sys.stderr)
        elif isinstance(value, dict) and isinstance(defaults[name], dict):
            known[name] = _known(value, defaults[name], [*path, name])
        else:
            known[name] = value
    return known
