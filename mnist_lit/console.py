"""A quiet console: what nobody can act on is not said."""

import logging
import threading
import warnings

__all__ = ["configure_logging"]

LOG_LEVELS = {
    "lightning.pytorch": logging.WARNING,
    "lightning.fabric": logging.WARNING,
    "lightning.pytorch.loggers.mlflow": logging.ERROR,  # it says that it makes the experiment it was asked for
    "tensorboard": logging.ERROR,  # it says which events of a run that was gone on with it passes over
    "mlflow.store.db.utils": logging.WARNING,  # it says that it makes its tables
}
# One message each, with the reason why nobody needs to read it.
NEEDLESS_WARNINGS = [
    "does not have many workers",  # the data is in memory
    "smaller than the logging interval",  # what is logged by epoch is logged all the same
    "Checkpoint directory .* exists and is not empty",  # a run that goes on
    "WeightAveraging callback, but loading a checkpoint outside",  # a test uses the average that it holds
    "Total length of `.*` across ranks is zero",  # data.val_size: 0, photographs without a digit
    "Experiment logs directory .* exists and is not empty",  # it is the run directory; nothing in it is deleted
    "PyTorch Profiler default schedule will be overridden",  # few steps are what a profile wants
    "Profiler clears events at the end of each cycle",
    "overfit but enabled train dataloader shuffling",  # it is turned off, as overfitting wants
    "`isinstance.treespec, LeafSpec.` is deprecated",  # between Lightning and torch
    "Using padding='same' with even kernel lengths",  # the copy is small
    "`torch.jit.trace",  # what TensorBoard draws the graph from
]


def configure_logging() -> None:
    """Keep the messages above from the console."""
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    for message in NEEDLESS_WARNINGS:
        warnings.filterwarnings("ignore", f".*{message}")
    threading.excepthook = _report_unless_told_later


def _report_unless_told_later(died: threading.ExceptHookArgs) -> None:
    # The thread that writes TensorBoard's events lets the next one who has an event raise what the disk has said.
    if not issubclass(died.exc_type, OSError):
        threading.__excepthook__(died)
