"""Image files of any kind: found, opened, and converted to upright images of eight bits."""

import glob
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from mnist_lit.errors import UsageError


class Candidate(NamedTuple):
    """Hold what may be the digit of an image.

    Attributes:
        digit: Shape (28, 28), bright on black; of images from folders, any shape of theirs.
        prior: How likely it is, 1 at most, before the network has seen it.
        box: Where it is in the image: top, left, bottom, right.
    """

    digit: NDArray[np.uint8]
    prior: float = 1
    box: Sequence[float] = (0, 0, 28, 28)


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


def load_image_files(
    files: Sequence[Path], convert: Callable[[Image.Image], Sequence[Candidate]]
) -> Iterator[ImageFile]:
    """Convert each file in threads, with a progress bar if that takes long."""

    def load(file: Path) -> ImageFile:
        if not file.is_file():
            return ImageFile(file, problem="it is not a regular file")  # opening a pipe would block
        try:
            with Image.open(file) as image:
                return ImageFile(file, convert(image), getattr(image, "n_frames", 1))
        except UnidentifiedImageError:
            return ImageFile(file, problem="it is not an image")
        except Exception as error:  # Pillow's decoders raise errors of many kinds
            return ImageFile(file, problem=str(error) or type(error).__name__)

    # Pillow opens the files that it warns of, too.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        loaded = pool.map(load, files)
        yield from tqdm(loaded, "Reading", len(files), unit="image", delay=2, leave=False, disable=None)


def upright(image: Image.Image, mode: str, side: int) -> Image.Image:
    """Convert an image of any mode to upright `L` or `RGB`; what is transparent becomes a background of contrast.

    A JPEG may be decoded at a smaller size, at least `side`.
    """
    image.draft(mode, (side, side))
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # more than eight bits, of which an unknown part is used
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        low, high = np.percentile(values, (0.02, 99.98))  # single pixels may be broken
        values = np.clip((values - low) / max(high - low, 1e-6), 0, 1)
        image = Image.fromarray(np.round(255 * values).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"), dtype=np.float64)
        is_dark = (np.asarray(image.convert("L")) * alpha).sum() <= 128 * alpha.sum()
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white" if is_dark else "black"), image)
    return image.convert(mode)


def thumbnail(file: Path, side: int) -> Image.Image:
    """Open an image in colours, upright and not larger than `side` pixels."""
    with warnings.catch_warnings(action="ignore"), Image.open(file) as image:
        small = upright(image, "RGB", side)
    small.thumbnail((side, side))
    return small
