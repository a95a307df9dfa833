"""Files of MNIST and of data sets in its format: found or downloaded, verified, and decoded."""

import gzip
import hashlib
import math
import socket
import struct
import sys
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.client import HTTPException
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from filelock import FileLock
from torch import Tensor
from torch.hub import download_url_to_file
from torchvision.datasets.utils import check_integrity  # type: ignore[import-untyped]

from mnist_lit.errors import MNISTLitError, is_disk_full

__all__ = ["MNISTFiles", "Split"]

Split: TypeAlias = Literal["train", "test"]

SHAPES: dict[str, tuple[int, ...]] = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}
PREFIXES = {"train": "train", "test": "t10k"}


@dataclass(frozen=True, eq=False)
class MNISTFiles:
    """Download, verify and load files in torchvision's folders, each raw or as `.gz`.

    torchvision itself needs the extracted files of both splits, and does not try the next mirror after a time-out.

    Args:
        name: Name of the data set, for messages.
        torchvision_class: Its class in torchvision: folder, class names, mirrors and MD5 checksums.
        mirrors: URLs of folders to try before those of torchvision.
        sha256: SHA-256 of the decoded content by file name, so that any compression is fine. If empty, the header, the
            length and the labels are checked, and the MD5 of what is downloaded.
    """

    name: str
    torchvision_class: Any
    mirrors: Sequence[str]
    sha256: Mapping[str, str] = field(default_factory=dict)

    def load(self, data_dir: Path, split: Split) -> tuple[Tensor, Tensor]:
        """Load and verify the images, of shape (n, 28, 28), and the labels of a split."""
        folder = self._folder(data_dir)
        with _explain_os_errors(folder):
            images, labels = (self._find(folder, file) for file in _files([split]))
            if images is None or labels is None:
                raise self._missing_error(folder, [split], self._urls(None))
        return images, labels.long()

    def prepare(
        self, data_dir: Path, splits: Collection[Split], mirrors: Sequence[str] | None, download: bool, timeout: float
    ) -> None:
        """Download missing and damaged files of these splits; write nothing if there are none."""
        folder, urls = self._folder(data_dir), self._urls(mirrors)
        with _explain_os_errors(folder):
            if not self._missing(folder, splits):
                return
            if not download:
                raise self._missing_error(folder, splits, urls)
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"), _socket_timeout(timeout):
                # Checked again: another process may have downloaded them while this one waited for the lock.
                for file in self._missing(folder, splits):
                    _quarantine(folder, file)
                    self._download(folder, file, urls)

    def _folder(self, data_dir: Path) -> Path:
        return Path(data_dir, self.torchvision_class.__name__, "raw")

    def _urls(self, mirrors: Sequence[str] | None) -> list[str]:
        # Some of torchvision's are plain http, which is safe because each file is verified.
        return list(dict.fromkeys([*self.mirrors, *self.torchvision_class.mirrors] if mirrors is None else mirrors))

    def _missing(self, folder: Path, splits: Collection[Split]) -> list[str]:
        return [file for file in _files(splits) if self._find(folder, file) is None]

    def _find(self, folder: Path, file: str) -> Tensor | None:
        tensors = (self._read(path, file) for path in (folder / file, folder / f"{file}.gz"))
        return next((tensor for tensor in tensors if tensor is not None), None)

    def _read(self, path: Path, file: str) -> Tensor | None:
        if not path.is_file():  # opening a pipe would block
            return None
        stat = path.stat()
        return _decode(self, path.resolve(), file, (stat.st_ino, stat.st_mtime_ns, stat.st_size))

    def is_intact(self, file: str, content: bytearray) -> bool:
        """Verify the decoded content of a file."""
        if self.sha256:
            return hashlib.sha256(content).hexdigest() == self.sha256[file]
        shape = SHAPES[file]
        header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)  # 8 is the code of unsigned bytes
        if not content.startswith(header) or len(content) != len(header) + math.prod(shape):
            return False
        return len(shape) > 1 or max(content[len(header) :]) < len(self.torchvision_class.classes)

    def _download(self, folder: Path, file: str, urls: Sequence[str]) -> None:
        failures = []
        for url in [f"{mirror.rstrip('/')}/{file}.gz" for mirror in urls]:
            try:
                return self._download_from(url, folder, file)
            except (OSError, HTTPException, ValueError) as error:
                if is_disk_full(error):
                    raise
                failures.append(f"{url} ({' '.join(str(error).split())})")
        tried = "; ".join(failures) or "no mirror is given"
        raise MNISTLitError(f"{self.name}: {file}.gz could not be downloaded. Tried:\n{tried}\n{_ways_out(folder)}")

    def _download_from(self, url: str, folder: Path, file: str) -> None:
        part = folder / f".part-{file}.gz"
        md5 = None if self.sha256 else dict(self.torchvision_class.resources)[f"{file}.gz"]
        try:
            download_url_to_file(url, str(part), progress=sys.stderr.isatty())
            if not check_integrity(part, md5) or self._read(part, file) is None:
                raise ValueError("wrong content")
            part.replace(folder / f"{file}.gz")
        finally:
            for path in folder.glob(f"{part.name}*"):  # also what is left of a download that was killed
                path.unlink()

    def _missing_error(self, folder: Path, splits: Collection[Split], urls: Sequence[str]) -> MNISTLitError:
        return MNISTLitError(
            f"{self.name}: missing or damaged in {folder}: {', '.join(self._missing(folder, splits))}\n"
            f"Download with --data.download true; mirrors: {', '.join(urls)}\n{_ways_out(folder)}"
        )


@lru_cache(maxsize=4)  # all files of a data set: read once to be verified and used
def _decode(files: MNISTFiles, path: Path, file: str, _version: tuple[int, ...]) -> Tensor | None:
    """Decode a file; return None if it is damaged or no longer there."""
    size = math.prod(SHAPES[file])
    content = bytearray(16 + size + 1)  # longer than a good file, so that a file that is too long is noticed
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            del content[stream.readinto(content) :]
    except (FileNotFoundError, EOFError, gzip.BadGzipFile, zlib.error):
        return None
    if not files.is_intact(file, content):
        return None
    return torch.frombuffer(content, dtype=torch.uint8)[-size:].view(SHAPES[file])


def _files(splits: Collection[Split]) -> list[str]:
    return [file for file in SHAPES if file.startswith(tuple(PREFIXES[split] for split in splits))]


def _quarantine(folder: Path, file: str) -> None:
    for path in (folder / file, folder / f"{file}.gz"):
        if path.exists():
            names = (f"{path.name}.damaged{f'-{number}' if number else ''}" for number in count())
            target = next(folder / name for name in names if not (folder / name).exists())
            print(f"{path} is damaged: renamed to {target.name}", file=sys.stderr)
            path.rename(target)


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _explain_os_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "Check the folder and its permissions, or choose another with --data.data_dir."
        raise MNISTLitError(f"the data folder {folder} cannot be used: {error}\n{advice}") from error


def _ways_out(folder: Path) -> str:
    return (
        f"Or put {', '.join(SHAPES)} (each raw or .gz) into {folder}\n"
        "Or use the bundled digits, which need no network: --config configs/digits.yaml"
    )
