"""Loops as machine code, kept on disk where some folder can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """njit without Python's lock, compiled at the first call with a new kind of argument."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:
        # numba found no writable cache folder (read-only installation without a home)
        return numba.njit(nogil=True)(function)
