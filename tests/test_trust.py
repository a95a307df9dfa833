"""What comes from elsewhere: checkpoints, configs, run directories and downloads that want to do harm."""

import contextlib
import copy
import hashlib
import json
import os
import pickle
import shutil
import ssl
import subprocess
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import requires
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL
from packaging.requirements import Requirement
from test_bad_input import contents, refused

from mnist_lit import ConvNet, MNISTDataModule, main
from mnist_lit.errors import UsageError

__all__ = ["refused"]

Fails = Callable[..., str]
INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
DIGITS = ["--data.dataset=digits", "--data.val_size=200"]


class Call:
    """An object whose unpickling runs a command that leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "run"
    main(["fit", *SMALL, "--trainer.max_epochs=1", f"--run_dir={folder}"])
    return folder


@pytest.fixture(scope="module")
def good(run_dir: Path) -> dict[str, Any]:
    """What a good checkpoint holds."""
    content: dict[str, Any] = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return content


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own switch, with which it unpickles whatever is not said otherwise."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


# Checkpoints that are pickled


def rezipped(
    good: dict[str, Any], change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> bytes:
    """A good checkpoint's file with other contents."""
    source, target = BytesIO(), BytesIO()
    torch.save(good, source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target.getvalue()


def saved(content: Any, **kwargs: Any) -> bytes:
    file = BytesIO()
    torch.save(content, file, **kwargs)
    return file.getvalue()


def tar(content: bytes) -> bytes:
    """As torch wrote them before 0.4."""
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    return file.getvalue()


PICKLED: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "state_dict": lambda good: saved({**good, "state_dict": {"network.mean": Call()}}),
    "hyper_parameters": lambda good: saved({**good, "hyper_parameters": {"lr": Call()}}),
    "callbacks": lambda good: saved({**good, "callbacks": {"EMA": Call()}}),
    "optimizer_states": lambda good: saved({**good, "optimizer_states": [Call()]}),
    "config": lambda good: saved({**good, "config": {"model": {"lr": Call()}}}),
    "key": lambda good: saved({**good, "extra": [{"deep": (Call(),)}]}),
    "array of objects": lambda good: saved({**good, "extra": np.array([Call()], dtype=object)}),
    "data.pkl": lambda good: rezipped(good, lambda name, old: pickle.dumps(Call()) if name.endswith(".pkl") else old),
    "legacy": lambda good: saved({**good, "extra": Call()}, _use_new_zipfile_serialization=False),
    "tar": lambda _: tar(pickle.dumps(Call())),
    "pickle": lambda _: pickle.dumps(Call()),
    "pickle of protocol 0": lambda _: pickle.dumps(Call(), protocol=0),
}


@pytest.mark.parametrize("make", PICKLED.values(), ids=PICKLED)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_pickled_code_is_refused_in_every_form(
    command: str, make: Callable[..., bytes], good: dict[str, Any], tmp_path: Path, refused: Fails
) -> None:
    tmp_path.joinpath("bad.ckpt").write_bytes(make(good))

    error = refused(command, "--ckpt_path=bad.ckpt")

    assert error.startswith("error: ckpt_path: bad.ckpt is no checkpoint of mnist_lit: it ")


