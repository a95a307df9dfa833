"""Hostile input: checkpoints, URLs, class paths and run directories of strangers are refused or harmless."""

import contextlib
import copy
import gc
import hashlib
import os
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning_utilities.core.apply_func import apply_to_collection
from test_bad_input import refused

from mnist_lit import ConvNet, main
from mnist_lit.errors import UsageError

__all__ = ["refused"]

Fails = Callable[..., str]
Good = dict[str, Any]  # what a good checkpoint holds
DIGITS = ["--data.dataset=digits", "--data.val_size=200"]
TOUCH = {"class_path": "os.system", "init_args": {"command": "touch executed"}}


class Call:
    """An object whose unpickling runs a command that leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


@pytest.fixture(autouse=True)
def _hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set torch's switch for unpickling everything; write a module that leaves a file when it is imported or called."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    tmp_path.joinpath("imported.py").write_text(
        "open('executed', 'w').close()\n"
        "def thing(*args, **kwargs): open('called', 'w').close()\n"
        "class Thing:\n    def __init__(self, *args, **kwargs): thing()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "imported", raising=False)


class Files(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def served() -> Iterator[str]:
    """The URL of the working folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# Pickled checkpoints


def saved(content: Any, **kwargs: Any) -> bytes:
    file = BytesIO()
    torch.save(content, file, **kwargs)
    return file.getvalue()


def zip_bomb(checkpoint: Good) -> bytes:
    """Compress a checkpoint with a part that would fill the memory."""
    target = BytesIO()
    with zipfile.ZipFile(BytesIO(saved(checkpoint))) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + bytes(2**28 if name.endswith("data/0") else 0))
    return target.getvalue()


PICKLED: dict[str, Callable[[Good], bytes]] = {
    "state_dict": lambda good: saved({**good, "state_dict": {"network.mean": Call()}}),
    "whole file": lambda _: saved(Call()),
    "legacy": lambda good: saved({**good, "extra": Call()}, _use_new_zipfile_serialization=False),
    "zip bomb": zip_bomb,
}


@pytest.mark.parametrize("make", PICKLED.values(), ids=PICKLED)
def test_pickled_code_is_refused_in_every_form(
    make: Callable[[Good], bytes], checkpoint: Good, tmp_path: Path, refused: Fails
) -> None:
    tmp_path.joinpath("bad.ckpt").write_bytes(make(checkpoint))
    assert "bad.ckpt" in refused("fit", "--ckpt_path=bad.ckpt")


@pytest.fixture
def _pickled(checkpoint: Good, tmp_path: Path) -> None:
    """Make a run directory whose checkpoints hold code, and a good file beside it."""
    tmp_path.joinpath("run", "checkpoints").mkdir(parents=True)
    tmp_path.joinpath("run", "config.yaml").write_text(yaml.safe_dump(checkpoint["config"]))
    for name in ("best", "last"):
        torch.save({**checkpoint, "extra": Call()}, f"run/checkpoints/{name}.ckpt")
    torch.save(checkpoint, "good.ckpt")


PATHS = ["run", "run/checkpoints/best.ckpt", "{served}/run/checkpoints/best.ckpt"]
ARGS = [[command, "--ckpt_path=run"] for command in ("fit", "test", "predict", "export", "demo")]
ARGS += [["test", f"--ckpt_path={path}"] for path in PATHS[1:]]
ARGS += [["test", "--ckpt_path=good.ckpt", f"--ensemble=[{path}]"] for path in PATHS[::2]]


@pytest.mark.parametrize("args", ARGS, ids=" ".join)
@pytest.mark.usefixtures("_pickled")
def test_pickled_code_is_refused_by_every_command(args: list[str], served: str, refused: Fails) -> None:
    assert "posix.system" in refused(*(arg.format(served=served) for arg in args))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("_pickled")
def test_pickled_code_is_refused_in_python(path: str, served: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"posix\.system"):
        ConvNet.load_from_checkpoint(path.format(served=served), weights_only=False)
    assert not (tmp_path / "executed").exists()


# Checkpoints of plain data that name code

