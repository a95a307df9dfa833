"""Class paths in a configuration: which are refused, and which arguments their classes are given."""

import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

from jsonargparse import set_parsing_settings

from mnist_lit.command_line import walk

# jsonargparse 4 only warns of these: a class path that can run, delete or load anything is refused, and a value of any
# type is never made an object.
set_parsing_settings(import_path_denylist=[], instantiate_subclass_spec_in_any=False)


def called_functions(config: Any) -> Iterator[tuple[str, str]]:
    """List the class paths that name functions, each after its key.

    The parser checks that a class is of the right kind, but would call any function where it expects a factory.
    """
    for key, value in walk(config):
        path = value.get("class_path") if isinstance(value, dict) else None
        if isinstance(path, str) and not inspect.isclass(pkgutil.resolve_name(path)):
            yield key, path


def accepted_parameters(factory: Callable[..., Any]) -> set[str]:
    """Name the parameters of the class (or function) that a factory calls."""
    # jsonargparse makes a partial function with the class among its arguments.
    origin = next((arg for arg in getattr(factory, "args", ()) if isinstance(arg, type)), factory)
    return set(inspect.signature(origin).parameters)


def instantiate(factory: Callable[..., Any], *args: Any, **optional: Any) -> Any:
    """Call a factory with `args` and those of `optional` that it accepts."""
    accepted = accepted_parameters(factory)
    return factory(*args, **{name: value for name, value in optional.items() if name in accepted})