@pytest.fixture
def pickled(good: dict[str, Any], tmp_path: Path) -> Path:
    """A run directory whose checkpoints hold code, and a good file beside it."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("best", "last"):
        torch.save({**good, "extra": Call()}, folder / f"{name}.ckpt")
    torch.save(good, tmp_path / "good.ckpt")
    tmp_path.joinpath("run", "config.yaml").write_text(yaml.safe_dump(good["config"]))
    return folder / "best.ckpt"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The URL of the working folder."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args: Any) -> None:
            pass

    yield from serving(Handler)


def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "export", "demo"])
@pytest.mark.parametrize("path", ["run", "run/checkpoints/best.ckpt", "{url}/run/checkpoints/best.ckpt"])
@pytest.mark.usefixtures("pickled")
def test_pickled_code_is_refused_by_every_command(path: str, command: str, served: str, refused: Fails) -> None:
    assert "it holds more than plain data: posix.system" in refused(command, f"--ckpt_path={path.format(url=served)}")


@pytest.mark.parametrize("path", ["run", "run/checkpoints/best.ckpt", "{url}/run/checkpoints/best.ckpt"])
@pytest.mark.usefixtures("pickled")
def test_pickled_code_is_refused_as_a_member_of_an_ensemble(path: str, served: str, refused: Fails) -> None:
    error = refused("test", "--ckpt_path=good.ckpt", f"--ensemble=[{path.format(url=served)}]")

    assert error.startswith("error: ensemble: ")
    assert "posix.system" in error


@pytest.mark.parametrize("path", ["run", "run/checkpoints/best.ckpt", "{url}/run/checkpoints/best.ckpt"])
@pytest.mark.parametrize("weights_only", [None, False])
@pytest.mark.parametrize("kind", [ConvNet, MNISTDataModule])
@pytest.mark.usefixtures("pickled")
def test_pickled_code_is_refused_in_python(
    path: str, weights_only: bool | None, kind: Any, served: str, tmp_path: Path
) -> None:
    before = contents(tmp_path)

    with pytest.raises(UsageError, match=r"posix\.system"):
        kind.load_from_checkpoint(path.format(url=served), weights_only=weights_only)

    assert contents(tmp_path) == before


@pytest.mark.usefixtures("pickled")
def test_pickled_code_is_refused_by_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"ckpt_path": "run/checkpoints/best.ckpt", "data": {"dataset": "digits", "val_size": 200}}
    tmp_path.joinpath("base.yaml").write_text(yaml.safe_dump(config))

    with pytest.raises(SystemExit) as stop:
        main(["search", "--space={model.lr: {choices: [0.1]}}", "--configs=[base.yaml]", "--n_trials=1"])

    assert stop.value.code == 2
    assert "posix.system" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


@pytest.mark.usefixtures("pickled")
def test_a_comparison_reads_no_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", "run", str(run_dir)])

    assert stop.value.code == 0
    assert not (tmp_path / "executed").exists()


# Checkpoints of plain data that name code

CODE: list[tuple[str, Any]] = [
    ("optimizer", {"class_path": "os.system", "init_args": {"command": "touch executed"}}),
    ("optimizer", {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "executed"]}}),
    ("optimizer", {"class_path": "torch.hub.load", "init_args": {"repo_or_dir": ".", "model": "x", "source": "local"}}),
    ("optimizer", {"class_path": "torch.optim.adamw.torch.hub.load"}),
    ("optimizer", {"class_path": "torch.optim.AdamW", "dict_kwargs": {"lr": {"class_path": "imported.Thing"}}}),
    ("optimizer", {"class_path": "imported.Thing"}),
    ("optimizer", "imported.thing"),
    ("schedule", {"class_path": "os.system", "init_args": {"command": "touch executed"}}),
    ("schedule", {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "os.abort"}}),
    (
        "schedule",
        {
            "class_path": "torch.optim.lr_scheduler.LambdaLR",
            "init_args": {"lr_lambda": [{"class_path": "os.system", "init_args": {"command": "touch executed"}}]},
        },
    ),
]


@pytest.fixture
def _importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that leaves a file behind when it is imported, and another when it is called."""
    tmp_path.joinpath("imported.py").write_text(
        "from pathlib import Path\n"
        "Path('executed').touch()\n"
        "def thing(*args, **kwargs): Path('called').touch()\n"
        "class Thing:\n    def __init__(self, *args, **kwargs): thing()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "imported", raising=False)


@pytest.mark.parametrize("place", ["config", "hyper_parameters"])
@pytest.mark.parametrize("command", ["fit", "test", "python"])
@pytest.mark.parametrize(("key", "spec"), CODE, ids=[f"{key} {spec}"[:60] for key, spec in CODE])
@pytest.mark.usefixtures("_importable")
def test_code_that_a_checkpoint_names_is_not_run(
    key: str, spec: Any, command: str, place: str, good: dict[str, Any], tmp_path: Path, refused: Fails
) -> None:
    content = {name: value for name, value in good.items() if name != "config" or place == "config"}
    model = content["config"]["model"] if place == "config" else content["hyper_parameters"]
    content[place] = {"model": {**model, key: spec}} if place == "config" else {**model, key: spec}
    torch.save(content, tmp_path / "bad.ckpt")
    before = contents(tmp_path)

    if command == "python":
        with pytest.raises(UsageError, match="names code that is not torch's"):
            ConvNet.load_from_checkpoint("bad.ckpt")
    else:
        assert f"names code that is not torch's: model.{key} is " in refused(command, "--ckpt_path=bad.ckpt", *DIGITS)

    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [
        {"hparams": CODE[0][1] | {"optimizer": CODE[0][1]}},
        {"module_arguments": {"optimizer": CODE[0][1]}},
        {"hyper_parameters": CODE[0][1], "hparams_name": "optimizer"},
        {"hyper_parameters": {"_instantiator": "os.system", "optimizer": None}},
        {"hyper_parameters": {"_instantiator": INSTANTIATOR, "_class_path": "imported.Thing"}},
        {"hyper_parameters": {"_instantiator": INSTANTIATOR, "lr": CODE[0][1]}},
        {"hyper_parameters": {"_instantiator": INSTANTIATOR, "channels": [CODE[0][1]]}},
        {"hyper_parameters": {"_instantiator": INSTANTIATOR, "image_size": {"class_path": "imported.Thing"}}},
    ],
)
@pytest.mark.usefixtures("_importable")
def test_code_in_the_odd_places_of_a_checkpoint_is_not_run(
    change: dict[str, Any], good: dict[str, Any], tmp_path: Path
) -> None:
    torch.save({**good, **change}, tmp_path / "bad.ckpt")
    before = contents(tmp_path)

    with contextlib.suppress(Exception):  # some of it is left out, some refused
        ConvNet.load_from_checkpoint("bad.ckpt")

    assert contents(tmp_path) == before


