"""Bad input of every kind: a short error that names it, and a folder that is as it was."""

import contextlib
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONFIGS, SMALL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mnist_lit import main
from mnist_lit.data.datasets import load
from mnist_lit.data.image_files import find_files, read_photographs
from mnist_lit.errors import MNISTLitError

Fails = Callable[..., str]
HUGE = "99999999999999999999"


def contents(folder: Path) -> dict[Path, bytes]:
    """Every entry below a folder; of files, what is in them."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path: Path, fails: Fails) -> Fails:
    """As `fails`, of a command that must leave the working folder as it was."""

    def run(*args: str, code: int = 2) -> str:
        before = contents(tmp_path)
        error = fails(*args, code=code)
        assert contents(tmp_path) == before
        assert "Traceback" not in error
        return error

    return run


@pytest.fixture
def search_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """As `refused`, of a search."""

    def run(*args: str) -> str:
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as stop:
            main(["search", *args])
        error = capsys.readouterr().err
        assert (stop.value.code, contents(tmp_path)) == (2, before), error
        assert error.startswith("error: ")
        assert len(error.splitlines()) <= 5, error
        return error

    return run


# Configs


def nested(depth: int) -> str:
    return "model: " + "{a: " * depth + "1" + "}" * depth


def bomb(levels: int) -> str:
    """A few lines that stand for 9^levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


