"""Settings of the process that make training on a CPU faster and change no result."""

import ctypes
import os
import sys

import torch

__all__ = ["tune"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
GIGABYTE = 2**30


def tune() -> None:
    """Apply them; where there is nothing to gain, nothing is done."""
    if sys.platform == "linux":
        _keep_freed_memory()
    if not torch.cuda.is_available():
        # Lightning has torch ask the driver's library whether there is a GPU, which optimizers do at each step: half a
        # millisecond to find that there is no such library.
        os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)


def _keep_freed_memory() -> None:
    """Reuse the memory of a step for the next one, instead of returning it, to get it anew and full of zeros."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, GIGABYTE)
        mallopt(M_MMAP_THRESHOLD, GIGABYTE)