THING = {"class_path": "imported.Thing"}
LAMBDA = {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "imported.thing"}}
CODE: list[dict[str, Any]] = [
    {"optimizer": TOUCH, "schedule": THING},
    {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": THING}}, "schedule": LAMBDA},
    {"optimizer": "imported.thing", "schedule": "imported.Thing"},
]


@pytest.mark.parametrize(
    ("command", "has_config", "code"),
    [("fit", True, CODE[0]), ("fit", False, CODE[1]), ("test", True, CODE[2]), ("test", False, CODE[0])],
    ids=str,
)
def test_checkpoint_of_a_stranger_sets_no_paths_and_no_classes(
    command: str, has_config: bool, code: Good, checkpoint: Good, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = copy.deepcopy(checkpoint)
    content["config"]["model"] |= code
    content["hyper_parameters"] |= code
    content["config"] |= {"run_dir": "theirs", "ensemble": ["theirs"], "\x1b[31m": 3}
    content["config"]["data"] |= {"data_dir": "theirs", "mirrors": ["theirs"], "predict_paths": "theirs"}
    content["config"]["trainer"] = {"callbacks": [THING], "logger": [THING], "profiler": "simple"}
    torch.save({**content, "config": content["config"] if has_config else None}, tmp_path / "theirs.ckpt")

    flags = ["--trainer.max_epochs=1", "--pictures.enabled=false", "--report=false"]
    cli = main([command, "--ckpt_path=theirs.ckpt", *DIGITS, *flags])

    ConvNet.load_from_checkpoint("theirs.ckpt")
    assert str(cli.run_dir) == "logs/run_1"
    assert "theirs" not in str(cli.datamodule.data_dir)
    assert (cli.datamodule.mirrors, cli.datamodule.predict_paths) == (None, None)
    assert not any((tmp_path / name).exists() for name in ("theirs", "executed", "called"))
    assert "\x1b" not in capsys.readouterr().err


INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
UNUSUAL: list[dict[str, Any]] = [
    {"hyper_parameters": TOUCH, "hparams_name": "optimizer"},
    {"hyper_parameters": {"_instantiator": INSTANTIATOR, "_class_path": "imported.Thing"}},
    {"hyper_parameters": {"_instantiator": INSTANTIATOR, "channels": [TOUCH], "image_size": THING}},
]


@pytest.mark.parametrize("change", UNUSUAL)
def test_code_in_the_unusual_keys_of_a_checkpoint_is_not_run(change: Good, checkpoint: Good, tmp_path: Path) -> None:
    torch.save({**checkpoint, **change}, tmp_path / "bad.ckpt")
    with contextlib.suppress(Exception):  # some keys are ignored, some refused
        ConvNet.load_from_checkpoint("bad.ckpt")
    assert not (tmp_path / "executed").exists()


# Checkpoints whose tensors and states are not what they seem


def tensors(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    """Return a function that replaces the weights of convolutions in a part of a checkpoint."""
    return lambda part: apply_to_collection(part, torch.Tensor, lambda old: make(old) if old.ndim == 4 else old)


DAMAGE: dict[str, tuple[str, Callable[[Any], Any], int]] = {
    "without values": ("state_dict", tensors(lambda old: old.to("meta")), 1),
    "huge": ("state_dict", tensors(lambda _: torch.zeros(1).expand(10**9, 10**9)), 2),
    "small moments": ("optimizer_states", tensors(lambda _: torch.zeros(1)), 1),
    "shared moments": ("optimizer_states", tensors(lambda old: torch.zeros(1).expand(old.shape)), 1),
    "sparse moments": ("optimizer_states", tensors(lambda old: old.to_sparse()), 1),
    "no loops": ("loops", lambda _: 3, 1),
    "no version": ("pytorch-lightning_version", lambda _: None, 2),
}


@pytest.mark.parametrize(("part", "make", "code"), DAMAGE.values(), ids=DAMAGE)
@pytest.mark.filterwarnings("ignore")
def test_damaged_tensors_and_states_end_a_fit_before_it_has_begun(
    part: str, make: Callable[[Any], Any], code: int, checkpoint: Good, tmp_path: Path, refused: Fails
) -> None:
    torch.save({**checkpoint, part: make(checkpoint[part])}, tmp_path / "bad.ckpt")
    refused("fit", "--ckpt_path=bad.ckpt", "--trainer.max_epochs=2", code=code)


# URLs


URLS = [
    ("{served}/missing", 1),
    ("{served}/page.ckpt", 2),
    ("{served}/page.ckpt#sha256=" + 64 * "0", 1),
    ("{served}/good.ckpt#sha256=a", 2),  # any file has one in sixteen digits
    ("http://example.invalid/a.ckpt", 2),  # anyone could exchange it on its way
    ("https://[::1/x", 1),
]


@pytest.mark.parametrize(("url", "code"), URLS)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_url_of_no_checkpoint_is_one_error(url: str, code: int, served: str, tmp_path: Path, refused: Fails) -> None:
    tmp_path.joinpath("page.ckpt").write_text("<html>Please log in</html>")
    assert "ckpt_path: " in refused("test", f"--ckpt_path={url.format(served=served)}", code=code)
    gc.collect()  # urllib leaves the sockets of errors open


def test_a_checkpoint_may_be_a_url_with_its_digest(checkpoint: Good, served: str) -> None:
    torch.save(checkpoint, "good.ckpt")
    digest = hashlib.sha256(Path("good.ckpt").read_bytes()).hexdigest()
    cli = main(["test", f"--ckpt_path={served}/good.ckpt#sha256={digest}"])
    assert 0 < float(cli.trainer.callback_metrics["test/acc"]) <= 1


# Class paths on the command line


@pytest.mark.parametrize("name", ["os.system", "imported.thing", "imported.Thing"])
def test_a_class_path_is_of_the_kind_that_its_key_takes(name: str, tmp_path: Path, fails: Fails) -> None:
    for key, value in (("model.optimizer", name), ("trainer.callbacks", f"[{name}]")):
        assert f"{key}: " in fails("fit", *DIGITS, f"--{key}={value}")
    assert not any((tmp_path / name).exists() for name in ("called", "logs"))


@pytest.mark.parametrize("function", [TOUCH, {"class_path": "imported.thing"}])
def test_a_function_as_an_argument_of_a_class_is_not_called(function: Any, tmp_path: Path, fails: Fails) -> None:
    callback = {"class_path": "LambdaCallback", "init_args": {"on_fit_start": function}}
    assert function["class_path"] in fails("fit", *DIGITS, f"--trainer.callbacks=[{callback}]")
    assert not (tmp_path / "called").exists()
