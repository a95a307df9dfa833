"""Storages of a study: a journal, SQLite, and PostgreSQL for machines that share nothing else."""

import csv
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from conftest import CONFIGS, PROJECT
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from postgresql import Server, serving
from sqlalchemy import NullPool

from mnist_lit import main
from mnist_lit.search.storage import JournalLock

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
        "overrides": {"trainer.max_epochs": 1, "trainer.limit_train_batches": 2, "model.hidden": []},
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


# ---- One search


def test_the_journal_is_read_by_plain_optuna() -> None:
    main(["search", config()])
    journal = JournalStorage(JournalFileBackend("logs/search/tiny/study.journal"))
    plain = optuna.load_study(study_name="tiny", storage=journal)
    assert finished(plain) == numbers(Path("logs/search/tiny")) == [0, 1, 2]


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


# ---- Storages that cannot be used


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`refused(url, code)`: the short error of a search with that storage, which shows no password."""

    def run(url: str, code: int) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["search", config(storage=url)])
        printed = capsys.readouterr()
        assert stop.value.code == code, printed.err
        assert len(printed.err.splitlines()) <= 2
        assert printed.err.startswith("error: storage: ")
        assert "secret" not in printed.err + printed.out
        assert not list(Path().rglob("search.yaml"))[1:], "nothing is written"
        return printed.err.removeprefix("error: storage: ").strip()

    return run


def test_a_server_that_does_not_answer(refused: Callable[..., str]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        port = nobody.getsockname()[1]
        error = refused(f"postgresql://mnist:secret@127.0.0.1:{port}/mnist", 1)
    assert error.startswith(f"postgresql://mnist:***@127.0.0.1:{port}/mnist cannot be used: ")
    assert "refused" in error


@pytest.mark.parametrize("url", ["somewhere", "postgresq://mnist:secret@localhost/mnist", "postgresql:mnist"])
def test_what_is_no_url(url: str, refused: Callable[..., str]) -> None:
    assert "is no URL of a database" in refused(url, 2)


def test_postgresql_without_its_driver_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as if it were not installed
    error = refused("postgresql://mnist:secret@localhost/mnist", 2)
    assert error.endswith("needs a driver that is not installed\npip install 'mnist_lit[postgresql]'")


# ---- A journal that is cut off


def test_line_that_was_cut_off_is_dropped_before_the_next_one(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    backend = JournalFileBackend(str(journal), lock_obj=JournalLock(journal))
    backend.append_logs([{"a": 1}, {"b": 2}])
    with journal.open("a") as file:
        file.write('{"c": 3')  # as a full disk or a kill leaves it

    backend.append_logs([{"d": 4}])

    assert list(backend.read_logs(0)) == [{"a": 1}, {"b": 2}, {"d": 4}]


# ---- Two searches that share nothing but the URL


@pytest.fixture
def machines(tmp_path: Path, processes: list["subprocess.Popen[Any]"]) -> Callable[..., "subprocess.Popen[str]"]:
    """`machines(name, url, ...)`: a search with a directory of its own."""

    def start(name: str, url: str, **changes: Any) -> "subprocess.Popen[str]":
        folder = tmp_path / name
        folder.mkdir()
        command = [sys.executable, SCRIPT, config(folder, storage=url, **changes)]
        with (tmp_path / f"{name}.log").open("w") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, text=True)
        processes.append(process)
        return process

    return start


def test_two_machines_finish_one_study_together(
    postgresql: str, machines: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    num_trials = 8
    started = [machines(name, postgresql, n_trials=num_trials) for name in ("one", "two")]
    for process in started:
        assert process.wait(timeout=200) == 0, (tmp_path / "one.log").read_text() + (tmp_path / "two.log").read_text()
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
            assert "secret" not in (folder / file).read_text(encoding="utf-8")
    assert "secret" not in (tmp_path / "one.log").read_text() + (tmp_path / "two.log").read_text()


@pytest.mark.slow
def test_the_trial_of_a_machine_that_is_gone_runs_again(
    postgresql: str, machines: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    """Its directory is out of sight: only its silence tells."""
    long = {"trainer.max_epochs": 40, "model.hidden": []}
    space = {"model.lr": {"choices": [0.001, 0.002, 0.003, 0.004]}}
    changes: dict[str, Any] = {"n_trials": 4, "overrides": long, "space": space}
    doomed = machines("doomed", postgresql, **changes)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("doomed/logs/search/tiny/trials/*")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    doomed.kill()
    shutil.move(tmp_path / "doomed", tmp_path.with_name(f"{tmp_path.name}-away"))  # another machine's disk
    other = machines("other", postgresql, **changes)
    assert other.wait(timeout=400) == 0, (tmp_path / "other.log").read_text()
    study = opened(postgresql)
    states = Counter(trial.state for trial in study.trials)
    assert states == {TrialState.COMPLETE: 4, TrialState.FAIL: 1}
    lost = next(trial for trial in study.trials if trial.state == TrialState.FAIL)
    again = next(trial for trial in study.trials if trial.system_attrs.get("retry_history"))
    assert again.system_attrs["retry_history"] == [lost.number]
    assert again.params == lost.params
    assert numbers(tmp_path / "other/logs/search/tiny") == finished(study)
