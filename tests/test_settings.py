"""Settings of a search: every mistake is a short error that names the key."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CONFIGS
from test_bad_input import refused

from mnist_lit import main
from mnist_lit.search.settings import parse

__all__ = ["refused"]

SPACE = "space: {model.lr: {low: 0.1, high: 0.2}}\n"


@pytest.fixture(autouse=True)
def _configs(tmp_path: Path) -> None:
    shutil.copytree(CONFIGS, tmp_path / "configs")


@pytest.mark.parametrize(
    ("flags", "key", "hint"),
    [
        (["--n_trails=3"], "--n_trails", "n_trials"),
        (["--study_name=a/b"], "--study_name", "a/b"),
        (["--confirm.top=0"], "--confirm.top", "0"),
        (["--pruner=optuna.samplers.TPESampler"], "--pruner", "TPESampler"),
        (["--space=3"], "--space", "3"),
        (["--model.lr=3"], "--model.lr", "overrides"),
        (["x"], "x", "is not the value of a key"),
        (["--config=configs/serach.yaml"], "--config", "configs/search.yaml"),
        (["--config=configs/base.yaml"], "configs/base.yaml, line ", "fit"),
    ],
)
def test_wrong_flag(flags: list[str], key: str, hint: str, refused: Any) -> None:
    error = refused("search", "--config=configs/search.yaml", *flags)
    assert error.startswith(f"error: {key}")
    assert hint in error


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("", "--config", "s.yaml"),
        ("space: [", "s.yaml, line 1", ""),
        (SPACE + "n_trails: 3", "s.yaml, line 2: n_trails", "n_trials"),
        (SPACE + "n_trials: null", "s.yaml, line 2: n_trials", "null"),
        (SPACE + "storage: {a: 1}", "s.yaml, line 2: storage", "str"),
        (SPACE + "objective:\n  directon: maximize", "s.yaml, line 3: objective.directon", "direction"),
    ],
)
def test_mistake_in_a_config(text: str, key: str, hint: str, refused: Any) -> None:
    Path("s.yaml").write_text(text)
    error = refused("search", "--config=s.yaml")
    assert error.startswith(f"error: {key}")
    assert hint in error


# What is accepted


def test_single_overrides_and_keys_of_the_space_may_be_flags() -> None:
    flags = ["--overrides.model.hidden", "[1]", "--overrides.model.lr=1.0e-3", "--space.model.norm={choices: [none]}"]
    settings, *_ = parse([*flags, "--space.model.dropout={choices: [0]}"])
    assert settings.overrides == {"trainer.max_epochs": 3, "model.hidden": [1], "model.lr": "1.0e-3"}
    assert (settings.space["model.dropout"], settings.space["model.norm"]) == ({"choices": [0]}, {"choices": ["none"]})
    assert "model.channels" in settings.space


def test_later_config_wins_and_a_flag_wins_wherever_it_stands() -> None:
    Path("a.yaml").write_text(SPACE + "n_trials: 3\nworkers: 3")
    Path("b.yaml").write_text("n_trials: 4\nworkers: 4")
    settings, *_ = parse(["--workers=5", "--config=a.yaml", "--config=b.yaml"])
    assert (settings.n_trials, settings.workers, list(settings.space)) == (4, 5, ["model.lr"])


def test_variables_of_the_search_are_its_keys_and_others_are_for_the_trials(monkeypatch: Any) -> None:
    Path("s.yaml").write_text(SPACE)
    for name, value in {"SEARCH__N_TRIALS": "7", "SEARCH__CONFIG": "s.yaml", "MODEL__LR": "0.1"}.items():
        monkeypatch.setenv(f"MNIST_LIT_{name}", value)
    settings, *_ = parse([])
    assert (settings.n_trials, list(settings.space)) == (7, ["model.lr"])


@pytest.mark.parametrize("flags", [[], ["--pruner=null", "--confirm.top=2", "--overrides.model.lr=0.1"]])
def test_settings_in_full_and_printed_ones_amount_to_themselves(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    *_, dump = parse(flags)
    with pytest.raises(SystemExit) as stop:
        main(["search", *flags, "--print_config"])
    Path("printed.yaml").write_text(capsys.readouterr().out)
    Path("search.yaml").write_text(dump)
    assert stop.value.code == 0
    assert parse(["--config=printed.yaml"])[2] == dump == parse(["--config=search.yaml"])[2]


@pytest.mark.parametrize(
    ("url", "hidden"),
    [
        ("postgresql://me:se:cr@et/x@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("postgresql://host/db?user=me&password=secret&a=1", "postgresql://host/db?user=me&password=***&a=1"),
        ("sqlite:///a@b:c.db", "sqlite:///a@b:c.db"),
    ],
)
def test_password_is_shown_nowhere(url: str, hidden: str) -> None:
    *_, dump = parse([f"--storage={url}"])
    assert yaml.safe_load(dump)["storage"] == hidden


def test_pruner_is_the_median_unless_another_or_none_is_named() -> None:
    Path("s.yaml").write_text(SPACE)
    other = ["--pruner=ThresholdPruner", "--pruner.lower=0.5"]
    flags: dict[str, list[str]] = {"default": [], "none": ["--pruner=null"], "other": other}
    pruners = {name: yaml.safe_load(parse(["--config=s.yaml", *more])[2])["pruner"] for name, more in flags.items()}
    assert pruners["default"]["class_path"] == "optuna.pruners.MedianPruner"
    assert pruners["none"] is None
    assert pruners["other"]["class_path"] == "optuna.pruners.ThresholdPruner"


def test_classes_in_overrides_and_space_stay_as_they_were_typed() -> None:
    schedule = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR"}
    optimizers = [{"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}, "AdamW"]
    content = {"overrides": {"model.schedule": schedule, "data.eval_batch_size": "32"}}
    content["space"] = {"model.optimizer": {"choices": optimizers}}
    Path("s.yaml").write_text(yaml.safe_dump(content))
    settings, *_ = parse(["--config=s.yaml", "--overrides.trainer.max_epochs=2"])
    assert settings.overrides == {**content["overrides"], "trainer.max_epochs": "2"}
    assert settings.space == content["space"]


def test_configs_are_found_beside_the_search_config_in_the_working_directory_or_among_the_shipped_ones() -> None:
    shutil.rmtree("configs")
    Path("elsewhere").mkdir()
    for file in ("elsewhere/beside.yaml", "here.yaml"):
        Path(file).write_text("model: {dropout: 0.1}")
    configs = "configs: [beside.yaml, here.yaml, configs/base.yaml, mlp.yaml]\n"
    Path("elsewhere/search.yaml").write_text(SPACE + configs)
    settings, _, dump = parse(["--config=elsewhere/search.yaml"])
    expected = ["elsewhere/beside.yaml", "here.yaml", str(CONFIGS / "base.yaml"), str(CONFIGS / "mlp.yaml")]
    assert settings.configs == expected
    assert yaml.safe_load(dump)["configs"] == expected
    assert "model.channels" in parse([])[0].space
