"""Find config files: beside another file, in the working directory, or among the shipped ones."""

import os
from pathlib import Path

__all__ = ["find_config"]

PACKAGE = Path(__file__).parent
SHIPPED = (PACKAGE / "configs", PACKAGE.parent / "configs")  # of an installed wheel, of a clone


def find_config(path: str | Path, relative_to: Path | None = None) -> Path:
    """Find a config file.

    Args:
        path: As it was typed: absolute, relative, or the name of a shipped config with or without `configs/`.
        relative_to: A folder to look in first; default none but the working directory.

    Returns:
        The first file of that name, or `path` itself where there is none.
    """
    path = Path(path).expanduser()
    name = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    folders = [] if relative_to is None else [relative_to]
    candidates = [*(folder / path for folder in folders), path, *(folder / name for folder in SHIPPED)]
    # Path.is_file raises where a name is too long.
    return next((file for file in candidates if os.path.isfile(file)), path)  # noqa: PTH113
