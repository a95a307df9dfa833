"""The datasets through their public door: real files, a real server on the loopback address, no mocks."""

import contextlib
import gzip
import multiprocessing
import os
import shutil
import signal
import struct
import threading
import time
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from mnist_lit.data.datasets import load, prepare, stratified_split
from mnist_lit.errors import MNISTLitError

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
LABELS = "t10k-labels-idx1-ubyte"
CLASS_COUNTS = {
    "train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    "test": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
}


class Mirror(ThreadingHTTPServer):
    """Serves `files` at /MANNER/NAME, in the manner that the address asks for, and notes what it was asked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.files = files
        self.requests: list[str] = []
        self.asked, self.closing = threading.Event(), threading.Event()

    def url(self, manner: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{manner}/"


class MirrorHandler(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        _, manner, name = self.path.split("/")
        self.server.requests.append(self.path)
        self.server.asked.set()
        getattr(self, f"answer_{manner}", self.answer_absent)(name, self.server.files[name])

    def answer_absent(self, name: str, body: bytes) -> None:
        self.send_error(404)

    def answer_good(self, name: str, body: bytes) -> None:
        self.send(200, {"Content-Length": str(len(body))}, body)

    def answer_slow(self, name: str, body: bytes) -> None:
        time.sleep(0.3)
        self.answer_good(name, body)

    def answer_truncated(self, name: str, body: bytes) -> None:
        self.answer_good(name, body[: len(body) // 2])

    def answer_cut(self, name: str, body: bytes) -> None:
        self.send(200, {"Content-Length": str(len(body))}, body[: len(body) // 2])

    def answer_altered(self, name: str, body: bytes) -> None:
        self.answer_good(name, gzip.compress(altered(gzip.decompress(body)), 1))

    def answer_login(self, name: str, body: bytes) -> None:
        self.answer_good(name, b"<html>Please log in</html>")

    def answer_hanging(self, name: str, body: bytes) -> None:
        self.answer_cut(name, body)
        self.server.closing.wait()

    def answer_interrupting(self, name: str, body: bytes) -> None:
        self.answer_cut(name, body)
        time.sleep(0.3)  # so that the other side waits for the second half
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        self.server.closing.wait()

    def answer_moved(self, name: str, body: bytes) -> None:
        self.send(302, {"Location": f"/good/{name}", "Content-Length": "0"})

    def answer_endless(self, name: str, body: bytes) -> None:
        self.send(200, {})
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(bytes(2**16))

    def answer_bomb(self, name: str, body: bytes) -> None:
        self.answer_good(name, gzip.compress(bytes(2**24), compresslevel=1))

    def answer_loop(self, name: str, body: bytes) -> None:
        self.send(302, {"Location": self.path, "Content-Length": "0"})

    def answer_to_ftp(self, name: str, body: bytes) -> None:
        self.send(302, {"Location": f"ftp://127.0.0.1:{self.server.server_port}/{name}", "Content-Length": "0"})

    def answer_to_file(self, name: str, body: bytes) -> None:
        self.send(302, {"Location": "file:///etc/hostname", "Content-Length": "0"})

    def send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
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


def fetch(data_dir: Path, *mirrors: str) -> None:
    prepare("mnist", data_dir, mirrors=mirrors, download=True, timeout=0.5)


def new_files(data_dir: Path) -> set[str]:
    return {path.name for path in data_dir.rglob("*") if path.is_file()} - {".lock", *FILES}


def write_idx(folder: Path, name: str, shape: tuple[int, ...], fill: int = 0) -> Path:
    """Writes an IDX file of one value; the zeros are a hole in the file, which costs nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">I{len(shape)}I", 0x0800 + len(shape), *shape)
    size = torch.Size(shape).numel()
    with (folder / name).open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size) if fill == 0 else file.write(bytes([fill]) * size)
    return folder / name


def error_lines(error: pytest.ExceptionInfo[MNISTLitError]) -> list[str]:
    return str(error.value).splitlines()


