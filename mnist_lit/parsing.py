"""The layers of configuration: command line over config over environment over checkpoint over defaults."""

import json
import math
import os
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from typing import Any

import yaml
from jsonargparse import Namespace
from jsonargparse.typing import restricted_number_type
from lightning.pytorch.cli import LightningArgumentParser, ReduceLROnPlateau

from mnist_lit.class_paths import called_functions
from mnist_lit.command_line import CommandLine, walk
from mnist_lit.errors import UsageError
from mnist_lit.parser_errors import explain

# Some defaults of Lightning are strings of a class of their own: Timer's interval, for one.
yaml.SafeDumper.add_multi_representer(str, yaml.SafeDumper.represent_str)
# Lightning's class of this name, which wants a monitor, would make the bare name ambiguous for the parser.
ReduceLROnPlateau.__module__ = "torch.optim.lr_scheduler"

# Annotated Any, as mypy takes no type that a function makes; without a name jsonargparse makes one of the range.
Threads: Any = restricted_number_type(None, int, [(">=", 1), ("<=", 1024)])
Port: Any = restricted_number_type(None, int, [(">=", 1), ("<=", 65535)])
AT_LEAST_ONE = ("trainer.accumulate_grad_batches", "trainer.check_val_every_n_epoch", "trainer.val_check_interval")

PATHS = ("ckpt_path", "init_from", "run_dir", "ensemble", "output", "data.data_dir", "data.predict_paths")


def add_command_arguments(parser: LightningArgumentParser, command: str) -> None:
    """Add the arguments of a command beside trainer, model, data and callbacks."""
    add = parser.add_argument
    add("--ckpt_path", type=str | None, help="Checkpoint: a run directory, a file or a URL.")
    if command == "fit":
        text = "Checkpoint whose weights a new run starts from: a run directory, a file or a URL. All else is fresh."
        add("--init_from", type=str | None, help=text)
    text = "Folder of the run; default the next free logs/run_N, of other commands than fit that of the checkpoint."
    add("--run_dir", type=str | None, help=text)
    add("--test_after_fit", type=bool, default=False, help="Whether fit ends with a test of the best checkpoint.")
    add("--csv", type=bool, default=False, help="Whether the scalars are also written to RUN/metrics.csv.")
    add("--report", type=bool, default=True, help="Whether the run is also shown on a page, RUN/report.html.")
    text = (
        "Threads of torch on the CPU, 1 to 1024; default one for each core that the process may use. The last bits "
        "depend on it. GOMP_SPINCOUNT is set to 4000 unless it or OMP_WAIT_POLICY is set."
    )
    add("--num_threads", type=Threads | None, help=text)
    if command != "fit":
        text = "More checkpoints (file, URL, run directory), whose probabilities are averaged with ckpt_path's."
        add("--ensemble", type=list[str], default=[], help=text)
    if command == "export":
        text = "File to write, from uint8 images to probabilities: `.onnx` or `.pt2`."
        add("--output", type=str, default="model.onnx", help=text)
    if command == "demo":
        text = "Address to listen at; the default can be reached from this machine only."
        add("--host", type=str, default="127.0.0.1", help=text)
        add("--port", type=Port, default=7860, help="Port to listen at, 1 to 65535.")


def parse(parser: LightningArgumentParser, command_line: CommandLine, base: dict[str, Any] | None) -> Namespace:
    """Merge all layers; print the merge and exit where `--print_config` asks for it.

    Args:
        parser: The parser of the command.
        command_line: What was typed.
        base: The configuration of a checkpoint, which lies below all that was typed.

    Raises:
        UsageError: If there is no such key or value.
    """
    defaults = parser.get_defaults()
    layers = command_line.layers()
    printing = [flag for flag in layers if flag.startswith("--print_config")]
    args = [flag for flag in layers if flag not in printing]
    contents = list(command_line.contents)
    if base is not None:
        known = _known(base, defaults.as_dict())
        contents.insert(0, {**known, "ckpt_path": None, "run_dir": None})
        args.insert(0, f"--config={yaml.safe_dump(contents[0], default_flow_style=True, width=10**9)}")
    try:
        if unchecked := [flag for content in contents for flag in _unchecked(content, defaults)]:
            parser.parse_args(unchecked)
        config = parser.parse_args(args)
        _check(config, command_line)
        if printing:
            parser.parse_args([*args, *printing])
    except ArgumentError as error:
        raise UsageError(explain(str(error), list(defaults.keys()), command_line)) from error
    for key in PATHS:
        if value := config.get(key):
            paths = [os.path.expanduser(path) for path in ([value] if isinstance(value, str) else value)]  # noqa: PTH111
            config[key] = paths[0] if isinstance(value, str) else paths  # no Path, which would take a slash of https://
    return config


def _unchecked(content: dict[str, Any], defaults: Namespace, prefix: str = "") -> Iterator[str]:
    """List what the parser takes from a file whatever its type, as flags, which it checks."""
    for name, value in content.items():
        key = f"{prefix}{name}"
        is_group = isinstance(defaults.get(key), Namespace)
        if is_group and isinstance(value, dict):
            yield from _unchecked(value, defaults, f"{key}.")
        elif key in defaults and (value is None or (is_group and not isinstance(value, str))):
            yield f"--{key}={json.dumps(value, default=str)}"


def _check(config: Namespace, command_line: CommandLine) -> None:
    """Check what torch or Lightning would fail at when the run has begun already."""
    for key, class_path in called_functions(config.as_dict()):
        raise UsageError(f"{command_line.origin(key)}: {class_path} is not a class")
    wrong = [(key, ">0") for key in AT_LEAST_ONE if isinstance(config.get(key), (int, float)) and config[key] <= 0]
    if not 0 <= (config.seed_everything or 0) < 2**32:
        wrong.append(("seed_everything", ">=0 and <2^32"))
    if config.run_dir == "":
        wrong.append(("run_dir", "a folder"))
    if "init_from" in config and command_line.value_of("ckpt_path") is not None:
        if config.trainer.fast_dev_run:
            wrong.append(("trainer.fast_dev_run", "left out with --ckpt_path, as it begins anew"))
        if command_line.value_of("init_from") is not None:
            wrong.append(("init_from", "left out with --ckpt_path, which goes on with another run"))
    for key, value in walk(config.as_dict()):
        limit = 2**63 if isinstance(value, int) else math.inf
        if isinstance(value, (int, float)) and not abs(value) < limit:  # nor NaN
            wrong.append((key, "a finite number below 2^63"))
    # A key that another one fills in is given nowhere.
    if wrong:
        key, wanted = min(wrong, key=lambda found: not command_line.is_given(found[0]))
        raise UsageError(f"{command_line.origin(key)}: must be {wanted}, got {config.get(key)}")


def _known(config: dict[str, Any], defaults: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keep the part of a checkpoint's configuration that this version has; print what it leaves out."""
    known = {}
    for name, value in config.items():
        if name not in defaults:
            key = f"{prefix}{name}"
            print(f"note: {key!a} of the checkpoint is not an option any more and is left out", file=sys.stderr)
        elif isinstance(value, dict) and isinstance(defaults[name], dict):
            known[name] = _known(value, defaults[name], f"{prefix}{name}.")
        else:
            known[name] = value
    return known
