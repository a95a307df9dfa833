"""The report of a run: report.html, one page with its metrics, curves, pictures and configuration."""

import shlex
from base64 import b64encode
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from mnist_lit.command_line import program_name
from mnist_lit.formatting import flag_names
from mnist_lit.reports.compare import read_run
from mnist_lit.reports.template import render
from mnist_lit.training.metrics import read_scalars
from mnist_lit.training.run_dir import write_text

CURVES = {"Loss": ("train/loss", "val/loss"), "Accuracy": ("train/acc", "val/acc"), "Learning rate": ("lr",)}
COLORS = ("#2f7fd6", "#e8590c")
STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}


def write_run_report(run_dir: Path, defaults: Mapping[str, Any]) -> Path:
    """Write report.html into the directory of a run; what the run does not have is left out."""
    config, metrics = read_run(run_dir)
    curves, config, defaults = read_scalars(run_dir), flag_names(config), flag_names(defaults)
    page = render(
        "reports/run_report.html.jinja",
        name=run_dir.resolve().name,
        metrics=metrics,
        num_epochs=len(curves.get("train/loss", [])),
        curves={heading: _draw(curves, tags) for heading, tags in CURVES.items() if set(tags) & set(curves)},
        pictures={file.stem: b64encode(file.read_bytes()).decode() for file in run_dir.glob("pictures/*.png")},
        differing={key: value for key, value in config.items() if key not in defaults or defaults[key] != value},
        defaults=defaults,
        program=program_name(),
        run_dir=shlex.quote(str(run_dir)),
    )
    file = run_dir / "report.html"
    write_text(file, page)
    return file


def _draw(curves: Mapping[str, Mapping[int, float]], tags: tuple[str, ...]) -> str:
    """Draw curves as SVG."""
    with mpl.rc_context(STYLE), StringIO() as file:
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.add_subplot(xlabel="optimizer step")
        for tag, color in zip(tags, COLORS, strict=False):
            if tag in curves:
                steps, values = zip(*curves[tag].items(), strict=True)
                axes.plot([step + 1 for step in steps], values, color=color, label=tag, marker=".")
        if "train/acc" in tags:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.4)
        axes.legend(frameon=False)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        svg = file.getvalue()
    return svg[svg.index("<svg") :]
