"""Settings for the hardware: the precision, and the memory allocator of a CPU."""

import ctypes
import os
import sys

import joblib  # type: ignore[import-untyped]
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h of glibc
GIGABYTE = 2**30


def native_precision(accelerator: str) -> str:
    """Choose bf16 where the Trainer's accelerator computes in it, else Lightning's default."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "32-true"
    # Older releases of torch do not list the capabilities of a CPU.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    has_bf16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16-mixed" if has_bf16 else "32-true"


def configure_cpu() -> None:
    """Make training on a CPU faster."""
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
