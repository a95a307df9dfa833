"""What docs/your_own.md and docs/configs.md tell is done as it stands there, each time in a new copy of the project."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PROJECT, completed
from runs import metrics
from test_folder import write as write_images

import mnist_lit
from mnist_lit import main
from mnist_lit.data.datasets import DATASETS
from mnist_lit.data.mnist_files import Split

# Short training: what the command lines leave open may come from the environment, of the project by either name.
SETTINGS = {"TRAINER__LIMIT_TRAIN_BATCHES": "4", "PICTURES__ENABLED": "false", "REPORT": "false"}
LIMITS = {prefix + key: value for prefix in ("MNIST_LIT_", "SHAPES_") for key, value in SETTINGS.items()}
LIMITS["PYTEST_ADDOPTS"] = "-n 0"


def page(name: str) -> str:
    return (PROJECT / "docs" / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    return [line for block in blocks(text, "sh") for line in block.splitlines()]


SECTIONS = {text.partition("\n")[0]: text for text in page("your_own.md").split("\n## ")[1:]}
CONFIGS_PAGE = page("configs.md")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what is or may become part of the project, in a repository of its own."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (PROJECT / name).is_file():
            (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, tmp_path / "project" / name)
    done("git init --quiet && git add .", tmp_path / "project")
    return tmp_path / "project"


def done(command: str, folder: Path) -> str:
    # The tests run inside the environment that `uv run` would make; it has the project's metadata by its old name only.
    python = f"{shlex.quote(sys.executable)} -m "
    path = os.pathsep.join([str(folder), str(folder.parent)])
    command = re.sub(r"(uv run )?\bpython -m |uv run ", lambda _: python, command)
    env = {**os.environ, **LIMITS, "PYTHONPATH": path}
    return completed(command, shell=True, cwd=folder, env=env).stdout


def here(command: str, folder: Path) -> None:
    """Do what `python -m MODULE ARGUMENTS` does in this process, which has imported torch already."""
    _, _, module, *args = shlex.split(command)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setattr(sys, "argv", [module, *args])
        # The server that forks the workers of every search keeps the variables of the first one.
        for name, value in LIMITS.items() if args[0] != "search" else ():
            patch.setenv(name, value)
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def write_letters(data_dir: Path) -> None:
    data_dir.mkdir(parents=True)
    splits: list[Split] = ["train", "test"]
    for split in splits:
        images, labels = (tensor[:1000].numpy() for tensor in DATASETS["digits"].load(data_dir, split))
        np.savez(data_dir / f"{split}.npz", images=images, labels=labels)


# docs/your_own.md


def test_every_section_is_tried_below() -> None:
    assert list(SECTIONS) == ["A network", "Images", "Data in code", "Another name"]


def test_a_network_and_a_search_over_it(project: Path) -> None:
    mynet, resnet = blocks(SECTIONS["A network"], "python")
    (project / "mynet.py").write_text(mynet)
    (project / "resnet.py").write_text(resnet)

    for command in commands(SECTIONS["A network"]):
        here(command, project)

    assert {"val/acc", "test/acc"} <= set(metrics(project / "logs" / "mine"))
    assert len((project / "logs" / "mine" / "predictions.csv").read_text().splitlines()) == 361
    with pytest.raises(SystemExit, match="2"):
        here("python -m mynet fit --model.widht 3", project)
    space = "space: {model.width: {choices: [4, 8]}}\nconfigs: [configs/digits.yaml]\nn_trials: 2\n"
    (project / "space.yaml").write_text(f"{space}overrides: {{trainer.max_epochs: 1}}\n")
    here("python -m mynet search --config space.yaml", project)
    best = (project / "logs" / "search" / "mnist" / "best.yaml").read_text()
    assert "python -m mynet fit" in best
    assert "width:" in best


def test_images(project: Path) -> None:
    write_images(project / "images" / "train")
    write_images(project / "images" / "test", num=5)
    write_images(project / "others" / "train", shapes=("box", "disc"))
    for command in commands(SECTIONS["Images"]):
        here(command, project)
    assert "test/acc" in metrics(project / "logs" / "images")
    assert len((project / "logs" / "images" / "predictions.csv").read_text().splitlines()) == 16
    assert (project / "logs" / "run_1" / "checkpoints" / "best.ckpt").is_file()


def test_data_in_code_and_a_search_over_it(project: Path) -> None:
    (code,) = blocks(SECTIONS["Data in code"], "python")
    (project / "letters.py").write_text(code)
    write_letters(project / "data")
    for command in commands(SECTIONS["Data in code"]):
        here(command, project)
    assert metrics(project / "logs" / "letters")["dataset"] == "letters"
    base = "data: {dataset: letters, val_size: 100}\ntrainer: {max_epochs: 1}\n"
    (project / "base.yaml").write_text(base)
    (project / "space.yaml").write_text("space: {data.batch_size: {choices: [64, 128]}}\nconfigs: [base.yaml]\n")
    here("python -m letters search --config space.yaml --n_trials 2", project)
    assert (project / "logs" / "search" / "mnist" / "best.yaml").is_file()


@pytest.mark.skipif(mnist_lit.__name__ == "shapes", reason="this project has that name by now")
def test_another_name(project: Path) -> None:
    for command in commands(SECTIONS["Another name"]):
        done(command, project)
    done("! git grep -i -e mnist_lit -e MNISTLit", project)
    # Not installed, as a clone beside an environment that has what it needs.
    assert metrics(project / "logs" / "run_1")["versions"].split(", ")[1] == "shapes 0.1.0"


# docs/configs.md


def test_configs_amount_to_what_is_shown(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (overlay,) = blocks(CONFIGS_PAGE, "yaml")
    (project / overlay.removeprefix("# ").partition(":")[0]).write_text(overlay)
    for command in commands(CONFIGS_PAGE):
        here(command.removeprefix("uv run "), project)

    for transcript in blocks(CONFIGS_PAGE, "text"):
        command, *shown = transcript.removeprefix("$ ").splitlines()
        variables, args, pattern = re.split(r"python -m mnist_lit | \| grep -E ", command)
        capsys.readouterr()
        for variable in variables.split():
            monkeypatch.setenv(*variable.split("="))
        with pytest.raises(SystemExit, match="0"):
            here(f"python -m mnist_lit {args}", project)
        output = capsys.readouterr().out.splitlines()
        assert [line for line in output if re.search(pattern.strip("'"), line)] == shown


def test_only_a_fit_that_goes_on_brings_callbacks(
    tmp_path: Path, fit: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stranger.py").write_text(
        "from lightning.pytorch import Callback\nclass Loud(Callback):\n    def __init__(self): print('called')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fit("--run_dir=run", "--trainer.max_epochs=1")
    for file in Path("run").glob("checkpoints/*"):
        checkpoint = torch.load(file, weights_only=True)
        checkpoint["config"]["trainer"]["callbacks"] = [{"class_path": "stranger.Loud"}]
        torch.save(checkpoint, file)

    main(["test", "--ckpt_path=run"])
    assert "called\n" not in capsys.readouterr().out
    main(["fit", "--ckpt_path=run", "--trainer.max_epochs=2"])
    assert "called\n" in capsys.readouterr().out
