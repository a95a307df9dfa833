"""The letters of EMNIST, from files that torchvision has downloaded; an example of a data set in code."""

import gzip
import struct
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnist_lit.data.mnist_files import Split
from mnist_lit.errors import MNISTLitError

NUM_LETTERS = 26
KINDS = ("images-idx3", "labels-idx1")


def prepare(data_dir: Path, splits: Collection[Split], *_: Any) -> None:
    """Make sure that the files of these splits are there."""
    for split in splits:
        for kind in KINDS:
            _find(data_dir, split, kind)


def load(data_dir: Path, split: Split) -> tuple[Tensor, Tensor]:
    """Load the images of a split, of shape (n, 28, 28), and the labels: 0 for a, 25 for z."""
    images, labels = (_read(_find(data_dir, split, kind)) for kind in KINDS)
    if images.shape != (len(labels), 28, 28) or not 1 <= labels.min() <= labels.max() <= NUM_LETTERS:
        raise MNISTLitError(f"EMNIST: the files of {split} do not belong together\ndownload them again")
    return images.transpose(1, 2).contiguous(), labels.long() - 1  # rows and columns are exchanged in the files


def _find(data_dir: Path, split: Split, kind: str) -> Path:
    file = data_dir / "EMNIST" / "raw" / f"emnist-letters-{split}-{kind}-ubyte"
    if found := next(filter(Path.is_file, (file, file.with_name(f"{file.name}.gz"))), None):
        return found
    code = f"from torchvision.datasets import EMNIST; EMNIST({str(data_dir)!r}, 'letters', download=True)"
    raise MNISTLitError(f'EMNIST: there is no {file}, raw or .gz\ntorchvision downloads it: python -c "{code}"')


def _read(file: Path) -> Tensor:
    """Read unsigned bytes in the IDX format, raw or compressed."""
    content = file.read_bytes()
    try:
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        shape = struct.unpack_from(f">{content[3]}I", content, offset=4)
        values = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * len(shape))
        return values.view(shape)
    except (OSError, EOFError, IndexError, ValueError, RuntimeError, struct.error, zlib.error) as error:
        raise MNISTLitError(f"EMNIST: {file} is damaged: {error}\nremove it, and download it again") from error
