"""Trust: what configurations may name, and what of a checkpoint's may be used that is anybody's."""

import inspect
import pkgutil
import re
from collections.abc import Collection, Iterator
from typing import Any

from jsonargparse import set_parsing_settings

from mnist_lit.errors import UsageError

__all__ = ["anybodys", "called_functions", "check_classes"]

# Of these settings jsonargparse 4 only warns: what runs, deletes or loads anything is refused wherever a class path
# names it, and where any value may stand, none is made an object.
set_parsing_settings(import_path_denylist=[], instantiate_subclass_spec_in_any=False)

# In what a checkpoint outside of a run's directory has no say, as it may be anybody's: classes that are called with
# what stands beside them, and places to read from, to write to and to listen at.
NOT_ANYBODYS = {
    "": ("ensemble", "host", "output", "port", "run_dir"),
    "data": ("data_dir", "mirrors", "predict_paths"),
    "trainer": ("accelerator", "callbacks", "logger", "plugins", "profiler", "strategy"),
}

TORCHS = re.compile(r"torch\.optim\.(\w+\.)?[A-Z]\w*")


def called_functions(config: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The class paths in a parsed configuration that name functions, each after its key.

    The parser makes sure that a class is of the right kind, but would call any function where it expects a factory.
    """
    if isinstance(config, dict):
        path = config.get("class_path")
        if isinstance(path, str) and not inspect.isclass(pkgutil.resolve_name(path)):
            yield key, path
        for name, value in config.items():
            yield from called_functions(value, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    elif isinstance(config, list):
        for value in config:
            yield from called_functions(value, key)


def anybodys(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that does no harm, whoever it is from, once `check_classes` has seen its model."""
    config = _without(config, NOT_ANYBODYS[""])
    return config | {name: _without(config[name], keys) for name, keys in NOT_ANYBODYS.items() if name in config}


def _without(content: Any, names: Collection[str]) -> Any:
    if not isinstance(content, dict):
        return content
    return {name: value for name, value in content.items() if name not in names}


def check_classes(model: Any, file: object) -> None:
    """Make sure that making a model runs nothing but torch.

    Args:
        model: The configuration of the model.
        file: The checkpoint that has it.

    Raises:
        UsageError: If it names classes that are not torch's, or functions.
    """
    for key in ("optimizer", "schedule"):
        spec = model.get(key) if isinstance(model, dict) else None
        if spec is not None and not _is_torchs(spec):
            name = spec.get("class_path") if isinstance(spec, dict) else spec
            raise UsageError(
                f"ckpt_path: {file} names code that is not torch's: model.{key} is {name}\n"
                "it is used only from its run's directory: RUN/checkpoints, beside RUN/config.yaml"
            )


def _is_torchs(spec: Any) -> bool:
    if not isinstance(spec, dict) or not TORCHS.fullmatch(str(spec.get("class_path"))):
        return False
    arguments = spec.get("init_args") or {}
    return (
        spec.keys() <= {"class_path", "init_args"} and isinstance(arguments, dict) and _is_inert([*arguments.values()])
    )


def _is_inert(value: Any) -> bool:
    """Whether it can name neither a function nor a class: those have dots or keys."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_inert, value))
    return "." not in value if isinstance(value, str) else not isinstance(value, dict)
