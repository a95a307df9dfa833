"""The run directory's logger: TensorBoard's event files, and metrics.csv made from them."""

import csv
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from mnist_lit.training.run_dir import atomic_write, is_global_zero

__all__ = ["TensorBoard"]

HPARAMS_METRIC = "val/acc_best"


class TensorBoard(TensorBoardLogger):
    """Write event files into the run directory itself, and `metrics.csv` if wanted.

    A resumed run gives the step that it goes on from: what a killed run has logged from there on is dropped.
    """

    def __init__(self, run_dir: Path, *, purge_step: int | None, csv: bool = False) -> None:
        if purge_step is not None and is_global_zero():
            _renumber_events(run_dir)
        super().__init__(run_dir, name="", version="", default_hp_metric=False, purge_step=purge_step)
        self.csv = csv
        self.params: dict[str, Any] = {}

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Mapping[str, float] | None = None, step: int | None = None) -> None:
        """Keep the hyper-parameters: TensorBoard shows them only beside a metric, once there is one."""
        # torch would write a bool as 0.0 or 1.0.
        self.params = {name: str(value) if isinstance(value, bool) else value for name, value in params.items()}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars, but not the epoch, which Lightning adds: its chart is a straight line."""
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)
        if self.params and HPARAMS_METRIC in metrics:
            for summary in hparams(self.params, {HPARAMS_METRIC: metrics[HPARAMS_METRIC]}):  # type: ignore[no-untyped-call]
                self.experiment.file_writer.add_summary(summary)
            self.params = {}

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


def _renumber_events(run_dir: Path) -> None:
    # TensorBoard sorts event files by name, which begins with the second they were made in; the clock may go back.
    for number, file in enumerate(sorted(run_dir.glob("events.out.tfevents.*"))):
        *_, rest = file.name.split(".", 4)
        file.rename(file.with_name(f"events.out.tfevents.{number:010d}.{rest}"))


def _write_csv(run_dir: Path) -> None:
    """Write `metrics.csv`: a row for each step, a column for each scalar of the event files."""
    # Imported here as it takes a tenth of a second, and few runs want the table.
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={SCALARS: 0}).Reload()
    rows: dict[int, dict[str, Any]] = defaultdict(dict)
    for tag in events.Tags()[SCALARS]:
        for event in events.Scalars(tag):
            rows[event.step] |= {"step": event.step, tag: f"{event.value:.8g}"}  # events hold single precision
    with atomic_write(run_dir / "metrics.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["step", *sorted(events.Tags()[SCALARS])], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))
