"""Searches: they resume, repeat nothing, survive what goes wrong, and record what they found."""

import contextlib
import csv
import io
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from runs import begun, printed
from sqlalchemy.exc import OperationalError
from test_data import linked

from mnist_lit import main

# Searches of a few tiny trials on the digits, in any folder.
TINY = {
    "study_name": "s",
    "n_trials": 3,
    "configs": [],
    "sampler": {"class_path": "optuna.samplers.TPESampler", "init_args": {"seed": 1}},
    "space": {"model.lr": {"low": 0.001, "high": 0.1, "log": True}},
}
TINY_TRIAL = {
    "data.dataset": "digits",
    "data.val_size": 200,
    "data.batch_size": 64,
    "model.channels": [4],
    "trainer.max_epochs": 1,
    "trainer.limit_train_batches": 2,
}
GRID = {"class_path": "optuna.samplers.GridSampler"}
RANDOM = {"class_path": "optuna.samplers.RandomSampler", "init_args": {"seed": 1}}
FOLDER = Path("logs") / "search" / "s"
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class Ended:
    """How a search has ended, and what it has left."""

    code: int
    output: str
    errors: str
    trials: list[FrozenTrial]
    rows: list[dict[str, str]]

    @property
    def scores(self) -> list[float | None]:
        return [trial.value for trial in self.trials]

    @property
    def states(self) -> list[TrialState]:
        return [trial.state for trial in self.trials]


def search(*flags: str, trial: dict[str, Any] | None = None, **changes: Any) -> Ended:
    """A search in this process and in the working directory."""
    config = {**TINY, "overrides": {**TINY_TRIAL, **(trial or {})}, **changes}
    Path("search.yaml").write_text(yaml.safe_dump(config))
    code, output, errors = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main(["search", "--config=search.yaml", *flags])
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Ended(code, output.getvalue(), errors.getvalue(), trials(), rows())


def study(folder: Path = FOLDER) -> optuna.Study:
    """The study in the journal of a folder."""
    storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return optuna.load_study(study_name=folder.name.partition(".")[0], storage=storage)


def trials(folder: Path = FOLDER) -> list[FrozenTrial]:
    """Everything that the study of a folder holds."""
    return study(folder).trials if (folder / "study.journal").exists() else []


