"""Data sets by name: download, verify and load their images."""

import gzip
import hashlib
import math
import string
import struct
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.request import urlopen

import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional as F
from torchvision import datasets  # type: ignore[import-untyped]

from mnist_lit.errors import MNISTLitError

__all__ = ["DATASETS", "DatasetInfo", "Split", "load", "stratified_split"]

Split: TypeAlias = Literal["train", "test"]

NUM_TEST_DIGITS = 360
MAX_BYTES = 100_000_000  # of a download
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "train": {"train-images-idx3-ubyte": (60_000, 28, 28), "train-labels-idx1-ubyte": (60_000,)},
    "test": {"t10k-images-idx3-ubyte": (10_000, 28, 28), "t10k-labels-idx1-ubyte": (10_000,)},
}


@dataclass(frozen=True)
class DatasetInfo:
    """Describe a data set.

    Args:
        class_names: Names of the classes, in the order of the labels 0, 1, 2, ...
        load: Function of the data folder and a split. It returns images, uint8 of shape (n, h, w) or (n, c, h, w) with
            bright ink on 0, and labels, int64 of shape (n,).
        prepare: Function like `MNISTFiles.prepare` that makes sure that the files of some splits are there.
    """

    class_names: tuple[str, ...]
    load: Callable[[Path, Split], tuple[Tensor, Tensor]]
    prepare: Callable[[Path, Collection[Split], Sequence[str] | None, bool, float], None] = lambda *_: None


def load(name: str, data_dir: Path, split: Split) -> tuple[Tensor, Tensor]:
    """Load and verify images and labels of one split, as `DatasetInfo.load` does."""
    return DATASETS[name].load(data_dir, split)


def stratified_split(labels: Tensor, num_held_out: int) -> tuple[Tensor, Tensor]:
    """Split (n,) labels in two with equal shares of each class; the same labels are always split alike.

    Returns:
        The sorted int64 indices of the kept and of the `num_held_out`, 0 to n, held-out images.
    """
    num = len(labels)
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


@dataclass(frozen=True, eq=False)
class MNISTFiles:
    """Download, verify and load files in torchvision's folders, each raw or as `.gz`.

    torchvision itself needs the extracted files of both splits, and does not try the next mirror after a time-out.
    """

    torchvision_class: Any  # knows the folder, further mirrors, and MD5 checksums of downloads
    mirrors: Sequence[str]  # URLs of folders
    sha256: Mapping[str, str] = field(default_factory=dict)  # of the content of each file, instead of the MD5

    def load(self, data_dir: Path, split: Split) -> tuple[Tensor, Tensor]:
        """Load the images, of shape (n, 28, 28), and the labels of a split."""
        folder = self._folder(data_dir)
        images, labels = (self._find(folder, name) for name in SHAPES[split])
        if images is None or labels is None:
            raise self._error(folder, SHAPES[split], self.mirrors)
        return images, labels.long()

    def prepare(
        self, data_dir: Path, splits: Collection[Split], mirrors: Sequence[str] | None, download: bool, timeout: float
    ) -> None:
        """Download missing and damaged files of these splits; write nothing if there are none."""
        folder = self._folder(data_dir)
        # Some of torchvision's are plain http, which is safe because each file is verified.
        mirrors = mirrors or [*self.mirrors, *self.torchvision_class.mirrors]
        missing = [name for split in splits for name in SHAPES[split] if self._find(folder, name) is None]
        if missing and not download:
            raise self._error(folder, missing, mirrors)
        for name in missing:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                if self._find(folder, name) is None:  # another process may have downloaded it meanwhile
                    self._download(folder, name, mirrors, timeout)

    def _folder(self, data_dir: Path) -> Path:
        return Path(data_dir, self.torchvision_class.__name__, "raw")

    def _find(self, folder: Path, name: str) -> Tensor | None:
        """Return the content of a file, raw or `.gz`; None if there is no intact one."""
        for path in (folder / name, folder / f"{name}.gz"):
            with suppress(ValueError):
                if path.is_file():  # opening a pipe would block
                    return _read(path.resolve(), name, self.sha256.get(name))
        return None

    def _download(self, folder: Path, name: str, mirrors: Sequence[str], timeout: float) -> None:
        md5, failures = dict(self.torchvision_class.resources)[f"{name}.gz"], []
        for url in (f"{mirror.rstrip('/')}/{name}.gz" for mirror in mirrors):
            try:
                with urlopen(url, timeout=timeout) as response:
                    content = response.read(MAX_BYTES)
                _parse(content, name, self.sha256.get(name))
            except (OSError, HTTPException, ValueError) as error:
                failures.append(f"{url} ({' '.join(str(error).split())})")
                continue
            if not self.sha256 and hashlib.md5(content).hexdigest() != md5:
                failures.append(f"{url} (wrong checksum)")
                continue
            for damaged in filter(Path.exists, (folder / name, folder / f"{name}.gz")):
                print(f"{damaged} is damaged: renamed to {damaged.name}.damaged", file=sys.stderr)
                damaged.replace(f"{damaged}.damaged")
            (folder / f".{name}.part").write_bytes(content)
            (folder / f".{name}.part").replace(folder / f"{name}.gz")
            return
        raise self._error(folder, [name], failures)

    def _error(self, folder: Path, missing: Iterable[str], mirrors: Sequence[str]) -> MNISTLitError:
        return MNISTLitError(
            f"{self.torchvision_class.__name__}: missing or damaged: {', '.join(missing)}\n"
            f"Download with --data.download true; mirrors: {'; '.join(mirrors)}\n"
            f"Or put {', '.join([*SHAPES['train'], *SHAPES['test']])} (each raw or .gz) into {folder}\n"
            "Or use the bundled digits, which need no network: --config configs/digits.yaml"
        )


@lru_cache(maxsize=4)  # all files of a data set: parsed once to be verified and used
def _read(path: Path, name: str, sha256: str | None) -> Tensor:
    return _parse(path.read_bytes(), name, sha256)


def _parse(content: bytes, name: str, sha256: str | None) -> Tensor:
    """Parse the content of a file, raw or compressed; raise ValueError if it is damaged."""
    shape = (SHAPES["train"] | SHAPES["test"])[name]
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)  # 8 is the code of unsigned bytes
    size = len(header) + math.prod(shape)
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.GzipFile(fileobj=BytesIO(content)).read(size + 1)  # no more, should it be a bomb
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError("wrong content") from error
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)[len(header) :]
    is_intact = content.startswith(header) and len(content) == size and (len(shape) > 1 or int(values.max()) <= 9)
    if not is_intact or (sha256 and hashlib.sha256(content).hexdigest() != sha256):
        raise ValueError("wrong content")
    return values.view(shape)


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
# An entry that is added before `mnist_lit.data.datamodule` is imported is a valid `data.dataset`, too.
DATASETS = {
    "mnist": DatasetInfo(DIGITS, MNIST.load, MNIST.prepare),
    "fashion_mnist": DatasetInfo(tuple(datasets.FashionMNIST.classes), FASHION_MNIST.load, FASHION_MNIST.prepare),
    "kmnist": DatasetInfo(tuple(datasets.KMNIST.classes), KMNIST.load, KMNIST.prepare),
    "digits": DatasetInfo(DIGITS, _load_digits),
}
