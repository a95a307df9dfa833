"""The layers of configuration and their merge: command line over config over environment over checkpoint."""

import json
import math
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from mnist_lit.app import Request
from mnist_lit.errors import UsageError
from mnist_lit.formatting import escape_unprintable
from mnist_lit.parser_errors import explain, given_at
from mnist_lit.training.checkpoints import Source
from mnist_lit.trust import anybodys, called_functions

__all__ = ["Parser", "parse"]

ABOVE_ZERO = ("trainer.accumulate_grad_batches", "trainer.check_val_every_n_epoch", "trainer.val_check_interval")
LARGEST = 2**63  # where the integers of torch end

# Some defaults of Lightning are strings of a class of their own: Timer's interval, for one.
yaml.SafeDumper.add_multi_representer(str, yaml.SafeDumper.represent_str)


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
    contents = list(request.contents)
    if source is not None:
        contents.insert(0, _checkpoint_layer(source, defaults))
        args.insert(1, f"--config={yaml.safe_dump(contents[0], default_flow_style=True, width=10**9)}")
    unchecked = [flag for content in contents for flag in _unchecked(content, defaults)]
    try:
        if unchecked:
            parser.parse_args([request.command, *unchecked])
        config = parser.parse_args(args)
        _check_classes(config[request.command], request)
        _check_numbers(config[request.command], request)
        if printing:
            parser.parse_args([*args, *printing])
    except ParserError as error:
        raise UsageError(explain(str(error), list(defaults.keys()), request)) from error
    if request.command != "fit" and source is None:
        raise UsageError(f"{request.command} needs a checkpoint\ngive --ckpt_path: a run directory, a file or a URL")
    return config, source


def _unchecked(content: dict[str, Any], defaults: Namespace, prefix: str = "") -> Iterator[str]:
    """What the parser takes from a file whether or not it has the right type, as flags, which it checks."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        is_group = isinstance(defaults.get(key), Namespace)
        if is_group and isinstance(value, dict):
            yield from _unchecked(value, defaults, f"{key}.")
        elif key in defaults and (value is None or (is_group and not isinstance(value, str))):
            yield f"--{key}={json.dumps(value, default=str)}"


def _check_classes(config: Namespace, request: Request) -> None:
    for key, class_path in called_functions(config.as_dict()):
        raise UsageError(f"{given_at(key, request) or key}: {class_path} is no class")


def _check_numbers(config: Namespace, request: Request) -> None:
    """What torch or Lightning would stumble over when the run has begun already."""
    wrong = [(key, ">0") for key in ABOVE_ZERO if isinstance(config.get(key), (int, float)) and config[key] <= 0]
    if not 0 <= (config.seed_everything or 0) < 2**32:
        wrong.append(("seed_everything", ">=0 and <2^32"))
    if config.run_dir == "":
        wrong.append(("run_dir", "a folder"))
    wrong += [(key, "a finite number below 2^63") for key in _boundless(config.as_dict(), [])]
    # A key that is filled in from another one stands nowhere.
    places = [(given_at(key, request), key, wanted) for key, wanted in wrong]
    for place, key, wanted in sorted(places, key=lambda found: found[0] is None)[:1]:
        raise UsageError(f"{place or key}: must be {wanted}, got {config.get(key)}")


def _boundless(value: Any, path: list[str]) -> Iterator[str]:
    """The keys of numbers that are NaN, infinite or, if whole, too large; also of those in lists."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _boundless(part, [*path, str(name)])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _boundless(part, path)
    elif (isinstance(value, int) and abs(value) >= LARGEST) or (isinstance(value, float) and not math.isfinite(value)):
        yield ".".join(path)


def _checkpoint_layer(source: Source, defaults: Namespace) -> dict[str, Any]:
    known = _known(source.config, defaults.as_dict(), [])
    if not source.is_of_run:
        known = anybodys(known)
    return {**known, "ckpt_path": None}


def _known(config: dict[str, Any], defaults: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """The part of a checkpoint's configuration that this version still has; says what it leaves out."""
    known = {}
    for name, value in config.items():
        if name not in defaults:
            key = ".".join([*path, str(name)])
            print(
                f"note: {escape_unprintable(key)} of the checkpoint is no option any more and is left out",
                file=sys.stderr,
            )
        elif isinstance(value, dict) and isinstance(defaults[name], dict):
            known[name] = _known(value, defaults[name], [*path, name])
        else:
            known[name] = value
    return known