@pytest.mark.parametrize(("split", "num"), [("train", 60_000), ("test", 10_000)])
def test_official_splits_have_their_sizes_and_class_counts(mnist_dir, split, num):
    with warnings.catch_warnings(action="error"):
        images, labels = load("mnist", mnist_dir, split)
    assert (images.shape, images.dtype) == ((num, 28, 28), torch.uint8)
    assert (labels.shape, labels.dtype) == ((num,), torch.int64)
    assert labels.bincount().tolist() == CLASS_COUNTS[split]
    images[0] = 1  # the memory may be written to


def test_downloads_all_four_and_keeps_them_as_they_came(tmp_path, mirror, mnist_dir):
    fetch(tmp_path, mirror.url("good"))
    assert new_files(tmp_path) == {f"{name}.gz" for name in FILES}
    assert all(map(torch.equal, load("mnist", mnist_dir, "test"), load("mnist", tmp_path, "test")))


@pytest.mark.parametrize(
    ("manner", "reason"),
    [
        ("absent", "404"),
        ("truncated", "wrong content"),
        ("cut", "wrong content"),
        ("altered", "wrong content"),
        ("login", "wrong content"),
        ("hanging", "timed out"),
        ("to_ftp", "unknown url type: ftp"),
        ("to_file", "not allowed"),
        ("endless", "more than 75,536 bytes"),
        ("bomb", "wrong content"),
        ("loop", "infinite loop"),
    ],
)
def test_a_mirror_that_fails_is_named_and_the_next_one_is_tried(data_dir, mirror, manner, reason):
    with pytest.raises(MNISTLitError, match=reason) as error:
        fetch(data_dir, mirror.url(manner))
    assert f"{mirror.url(manner)}{LABELS}.gz" in str(error.value)
    assert new_files(data_dir) == set()
    fetch(data_dir, mirror.url(manner), mirror.url("good"))
    assert new_files(data_dir) == {f"{LABELS}.gz"}


def test_a_redirect_over_http_is_followed(data_dir, mirror):
    fetch(data_dir, mirror.url("moved"))
    assert mirror.requests == [f"/moved/{LABELS}.gz", f"/good/{LABELS}.gz"]


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "file://{folder}/", "data:,", "nonsense"])
def test_only_http_addresses_are_opened(data_dir, zipped, url):
    (data_dir / f"{LABELS}.gz").write_bytes(zipped[f"{LABELS}.gz"])
    with pytest.raises(MNISTLitError, match="unknown url type"):
        fetch(data_dir, url.format(folder=data_dir))


def test_an_interrupt_leaves_nothing_partial(data_dir, mirror):
    with pytest.raises(KeyboardInterrupt):
        prepare("mnist", data_dir, mirrors=[mirror.url("interrupting")], download=True, timeout=30)
    assert new_files(data_dir) == set()


@pytest.mark.parametrize("damage", [lambda content: content[:-100], altered], ids=["truncated", "altered"])
@pytest.mark.parametrize("name", [LABELS, f"{LABELS}.gz"])
def test_a_damaged_file_is_named_set_aside_and_fetched_again(data_dir, mirror, zipped, capsys, damage, name):
    raw, good = data_dir / "MNIST" / "raw", zipped[f"{LABELS}.gz"]
    damaged = damage(good if name.endswith(".gz") else gzip.decompress(good))
    for aside in (f"{name}.damaged", f"{name}.damaged-1"):
        (raw / f"{LABELS}.gz").unlink(missing_ok=True)
        (raw / name).write_bytes(damaged)
        fetch(data_dir, mirror.url("good"))
        assert f"{raw / name} is damaged: renamed to {aside}\n" in capsys.readouterr().err
        assert (raw / aside).read_bytes() == damaged
        assert (raw / f"{LABELS}.gz").read_bytes() == good
    assert new_files(data_dir) == {f"{LABELS}.gz", f"{name}.damaged", f"{name}.damaged-1"}


def test_a_damaged_raw_file_beside_a_good_gz_does_no_harm(data_dir, zipped):
    raw = data_dir / "MNIST" / "raw"
    (raw / LABELS).write_bytes(b"damaged")
    (raw / f"{LABELS}.gz").write_bytes(gzip.compress(gzip.decompress(zipped[f"{LABELS}.gz"]), compresslevel=9))
    prepare("mnist", data_dir, mirrors=[], download=False, timeout=1)
    assert load("mnist", data_dir, "test")[1].bincount().tolist() == CLASS_COUNTS["test"]