def test_a_checkpoint_from_elsewhere_says_not_where_to_write_and_what_to_call(
    good: dict[str, Any], tmp_path: Path, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_LIT_DATA", str(tmp_path / "data"))
    config = {**good["config"], "run_dir": "theirs", "ensemble": [f"{served}/none.ckpt"]}
    config["data"] = {**config["data"], "data_dir": "theirs", "mirrors": [served], "predict_paths": "theirs"}
    config["trainer"] = {"callbacks": [{"class_path": "lightning.pytorch.callbacks.Timer"}], "profiler": "simple"}
    torch.save({**good, "config": config}, tmp_path / "theirs.ckpt")

    cli = main(["test", "--ckpt_path=theirs.ckpt"])

    assert str(cli.run_dir) == "logs/run_1"
    assert cli.datamodule.data_dir == tmp_path / "data"
    assert (cli.datamodule.mirrors, cli.datamodule.predict_paths, cli.members) == (None, None, [])
    assert "Timer" not in {type(callback).__name__ for callback in cli.trainer.callbacks}  # type: ignore[attr-defined]
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("section", ["model", "data", "trainer", "checkpoint", "ema"])
def test_a_checkpoint_whose_config_is_no_config_is_one_error(
    section: str, good: dict[str, Any], tmp_path: Path, refused: Fails
) -> None:
    torch.save({**good, "config": {**good["config"], section: 3}}, tmp_path / "bad.ckpt")

    assert f"{section}: takes keys below it" in refused("test", "--ckpt_path=bad.ckpt")


# Checkpoints whose tensors are not what they seem


def first(good: dict[str, Any], make: Callable[[Any], Any]) -> dict[str, Any]:
    """A checkpoint in which the weights of the first convolution are something else."""
    name = next(name for name, tensor in good["state_dict"].items() if tensor.ndim == 4)
    return {**good, "state_dict": {**good["state_dict"], name: make(good["state_dict"][name])}}


WEIGHTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "sparse": (lambda weight: weight.to_sparse(), "is sparse"),
    "quantised": (
        lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "sparse, quantised",
    ),
    "complex": (lambda weight: weight.to(torch.complex64), "quantised, complex"),
    "without values": (lambda weight: weight.to("meta"), "larger than what is stored of it"),
    "other size": (lambda weight: weight[:1], "of another network"),
    "other shape": (lambda weight: weight.flatten(), "of another network"),
    "huge": (lambda _: torch.zeros(1).expand(10**9, 10**9), "larger than what is stored of it"),
}


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(("make", "reason"), WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_none_are_refused(
    make: Callable[[Any], Any], reason: str, command: str, good: dict[str, Any], tmp_path: Path, refused: Fails
) -> None:
    torch.save(first(good, make), tmp_path / "bad.ckpt")

    assert reason in refused(command, "--ckpt_path=bad.ckpt")


def test_weights_that_are_not_finite_are_said_to_be(good: dict[str, Any], tmp_path: Path, capfd: Any) -> None:
    torch.save(first(good, lambda weight: weight * float("nan")), tmp_path / "bad.ckpt")

    main(["test", "--ckpt_path=bad.ckpt"])

    assert "note: weights of bad.ckpt are NaN or infinite, first in network." in capfd.readouterr().err


@pytest.mark.parametrize("part", ["data.pkl", "data/0"])
def test_a_compressed_checkpoint_is_refused_before_it_fills_the_memory(
    part: str, good: dict[str, Any], tmp_path: Path, refused: Fails
) -> None:
    def blown_up(name: str, old: bytes) -> bytes:
        return old + bytes(2**28) if name.endswith(part) else old

    tmp_path.joinpath("bomb.ckpt").write_bytes(rezipped(good, blown_up, zipfile.ZIP_DEFLATED))

    assert refused("test", "--ckpt_path=bomb.ckpt").endswith("it is compressed\n")


def test_a_torchscript_archive_is_no_checkpoint(tmp_path: Path, refused: Fails) -> None:
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "script.ckpt"))  # type: ignore[no-untyped-call]

    assert "is no checkpoint of mnist_lit" in refused("test", "--ckpt_path=script.ckpt")


