"""Files of MNIST and of data sets in its format: downloaded, verified and parsed."""

import gzip
import hashlib
import math
import socket
import struct
import sys
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias

import torch
from filelock import FileLock
from torch import Tensor
from torch.hub import download_url_to_file
from torchvision.datasets.utils import check_integrity  # type: ignore[import-untyped]

from mnist_lit.errors import MNISTLitError

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
    """

    torchvision_class: Any  # knows the folder, further mirrors, and MD5 checksums of downloads
    mirrors: Sequence[str]  # URLs of folders
    sha256: Mapping[str, str] = field(default_factory=dict)  # of the content of each file, instead of the MD5

    def load(self, data_dir: Path, split: Split) -> tuple[Tensor, Tensor]:
        """Load the images, of shape (n, 28, 28), and the labels of a split."""
        folder = self._folder(data_dir)
        images, labels = (self._find(folder, file) for file in _files([split]))
        if images is None or labels is None or labels.max() > 9:
            raise self._error(folder, self._missing(folder, [split]), self.mirrors)
        return images, labels.long()

    def prepare(
        self, data_dir: Path, splits: Collection[Split], mirrors: Sequence[str] | None, download: bool, timeout: float
    ) -> None:
        """Download missing and damaged files of these splits; write nothing if there are none."""
        folder = self._folder(data_dir)
        if not (missing := self._missing(folder, splits)):
            return
        # Some of torchvision's are plain http, which is safe because each file is verified.
        mirrors = mirrors or [*self.mirrors, *self.torchvision_class.mirrors]
        if not download:
            raise self._error(folder, missing, mirrors)
        folder.mkdir(parents=True, exist_ok=True)
        default_timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(timeout)
        try:
            with FileLock(folder / ".lock"), TemporaryDirectory(prefix=".part-", dir=folder) as part:
                # Looked for again: another process may have downloaded them while this one waited for the lock.
                for file in self._missing(folder, splits):
                    self._download(folder, file, mirrors, Path(part))
        finally:
            socket.setdefaulttimeout(default_timeout)

    def _folder(self, data_dir: Path) -> Path:
        return Path(data_dir, self.torchvision_class.__name__, "raw")

    def _missing(self, folder: Path, splits: Collection[Split]) -> list[str]:
        return [file for file in _files(splits) if self._find(folder, file) is None]

    def _find(self, folder: Path, file: str) -> Tensor | None:
        """Return the content of a file, raw or `.gz`; None if there is no intact one."""
        for path in (folder / file, folder / f"{file}.gz"):
            if path.is_file():  # opening a pipe would block
                stat = path.stat()
                content = _parse(path.resolve(), file, self.sha256.get(file), (stat.st_ino, stat.st_mtime_ns))
                if content is not None:
                    return content
        return None

    def _download(self, folder: Path, file: str, mirrors: Sequence[str], part: Path) -> None:
        """Download a file to the folder `part`, and move it to its own when it has been verified."""
        name, failures = f"{file}.gz", []
        md5 = None if self.sha256 else dict(self.torchvision_class.resources)[name]
        for url in (f"{mirror.rstrip('/')}/{name}" for mirror in mirrors):
            try:
                download_url_to_file(url, str(part / name), progress=sys.stderr.isatty())
            except (OSError, HTTPException, ValueError) as error:
                failures.append(f"{url} ({' '.join(str(error).split())})")
                continue
            if self._find(part, file) is not None and check_integrity(part / name, md5):
                _quarantine(folder / file, folder / name)
                (part / name).replace(folder / name)
                return
            failures.append(f"{url} (wrong content)")
        raise self._error(folder, [file], failures)

    def _error(self, folder: Path, missing: Sequence[str], mirrors: Sequence[str]) -> MNISTLitError:
        return MNISTLitError(
            f"{self.torchvision_class.__name__}: missing or damaged: {', '.join(missing)}\n"
            f"Download with --data.download true; mirrors: {'; '.join(mirrors)}\n"
            f"Or put {', '.join(SHAPES)} (each raw or .gz) into {folder}\n"
            "Or use the bundled digits, which need no network: --config configs/digits.yaml"
        )


@lru_cache(maxsize=4)  # all files of a data set: parsed once to be verified and used
def _parse(path: Path, file: str, sha256: str | None, _version: tuple[int, int]) -> Tensor | None:
    """Parse a file; return None if it is damaged or no longer there."""
    shape = SHAPES[file]
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)  # 8 is the code of unsigned bytes
    size = len(header) + math.prod(shape)
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            content = bytearray(stream.read(size + 1))  # so that a file that is too long is noticed
    except (FileNotFoundError, EOFError, gzip.BadGzipFile, zlib.error):
        return None
    is_intact = content.startswith(header) and len(content) == size
    if not is_intact or (sha256 and hashlib.sha256(content).hexdigest() != sha256):
        return None
    return torch.frombuffer(content, dtype=torch.uint8, offset=len(header)).view(shape)


def _files(splits: Collection[Split]) -> list[str]:
    return [file for file in SHAPES if file.startswith(tuple(PREFIXES[split] for split in splits))]


def _quarantine(*paths: Path) -> None:
    for path in filter(Path.exists, paths):
        print(f"{path} is damaged: renamed to {path.name}.damaged", file=sys.stderr)
        path.replace(f"{path}.damaged")
