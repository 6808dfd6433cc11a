"""Grey images as text, for results that are JSON and pages that load nothing."""

from __future__ import annotations

import base64

import cv2

from mlip.transfer.array import Array


def png_text(image: Array) -> str:
    """A PNG as base64 text of a grey image [H, W] uint8."""
    done, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    if not done:
        raise ValueError(f"an image of shape {image.shape} could not be written as PNG")
    return base64.b64encode(data.tobytes()).decode("ascii")
