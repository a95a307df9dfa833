"""The report of a search: one page for people, and the pictures on it as files."""

from base64 import b64encode
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

from mnist_lit.charts import CHARTS, draw_charts
from mnist_lit.results import Confirmation, Entry, Summary
from mnist_lit.runs import write_bytes, write_text
from mnist_lit.scales import (
    Metric,
    busy_seconds,
    duration_text,
    mean_and_spread,
    metrics_of,
    score_of,
    short_text,
    text_of,
)

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
PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --page: #f6f7f9; --card: #fff; --ink: #1d2127; --quiet: #5c6570; --line: #dde1e6; --mark: #b34700; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171a; --card: #1e2226; --ink: #e7eaed; --quiet: #a2abb5; --line: #363c43; --mark: #ff9d5c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2; }
h2 { margin: 2.5rem 0 .25rem; font-size: 1.25rem; }
p { margin: .25rem 0 .75rem; max-width: 50rem; }
.quiet, figcaption, dt { color: var(--quiet); }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.5rem 0; }
.tiles div { flex: 1 1 13rem; padding: 1rem 1.25rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
.tiles dt { font-size: .875rem; }
.tiles dd { margin: 0; font-size: .875rem; }
.tiles dd:first-of-type { font-size: 1.75rem; line-height: 1.3; font-weight: 600; }
.keys { display: grid; grid-template-columns: auto 1fr; gap: .125rem 1.5rem; margin: .5rem 0; font-size: .9375rem; }
.keys dd { margin: 0; }
@media (max-width: 40rem) { .keys { display: block; } .keys dd { margin: 0 0 .375rem; } }
.keys, td { font-variant-numeric: tabular-nums; }
.keys dt, .keys dd { font-family: ui-monospace, Consolas, monospace; font-size: .875rem; }
figure { margin: 0; }
figure div { margin-top: .5rem; overflow-x: auto; background: #fff; border: 1px solid var(--line);
  border-radius: .5rem; }
img { display: block; width: 100%; min-width: 40rem; height: auto; }
.scroll { overflow: auto; width: fit-content; max-width: 100%; max-height: 80vh; background: var(--card);
  border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; font-size: .875rem; white-space: nowrap; overflow-wrap: normal; }
th, td { padding: .375rem .75rem; text-align: left; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--card); font-weight: 600; white-space: normal; vertical-align: bottom; }
tbody tr:last-child td { border-bottom: 0; }
.best td { color: var(--mark); font-weight: 600; }
.pruned td, .failed td { color: var(--quiet); }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="quiet">$facts</p>
</header>
<main>
$content
</main>
</body>
</html>
""")


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
    page = folder / "index.html"
    write_text(page, _page(summary, pictures))
    return page


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
    title = escape(f"Search {summary.study_name}")
    return PAGE.substitute(title=title, facts=escape(_facts(summary)), content="\n".join(filter(None, content)))


# ---- What was found


def _facts(summary: Summary) -> str:
    states = [entry.state for entry in summary.entries]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("complete", "pruned", "failed"))
    facts = f"{_count(len(states), 'trial')}: {counts}"
    if not states:
        return facts
    trained = sum(entry.seconds for entry in summary.entries)
    return f"{facts} · {duration_text(busy_seconds(summary.entries))} of search, {duration_text(trained)} of training"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _best_entries(summary: Summary) -> list[Entry]:
    return [entry for entry in summary.entries if entry.number in summary.best and entry.values]


def _tiles(summary: Summary, metrics: list[Metric]) -> str:
    best = _best_entries(summary)
    if not best:
        return "<p>No trial is complete, so there is no best one.</p>"
    tiles = [_best_tile(summary, metric, objective) for objective, metric in enumerate(metrics)]
    confirmed = _confirmed(summary, metrics[0])
    if confirmed:
        first = confirmed[0]
        told = f"trial {first.number}, mean ± standard deviation over {_count(len(first.scores), 'new seed')}"
        tiles.append(_tile("Best confirmed", metrics[0].spread_text(*mean_and_spread(first)), told))
    return f'<dl class="tiles">\n{"".join(tiles)}\n</dl>'


def _best_tile(summary: Summary, metric: Metric, objective: int) -> str:
    best = _best_entries(summary)
    score = metric.best(entry.values[objective] for entry in best)
    number = next(entry.number for entry in best if entry.values[objective] == score)
    told = f"trial {number}, {metric.name} of its {summary.value} epoch"
    return _tile("Best of the search", metric.text(score), told)


def _tile(name: str, value: str, told: str) -> str:
    return f"\n<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd>{escape(told)}</dd></div>"


def _best_keys(summary: Summary) -> str:
    best = _best_entries(summary)
    if len(best) > 1:
        numbers = ", ".join(str(entry.number) for entry in best)
        return f"<p>No other trial is better in every objective than these {len(best)}: {numbers}.</p>"
    if not best or not best[0].params:
        return ""
    rows = [f"<dt>{escape(key)}</dt><dd>{escape(text_of(value))}</dd>" for key, value in best[0].params.items()]
    return (
        f'<section>\n<h2>Trial {best[0].number} was given</h2>\n<dl class="keys">\n{"".join(rows)}\n</dl>\n</section>'
    )


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
    return f"<section>\n<h2>Which score is which</h2>\n{text}\n{_table(head, rows, 'Confirmed trials')}\n</section>"


def _confirmed_row(confirmation: Confirmation, entry: Entry | None, metric: Metric) -> str:
    mean, spread = mean_and_spread(confirmation)
    several = len(confirmation.scores) > 1
    cells = [
        str(confirmation.number),
        metric.text(entry.values[0]) if entry else "",
        metric.spread_text(mean, spread) if several else metric.text(mean),
        str(len(confirmation.scores)),
    ]
    return _row(map(_cell, cells))


# ---- The pictures


def _figure(name: str, picture: bytes, metrics: list[Metric]) -> str:
    heading, caption = CAPTIONS[name]
    if len(metrics) > 1 and name in OF_THE_FIRST:
        caption += f" The score is {escape(metrics[0].name)}, the first objective."
    source = f"data:image/png;base64,{b64encode(picture).decode()}"
    image = f'<img src="{source}" alt="{heading}">'
    return f"<figure>\n<h2>{heading}</h2>\n<figcaption>{caption}</figcaption>\n<div>{image}</div>\n</figure>"


def _missing(summary: Summary) -> str:
    has_scores = any(entry.values for entry in summary.entries)
    if has_scores and not any(summary.importances):
        return '<p class="quiet">There are too few complete trials to tell which keys are important.</p>'
    return ""


# ---- All trials


def _trials(summary: Summary, metrics: list[Metric]) -> str:
    entries = sorted(summary.entries, key=lambda entry: _rank(entry, summary, metrics[0]))
    keys = list(dict.fromkeys(key for entry in entries for key in entry.params))
    if not entries:
        return ""
    head = ["trial", "state", *(metric.name for metric in metrics), *keys, "seconds", "error"]
    rows = [_trial(entry, summary, metrics, keys) for entry in entries[:MAX_ROWS]]
    more = f" These are the best {MAX_ROWS:,} of {len(entries):,}." if len(entries) > MAX_ROWS else ""
    text = f'<p class="quiet">Best first. A pruned trial\'s score is its last one.{more}</p>'
    return f"<section>\n<h2>All trials</h2>\n{text}\n{_table(head, rows, 'All trials')}\n</section>"


def _rank(entry: Entry, summary: Summary, metric: Metric) -> tuple[int, bool, float, int]:
    """Complete trials before pruned before failed ones; of several objectives the front, then by the first."""
    score = score_of(entry)
    order = ("complete", "pruned", "failed").index(entry.state)
    by_score = 0.0 if score is None else -score if metric.maximize else score
    return order, entry.number not in summary.best, by_score, entry.number


def _trial(entry: Entry, summary: Summary, metrics: list[Metric], keys: list[str]) -> str:
    is_best = entry.number in summary.best
    scores = [score_of(entry, objective) for objective in range(len(metrics))]
    cells = [_cell(str(entry.number)), _cell(entry.state)]
    cells += [_cell("" if score is None else metric.text(score)) for score, metric in zip(scores, metrics, strict=True)]
    cells += [_cell(text_of(entry.params[key]) if key in entry.params else "") for key in keys]
    cells += [_cell(f"{entry.seconds:,.1f}"), _error(entry.error)]
    return _row(cells, kind="best" if is_best else entry.state)


def _cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def _error(error: str) -> str:
    return f'<td title="{escape(error)}">{escape(short_text(error, MAX_ERROR))}</td>' if error else "<td></td>"


def _row(cells: Iterable[str], kind: str = "complete") -> str:
    return f'<tr class="{kind}">{"".join(cells)}</tr>\n'


def _table(head: list[str], rows: list[str], name: str) -> str:
    # It can be scrolled with the keys, too.
    box = f'<div class="scroll" role="region" tabindex="0" aria-label="{name}">'
    cells = "".join(f'<th scope="col">{escape(text).replace(".", ".<wbr>")}</th>' for text in head)
    return f"{box}\n<table>\n<thead><tr>{cells}</tr></thead>\n<tbody>\n{''.join(rows)}\n</tbody>\n</table>\n</div>"
