"""The report of a search: what is on the page, whatever the study holds."""

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from mnist_lit.search.report import write_report
from mnist_lit.search.settings import Objective, Settings

EVIL = "<script>alert('&amp;\"$x')</script>"
SPACE = {
    "model.lr": {"low": 1e-4, "high": 0.1, "log": True},
    "model.channels": {"length": {"low": 1, "high": 2}, "items": {"choices": [8, 16, 32]}},
    "model.pooling": {"choices": ["max", "avg"]},
    "model.kernel_size": {"choices": [3, 5], "when": {"model.pooling": "max"}},
}
PRUNED = TrialState.PRUNED
ACCURACY, SIZE = Objective(), Objective(metric="parameters", direction="minimize")


class Page(HTMLParser):
    """What is on a page: its text, its tables' rows of cells, its tags with their attributes."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source, self.text = file.read_text(encoding="utf-8"), ""
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        shown = re.sub(r"(<(script|style)>).*?(?=</)", r"\1", self.source, flags=re.DOTALL)
        self.feed(shown)
        self.headings = re.findall("<h2>(.*)</h2>", shown)
        self.plots = [json.loads(text) for text in re.findall(r'draw\("plot-[^{]*({[^<]*})\)', self.source)]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags and self.tags[-1][0] in ("td", "th"):
            self.tables[-1][-1][-1] += data.rstrip("\n")

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def column(self, name: str) -> list[str]:
        head, *rows = self.tables[-1]
        return [row[head.index(name)] for row in rows]


def trial(number: int, *values: float, state: TrialState = TrialState.COMPLETE, **attrs: Any) -> FrozenTrial:
    """A trial as the search leaves it: a list has one of Optuna's parameters for its length and for each item."""
    channels, pooling, lr = [[16], [16, 32], [8, 16]][number % 3], ["max", "avg"][number % 2], 10 ** -(1 + number % 4)
    kernel = {"model.kernel_size": 3 + 2 * (number % 3 % 2)} if pooling == "max" else {}
    sizes = {f"model.channels.{index}": size for index, size in enumerate(channels)}
    distributions: dict[str, BaseDistribution] = {
        "model.lr": FloatDistribution(1e-4, 0.1, log=True),
        "model.pooling": CategoricalDistribution(["max", "avg"]),
        "model.channels.length": IntDistribution(1, 2),
        **dict.fromkeys(kernel, CategoricalDistribution([3, 5])),
        **dict.fromkeys(sizes, CategoricalDistribution([8, 16, 32])),
    }
    params = {"model.lr": lr, "model.channels": channels, "model.pooling": pooling, **kernel}
    return create_trial(
        state=state,
        values=values or None,
        params={"model.lr": lr, "model.pooling": pooling, "model.channels.length": len(channels), **kernel, **sizes},
        distributions=distributions,
        intermediate_values={0: values[0] - 0.3, 1: values[0]} if len(values) == 1 else {},
        user_attrs={"params": params, "seconds": 55.0, **attrs},
    )


def failed(number: int, error: str = "RuntimeError: no memory") -> FrozenTrial:
    return trial(number, state=TrialState.FAIL, error=error)


