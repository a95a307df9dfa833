"""The run directory's logger: TensorBoard's event files, and metrics.csv made from them."""

import csv
import io
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from mnist_lit.training.run_dir import write_text

__all__ = ["TensorBoard"]

EVENTS = "events.out.tfevents."


class TensorBoard(TensorBoardLogger):
    """Write event files into the run directory itself.

    Args:
        run_dir: Directory of the run.
        purge_step: First step that a resumed run writes again: what a killed run has logged from there on is dropped.
        csv: Whether the end of each command also writes `metrics.csv`.
    """

    def __init__(self, run_dir: Path, *, purge_step: int | None, csv: bool = False) -> None:
        if purge_step is not None:
            _renumber(run_dir)
        super().__init__(run_dir, name="", version="", default_hp_metric=False, purge_step=purge_step)
        self.csv = csv

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars, but not the epoch, which Lightning adds: its chart is a straight line."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Mapping[str, float] | None = None, step: int | None = None) -> None:
        """Record the hyper-parameters beside metrics that are logged elsewhere.

        Lightning would also log the metrics, once more for each resume. Without a metric TensorBoard shows none.
        """
        if metrics:
            # torch would write a bool as 0.0 or 1.0.
            texts = {name: str(value) for name, value in params.items() if isinstance(value, bool)}
            for summary in hparams({**params, **texts}, dict(metrics)):  # type: ignore[no-untyped-call]
                self.experiment.file_writer.add_summary(summary)

    @rank_zero_only
    def save(self) -> None:
        """Flush the events; Lightning's file of hyper-parameters would only repeat config.yaml."""
        self.experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the event file; write metrics.csv if wanted."""
        super().finalize(status)
        if self.csv:
            _write_csv(Path(self.log_dir))


def _renumber(run_dir: Path) -> None:
    """Give the event files of a run earlier names than those to come.

    TensorBoard takes them in the order of their names, which begin with the second in which they were made. The clock
    may have been set back since then, and a run may be resumed within the same second.
    """
    files = sorted(run_dir.glob(f"{EVENTS}*"))
    if files and files[-1].name >= f"{EVENTS}{int(time.time()):010d}":
        for number, file in enumerate(files):
            _, _, rest = file.name.removeprefix(EVENTS).partition(".")
            file.rename(file.with_name(f"{EVENTS}{number:010d}.{rest}"))


def _write_csv(run_dir: Path) -> None:
    """Write `metrics.csv`: a row for each step, a column for each scalar of the event files."""
    # Imported here as it takes a tenth of a second, and few runs want the table.
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={SCALARS: 0}).Reload()
    tags = events.Tags()[SCALARS]
    rows: dict[int, dict[str, str]] = defaultdict(dict)
    for tag in tags:
        for event in events.Scalars(tag):
            rows[event.step][tag] = f"{event.value:.8g}"  # events hold single precision
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", *sorted(tags)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({"step": str(step), **rows[step]} for step in sorted(rows))
    write_text(run_dir / "metrics.csv", text.getvalue())
