"""What a model of mlip/transformers_auto.py is given: transformers' processor of an export.

images  the run's own letterbox, crop and normalisation, of files (path), PIL images or arrays
text    the run's own cleaning, vocabulary and linked knowledge: more than a vocabulary can do, so
        the tokenizer here is a class of ours around it
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchEncoding, BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from mlip.dataloading.reports.tokenizer import ReportTokenizer
from mlip.knowledge.concept_files import KEPT, write_table
from mlip.knowledge.concepts import ConceptTable
from mlip.knowledge.linker import linker_of
from mlip.saved.export_folder import SETTINGS, SUMS, WEIGHTS, check_sums
from mlip.saved.trained_model import open_inputs, read_settings
from mlip.saved.weights import PretrainedError
from mlip.settings.config import Config
from mlip.transfer.alignment.prompts import make_worded_batch, phrase_encoder
from mlip.transfer.array import Array
from mlip.transfer.films.own_inputs import (
    ImageFileError,
    decode_image,
    known_phrases,
    model_input,
    read_image,
    read_sections,
    require_light,
)
from mlip.transfer.fingerprint import image_preprocessing

_ORIENTATION = 0x0112  # of EXIF
_FEWEST_GREYS = 0.02  # share of a picture's pixels that are neither black nor white
_INPUTS = ("preprocessing", "vocabulary", "concept_table")  # fingerprints of config.json
_ENTITIES = ("entity_ids", "entity_state", "entity_mask")
# what transformers' Auto classes hand on of their search, which is over by then
_SEARCH = frozenset(
    {"cache_dir", "force_download", "local_files_only", "proxies", "revision", "token"}
    | {"trust_remote_code", "_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs"}
)


def require_none(options: Iterable[str], what: str) -> None:
    """Raises:  ValueError for options that are not honoured."""
    if left := sorted(set(options) - _SEARCH):
        raise ValueError(f"{what} takes no {', '.join(left)}: leave it out")


class MLIPImageProcessor(BaseImageProcessor):
    """Films -> pixel_values [N, C, crop_px, crop_px] float32, as the model's training made them."""

    model_input_names = ["pixel_values"]

    def __init__(self, config: Config) -> None:
        super().__init__(**image_preprocessing(config))
        self._settings = config

    def to_dict(self) -> dict[str, Any]:
        """What preprocessing.json says of images."""
        return {"image_processor_type": type(self).__name__, **image_preprocessing(self._settings)}

    def __call__(  # type: ignore[override]
        self, images: Any, *, return_tensors: str | None = None, **options: Any
    ) -> BatchFeature:
        """One image or a list, each a file (path of a JPEG, PNG or DICOM), a PIL image, which is
        read as the PNG file that it makes, or grey pixels [H, W] uint8 or uint16, white at 255 or
        65,535.

        Raises:  ValueError for another kind, an image that is nearly black or has no greys, options
        """
        require_none(options, "the image processor")
        listed = list(images) if isinstance(images, list | tuple) else [images]
        if not listed:
            raise ValueError("expected an image at least")
        made = [
            model_input(grey_pixels(image, place), self._settings)
            for place, image in enumerate(listed, start=1)
        ]
        return BatchFeature({"pixel_values": torch.cat(made).numpy()}, tensor_type=return_tensors)

    preprocess = __call__

    def save_pretrained(self, save_directory: Any, *_: Any, **__: Any) -> Any:
        """Raises:  ValueError: settings, vocabulary and concepts are one folder."""
        raise ValueError("save the whole processor: its save_pretrained")


