"""Hostile input: checkpoints, URLs, class paths and run directories of strangers are refused or harmless."""

import contextlib
import copy
import hashlib
import json
import os
import pickle
import shutil
import sys
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
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
from mnist_lit.errors import MNISTLitError, UsageError

__all__ = ["refused"]

Fails = Callable[..., str]
Good = dict[str, Any]
DIGITS = ["--data.dataset=digits", "--data.val_size=200"]
TOUCH = {"class_path": "os.system", "init_args": {"command": "touch executed"}}


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
def good(run_dir: Path) -> Good:
    """What a good checkpoint holds."""
    content: Good = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return content


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set torch's switch that unpickles everything unless a caller forbids it."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


@pytest.fixture
def _importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a module that leaves a file behind when it is imported, and another when it is called."""
    tmp_path.joinpath("imported.py").write_text(
        "from pathlib import Path\n"
        "Path('executed').touch()\n"
        "def thing(*args, **kwargs): Path('called').touch()\n"
        "class Thing:\n    def __init__(self, *args, **kwargs): thing()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "imported", raising=False)


@contextlib.contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class Files(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The URL of the working folder."""
    with serving(partial(Files, directory=str(tmp_path))) as url:
        yield url


# Pickled checkpoints


def rezipped(good: Good, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A good checkpoint's file with other contents."""
    target = BytesIO()
    with zipfile.ZipFile(BytesIO(saved(good))) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target.getvalue()


def saved(content: Any, **kwargs: Any) -> bytes:
    file = BytesIO()
    torch.save(content, file, **kwargs)
    return file.getvalue()


def tar(content: bytes) -> bytes:
    """Pack a checkpoint as torch did before 0.4."""
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    return file.getvalue()


def torchscript(_: Good) -> bytes:
    file = BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), file)  # type: ignore[no-untyped-call]
    return file.getvalue()


PICKLED: dict[str, Callable[[Good], bytes]] = {
    "state_dict": lambda good: saved({**good, "state_dict": {"network.mean": Call()}}),
    "callbacks": lambda good: saved({**good, "callbacks": {"EMA": Call()}}),
    "config": lambda good: saved({**good, "config": {"model": {"lr": Call()}}}),
    "nested": lambda good: saved({**good, "extra": [{"deep": (Call(),)}]}),
    "array of objects": lambda good: saved({**good, "extra": np.array([Call()], dtype=object)}),
    "data.pkl": lambda good: rezipped(good, lambda name, old: pickle.dumps(Call()) if name.endswith(".pkl") else old),
    "legacy": lambda good: saved({**good, "extra": Call()}, _use_new_zipfile_serialization=False),
    "tar": lambda _: tar(pickle.dumps(Call())),
    "pickle": lambda _: pickle.dumps(Call()),
    "pickle of protocol 0": lambda _: pickle.dumps(Call(), protocol=0),
    "TorchScript": torchscript,
    "compressed": lambda good: rezipped(
        good, lambda name, old: old + bytes(2**28) if name.endswith("data/0") else old, zipfile.ZIP_DEFLATED
    ),
}


@pytest.mark.parametrize("make", PICKLED.values(), ids=PICKLED)
def test_pickled_code_is_refused_in_every_form(
    make: Callable[[Good], bytes], good: Good, tmp_path: Path, refused: Fails
) -> None:
    tmp_path.joinpath("bad.ckpt").write_bytes(make(good))

    assert "bad.ckpt" in refused("fit", "--ckpt_path=bad.ckpt")


