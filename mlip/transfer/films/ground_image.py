"""Phrases over one image file: their maps as one picture on the whole image. High = match.

The picture is a PNG, or a DICOM object of the film's study (dataloading/dicom/capture.py).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch import Tensor

from mlip.batch import STATES
from mlip.dataloading.pipelines.transforms import Transform
from mlip.settings.typed_tree import ConfigError
from mlip.system.output_file import require_replaceable, whole_file
from mlip.transfer.alignment.patch_maps import Upsampler, phrase_maps, pointed_pixel, token_maps
from mlip.transfer.alignment.prompts import make_text_batch, phrase_encoder
from mlip.transfer.array import Array
from mlip.transfer.features import encode_text_batch
from mlip.transfer.films import own_inputs
from mlip.transfer.fingerprint import hash_of_weights

if TYPE_CHECKING:
    from mlip.dataloading.dicom.capture import Film

# The longer side of the radiograph in the picture written: small ones are enlarged by a whole
# factor until a person can see them, a detector's 3,000 px are reduced.
LEAST_PX, LONGEST_PX = 448, 1024
DICOM_SUFFIX = ".dcm"  # of an answer that goes into the film's study
PANELS, CAPTION_PX = 4, 24  # pictures in a row, room for a name above each
# signature and first chunk of a PNG; the text chunk behind them of a map
_HEADER, _MARK = 33, b"Software\0mlip ground"
_FONT, _LETTERS = cv2.FONT_HERSHEY_SIMPLEX, 0.42


@dataclass(frozen=True)
class Part:
    """The map of one word or one linked concept of the phrase."""

    name: str
    heat: Array  # [P] cosine with each patch; high = match


@dataclass(frozen=True)
class Answer:
    """Where a phrase points, in pixels of the image file."""

    phrase: str
    point: tuple[float, float]
    width_px: int
    height_px: int
    highest: float  # of the patches that see the file, as the mean and the parts' maps
    mean: float
    mentions: tuple[tuple[str, str], ...]  # concept name, state
    parts: tuple[Part, ...] = ()  # where asked for: each word, then each linked concept


@torch.no_grad()
def ground_image(
    opened: Any, image: Path, phrases: Sequence[str], out: Path, *, with_parts: bool = False
) -> tuple[list[Answer], bytes]:
    """Where phrases point on an image, and their maps over it as the content of picture `out`.

    A name that ends in .dcm gets a DICOM object of the film's study, any other a PNG. All maps are
    on one scale, so that a phrase that fits nowhere is as cold as it is; that of one phrase alone
    goes from its own coldest to its own hottest place.

    opened      what mlip.pretrained.open_checkpoint gave
    with_parts  below them a map of each word and of each linked concept, on a scale of their own
    Raises:  ImageFileError; ConfigError for a DICOM object of a film that is none; ValueError for
             an empty phrase, or one without a known word
    """
    bank = own_inputs.encode_texts(opened, phrases)
    content = own_inputs.read_file(image)
    film = _film_of(content, image, out) if out.suffix.lower() == DICOM_SUFFIX else None
    grey = own_inputs.decode_image(content, f"image {image}")
    transform = Transform(opened.config.data, train=False, seed=0)
    features = own_inputs.encode_pixels(opened, own_inputs.model_input(grey, opened.config))
    upsample = Upsampler(features.grid, (transform.crop_px, transform.crop_px))
    sees_file = _sees_file(transform, grey.shape)
    patch_share = cv2.resize(
        sees_file.astype(np.float32), features.grid[::-1], interpolation=cv2.INTER_AREA
    )
    sees = patch_share.reshape(-1) > 0
    heats = phrase_maps(opened.model, features.patches, bank)[:, 0].numpy()
    answers, maps, below = [], [], []
    for phrase, heat in zip(phrases, heats, strict=True):
        picture = upsample(heat)
        # the black margin can be high, not pointed at
        x, y = pointed_pixel(np.where(sees_file, picture, -np.inf), features.grid)
        point = _point_on_file((x, y), transform, grey.shape)
        maps.append((_on_file(picture, transform, grey.shape), point))
        parts = phrase_parts(opened, phrase, features.patches) if with_parts else ()
        for part in parts:
            below.append((part.name, _on_file(upsample(part.heat), transform, grey.shape)))
        linked = opened.linker.link(phrase)
        answers.append(
            Answer(
                *(phrase, point, grey.shape[1], grey.shape[0]),
                *(float(heat[sees].max()), float(heat[sees].mean())),
                tuple(dict.fromkeys((opened.table[m.concept_id].name, m.state) for m in linked)),
                tuple(Part(part.name, part.heat[sees]) for part in parts),
            )
        )
    if film is None:
        written = _marked(_png(_sheet(grey, list(phrases), maps, below), out))
    else:
        from mlip.dataloading.dicom.capture import NOTICE, capture

        sheet = _sheet(grey, list(phrases), maps, below, note=NOTICE)
        rgb = np.ascontiguousarray(sheet[..., ::-1])
        weights = hash_of_weights(opened.model)[:16]
        written = capture(film, rgb, phrases=phrases, model=weights)
    return answers, written


def _film_of(content: bytes, image: Path, out: Path) -> Film:
    """What the film's header says that a map in its study has to say too."""
    from mlip.dataloading.dicom.capture import read_film
    from mlip.dataloading.dicom.source import DicomError

    try:
        return read_film(content)
    except DicomError as error:
        if error.code == "not_dicom":
            raise ConfigError(
                f"--out {out}: image {image} is no DICOM file, so it names no study that a DICOM "
                "map could lie in: ask of the film's DICOM file, or name a PNG file (map.png)"
            ) from None
        raise own_inputs.ImageFileError(
            f"image {image}: {error}; a DICOM map says whose film it is made of: mend the file's "
            "header, or name a PNG file with --out (map.png)"
        ) from None


