"""The allocator setting: page faults of repeated large allocations go away."""

from __future__ import annotations

import subprocess
import sys

_COUNT_FAULTS = """
import resource, sys, torch
from mlip.training.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2_000_000)  # 8 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def test_freed_tensors_are_not_faulted_in_again() -> None:
    counts = {}
    for kind in ("plain", "kept"):
        command = [sys.executable, "-c", _COUNT_FAULTS, kind]
        counts[kind] = int(subprocess.run(command, capture_output=True, check=True).stdout)
    # 8 MB are 2,000 pages of 4 KiB, or 4 huge ones
    assert counts["kept"] <= counts["plain"] / 10 + 5
