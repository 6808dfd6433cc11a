"""Detection on an encoder's levels: boxes of one or several classes, encoder frozen or tuned.

Source:  ssl_detector.py and yolo_loss.py of HKU-MedAI/MGCA: YOLOv3 head on the three coarsest
levels, AdamW, early stopping on val. Ours: whole images letterboxed, boxes never edited in place,
frozen encoders in eval mode, a head for ViT, mAP that counts every image beside the published form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip.settings.config import Config
from mlip.transfer.array import Array
from mlip.transfer.fingerprint import hash_of_parts
from mlip.transfer.fits.boxes import box_iou
from mlip.transfer.fits.encoder import Encoder, Start
from mlip.transfer.fits.fitting import Record, batches, fit, shuffled_batches
from mlip.transfer.fits.framed_task import FramedTask
from mlip.transfer.fits.yolo import YoloHead, decode, yolo_loss
from mlip.transfer.measures.average_precision import (
    Found,
    Truth,
    detection_measures,
    detection_scores,
    divided,
    joined,
    match,
    match_fits,
    mean_average_precision,
)
from mlip.transfer.measures.froc import froc_scores
from mlip.transfer.measures.predictions import Series
from mlip.transfer.measures.subgroups import Measure
from mlip.transfer.truth.outside import OutsideBoxes, check_inside

ANY_CLASS = "object"  # where transfer.classes is empty, all boxes are of one class
SMALLEST_SHARE = 0.2  # of a box that augmentation left inside the picture


class Detection(FramedTask):
    """The task for one manifest: rows, boxes, fits and their scores."""

    truth_name = "a box"  # what every draw of training rows has to show

    def __init__(self, config: Config, *parts: Any) -> None:
        super().__init__(config, *parts)
        self.annotations.require_box_names()
        self.classes = list(config.transfer.classes) or [ANY_CLASS]
        self._boxes: dict[int, Truth] = {}

    def rows(self, split: str) -> Array:
        """All rows of the split that were looked at: an image without a box counts too."""
        rows = self.annotations.of_subset(self.manifest.rows(split, with_report=False), split)
        return self.annotations.looked_at(rows)

    def truth(self, row: int) -> Truth:
        """The row's boxes in px of the encoder's input; the arrays are read-only."""
        if row not in self._boxes:
            boxes = self.annotations.boxes(row)
            size = boxes.size or self.images.size(row)
            check_inside(row, boxes.corners, size, self.manifest.path)
            place = {name: k for k, name in enumerate(self.transfer.classes)}
            labels = [place.get(n, -1) if place else 0 for n in boxes.names]
            kept = np.array([k >= 0 for k in labels], dtype=bool)
            corners = self.frame.boxes(boxes.corners[kept], size)
            chosen = np.array(labels, dtype=np.int64)[kept]
            corners.flags.writeable = chosen.flags.writeable = False
            self._boxes[row] = Truth(corners, chosen)
        return self._boxes[row]

    def positive(self, rows: Array) -> Array:
        """Raises:  ManifestError for boxes outside their images, of all these rows at once"""
        outside = OutsideBoxes(self.manifest.path)
        for row in rows.tolist():
            if row not in self._boxes:
                boxes = self.annotations.boxes(row)
                outside.look(row, boxes.corners, boxes.size or self.images.size(row))
        outside.check()
        return np.array([len(self.truth(r).corners) > 0 for r in rows.tolist()], dtype=bool)

    def _inputs(
        self, encoder: Encoder, rows: Array, epoch: int | None, seed: int
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The encoder's levels, boxes and labels of a batch; augmented together where an epoch is
        given."""
        levels, matrices = self._levels(encoder, rows, epoch, seed)
        boxes, labels = [], []
        for row, matrix in zip(rows.tolist(), matrices, strict=True):
            truth = self.truth(row)
            corners, kept = warp_boxes(truth.corners, matrix, self.side)
            boxes.append(torch.from_numpy(corners.astype(np.float32)))
            labels.append(torch.from_numpy(truth.labels[kept]))
        return levels, boxes, labels

    def fit(self, start: Start, train: Array, val: Array, seed: int) -> tuple[Any, Record]:
        """(predict: rows -> Found per image, record)"""
        transfer = self.transfer
        encoder = self._encoder(start)
        torch.manual_seed(seed)
        head = self._head(YoloHead(encoder, self.side, len(self.classes), transfer.decoder_width))

        def loss_of(outputs: list[Tensor], boxes: list[Tensor], labels: list[Tensor]) -> Tensor:
            return yolo_loss(outputs, head, boxes, labels, transfer.box_loss)

        def predicted(levels: list[Tensor]) -> list[Tensor]:
            with self._precision():
                raw = head(levels)
            return [r.float() for r in raw]

        def losses(epoch: int) -> Iterator[Tensor]:
            fewest = transfer.epoch_steps
            for number, rows in shuffled_batches(train, transfer.batch, seed, epoch, fewest):
                drawn = number if transfer.augment else None
                levels, boxes, labels = self._inputs(encoder, rows, drawn, seed)
                yield loss_of(predicted(levels), boxes, labels)

        def outputs(rows: Array) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
            for part in batches(rows, transfer.batch):
                with torch.no_grad():
                    levels, boxes, labels = self._inputs(encoder, part, None, seed)
                    raw = predicted(levels)
                yield raw, boxes, labels

        def decoded(raw: list[Tensor]) -> list[Found]:
            parts = decode(raw, head, score_cut=transfer.score_cut, nms_iou=transfer.nms_iou)
            return [Found(*part) for part in parts]

        def predict(rows: Array) -> list[Found]:
            return [found for raw, _, _ in outputs(rows) for found in decoded(raw)]

        def validate() -> tuple[float, float | None]:
            total, found = 0.0, []
            for raw, boxes, labels in outputs(val):
                total += float(loss_of(raw, boxes, labels)) * len(boxes)
                if transfer.monitor == "score":
                    found += decoded(raw)
            score = self._val_score(val, found) if transfer.monitor == "score" else None
            return total / len(val), score

        return predict, fit(head, encoder, transfer, losses, validate)

    def _val_score(self, val: Array, found: list[Found]) -> float | None:
        truth = [self.truth(r) for r in val.tolist()]
        matches = match(truth, found, self.transfer.iou_thresholds, len(self.classes))
        value = float(mean_average_precision(matches, np.ones((1, len(val))))[0])
        return value if np.isfinite(value) else None

    def truth_hash(self, rows: Array) -> str:
        """SHA-256 (hex) over the rows' boxes."""
        return hash_of_parts(
            part.tobytes()
            for truth in map(self.truth, rows.tolist())
            for part in (truth.corners, truth.labels)
        )

    def predict(self, fitted: Any, train: Array, val: Array, test: Array) -> dict[str, Array]:
        """The boxes of test: as `joined` lays them."""
        return joined(fitted(test))

    def score(
        self,
        predictions: list[dict[str, Array]],
        val: Array,
        test: Array,
        weights: Array,
    ) -> tuple[dict[str, Any], Measure]:
        """mAP of test in both forms and FROC over the seeds' fits, and what some images score."""
        patients = self.manifest.patient_key[test]
        truth = [self.truth(r) for r in test.tolist()]
        by_seed = [divided(prediction) for prediction in predictions]
        overlaps, cut = self.transfer.iou_thresholds, self.transfer.score_cut
        matched = match_fits(truth, by_seed, overlaps, len(self.classes), cut)
        scores = detection_scores(
            *(truth, by_seed, matched, weights),
            thresholds=overlaps,
            classes=self.classes,
            compat_score_cut=self.transfer.compat_score_cut,
        )
        measure = detection_measures(truth, matched, weights, patients, classes=self.classes)
        return {**scores, "froc": froc_scores(truth, by_seed, weights)}, measure

    def series(self, prediction: Any, test: Array, method: str, seed: int) -> list[Series]:
        """None: an average precision is no mean over images."""
        return []

    def worst(self, prediction: dict[str, Array], test: Array, most: int) -> list[dict[str, Any]]:
        """Test images whose true boxes the best predictions overlap least."""
        shown = []
        for row, found in zip(test.tolist(), divided(prediction), strict=True):
            truth = self.truth(row)
            best = np.argsort(-found.scores, kind="stable")[: max(1, len(truth.corners))]
            corners = found.corners[best]
            if len(truth.corners) == 0:
                continue
            overlap = 0.0
            if len(corners):
                pairs = box_iou(
                    torch.tensor(truth.corners), torch.from_numpy(corners.astype(np.float64))
                )
                overlap = float(pairs.max(dim=1).values.mean())
            shown.append(
                {
                    "row": row,
                    "caption": f"mean overlap {overlap:.2f}",
                    "overlap": overlap,
                    "predicted_boxes": corners.tolist(),
                    "scores": found.scores[best].tolist(),
                }
            )
        shown.sort(key=lambda s: s["overlap"])
        return shown[:most]


def warp_boxes(corners: Array, matrix: Array | None, side: int) -> tuple[Array, Array]:
    """(extents of the mapped boxes cut to the picture, which boxes are still there); new arrays."""
    if matrix is None or len(corners) == 0:
        return corners.copy(), np.arange(len(corners))
    x0, y0, x1, y1 = corners.T
    points = np.stack([[x0, x1, x1, x0], [y0, y0, y1, y1]])  # [2, 4, n]
    moved = np.einsum("ij,jkn->ikn", matrix[:, :2], points) + matrix[:, 2][:, None, None]
    whole = np.concatenate([moved.min(axis=1), moved.max(axis=1)]).T
    cut = whole.clip(0.0, float(side))

    def area(c: Array) -> Array:
        return (c[:, 2] - c[:, 0]) * (c[:, 3] - c[:, 1])

    kept = np.flatnonzero(area(cut) > SMALLEST_SHARE * area(whole))
    return cut[kept], kept
