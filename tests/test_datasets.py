"""Data sets: real files, downloads from a server on the loopback address, damage, and folders of all kinds."""

import contextlib
import gzip
import struct
import threading
import time
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from mnist_lit.data.datasets import DATASETS
from mnist_lit.errors import MNISTLitError

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
LABELS = FILES[-1]
CLASS_COUNTS = {
    "train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    "test": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
}


class Mirror(ThreadingHTTPServer):
    """Serves `files` at /MANNER/NAME, in the manner that the address asks for, and records the requests."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.files = files
        self.requests: list[str] = []
        self.closing = threading.Event()

    def url(self, manner: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{manner}/"


class MirrorHandler(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        _, manner, name = self.path.split("/")
        self.server.requests.append(self.path)
        getattr(self, f"answer_{manner}", self.answer_absent)(self.server.files[name])

    def answer_absent(self, body: bytes) -> None:
        self.send_error(404)

    def answer_good(self, body: bytes, sent: int | None = None) -> None:
        self.send(200, {"Content-Length": str(len(body))}, body[:sent])

    def answer_slow(self, body: bytes) -> None:
        time.sleep(0.3)
        self.answer_good(body)

    def answer_cut(self, body: bytes) -> None:
        self.answer_good(body, sent=len(body) // 2)

    def answer_altered(self, body: bytes) -> None:
        self.answer_good(gzip.compress(altered(gzip.decompress(body)), 1))

    def answer_login(self, body: bytes) -> None:
        self.answer_good(b"<html>Please log in</html>")

    def answer_hanging(self, body: bytes) -> None:
        self.answer_cut(body)
        self.server.closing.wait()

    def answer_moved(self, body: bytes) -> None:
        self.send(302, {"Location": self.path.replace("moved", "good"), "Content-Length": "0"})

    def answer_bomb(self, body: bytes) -> None:
        self.answer_good(gzip.compress(bytes(2**24), compresslevel=1))

    def send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="session")
def zipped(mnist_dir: Path) -> dict[str, bytes]:
    raw = mnist_dir / "MNIST" / "raw"
    return {f"{name}.gz": gzip.compress((raw / name).read_bytes(), compresslevel=1) for name in FILES}


@pytest.fixture
def mirror(zipped: dict[str, bytes]) -> Iterator[Mirror]:
    server = Mirror(zipped)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def data_dir(tmp_path: Path, mnist_dir: Path) -> Path:
    """A folder in which only the test labels, the smallest file, are missing."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in set(FILES) - {LABELS}:
        (raw / name).symlink_to(mnist_dir / "MNIST" / "raw" / name)
    return tmp_path


