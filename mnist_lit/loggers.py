"""Loggers that write into the run directory and go on where a resumed run does."""

import csv
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.utils.tensorboard.summary import hparams

__all__ = ["CSV", "TensorBoard"]


class TensorBoard(TensorBoardLogger):
    """Event files in the run directory itself.

    Args:
        run_dir: Where they lie.
        purge_step: First step that is written again: what a killed run wrote from there on is dropped.
    """

    def __init__(self, run_dir: Path, *, purge_step: int | None) -> None:
        if purge_step is not None and any(run_dir.glob(f"events.out.tfevents.{int(time.time())}.*")):
            # TensorBoard reads files in the order of their names, which begin with the second they were made in.
            time.sleep(1)
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


class CSV(CSVLogger):
    """`metrics.csv` in the run directory, which keeps the rows of the run that is resumed.

    Args:
        run_dir: Where it lies.
        purge_step: First step that is written again: rows from there on are dropped.
    """

    def __init__(self, run_dir: Path, *, purge_step: int | None) -> None:
        super().__init__(run_dir, name="", version="")
        file = run_dir / "metrics.csv"
        self.earlier: list[dict[str, str]] = []
        if purge_step is not None and file.is_file():
            with file.open(newline="") as rows:
                self.earlier = [row for row in csv.DictReader(rows) if int(row["step"]) < purge_step]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the hyper-parameters' own file would only repeat config.yaml."""

    @property
    def experiment(self) -> Any:
        """Lightning's writer, which begins with an empty file; the earlier rows are its first."""
        writer = super().experiment
        while self.earlier:
            row = self.earlier.pop(0)
            step = int(row.pop("step"))
            writer.log_metrics({name: value for name, value in row.items() if value}, step)
        return writer
