"""Image files for predictions: found by path, folder or pattern, and what may be the digit in each."""

import glob
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from mnist_lit.data.digits import Candidate, to_colors
from mnist_lit.errors import UsageError

Convert = Callable[[Image.Image], Sequence[Candidate]]


@dataclass(frozen=True)
class ImageFile:
    """Hold what may be the digit of an image file, or why it cannot be opened."""

    file: Path
    candidates: Sequence[Candidate] = ()
    num_frames: int = 1  # or pages, of which the first is taken
    problem: str = ""


def find_files(paths: Sequence[str]) -> list[Path]:
    """Find files, files in folders (but hidden ones) and files that match patterns like `photos/*.jpg`; each once.

    Raises:
        UsageError: If nothing is found for a path, or there is no path.
    """
    files: dict[Path, None] = {}
    for path in paths or [""]:
        if not (found := _expand(os.path.expanduser(path))):  # noqa: PTH111
            raise UsageError(
                f"data.predict_paths: there is no file {path!r}\n"
                "give files, folders or patterns, for example: --data.predict_paths 'photos/*.jpg'"
            )
        files |= dict.fromkeys(found)
    return list(files)


def _expand(path: str) -> list[Path]:
    # Not by pathlib, which raises errors of four kinds for impossible names.
    matches = [path] if os.path.exists(path) else glob.glob(path, recursive=True)  # noqa: PTH110, PTH207
    for folder in filter(os.path.isdir, tuple(matches)):
        matches += glob.glob(f"{glob.escape(folder)}/**", recursive=True)  # noqa: PTH207
    files = set(map(Path, matches))
    return sorted(file for file in files if file.exists() and not file.is_dir())


def load_image_files(files: Sequence[Path], convert: Convert) -> list[ImageFile]:
    """Convert each file to a network's input, with a progress bar if that takes long."""
    return [
        _load(file, convert) for file in tqdm(files, desc="Reading", unit="image", delay=2, leave=False, disable=None)
    ]


def _load(file: Path, convert: Convert) -> ImageFile:
    if not file.is_file():
        return ImageFile(file, problem="it is no file")  # opening a pipe would block
    try:
        # Pillow opens the files that it warns of, too.
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
            return ImageFile(file, convert(image), getattr(image, "n_frames", 1))
    except UnidentifiedImageError:
        return ImageFile(file, problem="it is no image")
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        return ImageFile(file, problem=str(error) or type(error).__name__)


def thumbnail(file: Path, side: int) -> Image.Image:
    """Open an image in colours, upright and not larger than `side` pixels."""
    with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
        upright = Image.fromarray((255 * to_colors(image)).astype(np.uint8))
    upright.thumbnail((side, side))
    return upright
