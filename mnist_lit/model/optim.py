"""Optimizer and learning-rate schedule: build them, and go on with them from a checkpoint."""

import functools
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from lightning.pytorch import Trainer
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mnist_lit.class_paths import accepted_parameters, instantiate
from mnist_lit.errors import MNISTLitError

__all__ = [
    "OptimizerFactory",
    "ScheduleFactory",
    "apply_settings",
    "build_optimizer",
    "build_schedule",
    "check_states",
    "remaining_steps",
    "restore_matching",
]

LENGTHS = ("total_steps", "total_iters", "T_max")
PLATEAU_STATE = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


class OptimizerFactory(Protocol):
    """Builds an optimizer; its learning rate is `model.lr` and therefore no key of the optimizer."""

    def __call__(self, params: Iterable[dict[str, Any]], lr: float) -> Optimizer:
        """Build the optimizer of the parameter groups `params` with the learning rate `lr`."""


class ScheduleFactory(Protocol):
    """Builds a schedule; its number of steps and its peak are filled in and therefore no keys of it."""

    def __call__(
        self, optimizer: Optimizer, *, total_steps: int, total_iters: int, T_max: int, max_lr: float
    ) -> LRScheduler:
        """Build the schedule of `optimizer` with those of the other arguments that its class accepts."""


def build_optimizer(factory: OptimizerFactory | None, network: nn.Module, lr: float) -> Optimizer:
    """Build the optimizer of a network, without weight decay for biases and normalisations.

    Args:
        factory: The optimizer's factory; None for the fused AdamW.
        network: Its parameters that require gradients are optimized.
        lr: Learning rate, above 0.
    """
    build: Callable[..., Optimizer] = factory or functools.partial(AdamW, fused=True)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if "weight_decay" not in accepted_parameters(build):
        return build(parameters, lr=lr)
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    return build([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=lr)


def build_schedule(
    factory: ScheduleFactory, optimizer: Optimizer, *, max_lr: float, num_steps: float, num_done: int = 0
) -> LRScheduler:
    """Build a schedule and advance it to its present step.

    Args:
        factory: The schedule's factory.
        optimizer: The optimizer whose learning rate it sets.
        max_lr: Peak of the learning rate.
        num_steps: Optimizer steps from its beginning to its end; infinite if they are not known.
        num_done: Those of them that are done.

    Raises:
        MNISTLitError: If the schedule needs a number of steps and there is none.
    """
    if math.isinf(num_steps) and not accepted_parameters(factory).isdisjoint(LENGTHS):
        raise MNISTLitError("model.schedule needs a number of steps\ngive trainer.max_epochs or trainer.max_steps")
    lengths = dict.fromkeys(LENGTHS, max(1, num_steps))
    schedule: LRScheduler = instantiate(factory, optimizer, max_lr=max_lr, **lengths)
    with warnings.catch_warnings(action="ignore"):  # the optimizer has made no step yet
        for _ in range(num_done):
            schedule.step()
    return schedule


def remaining_steps(trainer: Trainer) -> float:
    """Count the optimizer steps from where a trainer is to its end; infinite if it has none."""
    num_batches, progress = trainer.accumulate_grad_batches, trainer.fit_loop.epoch_loop.batch_progress
    num_steps = math.inf
    if trainer.max_epochs not in (None, -1) and not math.isinf(trainer.num_training_batches):
        num_epochs = trainer.max_epochs - trainer.current_epoch
        num_steps = num_epochs * math.ceil(trainer.num_training_batches / num_batches)
        if not progress.is_last_batch:
            num_steps -= progress.current.ready // num_batches
    if trainer.max_steps != -1:
        num_steps = min(num_steps, trainer.max_steps - trainer.global_step)
    return max(0, num_steps)


def apply_settings(optimizer: Optimizer, configured: Optimizer, *, keep_lr: bool) -> None:
    """Give an optimizer with a checkpoint's state the settings of this run.

    Args:
        optimizer: The optimizer; what is no argument of its constructor stays as it is.
        configured: An optimizer of the same class with the settings of this run.
        keep_lr: Whether the learning rate stays, too.
    """
    settings = set(inspect.signature(type(optimizer)).parameters) - {"params"} - ({"lr"} if keep_lr else set())
    for group, own in zip(optimizer.param_groups, configured.param_groups, strict=True):
        group.update({name: value for name, value in own.items() if name in settings})


def check_states(optimizer: Optimizer) -> None:
    """Make sure that a fused optimizer's state has the shapes of its parameters.

    Raises:
        MNISTLitError: If it has not: fused optimizers would write beyond the end of smaller tensors.
    """
    for parameter, state in optimizer.state.items() if optimizer.defaults.get("fused") else ():
        shapes = {value.shape for value in state.values() if isinstance(value, Tensor) and value.ndim}
        if shapes - {parameter.shape}:
            raise MNISTLitError("the checkpoint's optimizer_states are of another network")


def restore_matching(checkpoint: dict[str, Any], hyper_parameters: Mapping[str, Any]) -> tuple[int, bool]:
    """Remove the states of other classes, and of schedules that are built anew, from a checkpoint.

    Args:
        checkpoint: The checkpoint; it is changed.
        hyper_parameters: The model's arguments in this run.

    Returns:
        The steps that the schedule has done, and whether the optimizer's learning rate is part of its state.
    """
    recorded = checkpoint.get("hyper_parameters") or {}
    same = {}
    for name in ("optimizer", "schedule"):
        before, now = _class_path(recorded, name), _class_path(hyper_parameters, name)
        same[name] = before == now
        if before != now:
            _note(f"model.{name} is {now} here and {before} in the checkpoint: it starts with fresh state")
    if not same["optimizer"]:
        checkpoint["optimizer_states"] = []
    states, checkpoint["lr_schedulers"] = checkpoint.get("lr_schedulers") or [], []
    if not states or not same["schedule"]:
        return 0, False
    if "num_bad_epochs" in states[0]:  # ReduceLROnPlateau follows the validation loss, not the steps
        checkpoint["lr_schedulers"] = [{name: states[0][name] for name in PLATEAU_STATE}]
        return 0, same["optimizer"] and recorded.get("lr") == hyper_parameters.get("lr")
    return int(states[0]["last_epoch"]), False


def _class_path(hyper_parameters: Mapping[str, Any], name: str) -> str | None:
    value = hyper_parameters.get(name)
    return value["class_path"] if isinstance(value, dict) else None


@rank_zero_only
def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
