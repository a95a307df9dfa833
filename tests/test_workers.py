"""Workers: processes that do one job after another, whose death is noticed, and that leave nothing behind."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from test_search import group, wait_for_the_end_of

from mnist_lit.errors import MNISTLitError, Stopped, UsageError
from mnist_lit.search.workers import Died, Pool, Report, print_to


class Awkward(Exception):
    """Cannot be made again from what a pickle keeps of it."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


@dataclass(frozen=True)
class Do:
    """A job by name."""

    what: str
    value: Any = None

    def run(self, ask: Any) -> Any:
        return getattr(self, self.what)(ask)

    def echo(self, ask: Any) -> Any:
        return self.value

    def report(self, ask: Any) -> Any:
        return [ask(step, [float(step)]) for step in range(self.value)]

    def fail(self, ask: Any) -> None:
        error, argument = self.value
        raise error(argument)

    def fail_awkwardly(self, ask: Any) -> None:
        raise Awkward("a", "b")

    def facts(self, ask: Any) -> Any:
        return os.getpid(), Path.cwd(), os.environ.get("WORD")

    def die(self, ask: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(self, ask: Any) -> None:
        os._exit(3)

    def die_with_a_child(self, ask: Any) -> None:
        # As PyTorch's data workers do, it has its parent's end of the pipe.
        if os.fork() == 0:
            time.sleep(120)
        os.kill(os.getpid(), signal.SIGKILL)

    def sleep_with_a_child(self, ask: Any) -> None:
        subprocess.Popen(["sleep", "120"])
        Path("leader").write_text(str(os.getpid()))
        time.sleep(120)

    def speak(self, ask: Any) -> None:
        print_to(self.value)
        print("said")
        subprocess.run(["echo", "echoed"], check=True)


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool() as pool:
        yield pool


def ends(pool: Pool, num: int = 1) -> list[tuple[Any, Any]]:
    """The tasks and results of the next jobs that end."""
    found: list[tuple[Any, Any]] = []
    deadline = time.monotonic() + 60
    while len(found) < num:
        assert time.monotonic() < deadline
        for worker, task, message in pool.messages(timeout=1.0):
            if isinstance(message, Report):
                worker.answer(is_hopeless=message.step == 1)
            else:
                found.append((task, message))
    return found


def test_worker_does_one_job_after_another(pool: Pool) -> None:
    pids = {pool.call(Do("facts"))[0] for _ in range(3)}

    assert len(pids) == 1
    assert pids != {os.getpid()}


def test_workers_work_at_the_same_time_in_the_same_folder(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORD", "given")
    for number, worker in enumerate(pool.idle(2)):
        worker.start(Do("facts"), number)
    assert list(pool.idle(2)) == []

    done = dict(ends(pool, 2))

    assert done[0][0] != done[1][0]
    assert {facts[1:] for facts in done.values()} == {(Path.cwd(), "given")}
    assert len(list(pool.idle(2))) == 2


def test_worker_waits_for_the_answer_to_its_report(pool: Pool) -> None:
    next(pool.idle(1)).start(Do("report", 3), "task")

    assert ends(pool) == [("task", [False, True, False])]


@pytest.mark.parametrize(
    ("error", "argument", "kind", "message"),
    [
        (UsageError, "mistyped", UsageError, "mistyped"),
        (MNISTLitError, "broken", MNISTLitError, "broken"),
        (Stopped, signal.SIGTERM, MNISTLitError, "stopped by SIGTERM"),
        (ValueError, "odd", MNISTLitError, "ValueError: odd"),
    ],
)
def test_error_of_a_job_is_raised(
    pool: Pool, error: type[BaseException], argument: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as caught:
        pool.call(Do("fail", (error, argument)))

    assert (type(caught.value), str(caught.value)) == (kind, message)


def test_error_that_no_pickle_keeps_is_raised(pool: Pool) -> None:
    with pytest.raises(MNISTLitError, match="Awkward: a b") as caught:
        pool.call(Do("fail_awkwardly"))

    assert "in fail_awkwardly" in caught.value.__notes__[0]


@pytest.mark.parametrize(("what", "reason"), [("die", "SIGKILL"), ("leave", "exit code 3")])
def test_dead_worker_is_noticed_and_replaced(pool: Pool, what: str, reason: str) -> None:
    next(pool.idle(1)).start(Do(what), "task")

    assert ends(pool) == [("task", Died(f"its worker died of {reason}"))]
    assert pool.call(Do("echo", 7)) == 7


def test_death_is_noticed_at_once_though_children_live_and_these_are_ended(pool: Pool) -> None:
    worker = next(pool.idle(1))
    pid = worker.process.pid
    pool.call(Do("echo"))
    start = time.monotonic()
    worker.start(Do("die_with_a_child"), "task")

    assert isinstance(ends(pool)[0][1], Died)
    assert time.monotonic() - start < 2
    assert pid is not None
    wait_for_the_end_of([pid])


def test_worker_that_dies_before_anything_can_be_done_is_an_error(pool: Pool) -> None:
    with pytest.raises(MNISTLitError, match="no job can be done: its worker died of exit code 3"):
        pool.call(Do("leave"))


def test_end_of_the_pool_is_that_of_its_workers_and_their_children() -> None:
    with Pool() as pool:
        next(pool.idle(1)).start(Do("sleep_with_a_child"), "task")
        while not Path("leader").exists() or not Path("leader").read_text():
            time.sleep(0.01)
        leader = int(Path("leader").read_text())
        assert len(group(leader)) == 2

    wait_for_the_end_of([leader])


def test_workers_end_with_the_process_that_made_them() -> None:
    process = get_context("forkserver").Process(target=_hold_a_pool, args=(Path.cwd(),))
    process.start()
    while not Path("leader").exists() or not Path("leader").read_text():
        time.sleep(0.01)
    leader = int(Path("leader").read_text())
    assert len(group(leader)) == 2

    process.kill()
    process.join()

    wait_for_the_end_of([leader])


def _hold_a_pool(folder: Path) -> None:
    os.chdir(folder)
    with Pool() as pool:
        pool.call(Do("sleep_with_a_child"))


def test_file_takes_all_that_a_job_prints(pool: Pool, capfd: pytest.CaptureFixture[str]) -> None:
    pool.call(Do("speak", Path("log")))
    pool.call(Do("speak", Path("log")))

    assert sorted(Path("log").read_text().split()) == ["echoed", "echoed", "said", "said"]
    assert capfd.readouterr() == ("", "")


def test_workers_are_spread_over_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    with Pool() as pool:
        pool.spread_over_gpus(2)
        seen = [environment["CUDA_VISIBLE_DEVICES"] for environment in pool.environments]

    assert seen == ["4", "6"]
