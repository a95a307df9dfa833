"""Report the metrics of a trial to Optuna, and stop it where the pruner says so."""

import math
from collections.abc import Sequence
from typing import Any

import optuna
from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError

from mnist_lit.errors import MNISTLitError
from mnist_lit.search.settings import Objective, UnknownMetricError

RUN_METRICS = ("parameters", "seconds", "images_per_second")  # of metrics.json, which a run writes when it ends


class Pruning(Callback):
    """Report metrics at each validation, and stop pruned trials."""

    def __init__(self, objectives: Sequence[Objective], trial: optuna.Trial | None) -> None:
        self.objectives, self.trial, self.is_pruned = objectives, trial, False
        self.history: dict[str, list[float]] = {one.metric: [] for one in objectives if one.metric not in RUN_METRICS}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        for metric, values in self.history.items():
            if metric not in trainer.callback_metrics:
                names = [*trainer.callback_metrics, *RUN_METRICS]
                raise UnknownMetricError(f"objective.metric: no validation logs {metric}\nthere are {', '.join(names)}")
            values.append(float(trainer.callback_metrics[metric]))
        if self._should_prune() and trainer.global_step < trainer.estimated_stepping_batches:
            self.is_pruned = trainer.should_stop = True

    def score(self, objective: Objective, metrics: dict[str, Any]) -> float:
        """Return the score for an objective."""
        if objective.metric in RUN_METRICS:
            return float(metrics[objective.metric])
        values = self.history[objective.metric]
        numbers = [value for value in (values[-1:] if objective.value == "last" else values) if not math.isnan(value)]
        if not numbers:
            raise MNISTLitError(f"{objective.metric} is not a number")
        return max(numbers) if objective.direction == "maximize" else min(numbers)

    def _should_prune(self) -> bool:
        """Report the last value to the study, and ask the pruner."""
        values = self.history.get(self.objectives[0].metric)
        if self.trial is None or len(self.objectives) > 1 or not values or math.isnan(values[-1]):
            return False
        try:
            self.trial.report(values[-1], len(values) - 1)
            return self.trial.should_prune()
        except UpdateFinishedTrialError:
            return True  # another driver has failed this trial as stale
        except StorageInternalError:
            return False  # a database that goes away misses this value
