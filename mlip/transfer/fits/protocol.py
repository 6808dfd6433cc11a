"""A trained task from manifest to results: fractions x seeds, val for choices, test once per fit.

Results are plain JSON values but for "pictures" (PNG as base64, for the page) and "predictions"
(the scores of every test image).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mlip.dataloading.manifest import Manifest, ManifestError
from mlip.dataloading.splits import SPLITS
from mlip.encoders.options import tower_shape
from mlip.encoders.vision import VisionEncoder
from mlip.precision import precision_on
from mlip.settings.config import Config, to_dict
from mlip.settings.transfer import at_fraction
from mlip.transfer.array import Array
from mlip.transfer.draws import HeldOut, Splits, balance, divide, draw_fraction
from mlip.transfer.fingerprint import (
    hash_of,
    image_preprocessing,
    run_name,
    source_commit,
    versions,
)
from mlip.transfer.fits.classification import Classification
from mlip.transfer.fits.detection import Detection
from mlip.transfer.fits.encoder import Start, open_start
from mlip.transfer.fits.kept_fits import Fit, KeptFits, made_by, settings_of
from mlip.transfer.fits.pictures import example_pictures
from mlip.transfer.fits.segmentation import Segmentation
from mlip.transfer.frames import Images, crop_of, frame_of
from mlip.transfer.measures.interval import patient_resamples
from mlip.transfer.measures.predictions import Series, predictions_of
from mlip.transfer.measures.subgroups import read_groupings, subgroup_scores
from mlip.transfer.trained_on import Training, find_seen
from mlip.transfer.truth.annotations import Annotations

SCHEMA = 1
TASKS: dict[str, Any] = {
    "classification": Classification,
    "segmentation": Segmentation,
    "detection": Detection,
}


def transfer_run(
    config: Config,
    manifest: Manifest,
    vision: VisionEncoder | Mapping[int, VisionEncoder] | None,
    *,
    facts: Mapping[str, Any] | None = None,
    trainings: Sequence[Training] = (),
    device: torch.device | str = "cpu",
    kept: KeptFits | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The task of config.transfer, trained for every fraction and seed and scored on test.

    vision   the checkpoint's encoder, or one for each of transfer.seeds where every seed has a
             pre-training of its own (None: transfer.start is imagenet or random)
    facts    what is known of its training: step, pairs_seen, checkpoint
    trainings  what the checkpoints tell of the rows that they were trained on
    kept     where finished fits are kept; those that are there already are not made again
    Returns: {"schema", "kind": "transfer", "run", "task", "data", "fractions": [{percent, scores,
             fits}], "fingerprints", "versions", "config", "pictures", "predictions"}
    Raises:  ManifestError for data the task cannot use; ValueError for broken features;
             TransferError for a loss that is not finite.
    """
    began, commit = time.perf_counter(), source_commit()  # first: it may refuse MLIP_COMMIT
    transfer = config.transfer
    manifest = dataclasses.replace(manifest, keep_without_report=True)
    images = Images(config, manifest, frame_of(config))
    try:
        annotations = Annotations(config, manifest)
        device = torch.device(device)
        task = TASKS[transfer.task](config, manifest, annotations, images, device)
        splits, unused = _splits(config, manifest, task, images)
        # refused before hours of fits: columns, and masks and boxes of test
        groupings = read_groupings(config, manifest, splits.test)
        seen = find_seen(config, manifest, trainings).of(splits.test)
        patients = manifest.patient_key[splits.test]
        data = {**_account(manifest, task, splits), "unused": unused, "trained_on": seen}
        draws = _draws(config, manifest, task, splits)
        fractions: list[dict[str, Any]] = []
        fits = _Fits(config, manifest, task, splits, images, kept, say)
        pictures: list[dict[str, Any]] = []
        series: list[Series] = []
        for percent in transfer.fractions:
            task.transfer = at_fraction(transfer, percent)
            told, predictions = [], []
            for seed in transfer.seeds:
                own = vision[seed] if isinstance(vision, Mapping) else vision
                entry, prediction = fits.make(own, draws[percent, seed], percent, seed)
                told.append(entry)
                predictions.append(prediction)
            for seed, prediction in zip(transfer.seeds, predictions, strict=True):
                series += task.series(prediction, splits.test, f"{percent:g} %", seed)
            weights = patient_resamples(patients, config.evaluate.bootstrap, config.run.seed)
            scores, measure = task.score(predictions, splits.val, splits.test, weights)
            scores["subgroups"] = subgroup_scores(groupings, patients, measure)
            fractions.append({"percent": percent, "scores": scores, "fits": told})
            pictures = example_pictures(config, manifest, task, predictions[0], splits.test)
    finally:
        images.close()
    precision = precision_on(transfer.precision, device)  # of val and test too, as in its fits
    return {
        "schema": SCHEMA,
        "kind": "transfer",
        "run": {
            **(facts or {}),  # first: those of an export are of whoever wrote it
            "name": run_name(config),
            "seeds": list(transfer.seeds),
            "device": str(device),
            "precision": precision,
            "commit": commit,
            "seconds": round(time.perf_counter() - began + fits.seconds_before, 1),
        },
        "task": {
            "name": transfer.task,
            "encoder": transfer.encoder,
            "start": transfer.start,
            "classes": list(getattr(task, "classes", [])),
        },
        "data": data,
        "fractions": fractions,
        "fingerprints": {
            "weights": [fits.weights[seed] for seed in transfer.seeds]
            if len(set(fits.weights.values())) > 1
            else next(iter(fits.weights.values())),
            "splits": splits.hash,
            "manifest": manifest.fingerprint,
            "preprocessing": hash_of(image_preprocessing(config)),
            "frame": hash_of(_frame(config)),
            "settings": hash_of(to_dict(config)),
        },
        "versions": versions(),
        "config": to_dict(config),
        "pictures": pictures,
        "predictions": predictions_of(
            series, config, manifest, "test", splits.test, precision=precision
        ),
    }


