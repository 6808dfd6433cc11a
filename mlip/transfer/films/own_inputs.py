"""Image files and free texts of one's own -> features and scores, prepared as in training.

`Pretrained` (saved/pretrained_model.py) offers these as methods; `mlip ground` is built on them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mlip.batch import ImageFeatures
from mlip.dataloading.images.image_file import decode_grey, is_too_dark, read_bytes, read_header
from mlip.dataloading.ledger import BadSample, DataError
from mlip.dataloading.pipelines.transforms import Transform
from mlip.dataloading.reports.markup import is_rtf, without_markup
from mlip.dataloading.reports.text import choose_sections
from mlip.settings.config import Config
from mlip.transfer.alignment.patch_maps import phrase_maps
from mlip.transfer.alignment.prompts import (
    TextError,
    encode_prompts,
    named_phrase,
    warn_of_unknown_words,
)
from mlip.transfer.array import Array
from mlip.transfer.features import TextBank, global_scores, image_features, local_scores

Head = Literal["global", "local"]
IMAGES_AT_ONCE = 16
_HALF_CHARACTER = re.compile(r"[\ud800-\udfff]")
_UNKNOWN = (
    "holds no word, part of a word or character that the checkpoint's vocabulary knows; ask in the "
    "language of its training reports"
)


class ImageFileError(ValueError):
    """An image that cannot be used; names file and reason."""

    exit_code = 3


def read_image(path: str | Path) -> Array:
    """Grey pixels [H, W] uint8 or uint16 of a JPEG, PNG or DICOM file.

    Raises:  ImageFileError
    """
    return decode_image(read_file(path), f"image {path}")


def read_file(path: str | Path) -> bytes:
    """The content of an image file.

    Raises:  ImageFileError
    """
    folder, name = os.path.split(os.path.realpath(path))
    try:
        return read_bytes(folder, name)
    except BadSample as error:
        raise _unusable(f"image {path}", error) from error
    except DataError:
        raise ImageFileError(f"image {path}: there is no such folder") from None


def decode_image(content: bytes, named: str) -> Array:
    """Grey pixels as read_image, of the content of a file that errors call `named`."""
    try:
        grey = decode_grey(content, read_header(content))
    except BadSample as error:
        raise _unusable(named, error) from error
    require_light(grey, named)
    return grey


def _unusable(named: str, error: BadSample) -> ImageFileError:
    return ImageFileError(
        f"{named}: {error}; expected a whole JPEG, PNG or single-frame DICOM file"
    )


def require_light(grey: Array, named: str) -> None:
    """Raises:  ImageFileError for a picture of more than 8 bits that is nearly black."""
    if is_too_dark(grey):
        raise ImageFileError(
            f"{named}: too_dark: no pixel reaches an eighth of white, so the model would see "
            "black; scale the values of a 16-bit file to 0 to 65535 (12 bits: times 16)"
        )


def model_input(grey: Array, config: Config) -> Tensor:
    """What the image tower sees of one picture: letterbox, central crop, normalised.

    Shapes:  grey [H, W] uint8 or uint16 -> [1, C, crop_px, crop_px] float32
    Raises:  ValueError for another array: white is 255 or 65,535, which no other kind says
    """
    if not isinstance(grey, np.ndarray) or grey.dtype not in (np.uint8, np.uint16):
        found = getattr(grey, "dtype", type(grey).__name__)
        raise ValueError(
            f"expected grey pixels as an array of uint8 (white 255) or uint16 (white 65535), got "
            f"{found}: scale and convert it, or use read_image, which reads DICOM files too"
        )
    if grey.ndim != 2 or 0 in grey.shape:
        raise ValueError(f"expected one grey picture [H, W], got {list(grey.shape)}")
    transform = Transform(config.data, train=False, seed=0)
    zero = np.zeros(1, dtype=np.int64)
    pixels = np.empty((transform.crop_px, transform.crop_px), dtype=np.float32)
    transform.apply(grey, transform.draw(zero, zero), 0, pixels)
    return torch.from_numpy(pixels)[None, None].repeat(1, config.data.channels, 1, 1)


@torch.no_grad()
def encode_pixels(opened: Any, pixels: Tensor) -> ImageFeatures:
    """Features of model inputs, on the CPU in float32.

    Shapes:  pixels [N, C, crop_px, crop_px] -> embedding [N, D] unit length, patches [N, P, D]
    Raises:  ValueError for pixels that model_input does not give, a model in training mode, or
             features that are not finite.
    """
    _require_eval(opened.model)
    side, channels = opened.config.data.crop_px, opened.config.data.channels
    expected = f"expected pixels [N, {channels}, {side}, {side}] in floating point, as model_input "
    if not isinstance(pixels, Tensor):
        raise ValueError(f"{expected}gives them, got {type(pixels).__name__}")
    if pixels.shape[1:] != (channels, side, side) or not pixels.is_floating_point():
        raise ValueError(f"{expected}gives them, got {list(pixels.shape)} {pixels.dtype}")
    # its device and its dtype, which a caller may have changed
    found = image_features(opened.model, pixels.to(next(opened.model.parameters())))
    if not all(bool(torch.isfinite(x).all()) for x in (found.embedding, found.patches)):
        if not torch.isfinite(pixels).all():
            raise ValueError(f"{expected}gives them, got NaN or infinite values")
        raise ValueError("the image features hold NaN or infinite values: the checkpoint is broken")
    return found


def _require_eval(model: Any) -> None:
    """No switching here and back: another thread may be at work with the same model."""
    if any(module.training for module in model.modules()):
        raise ValueError(
            "the model is in training mode, in which features depend on the other inputs of the "
            "call and change the model's batch statistics: call .model.eval() first"
        )


def encode_images(opened: Any, paths: Iterable[str | Path]) -> ImageFeatures:
    """Features of image files as encode_pixels, in the order of the paths.

    Raises:  ImageFileError; ValueError as encode_pixels, for no path at all or what is none.
    """
    paths = _listed(paths, "image files", (str, os.PathLike))
    parts = []
    for start in range(0, len(paths), IMAGES_AT_ONCE):
        chunk = [Path(path) for path in paths[start : start + IMAGES_AT_ONCE]]
        inputs = [model_input(read_image(path), opened.config) for path in chunk]
        parts.append(encode_pixels(opened, torch.cat(inputs)))
    return ImageFeatures(
        embedding=torch.cat([part.embedding for part in parts]),
        patches=torch.cat([part.patches for part in parts]),
        grid=parts[0].grid,
    )


def encode_texts(opened: Any, texts: Iterable[str], *, first: int = 0) -> TextBank:
    """Features of phrases with the knowledge linked from them, negation included.

    Where the vocabulary does not know all of their words, or has but the letters of one that the
    lexicon does not use, the log has a line that says how many.
    first  how many phrases came before these, which messages count
    Raises:  TextError for a text without words, longer than the model reads, or in no word, part
             of a word or character that the checkpoint's vocabulary knows; ValueError for what is
             no text, or a model in training mode.
    """
    texts = known_phrases(opened.tokenizer, opened.linker, texts, first=first)
    return _encode(opened, texts, cut=False, first=first)


def known_phrases(
    tokenizer: Any, linker: Any, texts: Iterable[str], *, first: int = 0
) -> list[str]:
    """The phrases as a list; for errors and the lines of the log see encode_texts."""
    listed = _listed(texts, "texts", str)
    if (place := _first_unknown(tokenizer, listed)) is not None:
        named = named_phrase(listed[place], first + place)
        raise TextError(f"{named} {_UNKNOWN}", first + place)
    warn_of_unknown_words(tokenizer, linker, listed, first=first)
    return listed


def encode_reports(opened: Any, reports: Iterable[str]) -> TextBank:
    """Features of whole reports as training reads them: without markup, data.sections, as far as
    the model reads.

    Raises:  ValueError as encode_texts, but for length and of those sections, and for RTF; it
             quotes no report.
    """
    chosen = read_sections(opened.tokenizer, reports, opened.config.data.sections)
    return _encode(opened, chosen, cut=True)


def read_sections(tokenizer: Any, reports: Iterable[str], sections: str) -> list[str]:
    """What training reads of each report; for errors see encode_reports."""
    listed = _listed(reports, "texts", str)
    if (place := next((i for i, report in enumerate(listed) if is_rtf(report)), None)) is not None:
        raise ValueError(f"report {place + 1} is RTF, which is not read: export plain text")
    chosen = [choose_sections(without_markup(report), sections) or "" for report in listed]
    if (place := _first_unknown(tokenizer, chosen)) is not None:
        raise ValueError(f"report {place + 1} {_UNKNOWN}")
    return chosen


def _first_unknown(tokenizer: Any, texts: list[str]) -> int | None:
    """Place of the first text of unknown tokens only: all such texts are the same to the model."""
    unknown = tokenizer.unk_id
    coded = tokenizer.encode_batch(texts)
    return next((i for i, one in enumerate(coded) if set(one.ids) == {unknown}), None)


def _listed(things: Any, name: str, kind: type | tuple[type, ...]) -> list[Any]:
    """A list, tuple, array, column or generator as a list; not one thing alone, nor a set, nor
    what has names too (a dict, a table): the names would be taken for what they name."""
    # results come in the order of what was asked, which a set does not have
    wrong = isinstance(things, str | bytes | os.PathLike | set | frozenset | Mapping)
    wrong = wrong or hasattr(things, "columns") or getattr(things, "ndim", 1) == 0
    items = list(things) if isinstance(things, Iterable) and not wrong else []
    if not items:
        raise ValueError(f"expected a list of {name}, of one at least")
    for place, item in enumerate(items, start=1):
        if not isinstance(item, kind):
            raise ValueError(
                f"expected a list of {name}, number {place} is of type {type(item).__name__}"
            )
        if kind is str and _HALF_CHARACTER.search(str(item)):
            raise ValueError(f"text {place} holds half a character (a surrogate): decode it anew")
    return items


def _encode(opened: Any, texts: Sequence[str], *, cut: bool, first: int = 0) -> TextBank:
    _require_eval(opened.model)
    return encode_prompts(opened, texts, cut=cut, first=first)


@torch.no_grad()
def similarity(opened: Any, images: ImageFeatures, texts: TextBank, head: Head) -> Array:
    """Score of every image with every text, [N, M] float64; high = match.

    head  "global": cosine of the two embeddings. "local": the token-knowledge-patch score S.

    Raises:  ValueError for another head, or for what is not features of this model
    """
    require_features(opened, images, texts)
    if head == "global":
        return global_scores(images.embedding, texts)
    if head == "local":
        return local_scores(opened.model, images.patches, texts)
    raise ValueError(f"head: expected 'global' or 'local', got {head!r}")


def require_features(opened: Any, images: Any, texts: Any) -> None:
    if not isinstance(images, ImageFeatures) or not isinstance(texts, TextBank):
        raise ValueError(
            "expected what encode_images gave and then what encode_texts or encode_reports gave, "
            f"got {type(images).__name__} and {type(texts).__name__}"
        )
    sizes = images.embedding.shape[-1], texts.text.embedding.shape[-1]
    if sizes != (opened.config.model.embed_dim,) * 2:
        raise ValueError(
            f"expected features of this model, of D={opened.config.model.embed_dim}, got D="
            f"{sizes[0]} of the images and D={sizes[1]} of the texts: encode both with one model"
        )


@torch.no_grad()
def heat_maps(opened: Any, images: ImageFeatures, texts: TextBank) -> Array:
    """Cosine of every patch with every text, [N, M, rows, columns] float32; high = match.

    The grid lies over the model's input (model_input), not over the file: `mlip ground` maps back.

    Raises:  ValueError for what is not features of this model
    """
    require_features(opened, images, texts)
    heat = phrase_maps(opened.model, images.patches, texts).transpose(0, 1).float().numpy()
    return heat.reshape(*heat.shape[:2], *images.grid)