CONFIG_TEXTS: list[tuple[str | bytes, str]] = [
    # keys given twice
    ("model: {lr: 0.1}\nmodel: {lr: 0.2}", "line 2: model: is given already in line 1"),
    ("model:\n  lr: 0.1\n  lr: 0.2", "line 3: model.lr: is given already in line 2"),
    (
        "data:\n  augment:\n    crop: 1\n    scale: 0\n    crop: 2",
        "line 5: data.augment.crop: is given already in line 3",
    ),
    ("trainer:\n  callbacks:\n  - class_path: A\n    class_path: B", "line 4: trainer.callbacks.class_path: is given"),
    ('seed_everything: 1\n"seed_everything": 2', "line 2: seed_everything: is given already"),
    ("{model: {}, data: {}, model: {}}", "line 1: model: is given already"),
    # aliases
    (bomb(9), "more than 10,000 values"),
    (bomb(30), "more than 10,000 values"),
    ("model: &m\n  lr: *m", "more than 10,000 values"),
    ("&m\nmodel: *m", "more than 10,000 values"),
    ("model: *nowhere", "undefined alias 'nowhere'"),
    ("model:\n  <<: 3", "expected a mapping"),
    ("a: &a {lr: 0.1}\nmodel:\n  <<: *a", "line 1: a.lr: there is no such key"),
    # no YAML, or another one
    ("model: {lr: 1}\n---\nmodel: {}", "found another document"),
    ("%YAML 3.0\n---\nmodel: {}", "incompatible YAML"),
    ("!thing\nmodel: {}", "constructor for the tag '!thing'"),
    ("model: !!python/name:os.system", "could not determine a constructor"),
    ("model: !!python/object/apply:os.system [touch executed]", "could not determine a constructor"),
    ("model: &a &b {}", "found '<anchor>'"),
    ("[model]\nlr = 0.1", "no valid YAML"),
    ("model.lr = 0.1", "holds no keys"),
    ("<html><body>404</body></html>", "holds no keys"),
    ("---", "holds no keys"),
    ("-", "holds no keys"),
    ("? [model]\n: 1", "unhashable key"),
    ("model: {lr: 1}\n".encode("utf-16"), "cannot be read: 'utf-8' codec"),
    (b"mod\xe8le: 1", "cannot be read: 'utf-8' codec"),
    (b"model: {pooling: a\x07}", "special characters are not allowed"),
    ("# " + "x" * 1_000_000, "more than 1,000,000 bytes"),
    ("model: {channels: [" + "1," * 10_000 + "]}", "more than 10,000 values"),
    ("model: {lr: !!float x}", "could not convert string to float: 'x'"),
    ("model: {kernel_size: !!int x}", "invalid literal for int()"),
    ("model: {kernel_size: " + "9" * 5000 + "}", "cannot be read: Exceeds the limit"),
    ("model: {pooling: !!timestamp 99}", "cannot be read"),
    # keys that are none
    ("3: 4", "bad.yaml: Key must be a string, got: 3"),
    ("yes: 4", "bad.yaml: Key must be a string, got: True"),
    ("null: 4", "bad.yaml: Key must be a string, got: None"),
    ("model: {3: 4}", "bad.yaml: Key must be a string, got: 3"),
    ('"": 4', "Empty nested key"),
    ('" model": {}', "Spaces not allowed in keys"),
    ("fit: {model: {lr: 0.1}}", "line 1: fit.model.lr: there is no such key"),
    ("lr: 0.1", "line 1: lr: there is no such key"),
    ("model: {batch_size: 3}", "did you mean data.batch_size"),
    ("help: true", "line 1: help: there is no such key"),
    ("subcommand: fit", "line 1: subcommand: there is no such key"),
    ("x" * 100 + ": 1", "there is no such key"),
    ("? " + "x" * 100_000 + "\n: 1", "there is no such key"),
    (nested(200), "there is no such key"),
    # nothing where something has to be
    ("model:", "line 1: model: takes keys below it"),
    ("model: null\nseed_everything: 1", "line 1: model: takes keys below it"),
    ("trainer: null", "line 1: trainer: takes keys below it"),
    ("checkpoint: null", "line 1: checkpoint: takes keys below it"),
    ("data: {augment: null}", "line 1: data.augment: takes keys below it"),
    ("data:\n  batch_size: null", "line 2: data.batch_size: must be a whole number, got null"),
    ("data: {dataset: null}", "data.dataset: must be one of"),
    ("data: {timeout: null}", "data.timeout: "),
    ("data: {download: null}", "data.download: must be of type bool"),
    ("data: {augment: {crop: null}}", "data.augment.crop: must be a whole number"),
    ("model: {lr: null}", "model.lr: "),
    ("model: {channels: null}", "model.channels: must be of type list"),
    ("model: {channels: [null]}", "model.channels: must be a whole number"),
    ("model: {compile: null}", "model.compile: must be of type bool"),
    ("model: {norm: null}", "model.norm: must be one of"),
    ("early_stopping: {patience: null}", "early_stopping.patience: "),
    ("report: null", "report: must be of type bool"),
    ('ckpt_path: ""', "ckpt_path: is empty"),
    ('run_dir: ""', "line 1: run_dir: must be a folder"),
    # wrong types
    ("model: 3", "line 1: model: takes keys below it"),
    ("model: [lr]", "line 1: model: "),
    ("checkpoint: true", "line 1: checkpoint: takes keys below it"),
    ("early_stopping: []", "line 1: early_stopping: takes keys below it"),
    ("data: {augment: 3}", "line 1: data.augment: takes keys below it"),
    ("data: {augment: strong}", "line 1: data.augment: takes keys below it"),
    ("model: {lr: yes}", "model.lr: must be"),
    ("model: {lr: [0.1]}", "model.lr: "),
    ("model: {lr: {value: 0.1}}", "model.lr: "),
    ("model: {lr: 2024-01-01}", "model.lr: must be a number"),
    ("model: {lr: !!binary aGVsbG8=}", "model.lr: "),
    ("model: {lr: !!set {a}}", "model.lr: "),
    ("model: {channels: {1: 2}}", "model.channels: must be of type list"),
    ("model: {channels: [[1]]}", "model.channels: must be a whole number"),
    ("model: {channels: [true]}", "model.channels: must be a whole number"),
    ("model: {compile: 3}", "model.compile: must be of type bool"),
    ("data: {dataset: [mnist]}", "data.dataset: must be one of"),
    ("data: {dataset: MNIST}", "data.dataset: must be one of"),
    ("run_dir: [a]", "run_dir: must be of type str"),
    ("run_dir: true", "run_dir: must be of type str"),
    ("ckpt_path: {a: 1}", "ckpt_path: {'a': 1} does not exist"),
    ("ckpt_path: false", "ckpt_path: False does not exist"),
    ("seed_everything: [1]", "seed_everything: must be of type"),
    ("trainer: {max_epochs: 1.5}", "trainer.max_epochs: must be of type int"),
    ("model: {pooling: " + "x" * 100_000 + "}", "model.pooling: must be one of"),
    ('model: {pooling: "\\e[31mred"}', "got \\x1b[31mred"),
    ('model: {pooling: "a\\nb\\nc\\nd\\ne\\nf\\ng"}', "model.pooling: must be one of"),
    # numbers that are none
    ("model: {lr: .inf}", "line 1: model.lr: must be a finite number"),
    ("model: {lr: .nan}", "line 1: model.lr: must be >0, got nan"),
    ("model: {dropout: .nan}", "model.dropout: must be"),
    ("data: {augment: {rotation: .nan}}", "data.augment.rotation: must be"),
    ("data: {augment: {scale: -.inf}}", "data.augment.scale: must be"),
    ("model: {channels: [.inf]}", "model.channels: must be a whole number"),
    ("trainer: {max_epochs: .inf}", "trainer.max_epochs: must be of type int"),
    ("trainer: {gradient_clip_val: .nan}", "trainer.gradient_clip_val: must be a finite number"),
    ("model: {optimizer: {class_path: SGD, init_args: {momentum: .nan}}}", "momentum: must be a finite number"),
    ("model: {optimizer: {class_path: AdamW, init_args: {weight_decay: .inf}}}", "weight_decay: must be a finite"),
    ("model: {optimizer: {class_path: AdamW, init_args: {betas: [0.9, .nan]}}}", "betas: must be a finite"),
    # classes that are none
    ("model: {optimizer: 3}", "model.optimizer: "),
    ("model: {optimizer: []}", "model.optimizer: "),
    ("model: {optimizer: {}}", "model.optimizer: needs"),
    ("model: {optimizer: {class_path: null}}", "model.optimizer: "),
    ("model: {optimizer: {class_path: [SGD]}}", "model.optimizer: "),
    ("model: {optimizer: {class_path: SGD, init_args: 3}}", "model.optimizer: "),
    ("model: {optimizer: {class_path: SGD, init_args: [1]}}", "model.optimizer: "),
    ("trainer: {callbacks: 3}", "trainer.callbacks: "),
    ("trainer: {callbacks: [3]}", "trainer.callbacks: "),
    ("trainer: {callbacks: [{class_path: SGD}]}", "trainer.callbacks: there is no class SGD"),
]


