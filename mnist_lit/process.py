"""Settings of this process: environment variables, log levels, warnings, threads, memory and precision.

Its functions import torch themselves, as some of these settings come before that.
"""

import ctypes
import logging
import os
import sys
import threading
import warnings

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h of glibc
GIGABYTE = 2**30
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


def set_import_variables() -> None:
    """Set the environment variables that libraries read when they are imported, where the user has not."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # no bars in a log file
    # OpenMP's threads spin while they wait for each other, by default 300,000 times. On a core that another process
    # shares, that costs whole time slices: two runs at once took 3.6 times as long as one, with 4,000 times 2.1 times
    # as long. A run alone lost 3 to 7 % by it (scripts/benchmark.py busy).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    # onnxruntime and MLflow would report their use over the network.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


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


def configure_cpu() -> None:
    """Make training on a CPU faster."""
    import joblib  # type: ignore[import-untyped]
    import torch

    if "OMP_NUM_THREADS" not in os.environ and joblib.cpu_count() < torch.get_num_threads():
        torch.set_num_threads(joblib.cpu_count())  # torch counts the cores of the machine, not those of its container
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # only glibc has it
    if mallopt is not None:
        # Keep the freed memory of a step for the next one: the kernel would fill it with zeros again.
        mallopt(M_TRIM_THRESHOLD, GIGABYTE)
        mallopt(M_MMAP_THRESHOLD, GIGABYTE)
    if not torch.cuda.is_available():
        # Set by Lightning. With it optimizers look for the driver's library at each step, for half a millisecond.
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)


def native_precision(accelerator: str) -> str:
    """Choose bf16 where the Trainer's accelerator computes in it, else Lightning's default."""
    import torch

    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "32-true"
    # Older releases of torch do not list the capabilities of a CPU.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    has_bf16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16-mixed" if has_bf16 else "32-true"
