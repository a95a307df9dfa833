"""Run directories: what a run leaves, and that nothing is lost or changed by a stop, a move or a crash."""

import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CHANCE, SMALL
from runs import (
    STEPS_PER_EPOCH,
    assert_as_whole,
    assert_same,
    child,
    curves,
    files,
    learned,
    metrics,
    read,
    resume,
    signals,
    stop,
)

from mnist_lit import main
from mnist_lit.errors import Stopped
from mnist_lit.signals import defer_signals, raise_if_stopped, raise_on_signals

Capsys = pytest.CaptureFixture[str]
END = 2 * STEPS_PER_EPOCH
RECIPES = {
    "chance": CHANCE,
    "ema": ["--ema.enabled=true", "--ema.decay=0.9", "--model.dropout=0.3"],
    "worker": ["--data.num_workers=1", "--model.dropout=0.3"],
    "schedule": [
        "--model.schedule=torch.optim.lr_scheduler.OneCycleLR",
        "--trainer.accumulate_grad_batches=3",
        "--early_stopping.enabled=true",
    ],
    "no validation": ["--data.val_size=0", "--trainer.log_every_n_steps=3"],
    "validations": ["--trainer.val_check_interval=3", "--trainer.precision=64-true"],
}


@pytest.fixture(scope="module")
def whole(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`whole(recipe)`: the directory of a run that nothing has stopped; each recipe is run once."""
    folder = tmp_path_factory.mktemp("whole")

    def run(recipe: str) -> Path:
        run_dir = folder / recipe if recipe != "chance" else whole_run
        if not run_dir.is_dir():
            main(["fit", *SMALL, *RECIPES[recipe], f"--run_dir={run_dir}"])
        return run_dir

    return run


@pytest.fixture
def copy(whole: Callable[[str], Path], tmp_path: Path) -> Path:
    """A complete run in a directory of the test's own."""
    return Path(shutil.copytree(whole("chance"), tmp_path / "copy"))


# What a run leaves


def test_run_directory_holds_what_the_contract_names(whole: Callable[[str], Path]) -> None:
    always = {"config.yaml", "events", "metrics.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    assert files(whole("ema")) == always
    assert files(whole("chance")) == always | {"metrics.csv"}  # with csv: true
    assert {read(whole("ema"), name)["config"]["data"]["dataset"] for name in ("best", "last")} == {"digits"}


def test_config_of_a_run_repeats_it_to_the_last_bit(whole: Callable[[str], Path], tmp_path: Path) -> None:
    main(["fit", f"--config={whole('chance') / 'config.yaml'}"])
    assert_as_whole(tmp_path / "logs" / "run_1", whole("chance"))


@pytest.mark.parametrize("recipe", ["chance", "schedule", "no validation"])
def test_curves_have_each_step_once(recipe: str, whole: Callable[[str], Path]) -> None:
    points = curves(whole(recipe))
    assert {"train/loss", "train/acc", "lr"} <= set(points)
    for tag in points.keys() - {"epoch"}:  # Lightning may log it beside each metric
        steps = [step for step, _ in points[tag]]
        assert steps == sorted(set(steps)), tag


# Runs that were stopped


@pytest.mark.parametrize(
    ("signum", "recipe", "batch", "during"),
    [
        (signal.SIGINT, "chance", 1, "training"),
        (signal.SIGTERM, "chance", STEPS_PER_EPOCH, "training"),
        (signal.SIGHUP, "chance", STEPS_PER_EPOCH, "validation"),
        (signal.SIGTERM, "chance", STEPS_PER_EPOCH, "end of epoch"),
        (signal.SIGINT, "chance", END, "training"),
        (signal.SIGTERM, "ema", 13, "training"),
        (signal.SIGINT, "worker", 13, "training"),
        (signal.SIGTERM, "schedule", 14, "training"),  # in the middle of an accumulation
        (signal.SIGTERM, "no validation", 12, "training"),  # the last of its epoch
        (signal.SIGTERM, "validations", 13, "training"),  # a validation follows
    ],
)
def test_stopped_run_goes_on_as_if_it_had_not_been(
    signum: int, recipe: str, batch: int, during: str, whole: Callable[[str], Path], tmp_path: Path, capsys: Capsys
) -> None:
    moment = signals(signum=signum, batch=batch, during=during)
    assert stop("fit", *SMALL, *RECIPES[recipe], "--run_dir=run", moment) == 128 + signum
    if recipe == "chance":
        assert read(tmp_path / "run")["global_step"] == batch
    capsys.readouterr()
    resume(tmp_path / "run")
    assert "note: " not in capsys.readouterr().err
    assert_as_whole(tmp_path / "run", whole(recipe))


def test_run_that_is_stopped_twice_goes_on_by_the_command_that_it_names(
    whole: Callable[[str], Path], tmp_path: Path, capsys: Capsys
) -> None:
    stop("fit", *SMALL, *CHANCE, "--run_dir=run", signals(signum=signal.SIGINT, batch=3))
    stop("fit", "--ckpt_path=run", signals(signum=signal.SIGINT, batch=4))
    assert read(tmp_path / "run")["global_step"] == 7
    *_, last, advice = capsys.readouterr().err.splitlines()
    assert "SIGINT" in last
    main([*advice.partition("python -m mnist_lit ")[2].split(), "--trainer.callbacks=null"])
    assert_as_whole(tmp_path / "run", whole("chance"))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_run_that_is_stopped_before_its_first_step_leaves_nothing_and_gives_the_handlers_back(
    signum: signal.Signals, tmp_path: Path, capsys: Capsys
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    early = signals(signum=signum, batch=0, during="preparation")
    assert stop("fit", *SMALL, early) == 128 + signum
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


@pytest.mark.parametrize("during", ["validation", "test"])
def test_run_that_is_stopped_at_its_end_only_needs_its_test(
    during: str, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    late = signals(signum=signal.SIGTERM, batch=END, during=during)
    assert stop("fit", *SMALL, *CHANCE, "--test_after_fit=true", "--run_dir=run", late) == 128 + signal.SIGTERM
    assert resume(tmp_path / "run").trainer.global_step == END
    assert 0 < metrics(tmp_path / "run")["test/acc"] <= 1
    assert_same(learned(tmp_path / "run"), learned(whole("chance")))


def test_stopped_evaluation_leaves_nothing(whole: Callable[[str], Path], tmp_path: Path) -> None:
    early = signals(signum=signal.SIGTERM, batch=0, during="test")
    assert stop("test", f"--ckpt_path={whole('chance')}", "--run_dir=results", early) == 128 + signal.SIGTERM
    assert not (tmp_path / "results").exists()


def test_second_signal_does_not_wait(tmp_path: Path) -> None:
    assert stop("fit", *SMALL, "--run_dir=run", signals(signum=signal.SIGINT, batch=13, times=2)) == 130
    assert read(tmp_path / "run")["global_step"] == STEPS_PER_EPOCH


# Runs that were killed or moved, or that go on for longer


@pytest.mark.parametrize(("recipe", "batch", "during"), [("ema", END, "validation"), ("no validation", 18, "training")])
def test_killed_run_goes_on_as_if_it_had_not_been(
    recipe: str, batch: int, during: str, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    moment = signals(signum=signal.SIGKILL, batch=batch, during=during)
    process = child("fit", *SMALL, *RECIPES[recipe], f"--run_dir={run_dir}", moment)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    resume(run_dir)
    assert_as_whole(run_dir, whole(recipe))


def test_run_that_goes_on_for_longer_has_one_curve(copy: Path) -> None:
    before = metrics(copy)
    cli = resume(copy, "--trainer.max_epochs=3", "--model.lr=1")
    ends = [STEPS_PER_EPOCH - 1, END - 1, 3 * STEPS_PER_EPOCH - 1]
    assert [step for step, _ in curves(copy)["train/loss"]] == ends
    assert [step for step, _ in curves(copy)["val/acc"]] == ends
    best = float(cli.trainer.callback_metrics["val/acc_best"])
    assert best == metrics(copy)["val/acc_best"] >= before["val/acc_best"]


def test_run_that_has_used_its_time_says_so(
    tmp_path: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", *SMALL, "--trainer.max_time=00:00:00:01", "--trainer.max_epochs=1000", "--run_dir=run"])
    assert re.search(r"go on .* --trainer.max_time 00:00:00:0\d\n", capsys.readouterr().out)
    assert "trainer.max_time" in fails("fit", "--ckpt_path=run")
    before = read(tmp_path / "run")
    more = ["--trainer.max_time=null", f"--trainer.max_epochs={before['epoch'] + 2}"]
    assert resume(tmp_path / "run", *more).trainer.global_step > before["global_step"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--trainer.max_epochs=1"], ["trainer.max_epochs"]),
        (["--trainer.max_steps=19"], ["trainer.max_steps"]),
        (["--data.dataset=mnist"], ["digits", "--init_from"]),
        (["--trainer.max_epochs=-1", "--model.schedule=OneCycleLR"], ["model.schedule", "trainer.max_steps"]),
        (["--trainer.max_epochs=3", "--trainer.callbacks=[runs.Failing]"], ["LookupError"]),
        (["--trainer.devices=0"], ["devices"]),
    ],
    ids=str,
)
def test_run_that_cannot_go_on_says_why_and_is_unchanged(
    flags: list[str], words: list[str], copy: Path, capsys: Capsys
) -> None:
    before = {name: (copy / name).read_bytes() for name in files(copy) - {"events"}}
    capsys.readouterr()
    assert stop("fit", f"--ckpt_path={copy}", *flags) in (1, 2)
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert files(copy) - {"error.txt"} == before.keys() | {"events"}
    assert {name: (copy / name).read_bytes() for name in before} == before


def test_run_that_goes_on_beyond_its_max_steps_is_as_one_that_had_more(tmp_path: Path) -> None:
    """Its first end is in an epoch, its second at the end of one."""
    flags = ["fit", *SMALL, *CHANCE, "--trainer.log_every_n_steps=3", "--trainer.max_epochs=-1"]
    main([*flags, "--trainer.max_steps=27", "--run_dir=whole"])
    main([*flags, "--trainer.max_steps=4", "--run_dir=run"])
    for num_steps in (20, 27):
        resume(tmp_path / "run", f"--trainer.max_steps={num_steps}")
    assert_same(learned(tmp_path / "run"), learned(tmp_path / "whole"))
    points, expected = curves(tmp_path / "run"), curves(tmp_path / "whole")
    assert all(set(points[tag]) >= set(expected[tag]) for tag in expected)  # a row more where the run ended first


def test_moved_run_goes_on_and_keeps_its_best(fit: Callable[..., Any], tmp_path: Path) -> None:
    # The highest loss is that of the first epoch, before the move.
    fit("--checkpoint.monitor=val/loss", "--checkpoint.mode=max", "--run_dir=here")
    before = learned(tmp_path / "here", "best")
    names = files(tmp_path / "here")
    shutil.move("here", "there")
    resume(tmp_path / "there", "--trainer.max_epochs=4")
    assert_same(learned(tmp_path / "there", "best"), before)
    assert read(tmp_path / "there")["global_step"] == 2 * END
    assert metrics(tmp_path / "there")["epoch"] == before["epoch"] == 0
    assert not (tmp_path / "here").exists()
    assert files(tmp_path / "there") == names


# Signals while a library runs


class Dying:
    """Gets a signal while it is destroyed, where Python drops what is raised."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signal_in_a_destructor_is_not_lost() -> None:
    with raise_on_signals():
        raise_if_stopped()
        Dying()
        with pytest.raises(Stopped) as stop:
            raise_if_stopped()
    assert stop.value.exit_code == 130
    raise_if_stopped()  # nothing is left for the next command


def test_signal_while_another_one_is_handled_is_ignored() -> None:
    done = []

    def clean_up() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGINT)
            done.append("all")

    with raise_on_signals(), pytest.raises(Stopped) as stop:
        clean_up()
    assert (done, stop.value.exit_code) == (["all"], 143)


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_that_a_library_turns_into_its_own_error_stops_nevertheless(signum: int, exit_code: int) -> None:
    with pytest.raises(Stopped) as stop, raise_on_signals():  # noqa: PT012
        try:
            signal.raise_signal(signum)
        except BaseException:
            raise LookupError from None
    assert stop.value.exit_code == exit_code


def test_deferred_signal_waits_for_the_end_of_its_block() -> None:
    done = []

    def work() -> None:
        with defer_signals():
            signal.raise_signal(signal.SIGINT)
            done.append("all")

    with raise_on_signals(), pytest.raises(Stopped):
        work()
    assert done == ["all"]
    raise_if_stopped()