def test_good_files_are_left_alone_in_a_folder_that_cannot_be_written(tmp_path, mnist_dir):
    shutil.copytree(mnist_dir / "MNIST", tmp_path / "MNIST", copy_function=os.symlink)
    raw = tmp_path / "MNIST" / "raw"
    raw.chmod(0o555)
    before = raw.stat().st_mtime_ns
    prepare("mnist", tmp_path, mirrors=[], download=True, timeout=1)
    assert load("mnist", tmp_path, "test")[0].shape == (10_000, 28, 28)
    raw.chmod(0o755)
    assert {path.name for path in raw.iterdir()} == set(FILES)  # root may write anywhere: no lock, nothing new
    assert raw.stat().st_mtime_ns == before


def test_a_folder_that_cannot_be_used_is_an_error_of_two_lines(tmp_path):
    (tmp_path / "data").write_text("a file where a folder should be")
    with pytest.raises(MNISTLitError, match=r"cannot be used: .*Not a directory") as error:
        fetch(tmp_path / "data", "http://127.0.0.1:9/")
    assert len(error_lines(error)) == 2
    assert "--data.data_dir" in error_lines(error)[1]


@pytest.mark.parametrize("download", [True, False])
def test_the_error_without_files_says_where_from_which_where_to_and_the_way_out(tmp_path, mirror, download):
    mirrors = [mirror.url("absent"), mirror.url("login")]
    with pytest.raises(MNISTLitError) as error:
        prepare("mnist", tmp_path, mirrors=mirrors, download=download, timeout=1)
    expected = [*mirrors, *FILES, str(tmp_path / "MNIST" / "raw"), "--config configs/digits.yaml"]
    assert [part for part in expected if part not in str(error.value)] == []
    assert len(error_lines(error)) <= 5
    assert new_files(tmp_path) == set()


def test_the_own_mirrors_start_with_https(tmp_path):
    for name, first in [("mnist", "https://ossci-datasets"), ("kmnist", "https://codh"), ("fashion_mnist", "https://")]:
        with pytest.raises(MNISTLitError, match=f"mirrors: {first}"):
            prepare(name, tmp_path, mirrors=None, download=False, timeout=1)


def test_load_names_the_file_that_is_missing_or_damaged(data_dir):
    with pytest.raises(MNISTLitError, match=f"mnist: missing or damaged in .*: {LABELS}\n"):
        load("mnist", data_dir, "test")


def test_two_processes_at_once_fetch_each_file_once(tmp_path, mirror):
    arguments = {"mirrors": [mirror.url("slow")], "download": True, "timeout": 10.0}
    other = multiprocessing.get_context("spawn").Process(target=prepare, args=("mnist", tmp_path), kwargs=arguments)
    other.start()
    assert mirror.asked.wait(60)  # the other one is at it now
    assert new_files(tmp_path) == set()
    prepare("mnist", tmp_path, **arguments)
    assert new_files(tmp_path) == {f"{name}.gz" for name in FILES}
    other.join(60)
    assert other.exitcode == 0
    assert mirror.requests == [f"/slow/{name}.gz" for name in FILES]


