"""What a search has found: trials.csv, best.yaml, the table, the order of trials, the importance of keys."""

import csv
import json
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial

from mnist_lit.search.results import ranked, shown_score, summarize, table, write_results
from mnist_lit.search.settings import Objective, Settings
from mnist_lit.search.space import Space
from mnist_lit.search.study import COPY_OF, ERROR, LOST, NUM_LOSSES, OVERLAY, PARAMS, RETRY_OF, SECONDS, VOID, Study

SPACE: dict[str, Any] = {
    "model.lr": {"low": 0.001, "high": 0.1, "log": True},
    "model.channels": {"length": {"low": 1, "high": 3}, "items": {"choices": [4, 8]}},
    "model.dropout": {"low": 0.0, "high": 0.5, "when": {"model.lr": [0.01]}},
}
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
ACCURACY, LOSS = Objective(), Objective(metric="val/loss", direction="minimize")
PARAMETERS = Objective(metric="parameters", direction="minimize")
SECONDS_TAKEN = Objective(metric="seconds", direction="minimize")


def settings(*objectives: Objective, **changes: Any) -> Settings:
    wanted: Any = list(objectives) if len(objectives) > 1 else (objectives or [ACCURACY])[0]
    return Settings(**{"space": SPACE, "study_name": "digits", "objective": wanted, **changes})


def study(asked: Settings, *trials: dict[str, Any]) -> Study:
    """A study with these trials: `values`, `state`, and what a trial says of itself."""
    storage = InMemoryStorage()
    directions: Any = [objective.direction for objective in asked.objectives]
    optuna.create_study(study_name=str(asked.study_name), storage=storage, directions=directions)
    made = Study(str(asked.study_name), storage, None)
    for number, trial in enumerate(trials):
        made.add_trial(_trial(number, **trial))
    return made


def _trial(number: int, values: list[float] | None = None, state: TrialState | None = None, **about: Any) -> Any:
    params = about.pop(PARAMS, {"model.lr": 0.001 * (number + 1), "model.channels": [4, 8]})
    trial = create_trial(
        values=values,
        state=TrialState.COMPLETE if state is None else state,
        user_attrs={PARAMS: params, OVERLAY: {"trainer.max_epochs": 1, **params}, SECONDS: 1.5, **about},
    )
    # As Optuna keeps them: local, and without a time zone.
    trial.datetime_start = (NOON + timedelta(minutes=number)).astimezone().replace(tzinfo=None)
    if trial.state.is_finished():
        trial.datetime_complete = (NOON + timedelta(minutes=number, seconds=30)).astimezone().replace(tzinfo=None)
    return trial


