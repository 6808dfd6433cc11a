"""Segmentation on an encoder's levels: one mask per image, encoder frozen or tuned.

Source:  ssl_segmenter.py and segmentation_dataset.py of HKU-MedAI/MGCA: U-Net decoder (ViT:
SETR-PUP), 10 focal - log(soft Dice), threshold 0.5. Ours: masks by nearest neighbour through the
image's own letterbox, frozen encoders in eval mode, Dice in three forms with intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlip.settings.config import Config
from mlip.transfer.array import Array
from mlip.transfer.fingerprint import hash_of_parts
from mlip.transfer.fits.decoders import make_decoder
from mlip.transfer.fits.encoder import Encoder, Start
from mlip.transfer.fits.fitting import Record, batches, fit, shuffled_batches
from mlip.transfer.fits.framed_task import FramedTask
from mlip.transfer.frames import warp
from mlip.transfer.measures.dice import (
    Counts,
    count,
    dice_measures,
    dice_per_image,
    dice_scores,
    join,
)
from mlip.transfer.measures.predictions import Series, of_marks
from mlip.transfer.measures.subgroups import Measure
from mlip.transfer.truth.mask_file import IGNORED, INSIDE

FOCAL_WEIGHT, FOCAL_GAMMA, DICE_SMOOTH = 10.0, 2.0, 1.0  # HKU-MedAI/MGCA's
THRESHOLD_LOGIT = 0.0  # a probability of one half


def mask_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """10 focal(gamma 2) - log(soft Dice over the batch as one image, smooth 1); scalar.

    Shapes:  logits [B, 1, H, W]; masks [B, H, W] uint8, IGNORED pixels have no part in it
    Source:  MGCA's MixedLoss, in logits throughout.
    """
    seen = (masks != IGNORED).to(logits.dtype)
    truth = (masks == INSIDE).to(logits.dtype)
    shown = logits[:, 0]
    entropy = F.binary_cross_entropy_with_logits(shown, truth, reduction="none")
    # 1 - p of the true class, from its logarithm: nothing underflows
    wrong = F.logsigmoid(-shown * (2.0 * truth - 1.0))
    focal = ((FOCAL_GAMMA * wrong).exp() * entropy * seen).sum() / seen.sum().clamp_min(1.0)
    probability = shown.sigmoid() * seen
    overlap = (probability * truth).sum()
    dice = (2.0 * overlap + DICE_SMOOTH) / (probability.sum() + truth.sum() + DICE_SMOOTH)
    return FOCAL_WEIGHT * focal - dice.log()


class Segmentation(FramedTask):
    """The task for one manifest: rows, masks, fits and their scores."""

    truth_name = "a mask"  # what every draw of training rows has to show

    def __init__(self, config: Config, *parts: Any) -> None:
        super().__init__(config, *parts)
        if self.transfer.mask_source == "boxes":
            self.annotations.require_box_names()
        self._masks: dict[int, Array] = {}
        self._positive: dict[int, bool] = {}

    def rows(self, split: str) -> Array:
        """Rows of the split that have a mask, empty ones included."""
        rows = self.annotations.of_subset(self.manifest.rows(split, with_report=False), split)
        if self.transfer.mask_source == "mask" and self.annotations.masks_are_files:
            rows = rows[np.array([self.annotations.has_mask(r) for r in rows.tolist()], dtype=bool)]
        if self.transfer.mask_source == "boxes":
            rows = self.annotations.looked_at(rows)
        return rows

    def mask(self, row: int) -> Array:
        """[side, side] uint8 of INSIDE, IGNORED, 0; kept compressed."""
        if row not in self._masks:
            mask = self.frame.mask(self.annotations.mask(row, self.images.size(row)))
            self._positive[row] = bool((mask == INSIDE).any())
            self._masks[row] = cv2.imencode(".png", mask)[1]
        kept = cv2.imdecode(self._masks[row], cv2.IMREAD_GRAYSCALE)
        assert kept is not None
        return kept

    def positive(self, rows: Array) -> Array:
        # the first one alone: a file of all rows' truth is then read once, not in each thread
        for row in rows[:1].tolist():
            self._is_positive(row)
        # files of ten million pixels take a tenth of a second each
        return np.array(self.images.each(self._is_positive, rows, "masks read"), dtype=bool)

    def _is_positive(self, row: int) -> bool:
        if row not in self._positive:
            self.mask(row)
        return self._positive[row]

    def _inputs(
        self, encoder: Encoder, rows: Array, epoch: int | None, seed: int
    ) -> tuple[list[Tensor], Tensor]:
        """The encoder's levels and masks of a batch; augmented together where an epoch is given."""
        levels, matrices = self._levels(encoder, rows, epoch, seed)
        masks = [
            warp(self.mask(row), matrix, nearest=True)
            for row, matrix in zip(rows.tolist(), matrices, strict=True)
        ]
        return levels, torch.from_numpy(np.stack(masks)).to(self.device)

    def fit(self, start: Start, train: Array, val: Array, seed: int) -> tuple[Any, Record]:
        """(predict: rows -> logits in batches, record)"""
        transfer = self.transfer
        encoder = self._encoder(start)
        torch.manual_seed(seed)
        decoder = self._head(make_decoder(encoder, self.side, transfer.decoder_width))

        def losses(epoch: int) -> Iterator[Tensor]:
            fewest = transfer.epoch_steps
            for number, rows in shuffled_batches(train, transfer.batch, seed, epoch, fewest):
                drawn = number if transfer.augment else None
                levels, masks = self._inputs(encoder, rows, drawn, seed)
                with self._precision():
                    shown = decoder(levels)
                yield mask_loss(shown.float(), masks)

        def logits(rows: Array) -> Iterator[tuple[Array, Tensor, Tensor]]:
            for part in batches(rows, transfer.batch):
                with torch.no_grad():
                    levels, masks = self._inputs(encoder, part, None, seed)
                    with self._precision():
                        shown = decoder(levels)
                yield part, shown.float(), masks

        def validate() -> tuple[float, float | None]:
            total, counts = 0.0, []
            for part, shown, masks in logits(val):
                total += float(mask_loss(shown, masks)) * len(part)
                counts.append(
                    count((shown[:, 0] > THRESHOLD_LOGIT).cpu().numpy(), masks.cpu().numpy())
                )
            return total / len(val), float(dice_per_image(join(counts)).mean())

        return logits, fit(decoder, encoder, transfer, losses, validate)

    def truth_hash(self, rows: Array) -> str:
        """SHA-256 (hex) over the rows' masks as the encoder's input has them."""
        self.positive(rows)  # which reads those that are not there yet
        return hash_of_parts(self._masks[row].tobytes() for row in rows.tolist())

    def predict(self, fitted: Any, train: Array, val: Array, test: Array) -> dict[str, Array]:
        """Counts of test, and for the page the places of the worst images and their masks.

        Shapes:  "both", "predicted", "truth" [test] px; "worst" [k]; "masks" [k, bytes] of bits
        """
        counts, packed = [], []
        for _, shown, masks in fitted(test):
            called = (shown[:, 0] > THRESHOLD_LOGIT).cpu().numpy()
            if not bool(torch.isfinite(shown).all()):
                raise ValueError("the decoder's logits hold NaN or infinite values")
            counts.append(count(called, masks.cpu().numpy()))
            packed.append(np.packbits(called.reshape(len(called), -1), axis=1))
        found = join(counts)
        each = dice_per_image(found)
        order = np.lexsort((np.arange(len(each)), found.truth == 0, each))
        worst = order[: self.config.evaluate.examples]
        return {
            **dataclasses.asdict(found),
            "worst": worst,
            "masks": np.concatenate(packed)[worst],  # all of them are bits of every test pixel
        }

    def score(
        self,
        predictions: list[dict[str, Array]],
        val: Array,
        test: Array,
        weights: Array,
    ) -> tuple[dict[str, Any], Measure]:
        """Dice of test in its three forms over the seeds' fits, and what some images score."""
        by_seed = [_counts(prediction) for prediction in predictions]
        scores = {
            "dice": dice_scores(by_seed, weights),
            "images": len(test),
            "images_with_truth": int((by_seed[0].truth > 0).sum()),
            "headline": "dice.published",
        }
        return scores, dice_measures(by_seed, weights, self.manifest.patient_key[test])

    def series(
        self, prediction: dict[str, Array], test: Array, method: str, seed: int
    ) -> list[Series]:
        """One fit's Dice of every test image, in its published form, and of those with truth."""
        counts = _counts(prediction)
        each, truth = dice_per_image(counts), counts.truth > 0
        return [
            of_marks(method, seed, "mask", "dice", test, each),
            of_marks(method, seed, "mask", "dice_positive", test[truth], each[truth]),
        ]

    def worst(self, prediction: dict[str, Array], test: Array, most: int) -> list[dict[str, Any]]:
        """The test images with the lowest Dice (with credit), those with truth first."""
        each = dice_per_image(_counts(prediction))
        return [
            {
                "row": int(test[i]),
                "caption": f"Dice {each[i]:.2f}",
                "predicted": np.unpackbits(bits, count=self.side * self.side)
                .reshape(self.side, self.side)
                .astype(bool),
            }
            for i, bits in zip(
                prediction["worst"][:most].tolist(), prediction["masks"], strict=False
            )
        ]


def _counts(prediction: dict[str, Array]) -> Counts:
    return Counts(prediction["both"], prediction["predicted"], prediction["truth"])
