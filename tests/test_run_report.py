"""report.html and the last lines on the console: what they show of a run, whatever there is of it."""

import json
import re
import shlex
import shutil
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL
from test_report import Page

from mnist_lit import main
from mnist_lit.reports.run_report import write_run_report

EVIL = "<script>alert('&amp;\"$x')</script>"
SHOW = ["--report=true", "--pictures.enabled=true"]
OPTIMIZER = ["--model.optimizer=AdamW", "--model.optimizer.weight_decay=0.05"]
Capsys = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two epochs, its test, its pictures and its page."""
    run_dir = tmp_path_factory.mktemp("shown") / "run"
    main(["fit", *SMALL, *SHOW, *OPTIMIZER, "--test_after_fit=true", f"--run_dir={run_dir}"])
    return run_dir


@pytest.fixture
def copy(shown: Path, tmp_path: Path) -> Path:
    """The same in a directory of the test's own."""
    return Path(shutil.copytree(shown, tmp_path / "copy"))


def page_of(run_dir: Path) -> Page:
    return Page(run_dir / "report.html")


def metrics_of(run_dir: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run_dir / "metrics.json").read_text())
    return metrics


def lines_of(output: str) -> dict[str, str]:
    """The last lines of a command, by their names."""
    return dict(re.split(r"  +", line, maxsplit=1) for line in output.splitlines() if "  " in line)


def test_page_loads_nothing_from_elsewhere(shown: Path) -> None:
    page = page_of(shown)

    assert {name for name, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "a"})
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    [policy] = [tag["content"] for tag in page.all("meta") if "http-equiv" in tag]
    assert policy.startswith("default-src 'none'")


def test_page_shows_numbers_pictures_and_curves_of_the_run(shown: Path) -> None:
    metrics, page = metrics_of(shown), page_of(shown)

    for name in ("test/acc", "val/acc", "test/f1", "val/f1"):
        assert f"{100 * metrics[name]:.2f} %" in page.text
    assert f"best epoch {metrics['epoch'] + 1} of 2" in page.text
    assert f"{metrics['parameters']:,}" in page.text
    assert metrics["versions"] in page.text
    embedded = {b64decode(image["src"].partition(",")[2]) for image in page.all("img")}
    assert embedded == {file.read_bytes() for file in (shown / "pictures").iterdir()}
    assert all(image["alt"] for image in page.all("img"))
    assert len(page.all("svg")) == 3


def test_keys_that_differ_from_their_defaults_are_shown(shown: Path) -> None:
    head, *rows = page_of(shown).tables[-1]

    keys = {key: (default, here) for key, default, here in rows}
    assert head == ["key", "default", "here"]
    assert keys["model.lr"] == ("0.001", "0.01")
    assert keys["model.channels"] == ("[16, 32, 64]", "[4]")
    assert keys["model.optimizer"][1] == "torch.optim.AdamW"
    assert keys["model.optimizer.weight_decay"] == ("0.01", "0.05")
    assert not {"data.batch_size", "model.dropout", "model.optimizer.betas", "trainer.precision"} & set(keys)


def test_whatever_stands_in_a_run_directory_is_only_text(copy: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump({**config, EVIL: EVIL}, sort_keys=False))
    (copy / "metrics.json").write_text(json.dumps({**metrics_of(copy), "dataset": EVIL, "versions": EVIL}))

    page = Page(write_run_report(copy.rename(tmp_path / "<b>run"), {}))

    assert not {"script", "b"} & {name for name, _ in page.tags}
    assert "Run <b>run" in page.text
    assert [EVIL, "", EVIL] in page.tables[-1]


def test_what_a_run_does_not_have_is_left_out(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "early").mkdir()
    shutil.copy(copy / "config.yaml", tmp_path / "early")

    page = Page(write_run_report(tmp_path / "early", {}))

    assert not page.all("img")
    assert not page.all("svg")
    assert "accuracy" not in page.text.lower()
    assert ["model.lr", "", "0.01"] in page.tables[-1]


def test_curves_are_those_of_training_alone(copy: Path) -> None:
    before = page_of(copy).source.count("<path")
    main(["validate", f"--ckpt_path={copy}"])  # logs at step 0

    assert page_of(copy).source.count("<path") == before


def test_test_of_a_run_renews_its_page(tmp_path: Path, fit: Callable[..., Any]) -> None:
    run_dir = tmp_path / "run"
    fit(*SHOW, "--trainer.max_epochs=1", f"--run_dir={run_dir}")
    before = page_of(run_dir)

    main(["test", f"--ckpt_path={run_dir}"])

    after = page_of(run_dir)
    assert "Test accuracy" not in before.text
    assert f"{100 * metrics_of(run_dir)['test/acc']:.2f} %" in after.text
    assert len(after.all("img")) == len(before.all("img")) + 2
    assert after.tables == before.tables


def test_run_outlives_a_page_that_cannot_be_written(copy: Path, capsys: Capsys) -> None:
    (copy / "report.html").unlink()
    (copy / "report.html").mkdir()

    main(["test", f"--ckpt_path={copy}"])

    printed = capsys.readouterr()
    assert printed.err.startswith("note: report.html")
    assert printed.out.splitlines()[-1] == str(copy)


# ---- The console


def test_end_of_fit_shows_how_it_went(tmp_path: Path, capsys: Capsys, fit: Callable[..., Any]) -> None:
    run_dir = tmp_path / "my run"
    first = fit("--report=true", "--test_after_fit=true", "--trainer.max_epochs=1", f"--run_dir={run_dir}")

    output = capsys.readouterr().out
    lines, metrics = lines_of(output), metrics_of(run_dir)
    assert lines["best epoch"] == "1 of 1"
    assert lines["val/acc"] == f"{100 * metrics['val/acc']:.2f} %"
    assert lines["test/acc"] == f"{100 * metrics['test/acc']:.2f} %"
    assert shlex.split(lines["report"]) == [str(run_dir / "report.html")]
    assert output.splitlines()[-1] == str(run_dir)
    _, _, _, *args = shlex.split(lines["go on"])
    assert main(args).trainer.global_step == 2 * first.trainer.global_step


@pytest.mark.parametrize(("command", "split"), [("test", "test"), ("validate", "val")])
def test_evaluation_shows_its_metrics(command: str, split: str, copy: Path, capsys: Capsys) -> None:
    cli = main([command, f"--ckpt_path={copy}"])

    output = capsys.readouterr().out
    lines, metrics = lines_of(output), cli.trainer.callback_metrics
    assert list(lines) == [f"{split}/acc", f"{split}/loss", f"{split}/f1"]
    assert lines[f"{split}/acc"] == f"{100 * float(metrics[f'{split}/acc']):.2f} %"
    assert output.splitlines()[-1] == str(copy)
