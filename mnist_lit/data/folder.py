"""Images in a folder for each class, laid out like torchvision's ImageFolder: train/CLASS/* and test/CLASS/*."""

import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset  # type: ignore[import-untyped]

from mnist_lit.data.datasets import stratified_split
from mnist_lit.data.image_files import Candidate, load_image_files, upright
from mnist_lit.data.mnist_files import Split
from mnist_lit.errors import UsageError

EXTENSIONS = (*IMG_EXTENSIONS, ".avif", ".gif", ".jfif")
LAYOUT = "put images into train/CLASS and test/CLASS below data.data_dir, or give another --data.data_dir"


def _join(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def find_classes(data_dir: Path) -> tuple[str, ...]:
    """Name the classes after the folders in `train`."""
    train = data_dir / "train"
    paths = sorted(train.iterdir()) if train.is_dir() else []
    names = tuple(path.name for path in paths if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        found = f"only one class, {names[0]!r}," if names else "no folder of a class"
        raise UsageError(f"data.dataset folder: there is {found} in {train}\n{LAYOUT}")
    return names


@dataclass(frozen=True)
class ImageFolder:
    """Load images of any size and mode, padded to a square and resized; like `DatasetInfo`."""

    class_names: tuple[str, ...]
    image_size: int
    in_channels: int
    test_size: int  # images of `train` that are tested on where there is no `test`

    def prepare(self, data_dir: Path, splits: Collection[Split], *_: Any) -> None:
        """Make sure that there are images for these splits."""
        for split in splits:
            self._find(data_dir, split)

    def fingerprint(self, data_dir: Path) -> int:
        """Hash the paths and modification times of the training images."""
        return hash(tuple((path, os.lstat(path).st_mtime_ns) for path, _ in self._find(data_dir, "train")))

    def load(self, data_dir: Path, split: Split) -> tuple[Tensor, Tensor]:
        """Load images, uint8 of shape (n, h, w) or, in colour, (n, 3, h, w), and labels of shape (n,)."""
        files = self._find(data_dir, split)
        shape = (len(files), *[self.in_channels] * (self.in_channels > 1), self.image_size, self.image_size)
        size, memory = np.prod(shape, dtype=float), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        rank_zero_only(print)(f"{split}: {len(files):,} images, {size / 1e6:,.1f} MB in memory", flush=True)
        others = [path for path in (data_dir / split).glob("[!.]*/**/[!.]*") if path.suffix.lower() not in EXTENSIONS]
        if names := [path.name for path in others if path.is_file()]:
            rank_zero_only(print)(
                f"note: no image types, left out of {data_dir / split}: {_join(names)}", file=sys.stderr
            )
        if size > 0.8 * memory:
            raise UsageError(f"they do not fit into {memory / 1e9:,.0f} GB of memory\nmake data.image_size smaller")
        images, damaged = torch.empty(shape, dtype=torch.uint8), []
        paths = [Path(path) for path, _ in files]
        for index, file in enumerate(load_image_files(paths, lambda image: [Candidate(self.convert(image))])):
            if file.problem:
                damaged.append(str(file.file))
            else:
                images[index] = torch.from_numpy(file.candidates[0].digit)
        if damaged:
            raise UsageError(f"no intact images: {_join(damaged)}\nremove or replace them")
        return images, torch.tensor([label for _, label in files])

    def convert(self, image: Image.Image) -> NDArray[np.uint8]:
        """Convert any picture to an image of the data set, of shape (h, w) or, in colour, (3, h, w)."""
        image = upright(image, "RGB" if self.in_channels == 3 else "L", 2 * self.image_size)
        pixels = np.array(ImageOps.pad(image, (self.image_size, self.image_size)))
        return pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def _find(self, data_dir: Path, split: Split) -> list[tuple[str, int]]:
        """List path and label of each image of a split."""
        folder = data_dir / split
        if (data_dir / "test").is_dir() or (split == "train" and not self.test_size):
            return self._list(folder)
        if not self.test_size:
            raise UsageError(f"there is no {folder}\nmake it, or hold out images of train: --data.test_size NUMBER")
        files = self._list(data_dir / "train")
        labels = torch.tensor([label for _, label in files])
        train, test = stratified_split(labels, self.test_size, "data.test_size")
        return [files[index] for index in (train if split == "train" else test).tolist()]

    def _list(self, folder: Path) -> list[tuple[str, int]]:
        labels = {name: label for label, name in enumerate(self.class_names)}
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.suffix.lower() in EXTENSIONS and path.is_file():
                raise UsageError(f"{path} is in no folder of a class\n{LAYOUT}")
            if path.is_dir() and path.name not in labels and not path.name.startswith("."):
                raise UsageError(f"{path} is none of the classes {', '.join(labels)}\nremove it, or train anew")
        files: list[tuple[str, int]] = make_dataset(folder, labels, EXTENSIONS, allow_empty=True)
        files = [(path, label) for path, label in files if "/." not in path.removeprefix(str(folder))]  # none is hidden
        missing = set(labels.values()) - {label for _, label in files}
        if missing and (folder.name == "train" or not files):
            name = self.class_names[min(missing)]
            raise UsageError(f"there is no image in {folder / name}\n{LAYOUT}; types: {' '.join(EXTENSIONS)}")
        return files
