"""The study: which trials count, what becomes of those of dead searches, and which points a resumed search proposes."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from optuna.samplers import TPESampler
from optuna.trial import Trial, TrialState

from mnist_lit.errors import UsageError
from mnist_lit.search.settings import Settings
from mnist_lit.search.space import Space
from mnist_lit.search.study import OWNER, PARAMS, Study, open_study, set_aside

# The search itself keeps quiet about them.
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

DECLARED = {"model.dropout": {"low": 0.0, "high": 0.9}}
SETTINGS = Settings(space=DECLARED, study_name="s", configs=[])
FOLDER = Path("logs") / "search" / "s"


@pytest.fixture
def join() -> Iterator[Callable[[], Study]]:
    """`join()`: one more search of the study."""
    with ExitStack() as stack:

        def enter() -> Study:
            study = open_study(SETTINGS, {"space": DECLARED}, Space.parse(DECLARED))
            stack.enter_context(study.joined(SETTINGS.folder))
            return study

        yield enter


def begin(study: Study, limit: int = 9) -> Trial:
    """The next trial, with its parameters drawn."""
    trial = study.begin(limit)
    assert trial is not None
    trial.set_user_attr(PARAMS, Space.parse(DECLARED).draw(trial, {}))
    return trial


def die(study: Study) -> None:
    """What is left of a search when its process is killed."""
    study.lock.release()


def test_a_file_that_a_journal_names_is_left_alone(join: Callable[[], Study], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    secret.chmod(0o600)
    one, other = join(), join()
    begin(one).set_user_attr(OWNER, str(secret))

    other.take_over()

    assert (secret.read_text(), secret.stat().st_mode & 0o777) == ("key", 0o600)


def test_trials_of_a_living_search_are_left_alone(join: Callable[[], Study]) -> None:
    one, other = join(), join()
    begin(one)

    assert other.take_over() == []
    assert other.trials[0].state == TrialState.RUNNING


def test_trials_of_a_dead_search_run_again_with_their_parameters(join: Callable[[], Study]) -> None:
    one, other = join(), join()
    lost = begin(one)
    die(one)

    assert other.take_over() == [lost.number]
    assert other.take_over() == []
    again = begin(other)
    assert again.params == lost.params
    assert again.user_attrs["retry_of"] == lost.number
    assert [trial.number for trial in other.counted()] == [again.number]
    assert other.finished() == []


def test_search_killed_between_the_end_of_a_trial_and_its_repetition_loses_nothing(join: Callable[[], Study]) -> None:
    one, other = join(), join()
    lost = begin(one)
    one.note(lost.number, "num_losses", 0)
    one.note(lost.number, "lost", "its worker died")
    one.end(lost.number, TrialState.FAIL)

    assert other.take_over() == []  # that search is about to do it
    die(one)

    assert other.take_over() == [lost.number]
    assert begin(other).params == lost.params


def test_trial_that_had_no_parameters_yet_counts_for_nothing(join: Callable[[], Study]) -> None:
    one, other = join(), join()
    assert one.begin(1) is not None
    die(one)

    other.take_over()

    assert other.counted() == []
    assert begin(other, limit=1).number == 1


def test_worker_may_die_of_the_same_parameters_twice(join: Callable[[], Study]) -> None:
    study = join()
    first = begin(study)

    assert study.lose(first.number, "died", is_its_fault=True)
    second = begin(study)
    assert second.params == first.params
    assert not study.lose(second.number, "died", is_its_fault=True)

    assert [trial.number for trial in study.finished()] == [second.number]
    assert begin(study).params != first.params


def test_innocent_trial_runs_again_as_often_as_it_takes(join: Callable[[], Study]) -> None:
    study = join()
    trial = begin(study)
    for _ in range(4):
        params = trial.params
        assert study.lose(trial.number, "its search has died", is_its_fault=False)
        trial = begin(study)
        assert trial.params == params
    assert len(study.counted()) == 1


def test_no_more_trials_are_begun_than_wanted(join: Callable[[], Study]) -> None:
    one, other = join(), join()
    begin(one, limit=2)
    begin(other, limit=2)

    assert one.begin(2) is None
    assert other.begin(2) is None


def test_search_that_was_taken_for_dead_does_not_overwrite(join: Callable[[], Study]) -> None:
    one, other = join(), join()
    trial = begin(one)
    other.end(trial.number, TrialState.FAIL)

    assert not one.end(trial.number, TrialState.COMPLETE, [0.5])
    one.note(trial.number, "error", "late")
    assert one.trials[0].state == TrialState.FAIL
    assert "error" not in one.trials[0].user_attrs


def test_twin_is_the_first_trial_with_the_same_parameters(join: Callable[[], Study]) -> None:
    study = join()
    first = begin(study)
    for _ in range(2):
        study.enqueue_trial(first.params)
    second, third = begin(study), begin(study)

    assert study.twin(first) is None
    assert [twin.number for trial in (second, third) if (twin := study.twin(trial))] == [0, 0]
    study.lose(first.number, "the search was stopped", is_its_fault=False)
    assert study.twin(second) is None
    twin = study.twin(third)
    assert twin is not None
    assert twin.number == second.number


def test_exhausted_sampler_leaves_lost_trials_to_run(join: Callable[[], Study]) -> None:
    study = join()
    trial = begin(study)
    study.lose(trial.number, "died", is_its_fault=True)
    study.stop()

    assert not study.has_all(9)
    again = begin(study)
    study.end(again.number, TrialState.COMPLETE, [0.5])
    assert study.has_all(9)
    assert study.begin(9) is None


def test_scores_with_other_seeds_are_remembered(join: Callable[[], Study]) -> None:
    join().confirm(3, 43, 0.5)

    assert join().confirmed() == {3: {43: 0.5}}


def test_study_with_a_search_at_work_is_not_set_aside(join: Callable[[], Study]) -> None:
    study = join()

    with pytest.raises(UsageError, match="is running"):
        set_aside(SETTINGS)

    die(study)
    set_aside(SETTINGS)
    assert not FOLDER.exists()
    assert (FOLDER.with_name("s.1") / "study.journal").is_file()


def test_last_line_that_was_cut_off_is_dropped(join: Callable[[], Study]) -> None:
    study = join()
    begin(study)
    journal = FOLDER / "study.journal"
    lines = journal.read_bytes().splitlines()
    with journal.open("ab") as file:
        file.write(lines[-1][: len(lines[-1]) // 2])

    again = join()

    assert [trial.number for trial in again.trials] == [0]
    begin(again)
    assert all(json.loads(line) for line in journal.read_text().splitlines())


def test_searches_that_go_on_at_the_same_time_do_not_propose_the_same() -> None:
    settings: Any = Settings(space=DECLARED, study_name="s", configs=[], sampler=partial(TPESampler, seed=1))
    drawn = set()
    with ExitStack() as stack:
        for study in [open_study(settings, {"space": DECLARED}, Space.parse(DECLARED)) for _ in range(4)]:
            stack.enter_context(study.joined(settings.folder))
            drawn.add(begin(study).params["model.dropout"])

    assert len(drawn) == 4
