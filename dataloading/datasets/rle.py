"""Run lengths of the SIIM-ACR pneumothorax masks: text -> mask.

Grammar: pairs "start length", each start relative to the end of the run before it, over the image
column by column (top to bottom, then left to right); "-1" = no object. Objects are joined by "|".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def decode_masks(text: str, height: int, width: int) -> NDArray[np.uint8]:
    """The union of all objects.

    Shapes:  -> [height, width] uint8, 1 = object
    Raises:  ValueError where the runs are no pairs or leave the image.
    """
    flat = np.zeros(height * width, np.uint8)
    for one in text.split("|"):
        try:
            numbers = [int(n) for n in one.split()]
        except ValueError:
            # the cell is not quoted: a column named by mistake may hold a report
            raise ValueError("run lengths: expected whole numbers, or -1 for no object") from None
        if numbers in ([], [-1]):
            continue
        if len(numbers) % 2 or min(numbers) < 0:
            raise ValueError("run lengths: expected pairs of a start and a length")
        position = 0
        for start, length in zip(numbers[::2], numbers[1::2], strict=True):
            position += start
            if position + length > flat.size:
                raise ValueError(f"run lengths: leave the image of {width} x {height} px")
            flat[position : position + length] = 1
            position += length
    return np.ascontiguousarray(flat.reshape(width, height).T)
