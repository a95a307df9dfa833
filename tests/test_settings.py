"""What a search is asked to do: every mistake is a short error before anything is imported that takes time."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CONFIGS

from mnist_lit.errors import UsageError
from mnist_lit.search.command import main
from mnist_lit.search.settings import parse, without_password

SPACE = "space: {model.lr: {low: 0.1, high: 0.2}}\n"


@pytest.fixture(autouse=True)
def _configs(tmp_path: Path) -> None:
    shutil.copytree(CONFIGS, tmp_path / "configs")


def error_of(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert error.startswith("error: ")
    assert len(error.splitlines()) <= 5, error
    assert not Path("logs").exists()
    return error


# What is refused


@pytest.mark.parametrize(
    ("flags", "start", "part"),
    [
        (["--n_trails=3"], "--n_trails: there is no such key", "did you mean n_trials"),
        (["--n_trials=0"], "--n_trials: must be >0, got 0", ""),
        (["--n_trials=1.5"], "--n_trials: must be a whole number, got 1.5", ""),
        (["--n_trials=null"], "--n_trials: must be a whole number, got null", ""),
        (["--n_trials"], "--n_trials: needs a value", ""),
        (["--timeout=-1"], "--timeout: must be >0, got -1", ""),
        (["--timeout=nan"], "--timeout: must be >0, got nan", ""),
        (["--timeout=abc"], "--timeout: must be a number, got abc", ""),
        (["--workers=-1"], "--workers: must be >0, got -1", ""),
        (["--keep_checkpoints=-1"], "--keep_checkpoints: must be >=0, got -1", ""),
        (["--study_name=a/b"], "--study_name: must be a name that a folder can have, got a/b", ""),
        (["--study_name=.."], "--study_name: must be a name that a folder can have, got ..", ""),
        (["--objective.metrik=x"], "--objective.metrik: there is no argument metrik", "did you mean metric"),
        (["--objective.direction=up"], "--objective.direction: must be one of maximize, minimize, got up", ""),
        (["--objective.value=bst"], "--objective.value: must be one of best, last, got bst", "did you mean best"),
        (["--objective.direction"], "--objective.direction: needs a value", ""),
        (["--objective.metric=null"], "objective.metric: must not be null", ""),
        (["--objective=3"], "--objective: takes keys below it, got 3", ""),
        (["--objective=[]"], "objective: needs a metric", ""),
        (["--confirm.tops=3"], "--confirm.tops: there is no argument tops", "did you mean top"),
        (["--confirm.top=0"], "--confirm.top: must be >0, got 0", ""),
        (["--pruner=Median"], "--pruner: there is no class Median", "did you mean MedianPruner"),
        (["--pruner=optuna.samplers.TPESampler"], "--pruner: optuna.samplers.TPESampler is no BasePruner", ""),
        (["--pruner.n_warmup_step=1"], "--pruner.n_warmup_step: there is no argument", "did you mean n_warmup_steps"),
        (["--pruner=PercentilePruner"], "--pruner: needs the argument percentile", ""),
        (["--pruner=PercentilePruner", "--pruner.percentile=200"], "--pruner: Percentile must be between", "200"),
        (["--sampler=optuna.samplers.TPESamplr"], "--sampler: there is no TPESamplr", "did you mean TPESampler"),
        (["--sampler=nope.TPESampler"], "--sampler: there is no module nope", ""),
        (["--sampler.seed=abc"], "--sampler.seed: must be of type int or null, got abc\n", ""),
        (["--configs=configs/base.yaml"], "--configs: must be of type list", ""),
        (["--overrides=3"], "--overrides: must be of type dict, got 3", ""),
        (["--space=3"], "--space: must be of type dict, got 3", ""),
        (["--space={}"], "space: there is nothing to search", "model.dropout"),
        (["--space.model.lr=3"], "space.model.lr: must be like", "got 3"),
        (["--overrides.model.lr={a"], "--overrides.model.lr: '{a' is no valid YAML", ""),
        (["--model.lr=3"], "--model.lr: there is no such key", "keys of fit go into overrides or space"),
        (["--fresh=1"], "--fresh: takes no value", ""),
        (["x"], "x: there is no such key", "--help"),
        (["--config"], "--config needs the path", ""),
        (["--config=configs"], "--config: configs cannot be read", ""),
        (["--config=configs/serach.yaml"], "--config: configs/serach.yaml does not exist", "configs/search.yaml"),
        (["--config=configs/base.yaml"], "configs/base.yaml, line 2: seed_everything: there is no such key", "fit"),
    ],
)
def test_wrong_flag(flags: list[str], start: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(["--config=configs/search.yaml", *flags], capsys)

    assert error.startswith(f"error: {start}")
    assert part in error


@pytest.mark.parametrize(
    ("text", "start", "part"),
    [
        ("", "--config: s.yaml holds no keys", ""),
        ("[]", "--config: s.yaml holds no keys", ""),
        ("space: [", "s.yaml, line 1", "no valid YAML"),
        ("space:\t{}", "s.yaml, line 1", "no valid YAML"),
        ("n_trials: 3", "space: there is nothing to search", ""),
        ("space: 3", "s.yaml, line 1: space: must be of type dict, got 3", ""),
        ("space:", "s.yaml, line 1: space: must not be null", ""),
        ("space: {model.lr: 3}", "space.model.lr: must be like", ""),
        (SPACE + "n_trails: 3", "s.yaml, line 2: n_trails: there is no such key", "did you mean n_trials"),
        (SPACE + "1: 3", "s.yaml, line 2: 1: there is no such key", ""),
        (SPACE + "config: a", "s.yaml, line 2: config: there is no such key", "did you mean configs"),
        (SPACE + "fresh: true", "s.yaml, line 2: fresh: there is no such key", ""),
        (SPACE + "n_trials: null", "s.yaml, line 2: n_trials: must not be null", ""),
        (SPACE + "n_trials: yes", "s.yaml, line 2: n_trials: must be a whole number, got True", ""),
        (SPACE + "workers: 1.5", "s.yaml, line 2: workers: must be a whole number, got 1.5", ""),
        (SPACE + "timeout: -3", "s.yaml, line 2: timeout: must be >0, got -3", ""),
        (SPACE + "study_name: 3", "s.yaml, line 2: study_name: must be of type str, got int", ""),
        (SPACE + "storage: {a: 1}", "s.yaml, line 2: storage: must be of type str or null", ""),
        (SPACE + "configs: [1]", "s.yaml, line 2: configs: must be of type str, got 1", ""),
        (SPACE + "overrides: [a]", "s.yaml, line 2: overrides: must be of type dict", ""),
        (SPACE + "overrides: {1: 2}", "overrides: 1 is no key", ""),
        (SPACE + "overrides: {run_dir: a}", "overrides.run_dir: a search decides on run_dir itself", ""),
        (SPACE + "overrides: {model: {lr: 3}}", "overrides.model.lr: the space varies it", ""),
        (SPACE + "objective:\n  directon: maximize", "s.yaml, line 3: objective.directon:", "did you mean direction"),
        (SPACE + "objective:\n- metric: a\n  directon: b", "s.yaml, line 4: objective.directon:", "direction"),
        (SPACE + "objective: val/acc", "s.yaml, line 2: objective: takes keys below it, got val/acc", ""),
        (SPACE + "confirm: {seds: 2}", "s.yaml, line 2: confirm.seds: there is no argument seds", "seeds"),
        (SPACE + "confirm: {top: null}", "confirm.top: must not be null", ""),
        (SPACE + "pruner: {class_pth: MedianPruner}", "s.yaml, line 2: pruner: needs a class_path", ""),
        (SPACE + "sampler: {class_pth: TPESampler}", "s.yaml, line 2: sampler: needs a class_path", ""),
        (SPACE + "sampler:\n  class_path: TPESampler\n  init_args:\n    seed: abc", "s.yaml, line 5: sampler", "int"),
    ],
)
def test_mistake_in_a_config(text: str, start: str, part: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("s.yaml").write_text(text)

    error = error_of(["--config=s.yaml"], capsys)

    assert error.startswith(f"error: {start}")
    assert part in error


def test_mistakes_cost_no_import_of_torch() -> None:
    code = """
