"""Data sets: images with labels in memory, and by name how they are downloaded and loaded."""

import string
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jsonargparse.typing import extend_base_type
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision import datasets  # type: ignore[import-untyped]

from mnist_lit.data.mnist_files import MNISTFiles, Split
from mnist_lit.errors import UsageError

Batch: TypeAlias = tuple[Tensor, Tensor]

NUM_TEST_DIGITS = 360


@dataclass(frozen=True)
class DatasetInfo:
    """Describe a data set.

    Args:
        class_names: Names of the classes, in the order of the labels 0, 1, 2, ...
        load: Function of the data folder and a split. It returns images, uint8 of shape (n, h, w) or (n, c, h, w) with
            bright ink on 0, and labels, int64 of shape (n,).
        prepare: Function like `MNISTFiles.prepare` that makes sure that the files of some splits are there.
        convert: Function that makes any picture an image of the data set, uint8, or None if there is nothing on it;
            default the ink in the form of MNIST.
    """

    class_names: tuple[str, ...]
    load: Callable[[Path, Split], tuple[Tensor, Tensor]]
    prepare: Callable[[Path, Collection[Split], Sequence[str] | None, bool, float], None] = lambda *_: None
    convert: Callable[[Image.Image], NDArray[np.uint8] | None] | None = None


class ImageDataset(Dataset[Batch]):
    """Hold uint8 images, of shape (n, h, w) or (n, c, h, w), with labels, and gather whole batches by index."""

    def __init__(self, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> None:
        self.images = images
        self.labels = labels
        self.indices = torch.arange(len(labels)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Gather images of shape (n, c, h, w) and their labels; the data loader calls this once per batch."""
        # A copy that blocks would wait until the GPU has finished the step before.
        positions = torch.tensor(indices, dtype=torch.long).to(self.indices.device, non_blocking=True)
        chosen = self.indices[positions]
        images = self.images[chosen]
        return images if images.ndim == 4 else images.unsqueeze(1), self.labels[chosen]

    def to(self, device: torch.device) -> "ImageDataset":
        return ImageDataset(self.images.to(device), self.labels.to(device), self.indices.to(device))


def stratified_split(labels: Tensor, num_held_out: int, key: str = "num_held_out") -> tuple[Tensor, Tensor]:
    """Split (n,) labels in two with equal shares of each class; the same labels are always split alike.

    Returns:
        The sorted int64 indices of the kept and of the `num_held_out` images.

    Raises:
        UsageError: If none is kept; the message names the `key` that has the number.
    """
    num = len(labels)
    if num_held_out >= num:
        raise UsageError(
            f"{key} {num_held_out} leaves none of the {num} images to train on\n"
            f"use less, for example --{key} {num // 6}"
        )
    order = torch.randperm(num, generator=torch.Generator().manual_seed(0))
    by_class = order[labels[order].argsort(stable=True)]
    is_held_out = torch.zeros(num, dtype=torch.bool)
    is_held_out[by_class[torch.arange(num_held_out) * num // max(num_held_out, 1)]] = True
    return (~is_held_out).nonzero().flatten(), is_held_out.nonzero().flatten()


def _load_digits(_: Path, split: Split) -> tuple[Tensor, Tensor]:
    """Load the 8x8 digits of scikit-learn in the form of MNIST: 1,437 to train and 360 to test."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # here, as its import takes a second

    digits = load_digits()
    images = torch.from_numpy(digits.images).unsqueeze(1) * (255 / 16)
    images = F.interpolate(images, size=(20, 20), mode="bicubic", antialias=True).clamp(0, 255).round()
    images = F.pad(images, (4, 4, 4, 4)).squeeze(1).to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    train, test = stratified_split(labels, NUM_TEST_DIGITS)
    indices = train if split == "train" else test
    return images[indices], labels[indices]


DIGITS = tuple(string.digits)
MNIST = MNISTFiles(
    datasets.MNIST,
    ["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"],
    {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
)
FASHION_MNIST = MNISTFiles(datasets.FashionMNIST, ["https://storage.googleapis.com/tensorflow/tf-keras-datasets/"])
KMNIST = MNISTFiles(datasets.KMNIST, ["https://codh.rois.ac.jp/kmnist/dataset/kmnist/"])
# Any entry is a valid `data.dataset`: a project adds its own.
DATASETS = {
    "mnist": DatasetInfo(DIGITS, MNIST.load, MNIST.prepare),
    "fashion_mnist": DatasetInfo(tuple(datasets.FashionMNIST.classes), FASHION_MNIST.load, FASHION_MNIST.prepare),
    "kmnist": DatasetInfo(tuple(datasets.KMNIST.classes), KMNIST.load, KMNIST.prepare),
    "digits": DatasetInfo(DIGITS, _load_digits),
}


def _check_name(_: type, name: str) -> None:
    if name not in (names := (*DATASETS, "folder")):
        raise ValueError(f"must be one of {', '.join(map(repr, names))}, got {name}")


# Not a Literal, which would be fixed before a worker of a search has imported a project's own data sets.
DatasetName: Any = extend_base_type("DatasetName", str, _check_name)
