"""Settings for the hardware that change no result."""

import platform
import subprocess
import sys

import pytest

# How many pages the kernel hands out for ten large blocks, each freed before the next one.
PAGES = """
import resource, torch
from mnist_lit.training.hardware import configure_cpu
{tuned}
def use(): return torch.ones(2**23).sum()
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def num_pages(tuned: str) -> int:
    return int(subprocess.check_output([sys.executable, "-c", PAGES.format(tuned=tuned)], text=True))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_freed_memory_is_used_again() -> None:
    assert num_pages("configure_cpu()") < num_pages("") / 4