def grey_pixels(image: Any, place: int) -> Array:
    """Pixels [H, W] uint8 or uint16 of a file, a PIL image or an array; `place` is for errors."""
    if isinstance(image, str | os.PathLike):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        grey = decode_image(_as_png(image, place), f"image {place}")
        if image.mode in ("L", "RGB") and np.mean((grey > 0) & (grey < 255)) < _FEWEST_GREYS:
            raise ImageFileError(
                f"image {place}: hardly a pixel between black and white, as where PIL makes 8 bits "
                "of 16 (transformers' pipelines have it do so): give the processor the file's path"
            )
        return grey
    if isinstance(image, np.ndarray) and image.dtype == np.uint16 and image.size:
        require_light(image, f"image {place}")
    return image  # model_input says what is wrong with others


def _as_png(image: Image.Image, place: int) -> bytes:
    """The picture as a PNG file of the same pixels: one reader decides what is grey."""
    exif = Image.Exif()  # other fields may tell of a patient, and this one alone turns the picture
    try:
        image.load()
        exif[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError) as error:
        told = f"image {place}: PIL cannot read its pixels: its file is damaged, cut off or closed"
        raise ImageFileError(told) from error
    if 0 in image.size:
        raise ImageFileError(f"image {place}: has no pixels")
    if image.mode == "I":
        low, high = (int(x) for x in image.getextrema())  # type: ignore[arg-type]
        if low < 0 or high > 65535:
            raise ImageFileError(f"image {place}: values {low} to {high}, expected 0 to 65535")
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    content = io.BytesIO()
    try:
        image.save(content, "PNG", compress_level=1, exif=exif)
    except OSError as error:
        raise ImageFileError(
            f"image {place}: PIL's mode {image.mode} has no PNG: convert it to L, I;16 or RGB"
        ) from error
    return content.getvalue()


class MLIPTokenizer(PreTrainedTokenizerFast):
    """Texts -> input_ids, attention_mask and linked mentions, as the model's training read them."""

    model_input_names = ["input_ids", "attention_mask", *_ENTITIES]

    def __init__(
        self,
        described: dict[str, Any],
        config: Config,
        tokenizer: ReportTokenizer,
        table: ConceptTable,
    ) -> None:
        super().__init__(
            tokenizer_object=tokenizer.backend,
            model_max_length=config.data.max_tokens,
            **tokenizer.special,
        )
        self._described, self._settings, self._words = described, config, tokenizer
        self._encoder = phrase_encoder(config, tokenizer, linker_of(table), table)

    def __call__(
        self,
        text: Any = None,
        *,
        is_report: bool = False,
        padding: bool | str = True,
        truncation: bool = False,
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchEncoding:
        """One text or a list: phrases, or with is_report whole reports.

        is_report   without markup, data.sections, cut to what the model reads, as in training
        padding     True: to the longest; "max_length": to data.max_tokens and data.max_entities
        truncation  cut a long phrase instead of refusing it; a report always is
        Shapes:  input_ids, attention_mask [N, T]; entity_ids, entity_state, entity_mask [N, K]
        Raises:  ValueError for a text without words or too long (it quotes no report), and options
        """
        require_none(options, "the tokenizer")
        if padding not in (True, "longest", "max_length"):
            raise ValueError(f"padding: expected True, 'longest' or 'max_length', got {padding!r}")
        data, listed = self._settings.data, [text] if isinstance(text, str) else text
        if is_report:
            chosen = read_sections(self._words, listed, data.sections)
        else:
            chosen = known_phrases(self._words, self._encoder.linker, listed)
        batch = make_worded_batch(chosen, self._encoder, cut=is_report or truncation)
        fields = {"input_ids": batch.token_ids, "attention_mask": batch.token_mask.long()}
        fields |= {name: getattr(batch, name) for name in _ENTITIES}
        if padding == "max_length":
            for name, values in fields.items():
                longest = data.max_entities if name in _ENTITIES else data.max_tokens
                filler = self._words.pad_id if name == "input_ids" else 0
                missing = longest - values.shape[1]
                fields[name] = torch.nn.functional.pad(values, (0, missing), value=filler)
        plain = {name: values.numpy() for name, values in fields.items()}
        if return_tensors is None:
            plain = {name: values.tolist() for name, values in plain.items()}
        return BatchEncoding(plain, tensor_type=return_tensors)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | os.PathLike[str], *_: Any, **options: Any
    ) -> MLIPTokenizer:
        """That of MLIPProcessor.from_pretrained."""
        return MLIPProcessor.from_pretrained(folder, **options).tokenizer

    def encode(self, text: str, **options: Any) -> list[int]:  # type: ignore[override]
        """The ids of one text, [CLS] and [SEP] included."""
        return list(self(text, **options)["input_ids"][0])

    def save_pretrained(self, save_directory: Any, *_: Any, **options: Any) -> tuple[str, ...]:
        """Write config.json, vocabulary and concepts: what AutoProcessor reads, as of an export.

        A folder of the same preprocessing, vocabulary and concepts, as the model's save_pretrained
        writes it, stays as it is.
        Raises:  PretrainedError for a folder of another model; ValueError for options
        """
        require_none((k for k, value in options.items() if value), "save_pretrained")
        folder, own = Path(save_directory), self._described
        if (folder / SETTINGS).is_file():
            there = read_settings(folder)["fingerprints"]
            if other := [k for k in _INPUTS if there.get(k) != own["fingerprints"].get(k)]:
                raise PretrainedError(
                    f"{folder}: is of a model with another {' and '.join(other)}, so nothing was "
                    "written; name another folder"
                )
            return ()
        folder.mkdir(parents=True, exist_ok=True)
        self._words.save(folder / "tokenizer")
        if own.get("knowledge", {}).get("is_included"):  # the first exports do not tell
            write_table(self._encoder.table, folder / KEPT)
        (folder / SETTINGS).write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")
        return (str(folder / SETTINGS),)