def rows() -> list[dict[str, str]]:
    if not (FOLDER / "trials.csv").exists():
        return []
    with (FOLDER / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """`with new_folder() as path`: a working directory for what several tests look at."""

    @contextlib.contextmanager
    def enter() -> Iterator[Path]:
        with pytest.MonkeyPatch.context() as patch:
            folder = tmp_path_factory.mktemp("search")
            patch.chdir(folder)
            yield folder

    return enter


class Fault(Callback):
    """Lets trials go wrong by their dropout: `kinds` is for example `{"0.1": "raise"}`."""

    def __init__(self, kinds: dict[str, str]) -> None:
        self.kinds = kinds

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        kind = self.kinds.get(str(pl_module.hparams["dropout"]))
        if kind == "raise":
            raise LookupError("this dropout is not liked")
        if kind == "broken" and Path("broken").exists():  # the trial's own database, not that of the search
            raise OperationalError("SELECT 1", {}, Exception("this dropout is not liked"))
        if kind == "die with seed 43" and os.environ["PL_GLOBAL_SEED"] == "43":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "memory":
            torch.empty(1 << 60)
        if kind == "die" or (kind == "die once" and not Path("died once").exists()):
            Path("died once" if kind == "die once" else "died").touch()
            with Path("deaths").open("a") as file:
                file.write(f"{os.getpid()}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "SIGTERM me" and not Path("deaths").exists():
            Path("deaths").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        if kind in ("SIGINT", "SIGTERM"):
            search_process = parent_process()
            assert search_process is not None
            assert search_process.pid is not None
            Path("signalled").touch()
            os.kill(search_process.pid, getattr(signal, kind))
            time.sleep(60)


def faults(kinds: dict[float, str]) -> dict[str, Any]:
    """Settings of a search with that callback."""
    by_dropout = {str(dropout): kind for dropout, kind in kinds.items()}
    callback = {"class_path": "test_search.Fault", "init_args": {"kinds": by_dropout}}
    Path("faults.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    return {"configs": ["faults.yaml"]}


def dropouts(*values: float) -> dict[str, Any]:
    return {"model.dropout": {"choices": list(values)}}


# Resume: n_trials is the total


@pytest.fixture(scope="module")
def plain(new_folder: Callable[[], Any]) -> dict[str, Ended]:
    with new_folder():
        ended = {"first": search(), "same": search()}
        with (FOLDER / "study.journal").open("a") as file:
            file.write('{"op_code": 4')  # as a full disk or a kill leaves it
        ended["more"] = search(n_trials=5)
    with new_folder():
        ended["again"] = search()
    return ended


def test_search_ends_with_its_trials_its_best_and_its_report(plain: dict[str, Ended]) -> None:
    first = plain["first"]
    assert first.code == 0, first.errors
    assert first.states == [TrialState.COMPLETE] * 3
    assert first.output.splitlines()[-1] == str(FOLDER)
    best = max(range(3), key=lambda number: first.trials[number].value or 0)
    [line] = [line for line in first.output.splitlines() if line.startswith(f"best: trial {best}; ")]
    assert line.endswith(f" fit --config {FOLDER}/best.yaml")
    assert len([line for line in first.output.splitlines() if re.match(r"trial \d: val/acc \d", line)]) == 3
    assert first.errors == ""


def test_larger_n_trials_goes_on_with_other_points_and_the_same_number_does_nothing(plain: dict[str, Ended]) -> None:
    first, same, more = plain["first"], plain["same"], plain["more"]
    assert same.code == more.code == 0
    assert [trial.datetime_complete for trial in (*same.trials, *more.trials[:3])] == [
        trial.datetime_complete for trial in first.trials * 2
    ]
    assert more.states == [TrialState.COMPLETE] * 5
    assert len({trial.params["model.lr"] for trial in more.trials}) == 5


def test_search_with_the_same_seed_is_the_same(plain: dict[str, Ended]) -> None:
    first, again = ([(trial.params, trial.value) for trial in plain[name].trials] for name in ("first", "again"))
    assert first == again


# Results


@pytest.fixture(scope="module")
def pair(new_folder: Callable[[], Any]) -> tuple[Path, Ended, Ended]:
    """Two workers, the best trial trained again; and the same command once more."""
    wish = {"workers": 2, "n_trials": 4, "confirm": {"top": 1, "seeds": 2}}
    with new_folder() as folder:
        return folder, search(trial={"trainer.max_epochs": 2}, **wish), search(trial={"trainer.max_epochs": 2}, **wish)


def test_best_three_have_the_only_checkpoints_and_fit_repeats_the_best_score(pair: tuple[Path, Ended, Ended]) -> None:
    folder, ended, _ = pair
    text = (folder / FOLDER / "best.yaml").read_text()
    assert "num_threads" not in yaml.safe_load(text)  # of a worker; a machine has more
    [num_threads] = re.findall(r"--num_threads (\d+) ", text)
    best, *others = sorted(ended.trials, key=lambda trial: -(trial.value or 0))
    cli = main(["fit", f"--config={folder / FOLDER / 'best.yaml'}", f"--num_threads={num_threads}"])
    assert float(cli.trainer.callback_metrics["val/acc_best"]) == best.value
    kept = {path.parents[1].name for path in (folder / FOLDER / "trials").glob("*/checkpoints/best.ckpt")}
    assert kept == {f"{trial.number:04d}" for trial in (best, *others[:2])}


def test_each_trial_is_a_row_and_a_run_directory(pair: tuple[Path, Ended, Ended]) -> None:
    folder, ended, _ = pair
    assert list(ended.rows[0]) == ["number", "state", "val/acc", "model.lr", "seconds", "run_dir", "error"]
    for trial, row in zip(ended.trials, ended.rows, strict=True):
        assert (int(row["number"]), row["state"]) == (trial.number, "COMPLETE")
        assert (float(row["val/acc"]), float(row["model.lr"])) == (trial.value, trial.params["model.lr"])
        facts = json.loads((folder / row["run_dir"] / "metrics.json").read_text())
        assert (facts["val/acc_best"], facts["seconds"]) == (trial.value, float(row["seconds"]))
        assert "test/acc" not in facts


def test_best_is_confirmed_with_other_seeds_once(pair: tuple[Path, Ended, Ended]) -> None:
    folder, ended, again = pair
    best = max(ended.trials, key=lambda trial: trial.value or 0).number
    assert re.search(rf"trial {best}: val/acc .* in the search, .* ± .* with 2 other seeds", ended.output)
    assert "with 2 other seeds" in again.output
    configs = sorted((folder / FOLDER / "confirm").glob("*/config.yaml"))
    assert [yaml.safe_load(config.read_text())["seed_everything"] for config in configs] == [43, 44]
    assert all(config.stat().st_mtime < (folder / "search.yaml").stat().st_mtime for config in configs)


def test_parameters_that_are_complete_are_not_trained_again() -> None:
    ended = search(n_trials=6, sampler=RANDOM, space=dropouts(0.0, 0.2))
    assert ended.states == [TrialState.COMPLETE] * 6
    assert len(list((FOLDER / "trials").iterdir())) == 2
    assert len({(trial.params["model.dropout"], trial.value) for trial in ended.trials}) == 2
    assert len({(row["model.dropout"], row["run_dir"]) for row in ended.rows}) == 2


# Trials that go wrong


@pytest.fixture(scope="module")
def faulty(new_folder: Callable[[], Any]) -> tuple[Path, Ended]:
    space = dropouts(0.0, 0.1, 0.2, 0.3, 0.4)
    with new_folder() as folder:
        kinds = faults({0.1: "raise", 0.2: "memory", 0.3: "die", 0.4: "die once"})
        return folder, search(n_trials=5, sampler=GRID, space=space, **kinds)


def test_search_goes_on_whatever_becomes_of_a_trial(faulty: tuple[Path, Ended]) -> None:
    _, ended = faulty
    assert ended.code == 0, ended.errors
    states = sorted((row["model.dropout"], row["state"]) for row in ended.rows)
    assert [state for _, state in states] == ["COMPLETE", "FAIL", "FAIL", "FAIL", "COMPLETE"]
    assert set(ended.states) <= set(FINISHED)


def test_failure_has_its_traceback_and_its_reason(faulty: tuple[Path, Ended]) -> None:
    folder, ended = faulty
    errors = {row["model.dropout"]: row["error"] for row in ended.rows}
    assert errors["0.1"] == "LookupError: this dropout is not liked"
    assert 'raise LookupError("this dropout is not liked")' in (folder / FOLDER / "workers.log").read_text()
    assert errors["0.2"] == "out of memory"
    assert errors["0.3"]


def test_parameters_whose_worker_died_run_again_once(faulty: tuple[Path, Ended]) -> None:
    _, ended = faulty
    tries = {
        dropout: [trial for trial in ended.trials if trial.user_attrs["params"]["model.dropout"] == dropout]
        for dropout in (0.3, 0.4)
    }
    assert [trial.state for trial in tries[0.3]] == [TrialState.FAIL] * 2
    assert [trial.state for trial in tries[0.4]] == [TrialState.FAIL, TrialState.COMPLETE]
    for first, second in tries.values():
        assert second.system_attrs["retry_history"] == [first.number]
        assert first.user_attrs["error"] == "its worker died"


def test_stopped_worker_is_not_the_fault_of_its_parameters() -> None:
    ended = search(n_trials=1, space=dropouts(0.1), **faults({0.1: "SIGTERM me"}))
    assert ended.states == [TrialState.FAIL, TrialState.COMPLETE]
    assert [row["number"] for row in ended.rows] == ["1"]


def test_combination_that_no_model_can_have_and_a_loss_that_is_no_number_are_failures() -> None:
    """Each value alone would do; four stages leave no pixel of a small image."""
    stages: dict[str, Any] = {"data.image_size": {"choices": [28, 8]}, "model.channels": {"choices": [[4] * 4, [4]]}}
    loss = {"metric": "val/loss", "direction": "minimize", "value": "last"}
    others = {key: value for key, value in TINY_TRIAL.items() if key not in stages}
    space = {"model.lr": {"choices": [0.01, 1e30]}, **stages}
    ended = search(n_trials=8, sampler=GRID, space=space, objective=loss, overrides=others)

    assert ended.code == 0, ended.errors
    assert len(ended.rows) == 8
    for row in ended.rows:
        too_deep = (row["data.image_size"], row["model.channels"]) == ("8", "[4, 4, 4, 4]")
        assert ("pixel" in row["error"]) == too_deep
        assert ("not a number" in row["error"]) == (not too_deep and row["model.lr"] == "1e+30")
        assert row["state"] == ("FAIL" if row["error"] else "COMPLETE")


def test_search_whose_first_trials_all_fail_stops_until_the_cause_is_gone() -> None:
    space = {"model.dropout": {"choices": [0.1]}, **TINY["space"]}  # type: ignore[dict-item]
    settings: dict[str, Any] = {"n_trials": 5, "timeout": 60, "space": space, **faults({0.1: "broken"})}
    Path("broken").touch()
    ended = search(**settings)
    assert ended.code == 1
    assert "this dropout is not liked" in ended.errors
    assert ended.states == [TrialState.FAIL] * 3
    Path("broken").unlink()
    ended = search(**settings)
    assert (ended.code, ended.states[3:]) == (0, [TrialState.COMPLETE] * 2)


def test_worker_that_dies_costs_one_confirmation() -> None:
    kinds = faults({0.1: "die with seed 43"})
    ended = search(n_trials=1, space=dropouts(0.1), confirm={"top": 1, "seeds": 3}, **kinds)
    assert ended.code == 0
    assert "trial 0 with seed 43: failed: its worker died" in ended.output
    assert "with 2 other seeds" in ended.output


def test_unknown_metric_ends_the_search_at_once() -> None:
    ended = search(objective={"metric": "val/accuracy"})
    assert ended.code == 2
    assert "val/accuracy" in ended.errors
    assert [state for state in ended.states if state != TrialState.WAITING] == [TrialState.FAIL]
    mended = search(n_trials=1)
    assert mended.code == 0, mended.errors
    assert mended.states == [TrialState.COMPLETE]


# Other settings


def test_changed_question_is_refused_with_the_difference_and_fresh_begins_anew() -> None:
    before = search(n_trials=1)
    wider = {"model.lr": {"low": 0.001, "high": 0.2, "log": True}}

    refused = search(n_trials=1, space=wider)
    assert refused.code == 2
    assert "space.model.lr.high" in refused.errors
    assert "--fresh" in refused.errors
    ended = search(n_trials=1, trial={"model.channels": [8]})
    assert (ended.code, ended.scores) == (2, before.scores)

    # What leaves trials comparable may change, and an earlier version may have had no key that is null now.
    about = study().user_attrs["about"]
    assert about["base"].pop("trainer.profiler") is None
    study().set_user_attr("about", about)
    allowed = search(n_trials=2, workers=2, sampler=RANDOM, trial={"data.data_dir": "elsewhere"})
    assert allowed.code == 0, allowed.errors
    assert allowed.scores[:1] == before.scores

    fresh = search("--fresh", n_trials=1, space=wider)
    assert fresh.code == 0, fresh.errors
    assert len(fresh.trials) == 1
    assert [trial.value for trial in trials(FOLDER.with_name("s.1"))] == allowed.scores
    assert (FOLDER.with_name("s.1") / "best.yaml").is_file()


def test_timeout_ends_a_search() -> None:
    start = time.monotonic()
    ended = search(n_trials=1000, timeout=1.5)
    assert ended.code == 0, ended.errors
    assert 1 <= len(ended.trials) < 100
    assert set(ended.states) == {TrialState.COMPLETE}
    assert time.monotonic() - start < 30


def test_search_never_reads_the_test_set(mnist_dir: Path) -> None:
    linked(Path("data"), mnist_dir, "train-*")
    data = {"data.dataset": "mnist", "data.data_dir": "data", "data.download": False, "data.val_size": 5000}
    ended = search(n_trials=1, trial=data)
    assert ended.code == 0, ended.errors
    assert ended.states == [TrialState.COMPLETE]


# Searches that are stopped


def child(**changes: Any) -> BaseProcess:
    Path("search.yaml").write_text(yaml.safe_dump({**TINY, "overrides": TINY_TRIAL, **changes}))
    return begun(Path.cwd(), ["search", "--config=search.yaml"])


def wait_for(num_trials: int, process: BaseProcess) -> None:
    """Wait until a search in another process has begun as many trials."""
    deadline = time.monotonic() + 60
    while _num_begun() < num_trials:
        assert process.is_alive(), printed(Path.cwd())
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("kind", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_stopped_search_says_how_to_go_on(kind: str, code: int) -> None:
    space = {"model.dropout": {"choices": [0.0, 0.1]}}
    ended = search(n_trials=2, space=space, sampler=GRID, workers=2, **faults({0.1: kind}))
    assert time.time() - Path("signalled").stat().st_mtime < 10
    assert ended.code == code
    assert [kind in ended.errors, len(ended.errors.splitlines())] == [True, 2]
    assert ended.errors.endswith("python -m mnist_lit search --config=search.yaml\n")
    assert TrialState.RUNNING not in ended.states
    assert "its search was stopped" in {trial.user_attrs.get("error") for trial in ended.trials}


def test_search_that_draws_nothing_but_duplicates_can_be_stopped() -> None:
    process = child(n_trials=100_000, space=dropouts(0.1), sampler=RANDOM)
    wait_for(20, process)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 143


def test_search_is_alone_on_its_journal_and_loses_nothing_when_it_is_killed() -> None:
    """Begin another one meanwhile, kill it twice, look at what is left each time, and let it end at last."""
    process = child(n_trials=100, workers=2)
    wait_for(3, process)
    refused = search("--n_trials=100")
    assert refused.code == 2
    assert str(FOLDER) in refused.errors
    assert len(refused.errors.splitlines()) == 2
    assert len(workers()) >= 2
    kept = kill(process)
    deadline = time.monotonic() + 10
    while workers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not workers()

    num_begun = _num_begun()
    settings: dict[str, Any] = {"n_trials": num_begun + 4, "workers": 2}
    process = child(**settings)
    wait_for(num_begun + 1, process)
    time.sleep(random.uniform(0, 0.7))
    now = kill(process)
    assert kept.items() <= now.items()
    ended = search(**settings)

    assert ended.code == 0, ended.errors
    assert {row["state"] for row in ended.rows} == {"COMPLETE"}
    assert now.items() <= {trial.number: trial.value for trial in ended.trials}.items()
    assert set(ended.states) <= {TrialState.COMPLETE, TrialState.FAIL}
    assert len({row["model.lr"] for row in ended.rows}) == len(ended.rows) == settings["n_trials"]
    assert {str(path) for path in (FOLDER / "trials").iterdir()} == {row["run_dir"] for row in ended.rows}


def kill(process: BaseProcess) -> dict[int, float | None]:
    """Kill a search; its complete trials."""
    process.kill()
    process.join()
    return {trial.number: trial.value for trial in trials() if trial.state == TrialState.COMPLETE}


def _num_begun() -> int:
    with contextlib.suppress(OSError, KeyError, ValueError):
        return len(trials())
    return 0


def workers(search_dir: Path = FOLDER) -> list[int]:
    """List the processes that print to the log of the workers of a search."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "fd" / "1").resolve() == (search_dir / "workers.log").resolve():
                found.append(int(folder.name))
    return found
