"""Rows -> checked image bytes, with replacement of bad rows: what both input pipelines share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mlip.dataloading import shards
from mlip.dataloading.images.image_file import (
    Header,
    check_hash,
    decode_grey,
    is_too_dark,
    read_bytes,
    read_header,
)
from mlip.dataloading.ledger import BadSample, DataError
from mlip.dataloading.manifest import Manifest, ManifestError
from mlip.dataloading.pipelines.sampler import Plan, SequentialOrder, TrainingOrder
from mlip.settings.config import Data
from mlip.system.machine import LimitError
from mlip.system.own_mistake import own_mistake

T = TypeVar("T")
Bad = tuple[int, int, str, bool]  # epoch, row, reason, met in the order (not as a replacement)

# With data.bad_share at its default of 1 %, 16 bad draws in a row have a chance of 1e-32.
REPLACEMENT_ATTEMPTS = 16
# data.verify=sample hashes one visit in this many.
_VERIFY_EVERY = 100


@dataclass
class Images:
    """One rank's images of one step; bad rows are replaced (training) or left out (evaluation)."""

    image: Tensor  # [B, C, H, W] float32
    kept: NDArray[np.int64]  # [B] places of the plan that have an image
    rows: NDArray[np.int64]  # [B] manifest rows behind them
    bad: list[Bad] = field(default_factory=list)


class SampleReader:
    """Manifest row -> checked bytes and header, or decoded grey pixels.

    Every exception of a library becomes a BadSample: a decoder may raise anything. StopIteration
    is the worst of them: unconverted, it would look like the end of an epoch.

    refuses_dark  a picture that `mlip prepare` would refuse as too dark is bad here too: for films
                  that are asked about, which nobody may have prepared
    """

    def __init__(self, manifest: Manifest, data: Data, *, refuses_dark: bool = False) -> None:
        if data.verify != "none" and manifest.sha256 is None:
            raise ManifestError(
                f"data.verify={data.verify} needs the image hashes: set data.columns.sha256, or "
                "data.verify=none"
            )
        self.manifest, self.verify, self.refuses_dark = manifest, data.verify, refuses_dark
        self._references = shards.References(manifest.image_path, len(manifest))

    def read(self, row: int, epoch: int) -> tuple[bytes, Header]:
        """Raises:  BadSample, DataError; LimitError, which is no fault of the row."""
        try:
            return self._read(row, epoch)
        except (BadSample, DataError, LimitError):
            raise
        except Exception as error:
            raise _bad(error) from error

    def _read(self, row: int, epoch: int) -> tuple[bytes, Header]:
        manifest = self.manifest
        reference = self._references[row]
        if reference is not None:
            try:
                content = shards.read_bytes(manifest.root, reference, self._references.number)
            except DataError as error:
                raise DataError(f"image {manifest.image_name(row)}: {error}") from None
        else:
            name = manifest.image_name(row)
            content = read_bytes(manifest.root, manifest.image_path(row), name)
        if self.verify == "hash" or (
            self.verify == "sample" and (row + epoch) % _VERIFY_EVERY == 0
        ):
            expected = manifest.sha256_of(row)
            if expected is None:
                raise BadSample("hash_mismatch", "the manifest has no hash for this row")
            check_hash(content, expected)
        return content, read_header(content)

    def pixels(self, row: int, epoch: int) -> NDArray[Any]:
        """[H, W] uint8 or uint16.  Raises:  BadSample, DataError, LimitError."""
        return self.decode(*self.read(row, epoch))

    def decode(self, content: bytes, header: Header) -> NDArray[Any]:
        """[H, W] uint8 or uint16.  Raises:  BadSample, DataError."""
        try:
            grey = decode_grey(content, header)
        except (BadSample, DataError):
            raise
        except Exception as error:
            raise _bad(error) from error
        if self.refuses_dark and is_too_dark(grey):
            raise BadSample("too_dark")
        return grey


def _bad(error: Exception) -> BadSample:
    reason = "out_of_memory" if isinstance(error, MemoryError) else "undecodable"
    if (place := own_mistake(error)) is not None:
        return BadSample("internal_error", place)
    return BadSample(reason, type(error).__name__)


def fill_place(
    order: TrainingOrder | SequentialOrder, plan: Plan, place: int, use: Callable[[int, int], T]
) -> tuple[T | None, int, list[Bad]]:
    """use(row, epoch) of the planned row, or of keyed replacements where it is bad.

    Returns: (result, row used, bad rows met); result None where evaluation met a bad row
    Raises:  DataError if every replacement is bad too.
    """
    row, epoch = int(plan.rows[place]), int(plan.epoch[place])
    bad: list[Bad] = []
    try:
        return use(row, epoch), row, bad
    except BadSample as error:
        bad.append((epoch, row, error.reason, True))
    if isinstance(order, SequentialOrder):
        return None, row, bad
    position = int(plan.global_index[place])
    for other in order.replacements(position, epoch, REPLACEMENT_ATTEMPTS).tolist():
        if other == row:
            continue
        try:
            return use(other, epoch), other, bad
        except BadSample as error:
            bad.append((epoch, other, error.reason, False))
    reasons = sorted({reason for _, _, reason, _ in bad})
    raise DataError(
        f"no readable image found for a row after {REPLACEMENT_ATTEMPTS} replacements "
        f"(reasons: {', '.join(reasons)}): check data.root and the files in it"
    )