def altered(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def fetch(data_dir: Path, *mirrors: str, name: str = "mnist", download: bool = True, timeout: float = 0.5) -> None:
    DATASETS[name].prepare(data_dir, ("train", "test"), mirrors, download, timeout)


def new_files(data_dir: Path) -> set[str]:
    return {path.name for path in data_dir.rglob("*") if path.is_file()} - {".lock", *FILES}


def idx(values: torch.Tensor) -> bytes:
    """The content of an IDX file."""
    header = struct.pack(f">I{values.ndim}I", 0x0800 + values.ndim, *values.shape)
    return header + values.to(torch.uint8).numpy().tobytes()


# MNIST


@pytest.mark.parametrize(("split", "num"), [("train", 60_000), ("test", 10_000)])
def test_official_splits_have_their_sizes_and_class_counts(mnist_dir: Path, split: Any, num: int) -> None:
    with warnings.catch_warnings(action="error"):
        images, labels = DATASETS["mnist"].load(mnist_dir, split)
    assert (images.shape, images.dtype) == ((num, 28, 28), torch.uint8)
    assert (labels.shape, labels.dtype) == ((num,), torch.int64)
    assert labels.bincount().tolist() == CLASS_COUNTS[split]


def test_all_four_files_are_downloaded_and_kept_as_they_came(tmp_path: Path, mirror: Mirror, mnist_dir: Path) -> None:
    fetch(tmp_path, mirror.url("good"))
    assert new_files(tmp_path) == {f"{name}.gz" for name in FILES}
    for split in ("train", "test"):
        assert all(map(torch.equal, DATASETS["mnist"].load(mnist_dir, split), DATASETS["mnist"].load(tmp_path, split)))


@pytest.mark.parametrize("manner", ["absent", "cut", "altered", "login", "hanging", "bomb"])
def test_a_mirror_that_fails_is_named_and_the_next_one_is_tried(data_dir: Path, mirror: Mirror, manner: str) -> None:
    url = mirror.url(manner)
    with pytest.raises(MNISTLitError) as error:
        fetch(data_dir, url)
    assert f"{url}{LABELS}.gz" in str(error.value)
    assert new_files(data_dir) == set()
    fetch(data_dir, url, mirror.url("moved"))
    assert new_files(data_dir) == {f"{LABELS}.gz"}


@pytest.mark.parametrize("name", [LABELS, f"{LABELS}.gz"])
def test_a_damaged_file_is_kept_under_another_name_and_downloaded_again(
    data_dir: Path, mirror: Mirror, zipped: dict[str, bytes], capsys: Any, name: str
) -> None:
    raw, good = data_dir / "MNIST" / "raw", zipped[f"{LABELS}.gz"]
    damaged = good[:-100] if name.endswith(".gz") else altered(gzip.decompress(good))
    (raw / name).write_bytes(damaged)
    fetch(data_dir, mirror.url("good"))
    assert f"{name}.damaged" in capsys.readouterr().err
    assert (raw / f"{name}.damaged").read_bytes() == damaged
    assert (raw / f"{LABELS}.gz").read_bytes() == good


def test_intact_files_in_a_folder_that_cannot_be_written_are_enough(data_dir: Path, zipped: dict[str, bytes]) -> None:
    raw = data_dir / "MNIST" / "raw"
    (raw / f"{LABELS}.gz").write_bytes(zipped[f"{LABELS}.gz"])  # the others are there without .gz
    raw.chmod(0o555)
    before = sorted(raw.iterdir()), raw.stat().st_mtime_ns
    fetch(data_dir)
    for split in ("train", "test"):
        assert len(DATASETS["mnist"].load(data_dir, split)[1]) == sum(CLASS_COUNTS[split])
    assert before == (sorted(raw.iterdir()), raw.stat().st_mtime_ns)  # root may write anywhere
    raw.chmod(0o755)


@pytest.mark.parametrize("download", [True, False])
def test_without_files_the_error_names_urls_files_folder_and_the_ways_out(
    tmp_path: Path, mirror: Mirror, download: bool
) -> None:
    mirrors = [mirror.url("absent"), mirror.url("login")]
    with pytest.raises(MNISTLitError) as error:
        fetch(tmp_path, *mirrors, download=download)
    expected = [*mirrors, *FILES, str(tmp_path / "MNIST" / "raw"), "configs/digits.yaml"]
    assert [part for part in expected if part not in str(error.value)] == []
    assert new_files(tmp_path) == set()


# Its siblings


@pytest.mark.parametrize("name", ["mnist", "kmnist", "fashion_mnist"])
def test_downloads_begin_with_https(name: str, tmp_path: Path) -> None:
    with pytest.raises(MNISTLitError, match="mirrors: https://"):
        fetch(tmp_path, name=name, download=False)


def test_fashion_mnist_from_a_mirror_must_have_its_published_checksum(tmp_path: Path, mirror: Mirror) -> None:
    mirror.files = dict.fromkeys(mirror.files, gzip.compress(idx(torch.zeros(10_000))))
    with pytest.raises(MNISTLitError, match=r"-ubyte\.gz "):
        fetch(tmp_path, mirror.url("good"), name="fashion_mnist")
    assert new_files(tmp_path) == set()


# The digits of scikit-learn


def test_digits_have_the_form_of_mnist_and_a_fixed_stratified_test_split(tmp_path: Path) -> None:
    fetch(tmp_path / "none", name="digits")
    (train, train_labels), (test, test_labels) = (
        DATASETS["digits"].load(tmp_path / "none", split) for split in ("train", "test")
    )
    assert not (tmp_path / "none").exists()
    assert (train.shape, test.shape, test.dtype) == ((1_437, 28, 28), (360, 28, 28), torch.uint8)
    assert train_labels.unique().tolist() == test_labels.unique().tolist() == list(range(10))  # type: ignore[no-untyped-call]
    expected = torch.cat([train_labels, test_labels]).bincount() * 360 / 1797
    assert (test_labels.bincount() - expected).abs().max() < 1
    images = torch.cat([train, test])
    assert images.max() == 255
    assert images[:, 4:24, 4:24].sum() == images.sum()  # the border is empty
    as_sets = [{image.numpy().tobytes() for image in images} for images in (train, test)]
    assert not as_sets[0] & as_sets[1]
