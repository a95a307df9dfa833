"""The report of a search: what is on the page and in the pictures, whatever the search has found."""

import re
from base64 import b64decode
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from mnist_lit.search.report import write_report
from mnist_lit.search.results import Confirmation, Entry, Summary

START = datetime(2026, 11, 21, 9, tzinfo=UTC)
LR = "model.optimizer.init_args.lr"
SEARCH = {"history.png", "parallel.png", "slices.png", "intermediate.png", "timeline.png"}


def entry(number: int, score: float | None = None, **changes: Any) -> Entry:
    """A complete trial of a minute, one minute after the one before."""
    made = Entry(
        number=number,
        state="complete",
        values=[] if score is None else [score],
        params={LR: 0.001 * (number + 1), "model.channels": [16, 32][: 1 + number % 2]},
        steps={} if score is None else {0: score - 0.01, 1: score},
        started=START + timedelta(minutes=number),
        ended=START + timedelta(minutes=number + 1),
        seconds=55.0,
    )
    return replace(made, **changes)


def bare(number: int, *scores: float, **changes: Any) -> Entry:
    """A trial with little to draw."""
    return entry(number, **{"values": list(scores), "params": {}, **changes})


def pruned(number: int, *scores: float) -> Entry:
    return entry(number, state="pruned", steps=dict(enumerate(scores)))


def failed(number: int, error: str = "RuntimeError: no memory") -> Entry:
    return entry(number, state="failed", error=error)


def search(*entries: Entry, **changes: Any) -> Summary:
    """A search for the highest accuracy."""
    complete = [trial for trial in entries if trial.values]
    made = Summary(
        study_name="digits",
        metrics=["val/acc"],
        directions=["maximize"],
        value="best",
        entries=list(entries),
        best=[max(complete, key=lambda trial: trial.values[0]).number] if complete else [],
        importances=[],
        logarithmic=[LR],
    )
    return replace(made, **changes)


def plain(**changes: Any) -> Summary:
    """A search with some of everything that one objective can have."""
    scores = [0.98, 0.991, 0.9934, 0.1, 0.989]
    entries = [*(entry(number, score) for number, score in enumerate(scores)), pruned(5, 0.9, 0.95), failed(6)]
    importances = [{LR: 0.7, "model.channels": 0.3}]
    confirmations = [Confirmation(number=2, scores={1: 0.992, 2: 0.993, 3: 0.991})]
    return search(*entries, **{"importances": importances, "confirmations": confirmations, **changes})


def two_objectives(**changes: Any) -> Summary:
    """A search for a high accuracy with few parameters; trials 1 and 2 are the front."""
    values = [[0.98, 9000.0], [0.99, 8000.0], [0.97, 3000.0]]
    entries = [entry(number, values=both) for number, both in enumerate(values)]
    many = {"metrics": ["val/acc", "parameters"], "directions": ["maximize", "minimize"], "best": [1, 2]}
    return search(*entries, **{**many, **changes})


