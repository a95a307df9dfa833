"""Factories that the parser makes of class paths, called with what their classes take."""

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["arguments", "made"]


def arguments(factory: Callable[..., Any]) -> set[str]:
    """The names of the arguments of the class (or function) that a factory makes objects of."""
    # The parser hands over a partial function with the class among its arguments.
    origin = next((arg for arg in getattr(factory, "args", ()) if isinstance(arg, type)), factory)
    return set(inspect.signature(origin).parameters)


def made(factory: Callable[..., Any], *args: Any, **filled_in: Any) -> Any:
    """The factory's object; of `filled_in` it is given the arguments that it takes."""
    accepted = arguments(factory)
    return factory(*args, **{name: value for name, value in filled_in.items() if name in accepted})
