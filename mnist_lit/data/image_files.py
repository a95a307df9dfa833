"""Image files that people have: which ones are meant, and the digit in each."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from mnist_lit.data.digits import digit_in, grey_of
from mnist_lit.errors import UsageError
from mnist_lit.formatting import shorten

__all__ = ["Photograph", "find_files", "read_photographs", "thumbnail"]

HINT = "give files, folders or patterns, for example: --data.predict_paths 'photos/*.jpg'"


@dataclass(frozen=True)
class Photograph:
    """An image file.

    Args:
        file: Where it is.
        digit: What a network sees of it, of shape (28, 28); None if there is no digit.
        problem: Why it cannot be read as an image; empty if it can.
    """

    file: Path
    digit: NDArray[np.uint8] | None = None
    problem: str = ""


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files that are meant, each once.

    Args:
        paths: Files, folders (all that is in them and below, but hidden files) and patterns like `photos/*.jpg`.

    Raises:
        UsageError: If a path is none of them, or there is none.
    """
    files: dict[Path, None] = {}
    for path in paths or [""]:
        found = _found(path)
        if not found:
            raise UsageError(f"data.predict_paths: there is no file {path!r}\n{HINT}")
        files |= dict.fromkeys(found)
    return list(files)


def _found(path: str) -> list[Path]:
    try:
        return sorted(_meant(Path(path).expanduser())) if path else []
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"data.predict_paths: {shorten(path, 60)!r}: {reason}\n{HINT}") from error


def _meant(path: Path) -> Iterator[Path]:
    for place in [path] if path.exists() else Path(path.anchor).glob(str(path.relative_to(path.anchor))):
        below = place.rglob("*") if place.is_dir() else [place]
        yield from (file for file in below if not (file.is_dir() or _is_hidden(file.relative_to(place))))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_photographs(files: Sequence[Path]) -> list[Photograph]:
    """Read image files, with a progress bar where that takes long."""
    return [_read(file) for file in tqdm(files, desc="Reading", unit="image", delay=2, leave=False, disable=None)]


def _read(file: Path) -> Photograph:
    if file.exists() and not file.is_file():
        return Photograph(file, problem="it is no file")  # a pipe would be waited for
    try:
        # What Pillow warns of, it reads all the same.
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            return Photograph(file, digit_in(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "it is no image" if isinstance(error, UnidentifiedImageError) else str(error)
        return Photograph(file, problem=reason)


def thumbnail(file: Path, side: int) -> Image.Image:
    """An image as people see it, in colours, not larger than `side` pixels."""
    with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
        image.draft("RGB", (2 * side, 2 * side))
        upright = ImageOps.exif_transpose(image)
        if image.has_transparency_data or image.mode.startswith(("I", "F")):
            upright = Image.fromarray((255 * grey_of(image)).astype(np.uint8))
        width, height = (max(1, round(size * side / max(upright.size))) for size in upright.size)
        return upright.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