import sys, mnist_lit.search.command
try:
    mnist_lit.search.command.main(["--n_trails=3"])
except SystemExit as stop:
    assert stop.code == 2
assert "torch" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What is accepted


def test_single_overrides_and_keys_of_the_space_may_be_flags() -> None:
    flags = [
        "--overrides.trainer.max_epochs",
        "1",
        "--overrides.model.lr=1.0e-3",
        "--space.model.dropout={choices: [0]}",
    ]

    settings = parse(flags).settings

    assert settings.overrides == {"trainer.max_epochs": 1, "model.lr": 0.001}
    assert settings.space["model.dropout"] == {"choices": [0]}
    assert "model.channels" in settings.space


def test_later_config_wins_and_a_flag_wins_wherever_it_stands() -> None:
    Path("a.yaml").write_text(SPACE + "n_trials: 3\nworkers: 3")
    Path("b.yaml").write_text("n_trials: 4\nworkers: 4")

    settings = parse(["--workers=5", "--config=a.yaml", "--config=b.yaml"]).settings

    assert (settings.n_trials, settings.workers, list(settings.space)) == (4, 5, ["model.lr"])


@pytest.mark.parametrize("flags", [[], ["--pruner=null", "--confirm.top=2", "--overrides.model.lr=0.1"]])
def test_settings_in_full_and_printed_ones_amount_to_themselves(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    typed = parse(flags)
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--print_config"])
    Path("printed.yaml").write_text(capsys.readouterr().out)
    Path("search.yaml").write_text(typed.yaml)

    assert stop.value.code == 0
    assert parse(["--config=printed.yaml"]).yaml == typed.yaml == parse(["--config=search.yaml"]).yaml
    assert not Path("logs").exists()


def test_password_is_not_in_the_settings_in_full() -> None:
    storage = "postgresql://me:se:cr@et@host:5432/db?password=secret&a=1"

    text = parse([f"--storage={storage}"]).yaml

    assert "cr" not in yaml.safe_load(text)["storage"]
    assert yaml.safe_load(text)["storage"].startswith("postgresql://me:***@host:5432/db")
    assert without_password("postgresql://me@host:5432/db") == "postgresql://me@host:5432/db"


def test_command_goes_on_and_does_not_begin_anew() -> None:
    typed = parse(["--fresh", "--n_trials", "3"])

    assert typed.fresh
    assert typed.command == "python scripts/optuna_search.py --n_trials 3"


def test_help_has_each_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())

    assert stop.value.code == 0
    assert "Args:" not in text
    for name, default in {"n_trials": 50, "keep_checkpoints": 3, "timeout": "null", "study_name": "mnist"}.items():
        assert re.search(rf" --{name} {name.upper()} .*?\(type: [^)]*default: (\w+)\)", text)[1] == str(default)  # type: ignore[index]