def test_raw_fashion_mnist_of_the_right_form_is_accepted(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    write_idx(raw, "train-images-idx3-ubyte", (60_000, 28, 28))
    write_idx(raw, "train-labels-idx1-ubyte", (60_000,))
    write_idx(raw, "t10k-images-idx3-ubyte", (10_000, 28, 28))
    write_idx(raw, LABELS, (10_000,), fill=9)
    prepare("fashion_mnist", tmp_path, mirrors=[], download=False, timeout=1)
    assert load("fashion_mnist", tmp_path, "test")[1].unique().tolist() == [9]


@pytest.mark.parametrize(("shape", "fill"), [((10_000,), 10), ((10_001,), 0), ((9_999,), 0), ((10_000, 1), 0)], ids=str)
def test_raw_kmnist_of_another_form_is_refused(tmp_path, shape, fill):
    raw = tmp_path / "KMNIST" / "raw"
    write_idx(raw, "t10k-images-idx3-ubyte", (10_000, 28, 28))
    write_idx(raw, LABELS, shape, fill)
    with pytest.raises(MNISTLitError, match=LABELS):
        load("kmnist", tmp_path, "test")


@pytest.mark.parametrize("num_bytes", [-1, 1])
def test_raw_fashion_mnist_of_another_length_is_refused(tmp_path, num_bytes):
    path = write_idx(tmp_path / "FashionMNIST" / "raw", "t10k-images-idx3-ubyte", (10_000, 28, 28))
    os.truncate(path, path.stat().st_size + num_bytes)
    with pytest.raises(MNISTLitError, match="t10k-images-idx3-ubyte"):
        load("fashion_mnist", tmp_path, "test")


def test_fashion_mnist_from_a_mirror_must_have_its_published_checksum(tmp_path, mirror):
    with pytest.raises(MNISTLitError, match="wrong content"):
        prepare("fashion_mnist", tmp_path, mirrors=[mirror.url("good")], download=True, timeout=1)
    assert new_files(tmp_path) == set()


def test_digits_are_in_the_manner_of_mnist(tmp_path):
    prepare("digits", tmp_path / "none", mirrors=None, download=False, timeout=1)
    train, test = load("digits", tmp_path / "none", "train"), load("digits", tmp_path / "none", "test")
    assert not (tmp_path / "none").exists()
    assert [len(train[1]), len(test[1])] == [1_437, 360]
    for images, labels in (train, test):
        assert (images.shape[1:], images.dtype, labels.dtype) == ((28, 28), torch.uint8, torch.int64)
        assert labels.unique().tolist() == list(range(10))
    images = torch.cat([train[0], test[0]])
    assert images.max() == 255
    assert images[:, 4:24, 4:24].sum() == images.sum() > 0  # the border is empty
    assert images[:, 10:18, 10:18].float().mean() > 80  # and the ink is light


def test_digits_test_split_is_fixed_stratified_and_disjoint(tmp_path):
    test_images, test_labels = load("digits", tmp_path, "test")
    torch.manual_seed(1234)
    again, _ = load("digits", tmp_path, "test")
    train_images, train_labels = load("digits", tmp_path, "train")
    assert torch.equal(test_images, again)
    expected = torch.cat([train_labels, test_labels]).bincount() * 360 / 1797
    assert (test_labels.bincount() - expected).abs().max() < 1
    common = {image.numpy().tobytes() for image in test_images} & {image.numpy().tobytes() for image in train_images}
    assert common == set()


@pytest.mark.parametrize("num_held_out", [0, 1, 10, 333, 999, 1_000])
def test_stratified_split_is_exact_sorted_and_proportional(num_held_out):
    labels = torch.tensor([0] * 500 + [1] * 300 + [2] * 199 + [9])[torch.randperm(1_000)]
    kept, held_out = stratified_split(labels, num_held_out)
    assert len(held_out) == num_held_out
    assert torch.equal(torch.cat([kept, held_out]).sort().values, torch.arange(1_000))
    assert torch.equal(kept, kept.sort().values)
    assert torch.equal(held_out, held_out.sort().values)
    shares = labels.bincount() * num_held_out / 1_000
    assert (labels[held_out].bincount(minlength=10) - shares).abs().max() < 1


def test_stratified_split_neither_reads_nor_moves_the_global_generator():
    labels = torch.arange(1_000) % 10
    torch.manual_seed(1)
    _, first = stratified_split(labels, 100)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    torch.manual_seed(2)
    assert torch.equal(first, stratified_split(labels, 100)[1])
    assert first.diff().unique().numel() > 1  # it is a random choice, not each tenth image


@pytest.mark.parametrize("num_held_out", [-1, 11])
def test_stratified_split_refuses_what_it_cannot_hold_out(num_held_out):
    with pytest.raises(MNISTLitError, match=f"cannot hold out {num_held_out} of 10"):
        stratified_split(torch.arange(10), num_held_out)
