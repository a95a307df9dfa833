"""Run directories: what a run leaves, and that nothing is lost or changed by a stop, a move or a crash."""

import csv
import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist_lit import main
from mnist_lit.errors import UsageError
from mnist_lit.training.checkpoints import AtomicCheckpointIO
from mnist_lit.training.run_dir import claimed

# 1,238 training images make 10 steps in each of the two epochs.
STEPS_PER_EPOCH = 10
CHANCE = ["--model.dropout=0.3", "--data.augment.rotation=10", "--data.augment.translation=0.1", "--csv=true"]
SCHEDULE = ["--model.schedule=torch.optim.lr_scheduler.OneCycleLR"]
RECIPES = {
    "chance": CHANCE,
    "ema": ["--ema.enabled=true", "--ema.decay=0.9", "--model.dropout=0.3"],
    "worker": ["--data.num_workers=1", "--model.dropout=0.3"],
    "schedule": [*SCHEDULE, "--trainer.accumulate_grad_batches=3", "--early_stopping.enabled=true"],
    "no validation": ["--data.val_size=0", "--trainer.log_every_n_steps=3"],
}
# Children are forked from a server that has torch imported, and are processes of their own all the same.
CHILDREN = get_context("forkserver")
CHILDREN.set_forkserver_preload(["mnist_lit.cli"])


