"""Classification on image features: a linear layer on a frozen encoder, or both tuned.

Source:  ssl_finetuner.py of HKU-MedAI/MGCA and CheXpert's uncertain-label policies: features before
the projection head, one linear layer, sigmoids (or a softmax where classes exclude each other),
AdamW, early stopping on val. Ours: draws by patient, several seeds with intervals,
thresholds from val, calibration.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mlip.dataloading.manifest import Manifest, ManifestError
from mlip.dataloading.progress import Progress
from mlip.settings.config import Config
from mlip.transfer.array import Array
from mlip.transfer.fingerprint import hash_of_parts
from mlip.transfer.fits.classification_scores import (
    IGNORED,
    exclusive_measures,
    exclusive_scores,
    label_measures,
    label_scores,
    macro_auroc,
    softmax,
)
from mlip.transfer.fits.encoder import Encoder, Start
from mlip.transfer.fits.fitting import Record, batches, fit, shuffled_batches
from mlip.transfer.fits.fixed_batches import FixedBatches
from mlip.transfer.fits.kept_features import KeptFeatures
from mlip.transfer.fits.logistic import fit_logistic
from mlip.transfer.frames import Crops, Images, crop_of
from mlip.transfer.measures.predictions import Series, of_findings, of_marks
from mlip.transfer.measures.subgroups import Measure
from mlip.transfer.truth.annotations import (
    LABEL_FORM,
    NEGATIVE,
    POSITIVE,
    UNCERTAIN,
    UNSAID,
    Annotations,
    shared_names,
)

FEATURES_AT_ONCE = 64


def target_matrix(states: Array, classes: dict[str, str], blank: str) -> Array:
    """Label states -> targets 1, 0 or IGNORED, [rows, classes] int8.

    Uncertain labels become what their class's policy says, unsaid ones what `blank` says.
    """
    targets = np.full(states.shape, IGNORED, dtype=np.int8)
    targets[states == POSITIVE] = 1
    targets[states == NEGATIVE] = 0
    if blank == "zero":
        targets[states == UNSAID] = 0
    value = {"one": 1, "zero": 0, "ignore": IGNORED}
    for k, policy in enumerate(classes.values()):
        targets[states[:, k] == UNCERTAIN, k] = value[policy]
    return targets


class Classification:
    """The task for one manifest: rows, targets, fits and their scores."""

    truth_name = None  # a draw without a positive is told class by class

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        annotations: Annotations,
        images: Images,
        device: torch.device,
    ) -> None:
        self.config, self.transfer, self.manifest = config, config.transfer, manifest
        self.annotations, self.images, self.device = annotations, images, device
        self.classes = list(config.transfer.classes)
        missing = [name for name in self.classes if name not in annotations.names()]
        if missing and manifest.label_column is not None:
            raise ManifestError(
                f"{manifest.path}: no row carries the classes {', '.join(missing)} "
                f"(transfer.classes); the manifest has: "
                f"{', '.join(shared_names(manifest)[:30]) or 'no label of two patients'}; "
                f"expected {LABEL_FORM}"
            )
        self._cache: dict[int, Tensor] = {}  # features by row, of the encoder of this hash
        self._cache_of = ""
        self._batches: dict[str, FixedBatches] = {}  # of that encoder's fits, by its hash
        self._told = Progress("images encoded")
        self.kept_features: KeptFeatures | None = None  # of the encoder of the next fit

    def rows(self, split: str) -> Array:
        """Rows of the split that some class says something about."""
        rows = self.manifest.rows(split, with_report=False)
        rows = self.annotations.of_subset(rows, split)
        targets = self.targets(rows)
        if self.transfer.exclusive:
            return rows[(targets == 1).sum(axis=1) == 1]
        return rows[(targets != IGNORED).any(axis=1)]

    def targets(self, rows: Array) -> Array:
        states = self.annotations.states(rows, self.classes)
        return target_matrix(states, self.transfer.classes, self.transfer.blank)

    def positive(self, rows: Array) -> Array:
        return (self.targets(rows) == 1).any(axis=1)

    def truth_hash(self, rows: Array) -> str:
        """SHA-256 (hex) over the rows' labels."""
        return hash_of_parts([self.targets(rows).tobytes()])

    def plan(self, start: Start, train: Array, val: Array, test: Array) -> str:
        """Settle which images a frozen encoder takes at once, by the fits up to this one; asked of
        every fit in its turn, made or kept.

        Returns: their hash, "" of a tuned encoder: its fits depend on no other
        """
        if self.transfer.encoder == "tuned":
            return ""
        made = self._batches.setdefault(start.weights_hash, FixedBatches(FEATURES_AT_ONCE))
        for rows in (val, test, train):
            made.add(rows)
        return made.hash

    @torch.no_grad()
    def features(self, start: Start, encoder: Encoder, rows: Array) -> Tensor:
        """Pooled features of the centre crop, [n, width]; computed once per row and encoder."""
        if self._cache_of != start.weights_hash:
            self._cache.clear()
            self._cache_of = start.weights_hash
            self._told = Progress("images encoded")
        crops = Crops(self.config, self.images, train=False, seed=0)
        encoder.eval()
        for row in rows.tolist():
            if row in self._cache:
                continue
            part, kept = self._batches[start.weights_hash].of(row), self.kept_features
            before = None if kept is None else kept.take(part)
            if before is not None:
                self._cache.update(zip(part.tolist(), torch.from_numpy(before), strict=True))
                continue
            found = encoder.pooled(crops.batch(part, 0).to(self.device)).cpu()
            if not bool(torch.isfinite(found).all()):
                raise ValueError(
                    "the image features hold NaN or infinite values: the checkpoint is broken"
                )
            self._cache.update(zip(part.tolist(), found, strict=True))
            if kept is not None:
                kept.add(part, found.numpy())
            self._told(len(self._cache))
        return torch.stack([self._cache[r] for r in rows.tolist()])

    def fit(self, start: Start, train: Array, val: Array, seed: int) -> tuple[Any, Record]:
        """(predict: rows -> logits [n, classes], record)"""
        transfer = self.transfer
        encoder = start.encoder(
            is_frozen=transfer.encoder == "frozen",
            side=crop_of(self.config).crop_px,
            channels=self.config.data.channels,
        ).to(self.device)
        both = np.concatenate([train, val])
        targets = dict(zip(both.tolist(), self.targets(both), strict=True))

        def target(rows: Array) -> Tensor:
            return torch.from_numpy(np.stack([targets[r] for r in rows.tolist()]))

        if transfer.probe == "logistic":
            return self._logistic(start, encoder, train, val, target)
        torch.manual_seed(seed)
        head = nn.Linear(encoder.width, len(self.classes)).to(self.device)
        is_frozen = transfer.encoder == "frozen"
        crops = Crops(self.config, self.images, train=transfer.augment, seed=seed)

        def logits(rows: Array) -> Tensor:
            """Without gradient, on the centre crop."""
            if is_frozen:
                return head(self.features(start, encoder, rows).to(self.device)).cpu()
            still = Crops(self.config, self.images, train=False, seed=0)
            return torch.cat(
                [
                    head(encoder.pooled(still.batch(part, 0).to(self.device))).cpu()
                    for part in batches(rows, FEATURES_AT_ONCE)
                ]
            )

        def losses(epoch: int) -> Iterator[Tensor]:
            fewest = transfer.epoch_steps
            for number, rows in shuffled_batches(train, transfer.batch, seed, epoch, fewest):
                if is_frozen:
                    x = self.features(start, encoder, rows).to(self.device)
                else:
                    x = encoder.pooled(crops.batch(rows, number).to(self.device))
                yield label_loss(head(x), target(rows).to(self.device), transfer.exclusive)

        def validate() -> tuple[float, float | None]:
            shown, wanted = logits(val), target(val)
            loss = label_loss(shown, wanted, transfer.exclusive)
            return float(loss), macro_auroc(shown.numpy(), wanted.numpy())

        record = fit(head, encoder, transfer, losses, validate)
        return torch.no_grad()(lambda rows: logits(rows).numpy()), record

    def _logistic(
        self, start: Start, encoder: Encoder, train: Array, val: Array, target: Any
    ) -> tuple[Any, Record]:
        x, x_val = self.features(start, encoder, train), self.features(start, encoder, val)
        exclusive = self.transfer.exclusive
        predict = fit_logistic(
            x.numpy(),
            target(train).numpy(),
            x_val.numpy(),
            target(val).numpy(),
            exclusive=exclusive,
        )

        def loss(features: Tensor, rows: Array) -> float:
            logits = torch.from_numpy(predict(features.numpy()))
            return float(label_loss(logits, target(rows), exclusive))

        record = Record(1, 1, 0, (loss(x, train),), (loss(x_val, val),), (None,))
        return lambda rows: predict(self.features(start, encoder, rows).numpy()), record

    def predict(self, fitted: Any, train: Array, val: Array, test: Array) -> dict[str, Array]:
        """Logits of val (for thresholds) and test, and which classes train showed both kinds of."""
        targets = self.targets(train)
        learnt = (targets == 1).any(axis=0) & (targets == 0).any(axis=0)
        return {"val": fitted(val), "test": fitted(test), "learnt": learnt}

    def score(
        self,
        predictions: list[dict[str, Array]],
        val: Array,
        test: Array,
        weights: Array,
    ) -> tuple[dict[str, Any], Measure]:
        """Scores on test of each seed's fit, joined, and what some rows score; thresholds are
        val's."""
        patients, targets = self.manifest.patient_key[test], self.targets(test)
        if self.transfer.exclusive:
            given = (predictions, targets, weights, self.classes)
            return exclusive_scores(*given), exclusive_measures(*given, patients)
        rule = self.config.evaluate.threshold_rule
        told = (predictions, targets, self.targets(val), weights, self.classes, rule)
        return label_scores(*told), label_measures(*told, patients)

    def series(
        self, prediction: dict[str, Array], test: Array, method: str, seed: int
    ) -> list[Series]:
        """One fit's scores of the test rows, of the classes that its training rows could teach."""
        targets, logits = self.targets(test), prediction["test"].astype(np.float64)
        values = softmax(logits) if self.transfer.exclusive else logits
        found = of_findings(method, seed, self.classes, test, targets, values)
        found = [one for one, learnt in zip(found, prediction["learnt"], strict=True) if learnt]
        if self.transfer.exclusive and len(self.classes) == 2:
            found = found[-1:]  # one against the other is one number
        if self.transfer.exclusive:
            right = values.argmax(axis=1) == targets.argmax(axis=1)
            found.append(of_marks(method, seed, "all classes", "accuracy", test, right))
        return found

    def worst(self, prediction: dict[str, Array], test: Array, most: int) -> list[dict[str, Any]]:
        """The test rows whose labels were the most surprising to the fit."""
        targets = self.targets(test)
        logits = torch.from_numpy(prediction["test"]).double()
        if self.transfer.exclusive:
            surprise = F.cross_entropy(
                logits, torch.from_numpy(targets.argmax(axis=1)), reduction="none"
            ).numpy()[:, None]
        else:
            known = targets != IGNORED
            each = F.binary_cross_entropy_with_logits(
                logits, torch.from_numpy((targets == 1).astype(np.float64)), reduction="none"
            ).numpy()
            surprise = np.where(known, each, 0.0)
        order = np.argsort(-surprise.max(axis=1), kind="stable")[:most]
        shown = []
        for i in order.tolist():
            if self.transfer.exclusive:
                true, called = int(targets[i].argmax()), int(prediction["test"][i].argmax())
                said = f"labelled {self.classes[true]}, called {self.classes[called]}"
            else:
                k = int(surprise[i].argmax())
                label, score = "yes" if targets[i, k] == 1 else "no", float(logits[i, k].sigmoid())
                said = f"{self.classes[k]}: labelled {label}, scored {score:.2f}"
            shown.append({"row": int(test[i]), "caption": said, "loss": float(surprise[i].max())})
        return shown


def label_loss(logits: Tensor, targets: Tensor, exclusive: bool) -> Tensor:
    """Binary cross-entropy over the labels that are known, or cross-entropy of a softmax."""
    if exclusive:
        return F.cross_entropy(logits, targets.argmax(dim=1))
    known = targets != IGNORED
    loss = F.binary_cross_entropy_with_logits(
        logits, (targets == 1).to(logits.dtype), reduction="none"
    )
    return (loss * known).sum() / known.sum().clamp_min(1)
