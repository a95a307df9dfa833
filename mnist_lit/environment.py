"""Settings from the environment: any key as a variable, and three variables that are no keys."""

import os
from collections.abc import Container
from typing import NamedTuple

__all__ = ["DATA_DIR_VARIABLE", "DEBUG_VARIABLE", "FIRST_PROCESS_VARIABLE", "Setting", "read_environment"]

PREFIX = "MNIST_LIT_"
DATA_DIR_VARIABLE = "MNIST_LIT_DATA"
DEBUG_VARIABLE = "MNIST_LIT_DEBUG"
# The id of the process that has started this one for a run on several devices; set by that process.
FIRST_PROCESS_VARIABLE = "MNIST_LIT_FIRST_PROCESS"
NO_KEYS = (DATA_DIR_VARIABLE, DEBUG_VARIABLE, FIRST_PROCESS_VARIABLE)


class Setting(NamedTuple):
    """A key's value with the variable that it comes from."""

    variable: str
    value: str


def read_environment(command: str, commands: Container[str]) -> dict[str, Setting]:
    """The keys that the environment sets for a command.

    Args:
        command: The command that runs; `MNIST_LIT_FIT__MODEL__LR` is for `fit` alone, `MNIST_LIT_MODEL__LR` for all.
        commands: All commands.
    """
    settings: dict[str, Setting] = {}
    for variable, value in sorted(os.environ.items()):
        if variable.startswith(PREFIX) and variable not in NO_KEYS:
            key = variable.removeprefix(PREFIX).lower().replace("__", ".")
            first, _, rest = key.partition(".")
            if first not in commands:
                settings.setdefault(key, Setting(variable, value))
            elif first == command:
                settings[rest] = Setting(variable, value)
    if data_dir := os.environ.get(DATA_DIR_VARIABLE):
        settings.setdefault("data.data_dir", Setting(DATA_DIR_VARIABLE, data_dir))
    return settings
