"""The report of a run: report.html, one page with its metrics, curves, pictures and configuration."""

import inspect
import math
import pydoc
import shlex
from base64 import b64encode
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from mnist_lit.reports.run_data import flatten, read_run
from mnist_lit.reports.template import render
from mnist_lit.training.run_dir import write_text

__all__ = ["REPORT", "write_run_report"]

REPORT = "report.html"
CURVES = {"Loss": ("train/loss", "val/loss"), "Accuracy": ("train/acc", "val/acc"), "Learning rate": ("lr",)}
COLORS = ("#2f7fd6", "#e8590c")  # legible on white and on black
INK = "#010203"  # stands for the colour of the page's text, which is known to the browser only
STYLE: dict[Any, Any] = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none", "font.family": "sans-serif"}


def write_run_report(run_dir: Path, defaults: Mapping[str, Any]) -> Path:
    """Write report.html into the directory of a run.

    Args:
        run_dir: The directory; what is absent in it is left out of the page.
        defaults: The configuration that the run's is compared with.

    Returns:
        The page.

    Raises:
        UsageError: If the directory holds no run, or a file in it is damaged.
        OSError: If a file cannot be read or written.
    """
    config, metrics = read_run(run_dir)
    known, curves = {**flatten(defaults), **_defaults_of_classes(config)}, _read_curves(run_dir)
    page = render(
        "reports/run_report.html.jinja",
        name=run_dir.resolve().name,
        metrics=metrics,
        num_epochs=len(curves.get("train/loss", [])),
        curves={heading: _draw(curves, tags) for heading, tags in CURVES.items() if set(tags) & set(curves)},
        pictures={file.stem: b64encode(file.read_bytes()).decode() for file in run_dir.glob("pictures/*.png")},
        differing={key: value for key, value in flatten(config).items() if key not in known or known[key] != value},
        known=known,
        run_dir=shlex.quote(str(run_dir)),
    )
    write_text(run_dir / REPORT, page)
    return run_dir / REPORT


def _read_curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Read steps and values of each scalar, without those of later validations, which stand at earlier steps."""
    events = EventAccumulator(str(run_dir), size_guidance={SCALARS: 0})
    events.Reload()
    curves: dict[str, list[tuple[int, float]]] = {}
    for tag in events.Tags()[SCALARS]:
        curve = curves.setdefault(tag, [])
        for point in events.Scalars(tag):
            if not curve or point.step + 1 > curve[-1][0]:
                curve.append((point.step + 1, point.value))
    return curves


def _draw(curves: Mapping[str, list[tuple[int, float]]], tags: tuple[str, ...]) -> str:
    """Draw curves as SVG."""
    with mpl.rc_context(), StringIO() as file:
        mpl.rcdefaults()  # a user's matplotlibrc may say anything
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.add_subplot(xlabel="optimizer step")
        for tag, color in zip(tags, COLORS, strict=False):
            curve = curves.get(tag, [(math.nan, math.nan)])
            axes.plot(*zip(*curve, strict=True), color=color, label=tag, marker="o" if len(curve) < 30 else "", ms=4)
        if "train/acc" in tags:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(color=INK, alpha=0.15)
        axes.legend(frameon=False)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def _defaults_of_classes(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Collect the defaults of the arguments of each class in a configuration, as YAML has them."""
    defaults: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and "class_path" in value:
            found = pydoc.locate(value["class_path"])
            for key, parameter in inspect.signature(found).parameters.items() if callable(found) else ():
                default = parameter.default
                defaults[f"{prefix}{name}.{key}"] = list(default) if isinstance(default, tuple) else default
        elif isinstance(value, Mapping):
            defaults |= _defaults_of_classes(value, f"{prefix}{name}.")
    return defaults