class Page(HTMLParser):
    """What is on a page: its text, its tables' rows of cells, its tags with their attributes."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.text = ""
        self.in_cell = False
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[list[str]]] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def column(self, name: str) -> list[str]:
        """A column of the table of all trials."""
        head, *rows = self.tables[-1]
        return [row[head.index(name)] for row in rows]


def report(folder: Path, summary: Summary) -> Page:
    return Page(write_report(folder, summary))


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {"index.html"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """The report of the plain search: its folder and its page."""
    folder = tmp_path_factory.mktemp("search") / "report"
    return folder, report(folder, plain())


# ---- Pictures


def test_search_has_every_picture_that_it_has_something_for(written: tuple[Path, Page]) -> None:
    folder, _ = written

    assert names(folder) == SEARCH | {"importances.png", "confirmation.png"}


@pytest.mark.parametrize("name", sorted(SEARCH | {"importances.png", "confirmation.png"}))
def test_picture_has_something_on_it_and_free_margins(name: str, written: tuple[Path, Page]) -> None:
    folder, _ = written

    with Image.open(folder / name) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("L"))
    assert 1300 <= pixels.shape[1] <= 2300
    assert 150 <= pixels.shape[0] <= 2000
    assert (pixels < 200).mean() > 0.003
    assert np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).min() > 250


def test_page_holds_each_picture_as_it_is_in_its_file(written: tuple[Path, Page]) -> None:
    folder, page = written

    embedded = [b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.all("img")]

    assert sorted(embedded) == sorted((folder / name).read_bytes() for name in names(folder))
    assert all(image["alt"] for image in page.all("img"))


def test_what_a_search_no_longer_has_is_removed(tmp_path: Path) -> None:
    write_report(tmp_path, search(bare(0, 0.9)))
    assert names(tmp_path) == {"history.png", "timeline.png"}

    page = report(tmp_path, search(failed(0)))

    assert names(tmp_path) == {"timeline.png"}
    assert len(page.all("img")) == 1


def test_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    write_report(tmp_path, search())

    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_terrible_trials_leave_the_others_their_room(tmp_path: Path) -> None:
    write_report(tmp_path, search(*(bare(number, 0.99 + 0.0002 * number) for number in range(8)), bare(8, 0.1)))

    pixels = np.asarray(Image.open(tmp_path / "history.png").convert("RGB")).astype(int)
    blue = (abs(pixels - (0, 114, 178)).sum(axis=2) < 90)[80:-120]  # without legend and edge
    rows = blue.any(axis=1).nonzero()[0]
    assert rows[-1] - rows[0] > 150


def test_settings_of_matplotlib_do_not_matter(tmp_path: Path, written: tuple[Path, Page]) -> None:
    folder, _ = written
    mine: dict[Any, Any] = {
        "text.usetex": True,
        "savefig.facecolor": "black",
        "font.size": 40,
        "savefig.format": "pdf",
        "axes.grid": False,
    }

    with mpl.rc_context(mine):
        write_report(tmp_path, plain())
        assert mpl.rcParams["font.size"] == 40

    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in names(folder))


# ---- The page


def test_nothing_is_loaded_from_elsewhere(written: tuple[Path, Page]) -> None:
    _, page = written

    targets = [
        value for _, tag in page.tags for name, value in tag.items() if name in ("src", "href", "srcset", "data")
    ]
    assert targets
    assert all(target.startswith("data:image/png;base64,") for target in targets)
    assert not {"script", "link", "iframe", "object"} & {name for name, _ in page.tags}
    assert not re.search(r"@import|url\(|https?:", page.source)


def test_facts_count_the_trials_and_their_time(written: tuple[Path, Page]) -> None:
    _, page = written

    assert "7 trials: 5 complete, 1 pruned, 1 failed" in page.text
    assert "7 min of search" in page.text
    assert "6 min 25 s of training" in page.text


def test_best_trial_is_told_with_its_score_and_keys(written: tuple[Path, Page]) -> None:
    _, page = written

    assert "99.34 %" in page.text
    assert "trial 2, val/acc of its best epoch" in page.text
    assert "Trial 2 was given" in page.text
    assert "0.003" in page.text


def test_confirmed_score_stands_beside_that_of_the_search(written: tuple[Path, Page]) -> None:
    _, page = written

    assert page.tables[0][1] == ["2", "99.34 %", "99.20 ± 0.10 %", "3"]
    assert "hence optimistic; the mean over new seeds is the honest one" in page.text


def test_unconfirmed_search_is_said_to_be_optimistic(tmp_path: Path) -> None:
    page = report(tmp_path, search(bare(0, 0.9), bare(1, 0.8)))

    assert "No trial was trained again with new seeds" in page.text
    assert "confirmation.png" not in names(tmp_path)
    assert len(page.tables) == 1


def test_confirmation_with_one_seed_has_no_spread(tmp_path: Path) -> None:
    page = report(tmp_path, search(bare(0, 0.9934), confirmations=[Confirmation(number=0, scores={1: 0.992})]))

    assert page.tables[0][1] == ["0", "99.34 %", "99.20 %", "1"]


def test_trials_are_sorted_with_the_best_first(written: tuple[Path, Page]) -> None:
    _, page = written

    assert page.column("trial") == ["2", "1", "4", "0", "3", "5", "6"]
    assert page.column("state") == ["complete"] * 5 + ["pruned", "failed"]
    assert page.column("val/acc")[:2] == ["99.34 %", "99.10 %"]
    assert page.column("val/acc")[-2:] == ["95.00 %", ""]


def test_lowest_loss_comes_first_and_is_no_percentage(tmp_path: Path) -> None:
    summary = search(bare(0, 0.5), bare(1, 0.02), metrics=["val/loss"], directions=["minimize"], best=[1])

    page = report(tmp_path, summary)

    assert page.column("trial") == ["1", "0"]
    assert page.column("val/loss") == ["0.02", "0.5"]


def test_two_objectives_have_their_trade_off_and_the_front_comes_first(tmp_path: Path) -> None:
    page = report(tmp_path, two_objectives())

    assert names(tmp_path) == {"history.png", "parallel.png", "pareto.png", "slices.png", "timeline.png"}
    assert "The score is val/acc, the first objective." in page.text
    assert page.column("trial") == ["1", "2", "0"]
    assert page.column("parameters") == ["8000", "3000", "9000"]
    assert "No other trial is better in every objective than these 2: 1, 2." in page.text


def test_long_error_is_cut_and_its_whole_is_at_hand(tmp_path: Path) -> None:
    error = "RuntimeError: " + "no memory " * 30

    page = report(tmp_path, search(failed(0, error)))

    (shown,) = page.column("error")
    assert len(shown) <= 60
    assert shown.startswith("RuntimeError")
    assert error in [cell.get("title") for cell in page.all("td")]


def test_values_are_told_as_a_config_has_them(tmp_path: Path) -> None:
    schedule = {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": {"max_lr": 0.1}}
    params = {"a": None, "b": True, "c": [16, 32], "d": 1e-7, "e": "text", "f": schedule, "g": 128, "h": {"x": 1}}

    page = report(tmp_path, search(bare(0, 0.9, params=params)))

    expected = ["null", "true", "[16, 32]", "1e-7", "text", "OneCycleLR(max_lr=0.1)", "128", "{x: 1}"]
    assert [page.column(key)[0] for key in params] == expected


def test_whatever_stands_in_a_summary_is_only_text(tmp_path: Path) -> None:
    evil = "<script>alert('&amp;\"$x')</script>"
    trials = [entry(number, 0.9 + number / 100, params={evil: evil}) for number in range(3)]

    page = report(
        tmp_path, search(*trials, failed(3, evil), study_name=evil, metrics=[evil], importances=[{evil: 1.0}])
    )

    assert not page.all("script")
    assert f"Search {evil}" in page.text
    assert page.column("error")[-1] == evil
    assert evil in [cell.get("title") for cell in page.all("td")]
    assert page.tables[-1][0].count(evil) == 2


def test_no_more_than_a_thousand_trials_are_listed(tmp_path: Path) -> None:
    trials = [bare(number, 0.9 + number / 20_000) for number in range(1001)]

    page = report(tmp_path, search(*trials))

    assert page.column("trial") == [str(number) for number in range(1000, 0, -1)]
    assert "the best 1,000 of 1,001" in page.text


# ---- Whatever a search has found

KEYS = {"parallel.png", "slices.png"}
BARE = {"history.png", "timeline.png"}
LATER = START + timedelta(days=3)
CONDITIONAL = [
    bare(0, 0.9, params={"a": 1}),
    bare(1, 0.91, params={"a": 2, "b": 0.1}),
    bare(2, 0.92, params={"b": 0.2}),
]
LISTS = [bare(number, 0.9 + number / 1000, params={"c": list(range(8, 9 + number))}) for number in range(12)]
MIXED = [
    bare(number, 0.9 + number / 1000, params={"m": value}) for number, value in enumerate([None, True, 1, "x", [1]])
]
EXTREME = [bare(number, score) for number, score in enumerate([1e-7, 1e3, -5.0, 1e-7])]
TEXTS = [bare(number, 0.9 + number / 1000, params={"t": f"\u6f22 {number}\n$\U0001f600"}) for number in range(20)]
LONG = [bare(number, 0.9, params={f"model.{'very_' * 20}long.key{k}": k for k in range(30)}) for number in range(2)]


@pytest.mark.parametrize(
    ("summary", "pictures"),
    [
        (search(), set()),
        (search(entry(0, 0.99)), {"history.png", "intermediate.png", "timeline.png"}),
        (search(failed(0), failed(1)), {"timeline.png"}),
        (search(pruned(0, 0.5), pruned(1, 0.6, 0.7)), {"history.png", "intermediate.png", "timeline.png"}),
        (search(bare(0, 0.9), bare(1, 0.9)), BARE),
        (search(bare(0, 0.0), bare(1, 0.0)), BARE),
        (search(bare(0, 0.9), bare(1, 0.8)), BARE),
        (search(bare(0, 0.9, ended=START)), BARE),
        (search(bare(0, 0.9), bare(1, 0.8, started=LATER, ended=LATER + timedelta(minutes=3))), BARE),
        (search(bare(0, 0.9, params={LR: 0}), bare(1, 0.8, params={LR: 1e-7})), BARE | KEYS),
        (search(*CONDITIONAL), BARE | KEYS),
        (search(*LISTS), BARE | KEYS),
        (search(*MIXED), BARE | KEYS),
        (search(*EXTREME, metrics=["val/loss"], directions=["minimize"]), BARE),
        (search(*TEXTS, importances=[{}]), BARE | KEYS),
        (search(*LONG), BARE | KEYS),
        (two_objectives(entries=[failed(0)], best=[]), {"timeline.png"}),
        (two_objectives(entries=[bare(0, values=[0.9, 5.0])], best=[0]), BARE | {"pareto.png"}),
    ],
    ids=[
        "nothing", "one", "only failed", "only pruned", "constant", "zero", "no keys", "no time",
        "pause", "log of zero", "conditional", "lists", "mixed", "extreme",
        "strange letters", "long keys", "two failed", "two of one",
    ],
)  # fmt: skip
def test_report_is_written_for_any_search(summary: Summary, pictures: set[str], tmp_path: Path) -> None:
    page = report(tmp_path, summary)

    assert names(tmp_path) == pictures
    assert len(page.all("img")) == len(pictures)
    assert f"{len(summary.entries)} trial" in page.text
    assert ("No trial is complete" in page.text) == (not any(trial.values for trial in summary.entries))


def test_three_objectives_are_drawn(tmp_path: Path) -> None:
    entries = [bare(number, values=[0.9, number, -number]) for number in range(4)]
    three = {"metrics": ["val/acc", "a", "b"], "directions": ["maximize", "minimize", "minimize"]}

    report(tmp_path, search(*entries, **three, best=[0, 3]))

    assert "pareto.png" in names(tmp_path)
