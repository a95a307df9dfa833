"""The console: logging levels and warning filters."""

import logging
import threading
import warnings

LOG_LEVELS = {
    "lightning.pytorch": logging.WARNING,
    "lightning.fabric": logging.WARNING,
    "lightning.pytorch.loggers.mlflow": logging.ERROR,  # reports that it creates the experiment
    "tensorboard": logging.ERROR,  # reports which events of a resumed run it drops
    "mlflow.store.db.utils": logging.WARNING,  # reports that it creates its tables
}
# Warnings that need no action, each with the reason.
IGNORED_WARNINGS = (
    "does not have many workers",  # the data is in memory
    "smaller than the logging interval",  # metrics are logged by epoch
    "Checkpoint directory .* exists and is not empty",  # a resumed run
    "could not find the monitored key in the returned metrics",  # the run ends before its first validation
    "Total length of `.*` across ranks is zero",  # data.val_size: 0, or images without a digit
    "PyTorch Profiler default schedule will be overridden",  # a profile has few steps
    "Profiler clears events at the end of each cycle",
    "overfit but enabled train dataloader shuffling",  # Lightning turns it off
    "`isinstance.treespec, LeafSpec.` is deprecated",  # in Lightning's call of torch
    "Using padding='same' with even kernel lengths",  # the copy is small
    "`torch.jit.trace",  # TensorBoard's graph
    r"Glyph .* missing from font",  # names of classes in other scripts
    "__array__ implementation doesn't accept a copy keyword",  # torchmetrics gives matplotlib a tensor
    "callbacks used to create the checkpoint need to be provided",  # only training needs them
)


def configure_logging() -> None:
    """Configure logging levels, warning filters and the threads' excepthook."""
    for name, level in LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", f".*{message}")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    threading.excepthook = _ignore_os_errors


def _ignore_os_errors(args: threading.ExceptHookArgs) -> None:
    # TensorBoard's writer raises the error of its thread again in the main thread, at the next event.
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)
