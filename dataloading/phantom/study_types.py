"""What a phantom study is made of: finding specifications, truths, claims and the study itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Side = Literal["left", "right"]  # of the patient; the patient's right is the image's left
Zone = Literal["upper", "mid", "lower"]  # thirds of the lung between apex and diaphragm


@dataclass(frozen=True)
class FindingSpec:
    """One finding: how often, how visible, how large.

    Units:  contrast 1 = a lung wholly replaced by water, a device's density of 0.42; size is a
            share of the image's side (times image_px: pixels) where nothing else stands above it.
    """

    concept_id: str
    prevalence: float  # chance of being drawn, before the cap on findings per study
    contrast: tuple[float, float]
    size_share: tuple[float, float]
    size_words: tuple[str, ...] = ()  # from small to large, as reports write them; () = never said
    has_side: bool = True
    zones: tuple[Zone, ...] = ()  # () = no zone is ever said


_AMOUNTS = ("small", "moderate", "large")
_THIRDS: tuple[Zone, ...] = ("upper", "mid", "lower")
# above each: which extent its size is
FINDINGS: tuple[FindingSpec, ...] = (
    # height of the fluid at the chest wall
    FindingSpec("pleural_effusion", 0.30, (0.50, 0.95), (0.05, 0.34), _AMOUNTS),
    # retraction of the lung from apex and chest wall towards the hilum, as a share
    FindingSpec("pneumothorax", 0.26, (0.22, 0.45), (0.12, 0.45), _AMOUNTS),
    # mean radius
    FindingSpec("consolidation", 0.30, (0.45, 0.90), (0.050, 0.125), _AMOUNTS, zones=_THIRDS),
    # radius
    FindingSpec(
        "lung_nodule",
        0.28,
        (0.60, 1.00),
        (0.020, 0.042),
        ("small", "medium sized", "large"),
        zones=_THIRDS,
    ),
    # cardiothoracic ratio (0.37 to 0.49 without the finding)
    FindingSpec(
        "cardiomegaly",
        0.28,
        (0.80, 0.95),
        (0.54, 0.70),
        ("mild", "moderate", "marked"),
        has_side=False,
    ),
    # length of the longest band
    FindingSpec(
        "atelectasis",
        0.28,
        (0.45, 0.85),
        (0.12, 0.26),
        ("minor", "moderate", "extensive"),
        zones=("mid", "lower"),
    ),
    # long side of the generator
    FindingSpec("pacemaker", 0.24, (0.50, 1.00), (0.065, 0.095)),
    # drawn and of no effect: the line goes from where it enters to where its tip is drawn
    FindingSpec("central_venous_catheter", 0.26, (0.35, 0.65), (0.30, 0.75)),
)

CONCEPT_IDS: tuple[str, ...] = tuple(spec.concept_id for spec in FINDINGS)
SPEC_OF: dict[str, FindingSpec] = {spec.concept_id: spec for spec in FINDINGS}


def size_tier(concept_id: str, size: float) -> int:
    """0, 1 or 2: which third of the finding's size range a size lies in."""
    low, high = SPEC_OF[concept_id].size_share
    return int(np.clip(3 * (size - low) / (high - low), 0, 2))


@dataclass(frozen=True, kw_only=True, eq=False)
class FindingTruth:
    """One instance of a finding as it was drawn (a bilateral effusion is two of them).

    Shapes:  mask [H, W] bool; box x, y, w, h in pixels, x and y of the upper left corner
    """

    concept_id: str
    side: Side | None
    zone: Zone | None
    size: float
    size_word: str | None
    contrast: float
    is_faint: bool  # contrast in the lowest fifth of its range: reports hedge
    variant: str | None  # what a device is: "single lead", "subclavian", ...
    box: tuple[int, int, int, int]
    mask: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What one phrase of a report says; None = not said."""

    about: str  # concept id, or the name of an anatomical descriptor
    value: str  # "present", "absent" or the descriptor's value
    side: str | None = None  # "left", "right", "both"
    zone: str | None = None
    size_word: str | None = None
    variant: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class PhantomStudy:
    """One frontal image, its report and the truth behind both.

    Shapes:  image [H, W] uint16, multiples of 16 (a 12-bit detector), brighter = denser
    """

    seed: int
    index: int
    patient: int  # equal numbers under one seed = the same person
    image: NDArray[np.uint16]
    report: str
    claims: tuple[Claim, ...]
    findings: tuple[FindingTruth, ...]
    anatomy: dict[str, str]  # visible descriptors: lung_volume, heart_size, aorta, ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Concept ids that are truly present, in the order of FINDINGS."""
        present = {finding.concept_id for finding in self.findings}
        return tuple(name for name in CONCEPT_IDS if name in present)


def mask_to_runs(mask: NDArray[np.bool_]) -> list[int]:
    """Lengths of alternating runs in row-major order, the first one of False (may be 0)."""
    flat = mask.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    bounds = np.concatenate(([0], changes, [flat.size]))
    runs = np.diff(bounds).tolist()
    return [0, *runs] if flat[0] else runs


def mask_from_runs(runs: Iterable[int], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask [H, W] that mask_to_runs described.

    Raises:  ValueError if the runs do not fill the shape.
    """
    lengths = np.asarray(list(runs), dtype=np.int64)
    if lengths.sum() != shape[0] * shape[1]:
        raise ValueError(
            f"expected runs that sum to {shape[0]} x {shape[1]} pixels, got {lengths.sum()}"
        )
    values = np.arange(lengths.size) % 2 == 1
    return np.repeat(values, lengths).reshape(shape)
