"""The C library's allocator, told to keep what a training step frees for the next one."""

from __future__ import annotations

import ctypes
import ctypes.util

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more
_KEPT_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Stop glibc from handing freed tensors back to the kernel; False where it is not glibc.

    By default blocks above 128 KiB are mapped and unmapped one by one, and every page of every
    activation is faulted in and zeroed again at each step: 10 % of a CPU step of the demo.
    Costs up to 1 GiB of memory that stays with the process.
    """
    name = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(name), "mallopt", None) if name else None
    if mallopt is None:
        return False
    kept = mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