STATES: list[tuple[str, Any]] = [
    ("callbacks", {"RunRecord": 3}),
    ("callbacks", {"RunRecord": {}}),
    ("callbacks", 3),
    ("loops", 3),
    ("loops", {}),
    ("loops", {"fit_loop": {}}),
    ("optimizer_states", 3),
    ("optimizer_states", [{}]),
    ("optimizer_states", []),
    ("lr_schedulers", [{"last_epoch": "x"}]),
    ("lr_schedulers", 3),
    ("epoch", "x"),
    ("global_step", "x"),
    ("global_step", None),
    ("train_metrics", {"loss": 3}),
    ("train_metrics", 3),
    ("val_acc_best", "x"),
    ("pytorch-lightning_version", 3),
    ("pytorch-lightning_version", "x"),
    ("MNISTDataModule", 3),
]


@pytest.mark.parametrize(("name", "state"), STATES, ids=[f"{name} {state}" for name, state in STATES])
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_state_ends_a_fit_before_it_has_begun_and_leaves_nothing(
    name: str, state: Any, good: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({**good, name: state}, tmp_path / "bad.ckpt")
    before = contents(tmp_path)
    code = None

    try:
        main(["fit", "--ckpt_path=bad.ckpt", "--trainer.max_epochs=2"])
    except SystemExit as stop:
        code = stop.code

    error = capsys.readouterr().err
    assert code in (None, 1, 2)
    if code is not None:
        assert len(error.splitlines()) <= 5, error
        assert contents(tmp_path) == before


MOMENTS: dict[str, tuple[Callable[[Any], Any], str, int]] = {
    "too small": (lambda _: torch.zeros(1), "optimizer_states are of another network", 1),
    "too large": (lambda old: torch.zeros(*old.shape, 2), "optimizer_states are of another network", 1),
    "of one value": (lambda old: torch.zeros(1).expand(old.shape), "larger than what is stored of it", 2),
    "none": (lambda _: None, "", 1),
    "text": (lambda _: "x", "", 1),
}


@pytest.mark.parametrize(("make", "reason", "code"), MOMENTS.values(), ids=MOMENTS)
def test_an_optimizer_state_of_the_wrong_size_ends_a_fit_before_it_is_written_to(
    make: Callable[[Any], Any], reason: str, code: int, good: dict[str, Any], tmp_path: Path, refused: Fails
) -> None:
    states = copy.deepcopy(good["optimizer_states"])
    for moments in states[0]["state"].values():
        moments["exp_avg"] = make(moments["exp_avg"])
    torch.save({**good, "optimizer_states": states}, tmp_path / "bad.ckpt")

    assert reason in refused("fit", "--ckpt_path=bad.ckpt", "--trainer.max_epochs=2", code=code)


def test_an_optimizer_that_cannot_take_a_step_leaves_nothing(refused: Fails) -> None:
    error = refused("fit", *SMALL, "--model.optimizer=SparseAdam", "--run_dir=mine", code=1)

    assert "SparseAdam" in error


# Downloads of checkpoints


class Trap(BaseHTTPRequestHandler):
    """Answers at /KIND in the manner of that name."""

    def do_GET(self) -> None:
        kind = self.path.strip("/").partition("/")[0]
        if kind in ("file", "ftp", "gopher", "data", "http"):
            targets = {"file": "file:///etc/hostname", "data": "data:,x", "http": f"http://{self.headers['Host']}/page"}
            self.redirect(targets.get(kind, f"{kind}://{self.headers['Host']}/x"))
        elif kind == "loop":
            self.redirect("/loop")
        elif kind == "endless":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(2**16))
        elif kind == "nonsense":
            self.wfile.write(b"\0" * 100)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Please log in</html>")

    def redirect(self, target: str) -> None:
        self.send_response(302)
        self.send_header("Location", target)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def trap() -> Iterator[str]:
    yield from serving(Trap)


