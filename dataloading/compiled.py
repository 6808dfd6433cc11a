"""Loops as machine code, kept on disk where some folder can be written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numba
from numba.core.caching import FunctionCache


class _SpareCache(FunctionCache):  # type: ignore[misc]
    """numba's own lets a full disk, a quota or an unreadable file end the call: 0.5 s saved."""

    @contextlib.contextmanager
    def _guard_against_spurious_io_errors(self) -> Iterator[None]:
        with contextlib.suppress(OSError):
            yield


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """njit without Python's lock, compiled at the first call with a new kind of argument."""
    loop = numba.njit(nogil=True)(function)
    # without one where numba found no writable folder (read-only installation without a home)
    with contextlib.suppress(RuntimeError):
        # as njit(cache=True) does with its own
        loop._cache = _SpareCache(function)  # type: ignore[attr-defined]
    return loop
