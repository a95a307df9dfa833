"""Settings for the hardware that change no result."""

import platform
import subprocess
import sys

import pytest
import torch

# How many pages the kernel hands out for ten large blocks, each freed before the next one.
PAGES = """
import resource, torch
import lightning.pytorch
from mnist_lit.training.hardware import configure_cpu
{tuned}
def use(): return torch.ones(2**23).sum()
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
VARIABLE = """
import os
import lightning.pytorch
from mnist_lit.training.hardware import configure_cpu
configure_cpu()
print(os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK"))
"""


def output(script: str) -> str:
    return subprocess.check_output([sys.executable, "-c", script], text=True).strip()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_freed_memory_is_used_again() -> None:
    pages = int(output(PAGES.format(tuned="configure_cpu()")))
    assert pages < int(output(PAGES.format(tuned=""))) / 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the check is cheap, and needed by others")
def test_without_a_gpu_nothing_asks_for_its_driver_at_each_step() -> None:
    assert output(VARIABLE) == "None"
