"""The command line: which layer wins, which checkpoint is meant, what help and Python offer."""

import re
import shutil
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONFIGS, SMALL
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from runs import metrics, read

from mnist_lit import ConvNet, main
from mnist_lit.data.datasets import DATASETS, DatasetInfo
from mnist_lit.data.mnist_files import Split

Fails = Callable[..., str]
Fit = Callable[..., Any]
Printed = Callable[..., dict[str, Any]]
Capsys = pytest.CaptureFixture[str]

DIGITS = ["--data.dataset=digits", "--data.val_size=200"]
ONE_EPOCH = "--trainer.max_epochs=1"
LEVELS = ["default", "checkpoint", "environment", "config", "flag"]  # the strongest last
OPTIMIZER = "model.optimizer.class_path"
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
    main(["fit", *SMALL, f"--{OPTIMIZER}=torch.optim.AdamW", *flags, f"--run_dir={run_dir}"])
    return run_dir


@pytest.fixture
def printed(capsys: Capsys) -> Printed:
    """`printed(*args)`: the value of each key in the configuration that a command line amounts to."""

    def run(*args: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as stop:
            main([*args, "--print_config"])
        assert stop.value.code == 0
        return dict(leaves(yaml.safe_load(capsys.readouterr().out)))

    return run


def leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def write_config(name: str, settings: dict[str, Any]) -> str:
    config = Namespace()  # type: ignore[no-untyped-call]
    for key, value in settings.items():
        config[key] = value
    Path(name).write_text(yaml.safe_dump(config.as_dict()))
    return f"--config={name}"


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# Which layer wins


@pytest.mark.parametrize(("weaker", "stronger"), list(combinations(LEVELS, 2)))
def test_stronger_level_wins(
    weaker: str, stronger: str, printed: Printed, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["fit"]
    for level in (weaker, stronger):
        settings = {key: values[LEVELS.index(level)] for key, values in KEYS.items()}
        if level == weaker or weaker == "default":  # the class of the optimizer is given only once
            settings = {OPTIMIZER: "torch.optim.AdamW", **settings}
        if level == "checkpoint":
            args.append(f"--ckpt_path={run_dir}")
        elif level == "environment":
            for key, value in settings.items():
                monkeypatch.setenv(f"MNIST_LIT_{key.replace('.', '__').upper()}", str(value))
        elif level == "config":
            args.append(write_config("config.yaml", settings))
        elif level == "flag":
            args += [f"--{key}={value}" for key, value in settings.items()]

    config = printed(*args)

    assert {key: config[key] for key in settings} == settings


def test_later_config_wins_key_by_key_and_a_flag_wherever_it_stands(printed: Printed) -> None:
    first = {"model.lr": 0.1, "model.dropout": 0.1, "data.augment.crop": 1}
    second = {"model.lr": 0.2, "data.augment.rotation": 2, WEIGHT_DECAY: 0.5}
    configs = [f"-c={CONFIGS / 'base.yaml'}", write_config("1.yaml", first), write_config("2.yaml", second)]
    config = printed("fit", "--model.lr=0.7", *configs)
    expected = first | second | {"model.lr": 0.7, OPTIMIZER: "torch.optim.AdamW"}
    assert {key: config[key] for key in expected} == expected


def test_printed_configuration_amounts_to_itself(printed: Printed, tmp_path: Path) -> None:
    config = printed("fit", f"--config={CONFIGS / 'base.yaml'}", "--trainer.callbacks+=Timer", "--ema.decay=0.9")
    assert files(tmp_path) == set()
    assert printed("fit", write_config("printed.yaml", config)) == config


# The environment


@pytest.mark.parametrize(
    ("variables", "lr"),
    [
        ({"TEST__MODEL__LR": "0.3"}, 0.001),
        ({"MODEL__LR": "0.3", "FIT__MODEL__LR": "0.4"}, 0.4),
        ({"MODEL": "{lr: 0.3}"}, 0.3),
    ],
)
def test_environment_sets_a_key(
    variables: dict[str, str], lr: float, printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"MNIST_LIT_{name}", value)
    assert printed("fit")["model.lr"] == lr


def test_environment_names_a_config_and_the_data_below_what_the_command_line_says(
    printed: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config("1.yaml", {"model.lr": 0.1, "model.dropout": 0.1})
    for key, value in {"CONFIG": "1.yaml", "MODEL__DROPOUT": "0.9", "DATA": "from_data"}.items():
        monkeypatch.setenv(f"MNIST_LIT_{key}", value)
    keys = ("model.lr", "model.dropout", "data.data_dir")
    config = printed("fit", write_config("2.yaml", {"model.lr": 0.2}))
    monkeypatch.setenv("MNIST_LIT_DATA__DATA_DIR", "from_key")
    again = printed("fit", write_config("3.yaml", {"model.lr": 0.3}))
    assert [config[key] for key in keys] == [0.2, 0.1, "from_data"]
    assert [again[key] for key in keys] == [0.3, 0.1, "from_key"]


def test_tilde_is_the_home_directory(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("MNIST_LIT_RUN_DIR", "~/run")
    cli = fit(write_config("a.yaml", {"data.data_dir": "~/data"}), "--data.predict_paths=[~/1.png]", ONE_EPOCH)
    again = main(["test", "--ckpt_path=~/run", "--report=false"])
    config = cli.config
    assert files(tmp_path / "me") > {tmp_path / "me" / "run"}
    assert (config.data.data_dir, config.data.predict_paths) == (f"{tmp_path}/me/data", [f"{tmp_path}/me/1.png"])
    assert again.run_dir == tmp_path / "me" / "run"


# Help


def test_help_has_every_key_with_its_purpose_type_and_default(
    printed: Printed, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = set(printed("fit"))
    ours = {key for key in keys if not key.startswith("trainer.") and key != "seed_everything"}
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    start, *entries = re.split(r"^  (?:-\w[^,]*, )?--(?=\w)", capsys.readouterr().out, flags=re.MULTILINE)
    parts = [re.split(r"\n\s+|  +", entry, maxsplit=1) for entry in entries]
    texts = {re.split("[ ,]", header)[0]: " ".join(text.split()) for header, text in parts}  # a comma from 3.13 on
    is_complete = re.compile(r"[A-Z]\S*( \S+){2,}\. \(type: .+, default: .+\).*")
    assert len(ours) > 40
    assert len(start.splitlines()) < 10  # argparse's usage has each key
    assert keys <= set(texts)
    assert [key for key in ours if not is_complete.fullmatch(texts[key])] == []


# Run directories


def test_run_dir_that_is_not_empty_is_left_alone(tmp_path: Path, fails: Fails) -> None:
    file = tmp_path / "mine" / "thesis.txt"
    file.parent.mkdir()
    file.write_text("years of work")
    fails("fit", *SMALL, "--run_dir=mine")
    fails("fit", *SMALL, "--run_dir=mine/thesis.txt")
    assert files(tmp_path) == {file, file.parent}
    assert file.read_text() == "years of work"


def test_runs_are_numbered_or_named_by_their_flag(fit: Fit, capsys: Capsys, tmp_path: Path) -> None:
    last_lines = []
    for flags in ([], [], ["--run_dir=some/where"]):
        fit(ONE_EPOCH, *flags)
        last_lines.append(capsys.readouterr().out.splitlines()[-1])
    assert last_lines == ["logs/run_1", "logs/run_2", "some/where"]
    assert all((tmp_path / run / "config.yaml").is_file() for run in last_lines)


def test_fast_dev_run_leaves_nothing(fit: Fit, tmp_path: Path) -> None:
    cli = fit("--trainer.fast_dev_run=true")
    assert cli.trainer.global_step == 1
    assert files(tmp_path) == set()


# Checkpoints


@pytest.fixture
def copied_run(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, which a test may change."""
    return Path(shutil.copytree(run_dir, tmp_path / "copied"))


def steps(run: Path) -> int:
    return int(read(run)["global_step"])


def test_evaluation_needs_a_checkpoint_and_one_of_this_network(run_dir: Path, tmp_path: Path, fails: Fails) -> None:
    for command in ("validate", "test", "predict", "export", "demo"):
        assert "--ckpt_path" in fails(command, *DIGITS)
    for command in ("fit", "test"):
        assert "model.channels" in fails(command, "--model.channels=[8]", f"--ckpt_path={run_dir}")
    assert files(tmp_path) == set()


def test_test_of_a_run_needs_nothing_else_and_uses_its_best_checkpoint(
    copied_run: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied_run.joinpath("checkpoints", "last.ckpt").write_text("not this one")
    for path in (copied_run, copied_run / "checkpoints" / "best.ckpt", "best.ckpt"):
        if path == "best.ckpt":
            monkeypatch.chdir(copied_run / "checkpoints")
        cli = main(["test", f"--ckpt_path={path}"])
        assert (cli.datamodule.dataset, cli.model.hparams["channels"]) == ("digits", [4])
        assert 0.3 < float(cli.trainer.callback_metrics["test/acc"]) <= 1
        assert capsys.readouterr().out.splitlines()[-1] == str(copied_run)


def test_fit_of_a_run_goes_on_from_its_last_checkpoint_in_its_directory(copied_run: Path, capsys: Capsys) -> None:
    copied_run.joinpath("checkpoints", "best.ckpt").unlink()
    before = steps(copied_run)
    args = [f"--ckpt_path={copied_run}", f"--run_dir={copied_run}/", "--trainer.max_epochs=2"]
    cli = main(["fit", *args, "--test_after_fit=false"])
    assert before > 0
    assert cli.trainer.global_step == steps(copied_run) == 2 * before
    assert capsys.readouterr().out.splitlines()[-1] == str(copied_run)
    assert main(["fit", f"--ckpt_path={copied_run}"]).trainer.global_step == 2 * before


@pytest.mark.parametrize("path", ["checkpoints/last.ckpt", ""])
def test_fit_from_a_checkpoint_into_another_directory_is_a_new_run(path: str, run_dir: Path) -> None:
    """It has a best epoch of its own, although that is worse than the one before, and its config repeats it."""
    before, file = files(run_dir), str(run_dir / "checkpoints" / "last.ckpt")
    args = [f"--ckpt_path={run_dir / path}", "--run_dir=new", "--trainer.max_epochs=2", "--model.lr=5"]
    cli = main(["fit", *args, "--test_after_fit=true"])
    assert cli.trainer.global_step == 2 * steps(run_dir)
    record = metrics(Path("new"))
    assert record["epoch"] == epoch("new/checkpoints/best.ckpt") == 1
    assert record["val/acc"] == record["val/acc_best"] == float(cli.trainer.callback_metrics["val/acc"])
    assert yaml.safe_load(Path("new/config.yaml").read_text())["ckpt_path"] == file
    assert files(run_dir) == before


def test_best_epoch_is_that_of_best_ckpt_also_for_nan_and_another_monitor(copied_run: Path) -> None:
    more = ["--trainer.max_epochs=3", "--checkpoint.monitor=val/own", "--checkpoint.mode=min", "--model.lr=5"]
    main(["fit", f"--ckpt_path={copied_run}", *more], callbacks=[Own()])
    assert metrics(copied_run)["epoch"] == epoch(copied_run / "checkpoints" / "best.ckpt") == 2


class Own(Callback):
    """Log not a number, then a number."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("val/own", float("nan") if trainer.current_epoch < 2 else 1.0)


def epoch(file: str | Path) -> int:
    return int(torch.load(file, weights_only=True)["epoch"])


@pytest.mark.parametrize(
    ("path", "flag"),
    [
        ("checkpoints/last.ckpt", "--csv=false"),
        ("", "--trainer.fast_dev_run=true"),
        ("", "--trainer.limit_test_batches=1"),
        ("", "--model.tta_distort=true"),
    ],
)
def test_results_of_another_checkpoint_or_measurement_are_not_those_of_the_run(
    path: str, flag: str, copied_run: Path
) -> None:
    before = metrics(copied_run), files(copied_run)
    main(["test", f"--ckpt_path={copied_run / path}", flag, "--data.eval_batch_size=50"])
    assert (metrics(copied_run), files(copied_run)) == before


@pytest.mark.parametrize("flag", ["--trainer.fast_dev_run=3", "--init_from=RUN"])
def test_what_begins_anew_does_not_go_on_with_a_run(flag: str, copied_run: Path, fails: Fails) -> None:
    before = {file: file.read_bytes() for file in copied_run.rglob("*.*")}
    error = fails("fit", f"--ckpt_path={copied_run}", flag.replace("RUN", str(copied_run)))
    assert flag.partition("=")[0] in error
    assert {file: file.read_bytes() for file in copied_run.rglob("*.*")} == before


@pytest.mark.parametrize("has_config", [True, False])
def test_checkpoint_of_another_version_works_without_the_keys_that_are_gone(
    has_config: bool, run_dir: Path, tmp_path: Path, capsys: Capsys
) -> None:
    checkpoint = read(run_dir, "best")
    config = checkpoint.pop("config")
    checkpoint["hyper_parameters"]["squeeze"] = config["model"]["squeeze"] = 3
    torch.save({**checkpoint, **({"config": config} if has_config else {})}, tmp_path / "old.ckpt")
    cli = main(["test", "--ckpt_path=old.ckpt", *DIGITS])
    assert "squeeze" in capsys.readouterr().err
    assert 0.3 < float(cli.trainer.callback_metrics["test/acc"]) <= 1


STATISTICS = ("network.mean", "network.std")  # of the training images


class Initial(Callback):
    """Keep the weights that training begins with."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}


def test_init_from_starts_a_new_run_with_the_weights_alone(run_dir: Path) -> None:
    initial, before = Initial(), files(run_dir)
    cli = main(["fit", f"--init_from={run_dir}", *DIGITS, ONE_EPOCH, "--pictures.enabled=false"], callbacks=[initial])
    best = read(run_dir, "best")["state_dict"]
    assert all(torch.equal(initial.weights[name], tensor) for name, tensor in best.items())
    assert (cli.run_dir, cli.trainer.current_epoch, cli.model.lr) == (Path("logs/run_1"), 1, 0.001)
    assert cli.model.hparams["channels"] == [4]
    assert yaml.safe_load((cli.run_dir / "config.yaml").read_text())["init_from"] == str(run_dir)
    assert files(run_dir) == before
    assert main(["fit", f"--ckpt_path={cli.run_dir}", "--trainer.max_epochs=2"]).trainer.current_epoch == 2
    assert main(["test", f"--ckpt_path={cli.run_dir}"]).run_dir == cli.run_dir


def test_init_from_has_a_new_head_for_other_classes(
    run_dir: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(data_dir: Path, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = DATASETS["digits"].load(data_dir, split)
        return images, labels // 2

    monkeypatch.setitem(DATASETS, "kmnist", DatasetInfo(class_names=tuple("abcde"), load=load))
    initial = Initial()

    cli = main(["fit", f"--init_from={run_dir}", *SMALL, "--data.dataset=kmnist"], callbacks=[initial])

    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    old = read(run_dir, "best")["state_dict"]
    same = [name for name, tensor in old.items() if initial.weights[name].shape == tensor.shape]
    assert cli.model.num_classes == 5
    assert len(notes) == 1
    assert all(name in notes[0] for name in old if name not in same)
    assert all(torch.equal(initial.weights[name], old[name]) for name in same if name not in STATISTICS)


def test_init_from_another_network_names_the_key(run_dir: Path, tmp_path: Path, fails: Fails) -> None:
    assert "model.channels" in fails("fit", *SMALL, f"--init_from={run_dir}", "--model.channels=[8]")
    assert "init_from" in fails("fit", *SMALL, "--init_from=nowhere")
    assert files(tmp_path) == set()


# Python


def test_fit_returns_its_trainer_model_and_data_and_best_checkpoint_needs_nothing_else(fit: Fit) -> None:
    images = torch.rand(5, 1, 28, 28)
    cli = fit("--test_after_fit=false", "--trainer.precision=32-true", "--trainer.max_epochs=1")
    metrics, best = cli.trainer.callback_metrics, cli.run_dir / "checkpoints" / "best.ckpt"
    assert (cli.trainer.current_epoch, len(cli.datamodule.splits["val"])) == (1, 200)
    assert 0.3 < float(metrics["val/acc_best"]) <= 1
    assert "test/acc" not in metrics
    for path in (cli.run_dir, best):
        assert torch.equal(ConvNet.load_from_checkpoint(path).eval()(images), cli.model.cpu().eval()(images))
