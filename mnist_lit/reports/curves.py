"""Curves over epochs: those of one run, and one metric of several runs."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mnist_lit.reports.drawing import (
    BLACK,
    BLUE,
    OTHERS,
    VERMILION,
    add_legend,
    drawable,
    new_figure,
    own_style,
    png,
    whole_numbers,
)
from mnist_lit.reports.metric import metric_of
from mnist_lit.reports.recorded import Curve, Recorded

__all__ = ["COMPARED", "SHOWN", "draw_comparison", "draw_run"]

# Half of a page, or all of a phone.
WIDTH, HEIGHT = 5.2, 3.3
# Of each chart of a run the metrics on it, and what they are.
SHOWN: dict[str, tuple[tuple[str, ...], str]] = {
    "loss": (("train/loss", "val/loss"), "loss"),
    "accuracy": (("train/acc", "val/acc"), "accuracy"),
    "lr": (("lr",), "learning rate"),
}
LOOKS: dict[str, dict[str, Any]] = {
    "train": {"color": BLUE, "linestyle": "--", "marker": "o", "label": "training"},
    "val": {"color": VERMILION, "linestyle": "-", "marker": "s", "label": "validation"},
    "lr": {"color": BLUE, "linestyle": "-", "marker": "."},
}
# Of each metric of several runs whether more of it is better.
COMPARED = {"val/acc": True, "val/loss": False, "train/loss": False}
# Their numbers have no common divisor: the first 84 runs look different.
RUN_COLORS = (BLUE, VERMILION, BLACK, *OTHERS, "#e69f00")
RUN_LINES = ("-", "--", "-.", ":")
RUN_MARKERS = "osD"
MAX_MARKERS = 20


def draw_run(run: Recorded) -> dict[str, bytes]:
    """The curves of a run, as PNG files by the names in `SHOWN`; those that it has."""
    with own_style():
        figures = {name: _of_run(run, *chart) for name, chart in SHOWN.items()}
        return {name: png(figure) for name, figure in figures.items() if figure is not None}


def draw_comparison(runs: Mapping[str, Recorded]) -> dict[str, bytes]:
    """The curves of several runs, as PNG files by the metrics in `COMPARED`.

    Args:
        runs: The runs by the names that they are shown with.
    """
    with own_style():
        figures = {metric: _of_runs(runs, metric) for metric in COMPARED}
        return {metric: png(figure) for metric, figure in figures.items() if figure is not None}


def _of_run(run: Recorded, metrics: tuple[str, ...], label: str) -> Figure | None:
    curves = {name: run.curves[name] for name in metrics if name in run.curves}
    if not curves:
        return None
    figure = new_figure(HEIGHT, WIDTH)
    axes = figure.subplots()
    for name, curve in curves.items():
        _plot(axes, curve, **LOOKS[name.partition("/")[0]])
    values = [value for curve in curves.values() for value in curve.values]
    metric_of(label, values, maximize=True).write_on(axes.yaxis)
    if run.best_epoch is not None and any(name.startswith("val/") for name in curves):
        axes.axvline(
            run.best_epoch, color=BLACK, linestyle=":", linewidth=1.4, zorder=1, label=f"best epoch: {run.best_epoch}"
        )
    _finish(axes)
    add_legend(axes, ncols=3)
    return figure


def _of_runs(runs: Mapping[str, Recorded], metric: str) -> Figure | None:
    curves = {name: run.curves.get(metric, Curve([], [])) for name, run in runs.items()}
    late = [value for curve in curves.values() for value in _second_half(curve) if math.isfinite(value)]
    if not late:
        return None
    num_rows = -(-len(curves) // 2)
    figure = new_figure(HEIGHT + 0.22 * num_rows, WIDTH)
    axes = figure.subplots()
    for place, (name, curve) in enumerate(curves.items()):
        look = {"color": _of(RUN_COLORS, place), "linestyle": _of(RUN_LINES, place), "marker": _of(RUN_MARKERS, place)}
        if curve.values:
            _plot(axes, curve, **look, label=drawable(name, 28))
    metric_of(metric, late, maximize=COMPARED[metric]).write_on(axes.yaxis)
    # How all of them end is what matters, not how the first epoch was.
    margin = 0.08 * (max(late) - min(late)) or 0.01
    axes.set_ylim(min(late) - margin, max(late) + margin)
    _finish(axes)
    figure.legend(loc="outside lower left", ncols=2, handlelength=3.2, fontsize=9)
    return figure


def _second_half(curve: Curve) -> list[float]:
    return curve.values[(len(curve.values) - 1) // 2 :]


def _plot(axes: Axes, curve: Curve, **look: Any) -> None:
    every = -(-len(curve.values) // MAX_MARKERS) or 1
    axes.plot(curve.epochs, curve.values, **{"linewidth": 1.6, "markersize": 4, "markevery": every, **look})


def _finish(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.set_xlim(0, 1.03 * max(1.0, axes.dataLim.x1))
    axes.xaxis.set_major_locator(whole_numbers())


def _of(choices: Any, place: int) -> Any:
    return choices[place % len(choices)]
