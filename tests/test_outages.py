"""Searches whose workers are killed and whose database goes away: exactly as many results as were asked for."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from postgresql import Server, serving
from test_search import study, workers
from test_storages import SCRIPT, config, numbers, opened

FOLDER = Path("logs/search/tiny")
NUM_TRIALS = 100
OVERRIDES = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 2, "model.channels": [4], "model.hidden": []}
TINY: dict[str, Any] = {"n_trials": NUM_TRIALS, "workers": 8, "overrides": {**OVERRIDES, "checkpoint.enabled": False}}


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of the test's own, to do harm to."""
    with serving() as server:
        yield server


@pytest.fixture
def search(processes: list["subprocess.Popen[Any]"]) -> Callable[..., "subprocess.Popen[bytes]"]:
    """`search(storage)`: a search of 100 tiny trials with eight workers, as a process that writes to `log`."""

    def start(storage: str | None) -> "subprocess.Popen[bytes]":
        with Path("log").open("wb") as log:
            command = [sys.executable, SCRIPT, config(storage=storage, **TINY)]
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        processes.append(process)
        return process

    return start


def kill_workers(search: "subprocess.Popen[bytes]", moments: random.Random) -> int:
    """Kill workers at random moments until the search ends; how many."""
    deadline = time.monotonic() + 900
    num_killed = 0
    while search.poll() is None:
        assert time.monotonic() < deadline, Path("log").read_text()
        time.sleep(moments.uniform(0, 6))
        if (FOLDER / "overlays").exists() and (alive := workers(FOLDER)):
            with suppress(ProcessLookupError):
                os.kill(moments.choice(alive), signal.SIGKILL)
                num_killed += 1
    return num_killed


def assert_exactly_100(storage: str | None) -> Counter[TrialState]:
    """Each of 100 parameters has one result, whatever was lost on the way; how all trials have ended."""
    everything = (study(FOLDER) if storage is None else opened(storage)).trials
    retried = {number for trial in everything for number in trial.system_attrs.get("retry_history", [])}
    results = [trial for trial in everything if trial.number not in retried]
    assert len(results) == NUM_TRIALS
    assert len({str(trial.params) for trial in results}) == NUM_TRIALS
    for trial in results:
        assert trial.state == TrialState.COMPLETE or len(trial.system_attrs["retry_history"]) == 1
    assert numbers(FOLDER) == [trial.number for trial in results]
    states = Counter(trial.state for trial in everything)
    assert set(states) <= {TrialState.COMPLETE, TrialState.FAIL}, "none runs, none waits"
    return states


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_eight_workers_that_are_killed_finish_exactly_100(
    kind: str, search: Callable[..., "subprocess.Popen[bytes]"], request: pytest.FixtureRequest
) -> None:
    storage = None if kind == "journal" else request.getfixturevalue("server").database("tiny")
    process = search(storage)
    num_killed = kill_workers(process, random.Random(7))
    assert process.returncode == 0, Path("log").read_text()
    states = assert_exactly_100(storage)
    assert num_killed > 2
    assert states[TrialState.FAIL] > 0, "some were in the middle of a trial"


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "seconds"), [(signal.SIGQUIT, 0.0), (signal.SIGQUIT, 10.0), (signal.SIGINT, 30.0)])
def test_search_outlives_an_outage_of_its_database(
    signum: int, seconds: float, server: Server, search: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    storage = server.database("tiny")
    process = search(storage)
    for num_begun in (20, 50, 80):
        while len(list((FOLDER / "overlays").glob("*"))) < num_begun and process.poll() is None:
            time.sleep(0.01)
        server.stop(signum)
        time.sleep(seconds)
        server.start()
    assert process.wait(timeout=600) == 0, Path("log").read_text()
    assert_exactly_100(storage)
    assert "waiting for the database" in Path("log").read_text()


@pytest.mark.slow
def test_search_that_waits_for_its_database_can_be_stopped(
    server: Server, search: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    storage = server.database("tiny")
    process = search(storage)
    while b"trial 10: " not in Path("log").read_bytes():
        assert process.poll() is None
        time.sleep(0.1)
    server.stop()
    while b"waiting for the database" not in Path("log").read_bytes():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert Path("log").read_text().splitlines()[-2:] == [
        "stopped by SIGINT",
        "what was done is kept; go on with: python -m mnist_lit search --config=search.yaml",
    ]
    server.start()
    assert search(storage).wait(timeout=600) == 0, Path("log").read_text()
    assert_exactly_100(storage)