def rows(asked: Settings) -> list[dict[str, str]]:
    with (asked.folder / "trials.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def written(asked: Settings, *trials: dict[str, Any]) -> Study:
    asked.folder.mkdir(parents=True)
    made = study(asked, *trials)
    write_results(made, asked)
    return made


FAILED = {"state": TrialState.FAIL, ERROR: 'RuntimeError: no "memory", sorry'}


# ---- trials.csv


def test_each_trial_has_a_row() -> None:
    asked = settings()
    written(asked, {"values": [0.1 + 0.2]}, FAILED, {"state": TrialState.PRUNED}, {"values": [0.5], COPY_OF: 0})
    complete, failed, pruned, copy = rows(asked)
    assert list(complete) == [
        *("number", "state", "val/acc", "model.lr", "model.channels", "model.dropout"),
        *("seconds", "started", "ended", "run_dir", "error"),
    ]
    assert complete["number"] == "0"
    assert float(complete["val/acc"]) == 0.1 + 0.2  # to the last digit
    assert json.loads(complete["model.channels"]) == [4, 8]
    assert complete["model.dropout"] == ""  # its condition is not met
    assert complete["run_dir"] == copy["run_dir"] == "logs/search/digits/trials/0000"
    assert (failed["state"], failed["error"], failed["val/acc"]) == ("failed", FAILED[ERROR], "")
    assert (pruned["state"], pruned["val/acc"]) == ("pruned", "")


def test_values_of_all_kinds_can_be_read_back() -> None:
    asked = settings(space={"a": {"choices": [None]}, "b": {"choices": [True]}, "c": {"choices": ["x,y"]}})
    written(asked, {"values": [0.5], PARAMS: {"a": None, "b": True, "c": "x,y"}})
    (row,) = rows(asked)
    assert [yaml.safe_load(row[key]) for key in "abc"] == [None, True, "x,y"]


def test_trials_that_run_again_or_were_too_many_have_no_row() -> None:
    asked = settings()
    lost = {"state": TrialState.FAIL, LOST: "its search has died", NUM_LOSSES: 0}
    surplus = {"state": TrialState.FAIL, VOID: True}
    written(asked, lost, {"values": [0.5], RETRY_OF: 0}, surplus, {"state": TrialState.RUNNING})
    assert [row["number"] for row in rows(asked)] == ["1"]


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/New_York"])
def test_times_are_told_with_their_zone(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", zone)
        time.tzset()
        try:
            asked = settings()
            made = written(asked, {"values": [0.5]})
            entry = summarize(made, asked, Space.parse(SPACE)).entries[0]
        finally:
            patch.undo()
            time.tzset()
    assert entry.started == NOON
    assert entry.ended == NOON + timedelta(seconds=30)
    assert rows(asked)[0]["started"] == "2026-11-21T12:00:00+00:00"


def test_several_objectives_have_a_column_each_and_none_twice() -> None:
    asked = settings(ACCURACY, PARAMETERS, SECONDS_TAKEN)
    written(asked, {"values": [0.9, 1000.0, 2.5], SECONDS: 0.0}, {"state": TrialState.FAIL, ERROR: "x"})
    first, failed = rows(asked)
    assert (first["val/acc"], first["parameters"], first["seconds"]) == ("0.9", "1000.0", "2.5")
    assert (failed["val/acc"], failed["parameters"], failed["seconds"]) == ("", "", "")
    assert (asked.folder / "trials.csv").read_text(encoding="utf-8").splitlines()[0].split(",").count("seconds") == 1


# ---- best.yaml


def test_the_best_overlay_says_what_it_is() -> None:
    asked = settings(configs=["configs/base.yaml", "my configs/digits.yaml"])
    best = {"model.lr": 0.012345678901234567, "model.channels": [8], "data.augment.rotation": 5}
    written(asked, {"values": [0.5]}, {"values": [0.91], PARAMS: best}, {"values": [0.9]})
    content = (asked.folder / "best.yaml").read_text(encoding="utf-8")
    comment = [line for line in content.splitlines() if line.startswith("#")]
    assert "3 trials of the study digits: val/acc 0.91" in comment[0]
    assert "(trial 1, 2026-11-21)" in comment[1]
    assert comment[2].startswith(
        "# python -m mnist_lit fit --config configs/base.yaml --config 'my configs/digits.yaml'"
    )
    assert comment[2].endswith("--config logs/search/digits/best.yaml")
    assert yaml.safe_load(content) == {
        "trainer": {"max_epochs": 1},
        "model": {"lr": 0.012345678901234567, "channels": [8]},
        "data": {"augment": {"rotation": 5}},
    }


def test_without_a_complete_trial_there_is_no_best_one() -> None:
    asked = settings()
    made = written(asked, FAILED, {"state": TrialState.PRUNED})
    assert not (asked.folder / "best.yaml").exists()
    assert summarize(made, asked, Space.parse(SPACE)).best == []
    assert len(table(made, asked).splitlines()) == 1


def test_only_the_best_checkpoints_are_kept() -> None:
    asked = settings(keep_checkpoints=2)
    trials: list[dict[str, Any]] = [{"values": [score]} for score in (0.5, 0.9, 0.7, 0.8)]
    for number in range(6):
        (asked.run_dir(number) / "checkpoints").mkdir(parents=True)
    made = study(asked, *trials, {"values": [0.9], COPY_OF: 1}, {"state": TrialState.RUNNING})
    write_results(made, asked)
    kept = [number for number in range(6) if (asked.run_dir(number) / "checkpoints").exists()]
    assert kept == [1, 3, 5]  # what still runs keeps its own


# ---- The order of trials


def test_more_or_less_is_better_and_the_first_of_equals() -> None:
    trials: list[dict[str, Any]] = [{"values": [score]} for score in (0.3, 0.7, 0.5, 0.7)]
    assert [trial.number for trial in ranked(study(settings(ACCURACY), *trials))] == [1, 3, 2, 0]
    assert [trial.number for trial in ranked(study(settings(LOSS), *trials))] == [0, 2, 1, 3]


def test_copies_and_trials_without_a_score_have_no_rank() -> None:
    made = study(settings(), {"values": [0.3]}, {"values": [0.9], COPY_OF: 0}, FAILED, {"state": TrialState.PRUNED})
    assert [trial.number for trial in ranked(made)] == [0]


def test_the_front_comes_first() -> None:
    """Trial 0 has the second-best accuracy but is worse than trial 1 in both; trial 2 is small."""
    asked = settings(ACCURACY, PARAMETERS)
    made = study(asked, {"values": [0.9, 900.0]}, {"values": [0.95, 800.0]}, {"values": [0.5, 10.0]})
    assert [trial.number for trial in ranked(made)] == [1, 2, 0]
    assert sorted(summarize(made, asked, Space.parse(SPACE)).best) == [1, 2]


# ---- For people


def test_the_table_shows_the_best_first() -> None:
    asked = settings(ACCURACY, PARAMETERS)
    short = {"model.lr": 0.01, "model.channels": [8], "model.dropout": 0.123456}
    made = study(asked, {"values": [0.9, 900.0]}, {"values": [0.95, 1234567.0], PARAMS: short})
    assert table(made, asked).splitlines() == [
        "trial  val/acc  parameters     lr  channels  dropout  seconds",
        "    1   95.00%   1,234,567   0.01       [8]    0.123      1.5",
        "    0   90.00%         900  0.001    [4, 8]               1.5",
    ]


def test_the_table_is_short_and_its_names_are_clear() -> None:
    keys = ["model.optimizer.init_args.momentum", "model.schedule.init_args.momentum", "model.lr"]
    asked = settings(space={key: {"low": 0.1, "high": 0.9} for key in keys})
    made = study(asked, *({"values": [number / 100], PARAMS: dict.fromkeys(keys, 0.5)} for number in range(40)))
    head, *lines = table(made, asked).splitlines()
    assert head.split() == ["trial", "val/acc", *keys[:2], "lr", "seconds"]
    assert [line.split()[0] for line in lines] == [str(number) for number in range(39, 29, -1)]


@pytest.mark.parametrize(
    ("metric", "score", "text"),
    [
        ("val/acc", 0.98765, "98.77%"),
        ("val/f1", 0.5, "50.00%"),
        ("val/loss", 0.012345678, "0.012346"),
        ("parameters", 1234567.0, "1,234,567"),
        ("seconds", 12.3456, "12.346"),
    ],
)
def test_scores_are_shown_as_people_read_them(metric: str, score: float, text: str) -> None:
    assert shown_score(metric, score) == text


# ---- Importances


def explored(*objectives: Objective) -> dict[str, float]:
    """Shares in a study whose score depends on the learning rate alone, best in the middle of its range."""
    asked = settings(*objectives)
    space = Space.parse({key: SPACE[key] for key in ("model.lr", "model.channels")})
    made = study(asked)
    made.sampler = optuna.samplers.RandomSampler(seed=0)
    for _ in range(120):
        trial = made.ask()
        params = space.draw(trial, {})
        trial.set_user_attr(PARAMS, params)
        loss = float((np.log10(params["model.lr"]) + 2) ** 2)
        made.tell(trial, [loss if objective.direction == "minimize" else 1 - loss for objective in asked.objectives])
    return summarize(made, asked, space).importances[-1]


@pytest.mark.parametrize("objectives", [[ACCURACY], [LOSS], [ACCURACY, LOSS]])
def test_the_key_that_matters_has_the_largest_share(objectives: list[Objective]) -> None:
    shares = explored(*objectives)
    assert list(shares) == ["model.lr", "model.channels"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["model.lr"] > 0.8


def test_two_trials_tell_nothing_of_importance() -> None:
    asked = settings()
    made = study(asked, {"values": [0.5]}, {"values": [0.6]})
    assert not any(summarize(made, asked, Space.parse(SPACE)).importances)


def test_values_from_a_journal_do_not_reach_the_terminal() -> None:
    asked = settings(space={"model.norm": {"choices": ["batch"]}})

    assert "\x1b" not in table(study(asked, {"values": [0.5], PARAMS: {"model.norm": "\x1b]0;x\x07"}}), asked)