class _Fits:
    """The fits of a task, one after the other; those that are kept from before are not made again.

    weights         seed -> SHA-256 of what its fits begin with
    seconds_before  what the kept ones took when they were made
    """

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        task: Any,
        splits: Splits,
        images: Images,
        kept: KeptFits | None,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._manifest, self._task, self._splits = config, manifest, task, splits
        self._kept, self._say, self._test = kept, say, HeldOut(splits.test)
        self.weights: dict[int, str] = {}
        self.seconds_before = 0.0
        self._made_of: dict[str, Any] = {}  # of every fit
        if kept is not None:  # the code's hash before it can be edited
            self._made_of = made_by(config, task.device) | _content(manifest, task, splits, images)

    def make(
        self, vision: VisionEncoder | None, rows: Array, percent: float, seed: int
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """(how the fit on these rows went, as results tell it; its prediction)"""
        patient_key, splits = self._manifest.patient_key, self._splits
        start = open_start(self._config, vision, seed)
        self.weights[seed] = start.weights_hash
        rows_hash = hash_of(sorted(map(self._manifest.image_path, rows.tolist())))
        made_of = {
            **self._made_of,
            **settings_of(self._config, percent),
            "seed": seed,
            "weights": start.weights_hash,
            # activation, heads, epsilons: no weight tells them, nor a source's path
            "tower": tower_shape(start.vision.tower.backbone.config),
            "training rows": rows_hash,
            "encoded together": self._task.plan(start, rows, splits.val, splits.test),
        }
        fit = None if self._kept is None else self._kept.read(percent, seed, made_of)
        told = ""
        if fit is not None:
            self.seconds_before += fit.seconds
            told = ", kept from before"
        else:
            if self._kept is not None and made_of["encoded together"]:
                self._task.kept_features = self._kept.features(made_of)
            fit = self._fit(start, rows, percent, seed)
            if self._kept is not None:
                self._kept.keep(percent, seed, made_of, fit)
        record = fit.record
        self._say(
            f"{percent:g} % seed {seed}: {len(rows)} images, best epoch "
            f"{record.best_epoch} of {record.epochs}, val loss {min(record.val_loss):.4f}"
            f"{told}"
        )
        entry = {
            "seed": seed,
            "rows": len(rows),
            "patients": len(np.unique(patient_key[rows])),
            "rows_hash": rows_hash,
            **record.as_dict(),
        }
        return entry, fit.prediction

    def _fit(self, start: Start, rows: Array, percent: float, seed: int) -> Fit:
        """One fit, and its one look at test."""
        began, val = time.perf_counter(), self._splits.val
        fitted, record = self._task.fit(start, rows, val, seed)
        test = self._test.open((percent, seed))
        prediction = self._task.predict(fitted, rows, val, test)
        return Fit(record, prediction, time.perf_counter() - began)


def _content(manifest: Manifest, task: Any, splits: Splits, images: Images) -> dict[str, Any]:
    """Hashes of the data that fits are made of: rows, pixels and truth of all splits."""
    rows = np.concatenate([splits[split] for split in SPLITS])
    return {
        "manifest": manifest.fingerprint,
        "splits": splits.hash,
        "images": images.hash(rows),
        "truth": task.truth_hash(rows),
    }


def _splits(
    config: Config, manifest: Manifest, task: Any, images: Images
) -> tuple[Splits, dict[str, int]]:
    """(the rows of each split, how many rows of the manifest's splits are none for the task)"""
    usable: dict[str, Array] = {}
    bad: dict[str, int] = {}
    unused: dict[str, int] = {}
    for split in SPLITS:
        rows = task.rows(split)
        unused[split] = len(manifest.rows(split, with_report=False)) - len(rows)
        usable[split], reasons = images.usable(rows)
        for reason, count in reasons.items():
            bad[reason] = bad.get(reason, 0) + count
    return divide(manifest, config.transfer.val_share, usable, bad), unused


def _draws(
    config: Config, manifest: Manifest, task: Any, splits: Splits
) -> dict[tuple[float, int], Array]:
    """Training rows by (percent, seed), all of them looked at before the first fit.

    Raises:  ManifestError for a draw without a mask or box: it teaches nothing but silence.
    """
    draws: dict[tuple[float, int], Array] = {}
    for percent in config.transfer.fractions:
        for seed in config.transfer.seeds:
            rows = splits.train
            if config.transfer.balance:
                positive = task.positive(rows)
                if not positive.any():
                    raise ManifestError(
                        f"{manifest.path}: transfer.balance=true takes all positives and as many "
                        f"others, and none of the {len(rows)} training images is positive for "
                        "transfer.classes: check them, or set transfer.balance=false"
                    )
                rows = balance(rows, positive, seed)
            rows = draw_fraction(rows, manifest.patient_key[rows], percent, seed)
            if task.truth_name is not None and not task.positive(rows).any():
                raise ManifestError(
                    f"{manifest.path}: none of the {len(rows)} training images drawn ({percent:g} "
                    f"%, seed {seed}) has {task.truth_name} of the classes asked for: raise "
                    "transfer.fractions, or check transfer.classes and transfer.columns"
                )
            draws[percent, seed] = rows
    return draws


def _frame(config: Config) -> Any:
    """How an image is laid before the encoder, to be hashed."""
    frame, crop = frame_of(config), crop_of(config)
    if frame is not None:
        return dataclasses.asdict(frame)
    return "crop" if crop == config.data else ["crop", crop.resize_px, crop.crop_px]


def _account(manifest: Manifest, task: Any, splits: Splits) -> dict[str, Any]:
    return {
        "splits": {
            split: {
                "images": len(splits[split]),
                "patients": len(np.unique(manifest.patient_key[splits[split]])),
                "with_a_positive": int(task.positive(splits[split]).sum()),
            }
            for split in SPLITS
        },
        "unreadable": splits.unreadable,
    }
