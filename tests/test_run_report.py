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
from mnist_lit.search.trial import trial_args
from test_report import Page
from torch.utils.tensorboard import SummaryWriter

from mnist_lit import main
from mnist_lit.errors import UsageError
from mnist_lit.reports.recorded import read_run
from mnist_lit.reports.run_report import write_run_report
from mnist_lit.search.settings import Settings

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


def written(run_dir: Path, **defaults: Any) -> Page:
    return Page(write_run_report(run_dir, defaults))


def lines_of(output: str) -> dict[str, str]:
    """The last lines of a command, by their names."""
    return dict(re.split(r"  +", line, maxsplit=1) for line in output.splitlines() if "  " in line)


# ---- The page


def test_nothing_is_loaded_from_elsewhere(shown: Path) -> None:
    page = page_of(shown)

    assert {name for name, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "a"})
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert not re.search(r"@import|url\(|https?:", page.source)
    [policy] = [tag["content"] for tag in page.all("meta") if "http-equiv" in tag]
    assert policy.startswith("default-src 'none'")


def test_page_tells_the_numbers_of_the_run(shown: Path) -> None:
    metrics, text = metrics_of(shown), page_of(shown).text

    for name in ("test/acc", "val/acc", "test/f1", "val/f1"):
        assert f"{100 * metrics[name]:.2f} %" in text
    assert f"best epoch {metrics['epoch'] + 1} of 2" in text
    assert f"{metrics['parameters']:,}" in text
    assert metrics["versions"] in text


def test_page_holds_every_picture_of_the_run_and_three_charts(shown: Path) -> None:
    images = page_of(shown).all("img")

    embedded = {b64decode(image["src"].partition(",")[2]) for image in images}
    files = {file.read_bytes() for file in (shown / "pictures").iterdir()}
    assert files < embedded
    assert len(embedded - files) == 3
    assert all(image["alt"] for image in images)


def test_config_is_told_where_it_differs_from_the_defaults(shown: Path) -> None:
    head, *rows = page_of(shown).tables[-1]

    told = {key: (default, here) for key, default, here in rows}
    assert head == ["key", "default", "here"]
    assert told["model.lr"] == ("0.001", "0.01")
    assert told["model.channels"] == ("[16, 32, 64]", "[4]")
    assert told["model.optimizer"] == ("null", "AdamW")
    assert told["model.optimizer.weight_decay"] == ("0.01", "0.05")
    assert not {"data.batch_size", "model.dropout", "model.optimizer.betas", "trainer.precision"} & set(told)


