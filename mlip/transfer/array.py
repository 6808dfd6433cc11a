"""The type of NumPy arrays here: which shape and kind a function takes is in its docstring."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]
