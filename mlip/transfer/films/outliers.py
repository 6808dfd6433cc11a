"""How unlike a reference's images an image is to a model: a p-value for each, and its file.

Of one split's patients a half gives mean and covariance of the image's features (the mean of its
patch embeddings), the other half the distances that a new one is ranked among. Of images like the
reference's one in twenty has p <= 0.05, whatever the model; an inverted, turned or lateral film,
another scanner's or no radiograph at all has less, as far as the model's features see it.

Source:  Mahalanobis distance of features: Lee et al., NeurIPS 2018; its covariance: Ledoit and
         Wolf 2004; p-value by rank among held-out ones: Bates et al., Annals of Statistics 2023.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mlip.batch import ImageFeatures
from mlip.dataloading.manifest import Manifest
from mlip.system.output_file import require_replaceable, whole_file
from mlip.transfer.array import Array
from mlip.transfer.films.row_images import RowImages
from mlip.transfer.fingerprint import made_with

MOST_REFERENCE = 10_000  # images; a covariance of 512 dimensions is known from far fewer
FEWEST = 20  # images in each half: p <= 0.05 needs 19 to rank among
_PART = 4096  # images whose float64 features exist at once
_FORMAT = "1"


class OutlierError(ValueError):
    """A reference that cannot be made, read or used with this model; says what to do."""

    exit_code = 4


@dataclass(frozen=True)
class Reference:
    """Where the features of known images lie.

    mean [D], whitening [D, D] float64: |(feature - mean) whitening| is the Mahalanobis distance;
    ranked [M] float64: distances of the half that gave neither, ascending
    made_of  hashes of weights and preprocessing, number of images: what load_reference checks
    """

    mean: Array
    whitening: Array
    ranked: Array
    made_of: Mapping[str, str]

    def distances(self, images: ImageFeatures) -> Array:
        """Shapes:  patches [N, P, D] -> [N] float64. Raises:  OutlierError for another D or NaN."""
        if images.patches.shape[2] != len(self.mean):
            raise OutlierError(
                f"images: features of {images.patches.shape[2]} dimensions, the reference has "
                f"{len(self.mean)}: it was made with another model; make it again (--fit)"
            )
        # in parts: float64 copies of a million images' features are 12 GB
        return np.concatenate([self._distances(_summary(p)) for p in images.patches.split(_PART)])

    def _distances(self, features: Array) -> Array:
        return np.asarray(np.linalg.norm((features - self.mean) @ self.whitening, axis=1))

    def p_values(self, images: ImageFeatures) -> Array:
        """Share of the ranked images, the new one among them, that lie at least as far.

        Shapes:  patches [N, P, D] -> [N] float64 in [1 / (M + 1), 1]
        Raises:  OutlierError as distances
        """
        return self.share_as_far(self.distances(images))

    def share_as_far(self, distances: Array) -> Array:
        """p-values of distances, [N] -> [N]."""
        nearer = np.searchsorted(self.ranked, distances, side="left")
        return np.asarray((1 + len(self.ranked) - nearer) / (1 + len(self.ranked)))


def fit_reference(
    images: ImageFeatures, patients: Array, *, seed: int = 0, made_of: Mapping[str, str]
) -> Reference:
    """The reference of encoded images; which half a patient falls in is drawn by `seed`.

    Shapes:  patches [N, P, D]; patients [N], equal for images of one patient
    Raises:  OutlierError where a half would have fewer than FEWEST images, or for NaN features
    """
    from sklearn.covariance import LedoitWolf

    features = _summary(images.patches)
    names, patient = np.unique(patients, return_inverse=True)
    is_fitted = np.zeros(len(names), dtype=bool)
    is_fitted[np.random.default_rng(seed).permutation(len(names))[: (len(names) + 1) // 2]] = True
    fitted, others = features[is_fitted[patient]], features[~is_fitted[patient]]
    if min(len(fitted), len(others)) < FEWEST:
        raise OutlierError(
            f"reference: {len(features)} images of {len(names)} patients, in halves "
            f"{len(fitted)} and {len(others)}: expected {FEWEST} or more in each; use a larger "
            "split or manifest"
        )
    covariance = LedoitWolf().fit(fitted)
    try:
        whitening = np.linalg.cholesky(covariance.precision_)
    except np.linalg.LinAlgError:
        raise OutlierError(
            f"reference: the features of {len(fitted)} images do not differ: expected images of "
            "many patients, and a trained model"
        ) from None
    bare = Reference(covariance.location_, whitening, np.zeros(0), made_of)
    return dataclasses.replace(bare, ranked=np.sort(bare._distances(others)))


def _summary(patches: Tensor) -> Array:
    """Mean of the patch embeddings, [N, P, D] -> [N, D] float64.

    On real films it tells more than the global embedding (docs/evaluation.md).
    """
    features = patches.detach().cpu().mean(dim=1, dtype=torch.float64).numpy()
    if not np.isfinite(features).all():
        raise OutlierError(
            "the image features hold NaN or infinite values: the checkpoint is broken"
        )
    return np.asarray(features)


def require_own_reference(path: Path) -> None:
    """Raises:  ConfigError for a folder, or a file that save_reference did not write."""
    kind = "reference of mlip outliers"
    require_replaceable(path, "--fit", kind, is_ours=_is_reference(path))


def save_reference(reference: Reference, path: Path) -> None:
    """safetensors of mean, whitening and ranked; no image and no patient is in it.

    Raises:  KeptBesideError where another's file has come to lie there
    """
    tensors: dict[str, Tensor] = {
        name: torch.from_numpy(np.ascontiguousarray(getattr(reference, name)))
        for name in ("mean", "whitening", "ranked")
    }
    # one entry: the order of several would change from file to file
    facts = {"format": _FORMAT, **reference.made_of}
    # private: `ranked` is of single films
    with whole_file(path, is_private=True, require_own=require_own_reference) as partial:
        # not save_file: it writes under a name of its own, which a kill would leave
        partial.write_bytes(save(tensors, {"reference": json.dumps(facts)}))


def _is_reference(path: Path) -> bool:
    """Whether save_reference wrote this file, of whatever model."""
    try:
        with safe_open(path, "np") as stored:
            return "reference" in (stored.metadata() or {})
    except (OSError, SafetensorError):
        return False


def load_reference(path: str | Path, opened: Any) -> Reference:
    """The reference of a file, for the model it was made with.

    Raises:  OutlierError where it cannot be read, or was made with other weights or preprocessing
    """
    try:
        with safe_open(path, "np") as stored:
            facts = stored.metadata() or {}
            mean, whitening, ranked = map(stored.get_tensor, ("mean", "whitening", "ranked"))
        made_of = dict(json.loads(facts["reference"]))
        is_whole = made_of.pop("format") == _FORMAT and whitening.shape == (len(mean), len(mean))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise OutlierError(
            f"reference {path}: cannot be read ({type(error).__name__}): expected a file that "
            "`mlip outliers --fit` wrote"
        ) from error
    if not is_whole or len(ranked) < FEWEST:
        raise OutlierError(f"reference {path}: of another version; make it again (--fit)")
    for name, value in made_with(opened).items():
        if made_of.get(name) != value:
            raise OutlierError(
                f"reference {path}: was made with other {name}: make it again with this model "
                "(--fit)"
            )
    return Reference(mean, whitening, np.sort(ranked), made_of)


def encode_rows(
    opened: Any, manifest: Manifest, split: str, *, most: int | None
) -> tuple[ImageFeatures, Array, dict[int, str]]:
    """The split's images ("all": of every split and of none), at most `most`, drawn by run.seed.

    Returns: features of the mean of each image's patches alone, as both fields, [N, 1, D]; row of
             the manifest of each, [N] int64; row -> reason of those that cannot be read
    Raises:  ManifestError as RowImages
    """
    images = RowImages(opened, manifest, split, most=most)
    # filled in place: a small tensor kept of each batch holds the heap around it, 15 kB an image
    means, found, done = torch.empty(0, 0), np.empty(len(images), dtype=np.int64), 0
    for bank in images:
        mean, place = bank.features.patches.mean(dim=1), slice(done, done + len(bank))
        if done == 0:
            means = mean.new_empty(len(images), mean.shape[1])
        means[place], found[place] = mean, bank.row_index
        done = place.stop
    patches = means[:done, None]
    return ImageFeatures(patches[:, 0], patches, grid=(1, 1)), found[:done], images.bad
