"""A class on the stock command line, and the package as a dependency: an installed wheel outside of this repository."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, SMALL, completed
from runs import metrics
from torch import nn

from mnist_lit import Classifier, ConvNet, MNISTDataModule, main

TOUR = """
import sys

import mnist_lit
from mnist_lit import main

small = ["--report=false", "--pictures.enabled=false", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
digits = ["fit", "--config", "configs/base.yaml", "--config", "configs/digits.yaml", *small]
if __name__ == "__main__":
    assert "torch" not in sys.modules
    assert mnist_lit.__file__.startswith({site!r})
    main([*digits, "--run_dir=one"])
    main([*digits, "--run_dir=two", "--model.channels=[4]"])
    main(["test", "--ckpt_path=one"])
    main(["predict", "--ckpt_path=one"])
    main(["export", "--ckpt_path=one", "--output=model.pt2"])
    main(["search", "--config=space.yaml", "--n_trials=1"])
    main(["compare", "one", "two"])
"""
SPACE = """
configs: [configs/base.yaml, configs/digits.yaml]
overrides: {trainer.max_epochs: 1, trainer.limit_train_batches: 2}
space: {model.lr: {low: 0.01, high: 0.02}}
"""


class Linear(Classifier):
    """One layer."""

    def __init__(self, num_classes: int = 10, **kwargs: Any) -> None:
        network = nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, num_classes))
        super().__init__(network, num_classes=num_classes, **kwargs)


@pytest.mark.parametrize(
    ("flag", "call"),
    [
        ("--model.class_path=mymodel.MyNet", "main(model_class=MyNet)"),
        ("--model=mymodel.MyNet", "main(model_class=MyNet)"),
        ("--data.class_path=mydata.MyData", "main(datamodule_class=MyData)"),
    ],
)
def test_a_class_path_of_model_or_data_says_how_it_is_done(flag: str, call: str, fails: Callable[..., str]) -> None:
    error = fails("fit", flag)
    assert call in error
    assert "docs/your_own.md" in error


class Wide(ConvNet):
    """Takes the arguments of ConvNet by `**kwargs`."""

    def __init__(self, extra: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class Digits(MNISTDataModule):
    """Has one argument."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__(dataset="digits", val_size=200, batch_size=batch_size)


def test_own_model_and_data_with_arguments_of_their_own_are_linked_and_recorded(monkeypatch: Any) -> None:
    monkeypatch.setenv("MNIST_LIT_DATA", "elsewhere")  # the folder of other data sets
    flags = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--report=false"]
    main(["fit", "--model.channels=[4]", *flags, "--run_dir=own"], datamodule_class=Digits)
    main(["predict", "--ckpt_path=own"], datamodule_class=Digits)
    assert metrics(Path("own"))["dataset"] == "digits"
    wide = ["fit", "--data.dataset=digits", "--data.val_size=200", "--data.image_size=20", "--model.channels=[4]"]
    cli = main([*wide, *flags], model_class=Wide)
    assert (cli.model.hparams["image_size"], cli.model.num_classes) == (20, 10)


def test_a_run_of_another_class_says_that_its_own_command_is_needed(fails: Callable[..., str]) -> None:
    flags = [flag for flag in SMALL if "channels" not in flag]
    main(["fit", *flags, "--trainer.max_epochs=1", "--run_dir=run"], model_class=Linear)
    for command in ("fit", "test"):
        assert "needs the command that trained it" in fails(command, "--ckpt_path=run")


def test_an_installed_wheel_does_all_outside_of_the_repository(tmp_path: Path) -> None:
    if not (uv := shutil.which("uv")):
        pytest.skip("needs uv")
    build = [uv, "build", "--wheel", "--out-dir", str(tmp_path / "wheel"), str(PROJECT)]
    built = completed(build, code=None)
    if built.returncode:
        pytest.skip(f"the wheel cannot be built here: {built.stderr[-300:]}")
    site, project = tmp_path / "site", tmp_path / "project"
    [wheel] = (tmp_path / "wheel").glob("*.whl")
    completed([uv, "pip", "install", "--no-deps", "--target", site, wheel])
    project.mkdir()
    (project / "tour.py").write_text(TOUR.format(site=str(site)))
    (project / "space.yaml").write_text(SPACE)
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(site), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = completed([sys.executable, "tour.py"], code=None, cwd=project, env=env)
    assert done.stderr == ""
    assert "val/acc" in done.stdout
    files = ("one/predictions.csv", "model.pt2", "logs/search/mnist/best.yaml")
    assert all((project / file).is_file() for file in files)