class Signals(Callback):
    """Send a signal to the own process at a known moment."""

    def __init__(self, signum: int, batch: int, during: str = "training", times: int = 1) -> None:
        self.signum = signum
        self.batch = batch
        self.during = during
        self.times = times
        self.num_batches = 0

    def on_fit_start(self, *args: Any) -> None:
        self._send("preparation")

    def on_test_batch_start(self, *args: Any) -> None:
        self._send("test")

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.num_batches += 1
        self._send("training")

    def on_validation_batch_start(self, *args: Any) -> None:
        self._send("validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._send("end of epoch")

    def _send(self, during: str) -> None:
        if (during, self.num_batches) == (self.during, self.batch):
            for _ in range(self.times):
                os.kill(os.getpid(), self.signum)


def signals(**init_args: Any) -> str:
    return "--trainer.callbacks=" + json.dumps([{"class_path": "test_runs.Signals", "init_args": init_args}])


def stop(*args: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(args))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def resume(run_dir: Path, *flags: str) -> Any:
    return main(["fit", f"--ckpt_path={run_dir}", "--trainer.callbacks=null", *flags])


def child(*args: str) -> BaseProcess:
    process = CHILDREN.Process(target=_in_child, args=(list(args),))
    process.start()
    return process


def _in_child(args: list[str]) -> None:
    torch.set_num_threads(1)
    main(args)


def read(run_dir: Path, name: str = "last") -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return checkpoint


def saved(run_dir: Path) -> int:
    """When the last checkpoint was written; 0 while there is none."""
    file = run_dir / "checkpoints" / "last.ckpt"
    return file.stat().st_mtime_ns if file.exists() else 0


def learned(run_dir: Path, name: str = "last") -> dict[str, Any]:
    """All that training has changed, without the paths and the seconds."""
    names = {"state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "val_acc_best"}
    averaging = {"current_model_state", "averaging_state"}
    return {key: value for key, value in read(run_dir, name).items() if key in names | averaging}


def assert_same(actual: Any, expected: Any, place: str = "") -> None:
    """Equal to the last bit."""
    assert type(actual) is type(expected), place
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), place
        for name, value in expected.items():
            assert_same(actual[name], value, f"{place}.{name}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), place
        for index, value in enumerate(expected):
            assert_same(actual[index], value, f"{place}.{index}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected), place
    else:
        assert actual == expected, place


def metrics(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "metrics.json").read_text())
    return content


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def files(run_dir: Path) -> set[str]:
    names = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    return {"events" if name.startswith("events.out.tfevents.") else name for name in names}


def assert_as_whole(run_dir: Path, whole: Path) -> None:
    assert_same(learned(run_dir), learned(whole))
    assert curves(run_dir) == curves(whole)
    timing = {"seconds", "images_per_second"}
    assert {key: value for key, value in metrics(run_dir).items() if key not in timing} == {
        key: value for key, value in metrics(whole).items() if key not in timing
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`whole(recipe)`: the directory of a run that nothing has stopped; each recipe is run once."""
    folder = tmp_path_factory.mktemp("whole")

    def run(recipe: str) -> Path:
        run_dir = folder / recipe
        if not run_dir.is_dir():
            main(["fit", *SMALL, *RECIPES[recipe], f"--run_dir={run_dir}"])
        return run_dir

    return run


@pytest.fixture
def copy(whole: Callable[[str], Path], tmp_path: Path) -> Path:
    """A complete run in a directory of the test's own."""
    return Path(shutil.copytree(whole("chance"), tmp_path / "copy"))


# What a run leaves


def test_run_directory_holds_what_the_contract_says(whole: Callable[[str], Path]) -> None:
    assert files(whole("ema")) == {
        "config.yaml",
        "events",
        "metrics.json",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    }


def test_csv_adds_one_file(whole: Callable[[str], Path]) -> None:
    assert files(whole("chance")) - files(whole("ema")) == {"metrics.csv"}


def test_metrics_are_flat_and_complete(whole: Callable[[str], Path]) -> None:
    record = metrics(whole("chance"))

    assert set(record) >= {"val/loss", "val/acc", "val/f1", "val/acc_best", "epoch", "seconds", "images_per_second"}
    assert record["seed"] == 42
    assert record["dataset"] == "digits"
    assert record["device"] in ("cpu", "cuda", "mps")
    assert record["precision"] == read(whole("chance"))["config"]["trainer"]["precision"]
    assert f"torch {torch.__version__.split('+')[0]}" in record["versions"]
    assert record["seconds"] > 0
    assert record["images_per_second"] > 0
    assert not any(isinstance(value, dict | list) for value in record.values())
    assert not any(name.startswith("test/") for name in record)


def test_metrics_are_those_of_the_best_epoch(whole: Callable[[str], Path]) -> None:
    record, points = metrics(whole("chance")), curves(whole("chance"))

    accuracies = [value for _, value in points["val/acc"]]
    best = accuracies.index(max(accuracies))
    assert record["epoch"] == best == read(whole("chance"), "best")["epoch"]
    for name in ("val/loss", "val/acc", "val/f1"):
        assert record[name] == pytest.approx(points[name][best][1])
    assert record["val/acc_best"] == max(accuracies)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["best", "last"])
def test_checkpoint_is_plain_data(recipe: str, name: str, whole: Callable[[str], Path]) -> None:
    assert read(whole(recipe), name)["config"]["data"]["dataset"] == "digits"


def test_test_after_fit_adds_test_metrics(fit: Callable[..., Any], tmp_path: Path) -> None:
    cli = fit("--test_after_fit=true", "--trainer.max_epochs=1", "--run_dir=run")

    record = metrics(tmp_path / "run")
    assert 0 < record["test/acc"] <= 1
    assert set(record) >= {"test/loss", "test/f1", "val/acc", "val/acc_best"}
    assert record["test/acc"] == float(cli.trainer.callback_metrics["test/acc"])


@pytest.mark.parametrize("checkpoint", ["", "checkpoints/last.ckpt"])
def test_test_adds_to_the_record_of_the_run(checkpoint: str, copy: Path, tmp_path: Path) -> None:
    before = metrics(copy)

    cli = main(["test", f"--ckpt_path={copy / checkpoint}"])

    after = metrics(copy)
    assert {name: value for name, value in after.items() if name in before} == before
    assert set(after) - set(before) == {"test/loss", "test/acc", "test/f1"}
    assert after["test/acc"] == float(cli.trainer.callback_metrics["test/acc"])
    assert not (tmp_path / "logs").exists()


def test_validate_repeats_the_best_epoch(copy: Path) -> None:
    before = metrics(copy)

    cli = main(["validate", f"--ckpt_path={copy}"])

    assert float(cli.trainer.callback_metrics["val/acc"]) == before["val/acc_best"]


def test_predictions_are_one_row_per_test_image(copy: Path) -> None:
    accuracy = float(main(["test", f"--ckpt_path={copy}"]).trainer.callback_metrics["test/acc"])

    cli = main(["predict", f"--ckpt_path={copy}"])

    with (copy / "predictions.csv").open(newline="") as file:
        header, *lines = list(csv.reader(file))
    labels = cli.datamodule.splits["test"].labels.tolist()
    assert header == ["path", "label", "confidence", *(f"p{label}" for label in range(10))]
    assert len(lines) == len({line[0] for line in lines}) == len(labels)
    for line in lines:
        shares = [float(share) for share in line[3:]]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert float(line[2]) == max(shares) == shares[int(line[1])]
    right = [int(line[1]) == label for line, label in zip(lines, labels, strict=True)]
    assert sum(right) / len(right) == pytest.approx(accuracy)


def test_config_of_a_run_repeats_it_to_the_last_bit(whole: Callable[[str], Path], tmp_path: Path) -> None:
    main(["fit", f"--config={whole('chance') / 'config.yaml'}"])

    assert_as_whole(tmp_path / "logs" / "run_1", whole("chance"))


# Runs that were stopped


@pytest.mark.parametrize(
    ("batch", "during", "saved"),
    [
        (1, "training", 1),
        (13, "training", 13),
        (STEPS_PER_EPOCH, "training", STEPS_PER_EPOCH),
        (STEPS_PER_EPOCH, "validation", STEPS_PER_EPOCH),
        (STEPS_PER_EPOCH, "end of epoch", STEPS_PER_EPOCH),
        (2 * STEPS_PER_EPOCH, "training", 2 * STEPS_PER_EPOCH),
    ],
)
def test_interrupted_run_goes_on_as_if_it_had_not_been(
    batch: int, during: str, saved: int, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    code = stop("fit", *SMALL, *CHANCE, "--run_dir=run", signals(signum=signal.SIGINT, batch=batch, during=during))
    assert code == 130
    assert read(run_dir)["global_step"] == saved

    resume(run_dir)

    assert_as_whole(run_dir, whole("chance"))
    assert rows(run_dir) == rows(whole("chance"))


@pytest.mark.parametrize(
    ("recipe", "batch"),
    [
        ("ema", 13),
        ("ema", STEPS_PER_EPOCH),
        ("worker", 13),
        ("schedule", 14),  # in the middle of an accumulation
        ("schedule", STEPS_PER_EPOCH),
        ("no validation", 13),
        ("no validation", 12),  # the last of its epoch
    ],
)
def test_terminated_run_goes_on_as_if_it_had_not_been(
    recipe: str, batch: int, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    code = stop("fit", *SMALL, *RECIPES[recipe], "--run_dir=run", signals(signum=signal.SIGTERM, batch=batch))
    assert code == 143

    resume(run_dir)

    assert_as_whole(run_dir, whole(recipe))


def test_run_that_is_stopped_twice_goes_on(whole: Callable[[str], Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stop("fit", *SMALL, *CHANCE, "--run_dir=run", signals(signum=signal.SIGINT, batch=3))
    stop("fit", "--ckpt_path=run", signals(signum=signal.SIGINT, batch=4))
    assert read(run_dir)["global_step"] == 7

    resume(run_dir)

    assert_as_whole(run_dir, whole("chance"))
    assert rows(run_dir) == rows(whole("chance"))


def test_stopped_run_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop("fit", *SMALL, "--run_dir=run", signals(signum=signal.SIGINT, batch=13))

    assert capsys.readouterr().err == (
        "stopped by SIGINT\nwhat was done is kept; go on with: python -m mnist_lit fit --ckpt_path run\n"
    )
    assert metrics(tmp_path / "run")["epoch"] == 0


def test_run_that_was_stopped_at_its_end_only_needs_its_test(whole: Callable[[str], Path], tmp_path: Path) -> None:
    late = signals(signum=signal.SIGTERM, batch=2 * STEPS_PER_EPOCH, during="validation")
    stop("fit", *SMALL, *CHANCE, "--test_after_fit=true", "--run_dir=run", late)

    cli = resume(tmp_path / "run")

    assert cli.trainer.global_step == 2 * STEPS_PER_EPOCH
    assert 0 < metrics(tmp_path / "run")["test/acc"] <= 1
    assert_same(learned(tmp_path / "run"), learned(whole("chance")))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_run_that_is_stopped_before_it_begins_leaves_nothing(
    signum: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = stop("fit", *SMALL, "--run_dir=some/run", signals(signum=signum, batch=0, during="preparation"))

    assert code == 128 + signum
    assert capsys.readouterr().err == f"stopped by {signum.name}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_run_that_is_stopped_during_its_test_is_kept(
    signum: signal.Signals, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    late = signals(signum=signum, batch=2 * STEPS_PER_EPOCH, during="test")
    code = stop("fit", *SMALL, *CHANCE, "--test_after_fit=true", "--run_dir=run", late)

    assert code == 128 + signum
    assert_same(learned(tmp_path / "run"), learned(whole("chance")))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_results_that_are_stopped_leave_nothing(
    signum: signal.Signals, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    late = signals(signum=signum, batch=0, during="test")
    code = stop("test", f"--ckpt_path={whole('chance')}", "--run_dir=results", late)

    assert code == 128 + signum
    assert not (tmp_path / "results").exists()


def test_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    code = stop("fit", *SMALL, "--run_dir=run", signals(signum=signal.SIGINT, batch=13, times=2))

    assert code == 130
    assert read(tmp_path / "run")["global_step"] == STEPS_PER_EPOCH


@pytest.mark.parametrize(
    ("recipe", "batch", "during"),
    [
        ("chance", 2, "training"),
        ("chance", 13, "training"),
        ("chance", 2 * STEPS_PER_EPOCH, "validation"),
        ("ema", 13, "training"),
        ("no validation", 18, "training"),
    ],
)
def test_killed_run_goes_on_as_if_it_had_not_been(
    recipe: str, batch: int, during: str, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    death = signals(signum=signal.SIGKILL, batch=batch, during=during)
    process = child("fit", *SMALL, *RECIPES[recipe], f"--run_dir={run_dir}", death)
    process.join(120)
    assert process.exitcode == -signal.SIGKILL

    resume(run_dir)

    assert_as_whole(run_dir, whole(recipe))
    if recipe == "chance":
        assert rows(run_dir) == rows(whole("chance"))


@pytest.mark.slow
def test_run_survives_kills_at_any_moment(tmp_path: Path) -> None:
    run_dir, whole_dir = tmp_path / "run", tmp_path / "whole"
    recipe = [*SMALL, *CHANCE, "--trainer.max_epochs=40"]
    main(["fit", *recipe, f"--run_dir={whole_dir}"])
    moments = random.Random(0)
    command = ["fit", *recipe, f"--run_dir={run_dir}"]
    for _ in range(8):
        before = saved(run_dir)
        process = child(*command)
        while saved(run_dir) == before:
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        command = ["fit", f"--ckpt_path={run_dir}"]
    assert read(run_dir)["epoch"] < 39

    resume(run_dir)

    assert_as_whole(run_dir, whole_dir)
    assert rows(run_dir) == rows(whole_dir)


@pytest.mark.parametrize("recipe", ["chance", "schedule", "no validation"])
def test_curves_have_each_step_once(recipe: str, whole: Callable[[str], Path]) -> None:
    points = curves(whole(recipe))

    assert set(points) >= {"train/loss", "train/acc", "lr"}
    assert "epoch" not in points
    for tag, curve in points.items():
        steps = [step for step, _ in curve]
        assert steps == sorted(set(steps)), tag


def test_run_that_goes_on_for_longer_has_one_curve(copy: Path) -> None:
    resume(copy, "--trainer.max_epochs=3")

    ends = [STEPS_PER_EPOCH - 1, 2 * STEPS_PER_EPOCH - 1, 3 * STEPS_PER_EPOCH - 1]
    assert [step for step, _ in curves(copy)["train/loss"]] == ends
    assert [step for step, _ in curves(copy)["val/acc"]] == ends
    assert [int(row["step"]) for row in rows(copy) if row["val/acc"]] == ends


def test_run_that_goes_on_within_a_second_has_its_events_in_order(fit: Callable[..., Any], tmp_path: Path) -> None:
    fit("--run_dir=run", "--trainer.max_epochs=1")
    (first,) = tmp_path.glob("run/events.*")
    # As if it had been made this very second, by a process with a later number.
    first.rename(tmp_path / "run" / f"events.out.tfevents.{int(time.time())}.zzz.9.0")
    fit("--ckpt_path=run", "--trainer.max_epochs=2")
    assert [step for step, _ in curves(tmp_path / "run")["val/acc"]] == [9, 19]


def test_moved_run_goes_on_and_keeps_its_best(fit: Callable[..., Any], tmp_path: Path) -> None:
    # The highest loss is that of the first epoch, before the move.
    fit("--checkpoint.monitor=val/loss", "--checkpoint.mode=max", "--run_dir=here")
    before = learned(tmp_path / "here", "best")
    shutil.move("here", "there")

    resume(tmp_path / "there", "--trainer.max_epochs=4")

    assert_same(learned(tmp_path / "there", "best"), before)
    assert read(tmp_path / "there")["global_step"] == 4 * STEPS_PER_EPOCH
    assert metrics(tmp_path / "there")["epoch"] == before["epoch"] == 0
    assert not (tmp_path / "here").exists()
    assert files(tmp_path / "there") >= {"checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    assert not list((tmp_path / "there" / "checkpoints").glob("*-v*"))


def test_best_accuracy_survives_a_resume_that_learns_nothing(copy: Path) -> None:
    before = metrics(copy)

    cli = resume(copy, "--trainer.max_epochs=3", "--trainer.limit_train_batches=1", "--model.lr=1")

    assert float(cli.trainer.callback_metrics["val/acc_best"]) >= before["val/acc_best"]
    assert metrics(copy)["val/acc_best"] == float(cli.trainer.callback_metrics["val/acc_best"])


# Whose directory it is


def test_occupied_run_dir_is_refused(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")

    error = fails("fit", *SMALL, "--run_dir=mine")

    assert "mine is not empty" in error
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_empty_run_dir_is_used(fit: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()

    fit("--trainer.fast_dev_run=true", "--run_dir=mine")

    assert (tmp_path / "mine" / "config.yaml").is_file()


def test_runs_are_numbered(fit: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        fit("--trainer.max_epochs=1", "--trainer.limit_train_batches=1")

        assert capsys.readouterr().out.splitlines()[-1] == f"logs/run_{number}"
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"run_1", "run_2"}


def _claim_many(number: int) -> list[str]:
    run_dirs = []
    for _ in range(number):
        with claimed(None, existing=None) as claim:
            run_dirs.append(str(claim.run_dir))
    return run_dirs


def test_processes_claim_different_directories(tmp_path: Path) -> None:
    with CHILDREN.Pool(3) as pool:
        run_dirs = list(itertools.chain(*pool.map(_claim_many, [50] * 3, chunksize=1)))

    assert sorted(run_dirs) == sorted(f"logs/run_{number}" for number in range(1, 151))
    assert len(list((tmp_path / "logs").iterdir())) == 150


def test_run_without_anything_to_go_on_from_is_refused(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()

    assert "holds no checkpoint" in fails("fit", "--ckpt_path=run")


# Checkpoint files


class Payload:
    """Makes a directory when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_crash_while_writing_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.ones(3)}}, file)

    with pytest.raises(TypeError, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.zeros(3)}, "x": (_ for _ in ())}, file)

    assert torch.equal(AtomicCheckpointIO().load_checkpoint(file)["state_dict"]["weight"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [file]


def test_checkpoint_with_code_in_it_is_refused(fails: Callable[..., str], tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "payload": Payload()}, tmp_path / "evil.ckpt")

    error = fails("test", "--ckpt_path=evil.ckpt")

    assert "more than plain data" in error
    assert not (tmp_path / "executed").exists()
    with pytest.raises(UsageError, match="more than plain data"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt")


def test_damaged_checkpoint_is_refused(copy: Path, fails: Callable[..., str]) -> None:
    file = copy / "checkpoints" / "best.ckpt"
    file.write_bytes(file.read_bytes()[:1000])

    assert "it is damaged" in fails("test", f"--ckpt_path={copy}")