@pytest.mark.parametrize(
    ("kind", "reason", "code"),
    [
        ("file", "not allowed", 1),
        ("ftp", "unknown url type: ftp", 1),
        ("gopher", "not allowed", 1),
        ("data", "not allowed", 1),
        ("loop", "infinite loop", 1),
        ("endless", "more than 1,048,576 bytes", 1),
        ("nonsense", "cannot be downloaded: \\x00", 1),
        ("page", "it is damaged or something else", 2),
        ("page#sha256=00", "its SHA-256 is not that", 1),
    ],
)
def test_a_url_that_leads_astray_is_one_error(
    kind: str, reason: str, code: int, trap: str, monkeypatch: pytest.MonkeyPatch, refused: Fails
) -> None:
    monkeypatch.setattr("mnist_lit.training.checkpoints.MAX_BYTES", 2**20)

    assert reason in refused("test", f"--ckpt_path={trap}/{kind}", code=code)


@pytest.mark.parametrize("url", ["http://example.invalid/best.ckpt", "http://192.0.2.1/best.ckpt"])
def test_a_checkpoint_is_not_fetched_where_anyone_could_exchange_it(url: str, refused: Fails) -> None:
    assert "use https://" in refused("test", f"--ckpt_path={url}")


@pytest.mark.parametrize(
    "url", ["http://[::1/x", "https://", "http://localhost:99999/x", "https://\x00/x", "http:///x"]
)
def test_a_url_that_is_none_is_one_error(url: str, refused: Fails) -> None:
    with contextlib.suppress(AssertionError):
        assert "ckpt_path: " in refused("test", f"--ckpt_path={url}", code=1)
        return
    assert "ckpt_path: " in refused("test", f"--ckpt_path={url}", code=2)


def test_a_digest_in_the_url_is_verified(good: dict[str, Any], tmp_path: Path, served: str) -> None:
    torch.save(good, tmp_path / "good.ckpt")
    digest = hashlib.sha256(tmp_path.joinpath("good.ckpt").read_bytes()).hexdigest()

    cli = main(["test", f"--ckpt_path={served}/good.ckpt#sha256={digest}"])

    assert 0 <= float(cli.trainer.callback_metrics["test/acc"]) <= 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_https_is_not_left_for_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails) -> None:
    certificate = [
        "-out",
        "cert.pem",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost",
    ]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", *certificate]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("cert.pem", "key.pem")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Trap)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    url = f"https://localhost:{server.server_port}"
    try:
        assert "it is damaged or something else" in fails("test", f"--ckpt_path={url}/page")
        assert "which is not https" in fails("test", f"--ckpt_path={url}/http", code=1)
    finally:
        server.shutdown()
        server.server_close()


# Class paths

