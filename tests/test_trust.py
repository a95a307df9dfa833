"""What comes from elsewhere: checkpoints, configs, run directories and downloads that want to do harm."""

import contextlib
import copy
import os
import pickle
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL
from test_bad_input import contents

from mnist_lit import ConvNet, main
from mnist_lit.errors import UsageError
from mnist_lit.search import main as search

Fails = Callable[..., str]
INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
DIGITS = ["--data.dataset=digits", "--data.val_size=200"]


class Call:
    """An object whose unpickling runs a command that leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
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


@pytest.fixture
def refused(tmp_path: Path, fails: Fails) -> Fails:
    """As `fails`, of a command that must leave the working folder as it was."""

    def run(*args: str, code: int = 2) -> str:
        before = contents(tmp_path)
        error = fails(*args, code=code)
        assert contents(tmp_path) == before
        return error

    return run


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
    "tar": lambda good: tar(pickle.dumps(Call())),
    "pickle": lambda good: pickle.dumps(Call()),
    "pickle of protocol 0": lambda good: pickle.dumps(Call(), protocol=0),
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
@pytest.mark.usefixtures("pickled")
def test_pickled_code_is_refused_in_python(path: str, weights_only: bool | None, served: str, tmp_path: Path) -> None:
    before = contents(tmp_path)

    with pytest.raises(UsageError, match=r"posix\.system"):
        ConvNet.load_from_checkpoint(path.format(url=served), weights_only=weights_only)

    assert contents(tmp_path) == before


@pytest.mark.usefixtures("pickled")
def test_pickled_code_is_refused_by_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"ckpt_path": "run/checkpoints/best.ckpt", "data": {"dataset": "digits", "val_size": 200}}
    tmp_path.joinpath("base.yaml").write_text(yaml.safe_dump(config))

    with pytest.raises(SystemExit) as stop:
        search(["--space={model.lr: {choices: [0.1]}}", "--configs=[base.yaml]", "--n_trials=1"])

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
    assert "Timer" not in {type(callback).__name__ for callback in cli.trainer.callbacks}
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
        "its weights are sparse, quan",
    ),
    "complex": (lambda weight: weight.to(torch.complex64), "quantised, complex"),
    "without values": (lambda weight: weight.to("meta"), "larger than what is stored of it"),
    "other size": (lambda weight: weight[:1], "of another network"),
    "other shape": (lambda weight: weight.flatten(), "of another network"),
    "huge": (lambda weight: torch.zeros(1).expand(10**9, 10**9), "larger than what is stored of it"),
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
    "too small": (lambda old: torch.zeros(1), "optimizer_states are of another network", 1),
    "too large": (lambda old: torch.zeros(*old.shape, 2), "optimizer_states are of another network", 1),
    "of one value": (lambda old: torch.zeros(1).expand(old.shape), "larger than what is stored of it", 2),
    "none": (lambda old: None, "", 1),
    "text": (lambda old: "x", "", 1),
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
