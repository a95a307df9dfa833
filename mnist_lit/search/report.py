"""The report of a search: one page for people, and the pictures on it as files."""

from html import escape
from pathlib import Path

from mnist_lit.formatting import format_duration, format_value, shorten
from mnist_lit.reports.metric import Metric
from mnist_lit.reports.page import cell, figure, keys, page, row, section, table, tile, tiles
from mnist_lit.search.charts import CHARTS, draw_charts
from mnist_lit.search.results import Confirmation, Entry, Summary
from mnist_lit.search.scales import busy_seconds, mean_and_spread, metrics_of, score_of
from mnist_lit.training.run_dir import write_bytes, write_text

__all__ = ["write_report"]

MAX_ROWS = 1000
MAX_ERROR = 60
# Of each chart a heading and how it is read.
CAPTIONS = {
    "history": (
        "History",
        "Each mark is a trial; the line is the best score so far. A pruned trial has its last score.",
    ),
    "confirmation": (
        "Confirmation",
        "How far the score of the search lies on the good side of the new seeds' is how optimistic it is.",
    ),
    "pareto": ("Trade-off", "On the line each objective can only be made better at the cost of another."),
    "importances": ("Importance", "How much of the difference between the trials' scores each key explains."),
    "parallel": ("Combinations", "Each line is a complete trial, the darker the better; follow the dark ones."),
    "slices": (
        "Key by key",
        "Each dot is a complete trial, the darker the later; dark ones show where the search went.",
    ),
    "intermediate": ("Learning curves", "Each line is a trial; it begins where it enters the range that matters."),
    "timeline": ("Timeline", "Each bar is a trial with its number; those above each other ran at the same time."),
}
# They show one score only.
OF_THE_FIRST = ("confirmation", "parallel", "slices", "intermediate")