def report(*trials: FrozenTrial, objectives: Sequence[Objective] = (ACCURACY,), **attrs: Any) -> Page:
    """The page of a study in the working directory."""
    study = optuna.create_study(study_name="digits", directions=[objective.direction for objective in objectives])
    study.add_trials(trials)
    for name, value in attrs.items():
        study.set_user_attr(name, value)
    return Page(write_report(study, Settings(study_name="digits", objective=list(objectives), space=SPACE)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a search with some of everything that one objective can have."""
    scores = [0.98, 0.991, 0.9934, 0.1, 0.989]
    trials = [*(trial(number, score) for number, score in enumerate(scores)), trial(5, 0.95, state=PRUNED), failed(6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("search"))
        return report(*trials, confirmed={"2": {"1": 0.991, "2": 0.993}})


def test_page_loads_nothing_from_elsewhere(page: Page) -> None:
    assert not {"link", "iframe", "object", "img"} & {name for name, _ in page.tags}
    assert not any(tag.get("src") or tag.get("href") for _, tag in page.tags)
    [policy] = [tag["content"] for tag in page.all("meta") if "http-equiv" in tag]
    assert policy.startswith("default-src 'none'")
    assert len(page.source) < 6_000_000  # plotly is there once
    assert {"History", "Learning curves", "Importance", "Key by key"} < set(page.headings)
    assert len(page.plots) == 3 + len(SPACE)


def test_list_is_one_axis_with_the_best_marked_and_its_importance_a_sum(page: Page) -> None:
    axes = {plot["layout"].get("xaxis", {}).get("title", {}).get("text"): plot for plot in page.plots}
    assert axes["channels"]["layout"]["xaxis"]["categoryarray"] == ["[16]", "[8, 16]", "[16, 32]"]
    best = axes["channels"]["data"][-1]
    assert (best["name"], best["y"]) == ("best", [0.9934])
    assert "channels.length" not in json.dumps(page.plots)
    [bars] = [trace for plot in page.plots for trace in plot["data"] if trace["type"] == "bar"]
    assert set(bars["y"]) == {"lr", "channels", "pooling", "kernel_size"}
    assert sum(bars["x"]) == pytest.approx(1)


def test_trials_are_sorted_with_the_best_first(page: Page) -> None:
    assert page.column("trial") == ["2", "1", "4", "0", "3", "5", "6"]
    assert page.column("state") == ["complete"] * 5 + ["pruned", "fail"]
    assert page.column("channels")[:2] == ["[8, 16]", "[16, 32]"]
    assert page.column("note")[-1] == "RuntimeError: no memory"
    assert page.tables[1][1][:3] == ["2", "99.34 %", "99.20 %"]  # beside the score of new seeds


@pytest.mark.parametrize("num_objectives", [2, 4])
def test_several_objectives_have_their_trade_off(num_objectives: int) -> None:
    objectives = (ACCURACY, SIZE, Objective(metric="val/f1"), Objective(metric="val/loss", direction="minimize"))
    values = [[0.98, 9000.0, 0.9, 0.3], [0.99, 8000.0, 0.9, 0.2], [0.97, 3000.0, 0.8, 0.4], [0.9, 9500.0, 0.7, 1.0]]
    trials = [trial(number, *scores[:num_objectives]) for number, scores in enumerate(values)]
    page = report(*trials, objectives=objectives[:num_objectives])
    assert ("Trade-off" in page.headings) == (num_objectives < 4)
    assert {"History: val/acc", "History: parameters"} <= set(page.headings)
    assert page.column("trial")[:2] == ["1", "2"]


@pytest.mark.parametrize(
    ("trials", "headings"),
    [
        ([], set()),
        ([trial(0, 0.99)], {"The best trial", "History", "Learning curves", "All trials"}),
        ([failed(0), failed(1)], {"All trials"}),
        ([trial(0, 0.5, state=PRUNED), trial(1, 0.6, state=PRUNED)], {"History", "Learning curves"}),
        ([trial(0, 0.9), trial(1, 0.9, duplicate_of=0), trial(2, float("inf"))], {"History"}),
        ([trial(0, 0.9, params={}), trial(1, 0.8, params={})], {"History"}),
        ([trial(number, 0.9, params={"model.pooling": [None, True, "x", [1]][number]}) for number in range(4)], set()),
    ],
)
def test_page_is_written_for_any_study(trials: list[FrozenTrial], headings: set[str]) -> None:
    page = report(*trials)
    assert headings <= set(page.headings)
    assert ("No trial is complete" in page.text) == (not any(one.state == TrialState.COMPLETE for one in trials))


def test_whatever_stands_in_a_study_is_only_text() -> None:
    trials = [trial(number, 0.9 + number / 100, params={"model.pooling": EVIL}) for number in range(3)]
    page = report(*trials, failed(3, EVIL), objectives=(Objective(metric=EVIL),))
    assert EVIL not in page.source
    assert (page.column("note")[-1], page.column("pooling")[0]) == (EVIL, EVIL)