class MLIPProcessor(ProcessorMixin):
    """Films and texts -> everything that the model takes, in one call."""

    def __init__(self, image_processor: MLIPImageProcessor, tokenizer: MLIPTokenizer) -> None:
        super().__init__(image_processor, tokenizer)

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *,
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """images as MLIPImageProcessor takes them, text with its options as MLIPTokenizer.

        Raises:  as those, and ValueError without either
        """
        if images is None and text is None:
            raise ValueError("expected images, text or both")
        found: dict[str, Any] = {}
        if text is not None:
            found |= self.tokenizer(text, return_tensors=return_tensors, **options)
        else:
            require_none(options, "the processor without text")
        if images is not None:
            found |= self.image_processor(images, return_tensors=return_tensors)
        return BatchFeature(found)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str | os.PathLike[str], *, lexicon: str | None = None, **options: Any
    ) -> MLIPProcessor:
        """The processor of an export's folder, or of one that save_pretrained wrote.

        lexicon  as in mlip.pretrained.from_pretrained
        Raises:  PretrainedError as there, of a folder whose weights are not looked at; ValueError
                 for options
        """
        require_none(
            (k for k, v in options.items() if v is not None), "AutoProcessor of this model"
        )
        place = require_folder(folder)
        # beside weights a list is missing where an export was written or copied in part
        if (place / SUMS).is_file() or (place / WEIGHTS).is_file():
            check_sums(place, weights=False)
        described, config, tokenizer, table = open_inputs(place, lexicon=lexicon)
        return cls(MLIPImageProcessor(config), MLIPTokenizer(described, config, tokenizer, table))

    def save_pretrained(self, save_directory: Any, *_: Any, **options: Any) -> Any:
        """MLIPTokenizer.save_pretrained: what images need stands in the same config.json."""
        return self.tokenizer.save_pretrained(save_directory, **options)


def require_folder(folder: str | os.PathLike[str]) -> Path:
    """Raises:  PretrainedError where there is none, as where a model's name on a hub is given."""
    place = Path(folder)
    if not place.is_dir():
        raise PretrainedError(
            f"{place}: expected the folder of an `mlip export`, there is none; download a model "
            "first (huggingface_hub.snapshot_download gives its folder)"
        )
    return place
