"""Optimizer and learning-rate schedule: build them, and go on with them from a checkpoint."""

import functools
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mnist_lit.class_paths import accepted_parameters, instantiate
from mnist_lit.errors import MNISTLitError, UsageError
from mnist_lit.training.run_dir import is_global_zero

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
    """Build the optimizer of a network, without weight decay for biases and normalisations."""
    build: Callable[..., Optimizer] = factory or functools.partial(AdamW, fused=True)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    others = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    try:
        optimizer = build(groups if "weight_decay" in accepted_parameters(build) else parameters, lr=lr)
    except ValueError as error:
        raise UsageError(f"model.optimizer: {error}") from error
    # Lightning clips no gradients of a fused optimizer that unscales them itself.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # noqa: SLF001
    return optimizer


def build_schedule(
    factory: ScheduleFactory, optimizer: Optimizer, lr: float, num_steps: float, *, num_done: int = 0
) -> LRScheduler:
    """Build a schedule of `num_steps` optimizer steps, and advance it by `num_done` of them."""
    if math.isinf(num_steps) and not accepted_parameters(factory).isdisjoint(LENGTHS):
        raise UsageError("model.schedule needs a number of steps\ngive trainer.max_epochs or trainer.max_steps")
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = lr  # not what another schedule or a checkpoint has set
    lengths = dict.fromkeys(LENGTHS, max(1, num_steps))
    try:
        schedule: LRScheduler = instantiate(factory, optimizer, max_lr=lr, **lengths)
    except ValueError as error:  # torch's sentence may be about either of them
        raise UsageError(f"model.schedule with model.optimizer {type(optimizer).__name__}: {error}") from error
    with warnings.catch_warnings(action="ignore"):  # the optimizer has made no step yet
        for _ in range(num_done):
            schedule.step()
    return schedule


def remaining_steps(trainer: Trainer) -> float:
    """Count the optimizer steps from where a trainer is to its end; infinite if it has none."""
    num_batches, progress = trainer.accumulate_grad_batches, trainer.fit_loop.epoch_loop.batch_progress
    num_steps = math.inf
    if trainer.max_epochs not in (None, -1) and not math.isinf(trainer.num_training_batches):
        per_epoch = math.ceil(trainer.num_training_batches / num_batches)
        # Where an epoch was stopped beyond the length that it has now, Lightning begins it anew.
        current = progress.current
        is_anew = progress.is_last_batch or current.completed < current.ready >= trainer.num_training_batches
        num_done = 0 if is_anew else min(per_epoch, current.ready // num_batches)
        num_steps = (trainer.max_epochs - trainer.current_epoch) * per_epoch - num_done
    if trainer.max_steps != -1:
        num_steps = min(num_steps, trainer.max_steps - trainer.global_step)
    return max(0, num_steps)


def check_states(optimizer: Optimizer) -> None:
    """Refuse states that do not fill their parameters: a fused optimizer would write beyond the end of them."""
    for parameter, state in optimizer.state.items() if optimizer.defaults.get("fused") else ():
        for value in state.values():
            if not isinstance(value, Tensor) or value.ndim == 0:
                continue
            if value.shape != parameter.shape or value.untyped_storage().nbytes() < value.nbytes:
                raise MNISTLitError("the checkpoint's optimizer_states are of another network")


def apply_settings(
    checkpoint: dict[str, Any], hyper_parameters: Mapping[str, Any], configured: Optimizer
) -> tuple[int, float]:
    """Give a checkpoint's states the settings of this run; return the schedule's steps and learning rate so far."""
    recorded = checkpoint.get("hyper_parameters") or {}
    has_same = {}
    for name in ("optimizer", "schedule"):
        specs = (recorded.get(name), hyper_parameters.get(name))
        before, now = (spec["class_path"] if isinstance(spec, dict) else None for spec in specs)
        has_same[name] = before == now
        if before != now and is_global_zero():
            texts = f"{now or 'null'} here, {before or 'null'} in the checkpoint"
            print(f"note: model.{name} is {texts}: its state is fresh", file=sys.stderr)
    schedule: dict[str, Any] = next(iter(checkpoint.get("lr_schedulers", [])), {}) if has_same["schedule"] else {}
    has_plateau = "num_bad_epochs" in schedule  # it follows the loss, not the steps
    checkpoint["lr_schedulers"] = [{name: schedule[name] for name in PLATEAU_STATE}] if has_plateau else []
    if not has_same["optimizer"]:
        checkpoint["optimizer_states"] = []
    # What is no argument of the optimizer is part of its state.
    settings = set(inspect.signature(type(configured)).parameters) - {"params"}
    if has_plateau and recorded.get("lr") == hyper_parameters.get("lr"):
        settings -= {"lr"}
    for state in checkpoint.get("optimizer_states", []):
        for group, own in zip(state["param_groups"], configured.param_groups, strict=False):
            group.update({name: value for name, value in own.items() if name in settings})
    if has_plateau or not schedule:
        return 0, math.inf
    return schedule["last_epoch"], schedule.get("_last_lr", [math.inf])[0]
