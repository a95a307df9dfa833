"""A trial's eye on its own training: scores at each validation, and an early end for hopeless trials."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from mnist_lit.app import did_you_mean
from mnist_lit.errors import UsageError
from mnist_lit.search.settings import Objective

__all__ = ["FACTS", "Pruning", "UnknownMetricError"]

# Numbers that a run records when it has ended.
FACTS = ("parameters", "seconds", "images_per_second")


class UnknownMetricError(UsageError):
    """No run logs the metric that a search wants."""


class Pruning(Callback):
    """Report the objectives' metrics at each validation, and stop where that is the answer.

    Args:
        objectives: What the search wants.
        ask: Is given the number of the validation, from 0, and the metrics; says whether the trial is hopeless.
    """

    def __init__(self, objectives: list[Objective], ask: Any) -> None:
        self.objectives = objectives
        self.ask = ask
        self.history: list[dict[str, float]] = []
        self.is_pruned = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        metrics = [objective.metric for objective in self.objectives if objective.metric not in FACTS]
        for metric in metrics:
            if metric not in logged:
                raise UnknownMetricError(_unknown(metric, [*logged, *FACTS]))
        self.history.append({metric: logged[metric] for metric in metrics})
        is_end = trainer.global_step >= trainer.estimated_stepping_batches
        if self.ask(len(self.history) - 1, [logged[metric] for metric in metrics]) and not is_end:
            self.is_pruned = True
            trainer.should_stop = True

    def scores(self, facts: dict[str, Any]) -> list[float]:
        """The score for each objective.

        Args:
            facts: What the run has recorded of itself.

        Raises:
            UnknownMetricError: If there was no validation.
        """
        return [self._score(objective, facts) for objective in self.objectives]

    def _score(self, objective: Objective, facts: dict[str, Any]) -> float:
        if objective.metric in FACTS:
            return float(facts[objective.metric])
        values = [metrics[objective.metric] for metrics in self.history]
        if not values:
            raise UnknownMetricError(f"objective.metric: {objective.metric} is never logged: no trial is validated")
        if objective.value == "last":
            return values[-1]
        best = max if objective.direction == "maximize" else min
        return best((value for value in values if not math.isnan(value)), default=math.nan)


def _unknown(metric: str, names: list[str]) -> str:
    hint = did_you_mean(metric, names)
    lines = [f"objective.metric: no run logs {metric} at its validations", hint, f"there are {', '.join(names)}"]
    return "\n".join(line for line in lines if line)