def name(text: str | bytes) -> str:
    return ascii(text)[:50]


@pytest.mark.parametrize(("text", "part"), CONFIG_TEXTS, ids=[name(text) for text, _ in CONFIG_TEXTS])
def test_bad_config(text: str | bytes, part: str, tmp_path: Path, refused: Fails) -> None:
    tmp_path.joinpath("bad.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())

    assert part in refused("fit", "--config=bad.yaml")


def odd_files(folder: Path) -> None:
    """What a name may stand for but a file of text."""
    os.mkfifo(folder / "pipe")
    folder.joinpath("loop").symlink_to("loop")
    folder.joinpath("dangling").symlink_to("nowhere")
    folder.joinpath("folder").mkdir()
    folder.joinpath("link").symlink_to("folder")


CONFIG_PATHS = [
    ("pipe", "a pipe or a device"),
    ("/dev/zero", "a pipe or a device"),
    ("/dev/null", "a pipe or a device"),
    ("folder", "a directory"),
    ("link", "a directory"),
    ("loop", "symbolic links"),
    ("dangling", "does not exist"),
    ("x" * 300, "File name too long"),
    ("a\0b", "null"),
    ("-", "does not exist"),
    ("https://localhost/base.yaml", "does not exist"),
    ("{model: {lr: 1}}", "does not exist"),
    ("", "needs the path"),
]


@pytest.mark.parametrize(("path", "part"), CONFIG_PATHS, ids=[ascii(path)[:30] for path, _ in CONFIG_PATHS])
@pytest.mark.parametrize("command", ["fit", "search"])
def test_config_that_is_no_file(
    command: str, path: str, part: str, tmp_path: Path, refused: Fails, search_refused: Fails
) -> None:
    odd_files(tmp_path)

    error = search_refused(f"--config={path}") if command == "search" else refused(command, f"--config={path}")

    assert part in error


# Flags

BOMB = f"[{', '.join(line.partition(': ')[2] for line in bomb(9).splitlines())}]"

FLAGS = [
    # aliases
    (f"--model.channels={BOMB}", "--model.channels: with its aliases written out, it holds more than 10,000 values"),
    (f"--trainer.callbacks={BOMB}", "more than 10,000 values"),
    (f"--run_dir={BOMB}", "more than 10,000 values"),
    (f"--data.predict_paths={BOMB}", "more than 10,000 values"),
    ("--model.optimizer=&a {class_path: *a}", "more than 10,000 values"),
    # nothing where something has to be
    ("--ckpt_path=", "ckpt_path: is empty"),
    ("--run_dir=", "--run_dir: must be a folder"),
    ("--data=", "--data: "),
    ("--model=", "--model: "),
    ("--model.optimizer=", "--model.optimizer: "),
    ("--model.optimizer.class_path=", "model.optimizer"),
    ("--data.batch_size=", "--data.batch_size: must be a whole number"),
    ("--data.batch_size=null", "--data.batch_size: must be a whole number"),
    ("--trainer=null", "--trainer: takes keys below it"),
    # numbers that are none, or no use
    ("--model.lr=inf", "--model.lr: must be a finite number"),
    ("--model.lr=1e999", "--model.lr: must be a finite number"),
    ("--model.lr=-inf", "--model.lr: must be >0"),
    ("--model.lr=nan", "--model.lr: must be >0"),
    ("--model.lr=.inf", "--model.lr: must be a number"),
    ("--model.lr=0x10", "--model.lr: must be a number"),
    ("--model.lr=1,5", "--model.lr: must be a number"),
    ("--model.lr=true", "--model.lr: must be a number"),
    ("--model.lr=[0.1]", "--model.lr: "),
    ("--data.timeout=inf", "--data.timeout: must be a finite number"),
    ("--early_stopping.min_delta=inf", "--early_stopping.min_delta: must be a finite number"),
    ("--data.augment.rotation=nan", "--data.augment.rotation: must be"),
    ("--data.augment.scale=inf", "--data.augment.scale: must be"),
    ("--ema.decay=nan", "--ema.decay: must be"),
    ("--trainer.gradient_clip_val=.nan", "--trainer.gradient_clip_val: must be a finite number"),
    ("--model.channels=[1e5000]", "--model.channels: must be a whole number"),
    (f"--model.channels=[{HUGE}]", "--model.channels: must be a finite number below 2^63"),
    (f"--model.kernel_size={HUGE}", "--model.kernel_size: must be a finite number below 2^63"),
    (f"--data.batch_size={HUGE}", "--data.batch_size: must be a finite number below 2^63"),
    (f"--data.eval_batch_size={HUGE}", "--data.eval_batch_size: must be a finite number below 2^63"),
    (f"--data.image_size={HUGE}", "--data.image_size: must be a finite number below 2^63"),
    (f"--trainer.devices={HUGE}", "trainer: cannot fit"),
    (f"--num_threads={HUGE}", "--num_threads: must be >=1 and <=1024"),
    ("--num_threads=1000000", "--num_threads: must be >=1 and <=1024"),
    (f"--seed_everything={HUGE}", "--seed_everything: must be >=0 and <2^32"),
    ("--seed_everything=-1", "--seed_everything: must be >=0 and <2^32"),
    ("--data.num_workers=1e3", "--data.num_workers: must be a whole number"),
    # what Lightning refuses late or never
    ("--trainer.accumulate_grad_batches=0", "--trainer.accumulate_grad_batches: must be >0"),
    ("--trainer.accumulate_grad_batches=-1", "--trainer.accumulate_grad_batches: must be >0"),
    ("--trainer.check_val_every_n_epoch=0", "--trainer.check_val_every_n_epoch: must be >0"),
    ("--trainer.check_val_every_n_epoch=-1", "--trainer.check_val_every_n_epoch: must be >0"),
    ("--trainer.val_check_interval=0", "--trainer.val_check_interval: must be >0"),
    ("--trainer.val_check_interval=-0.5", "--trainer.val_check_interval: must be >0"),
    ("--trainer.limit_val_batches=nan", "--trainer.limit_val_batches: must be of type"),
    ("--trainer.limit_train_batches=-1", "--trainer.limit_train_batches: "),
    ("--trainer.overfit_batches=2.5", "--trainer.overfit_batches: "),
    ("--trainer.max_time=abc", "--trainer.max_time: "),
    ("--trainer.max_steps=-7", "--trainer.max_steps: "),
    ("--trainer.devices=abc", "--trainer.devices: "),
    ("--trainer.devices=[9]", "--trainer.devices: "),
    ("--trainer.num_nodes=0", "--trainer.num_nodes: "),
    ("--trainer.profiler=nope", "--trainer.profiler: "),
    ("--trainer.fast_dev_run=-3", "--trainer.fast_dev_run: "),
    ("--trainer.gradient_clip_algorithm=nope", "--trainer.gradient_clip_algorithm: "),
    ("--trainer.reload_dataloaders_every_n_epochs=-1", "--trainer.reload_dataloaders_every_n_epochs: "),
    ("--trainer.barebones=true", "--trainer.barebones: "),
    # classes that are none
    ("--model.optimizer=os.system", "--model.optimizer: "),
    ("--model.optimizer=builtins.eval", "--model.optimizer: "),
    ("--model.optimizer=torch.optim", "--model.optimizer: "),
    ("--model.optimizer=.", "--model.optimizer: "),
    ("--model.optimizer=3", "--model.optimizer: there is no class 3"),
    ("--model.optimizer=[]", "--model.optimizer: "),
    ("--model.optimizer={}", "--model.optimizer: "),
    ("--model.optimizer=torch.optim.Optimizer", "--model.optimizer: "),
    ("--model.schedule=LambdaLR", "--model.schedule: needs the argument lr_lambda"),
    ("--trainer.callbacks=[{class_path: torch.nn.Linear}]", "--trainer.callbacks: "),
    ("--trainer.logger=nope", "--trainer.logger: there is no class nope"),
    ("--trainer.plugins=nope", "--trainer.plugins: there is no class nope"),
    # no keys
    ("--model.=3", "there is no such key"),
    ("--model..lr=3", "there is no such key"),
    ("--model.lr.x=3", "--model.lr: "),
    ("--model.channels.0=3", "--model.channels: "),
    ("--=3", "there is no such key"),
    ("--", "there is no such key"),
    ("-", "there is no such key"),
    ("-x", "there is no such key"),
    ("--help=3", "--help: "),
    ("--print_config=nope", "print_config"),
    ("--print_shtab=bash", "there is no such key"),
    ("--" + "x" * 100_000 + "=1", "there is no such key"),
    ("--model.pooling=" + "x" * 100_000, "--model.pooling: must be one of"),
    # places that cannot be
    ("--run_dir=/dev/null", "run_dir: /dev/null"),
    ("--run_dir=/dev/null/run", "run_dir: /dev/null"),
    ("--run_dir=" + "x" * 300, "File name too long"),
    ("--run_dir=pipe", "run_dir: pipe"),
    ("--run_dir=loop", "run_dir: loop"),
    ("--ckpt_path=pipe", "ckpt_path: 'pipe'"),
    ("--ckpt_path=loop", "ckpt_path: 'loop' does not exist"),
    ("--ckpt_path=/dev/zero", "ckpt_path: '/dev/zero'"),
    ("--ckpt_path=folder", "ckpt_path: folder holds no checkpoint"),
    ("--ckpt_path=" + "x" * 300, "does not exist"),
    ("--" + "x" * 300 + "=3", "there is no such key"),
    ("--ckpt_path=ftp://localhost/a.ckpt", "ckpt_path: 'ftp://localhost/a.ckpt' does not exist"),
]


@pytest.mark.parametrize(("flag", "part"), FLAGS, ids=[ascii(flag)[:60] for flag, _ in FLAGS])
def test_bad_flag(flag: str, part: str, tmp_path: Path, refused: Fails) -> None:
    odd_files(tmp_path)

    assert part in refused("fit", *SMALL, flag)


# The environment

VARIABLES = [
    ("DATA__PREDICT_PATHS", BOMB, "data.predict_paths: with its aliases written out"),
    ("MODEL", "3", "takes keys below it"),
    ("MODEL", "", "model: "),
    ("MODEL__", "3", "there is no such key"),
    ("MODEL__LR", "", "must be a number"),
    ("MODEL__LR", "inf", "must be a finite number"),
    ("MODEL__LR", "nan", "must be >0"),
    ("FIT__MODEL__LR", "inf", "must be a finite number"),
    ("MODEL__OPTIMIZER", "os.system", "model.optimizer: "),
    ("DATA__BATCH_SIZE", "null", "must be a whole number"),
    ("DATA__BATCH_SIZE", HUGE, "must be a finite number below 2^63"),
    ("DATA__DATASET", "MNIST", "must be one of"),
    ("TRAINER__CALLBACKS", "[", "trainer.callbacks: "),
    ("SEED_EVERYTHING", "-1", "must be >=0 and <2^32"),
    ("CONFIG", "folder", "a directory"),
    ("CONFIG", "pipe", "a pipe or a device"),
    ("CKPT_PATH", "nowhere", "ckpt_path: 'nowhere' does not exist"),
    ("CKPT_PATH", "", "ckpt_path: is empty"),
    ("RUN_DIR", "", "run_dir: must be a folder"),
    ("DATA_", "x", "there is no such key"),
]


@pytest.mark.parametrize(("variable", "value", "part"), VARIABLES)
def test_bad_variable(
    variable: str, value: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Fails
) -> None:
    odd_files(tmp_path)
    monkeypatch.setenv(f"MNIST_LIT_{variable}", value)

    assert part in refused("fit")


# Searches

SPACE = "space: {model.lr: {low: 0.1, high: 0.2}}\n"
SEARCHES = [
    (SPACE + SPACE, "line 2: space: is given already in line 1"),
    (SPACE + "n_trials: 3\nn_trials: 4", "line 3: n_trials: is given already in line 2"),
    ("space:\n  model.lr: {choices: [1]}\n  model.lr: {choices: [2]}", "line 3: space.model.lr: is given already"),
    ("space: {model.lr: {low: 0.1, high: 0.2, low: 0.3}}", "space.model.lr.low: is given already"),
    (bomb(9), "more than 10,000 values"),
    ("space: &s\n  model.lr: *s", "more than 10,000 values"),
    (SPACE + "timeout: .nan", "timeout: must be >0"),
    (SPACE + "timeout: .inf", "timeout: must be finite"),
    (SPACE + "n_trials: .inf", "n_trials: must be a whole number"),
    (SPACE + "n_trials: [3]", "n_trials: must be"),
    (SPACE + "workers: -1", "workers: must be >0"),
    (SPACE + "study_name: ../there", "study_name: must be a name"),
    (SPACE + 'study_name: ""', "study_name: must be a name"),
    (SPACE + "configs: base.yaml", "configs: must be of type list"),
    (SPACE + "configs: null", "configs: must not be null"),
    (SPACE + "overrides: 3", "overrides: must be of type dict"),
    (SPACE + "sampler: os.system", "sampler: "),
    (SPACE + "sampler: {class_path: os.system, init_args: {command: touch executed}}", "os.system is not allowed"),
    (SPACE + "pruner: 3", "pruner: "),
    (SPACE + "confirm: 3", "confirm: "),
    (SPACE + "objective: null", "objective: must not be null"),
    (SPACE + "? [a]\n: 1", "unhashable key"),
    (SPACE + '"": 1', "there is no such key"),
    (SPACE + "study_name: " + "x" * 100_000, "study_name: "),
]


@pytest.mark.parametrize(("text", "part"), SEARCHES, ids=[ascii(text.removeprefix(SPACE))[:50] for text, _ in SEARCHES])
def test_bad_search(text: str, part: str, tmp_path: Path, search_refused: Fails) -> None:
    tmp_path.joinpath("bad.yaml").write_text(text)

    assert part in search_refused("--config=bad.yaml")


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a good one holds."""
    folder = tmp_path_factory.mktemp("source")
    main(["fit", *SMALL, "--trainer.max_epochs=1", f"--run_dir={folder / 'run'}"])
    content: dict[str, Any] = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    return content


CHECKPOINTS: list[tuple[str, dict[str, Any], str]] = [
    ("no state", {"state_dict": None}, "it has no state_dict"),
    ("list of states", {"state_dict": [1]}, "it has no state_dict"),
    ("states that are text", {"state_dict": {"network.0.weight": "heavy"}}, "it has no state_dict"),
    ("states that are numbers", {"state_dict": {"network.0.weight": 3}}, "it has no state_dict"),
    ("empty state", {"state_dict": {}}, "is of another network"),
    ("state of another", {"state_dict": {"a": torch.ones(3)}}, "is of another network"),
    ("text as config", {"config": "model"}, "its config holds no keys"),
    ("list as config", {"config": [1]}, "its config holds no keys"),
    ("model that is text", {"config": {"model": "x"}}, "model: takes keys below it"),
    ("no model", {"config": {"model": None}}, "model: takes keys below it"),
    ("no data", {"config": {"data": None}}, "data: takes keys below it"),
    ("data that is a number", {"config": {"data": 3}}, "data: takes keys below it"),
    ("negative lr", {"config": {"model": {"lr": -1}}}, "model.lr: must be >0"),
    ("infinite lr", {"config": {"model": {"lr": float("inf")}}}, "model.lr: must be a finite number"),
    ("no batch size", {"config": {"data": {"batch_size": None}}}, "data.batch_size: must be a whole number"),
    ("other class", {"config": {"model": {"optimizer": {"class_path": "os.system"}}}}, "model.optimizer is os.system"),
]


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(("change", "part"), [row[1:] for row in CHECKPOINTS], ids=[row[0] for row in CHECKPOINTS])
def test_bad_checkpoint(
    change: dict[str, Any], part: str, command: str, checkpoint: dict[str, Any], tmp_path: Path, refused: Fails
) -> None:
    torch.save({**checkpoint, **change}, tmp_path / "bad.ckpt")

    assert part in refused(command, "--ckpt_path=bad.ckpt", "--data.dataset=digits", "--data.val_size=200")


RUN_CONFIGS = [
    ("", "holds no keys"),
    ("3", "holds no keys"),
    ("model: [", "line 1, column 9"),
    ("model: {}\nmodel: {}", "line 2: model: is given already"),
    ("model: null", "model: takes keys below it"),
    ("model: [1]", "model: takes keys below it"),
    ("model: {lr: -1}", "model.lr: must be >0"),
    ("data: {batch_size: null}", "data.batch_size: must be a whole number"),
    (bomb(9), "more than 10,000 values"),
]


@pytest.mark.parametrize(("text", "part"), RUN_CONFIGS, ids=[name(text) for text, _ in RUN_CONFIGS])
def test_bad_config_of_a_run_that_has_not_begun(text: str, part: str, tmp_path: Path, refused: Fails) -> None:
    tmp_path.joinpath("run").mkdir()
    tmp_path.joinpath("run", "config.yaml").write_text(text)

    assert part in refused("fit", "--ckpt_path=run")


# Files of data

LABELS = "t10k-labels-idx1-ubyte"
NUM_TEST = 10_000


def idx(shape: tuple[int, ...], *, magic: int = 0x0801, body: bytes = bytes(NUM_TEST)) -> bytes:
    return struct.pack(f">I{len(shape)}I", magic, *shape) + body


DATA_FILES = [
    ("empty", b""),
    ("one byte", b"\0"),
    ("header alone", idx((NUM_TEST,), body=b"")),
    ("wrong magic", idx((NUM_TEST,), magic=0x0802)),
    ("magic of floats", idx((NUM_TEST,), magic=0x0D01)),
    ("little-endian", struct.pack("<II", 0x0801, NUM_TEST) + bytes(NUM_TEST)),
    ("count too small", idx((NUM_TEST - 1,))),
    ("count too large", idx((2**32 - 1,))),
    ("two dimensions", idx((NUM_TEST, 1), magic=0x0802)),
    ("one label short", idx((NUM_TEST,), body=bytes(NUM_TEST - 1))),
    ("one label over", idx((NUM_TEST,), body=bytes(NUM_TEST + 1))),
    ("label 10", idx((NUM_TEST,), body=bytes(NUM_TEST - 1) + b"\x0a")),
    ("label 255", idx((NUM_TEST,), body=b"\xff" * NUM_TEST)),
    ("page of a login", b"<html>Please log in</html>"),
    ("gzip without its ending", b"\x1f\x8b\x08\0" + bytes(100)),
]


@pytest.fixture
def labels(tmp_path: Path, checkpoint: dict[str, Any]) -> Path:
    """Where the labels of Fashion-MNIST belong, beside good images, and a checkpoint to test."""
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    with (raw / "t10k-images-idx3-ubyte").open("wb") as file:
        file.write(struct.pack(">4I", 0x0803, NUM_TEST, 28, 28))
        file.truncate(16 + NUM_TEST * 28 * 28)  # a hole, which costs nothing
    torch.save(checkpoint, tmp_path / "good.ckpt")
    return raw / LABELS


TEST = [
    "test",
    "--ckpt_path=good.ckpt",
    "--data.dataset=fashion_mnist",
    "--data.download=false",
    "--data.data_dir=data",
]


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("content", [row[1] for row in DATA_FILES], ids=[row[0] for row in DATA_FILES])
def test_bad_file_of_data(content: bytes, ending: str, labels: Path, refused: Fails) -> None:
    labels.with_name(LABELS + ending).write_bytes(content)

    assert f"missing or damaged in data/FashionMNIST/raw: {LABELS}\n" in refused(*TEST, code=1)


@pytest.mark.parametrize("kind", ["folder", "loop", "dangling", "pipe"])
def test_data_that_is_no_file(kind: str, labels: Path, tmp_path: Path, refused: Fails) -> None:
    odd_files(tmp_path)
    labels.symlink_to(tmp_path / kind)

    assert "data/FashionMNIST/raw" in refused(*TEST, code=1)


@pytest.mark.parametrize("folder", ["good.ckpt", "loop", "/dev/null", "x" * 300])
@pytest.mark.usefixtures("labels")
def test_data_dir_that_is_none(folder: str, tmp_path: Path, refused: Fails) -> None:
    odd_files(tmp_path)

    error = refused(*TEST, f"--data.data_dir={folder}", code=1)

    assert f"missing or damaged in {folder}/" in error or f"{folder}/FashionMNIST/raw cannot be used" in error


# Files of images


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG that says it has that size."""
    header = struct.pack(">II5B", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def picture(ending: str, mode: str = "L", size: tuple[int, int] = (40, 40), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, ending, **options)
    return file.getvalue()


ENTITY = '<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/hostname">]><svg xmlns="http://www.w3.org/2000/svg">&x;</svg>'
IMAGES: dict[str, bytes] = {
    "zero bytes": b"",
    "text": b"seven",
    "SVG with an entity": ENTITY.encode(),
    "page": b"<html><body>404</body></html>",
    "checkpoint": b"PK\x03\x04" + bytes(100),
    "program": b"\x7fELF" + bytes(100),
    "PNG of 65,000 x 65,000": png(65_000, 65_000),
    "PNG of 2^31 x 2^31": png(2**31 - 1, 2**31 - 1),
    "PNG of no size": png(0, 0),
    "PNG without pixels": png(40, 40),
    "PNG cut in its header": png(40, 40)[:20],
    "PNG cut in its pixels": picture("PNG")[:-30],
    "JPEG cut in its header": picture("JPEG")[:100],
    "GIF cut": picture("GIF")[:20],
    "TIFF cut": picture("TIFF")[:50],
    "TIFF of no size": picture("TIFF").replace(struct.pack("<HHII", 256, 4, 1, 40), struct.pack("<HHII", 256, 4, 1, 0)),
    "BMP of a negative size": picture("BMP")[:18] + struct.pack("<ii", -(2**31), -(2**31)) + picture("BMP")[26:],
    "BMP of a huge size": picture("BMP")[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + picture("BMP")[26:],
    "PPM of a huge size": b"P6 999999999 999999999 255\n",
    "EPS that runs something": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) (w) file\n",
    "WebP cut": picture("WEBP")[:30],
    "icon of nothing": b"\0\0\1\0\1\0" + bytes(20),
}
ODD_IMAGES: dict[str, bytes] = {
    "one pixel": picture("PNG", size=(1, 1)),
    "a line": picture("PNG", size=(1, 100_000)),
    "16 bits": picture("PNG", "I;16"),
    "CMYK": picture("JPEG", "CMYK"),
    "palette": picture("GIF", "P"),
    "one bit": picture("PNG", "1"),
    "transparent": picture("PNG", "LA"),
    "32 bits of floats": picture("TIFF", "F"),
    "animated": picture("GIF", save_all=True, append_images=[Image.new("L", (40, 40), 255)] * 3),
    "EXIF that is none": picture("JPEG", exif=b"Exif\0\0" + bytes(range(200))),
    "orientation that is none": picture(
        "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x63\0\0\0\0\0\0\0"
    ),
}


def predict(*paths: str) -> None:
    main(["predict", "--ckpt_path=good.ckpt", "--run_dir=out", f"--data.predict_paths={json.dumps(paths)}"])


@pytest.fixture
def _good(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    torch.save(checkpoint, tmp_path / "good.ckpt")


@pytest.mark.usefixtures("_good")
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_bad_images_are_named_and_skipped(ending: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = [f"{number}.{ending}" for number in range(len(IMAGES))]
    for file, content in zip(names, IMAGES.values(), strict=True):
        tmp_path.joinpath(file).write_bytes(content)

    with pytest.raises(SystemExit) as stop:
        predict(*names)

    printed = capfd.readouterr().err.splitlines()
    assert stop.value.code == 1
    assert [line.partition(": ")[2].partition(": ")[0] for line in printed[:-1]] == names, printed
    assert printed[-1] == f"error: {len(names)} of {len(names)} files cannot be read as images"
    assert (tmp_path / "out" / "predictions.csv").read_text().count("\n") == 1


@pytest.mark.usefixtures("_good")
def test_odd_images_are_read(tmp_path: Path) -> None:
    for number, content in enumerate(ODD_IMAGES.values()):
        tmp_path.joinpath(f"{number}.img").write_bytes(content)

    predict("*.img")

    assert (tmp_path / "out" / "predictions.csv").read_text().count("\n") == 1 + len(ODD_IMAGES)


@pytest.mark.usefixtures("_good")
@pytest.mark.parametrize("path", ["loop", "dangling", "folder", "link", "a\0b", "x" * 300])
def test_paths_of_images_that_lead_nowhere_are_one_error(path: str, tmp_path: Path, refused: Fails) -> None:
    odd_files(tmp_path)

    error = refused("predict", "--ckpt_path=good.ckpt", f"--data.predict_paths=[{json.dumps(path)}]")

    assert error.startswith("error: data.predict_paths: ")


@pytest.mark.usefixtures("_good")
@pytest.mark.parametrize("path", ["pipe", "/dev/zero", "/dev/null"])
def test_pipes_and_devices_are_not_read_as_images(path: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    odd_files(tmp_path)

    with pytest.raises(SystemExit) as stop:
        predict(path)

    assert stop.value.code == 1
    assert f"skipped: {path}: it is no file" in capfd.readouterr().err


# Anything

KEYS = ["model", "data", "trainer", "lr", "channels", "optimizer", "class_path", "init_args", "batch_size", "augment"]
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.dates() | st.binary()
KEY = st.sampled_from(KEYS) | st.text(max_size=9) | st.integers()
ANYTHING = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=3))


SHARED: Any = {
    "derandomize": True,
    "database": None,
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],  # all examples share a folder
}
# Where bytes are overwritten, with what, and where the file ends.
DAMAGE = st.tuples(st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=9)), max_size=5), st.floats(0, 1))


