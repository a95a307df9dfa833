"""Storages of a study: a journal, SQLite, and PostgreSQL for machines that share nothing else."""

import csv
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from conftest import CONFIGS, PROJECT
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from postgresql import Server, serving
from runs import begun, printed
from sqlalchemy import NullPool

from mnist_lit import main
from mnist_lit.search.study import Study

SCRIPT = str(PROJECT / "scripts" / "optuna_search.py")


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Server]:
    """A real server on this machine."""
    with serving() as server:
        yield server


@pytest.fixture
def postgresql(postgresql_server: Server, request: pytest.FixtureRequest) -> str:
    """The URL of a new, empty database."""
    return postgresql_server.database(f"test_{abs(hash(request.node.name))}")


def config(folder: Path = Path(), **changes: Any) -> str:
    """The flag for a search of tiny trials: two batches of digits."""
    settings = {
        "study_name": "tiny",
        "n_trials": 3,
        "configs": [str(CONFIGS / "base.yaml"), str(CONFIGS / "digits.yaml")],
        "overrides": {"trainer.max_epochs": 1, "trainer.limit_train_batches": 2, "model.channels": [4]},
        "sampler": {"class_path": "optuna.samplers.RandomSampler", "init_args": {"seed": 1}},
        "space": {"model.lr": {"low": 0.001, "high": 0.1, "log": True}},
        **changes,
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return f"--config={folder / 'search.yaml'}"


def opened(storage: str, name: str = "tiny") -> optuna.Study:
    """The study as Optuna alone sees it."""
    place = RDBStorage(storage, engine_kwargs={"poolclass": NullPool})  # no connection is left open
    return optuna.load_study(study_name=name, storage=place)


def finished(study: optuna.Study) -> list[int]:
    return [trial.number for trial in study.trials if trial.state == TrialState.COMPLETE]


def numbers(folder: Path) -> list[int]:
    with (folder / "trials.csv").open(encoding="utf-8") as file:
        return [int(row["number"]) for row in csv.DictReader(file)]


def test_a_search_on_a_database_goes_on_and_begins_anew() -> None:
    storage = "sqlite:///study.db"
    flag = config(storage=storage, n_trials=2)
    main(["search", flag])
    first = [trial.values for trial in opened(storage).trials]
    main(["search", flag, "--n_trials=3"])
    study = opened(storage)
    second = [trial.values for trial in study.trials]
    assert finished(study) == numbers(Path("logs/search/tiny")) == [0, 1, 2]
    assert second[:2] == first
    assert len({str(trial.params) for trial in study.trials}) == 3

    main(["search", flag, "--n_trials=1", "--fresh"])
    assert finished(opened(storage)) == numbers(Path("logs/search/tiny")) == [0]
    assert [trial.values for trial in opened(storage, "tiny.1").trials] == second
    assert numbers(Path("logs/search/tiny.1")) == [0, 1, 2]
    assert not list(Path("logs").rglob("study.journal"))


def test_outage_while_a_trial_begins_costs_neither_worker_nor_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    trial_id = Study.trial_id

    def fails_once(*_: Any) -> int:
        monkeypatch.setattr(Study, "trial_id", trial_id)
        raise StorageInternalError("it is away")

    monkeypatch.setattr(Study, "trial_id", fails_once)
    monkeypatch.setattr("mnist_lit.search.study.GRACE_PERIOD", 2)
    monkeypatch.setattr("mnist_lit.search.driver.HEARTBEAT", 1)
    main(["search", config(storage="sqlite:///study.db", n_trials=1)])
    assert finished(opened("sqlite:///study.db")) == numbers(Path("logs/search/tiny")) == [1]


def test_a_server_that_does_not_answer(fails: Callable[..., str]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        port = nobody.getsockname()[1]
        error = fails("search", config(storage=f"postgresql://mnist:secret@127.0.0.1:{port}/mnist"), code=1)
    assert f"storage: postgresql://mnist:***@127.0.0.1:{port}/mnist" in error
    assert not list(Path("logs").rglob("search.yaml"))


@pytest.mark.parametrize("url", ["somewhere", "postgresq://mnist:secret@localhost/mnist", "postgresql:mnist"])
def test_what_is_no_url(url: str, fails: Callable[..., str]) -> None:
    error = fails("search", config(storage=url))
    assert f"storage: {url.partition(':')[0]}" in error
    assert "secret" not in error


def test_postgresql_without_its_driver_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[..., str]
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as if it were not installed
    error = fails("search", config(storage="postgresql://mnist:secret@localhost/mnist"))
    assert ("mnist_lit[postgresql]" in error, "secret" in error) == (True, False)


def test_two_machines_finish_one_study_together(postgresql: str, tmp_path: Path) -> None:
    num_trials, started = 8, []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        args = ["search", config(tmp_path / name, storage=postgresql, n_trials=num_trials)]
        started.append(begun(tmp_path / name, args))
    for process in started:
        process.join(200)
    logs = [text for name in ("one", "two") for text in printed(tmp_path / name)]
    assert [process.exitcode for process in started] == [0, 0], logs
    study = opened(postgresql)
    assert num_trials <= len(study.trials) <= num_trials + 1, "both may begin the last one at the same moment"
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}
    assert len({str(trial.params) for trial in study.trials}) == len(study.trials)
    shares = {name: len(list(tmp_path.glob(f"{name}/logs/search/tiny/trials/*"))) for name in ("one", "two")}
    assert sum(shares.values()) == len(study.trials)
    assert min(shares["one"], shares["two"]) > 0
    for name in ("one", "two"):
        folder = tmp_path / name / "logs/search/tiny"
        assert numbers(folder) == finished(study)
        for file in ("best.yaml", "report/index.html", "search.yaml"):
            assert "swordfish" not in (folder / file).read_text(encoding="utf-8")
    assert "swordfish" not in "".join(logs)