def write_report(folder: Path, summary: Summary) -> Path:
    """Show a search: a page that needs no other file, and the pictures on it as PNG files beside it.

    Args:
        folder: Where they are written; made if absent. What an earlier call has left is replaced.
        summary: What the search has found so far.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_charts(summary)
    for name in CHARTS:
        file = folder / f"{name}.png"
        if name in pictures:
            write_bytes(file, pictures[name])
        else:
            file.unlink(missing_ok=True)
    file = folder / "index.html"
    write_text(file, _page(summary, pictures))
    return file


def _page(summary: Summary, pictures: dict[str, bytes]) -> str:
    metrics = metrics_of(summary)
    content = [
        _tiles(summary, metrics),
        _best_keys(summary),
        _honesty(summary, metrics[0]),
        *(_figure(name, pictures[name], metrics) for name in CHARTS if name in pictures),
        _missing(summary),
        _trials(summary, metrics),
    ]
    return page(f"Search {summary.study_name}", _facts(summary), content)


# ---- What was found


def _facts(summary: Summary) -> str:
    states = [entry.state for entry in summary.entries]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("complete", "pruned", "failed"))
    facts = f"{_count(len(states), 'trial')}: {counts}"
    if not states:
        return facts
    trained = sum(entry.seconds for entry in summary.entries)
    return (
        f"{facts} · {format_duration(busy_seconds(summary.entries))} of search, {format_duration(trained)} of training"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _best_entries(summary: Summary) -> list[Entry]:
    return [entry for entry in summary.entries if entry.number in summary.best and entry.values]


def _tiles(summary: Summary, metrics: list[Metric]) -> str:
    best = _best_entries(summary)
    if not best:
        return "<p>No trial is complete, so there is no best one.</p>"
    best_ones = [_best_tile(summary, metric, objective) for objective, metric in enumerate(metrics)]
    confirmed = _confirmed(summary, metrics[0])
    if confirmed:
        first = confirmed[0]
        told = f"trial {first.number}, mean ± standard deviation over {_count(len(first.scores), 'new seed')}"
        best_ones.append(tile("Best confirmed", metrics[0].spread_text(*mean_and_spread(first)), told))
    return tiles(best_ones)


def _best_tile(summary: Summary, metric: Metric, objective: int) -> str:
    best = _best_entries(summary)
    score = metric.best(entry.values[objective] for entry in best)
    number = next(entry.number for entry in best if entry.values[objective] == score)
    told = f"trial {number}, {metric.name} of its {summary.value} epoch"
    return tile("Best of the search", metric.text(score), told)


def _best_keys(summary: Summary) -> str:
    best = _best_entries(summary)
    if len(best) > 1:
        numbers = ", ".join(str(entry.number) for entry in best)
        return f"<p>No other trial is better in every objective than these {len(best)}: {numbers}.</p>"
    if not best or not best[0].params:
        return ""
    given = {key: format_value(value) for key, value in best[0].params.items()}
    return section(f"Trial {best[0].number} was given", keys(given))


def _confirmed(summary: Summary, metric: Metric) -> list[Confirmation]:
    confirmed = [confirmation for confirmation in summary.confirmations if confirmation.scores]
    return sorted(confirmed, key=lambda one: mean_and_spread(one)[0], reverse=metric.maximize)


def _honesty(summary: Summary, metric: Metric) -> str:
    confirmed = _confirmed(summary, metric)
    num_complete = sum(entry.state == "complete" for entry in summary.entries)
    if not confirmed and num_complete < 2:
        return ""
    why = "The best score of a search is the best of many noisy ones, hence optimistic"
    if not confirmed:
        return f"<p>{why}. No trial was trained again with new seeds.</p>"
    entries = {entry.number: entry for entry in summary.entries if entry.values}
    rows = [_confirmed_row(one, entries.get(one.number), metric) for one in confirmed]
    head = ["trial", "score of the search", "mean ± standard deviation", "new seeds"]
    text = f"<p>{why}; the mean over new seeds is the honest one.</p>"
    return section("Which score is which", text, table(head, rows, "Confirmed trials"))


def _confirmed_row(confirmation: Confirmation, entry: Entry | None, metric: Metric) -> str:
    mean, spread = mean_and_spread(confirmation)
    several = len(confirmation.scores) > 1
    cells = [
        str(confirmation.number),
        metric.text(entry.values[0]) if entry else "",
        metric.spread_text(mean, spread) if several else metric.text(mean),
        str(len(confirmation.scores)),
    ]
    return row(map(cell, cells))


# ---- The pictures


def _figure(name: str, picture: bytes, metrics: list[Metric]) -> str:
    heading, caption = CAPTIONS[name]
    if len(metrics) > 1 and name in OF_THE_FIRST:
        caption += f" The score is {metrics[0].name}, the first objective."
    return figure(heading, caption, picture, alt=heading)


def _missing(summary: Summary) -> str:
    has_scores = any(entry.values for entry in summary.entries)
    if has_scores and not any(summary.importances):
        return '<p class="quiet">There are too few complete trials to tell which keys are important.</p>'
    return ""


# ---- All trials


def _trials(summary: Summary, metrics: list[Metric]) -> str:
    entries = sorted(summary.entries, key=lambda entry: _rank(entry, summary, metrics[0]))
    names = list(dict.fromkeys(key for entry in entries for key in entry.params))
    if not entries:
        return ""
    head = ["trial", "state", *(metric.name for metric in metrics), *names, "seconds", "error"]
    rows = [_trial(entry, summary, metrics, names) for entry in entries[:MAX_ROWS]]
    more = f" These are the best {MAX_ROWS:,} of {len(entries):,}." if len(entries) > MAX_ROWS else ""
    text = f'<p class="quiet">Best first. A pruned trial\'s score is its last one.{more}</p>'
    return section("All trials", text, table(head, rows, "All trials"))


def _rank(entry: Entry, summary: Summary, metric: Metric) -> tuple[int, bool, float, int]:
    """Complete trials before pruned before failed ones; of several objectives the front, then by the first."""
    score = score_of(entry)
    order = ("complete", "pruned", "failed").index(entry.state)
    by_score = 0.0 if score is None else -score if metric.maximize else score
    return order, entry.number not in summary.best, by_score, entry.number


def _trial(entry: Entry, summary: Summary, metrics: list[Metric], names: list[str]) -> str:
    is_best = entry.number in summary.best
    scores = [score_of(entry, objective) for objective in range(len(metrics))]
    cells = [cell(str(entry.number)), cell(entry.state)]
    cells += [cell("" if score is None else metric.text(score)) for score, metric in zip(scores, metrics, strict=True)]
    cells += [cell(format_value(entry.params[key]) if key in entry.params else "") for key in names]
    cells += [cell(f"{entry.seconds:,.1f}"), _error(entry.error)]
    return row(cells, kind="best" if is_best else entry.state)


def _error(error: str) -> str:
    return f'<td title="{escape(error)}">{escape(shorten(error, MAX_ERROR))}</td>' if error else "<td></td>"
