"""Runs side by side: what differs in their configs, what they reached, their curves in one picture."""

import itertools
import math
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mnist_lit.console import configure_logging
from mnist_lit.errors import UsageError
from mnist_lit.formatting import METRICS, escape_unprintable, format_score, format_value, short_names, shorten
from mnist_lit.reports.curves import COMPARED, draw_comparison
from mnist_lit.reports.page import cell, figure, name_cell, page, pair, row, section, table
from mnist_lit.reports.recorded import Recorded, flat, read_run
from mnist_lit.training.run_dir import LOGS, write_text

__all__ = ["compare", "write_comparison"]

MAX_WIDTH = 28
ABSENT = "\N{EN DASH}"
BEST_EPOCH = "best epoch"
# Of each fact in metrics.json how it is told.
FACTS: dict[str, Callable[[Any], str]] = {
    "seconds": "{:,.1f}".format,
    "images_per_second": "{:,.0f}".format,
    "parameters": "{:,}".format,
    "device": str,
}
# Of each chart a heading and how it is read.
CAPTIONS = {
    "val/acc": ("Validation accuracy", "The higher the better; beginnings that are far off are cut."),
    "val/loss": ("Validation loss", "The lower the better; beginnings that are far off are cut."),
    "train/loss": ("Training loss", "It can only be compared where augmentation and label smoothing are the same."),
}


class Parser(ArgumentParser):
    """A parser whose complaints are errors of ours."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and how it would be right."""
        raise UsageError(f"compare: {message}\n{self.format_usage().strip()}")


def compare(args: Sequence[str]) -> None:
    """Show runs side by side: a table on the console, and a page.

    Args:
        args: The command line after `python -m mnist_lit compare`.

    Raises:
        UsageError: If there are fewer than two runs, or a directory is none of a run.
    """
    configure_logging()
    typed = _parser().parse_intermixed_args(args)
    if typed.output.is_dir():
        raise UsageError(
            f"--output: {typed.output} is a directory\ngive the page's file, for example {LOGS}/comparison.html"
        )
    runs = _named([read_run(path) for path in {path.resolve(): path for path in typed.runs}.values()])
    if len(runs) < 2:
        raise UsageError("compare needs two different runs or more\ngive their directories: logs/run_1 logs/run_2")
    try:
        write_comparison(typed.output, runs)
    except OSError as error:
        raise UsageError(f"--output: {typed.output} cannot be written: {error.strerror}") from error
    print(_console_table(runs))
    print(typed.output)


def write_comparison(file: Path, runs: Mapping[str, Recorded]) -> None:
    """Show runs on a page that needs no other file.

    Args:
        file: Where it is written; what is there is replaced.
        runs: The runs by the names that they are shown with.

    Raises:
        OSError: If it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, _page(runs))


def _parser() -> Parser:
    program = "python -m mnist_lit compare"
    description = (
        "Show runs side by side: what they reached, what differs in their configs, and, on a page, their curves."
    )
    parser = Parser(program, f"{program} RUN RUN... [--output FILE]", description, allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="directory of a run, or of a search's trial; two or more"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=LOGS / "comparison.html",
        metavar="FILE",
        help="page to write, or to replace; default %(default)s",
    )
    return parser


def _named(runs: Sequence[Recorded]) -> dict[str, Recorded]:
    """The runs by the shortest ends of their paths that tell them apart."""
    names = short_names([run.run_dir.resolve().as_posix() for run in runs], "/")
    return dict(zip(names.values(), runs, strict=True))


def _results(runs: Mapping[str, Recorded]) -> dict[str, list[str]]:
    """What was measured in any of the runs: a text for each of them."""
    told = [_told(run) for run in runs.values()]
    order = [*METRICS, BEST_EPOCH, *FACTS]
    return {name: [of_run.get(name, ABSENT) for of_run in told] for name in order if any(name in one for one in told)}


def _told(run: Recorded) -> dict[str, str]:
    told = {name: format_score(name, run.metrics[name]) for name in METRICS if name in run.metrics}
    if run.best_epoch is not None:
        told[BEST_EPOCH] = f"{run.best_epoch} of {run.num_epochs or '?'}"
    return told | {name: text(run.metrics[name]) for name, text in FACTS.items() if name in run.metrics}


def _settings(runs: Mapping[str, Recorded]) -> dict[str, list[str]]:
    """The keys in which the runs' configs differ, those that not all of them have at the end: a text for each run."""
    configs = [flat(run.config) for run in runs.values()]
    keys = [key for key in dict.fromkeys(itertools.chain(*configs)) if _differ([config.get(key) for config in configs])]
    keys.sort(key=lambda key: not all(key in config for config in configs))
    return {key: [format_value(config[key]) if key in config else ABSENT for config in configs] for key in keys}


def _differ(values: list[Any]) -> bool:
    return any(value != values[0] for value in values)


def _console_table(runs: Mapping[str, Recorded]) -> str:
    rows = [["", *runs], *([name, *texts] for name, texts in {**_results(runs), **_settings(runs)}.items())]
    rows = [
        [escape_unprintable(name), *(shorten(escape_unprintable(text), MAX_WIDTH) for text in texts)]
        for name, *texts in rows
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([name.ljust(widths[0]), *(text.rjust(width) for text, width in zip(texts, widths[1:], strict=True))])
        for name, *texts in rows
    )


# ---- The page


def _page(runs: Mapping[str, Recorded]) -> str:
    charts = draw_comparison(runs)
    curves = [
        figure(*CAPTIONS[metric], charts[metric], alt=_alt(runs, metric), min_width=18)
        for metric in COMPARED
        if metric in charts
    ]
    results = [_result(runs, name, texts) for name, texts in _results(runs).items()]
    content = [
        section("Results", table(["", *runs], results, "Results")),
        pair(curves) if curves else "",
        section("Configuration", _differences(runs)),
    ]
    return page(f"{len(runs)} runs side by side", ", ".join(str(run.run_dir) for run in runs.values()), content)


def _result(runs: Mapping[str, Recorded], name: str, texts: list[str]) -> str:
    scores = [run.metrics.get(name, math.nan) for run in runs.values()] if name in METRICS else []
    scores = [score for score in scores if math.isfinite(score)]
    best = (min(scores) if name.endswith("loss") else max(scores)) if scores else None
    kinds = ["best" if scores and run.metrics.get(name) == best else "" for run in runs.values()]
    return row([name_cell(name), *(cell(text, kind) for text, kind in zip(texts, kinds, strict=True))])


def _differences(runs: Mapping[str, Recorded]) -> str:
    settings = _settings(runs)
    if not settings:
        return "<p>The configs of these runs are the same.</p>"
    rows = [row([name_cell(key), *map(cell, texts)]) for key, texts in settings.items()]
    text = '<p class="quiet">The keys in which the configs of these runs differ.</p>'
    return f"{text}\n{table(['key', *runs], rows, 'Configuration')}"


def _alt(runs: Mapping[str, Recorded], metric: str) -> str:
    ends = {name: run.curves[metric].values[-1] for name, run in runs.items() if metric in run.curves}
    return f"{metric} at the end: {', '.join(f'{name} {format_score(metric, end)}' for name, end in ends.items())}"