KEYS = [
    "model.optimizer",
    "model.schedule",
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.logger",
    "trainer.callbacks",
    "trainer.plugins",
    "trainer.profiler",
]
LISTS = ("trainer.logger", "trainer.callbacks", "trainer.plugins")
NAMES = [
    "os.system",
    "subprocess.Popen",
    "builtins.exec",
    "shutil.rmtree",
    "pathlib.Path",
    "torch.hub.load",
    "mnist_lit.main",
    "imported.thing",
    "imported.Thing",
    "torch.nn.Linear",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.usefixtures("_importable")
def test_a_class_path_is_of_the_kind_that_its_key_takes(key: str, name: str, tmp_path: Path, fails: Fails) -> None:
    spec = f"{{class_path: {name}}}"

    error = fails("fit", *DIGITS, f"--{key}={f'[{spec}]' if key in LISTS else spec}")

    assert f"{key}: " in error
    assert name in error
    assert not (tmp_path / "called").exists()
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.usefixtures("_importable")
def test_a_function_is_no_value_of_a_key_that_takes_classes(key: str, tmp_path: Path, fails: Fails) -> None:
    for name in ("imported.thing", "os.system"):
        assert f"{key}: " in fails("fit", *DIGITS, f"--{key}={name}")
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["sampler", "pruner"])
@pytest.mark.usefixtures("_importable")
def test_a_class_path_of_a_search_is_of_the_kind_that_its_key_takes(
    key: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for spec in (f"{{class_path: {name}}}", name):
        with pytest.raises(SystemExit) as stop:
            main(["search", "--space={model.lr: {choices: [0.1]}}", "--configs=[]", f"--{key}={spec}"])

        assert stop.value.code == 2
        assert name in capsys.readouterr().err
        assert not (tmp_path / "called").exists()
        assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("key", ["model.optimizer", "model.schedule", "trainer.callbacks"])
def test_arguments_do_not_make_a_command_of_a_class_path(key: str, refused: Fails) -> None:
    command = "{class_path: os.system, init_args: {command: touch executed}}"
    callback = f"[{{class_path: LambdaCallback, init_args: {{on_fit_start: {command}}}}}]"

    refused("fit", *DIGITS, f"--{key}={callback if key == 'trainer.callbacks' else command}")


@pytest.mark.usefixtures("_importable")
def test_a_function_of_ones_own_is_not_called_in_place_of_a_class(tmp_path: Path, fails: Fails) -> None:
    callback = "[{class_path: LambdaCallback, init_args: {on_fit_start: {class_path: imported.thing}}}]"

    assert "imported.thing is no class" in fails("fit", *DIGITS, f"--trainer.callbacks={callback}")
    assert not (tmp_path / "called").exists()


# Run directories on pages and consoles

SCRIPT = "<script>alert('x')</script>"
ESCAPE = "\x1b]0;owned\x07\x1b[31m"


@pytest.fixture
def hostile_run(run_dir: Path, tmp_path: Path) -> Path:
    """A run directory whose name, keys and values are markup and terminal escapes."""
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(run_dir, folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["dataset"] = config[SCRIPT] = ESCAPE + SCRIPT
    config["model"]["optimizer"] = {"class_path": f"a.{SCRIPT}", "init_args": {ESCAPE: SCRIPT}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "device": ESCAPE + SCRIPT, "precision": SCRIPT}))
    return folder


def test_a_comparison_shows_markup_and_escapes_as_text(
    hostile_run: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(hostile_run), str(run_dir), "--output=page.html"])

    page, console = tmp_path.joinpath("page.html").read_text(), capsys.readouterr().out
    assert stop.value.code == 0
    assert "&lt;script&gt;" in page
    assert "&lt;img" in page
    assert [tag for tag in ("<script", "<img src=x") if tag in page] == []
    assert "\x1b" not in console
    assert "\x07" not in console


def test_the_page_of_a_run_shows_markup_as_text(hostile_run: Path, run_dir: Path) -> None:
    shutil.copy(run_dir / "config.yaml", hostile_run)  # or else there were no such run to test

    main(["test", f"--ckpt_path={hostile_run}", "--report=true"])

    page = (hostile_run / "report.html").read_text()
    assert "&lt;img" in page
    assert "<img src=x" not in page
    assert "<script" not in page


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json"])
@pytest.mark.parametrize(
    "content", [b"\xff\0", b"[" * 100_000, b"3", b"", b"!!python/object/apply:os.system [touch executed]"]
)
def test_a_comparison_refuses_a_damaged_run(
    name: str, content: bytes, run_dir: Path, tmp_path: Path, refused: Fails
) -> None:
    shutil.copytree(run_dir, tmp_path / "bad")
    tmp_path.joinpath("bad", name).write_bytes(content)

    assert f"bad/{name}" in refused("compare", "bad", str(run_dir))


def test_keys_of_a_checkpoint_do_not_reach_the_terminal(
    good: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({**good, "config": {**good["config"], ESCAPE: 3}}, tmp_path / "odd.ckpt")

    main(["test", "--ckpt_path=odd.ckpt"])

    assert "\x1b" not in capsys.readouterr().err


# Packages


@pytest.mark.parametrize("release", ["2.6.2", "2.6.3"])
def test_releases_of_lightning_that_were_malicious_are_excluded(release: str) -> None:
    bounds = [Requirement(text) for text in requires("mnist_lit") or []]

    assert [bound for bound in bounds if bound.name == "lightning" and release in bound.specifier] == []
    assert "lightning" in {bound.name for bound in bounds}