def phrase_parts(opened: Any, phrase: str, patches: Tensor) -> tuple[Part, ...]:
    """The local score's rows of a phrase one by one: its words, then its linked concepts.

    A word of several pieces is their mean; a concept that is denied has a map too, though its row
    weighs nothing in the phrase's.

    Shapes:  patches [1, P, D]
    """
    encoder = phrase_encoder(opened.config, opened.tokenizer, opened.linker, opened.table)
    batch = make_text_batch([phrase], encoder)
    rows = token_maps(opened.model, patches, encode_text_batch(opened.model, batch))
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


def _sees_file(transform: Transform, shape: tuple[int, ...]) -> Array:
    """[crop, crop] bool, which pixels of the crop are of the file, not of the margin around it."""
    place, margin = transform.placement(*shape), transform.margin
    top, left = max(0, place.top - margin), max(0, place.left - margin)
    bottom, right = place.top + place.height - margin, place.left + place.width - margin
    sees = np.zeros((transform.crop_px, transform.crop_px), dtype=bool)
    sees[top:bottom, left:right] = True
    return sees


def _point_on_file(
    point: tuple[float, float], transform: Transform, shape: tuple[int, ...]
) -> tuple[float, float]:
    """(x, y) of the crop in px of the file."""
    place, margin = transform.placement(*shape), transform.margin
    scale = shape[1] / place.width, shape[0] / place.height
    return (
        (point[0] + margin - place.left) * scale[0],
        (point[1] + margin - place.top) * scale[1],
    )


def _on_file(picture: Array, transform: Transform, shape: tuple[int, ...]) -> Array:
    """The crop's map on the file's pixel grid; NaN where the model did not look."""
    place = transform.placement(*shape)
    margin = transform.margin
    square = np.full((transform.resize_px, transform.resize_px), np.nan, dtype=np.float32)
    square[margin : margin + transform.crop_px, margin : margin + transform.crop_px] = picture
    inside = square[place.top : place.top + place.height, place.left : place.left + place.width]
    return cv2.resize(inside, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR)