def test_whatever_stands_in_a_run_directory_is_only_text(copy: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["data"]["mirrors"] = [EVIL]
    config[EVIL] = EVIL
    (copy / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (copy / "metrics.json").write_text(json.dumps({**metrics_of(copy), "dataset": EVIL, "versions": EVIL}))

    page = written(copy.rename(tmp_path / "<b>run"))

    assert not {"script", "b"} & {name for name, _ in page.tags}
    assert "Run <b>run" in page.text
    assert [EVIL, "", EVIL] in page.tables[-1]


# ---- What a run may lack


def test_what_a_run_does_not_have_is_left_out(tmp_path: Path, fit: Callable[..., Any]) -> None:
    fit("--report=true", "--data.val_size=0", "--trainer.logger=false", f"--run_dir={tmp_path / 'run'}")

    page = page_of(tmp_path / "run")
    assert not page.all("img")
    assert "accuracy" not in page.text.lower()
    assert "Training took" in page.text


def test_run_that_was_stopped_before_anything_was_measured_has_a_page(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "early").mkdir()
    shutil.copy(copy / "config.yaml", tmp_path / "early")

    page = written(tmp_path / "early")

    assert "Run early" in page.text
    assert ["model.lr", "", "0.01"] in page.tables[-1]


def test_page_is_not_written_where_it_is_not_wanted(tmp_path: Path, fit: Callable[..., Any]) -> None:
    fit("--report=false", "--trainer.max_epochs=1", f"--run_dir={tmp_path / 'run'}")

    assert not (tmp_path / "run" / "report.html").exists()


def test_trials_of_a_search_have_no_page_unless_it_is_wanted(tmp_path: Path) -> None:
    settings = Settings(configs=["base.yaml"], space={})
    wanted = Settings(configs=["base.yaml"], space={}, overrides={"report": True})

    assert "--report=false" in trial_args(settings, tmp_path / "0.yaml")
    assert "--report=false" not in trial_args(wanted, tmp_path / "0.yaml")


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


def test_run_from_before_there_were_pages_gets_one(copy: Path, shown: Path) -> None:
    config = yaml.safe_load((copy / "config.yaml").read_text())
    del config["report"], config["model"]["tta_shift"]
    (copy / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (copy / "report.html").unlink()

    main(["test", f"--ckpt_path={copy}"])

    assert page_of(copy).tables == page_of(shown).tables


def test_tests_of_other_data_make_no_page(copy: Path, tmp_path: Path) -> None:
    main(["test", f"--ckpt_path={copy}", f"--ensemble=[{copy}]", f"--run_dir={tmp_path / 'both'}"])

    assert not (tmp_path / "both" / "report.html").exists()


def test_run_outlives_a_page_that_cannot_be_written(copy: Path, capsys: Capsys) -> None:
    (copy / "report.html").unlink()
    (copy / "report.html").mkdir()

    cli = main(["test", f"--ckpt_path={copy}"])

    printed = capsys.readouterr()
    assert printed.err.startswith("note: report.html is not written: ")
    assert lines_of(printed.out)["test/acc"] == f"{100 * float(cli.trainer.callback_metrics['test/acc']):.2f} %"
    assert printed.out.splitlines()[-1] == str(copy)
    assert not list(copy.glob(".report*"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "a: [1\nb"),
        ("config.yaml", "- 1"),
        ("metrics.json", "{"),
        ("metrics.json", "3"),
        ("metrics.json", '{"val/acc": null}'),
        ("metrics.json", '{"val/acc": 0.9, "epoch": "x"}'),
    ],
)
def test_damaged_file_is_named(name: str, content: str, copy: Path) -> None:
    (copy / name).write_text(content)

    with pytest.raises(UsageError, match=name):
        read_run(copy)


# ---- Curves


def test_curves_are_what_was_logged_by_epochs(tmp_path: Path, fit: Callable[..., Any]) -> None:
    cli = fit("--csv=true", "--trainer.log_every_n_steps=5", f"--run_dir={tmp_path / 'run'}")

    curves = read_run(tmp_path / "run").curves
    assert curves["val/acc"].epochs == curves["train/loss"].epochs == [1.0, 2.0]
    assert curves["val/acc"].values[-1] == pytest.approx(float(cli.trainer.callback_metrics["val/acc"]))
    assert curves["lr"].epochs == pytest.approx([0.1, 0.6, 1.1, 1.6])
    assert curves["lr"].values == pytest.approx([0.01] * 4)


def test_curves_of_a_resumed_run_are_those_of_a_whole_one(tmp_path: Path, fit: Callable[..., Any]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit("--trainer.max_epochs=3", f"--run_dir={whole}")
    fit("--trainer.max_epochs=1", "--test_after_fit=true", f"--run_dir={parts}")
    main(["validate", f"--ckpt_path={parts}"])
    main(["fit", f"--ckpt_path={parts}", "--trainer.max_epochs=3"])
    main(["validate", f"--ckpt_path={parts}"])

    expected, curves = read_run(whole).curves, read_run(parts).curves
    for name in ("train/loss", "train/acc", "val/loss", "val/acc"):
        assert curves[name] == expected[name]
    assert curves["val/acc"].epochs == [1.0, 2.0, 3.0]


def test_epoch_that_has_no_end_is_as_long_as_the_one_before(copy: Path) -> None:
    for file in copy.glob("events*"):
        file.unlink()
    with SummaryWriter(str(copy)) as writer:
        points = [("lr", 0, 0.1), ("train/loss", 9, 2.0), ("epoch", 9, 0.0), ("lr", 14, 0.2)]
        for tag, step, value in points:
            writer.add_scalar(tag, value, step)

    assert read_run(copy).curves["lr"].epochs == pytest.approx([0.1, 1.5])


def test_run_without_a_whole_epoch_has_no_curves(copy: Path) -> None:
    for file in copy.glob("events*"):
        file.unlink()
    with SummaryWriter(str(copy)) as writer:
        writer.add_scalar("lr", 0.1, 0)

    assert read_run(copy).curves == {}


def test_what_a_kill_has_torn_is_passed_over(copy: Path) -> None:
    expected = read_run(copy).curves
    last = max(copy.glob("events*"))
    last.write_bytes(last.read_bytes()[:-7])

    assert read_run(copy).curves["train/loss"] == expected["train/loss"]


# ---- The console


def test_end_of_fit_tells_how_it_went(tmp_path: Path, capsys: Capsys, fit: Callable[..., Any]) -> None:
    run_dir = tmp_path / "my run"
    fit("--report=true", "--test_after_fit=true", f"--run_dir={run_dir}")

    output = capsys.readouterr().out
    lines, metrics = lines_of(output), metrics_of(run_dir)
    assert lines["best epoch"] == f"{metrics['epoch'] + 1} of 2"
    assert lines["val/acc"] == f"{100 * metrics['val/acc']:.2f} %"
    assert lines["test/acc"] == f"{100 * metrics['test/acc']:.2f} %"
    assert float(lines["seconds"]) == pytest.approx(metrics["seconds"], abs=0.06)
    assert shlex.split(lines["report"]) == [str(run_dir / "report.html")]
    assert shlex.split(lines["look"]) == ["tensorboard", "--logdir", str(run_dir)]
    assert output.splitlines()[-1] == str(run_dir)


def test_command_to_go_on_goes_on(tmp_path: Path, capsys: Capsys, fit: Callable[..., Any]) -> None:
    first = fit("--trainer.max_epochs=1", f"--run_dir={tmp_path / 'my run'}")
    python, _, module, *args = shlex.split(lines_of(capsys.readouterr().out)["go on"])

    cli = main(args)

    assert (python, module) == ("python", "mnist_lit")
    assert cli.trainer.global_step == 2 * first.trainer.global_step


def test_run_that_is_limited_by_steps_goes_on_for_more_steps(capsys: Capsys, fit: Callable[..., Any]) -> None:
    fit("--trainer.max_epochs=-1", "--trainer.max_steps=4", "--data.val_size=0", "--run_dir=run")

    lines = lines_of(capsys.readouterr().out)
    assert lines["go on"].endswith("--ckpt_path run --trainer.max_steps 8")
    assert "best epoch" not in lines


def test_end_of_fit_names_only_what_there_is(capsys: Capsys, fit: Callable[..., Any]) -> None:
    fit("--trainer.logger=false", "--checkpoint.enabled=false", "--trainer.max_epochs=1", "--run_dir=run")

    assert set(lines_of(capsys.readouterr().out)) == {"best epoch", "val/acc", "seconds"}


def test_fit_of_a_finished_run_tells_what_is_known(copy: Path, capsys: Capsys) -> None:
    (copy / "metrics.json").unlink()

    main(["fit", f"--ckpt_path={copy}", "--test_after_fit=false"])

    output = capsys.readouterr().out
    assert lines_of(output)["go on"].endswith("--trainer.max_epochs 4")
    assert output.splitlines()[-1] == str(copy)


def test_trial_run_of_lightning_has_an_end_and_a_page(tmp_path: Path, capsys: Capsys, fit: Callable[..., Any]) -> None:
    fit("--trainer.fast_dev_run=true", *SHOW, f"--run_dir={tmp_path / 'run'}")

    assert {"val/acc", "seconds", "report"} <= set(lines_of(capsys.readouterr().out))
    assert "Run run" in page_of(tmp_path / "run").text


@pytest.mark.parametrize(("command", "split"), [("test", "test"), ("validate", "val")])
def test_evaluation_tells_its_metrics(command: str, split: str, copy: Path, capsys: Capsys) -> None:
    cli = main([command, f"--ckpt_path={copy}"])

    output = capsys.readouterr().out
    lines, metrics = lines_of(output), cli.trainer.callback_metrics
    assert list(lines) == [f"{split}/acc", f"{split}/loss", f"{split}/f1"]
    assert lines[f"{split}/acc"] == f"{100 * float(metrics[f'{split}/acc']):.2f} %"
    assert float(lines[f"{split}/loss"]) == pytest.approx(float(metrics[f"{split}/loss"]), rel=1e-3)
    assert output.splitlines()[-1] == str(copy)