def damaged(content: bytes, damage: tuple[list[tuple[float, bytes]], float]) -> bytes:
    """A file's content with other bytes in some places, and, half of the time, cut off."""
    places, end = damage
    changed = bytearray(content)
    for place, other in places:
        start = round(place * len(content))
        changed[start : start + len(other)] = other
    return bytes(changed[: round(2 * end * len(content))])


def outcome(*args: str) -> tuple[int, str]:
    """The exit code and the errors of a command; 0 when it works."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main(list(args))
        except SystemExit as stop:
            return int(stop.code or 0), errors.getvalue()
        return 0, errors.getvalue()


def check_config(content: bytes, folder: Path) -> None:
    """It is a configuration or a short error."""
    file = folder / "any.yaml"
    file.write_bytes(content)

    code, errors = outcome("fit", f"--config={file}", "--print_config")

    assert code in (0, 2), errors
    assert len(errors.splitlines()) <= 5
    assert list(folder.iterdir()) == [file]


@given(config=st.dictionaries(KEY, ANYTHING, max_size=3))
@settings(max_examples=100, **SHARED)
def test_any_config_is_a_configuration_or_a_short_error(config: dict[Any, Any], tmp_path: Path) -> None:
    check_config(yaml.safe_dump(config, allow_unicode=True).encode(), tmp_path)


@given(content=st.binary(max_size=200))
@settings(max_examples=50, **SHARED)
def test_any_bytes_are_a_configuration_or_a_short_error(content: bytes, tmp_path: Path) -> None:
    check_config(content, tmp_path)


BASE = (CONFIGS / "base.yaml").read_bytes()


@given(damage=DAMAGE)
@settings(max_examples=50, **SHARED)
def test_any_damage_to_a_config_is_a_configuration_or_a_short_error(damage: Any, tmp_path: Path) -> None:
    check_config(damaged(BASE, damage), tmp_path)


def check_checkpoint(damage: Any, folder: Path, good: bytes, *command: str) -> None:
    """It works, or is a short error that leaves nothing behind."""
    file = folder / "any.ckpt"
    file.write_bytes(damaged(good, damage))

    code, errors = outcome(*command, f"--ckpt_path={file}", "--run_dir=out")

    assert code in (0, 1, 2), errors
    assert len(errors.splitlines()) <= 5, errors
    assert "Traceback" not in errors
    if code == 0:
        shutil.rmtree("out", ignore_errors=True)
    assert list(folder.iterdir()) == [file], errors


@pytest.fixture(scope="module")
def file_of_checkpoint(checkpoint: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


@given(damage=DAMAGE)
@settings(max_examples=40, **SHARED)
def test_any_damage_to_a_checkpoint_is_a_short_error(damage: Any, tmp_path: Path, file_of_checkpoint: bytes) -> None:
    check_checkpoint(damage, tmp_path, file_of_checkpoint, "test")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["test", "fit"])
@given(damage=DAMAGE)
@settings(max_examples=500, **SHARED)
def test_any_damage_to_a_checkpoint_is_a_short_error_for_long(
    command: str, damage: Any, tmp_path: Path, file_of_checkpoint: bytes
) -> None:
    check_checkpoint(damage, tmp_path, file_of_checkpoint, command, *["--trainer.max_epochs=2"] * (command == "fit"))


@given(damage=DAMAGE, kind=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]))
@settings(max_examples=100, **SHARED)
@pytest.mark.usefixtures("_good")
def test_any_damage_to_an_image_is_read_or_named(damage: Any, kind: str, tmp_path: Path) -> None:
    tmp_path.joinpath("any.img").write_bytes(damaged(picture(kind, size=(60, 60)), damage))

    (read,) = read_photographs(find_files(["any.img"]))

    assert (read.digit is None) or read.digit.shape == (28, 28)


@given(damage=DAMAGE)
@settings(max_examples=100, **SHARED)
def test_any_damage_to_a_file_of_labels_is_found_or_harmless(damage: Any, labels: Path) -> None:
    good = idx((NUM_TEST,), body=bytes(range(10)) * (NUM_TEST // 10))
    labels.write_bytes(damaged(good, damage))

    with contextlib.suppress(MNISTLitError):
        _, read = load("fashion_mnist", labels.parents[2], "test")
        assert read.bincount(minlength=10).shape == (10,)
        assert len(read) == NUM_TEST
