"""Freed memory stays in the process once asked for; tried in a process of its own, as it cannot be undone."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from molkd.pipeline.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        kept = [torch.ones(1_000_000) for _ in range(4)]  # 4 MB each
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_repeated_allocations_stop_faulting():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1_000  # by default mostly 77,000: 20 rounds of 4,000 pages