def test_search_config_given_to_fit_says_whose_it_is(fails: Any) -> None:
    error = fails("fit", "--config=configs/search.yaml")

    assert "scripts/optuna_search.py" in error
    assert error.startswith("error: configs/search.yaml, line ")


def test_parse_raises_what_main_prints() -> None:
    with pytest.raises(UsageError, match="there is no such key"):
        parse(["--nope=1"])


def test_without_a_word_hopeless_trials_are_pruned_after_their_first_validation() -> None:
    Path("s.yaml").write_text(SPACE)

    default, none = (yaml.safe_load(parse(["--config=s.yaml", *flags]).yaml) for flags in ([], ["--pruner=null"]))

    assert default["pruner"]["class_path"] == "optuna.pruners.MedianPruner"
    assert default["pruner"]["init_args"]["n_warmup_steps"] == 1
    assert none["pruner"] is None


@pytest.mark.parametrize("flags", [["--pruner=ThresholdPruner"], ["--pruner", "optuna.pruners.ThresholdPruner"]])
def test_pruner_that_is_named_has_nothing_of_the_default_one(flags: list[str]) -> None:
    Path("s.yaml").write_text(SPACE)

    typed = parse(["--config=s.yaml", *flags, "--pruner.lower=0.5"])

    assert yaml.safe_load(typed.yaml)["pruner"]["init_args"]["n_warmup_steps"] == 0


def test_classes_in_overrides_and_space_stay_as_they_were_typed() -> None:
    schedule = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR"}
    optimizers = [
        {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}},
        {"class_path": "torch.optim.AdamW"},
    ]
    content = {"overrides": {"model.schedule": schedule, "data.eval_batch_size": "32"}}
    content["space"] = {"model.optimizer": {"choices": optimizers}}
    Path("s.yaml").write_text(yaml.safe_dump(content))

    typed = parse(["--config=s.yaml", "--overrides.trainer.max_epochs=2"])

    assert typed.settings.overrides == {**content["overrides"], "trainer.max_epochs": 2}
    assert typed.settings.space == content["space"]
    assert yaml.safe_load(typed.yaml)["overrides"] == typed.settings.overrides
