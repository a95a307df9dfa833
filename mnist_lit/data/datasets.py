"""The datasets: found or fetched, verified, and read into memory.

The files lie as torchvision lays them, `data_dir/{MNIST,FashionMNIST,KMNIST}/raw`, each raw or as `.gz`. What is loaded
is verified each time. MNIST: the decoded content has the known SHA-256, so any recompression is fine. Fashion-MNIST and
KMNIST: a `.gz` has the MD5 that torchvision publishes; no digest of the raw files is published, so of these the header,
the exact length and the labels are checked, which finds a truncated file but not an altered pixel.
"""

import gzip
import hashlib
import math
import struct
import sys
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from http.client import HTTPException
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional

from mnist_lit.data.downloads import download
from mnist_lit.errors import MNISTLitError
from mnist_lit.errors import is_disk_full

__all__ = ["NUM_TRAINING", "DatasetName", "Split", "load", "prepare", "stratified_split"]

DatasetName: TypeAlias = Literal["mnist", "fashion_mnist", "kmnist", "digits"]
Split: TypeAlias = Literal["train", "test"]

_SPLIT_SEED = 0
_NUM_TEST_DIGITS = 360
NUM_TRAINING: dict[DatasetName, int] = {
    "mnist": 60_000,
    "fashion_mnist": 60_000,
    "kmnist": 60_000,
    "digits": 1_437,
}
_FILES = {  # shape, and the SHA-256 of MNIST's
    "train-images-idx3-ubyte": ((60_000, 28, 28), "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels-idx1-ubyte": ((60_000,), "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": ((10_000, 28, 28), "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels-idx1-ubyte": ((10_000,), "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}
_PREFIXES = {"train": "train", "test": "t10k"}
_TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
_HTTPS_MIRRORS = {
    "mnist": ["https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"],
    "fashion_mnist": ["https://storage.googleapis.com/tensorflow/tf-keras-datasets/"],
    "kmnist": ["https://codh.rois.ac.jp/kmnist/dataset/kmnist/"],
}


def prepare(
    name: DatasetName,
    data_dir: Path,
    splits: Collection[Split] = ("train", "test"),
    *,
    mirrors: Sequence[str] | None,
    download: bool,
    timeout: float,
) -> None:
    """Makes sure that good files of a dataset lie under `data_dir`; writes nothing when they do already.

    Damaged files are renamed to `*.damaged`, never deleted. Any number of processes may call this at once.

    Args:
        name: The dataset; `digits` needs no files.
        data_dir: The folder that holds `MNIST/raw` and its like.
        splits: The official splits that are needed; the files of others are not looked at.
        mirrors: The http or https folders to fetch from, in this order; None for the dataset's own.
        download: Whether missing and damaged files may be fetched.
        timeout: The longest wait for a mirror to connect or to send on, in seconds.

    Raises:
        MNISTLitError: If files are missing and cannot be fetched, or the folder cannot be used.
    """
    if name == "digits":
        return
    folder = data_dir / _TORCHVISION[name] / "raw"
    with _os_errors_explained(folder):
        if not (missing := _missing(name, folder, splits)):
            return
        mirrors = _default_mirrors(name) if mirrors is None else mirrors
        if not download:
            raise _missing_error(name, folder, missing, mirrors)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            for file_name in _missing(
                name, folder, splits
            ):  # asked again: the lock's last holder may have fetched them
                _set_aside(folder, file_name)
                _fetch(name, folder, file_name, mirrors, timeout)


def load(name: DatasetName, data_dir: Path, split: Split) -> tuple[Tensor, Tensor]:
    """Reads and verifies one official split (of `digits`: a fixed one, 1,437 and 360 images) of what `prepare` left.

    Returns:
        The images, uint8 of shape (n, 28, 28), ink light on 0; and the labels, int64 of shape (n,), 0 to 9.

    Raises:
        MNISTLitError: If a file is missing, damaged or cannot be read.
    """
    if name == "digits":
        return _load_digits(split)
    folder = data_dir / _TORCHVISION[name] / "raw"
    with _os_errors_explained(folder):
        images, labels = (_tensor(name, folder, file_name) for file_name in _files(split))
    return images, labels.long()


def stratified_split(labels: Tensor, num_held_out: int) -> tuple[Tensor, Tensor]:
    """Splits (n,) labels in two with equal class shares, within one image; the same labels always give the same split.

    Returns:
        The sorted int64 indices of the kept and of the `num_held_out` (0 to n) held-out images.

    Raises:
        MNISTLitError: If `num_held_out` is out of range.
    """
    num = len(labels)
    if not 0 <= num_held_out <= num:
        raise MNISTLitError(f"cannot hold out {num_held_out} of {num} images\nHold out 0 to {num} of them.")
    order = torch.randperm(num, generator=torch.Generator().manual_seed(_SPLIT_SEED))
    by_class = order[labels[order].argsort(stable=True)]
    is_held_out = torch.zeros(num, dtype=torch.bool)
    is_held_out[by_class[torch.arange(num_held_out) * num // max(num_held_out, 1)]] = True
    return (~is_held_out).nonzero().flatten(), is_held_out.nonzero().flatten()


def _load_digits(split: Split) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # no types; here, as it takes a second

    digits = load_digits()
    images = torch.from_numpy(digits.images).unsqueeze(1) * (255 / 16)
    images = functional.interpolate(images, size=(20, 20), mode="bicubic", antialias=True).clamp(0, 255).round()
    images = functional.pad(images, (4, 4, 4, 4)).squeeze(1).to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    kept, held_out = stratified_split(labels, _NUM_TEST_DIGITS)
    indices = kept if split == "train" else held_out
    return images[indices], labels[indices]


def _tensor(dataset: str, folder: Path, file_name: str) -> Tensor:
    if (content := _find(dataset, folder, file_name)) is None:
        raise _missing_error(dataset, folder, [file_name], _default_mirrors(dataset))
    shape, _ = _FILES[file_name]
    return torch.frombuffer(content, dtype=torch.uint8)[-math.prod(shape) :].view(shape)


def _files(*splits: Split) -> list[str]:
    return [file_name for file_name in _FILES if file_name.startswith(tuple(_PREFIXES[split] for split in splits))]


def _missing(dataset: str, folder: Path, splits: Collection[Split]) -> list[str]:
    return [file_name for file_name in _files(*splits) if _find(dataset, folder, file_name) is None]


def _find(dataset: str, folder: Path, file_name: str) -> bytearray | None:
    contents = (_read(dataset, file_name, path) for path in _forms(folder, file_name))
    return next((content for content in contents if content is not None), None)


def _read(dataset: str, file_name: str, path: Path) -> bytearray | None:
    """Returns the decoded content of a raw or `.gz` file, or None where it is absent or not good."""
    if not path.is_file():  # a pipe would be waited for
        return None
    stat = path.stat()
    return _read_unchanged(dataset, file_name, path.resolve(), (stat.st_ino, stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=4)  # all files of a dataset: they are needed to see that they are good, and again to be used
def _read_unchanged(dataset: str, file_name: str, path: Path, _version: tuple[int, ...]) -> bytearray | None:
    try:
        with path.open("rb") as file:
            if path.suffix != ".gz":
                content = _decoded(file, file_name)
            elif dataset == "mnist" or _has_published_md5(dataset, file_name, file):
                content = _decoded(gzip.GzipFile(fileobj=file), file_name)
            else:
                return None
    except (FileNotFoundError, EOFError, gzip.BadGzipFile, zlib.error):
        return None
    return content if _is_good(dataset, file_name, content) else None


def _decoded(file: BinaryIO | gzip.GzipFile, file_name: str) -> bytearray:
    content = bytearray()
    limit = 16 + math.prod(_FILES[file_name][0])  # no header is longer
    # In pieces: one copy in memory, which torch may write to, and a file that is far too long is not read to its end.
    while len(content) <= limit and (piece := file.read(2**20)):
        content += piece
    return content


def _has_published_md5(dataset: str, file_name: str, file: BinaryIO) -> bool:
    digest = hashlib.md5(file.read(), usedforsecurity=False).hexdigest()
    file.seek(0)
    return (f"{file_name}.gz", digest) in _torchvision_class(dataset).resources


def _is_good(dataset: str, file_name: str, content: bytearray) -> bool:
    shape, mnist_sha256 = _FILES[file_name]
    if dataset == "mnist":
        return hashlib.sha256(content).hexdigest() == mnist_sha256
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)  # 8 is IDX's code of unsigned bytes
    has_right_form = content.startswith(header) and len(content) == len(header) + math.prod(shape)
    return has_right_form and (len(shape) > 1 or max(content[len(header) :]) <= 9)


def _fetch(dataset: str, folder: Path, file_name: str, mirrors: Sequence[str], timeout: float) -> None:
    failures = []
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{file_name}.gz"
        try:
            _fetch_from(url, dataset, folder, file_name, timeout)
        except (OSError, HTTPException, ValueError) as error:
            if is_disk_full(error):
                raise
            failures.append(f"{url} ({' '.join(str(error).split())})")
        else:
            return
    tried = "; ".join(failures) or "no mirror is given"
    raise MNISTLitError(f"{dataset}: {file_name}.gz could not be downloaded. Tried:\n{tried}\n{_ways_out(folder)}")


def _fetch_from(url: str, dataset: str, folder: Path, file_name: str, timeout: float) -> None:
    part = folder / f".part-{file_name}.gz"
    try:
        # Random bytes, which gzip makes slightly longer, would not be longer than that.
        max_bytes = 2**16 + math.prod(_FILES[file_name][0])
        download(url, part, timeout=timeout, max_bytes=max_bytes, title=f"{file_name}.gz")
        if _read(dataset, file_name, part) is None:
            raise ValueError("wrong content")
        part.replace(folder / f"{file_name}.gz")
    finally:
        part.unlink(missing_ok=True)


def _set_aside(folder: Path, file_name: str) -> None:
    for path in filter(Path.exists, _forms(folder, file_name)):
        names = (f"{path.name}.damaged{f'-{number}' if number else ''}" for number in count())
        aside = next(folder / name for name in names if not (folder / name).exists())
        print(f"{path} is damaged: renamed to {aside.name}", file=sys.stderr)
        path.rename(aside)


@contextmanager
def _os_errors_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "Check the folder and its permissions, or choose another with --data.data_dir."
        raise MNISTLitError(f"the data folder {folder} cannot be used: {error}\n{advice}") from error


def _missing_error(dataset: str, folder: Path, missing: Sequence[str], mirrors: Sequence[str]) -> MNISTLitError:
    return MNISTLitError(
        f"{dataset}: missing or damaged in {folder}: {', '.join(missing)}\n"
        f"Fetch with --data.download true; mirrors: {', '.join(mirrors)}\n{_ways_out(folder)}"
    )


def _ways_out(folder: Path) -> str:
    return (
        f"Or put {', '.join(_FILES)} (each raw or .gz) into {folder}\n"
        "Or use the bundled digits, which need no network: --config configs/digits.yaml"
    )


def _forms(folder: Path, file_name: str) -> tuple[Path, Path]:
    return folder / file_name, folder / f"{file_name}.gz"


def _default_mirrors(dataset: str) -> list[str]:
    # Torchvision's mirrors of these two are plain http, which is safe only because a download must have the right MD5.
    return _HTTPS_MIRRORS[dataset] + ([] if dataset == "mnist" else _torchvision_class(dataset).mirrors)


def _torchvision_class(dataset: str) -> Any:
    from torchvision import datasets  # type: ignore[import-untyped]  # no types; here, as MNIST can save the seconds

    return getattr(datasets, _TORCHVISION[dataset])
