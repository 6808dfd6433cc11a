"""One phrase over one image file: the map as a PNG on the whole image. High = match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from mlip.batch import STATES
from mlip.dataloading.transforms import Transform
from mlip.output_file import whole_file
from mlip.transfer.alignment.patch_maps import Upsampler, phrase_maps, pointed_pixel, token_maps
from mlip.transfer.alignment.prompts import make_text_batch, phrase_encoder
from mlip.transfer.array import Array
from mlip.transfer.features import encode_texts
from mlip.transfer.films import own_inputs

# The longer side of each half of the picture written: small images are enlarged by a whole
# factor until a person can see them, a detector's 3,000 px are reduced.
LEAST_PX, LONGEST_PX = 448, 1024
PANELS, CAPTION_PX = 4, 24  # of the small maps: how many in a row, room for a name


@dataclass(frozen=True)
class Part:
    """The map of one word or one linked concept of the phrase."""

    name: str
    heat: Array  # [P] cosine with each patch; high = match


@dataclass(frozen=True)
class Answer:
    """Where a phrase points, in pixels of the image file."""

    point: tuple[float, float]
    width_px: int
    height_px: int
    highest: float  # of the patches that see the file, as the mean and the parts' maps
    mean: float
    mentions: tuple[tuple[str, str], ...]  # concept name, state
    parts: tuple[Part, ...] = ()  # where asked for: each word, then each linked concept


@torch.no_grad()
def ground_image(
    opened: Any, image: Path, phrase: str, out: Path, *, with_parts: bool = False
) -> Answer:
    """Write the map of a phrase over an image as PNG `out`, and say where it points.

    opened      what mlip.pretrained.open_checkpoint gave
    with_parts  below it a map of each word and of each linked concept, on one scale
    Raises:  ImageFileError; ValueError for an empty phrase, or one without a known word
    """
    bank = own_inputs.encode_texts(opened, [phrase])
    grey = own_inputs.read_image(image)
    transform = Transform(opened.config.data, train=False, seed=0)
    features = own_inputs.encode_pixels(opened, own_inputs.model_input(grey, opened.config))
    heat = phrase_maps(opened.model, features.patches, bank)[0, 0].numpy()
    upsample = Upsampler(features.grid, (transform.crop_px, transform.crop_px))
    picture = upsample(heat)
    place = transform.placement(*grey.shape)
    margin = (transform.resize_px - transform.crop_px) // 2
    top, left = max(0, place.top - margin), max(0, place.left - margin)
    of_file = np.full_like(picture, -np.inf)  # the black margin can be high, not pointed at
    of_file[top : place.top + place.height - margin, left : place.left + place.width - margin] = (
        picture[top : place.top + place.height - margin, left : place.left + place.width - margin]
    )
    x, y = pointed_pixel(of_file, features.grid)
    scale = grey.shape[1] / place.width, grey.shape[0] / place.height
    point = (x + margin - place.left) * scale[0], (y + margin - place.top) * scale[1]
    parts = phrase_parts(opened, phrase, features.patches) if with_parts else ()
    below = [(p.name, _on_file(upsample(p.heat), transform, grey.shape)) for p in parts]
    _write(out, grey, _on_file(picture, transform, grey.shape), point, below)
    linked = opened.linker.link(phrase)
    mentions = tuple(dict.fromkeys((opened.table[m.concept_id].name, m.state) for m in linked))
    seen = np.isfinite(of_file).astype(np.float32)
    sees = cv2.resize(seen, features.grid[::-1], interpolation=cv2.INTER_AREA).reshape(-1) > 0
    heat = heat[sees]
    return Answer(
        *(point, grey.shape[1], grey.shape[0], float(heat.max()), float(heat.mean())),
        mentions,
        tuple(Part(p.name, p.heat[sees]) for p in parts),
    )


def phrase_parts(opened: Any, phrase: str, patches: Tensor) -> tuple[Part, ...]:
    """The local score's rows of a phrase one by one: its words, then its linked concepts.

    A word of several pieces is their mean; a concept that is denied has a map too, though its row
    weighs nothing in the phrase's.

    Shapes:  patches [1, P, D]
    """
    encoder = phrase_encoder(opened.config, opened.tokenizer, opened.linker, opened.table)
    batch = make_text_batch([phrase], encoder)
    device = next(opened.model.parameters()).device
    rows = token_maps(opened.model, patches, encode_texts(opened.model, batch, device=device))
    heat = rows[0].numpy()
    words: list[tuple[str, list[Array]]] = []
    for place in batch.content_mask[0].nonzero()[:, 0].tolist():
        piece = opened.tokenizer.token(int(batch.token_ids[0, place]))
        if piece.startswith("##") and words:
            words[-1] = (words[-1][0] + piece[2:], [*words[-1][1], heat[place]])
        else:
            words.append((piece, [heat[place]]))
    shown = [Part(name, np.mean(maps, axis=0)) for name, maps in words]
    tokens = batch.token_ids.shape[1]
    for k in batch.entity_mask[0].nonzero()[:, 0].tolist():
        concept = opened.table.concepts[int(batch.entity_ids[0, k])].name
        state = STATES[int(batch.entity_state[0, k])]
        shown.append(Part(f"{concept} ({state})", heat[tokens + k]))
    return tuple(shown)


def _on_file(picture: Array, transform: Transform, shape: tuple[int, ...]) -> Array:
    """The crop's map on the file's pixel grid; NaN where the model did not look."""
    place = transform.placement(*shape)
    margin = (transform.resize_px - transform.crop_px) // 2
    square = np.full((transform.resize_px, transform.resize_px), np.nan, dtype=np.float32)
    square[margin : margin + transform.crop_px, margin : margin + transform.crop_px] = picture
    inside = square[place.top : place.top + place.height, place.left : place.left + place.width]
    return cv2.resize(inside, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)


def _write(
    out: Path,
    grey: Array,
    heat: Array,
    point: tuple[float, float],
    below: Sequence[tuple[str, Array]],
) -> None:
    """Radiograph left, the map over it right, a cross where it points; `below` in small."""
    longest = max(grey.shape)
    scale = min(LONGEST_PX / longest, float(max(1, -(-LEAST_PX // longest))))
    plain = _sized(grey, scale)
    mixed = _over(plain, heat, float(np.nanmin(heat)), float(np.nanmax(heat)))
    at = round(point[0] * scale), round(point[1] * scale)
    reach = max(5, max(plain.shape) // 40)
    for thickness, shade in ((3, (0, 0, 0)), (1, (255, 255, 255))):
        cv2.drawMarker(mixed, at, shade, cv2.MARKER_CROSS, 2 * reach, thickness)
    gap = np.full((plain.shape[0], max(4, plain.shape[1] // 100), 3), 255.0)
    joined = np.concatenate([plain, gap, mixed], axis=1)
    if below:
        joined = np.concatenate([joined, _panels(grey, below, joined.shape[1])])
    done, data = cv2.imencode(".png", joined.clip(0, 255).round().astype(np.uint8))
    if not done:
        raise own_inputs.ImageFileError(f"{out}: the picture could not be encoded as PNG")
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as partial:
        partial.write_bytes(data.tobytes())


def _sized(grey: Array, scale: float) -> Array:
    """[h, w, 3] float32 0 to 255"""
    size = max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale))
    top = 255.0 / (255.0 if grey.dtype == np.uint8 else 65535.0)
    how = cv2.INTER_AREA if scale < 1.0 else cv2.INTER_CUBIC
    base = cv2.resize(grey.astype(np.float32) * top, size, interpolation=how).clip(0, 255)
    return np.repeat(base[..., None], 3, axis=2)


def _over(plain: Array, heat: Array, low: float, high: float) -> Array:
    """The map over the radiograph; what is below a third of the scale leaves it as it is."""
    size = plain.shape[1], plain.shape[0]
    spread = cv2.resize(heat, size, interpolation=cv2.INTER_LINEAR)
    seen = np.isfinite(spread)
    share = np.where(seen, (np.nan_to_num(spread, nan=low) - low) / max(high - low, 1e-6), 0.0)
    colour = cv2.applyColorMap((share * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    opacity = (0.72 * np.clip((share - 0.33) / 0.5, 0.0, 1.0))[..., None]
    return plain * (1.0 - opacity) + colour * opacity


def _panels(grey: Array, below: Sequence[tuple[str, Array]], width: int) -> Array:
    """Small maps with their names, four in a row, all on the scale of the hottest and coldest."""
    low = min(float(np.nanmin(heat)) for _, heat in below)
    high = max(float(np.nanmax(heat)) for _, heat in below)
    each = width // PANELS
    plain = _sized(grey, (each - 8) / grey.shape[1])
    rows = []
    for start in range(0, len(below), PANELS):
        row = np.full((plain.shape[0] + CAPTION_PX, width, 3), 255, dtype=np.uint8)
        for place, (name, heat) in enumerate(below[start : start + PANELS]):
            left = place * each + 4
            mixed = _over(plain, heat, low, high).clip(0, 255).round()
            row[CAPTION_PX:, left : left + plain.shape[1]] = mixed
            font = cv2.FONT_HERSHEY_SIMPLEX
            cv2.putText(row, name[: each // 8], (left, 16), font, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
        rows.append(row)
    return np.concatenate(rows)
