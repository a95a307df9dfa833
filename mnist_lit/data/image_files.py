"""Image files for predictions: found by path, folder or pattern, and the digit in each."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from mnist_lit.data.digits import extract_digit, to_grayscale
from mnist_lit.errors import UsageError

__all__ = ["ImageFile", "find_files", "load_image_files", "thumbnail"]

HINT = "give files, folders or patterns, for example: --data.predict_paths 'photos/*.jpg'"


@dataclass(frozen=True)
class ImageFile:
    """Hold the digit of an image file.

    Args:
        file: Path of the file.
        digit: Its digit, uint8 of shape (28, 28); None if it has none.
        problem: Reason why the file cannot be read as an image; empty if it can.
    """

    file: Path
    digit: NDArray[np.uint8] | None = None
    problem: str = ""


def find_files(paths: Sequence[str]) -> list[Path]:
    """Find image files, each once.

    Args:
        paths: Files, folders (with all files below them, but hidden ones) and patterns like `photos/*.jpg`.

    Raises:
        UsageError: If nothing is found for a path, or there is no path.
    """
    files: dict[Path, None] = {}
    for path in paths or [""]:
        try:
            found = sorted(_expand(Path(path).expanduser())) if path else []
        except (OSError, ValueError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"data.predict_paths: {path[:60]!r}: {reason}\n{HINT}") from error
        if not found:
            raise UsageError(f"data.predict_paths: there is no file {path!r}\n{HINT}")
        files |= dict.fromkeys(found)
    return list(files)


def _expand(path: Path) -> Iterator[Path]:
    for match in [path] if path.exists() else Path(path.anchor).glob(str(path.relative_to(path.anchor))):
        files = match.rglob("*") if match.is_dir() else [match]
        yield from (file for file in files if not (file.is_dir() or _is_hidden(file.relative_to(match))))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def load_image_files(files: Sequence[Path]) -> list[ImageFile]:
    """Extract the digit of each file, with a progress bar if that takes long."""
    return [_load(file) for file in tqdm(files, desc="Reading", unit="image", delay=2, leave=False, disable=None)]


def _load(file: Path) -> ImageFile:
    if file.exists() and not file.is_file():
        return ImageFile(file, problem="it is no file")  # opening a pipe would block
    try:
        # Pillow opens the files that it warns of, too.
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            return ImageFile(file, extract_digit(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "it is no image" if isinstance(error, UnidentifiedImageError) else str(error)
        return ImageFile(file, problem=reason)


def thumbnail(file: Path, side: int) -> Image.Image:
    """Open an image in colours, upright and not larger than `side` pixels."""
    with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
        image.draft("RGB", (2 * side, 2 * side))
        upright = ImageOps.exif_transpose(image)
        if image.has_transparency_data or image.mode.startswith(("I", "F")):
            upright = Image.fromarray((255 * to_grayscale(image)).astype(np.uint8))
        width, height = (max(1, round(size * side / max(upright.size))) for size in upright.size)
        return upright.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
