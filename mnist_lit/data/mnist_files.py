"""Files of MNIST and of data sets in its format: downloaded, verified and parsed."""

import gzip
import hashlib
import math
import struct
import sys
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
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

from mnist_lit.errors import MNISTLitError

Split: TypeAlias = Literal["train", "test"]

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "train": {"train-images-idx3-ubyte": (60_000, 28, 28), "train-labels-idx1-ubyte": (60_000,)},
    "test": {"t10k-images-idx3-ubyte": (10_000, 28, 28), "t10k-labels-idx1-ubyte": (10_000,)},
}
MAX_BYTES = 100_000_000  # of a download


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
        mirrors = mirrors or list(dict.fromkeys([*self.mirrors, *self.torchvision_class.mirrors]))
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
        md5 = None if self.sha256 else dict(self.torchvision_class.resources)[f"{name}.gz"]
        failures = []
        for url in (f"{mirror.rstrip('/')}/{name}.gz" for mirror in mirrors):
            try:
                with urlopen(url, timeout=timeout) as response:
                    content = bytearray(response.read(MAX_BYTES))
                _parse(content, name, self.sha256.get(name), md5)
            except (OSError, HTTPException, ValueError) as error:
                failures.append(f"{url} ({' '.join(str(error).split())})")
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
    return _parse(bytearray(path.read_bytes()), name, sha256)


def _parse(content: bytearray, name: str, sha256: str | None, md5: str | None = None) -> Tensor:
    """Parse the content of a file, raw or, with an MD5, compressed; raise ValueError if it is damaged."""
    if md5 and hashlib.md5(content).hexdigest() != md5:
        raise ValueError("wrong checksum")
    shape = (SHAPES["train"] | SHAPES["test"])[name]
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)  # 8 is the code of unsigned bytes
    size = len(header) + math.prod(shape)
    if content.startswith(b"\x1f\x8b"):
        try:
            content = bytearray(gzip.GzipFile(fileobj=BytesIO(content)).read(size + 1))  # no more, should it be a bomb
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError("wrong content") from error
    values = torch.frombuffer(content, dtype=torch.uint8)[len(header) :]
    is_intact = content.startswith(header) and len(content) == size and (len(shape) > 1 or int(values.max()) <= 9)
    if not is_intact or (sha256 and hashlib.sha256(content).hexdigest() != sha256):
        raise ValueError("wrong content")
    return values.view(shape)
