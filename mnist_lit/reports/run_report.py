"""report.html: a run on one page."""

import inspect
import pydoc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mnist_lit.formatting import format_duration, format_percent, format_score, format_value
from mnist_lit.reports.curves import SHOWN, draw_run
from mnist_lit.reports.page import cell, figure, keys, name_cell, page, pair, row, section, table, tile, tiles
from mnist_lit.reports.recorded import Recorded, flat, read_run
from mnist_lit.training.run_dir import write_text

__all__ = ["REPORT", "write_run_report"]

REPORT = "report.html"
# Of each chart a heading and how it is read.
CURVES = {
    "loss": (
        "Loss",
        "In training it is that of augmented images and smoothed labels, where there are any, and hence may be higher.",
    ),
    "accuracy": ("Accuracy", "Of training it is the mean over an epoch, in which the network still changes."),
    "lr": ("Learning rate", "As the schedule has it, step by step."),
}
# Of each file in pictures/ a heading, how it is read, and how many rem it needs.
CONFUSIONS = {
    "val_confusion": ("Validation: confusion", "In the last validation of the run.", 28),
    "test_confusion": ("Test: confusion", "Rows are true labels; what is off the diagonal is misread.", 28),
}
GRIDS = {
    "val_mistakes": ("Validation: misread digits", "The worst of the last validation, with the confidence.", 50),
    "test_mistakes": ("Test: misread digits", "The worst of the test, with the confidence.", 50),
    "training_images": ("Augmented inputs", "A sample of training images as the network sees them.", 50),
}


def write_run_report(run_dir: Path, defaults: Mapping[str, Any]) -> Path:
    """Show a run on a page that needs no other file.

    Args:
        run_dir: Its directory, where all that is shown is read from; what is absent there is left out.
        defaults: What its config is compared with.

    Returns:
        The page.

    Raises:
        UsageError: If the directory is none of a run, or a file in it is damaged.
        OSError: If a file cannot be read or written.
    """
    run = read_run(run_dir)
    file = run_dir / REPORT
    write_text(file, _page(run, defaults))
    return file


def _page(run: Recorded, defaults: Mapping[str, Any]) -> str:
    charts = draw_run(run)
    curves = [
        figure(*CURVES[name], charts[name], alt=_alt(run, name), min_width=18) for name in SHOWN if name in charts
    ]
    content = [
        tiles(_tiles(run)),
        pair(curves) if curves else "",
        pair(confusions) if (confusions := _pictures(run, CONFUSIONS)) else "",
        *_pictures(run, GRIDS),
        _differences(run, defaults),
        section("Facts", keys(_facts(run))),
    ]
    return page(f"Run {run.run_dir.resolve().name}", _headline(run), content)


def _headline(run: Recorded) -> str:
    epochs = f"{run.num_epochs} {'epoch' if run.num_epochs == 1 else 'epochs'}" if run.num_epochs else ""
    machine = f"{run.metrics['device']}, {run.metrics['precision']}" if "device" in run.metrics else ""
    return " · ".join(filter(None, [str(run.metrics.get("dataset", "")), epochs, machine]))


def _tiles(run: Recorded) -> list[str]:
    metrics = run.metrics
    parts = []
    if "test/acc" in metrics:
        parts.append(tile("Test accuracy", format_percent(metrics["test/acc"]), _others(metrics, "test")))
    if "val/acc" in metrics:
        told = f"best epoch {run.best_epoch} of {run.num_epochs or '?'}; {_others(metrics, 'val')}"
        parts.append(tile("Validation accuracy", format_percent(metrics["val/acc"]), told))
    if "seconds" in metrics:
        speed = f"with validation; {metrics['images_per_second']:,.0f} images per second"
        parts.append(tile("Training took", format_duration(metrics["seconds"]), speed))
    if "parameters" in metrics:
        parts.append(tile("Parameters", f"{metrics['parameters']:,}", "weights and biases"))
    return parts


def _others(metrics: Mapping[str, Any], split: str) -> str:
    names = {"loss": "loss", "f1": "F1"}
    found = {names[name]: f"{split}/{name}" for name in names if f"{split}/{name}" in metrics}
    return ", ".join(f"{name} {format_score(key, metrics[key])}" for name, key in found.items())


def _alt(run: Recorded, chart: str) -> str:
    names = [name for name in SHOWN[chart][0] if name in run.curves]
    ends = [(name, *(format_score(name, run.curves[name].values[place]) for place in (0, -1))) for name in names]
    return "; ".join(f"{name} from {first} to {last}" for name, first, last in ends)


def _pictures(run: Recorded, captions: Mapping[str, tuple[str, str, int]]) -> list[str]:
    files = {name: run.run_dir / "pictures" / f"{name}.png" for name in captions}
    return [
        figure(heading, caption, files[name].read_bytes(), alt=heading, min_width=min_width)
        for name, (heading, caption, min_width) in captions.items()
        if files[name].is_file()
    ]


# ---- The config


def _differences(run: Recorded, defaults: Mapping[str, Any]) -> str:
    known = {**flat(defaults), **_defaults_of_classes(run.config)}
    settings = {key: value for key, value in flat(run.config).items() if key not in known or known[key] != value}
    if not settings:
        return section("Configuration", "<p>Every key has its default.</p>")
    rows = [
        row([name_cell(key), cell(_text(known, key)), cell(format_value(value))]) for key, value in settings.items()
    ]
    text = '<p class="quiet">What differs from the defaults; config.yaml has all keys.</p>'
    return section("Configuration", text, table(["key", "default", "here"], rows, "Configuration"))


def _text(known: Mapping[str, Any], key: str) -> str:
    return format_value(known[key]) if key in known else ""


def _defaults_of_classes(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Of each class in a config the defaults of its arguments."""
    defaults: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and "class_path" in value:
            defaults |= {f"{prefix}{name}.{key}": default for key, default in _defaults_of(value["class_path"]).items()}
        elif isinstance(value, Mapping):
            defaults |= _defaults_of_classes(value, f"{prefix}{name}.")
    return defaults


def _defaults_of(class_path: str) -> dict[str, Any]:
    found = pydoc.locate(class_path)
    parameters = inspect.signature(found).parameters if callable(found) else {}
    values = {name: parameter.default for name, parameter in parameters.items()}
    # As YAML has them.
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value is not inspect.Parameter.empty
    }


def _facts(run: Recorded) -> dict[str, str]:
    names = ("seed", "dataset", "device", "precision", "versions")
    facts = {name: format_value(run.metrics[name]) for name in names if name in run.metrics}
    return {"run directory": str(run.run_dir), **facts, "epochs": "counted from 1 here, from 0 in metrics.json"}
