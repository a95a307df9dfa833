"""Loggers that write into the run directory and go on where a resumed run does."""

import csv
import io
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from mnist_lit.training.run_dir import write_text

__all__ = ["CSV", "TensorBoard"]

EVENTS = "events.out.tfevents."


class TensorBoard(TensorBoardLogger):
    """Event files in the run directory itself.

    Args:
        run_dir: Where they lie.
        purge_step: First step that is written again: what a killed run wrote from there on is dropped.
    """

    def __init__(self, run_dir: Path, *, purge_step: int | None) -> None:
        if purge_step is not None:
            _date_back(sorted(run_dir.glob(f"{EVENTS}*")))
        super().__init__(run_dir, name="", version="", default_hp_metric=False, purge_step=purge_step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: dict[str, Any] | None = None, step: int | None = None) -> None:
        """Record the hyper-parameters beside the metrics, whose values are logged as all others are.

        Lightning would also log them at step 0, once more for each resume. TensorBoard has no place for
        hyper-parameters without a metric.
        """
        if metrics:
            # torch would write a bool as 0.0 or 1.0.
            texts = {name: str(value) for name, value in params.items() if isinstance(value, bool)}
            for summary in hparams({**params, **texts}, metrics):  # type: ignore[no-untyped-call]
                self.experiment.file_writer.add_summary(summary)

    @rank_zero_only
    def save(self) -> None:
        """Flush; the hyper-parameters' own file would only repeat config.yaml."""
        self.experiment.flush()


def _date_back(files: Sequence[Path]) -> None:
    """Let files of events be older than the ones to come: TensorBoard reads them in the order of their names.

    These begin with the second that the files were made in; the clock may have been set back since, and a run may go on
    within a second.
    """
    made = {file: int(file.name.removeprefix(EVENTS).partition(".")[0]) for file in files}
    seconds = max(made.values(), default=0) + 1 - int(time.time())
    for file in files if seconds > 0 else []:
        rest = file.name.removeprefix(EVENTS).partition(".")[2]
        file.rename(file.with_name(f"{EVENTS}{made[file] - seconds:010d}.{rest}"))


class CSV(Logger):
    """`metrics.csv` in the run directory, which keeps the rows of the run that is resumed.

    Lightning's own deletes an earlier file when it begins, and writes it a second time, in place, for a new column.

    Args:
        run_dir: Where it lies.
        purge_step: First step that is written again: rows from there on are dropped.
    """

    name = version = ""

    def __init__(self, run_dir: Path, *, purge_step: int | None) -> None:
        super().__init__()
        self.file = run_dir / "metrics.csv"
        self.columns: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.num_written = 0
        if purge_step is not None and self.file.is_file():
            *lines, _ = self.file.read_text(encoding="utf-8").split(
                "\n"
            )  # what follows the last end of line is cut off
            self.rows = [row for row in csv.DictReader(lines) if int(row["step"]) < purge_step]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: they are in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Take a row; Lightning calls `save` next."""
        self.rows.append({**metrics, "step": step})

    @rank_zero_only
    def save(self) -> None:
        """Add the new rows to the file; where they have a column that it lacks, write all of it."""
        new = self.rows[self.num_written :]
        columns = sorted({"step", *self.columns}.union(*new))
        if columns != self.columns:
            write_text(self.file, _csv(columns, [dict(zip(columns, columns, strict=True)), *self.rows]))
        elif new:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(_csv(columns, new))
        self.columns, self.num_written = columns, len(self.rows)


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()