def _sheet(
    grey: Array,
    phrases: Sequence[str],
    maps: Sequence[tuple[Array, tuple[float, float]]],
    below: Sequence[tuple[str, Array]],
    *,
    note: str = "",
) -> Array:
    """The radiograph, then each map over it with a cross where it points; `below` in small.

    Several phrases stand above their maps; one too where there is a note, above the radiograph.
    Shapes:  -> [h, w, 3] uint8, blue first
    """
    longest = max(grey.shape)
    scale = min(LONGEST_PX / longest, float(max(1, -(-LEAST_PX // longest))))
    plain = _sized(grey, scale)
    low = min(float(np.nanmin(heat)) for heat, _ in maps)
    high = max(float(np.nanmax(heat)) for heat, _ in maps)
    cells = [(note, plain)]
    for phrase, (heat, point) in zip(phrases, maps, strict=True):
        mixed = _over(plain, heat, low, high)
        at = round(point[0] * scale), round(point[1] * scale)
        reach = max(5, max(plain.shape) // 40)
        for thickness, shade in ((3, (0, 0, 0)), (1, (255, 255, 255))):
            cv2.drawMarker(mixed, at, shade, cv2.MARKER_CROSS, 2 * reach, thickness)
        cells.append((phrase, mixed))
    gap, has_captions = max(4, plain.shape[1] // 100), len(phrases) > 1 or bool(note)
    joined = _tiled(cells, gap, has_captions=has_captions)
    if below:
        parts = _panels(grey, below, joined.shape[1])
        beside = parts.shape[1] - joined.shape[1]  # of a film of a few pixels' width
        white = np.pad(joined, ((0, 0), (0, beside), (0, 0)), constant_values=255)
        joined = np.concatenate([white, parts])
    return joined


def write_map(out: Path, content: bytes) -> None:
    """Raises:  KeptBesideError where another's file has come to lie there"""
    out.parent.mkdir(parents=True, exist_ok=True)
    # private: it shows a film
    with whole_file(out, is_private=True, require_own=require_own_map) as partial:
        partial.write_bytes(content)


def _png(sheet: Array, out: Path) -> bytes:
    done, data = cv2.imencode(".png", sheet)
    if not done:
        raise own_inputs.ImageFileError(f"{out}: the picture could not be encoded as PNG")
    return data.tobytes()


def _marked(png: bytes) -> bytes:
    """The PNG with a text chunk behind its header that says what wrote it."""
    chunk = b"tEXt" + _MARK
    size, check = (struct.pack(">I", n) for n in (len(_MARK), zlib.crc32(chunk)))
    return png[:_HEADER] + size + chunk + check + png[_HEADER:]


def require_own_map(path: Path) -> None:
    """Raises:  ConfigError for a folder, or a file that ground_image did not write."""
    # most films are PNG files, the one that is asked of among them
    require_replaceable(path, "--out", "map of mlip ground", is_ours=_is_map(path))


def _is_map(path: Path) -> bool:
    """Whether ground_image wrote this file: a radiograph may be a PNG or DICOM file too."""
    from mlip.dataloading.dicom.capture import is_capture

    if not path.is_file():
        return False
    with path.open("rb") as stream:
        if _MARK in stream.read(_HEADER + 8 + len(_MARK)):
            return True
    return is_capture(path)


def _tiled(cells: Sequence[tuple[str, Array]], gap: int, *, has_captions: bool) -> Array:
    """Pictures of one size on white, at most PANELS in a row and rows alike, `gap` pixels between;
    names above them, larger over large pictures, which a screen shows reduced."""
    height, width = cells[0][1].shape[:2]
    times = max(1, width // LEAST_PX)
    head = CAPTION_PX * times if has_captions else 0
    rows = -(-len(cells) // PANELS)
    across = -(-len(cells) // rows)
    shape = rows * (height + head + gap) - gap, across * (width + gap) - gap, 3
    sheet = np.full(shape, 255, dtype=np.uint8)
    for number, (name, picture) in enumerate(cells):
        top, left = (number // across) * (height + head + gap), (number % across) * (width + gap)
        sheet[top + head : top + head + height, left : left + width] = picture.clip(0, 255).round()
        if has_captions:
            shown, at = _fitting(name, width, times), (left, top + 16 * times)
            cv2.putText(sheet, shown, at, _FONT, _LETTERS * times, (0, 0, 0), times, cv2.LINE_AA)
    return sheet


def _fitting(name: str, width: int, times: int) -> str:
    """The name, its end cut off where it is wider than this many pixels."""
    shown = name
    while name and cv2.getTextSize(shown, _FONT, _LETTERS * times, times)[0][0] > width:
        name = name[:-1]
        shown = f"{name.rstrip()}..." if name else ""  # no room for three dots either
    return shown


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
    """Small maps with their names, on the scale of the hottest and coldest; `width` wide, or more
    where that has no room for them."""
    low = min(float(np.nanmin(heat)) for _, heat in below)
    high = max(float(np.nanmax(heat)) for _, heat in below)
    gap = 8
    plain = _sized(grey, ((width + gap) // PANELS - gap) / grey.shape[1])
    cells = [(name, _over(plain, heat, low, high)) for name, heat in below]
    sheet = _tiled(cells, gap, has_captions=True)
    beside = max(0, width - sheet.shape[1])
    return np.pad(sheet, ((gap, 0), (0, beside), (0, 0)), constant_values=255)