@pytest.fixture
def _pickled(good: Good, tmp_path: Path) -> None:
    """Make a run directory whose checkpoints hold code, and a good file beside it."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for name in ("best", "last"):
        torch.save({**good, "extra": Call()}, folder / f"{name}.ckpt")
    torch.save(good, tmp_path / "good.ckpt")
    tmp_path.joinpath("run", "config.yaml").write_text(yaml.safe_dump(good["config"]))


PATHS = ["run", "run/checkpoints/best.ckpt", "{url}/run/checkpoints/best.ckpt"]
ARGS = [
    *([command, f"--ckpt_path={PATHS[0]}"] for command in ("fit", "validate", "test", "predict", "export", "demo")),
    *(["test", f"--ckpt_path={path}"] for path in PATHS[1:]),
    *(["test", "--ckpt_path=good.ckpt", f"--ensemble=[{path}]"] for path in PATHS),
]


@pytest.mark.parametrize("args", ARGS, ids=" ".join)
@pytest.mark.usefixtures("_pickled")
def test_pickled_code_is_refused_by_every_command(args: list[str], served: str, refused: Fails) -> None:
    assert "posix.system" in refused(*(arg.format(url=served) for arg in args))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("_pickled")
def test_pickled_code_is_refused_in_python(path: str, served: str, tmp_path: Path) -> None:
    before = contents(tmp_path)

    for kind in (ConvNet, MNISTDataModule):
        for weights_only in (None, False):
            with pytest.raises(UsageError, match=r"posix\.system"):
                kind.load_from_checkpoint(path.format(url=served), weights_only=weights_only)

    assert contents(tmp_path) == before


# Checkpoints of plain data that name code

LAMBDA_LR = "torch.optim.lr_scheduler.LambdaLR"
HUB = {"repo_or_dir": ".", "model": "x", "source": "local"}
CODE: list[tuple[str, Any]] = [
    ("optimizer", TOUCH),
    ("optimizer", {"class_path": "torch.hub.load", "init_args": HUB}),
    ("optimizer", {"class_path": "torch.optim.adamw.torch.hub.load", "init_args": HUB}),
    ("optimizer", {"class_path": "torch.optim.AdamW", "dict_kwargs": {"lr": {"class_path": "imported.Thing"}}}),
    ("optimizer", {"class_path": "imported.Thing"}),
    ("optimizer", "imported.thing"),
    ("schedule", TOUCH),
    ("schedule", {"class_path": LAMBDA_LR, "init_args": {"lr_lambda": "os.abort"}}),
    ("schedule", {"class_path": LAMBDA_LR, "init_args": {"lr_lambda": [TOUCH]}}),
]


@pytest.mark.parametrize("has_config", [True, False])
@pytest.mark.parametrize(("key", "spec"), CODE, ids=[f"{key} {spec}"[:60] for key, spec in CODE])
@pytest.mark.usefixtures("_importable")
def test_code_that_a_checkpoint_names_is_not_run(
    key: str, spec: Any, has_config: bool, good: Good, tmp_path: Path, refused: Fails
) -> None:
    hyper_parameters = {**good["hyper_parameters"], key: spec}
    config = {**good["config"], "model": {**good["config"]["model"], key: spec}} if has_config else None
    torch.save({**good, "hyper_parameters": hyper_parameters, "config": config}, tmp_path / "bad.ckpt")
    before = contents(tmp_path)

    assert f"model.{key}" in refused("fit", "--ckpt_path=bad.ckpt", *DIGITS)
    with contextlib.suppress(MNISTLitError):
        ConvNet.load_from_checkpoint("bad.ckpt")

    assert contents(tmp_path) == before


@pytest.mark.usefixtures("_importable")
def test_commands_that_do_not_train_ignore_the_code_that_training_needs(good: Good, tmp_path: Path) -> None:
    thing = {"class_path": "imported.Thing"}
    model = {"optimizer": thing, "schedule": thing}
    trainer = {"callbacks": [thing], "logger": [thing], "profiler": thing}
    config = {**good["config"], "model": {**good["config"]["model"], **model}}
    config["trainer"] = {**config["trainer"], **trainer}
    torch.save(
        {**good, "hyper_parameters": {**good["hyper_parameters"], **model}, "config": config}, tmp_path / "a.ckpt"
    )

    cli = main(["test", "--ckpt_path=a.ckpt"])

    assert 0 < float(cli.trainer.callback_metrics["test/acc"]) <= 1
    assert not (tmp_path / "executed").exists()


INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
ODD: list[dict[str, Any]] = [
    {"hparams": TOUCH | {"optimizer": TOUCH}},
    {"module_arguments": {"optimizer": TOUCH}},
    {"hyper_parameters": TOUCH, "hparams_name": "optimizer"},
    {"hyper_parameters": {"_instantiator": "os.system", "optimizer": None}},
    {"hyper_parameters": {"_instantiator": "imported.thing"}},
    *(
        {"hyper_parameters": {"_instantiator": INSTANTIATOR, **parameters}}
        for parameters in (
            {"_class_path": "imported.Thing"},
            {"optimizer": TOUCH},
            {"lr": TOUCH},
            {"channels": [TOUCH]},
            {"image_size": {"class_path": "imported.Thing"}},
        )
    ),
]


@pytest.mark.parametrize("change", ODD, ids=str)
@pytest.mark.usefixtures("_importable")
def test_code_in_the_unusual_keys_of_a_checkpoint_is_not_run(
    change: dict[str, Any], good: Good, tmp_path: Path
) -> None:
    torch.save({**good, **change}, tmp_path / "bad.ckpt")
    before = contents(tmp_path)

    with contextlib.suppress(Exception):  # some keys are ignored, some refused
        ConvNet.load_from_checkpoint("bad.ckpt")
    with contextlib.suppress(SystemExit):
        main(["validate", "--ckpt_path=bad.ckpt", "--run_dir=out"])

    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert contents(tmp_path) == before


def test_a_checkpoint_of_a_stranger_sets_no_paths_and_no_classes(
    good: Good, tmp_path: Path, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_LIT_DATA", str(tmp_path / "data"))
    config = {**good["config"], "run_dir": "theirs", "ensemble": [f"{served}/none.ckpt"]}
    config["data"] = {**config["data"], "data_dir": "theirs", "mirrors": [served], "predict_paths": "theirs"}
    config["trainer"] = {"callbacks": [{"class_path": "lightning.pytorch.callbacks.Timer"}], "profiler": "simple"}
    torch.save({**good, "config": config}, tmp_path / "theirs.ckpt")

    cli = main(["fit", "--ckpt_path=theirs.ckpt"])

    assert str(cli.run_dir) == "logs/run_1"
    assert cli.datamodule.data_dir == tmp_path / "data"
    assert (cli.datamodule.mirrors, cli.datamodule.predict_paths) == (None, None)
    assert "Timer" not in {type(callback).__name__ for callback in cli.trainer.callbacks}  # type: ignore[attr-defined]
    assert not (tmp_path / "theirs").exists()


# Checkpoints whose tensors are not what they seem


def first(good: Good, make: Callable[[Any], Any]) -> Good:
    """A checkpoint in which the weights of the first convolution are something else."""
    name = next(name for name, tensor in good["state_dict"].items() if tensor.ndim == 4)
    return {**good, "state_dict": {**good["state_dict"], name: make(good["state_dict"][name])}}


WEIGHTS: dict[str, Callable[[Any], Any]] = {
    "sparse": lambda weight: weight.to_sparse(),
    "quantised": lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
    "complex": lambda weight: weight.to(torch.complex64),
    "without values": lambda weight: weight.to("meta"),
    "other shape": lambda weight: weight.flatten(),
    "huge": lambda _: torch.zeros(1).expand(10**9, 10**9),
}


@pytest.mark.parametrize("make", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.filterwarnings("ignore")
def test_weights_of_another_kind_are_refused(
    make: Callable[[Any], Any], good: Good, tmp_path: Path, refused: Fails
) -> None:
    torch.save(first(good, make), tmp_path / "bad.ckpt")

    assert "ckpt_path" in refused("test", "--ckpt_path=bad.ckpt")


def test_weights_that_are_not_finite_are_noted(good: Good, tmp_path: Path, capfd: Any) -> None:
    torch.save(first(good, lambda weight: weight * float("nan")), tmp_path / "bad.ckpt")

    main(["test", "--ckpt_path=bad.ckpt"])

    assert "bad.ckpt" in capfd.readouterr().err


STATES: list[tuple[str, Any]] = [
    ("callbacks", 3),
    ("loops", {}),
    ("optimizer_states", [{}]),
    ("lr_schedulers", 3),
    ("train_metrics", {"loss": 3}),
    ("val_acc_best", "x"),
    ("pytorch-lightning_version", "x"),
    ("MNISTDataModule", 3),
]


@pytest.mark.parametrize(("name", "state"), STATES)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_state_ends_a_fit_before_it_has_begun_and_leaves_nothing(
    name: str, state: Any, good: Good, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({**good, name: state}, tmp_path / "bad.ckpt")
    before = contents(tmp_path)

    try:
        main(["fit", "--ckpt_path=bad.ckpt", "--trainer.max_epochs=2"])
    except SystemExit as stop:
        assert stop.code in (1, 2)
        assert len(capsys.readouterr().err.splitlines()) <= 5
        assert contents(tmp_path) == before


@pytest.mark.parametrize("make", [lambda _: torch.zeros(1), lambda old: torch.zeros(*old.shape, 2)])
def test_an_optimizer_state_of_the_wrong_size_ends_a_fit_before_it_is_written_to(
    make: Callable[[Any], Any], good: Good, tmp_path: Path, refused: Fails
) -> None:
    states = copy.deepcopy(good["optimizer_states"])
    for moments in states[0]["state"].values():
        moments["exp_avg"] = make(moments["exp_avg"])
    torch.save({**good, "optimizer_states": states}, tmp_path / "bad.ckpt")

    assert "optimizer_states" in refused("fit", "--ckpt_path=bad.ckpt", "--trainer.max_epochs=2", code=1)


# Downloads of checkpoints


class Trap(Files):
    """Answers at /KIND in the manner of that name."""

    def do_GET(self) -> None:
        kind = self.path.strip("/")
        targets = {"file": "file:///etc/hostname", "data": "data:,x", "loop": "/loop"}
        if kind == "missing":
            self.send_error(404)
        elif kind == "nonsense":
            self.wfile.write(b"\0" * 100)
        elif kind in targets:
            self.send_response(302)
            self.send_header("Location", targets[kind])
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Please log in</html>")


@pytest.mark.parametrize("kind", ["missing", "file", "data", "loop", "nonsense", "page", "page#sha256=00"])
def test_a_url_of_no_checkpoint_is_one_error(kind: str, refused: Fails) -> None:
    with serving(Trap) as url:
        assert "ckpt_path: " in refused("test", f"--ckpt_path={url}/{kind}", code=2 if kind == "page" else 1)


@pytest.mark.parametrize("url", ["http://[::1/x", "https://", "http://localhost:99999/x", "https://\x00/x"])
def test_a_malformed_url_is_one_error(url: str, fails: Fails) -> None:
    assert "ckpt_path: " in fails("test", f"--ckpt_path={url}", code=1)


def test_a_checkpoint_is_not_fetched_where_anyone_could_exchange_it(refused: Fails) -> None:
    assert "https://" in refused("test", "--ckpt_path=http://example.invalid/best.ckpt")


def test_a_checkpoint_may_be_a_url_with_its_digest(run_dir: Path, tmp_path: Path, served: str) -> None:
    shutil.copy(run_dir / "checkpoints" / "best.ckpt", tmp_path)
    digest = hashlib.sha256(tmp_path.joinpath("best.ckpt").read_bytes()).hexdigest()

    cli = main(["test", f"--ckpt_path={served}/best.ckpt#sha256={digest}"])

    expected = torch.load("best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in cli.model.state_dict().items())
    assert str(cli.run_dir) == "logs/run_1"


# Class paths

KEYS = ["model.optimizer", "model.schedule"] + [
    f"trainer.{name}" for name in ("accelerator", "strategy", "logger", "callbacks", "plugins", "profiler")
]
LISTS = ("trainer.logger", "trainer.callbacks", "trainer.plugins")
NAMES = ["os.system", "torch.hub.load", "mnist_lit.main", "imported.thing", "imported.Thing", "torch.nn.Linear"]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.usefixtures("_importable")
def test_a_class_path_is_of_the_kind_that_its_key_takes(key: str, tmp_path: Path, fails: Fails) -> None:
    for name in NAMES:
        spec = f"{{class_path: {name}}}"
        assert f"{key}: " in fails("fit", *DIGITS, f"--{key}={f'[{spec}]' if key in LISTS else spec}")
    assert f"{key}: " in fails("fit", *DIGITS, f"--{key}=imported.thing")
    assert not (tmp_path / "called").exists()
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("function", [TOUCH, {"class_path": "imported.thing"}])
@pytest.mark.usefixtures("_importable")
def test_an_argument_of_a_class_is_not_called(function: Any, tmp_path: Path, fails: Fails) -> None:
    spec = {"class_path": "LambdaCallback", "init_args": {"on_fit_start": function}}

    assert function["class_path"] in fails("fit", *DIGITS, f"--trainer.callbacks={json.dumps([spec])}")
    assert not (tmp_path / "called").exists()


# Run directories in reports and on the terminal

SCRIPT = "<script>alert('x')</script>"
ESCAPE = "\x1b]0;owned\x07\x1b[31m"


def test_a_run_directory_shows_markup_and_escapes_as_text(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(run_dir, folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, "device": ESCAPE + SCRIPT, "precision": SCRIPT}))

    main(["test", f"--ckpt_path={folder}", "--report=true"])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["dataset"] = config[SCRIPT] = ESCAPE + SCRIPT
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(folder), str(run_dir)])

    page, console = (folder / "report.html").read_text(), capsys.readouterr()
    assert stop.value.code == 0
    assert "&lt;img" in page
    assert [tag for tag in ("<script", "<img src=x") if tag in page] == []
    assert not {"\x1b", "\x07"} & {*console.out, *console.err}


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json"])
def test_a_comparison_refuses_a_damaged_run(name: str, run_dir: Path, tmp_path: Path, refused: Fails) -> None:
    shutil.copytree(run_dir, tmp_path / "bad")
    for content in (b"\xff\0", b"[" * 100_000, b"3", b"", yaml.dump(Call())):
        tmp_path.joinpath("bad", name).write_bytes(content if isinstance(content, bytes) else content.encode())
        assert f"bad/{name}" in refused("compare", "bad", str(run_dir))


def test_keys_of_a_checkpoint_do_not_reach_the_terminal(
    good: Good, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({**good, "config": {**good["config"], ESCAPE: 3}}, tmp_path / "odd.ckpt")

    main(["test", "--ckpt_path=odd.ckpt"])

    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("release", ["2.6.2", "2.6.3"])
def test_malicious_releases_of_lightning_are_excluded(release: str) -> None:
    [bound] = [bound for bound in map(Requirement, requires("mnist_lit") or []) if bound.name == "lightning"]

    assert release not in bound.specifier
