"""The command line: which layer wins, what a mistake costs, which checkpoint is meant, what Python gets back."""

import contextlib
import io
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONFIGS, SMALL

from mnist_lit import ConvNet, main

Fails = Callable[..., str]
Fit = Callable[..., Any]
Capsys = pytest.CaptureFixture[str]

LEVELS = ["default", "checkpoint", "environment", "config", "flag"]  # the strongest last
WEIGHT_DECAY = "model.optimizer.init_args.weight_decay"
# Each key with its value at each level.
KEYS: dict[str, list[Any]] = {
    "model.lr": [0.001, 0.03, 0.3, 0.5, 0.7],
    "data.batch_size": [128, 64, 65, 66, 67],
    "data.augment.crop": [0, 1, 2, 3, 4],
    "trainer.max_epochs": [10, 1, 2, 3, 4],
    "early_stopping.patience": [5, 6, 7, 8, 9],
    "seed_everything": [42, 43, 44, 45, 46],
    "test_after_fit": [False, True, False, True, False],
    WEIGHT_DECAY: [None, 0.03, 0.3, 0.5, 0.7],
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the checkpoint's values of KEYS."""
    run_dir = tmp_path_factory.mktemp("source") / "run"
    flags = [f"--{key}={values[1]}" for key, values in KEYS.items()]
    main(["fit", *SMALL, "--model.optimizer=AdamW", *flags, f"--run_dir={run_dir}"])
    return run_dir


@pytest.fixture
def printed(capsys: Capsys) -> Callable[..., dict[str, Any]]:
    """`printed(*args)`: the configuration that a command line amounts to."""

    def run(*args: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as stop:
            main([*args, "--print_config"])
        assert stop.value.code == 0
        config = yaml.safe_load(capsys.readouterr().out)
        assert isinstance(config, dict)
        return config

    return run


def at(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value[name]
    return value


def write_config(path: Path, settings: dict[str, Any]) -> str:
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *groups, name = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    path.write_text(yaml.safe_dump(nested))
    return str(path)


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# Which layer wins


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(("weaker", "stronger"), list(combinations(LEVELS, 2)))
def test_stronger_level_wins(
    weaker: str,
    stronger: str,
    key: str,
    printed: Callable[..., dict[str, Any]],
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = ["fit"]
    for level in (weaker, stronger):
        value = KEYS[key][LEVELS.index(level)]
        settings = {key: value}
        if key == WEIGHT_DECAY and (level == weaker or weaker == "default"):
            # The class itself is given once, at the weaker level.
            settings = {"model.optimizer.class_path": "torch.optim.AdamW", key: value}
        if level == "checkpoint":
            args.append(f"--ckpt_path={run_dir}")
        elif level == "environment":
            for name, setting in settings.items():
                monkeypatch.setenv(f"MNIST_LIT_{name.replace('.', '__').upper()}", str(setting))
        elif level == "config":
            args.append(f"--config={write_config(tmp_path / 'config.yaml', settings)}")
        elif level == "flag":
            args += [f"--{name}={setting}" for name, setting in settings.items()]

    config = printed(*args)

    assert at(config, key) == KEYS[key][LEVELS.index(stronger)]


@pytest.mark.parametrize("key", [key for key in KEYS if key != WEIGHT_DECAY])
def test_default_holds_where_nothing_else_does(key: str, printed: Callable[..., dict[str, Any]]) -> None:
    assert at(printed("fit"), key) == KEYS[key][0]


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_flag_beats_the_checkpoint_for_every_command(
    command: str, printed: Callable[..., dict[str, Any]], run_dir: Path
) -> None:
    config = printed(command, f"--ckpt_path={run_dir}", "--data.eval_batch_size=77")

    assert config["data"]["eval_batch_size"] == 77
    assert config["data"]["batch_size"] == 64


@pytest.mark.parametrize("config_flag", ["--config", "-c"])
def test_flag_wins_also_when_it_stands_before_the_config(
    config_flag: str, printed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    file = write_config(tmp_path / "config.yaml", {"model.lr": 0.5})

    assert printed("fit", "--model.lr=0.7", config_flag, file)["model"]["lr"] == 0.7


def test_later_config_wins_key_by_key(printed: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    first = write_config(tmp_path / "1.yaml", {"model.lr": 0.1, "model.dropout": 0.1, "data.augment.crop": 1})
    second = write_config(tmp_path / "2.yaml", {"model.lr": 0.2, "data.augment.rotation": 2})

    config = printed("fit", "--config", first, "--config", second)

    assert config["model"]["lr"] == 0.2
    assert config["model"]["dropout"] == 0.1
    assert config["data"]["augment"]["crop"] == 1
    assert config["data"]["augment"]["rotation"] == 2


def test_later_config_changes_one_argument_of_a_class(printed: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    overlay = write_config(tmp_path / "overlay.yaml", {WEIGHT_DECAY: 0.5})

    optimizer = printed("fit", f"--config={CONFIGS / 'base.yaml'}", "--config", overlay)["model"]["optimizer"]

    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert optimizer["init_args"]["weight_decay"] == 0.5
    assert optimizer["init_args"]["fused"] is True


def test_printed_configuration_amounts_to_itself(printed: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    config = printed("fit", f"--config={CONFIGS / 'base.yaml'}", "--model.schedule.pct_start=0.4")
    tmp_path.joinpath("printed.yaml").write_text(yaml.safe_dump(config))

    assert printed("fit", "--config=printed.yaml") == config


def test_printing_the_configuration_writes_nothing(printed: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    printed("fit", f"--config={CONFIGS / 'base.yaml'}")

    assert files(tmp_path) == set()


# The environment


@pytest.mark.parametrize(
    ("variables", "lr"),
    [
        ({"MNIST_LIT_MODEL__LR": "0.3"}, 0.3),
        ({"MNIST_LIT_FIT__MODEL__LR": "0.3"}, 0.3),
        ({"MNIST_LIT_TEST__MODEL__LR": "0.3"}, 0.001),
        ({"MNIST_LIT_MODEL__LR": "0.3", "MNIST_LIT_FIT__MODEL__LR": "0.4"}, 0.4),
        ({"MNIST_LIT_MODEL": "{lr: 0.3}"}, 0.3),
    ],
    ids=["for all", "for fit", "for another", "both", "mapping"],
)
def test_environment_sets_a_key(
    variables: dict[str, str],
    lr: float,
    printed: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    assert printed("fit")["model"]["lr"] == lr


def test_command_of_its_own_wins_in_the_environment_for_every_key(
    printed: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("DATA__BATCH_SIZE", "SEED_EVERYTHING"):  # one sorts before FIT, one after it
        monkeypatch.setenv(f"MNIST_LIT_{key}", "3")
        monkeypatch.setenv(f"MNIST_LIT_FIT__{key}", "4")

    config = printed("fit")

    assert (config["data"]["batch_size"], config["seed_everything"]) == (4, 4)


def test_environment_names_a_config_below_those_of_the_command_line(
    printed: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_LIT_CONFIG", write_config(tmp_path / "1.yaml", {"model.lr": 0.1, "model.dropout": 0.1}))
    monkeypatch.setenv("MNIST_LIT_MODEL__DROPOUT", "0.9")
    config = printed("fit", "--config", write_config(tmp_path / "2.yaml", {"model.lr": 0.2}))

    assert config["model"]["lr"] == 0.2
    assert config["model"]["dropout"] == 0.1


def test_mnist_lit_data_is_the_default_data_dir(
    printed: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_LIT_DATA", "from_variable")

    assert printed("fit")["data"]["data_dir"] == "from_variable"
    file = write_config(tmp_path / "config.yaml", {"data.data_dir": "from_config"})
    assert printed("fit", "--config", file)["data"]["data_dir"] == "from_config"


def test_key_of_the_data_dir_beats_mnist_lit_data(
    printed: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIST_LIT_DATA", "from_variable")
    monkeypatch.setenv("MNIST_LIT_DATA__DATA_DIR", "from_key")

    assert printed("fit")["data"]["data_dir"] == "from_key"


@pytest.mark.parametrize(
    ("variable", "value", "parts"),
    [
        ("MNIST_LIT_MODEL__CHANELS", "[4]", ["there is no such key", "did you mean model.channels"]),
        ("MNIST_LIT_FIT__MODEL__CHANELS", "[4]", ["there is no such key", "did you mean model.channels"]),
        ("MNIST_LIT_XYZZY", "1", ["there is no such key", "--help"]),
        ("MNIST_LIT_MODEL__LR", "abc", ["model.lr: must be a number, got abc"]),
        ("MNIST_LIT_MODEL__LR", "-1", ["model.lr: must be >0, got -1"]),
    ],
)
def test_mistake_in_the_environment_names_the_variable(
    variable: str, value: str, parts: list[str], monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    monkeypatch.setenv(variable, value)

    error = fails("fit")

    assert error.startswith(f"error: {variable}: ")
    assert all(part in error for part in parts), error


@pytest.mark.parametrize("name", ["DeviceStatsMonitor", "RichProgressBar", "Timer"])
def test_callbacks_of_lightning_are_printed_with_their_defaults(name: str, printed: Callable[..., Any]) -> None:
    assert printed("fit", f"--trainer.callbacks+={name}")["trainer"]["callbacks"][0]["class_path"].endswith(name)


# Mistakes

DIGITS = ["--data.dataset=digits", "--data.val_size=200"]
SGD = "--model.optimizer=SGD"
# Flags, how the error begins, and what else is in it.
MISTAKES: list[tuple[list[str], str, str]] = [
    # no such key
    (["--model.chanels=[4]"], "--model.chanels: there is no such key", "did you mean model.channels"),
    (["--model.chanels", "[4]"], "--model.chanels: there is no such key", "did you mean model.channels"),
    (["--data.augment.rotatoin=5"], "--data.augment.rotatoin: there is", "did you mean data.augment.rotation"),
    (["--data.augment={rotatoin: 5}"], "data.augment.rotatoin: there is", "did you mean data.augment.rotation"),
    (["--checkpoint={monitr: x}"], "checkpoint.monitr: there is no such key", "did you mean checkpoint.monitor"),
    (["--trainer.max_epoch=3"], "--trainer.max_epoch: there is no such key", "did you mean trainer.max_epochs"),
    (["--modle.lr=3"], "--modle.lr: there is no such key", "did you mean model.lr"),
    (["--lr=3"], "--lr: there is no such key", "did you mean model.lr?"),
    (["--max_epochs=3"], "--max_epochs: there is no such key", "did you mean trainer.max_epochs?"),
    (["--patience=3"], "--patience: there is no such key", "did you mean early_stopping.patience?"),
    (["--zzz=3"], "--zzz: there is no such key", "all keys: python -m mnist_lit fit --help"),
    # abbreviated, incomplete, stray
    (["--model.drop=0.5"], "--model.drop: there is no such key", "did you mean model.dropout"),
    (["--test_after=true"], "--test_after: there is no such key", "did you mean test_after_fit"),
    (["--model.lr"], "--model.lr: needs a value", ""),
    (["--model.lr", "--data.batch_size=3"], "--model.lr: needs a value", ""),
    (["--ckpt_path"], "--ckpt_path: needs a value", ""),
    (["stray"], "stray: there is no such key", ""),
    (["--model.channels", "[4,", "8]"], "--model.channels: must be of type list, got [4,", ""),
    # classes and their arguments
    (["--model.optimizer=AdmaW"], "--model.optimizer: there is no class AdmaW", "did you mean AdamW"),
    (["--model.optimizer=torch.optim.AdmaW"], "--model.optimizer: there is no AdmaW in torch.optim", "AdamW"),
    (["--model.optimizer=nowhere.AdamW"], "--model.optimizer: there is no module nowhere", ""),
    (["--model.schedule=OneCycelLR"], "--model.schedule: there is no class OneCycelLR", "did you mean OneCycleLR"),
    (["--trainer.callbacks=EarlyStoping"], "--trainer.callbacks: there is no class EarlyStoping", "EarlyStopping"),
    (["--model.optimizer=torch.nn.Linear"], "--model.optimizer: torch.nn.Linear is no Optimizer", ""),
    (["--model.schedule=torch.optim.SGD"], "--model.schedule: torch.optim.SGD is no LRScheduler", ""),
    ([SGD, "--model.optimizer.momentun=0.9"], "--model.optimizer.momentun: there is no argument", "mean momentum"),
    (
        [SGD, "--model.optimizer.init_args.momentun=0.9"],
        "--model.optimizer.init_args.momentun: there is no argument momentun",
        "did you mean momentum",
    ),
    (["--model.optimizer.momentum=0.9"], "--model.optimizer.momentum: there is no", "give model.optimizer a class"),
    ([SGD, "--model.optimizer.momentum=abc"], "--model.optimizer.momentum: must be of type float", "got abc"),
    ([SGD, "--model.optimizer.lr=0.1"], "--model.optimizer.lr: there is no argument lr", "taken from model.lr"),
    (["--model.schedule=StepLR"], "--model.schedule: needs the argument step_size", ""),
    (
        ["--model.schedule=OneCycleLR", "--model.schedule.total_steps=9"],
        "--model.schedule.total_steps: there is no argument total_steps",
        "it is filled in: the number of steps of the run",
    ),
    # wrong type
    (["--model.lr=abc"], "--model.lr: must be a number, got abc", ""),
    (["--model={lr: abc}"], "model.lr: must be a number, got abc", ""),
    (["--model.kernel_size=1.5"], "--model.kernel_size: must be a whole number, got 1.5", ""),
    (["--model.channels=16"], "--model.channels: must be of type list, got 16", ""),
    (["--model.channels=[a]"], "--model.channels: must be a whole number, got a", ""),
    (["--model.compile=perhaps"], "--model.compile: must be of type bool, got perhaps", ""),
    (["--data.mirrors=3"], "--data.mirrors: must be of type list", "got 3"),
    (["--trainer.max_epochs=two"], "--trainer.max_epochs: must be of type int", "got two"),
    (["--seed_everything=abc"], "--seed_everything: must be of type", "got abc"),
    (["--csv=perhaps"], "--csv: must be of type bool, got perhaps", ""),
    (["--early_stopping=yes"], "--early_stopping: takes keys below it", ""),
    # misspelt choice
    (["--model.pooling=mxa"], "--model.pooling: must be one of max, avg, none, got mxa", "did you mean max?"),
    (["--model.global_pool=av"], "--model.global_pool: must be one of none, avg, max", "did you mean avg?"),
    (["--model.norm=btach"], "--model.norm: must be one of batch, layer, none, got btach", "did you mean batch?"),
    (["--model.activation=rleu"], "--model.activation: must be one of relu, gelu, silu", "did you mean relu"),
    (["--data.dataset=digit"], "--data.dataset: must be one of mnist, fashion_mnist, kmnist", "mean digits?"),
    (["--checkpoint.mode=mxa"], "--checkpoint.mode: must be one of min, max, got mxa", "did you mean max?"),
    (["--early_stopping.mode=mni"], "--early_stopping.mode: must be one of min, max", "did you mean min?"),
    (["--trainer.precision=17"], "--trainer.precision: must be one of ", "got 17"),
    # impossible together
    ([*DIGITS, "--model.channels=[1,1,1,1,1]"], "5 stages in model.channels leave a 0x0 map", "at most 4 stages"),
    ([*DIGITS, "--data.image_size=5"], "3 stages in model.channels leave a 0x0 map", "data.image_size"),
    ([*DIGITS, "--model.channels=[]"], "the network is empty", "model.hidden"),
    (["--data.dataset=digits"], "data.val_size 5000 leaves none of the 1437 images", "for example --data.val_size"),
    (["--data.val_size=60000"], "data.val_size 60000 leaves none of the 60000 images", ""),
    ([*DIGITS, "--data.resident=true", "--data.num_workers=2"], "data.resident and data.num_workers exclude", ""),
    (["--model.image_size=20"], 'Linked "model.image_size" must be given via "data.image_size"', ""),
    # the trainer's
    ([*DIGITS, "--trainer.limit_train_batches=7.5"], "--trainer.limit_train_batches: ", "7.5"),
    ([*DIGITS, "--trainer.accelerator=gpuu"], "--trainer.accelerator: ", "gpuu"),
    ([*DIGITS, "--trainer.strategy=dpp"], "--trainer.strategy: ", "dpp"),
    ([*DIGITS, "--trainer.strategy=ddp_spawn"], "trainer.strategy: processes that begin as copies", "use ddp"),
    ([*DIGITS, "--trainer.devices=0"], "--trainer.devices: ", ""),
    ([*DIGITS, "--trainer.max_epochs=-5"], "--trainer.max_epochs: ", "-5"),
    ([*DIGITS, "--trainer.max_epochs=-5", "--run_dir=some/where/new"], "--trainer.max_epochs: ", "-5"),
]


@pytest.mark.parametrize(("flags", "start", "part"), MISTAKES, ids=[" ".join(flags) for flags, *_ in MISTAKES])
def test_mistake_on_the_command_line(flags: list[str], start: str, part: str, tmp_path: Path, fails: Fails) -> None:
    error = fails("fit", *flags)

    assert error.startswith(f"error: {start}")
    assert part in error
    assert files(tmp_path) == set()


# Keys with a range, and a value just outside of it.
OUT_OF_RANGE = {
    "model.channels": "[0]",
    "model.hidden": "[-1]",
    "model.kernel_size": "0",
    "model.convs_per_stage": "0",
    "model.dropout": "1.1",
    "model.label_smoothing": "-0.1",
    "model.unpadded_stages": "-1",
    "model.lr": "0",
    "model.tta_shift": "15",
    "data.batch_size": "0",
    "data.eval_batch_size": "0",
    "data.val_size": "-1",
    "data.image_size": "0",
    "data.augment.rotation": "181",
    "data.augment.translation": "1.1",
    "data.augment.scale": "1",
    "data.augment.shear": "46",
    "data.augment.aspect": "1",
    "data.augment.stroke": "1.1",
    "data.augment.crop": "15",
    "data.augment.erasing": "1.1",
    "data.num_workers": "-1",
    "data.timeout": "0",
    "early_stopping.patience": "0",
    "early_stopping.min_delta": "-0.1",
    "ema.decay": "1.1",
    "ema.every_n_steps": "0",
    "pictures.num_images": "0",
    "pictures.every_n_epochs": "-1",
}


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE.items())
def test_value_out_of_range_on_the_command_line(key: str, value: str, tmp_path: Path, fails: Fails) -> None:
    error = fails("fit", f"--{key}={value}")

    assert re.fullmatch(rf"error: --{re.escape(key)}: must be [<>].*, got {value.strip('[]')}\n", error)
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("content", "place", "part"),
    [
        ("model:\n  lr: 0.1\n  chanels: [4]\n", "line 3: model.chanels: there is no such key", "mean model.channels"),
        ("# top\nmodle: {lr: 1}\n", "line 2: modle.lr: there is no such key", "did you mean model.lr"),
        ("data:\n  augment:\n    rotatoin: 5\n", "line 3: data.augment.rotatoin: there is no", "augment.rotation"),
        ("data:\n  batch_size: 0\n", "line 2: data.batch_size: must be >0, got 0", ""),
        ("model:\n  lr: fast\n", "line 2: model.lr: must be a number, got fast", ""),
        ("model:\n  pooling: mxa\n", "line 2: model.pooling: must be one of", "did you mean max?"),
        ("model:\n  optimizer:\n    class_path: AdmaW\n", "line 2: model.optimizer: there is no class", "AdamW"),
        (
            "model:\n  optimizer:\n    class_path: SGD\n    init_args:\n      momentun: 0.9\n",
            "line 5: model.optimizer.init_args.momentun: there is no argument momentun",
            "did you mean momentum",
        ),
        (
            "model:\n  optimizer:\n    class_path: SGD\n    init_args: {lr: 0.9}\n",
            "line 4: model.optimizer.init_args.lr: there is no argument lr",
            "it is taken from model.lr",
        ),
        (
            "model:\n  schedule:\n    class_path: OneCycleLR\n    init_args: {total_steps: 9}\n",
            "line 4: model.schedule.init_args.total_steps: there is no argument total_steps",
            "it is filled in",
        ),
        (
            "data: {dataset: digits, val_size: 200}\ntrainer:\n  limit_train_batches: 7.5\n",
            "line 3: trainer.limit_train_batches: ",
            "7.5",
        ),
    ],
)
def test_mistake_in_a_config_names_file_and_line(
    content: str, place: str, part: str, tmp_path: Path, fails: Fails
) -> None:
    tmp_path.joinpath("mine.yaml").write_text(content)

    error = fails("fit", f"--config={CONFIGS / 'base.yaml'}", "--config=mine.yaml")

    assert error.startswith(f"error: mine.yaml, {place}")
    assert part in error
    assert files(tmp_path) == {tmp_path / "mine.yaml"}


@pytest.mark.parametrize("is_file", [True, False])
def test_run_dir_that_is_not_empty_is_left_alone(is_file: bool, tmp_path: Path, fails: Fails) -> None:
    occupied = tmp_path / "mine"
    if not is_file:
        occupied.mkdir()
    (occupied if is_file else occupied / "thesis.txt").write_text("years of work")
    before = files(tmp_path)

    error = fails("fit", *SMALL, "--run_dir=mine")

    assert error.startswith("error: run_dir: mine")
    assert "give another --run_dir" in error
    assert files(tmp_path) == before


def test_empty_run_dir_outlives_a_mistake(tmp_path: Path, fails: Fails) -> None:
    tmp_path.joinpath("mine").mkdir()

    fails("fit", *DIGITS, "--trainer.max_epochs=-5", "--run_dir=mine")

    assert files(tmp_path) == {tmp_path / "mine"}


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_evaluation_needs_a_checkpoint(command: str, tmp_path: Path, fails: Fails) -> None:
    error = fails(command, *DIGITS)

    assert error == f"error: {command} needs a checkpoint\ngive --ckpt_path: a run directory, a file or a URL\n"
    assert files(tmp_path) == set()


class Opener:
    """An object whose unpickling leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("executed", "w")


def bad_checkpoints(folder: Path, checkpoint: Path) -> None:
    folder.joinpath("config.ckpt").write_text("model:\n  lr: 0.1\n")
    folder.joinpath("empty.ckpt").write_bytes(b"")
    folder.joinpath("damaged.ckpt").write_bytes(checkpoint.read_bytes()[:3000])
    folder.joinpath("no_run").mkdir()
    torch.save({"weights": torch.ones(3)}, folder / "weights.ckpt")
    torch.save([1, 2], folder / "list.ckpt")
    torch.save({**torch.load(checkpoint, weights_only=True), "extra": Opener()}, folder / "pickled.ckpt")


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("config.ckpt", "config.ckpt is no checkpoint of mnist_lit: it is damaged or something else"),
        ("empty.ckpt", "empty.ckpt is no checkpoint of mnist_lit: it is damaged or something else"),
        ("damaged.ckpt", "damaged.ckpt is no checkpoint of mnist_lit: it is damaged or something else"),
        ("weights.ckpt", "weights.ckpt is no checkpoint of mnist_lit: it has no state_dict"),
        ("list.ckpt", "list.ckpt is no checkpoint of mnist_lit: it has no state_dict"),
        ("pickled.ckpt", "pickled.ckpt is no checkpoint of mnist_lit: it holds more than plain data: io.open"),
        ("no_run", "no_run holds no checkpoint"),
    ],
)
def test_bad_checkpoint_is_refused_and_never_executed(
    name: str, reason: str, command: str, run_dir: Path, tmp_path: Path, fails: Fails
) -> None:
    bad_checkpoints(tmp_path, run_dir / "checkpoints" / "best.ckpt")
    before = files(tmp_path)

    error = fails(command, f"--ckpt_path={name}")

    assert error.startswith(f"error: ckpt_path: {reason}\n")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("args", "difference"),
    [
        (["test", "--model.channels=[8]"], "model.channels is [4] in the checkpoint, [8] here"),
        (["fit", "--model.channels=[8]"], "model.channels is [4] in the checkpoint, [8] here"),
        (["predict", "--model.hidden=[3]"], "model.hidden is [] in the checkpoint, [3] here"),
        (["validate", "--model.norm=none"], "model.norm is batch in the checkpoint, none here"),
    ],
)
@pytest.mark.parametrize("path", ["", "checkpoints/last.ckpt"], ids=["run", "file"])
def test_checkpoint_of_another_network_says_what_differs(
    args: list[str], difference: str, path: str, run_dir: Path, tmp_path: Path, fails: Fails
) -> None:
    before = files(run_dir)

    error = fails(*args, f"--ckpt_path={run_dir / path}")

    assert error == f"error: ckpt_path: the checkpoint is of another network\n{difference}\n"
    assert files(run_dir) == before
    assert files(tmp_path) == set()


# Help


@pytest.fixture(scope="module")
def options() -> dict[str, str]:
    """Each key of `fit --help` with its text."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--help"])
    assert stop.value.code == 0
    text = output.getvalue().partition("\noptions:\n")[2]
    text = re.sub(r"\nLinked arguments:.*?(?=\n\n|\Z)", "", text, flags=re.DOTALL)
    entries = re.split(r"^  (?:-\w[^,]*, )?--(?=\w)", text, flags=re.MULTILINE)[1:]
    helps = {}
    for entry in entries:
        header, text = re.split(r"\n\s+|  +", entry, maxsplit=1)
        name = header.split()[0]
        # The mappings themselves, and the parser's own help on classes, are no keys.
        if not header.endswith(" CONFIG") and not name.endswith(".help"):
            helps[name] = " ".join(text.split())
    return helps


def said(text: str) -> str:
    """An option's help without its type and its default."""
    return text.partition("(type: ")[0]


OURS = ("model.", "data.", "checkpoint.", "early_stopping.", "ema.", "pictures.")
SWITCHES = ("run_dir", "test_after_fit", "csv", "report")


def test_help_has_every_key(options: dict[str, str], printed: Callable[..., dict[str, Any]]) -> None:
    def leaves(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for name, value in config.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield prefix + name

    keys = set(leaves(printed("fit")))

    assert len([key for key in keys if key.startswith(OURS)]) > 40
    assert keys <= set(options)


def test_help_says_what_each_of_our_options_is_for(options: dict[str, str]) -> None:
    ours = {key: text for key, text in options.items() if key.startswith(OURS) or key in SWITCHES}

    assert set(SWITCHES) < set(ours)
    is_sentence = re.compile(r"[A-Z]\S*( \S+){2,}\. ")
    assert [key for key, text in ours.items() if not is_sentence.fullmatch(said(text))] == []


def test_help_gives_type_and_default_of_each_of_our_options(options: dict[str, str]) -> None:
    ours = {key: text for key, text in options.items() if key.startswith(OURS) or key in SWITCHES}

    assert [key for key, text in ours.items() if not re.search(r"\(type: .+, default: .+\)", text)] == []


def test_help_of_each_number_names_its_range_or_unit(options: dict[str, str]) -> None:
    is_number = re.compile(r"type: (\w*(Positive|NonNegative|ClosedUnit|_ge0_)\w*|float|int)\b")
    numbers = {key: said(text) for key, text in options.items() if key.startswith(OURS) and is_number.search(text)}

    assert set(numbers) == set(OUT_OF_RANGE) - {"model.channels", "model.hidden"}
    range_or_unit = re.compile(r"\d to (below )?\d|above 0|\d or more|pixels|Convolutions")
    assert [key for key, text in numbers.items() if not range_or_unit.search(text)] == []


# Checkpoints


@pytest.fixture
def copied_run(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, which a test may change."""
    return Path(shutil.copytree(run_dir, tmp_path / "copied"))


@pytest.fixture
def served(run_dir: Path) -> Iterator[str]:
    """The address of the finished run's directory."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(run_dir)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_test_of_a_run_needs_nothing_else_and_uses_its_best_checkpoint(copied_run: Path, capsys: Capsys) -> None:
    copied_run.joinpath("checkpoints", "last.ckpt").write_text("not this one")

    cli = main(["test", f"--ckpt_path={copied_run}"])

    assert cli.datamodule.dataset == "digits"
    assert cli.model.hparams["channels"] == [4]
    assert 0.3 < float(cli.trainer.callback_metrics["test/acc"]) <= 1
    assert capsys.readouterr().out.splitlines()[-1] == str(copied_run)


def test_fit_of_a_run_goes_on_from_its_last_checkpoint_in_its_directory(copied_run: Path, capsys: Capsys) -> None:
    copied_run.joinpath("checkpoints", "best.ckpt").unlink()
    steps = torch.load(copied_run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]

    cli = main(["fit", f"--ckpt_path={copied_run}", "--trainer.max_epochs=3", "--test_after_fit=false"])

    assert steps > 0
    assert cli.trainer.global_step == 3 * steps
    assert cli.trainer.current_epoch == 3
    assert capsys.readouterr().out.splitlines()[-1] == str(copied_run)
    assert torch.load(copied_run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3 * steps


def test_run_with_a_one_cycle_goes_on_for_longer(fit: Fit) -> None:
    first = fit("--model.schedule=OneCycleLR", "--trainer.max_epochs=1", "--run_dir=run")

    cli = main(["fit", "--ckpt_path=run", "--trainer.max_epochs=3"])

    assert cli.trainer.global_step == 3 * first.trainer.global_step
    assert cli.trainer.lr_scheduler_configs[0].scheduler.state_dict()["total_steps"] == cli.trainer.global_step


def test_finished_run_has_nothing_left_to_do(copied_run: Path) -> None:
    steps = torch.load(copied_run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]

    cli = main(["fit", f"--ckpt_path={copied_run}"])

    assert cli.trainer.global_step == steps


def test_fit_from_a_checkpoint_file_is_a_new_run(run_dir: Path, tmp_path: Path) -> None:
    before = files(run_dir)
    file = run_dir / "checkpoints" / "last.ckpt"
    steps = torch.load(file, weights_only=True)["global_step"]

    cli = main(["fit", f"--ckpt_path={file}", "--trainer.max_epochs=2"])

    assert cli.trainer.global_step == 2 * steps
    assert (tmp_path / "logs" / "run_1" / "checkpoints" / "last.ckpt").is_file()
    assert files(run_dir) == before


def test_checkpoint_file_of_a_run_is_tested_in_its_run(copied_run: Path, capsys: Capsys, tmp_path: Path) -> None:
    main(["test", f"--ckpt_path={copied_run / 'checkpoints' / 'last.ckpt'}"])

    assert capsys.readouterr().out.splitlines()[-1] == str(copied_run)
    assert not (tmp_path / "logs").exists()


def test_checkpoint_may_be_a_url(served: str, run_dir: Path, capsys: Capsys) -> None:
    cli = main(["test", f"--ckpt_path={served}/checkpoints/best.ckpt"])

    expected = torch.load(run_dir / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in cli.model.state_dict().items())
    assert cli.datamodule.dataset == "digits"
    assert capsys.readouterr().out.splitlines()[-1] == str(Path("logs/run_1"))


def test_missing_url_is_one_error(served: str, tmp_path: Path, fails: Fails) -> None:
    url = f"{served}/checkpoints/bset.ckpt"

    error = fails("test", f"--ckpt_path={url}", code=1)

    assert error.startswith(f"error: ckpt_path: {url} cannot be downloaded: HTTP Error 404")
    assert error.count("error: ") == 1
    assert files(tmp_path) == set()


def test_checkpoint_with_a_key_of_another_version_works_without_it(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(run_dir / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["squeeze"] = 3
    checkpoint["config"]["model"]["squeeze"] = 3
    checkpoint["config"]["data"]["augment"]["blur"] = 0.1
    checkpoint["config"]["telemetry"] = {"enabled": True}
    torch.save(checkpoint, tmp_path / "old.ckpt")

    cli = main(["test", "--ckpt_path=old.ckpt"])

    notes = [line for line in capsys.readouterr().err.splitlines() if line.endswith("is left out")]
    names = {note.removeprefix("note: ").partition(" ")[0] for note in notes}
    assert names == {"model.squeeze", "data.augment.blur", "telemetry"}
    assert 0.3 < float(cli.trainer.callback_metrics["test/acc"]) <= 1


def test_checkpoint_without_a_config_is_read_by_its_hyper_parameters(run_dir: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(run_dir / "checkpoints" / "best.ckpt", weights_only=True)
    del checkpoint["config"]
    torch.save(checkpoint, tmp_path / "plain.ckpt")

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is left out")
        cli = main(["test", "--ckpt_path=plain.ckpt", *DIGITS])

    assert cli.model.hparams["channels"] == [4]
    assert 0.3 < float(cli.trainer.callback_metrics["test/acc"]) <= 1


# Python


def test_fit_returns_its_trainer_model_and_data(fit: Fit) -> None:
    cli = fit()

    assert cli.trainer.current_epoch == 2
    assert isinstance(cli.model, ConvNet)
    assert len(cli.datamodule.splits["val"]) == 200


@pytest.mark.parametrize("test_after_fit", ["true", "false"])
def test_callback_metrics_hold_the_best_accuracy_after_fit(test_after_fit: str, fit: Fit) -> None:
    metrics = fit(f"--test_after_fit={test_after_fit}").trainer.callback_metrics

    assert metrics["val/acc"] <= metrics["val/acc_best"]
    assert 0.3 < float(metrics["val/acc_best"]) <= 1
    assert ("test/acc" in metrics) == (test_after_fit == "true")


def test_best_checkpoint_needs_nothing_else(fit: Fit) -> None:
    cli = fit("--trainer.max_epochs=1", "--trainer.precision=32-true")
    images = torch.rand(5, 1, 28, 28)
    cli.model.cpu().eval()

    model = ConvNet.load_from_checkpoint(cli.trainer.checkpoint_callback.best_model_path).eval()

    with torch.inference_mode():
        assert torch.equal(model(images), cli.model(images))


def test_runs_are_numbered_and_named_on_the_last_line(fit: Fit, capsys: Capsys, tmp_path: Path) -> None:
    last_lines = []
    for _ in range(2):
        fit("--trainer.max_epochs=1")
        last_lines.append(capsys.readouterr().out.splitlines()[-1])

    assert last_lines == ["logs/run_1", "logs/run_2"]
    assert {path.name for path in tmp_path.joinpath("logs").iterdir()} == {"run_1", "run_2"}


def test_run_dir_is_named_by_its_flag(fit: Fit, capsys: Capsys, tmp_path: Path) -> None:
    fit("--trainer.max_epochs=1", "--run_dir=some/where")

    assert capsys.readouterr().out.splitlines()[-1] == "some/where"
    assert (tmp_path / "some" / "where" / "config.yaml").is_file()
    assert not (tmp_path / "logs").exists()
