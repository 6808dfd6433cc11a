"""One phrase over one image file: the map as a PNG on the whole image. High = match."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from mlip.batch import STATES
from mlip.dataloading.image_file import decode_grey, read_bytes, read_header
from mlip.dataloading.ledger import BadSample
from mlip.dataloading.transforms import Transform
from mlip.transfer.grounding import Upsampler, phrase_maps, pointed_pixel
from mlip.transfer.interval import Array
from mlip.transfer.prompts import encode_prompts

# The longer side of each half of the picture written: small images are enlarged by a whole
# factor until a person can see them, a detector's 3,000 px are reduced.
LEAST_PX, LONGEST_PX = 448, 1024


@dataclass(frozen=True)
class Answer:
    """Where a phrase points, in pixels of the image file."""

    point: tuple[float, float]
    width_px: int
    height_px: int
    highest: float
    mean: float
    mentions: tuple[tuple[str, str], ...]  # concept name, state


class ImageFileError(ValueError):
    """An image that cannot be used; names file and reason."""

    exit_code = 3


def read_image(path: Path) -> Array:
    """Grey pixels [H, W] uint8 or uint16 of a JPEG, PNG or DICOM file."""
    real = path.resolve()
    try:
        content = read_bytes(str(real.parent), real.name)
        return decode_grey(content, read_header(content))
    except BadSample as error:
        raise ImageFileError(
            f"image {path}: {error}; expected a whole JPEG, PNG or single-frame DICOM file"
        ) from error


@torch.no_grad()
def ground_image(opened: Any, image: Path, phrase: str, out: Path) -> Answer:
    """Write the map of a phrase over an image as PNG `out`, and say where it points.

    opened  what mlip.pretrained.open_checkpoint gave
    Raises:  ImageFileError; ValueError for an empty phrase
    """
    model, config = opened.model, opened.config
    device = next(model.parameters()).device
    grey = read_image(image)
    transform = Transform(config.data, train=False, seed=0)
    zero = np.zeros(1, dtype=np.int64)
    pixels = np.empty((transform.crop_px, transform.crop_px), dtype=np.float32)
    transform.apply(grey, transform.draw(zero, zero), 0, pixels)
    shown = torch.from_numpy(pixels)[None, None].repeat(1, config.data.channels, 1, 1)
    features = model.encode_image(shown.to(device))
    bank = encode_prompts(
        model,
        [phrase],
        config=config,
        tokenizer=opened.tokenizer,
        linker=opened.linker,
        table=opened.table,
        device=device,
    )
    if not bool(torch.isfinite(features.patches).all()):
        raise ValueError("the image features hold NaN or infinite values: the checkpoint is broken")
    heat = phrase_maps(model, features.patches.float().cpu(), bank)[0, 0].numpy()
    picture = Upsampler(features.grid, pixels.shape)(heat)
    x, y = pointed_pixel(picture, features.grid)
    place = transform.placement(*grey.shape)
    margin = (transform.resize_px - transform.crop_px) // 2
    scale = grey.shape[1] / place.width, grey.shape[0] / place.height
    point = (x + margin - place.left) * scale[0], (y + margin - place.top) * scale[1]
    _write(out, grey, _on_file(picture, transform, grey.shape), point)
    linked = opened.linker.link(phrase)
    mentions = tuple(
        dict.fromkeys((opened.table[m.concept_id].name, _state(m.state)) for m in linked)
    )
    return Answer(
        point, grey.shape[1], grey.shape[0], float(heat.max()), float(heat.mean()), mentions
    )


def _state(state: Any) -> str:
    return state if isinstance(state, str) else STATES[int(state)]


def _on_file(picture: Array, transform: Transform, shape: tuple[int, ...]) -> Array:
    """The crop's map on the file's pixel grid; NaN where the model did not look."""
    place = transform.placement(*shape)
    margin = (transform.resize_px - transform.crop_px) // 2
    square = np.full((transform.resize_px, transform.resize_px), np.nan, dtype=np.float32)
    square[margin : margin + transform.crop_px, margin : margin + transform.crop_px] = picture
    inside = square[place.top : place.top + place.height, place.left : place.left + place.width]
    return cv2.resize(inside, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)


def _write(out: Path, grey: Array, heat: Array, point: tuple[float, float]) -> None:
    """Radiograph left, the map over it right; a cross where it points."""
    longest = max(grey.shape)
    scale = min(LONGEST_PX / longest, float(max(1, -(-LEAST_PX // longest))))
    size = max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale))
    top = 255.0 / (255.0 if grey.dtype == np.uint8 else 65535.0)
    how = cv2.INTER_AREA if scale < 1.0 else cv2.INTER_CUBIC
    base = cv2.resize(grey.astype(np.float32) * top, size, interpolation=how).clip(0, 255)
    spread = cv2.resize(heat, size, interpolation=cv2.INTER_LINEAR)
    seen = np.isfinite(spread)
    low, high = float(np.nanmin(spread)), float(np.nanmax(spread))
    share = np.where(seen, (np.nan_to_num(spread, nan=low) - low) / max(high - low, 1e-6), 0.0)
    colour = cv2.applyColorMap((share * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    opacity = (0.72 * np.clip((share - 0.33) / 0.5, 0.0, 1.0))[..., None]
    plain = np.repeat(base[..., None], 3, axis=2)
    mixed = plain * (1.0 - opacity) + colour * opacity
    at = round(point[0] * scale), round(point[1] * scale)
    reach = max(5, max(size) // 40)
    for thickness, shade in ((3, (0, 0, 0)), (1, (255, 255, 255))):
        cv2.drawMarker(mixed, at, shade, cv2.MARKER_CROSS, 2 * reach, thickness)
    gap = np.full((size[1], max(4, size[0] // 100), 3), 255.0)
    joined = np.concatenate([plain, gap, mixed], axis=1).clip(0, 255).round().astype(np.uint8)
    done, data = cv2.imencode(".png", joined)
    if not done:
        raise ImageFileError(f"{out}: the picture could not be encoded as PNG")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(data.tobytes())
