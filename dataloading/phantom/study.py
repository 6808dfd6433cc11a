"""Generated frontal chest studies with known truth: image, report, masks, boxes, concepts.

A study is a pure function of (seed, index, image_px). Writing folders of them lives in
dataset.py, the retrieval ceiling in oracle.py. For tests and demonstrations of
learning only: nothing learnt from phantoms says anything about patients.
Source: ours.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray

from mlip.dataloading.phantom.anatomy import Layers, draw_layers
from mlip.dataloading.phantom.body import draw_body
from mlip.dataloading.phantom.canvas import Density
from mlip.dataloading.phantom.findings import draw_findings, plan_findings
from mlip.dataloading.phantom.reports import write_report
from mlip.dataloading.phantom.study_types import SPEC_OF, PhantomStudy

MIN_PX = 96  # below this, thin lines and nodules are less than a pixel
NORMAL_RATIO = (0.37, 0.49)  # cardiothoracic ratio without cardiomegaly
_PERIOD = 8  # the last two of this many consecutive indexes are one patient's
_PATIENT, _STUDY, _FINDINGS, _WORDS = range(4)  # streams under one (seed, number)


def patient_of(index: int) -> int:
    """The number of the patient of a study: one patient in seven has two studies."""
    return index - 1 if index % _PERIOD == _PERIOD - 1 else index


def generate_study(seed: int, index: int, image_px: int) -> PhantomStudy:
    """The study of this seed and index, the same on every call.

    Raises:  ValueError for a negative seed or index, or an image too small to show a nodule.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"expected seed and index of 0 or more, got {seed} and {index}")
    if image_px < MIN_PX:
        raise ValueError(f"expected data.phantom.image_px of {MIN_PX} or more, got {image_px}")
    patient = patient_of(index)
    person = _generator(seed, patient, _PATIENT)
    rng = _generator(seed, index, _STUDY)
    choice = _generator(seed, index, _FINDINGS)
    plans = plan_findings(choice)
    heart = [p for p in plans if p.concept_id == "cardiomegaly"]
    ratio = heart[0].size if heart else choice.uniform(*NORMAL_RATIO)
    # the same range with and without the finding: only the width tells it
    cover = heart[0].contrast if heart else choice.uniform(*SPEC_OF["cardiomegaly"].contrast)
    body, anatomy = draw_body(rng, person, ratio, cover)
    layers = draw_layers(body, image_px, rng)
    findings = draw_findings(plans, body, layers, choice)
    image = _expose(layers, rng)
    report, claims = write_report(_generator(seed, index, _WORDS), findings, anatomy)
    return PhantomStudy(
        seed=seed,
        index=index,
        patient=patient,
        image=image,
        report=report,
        claims=claims,
        findings=findings,
        anatomy=anatomy,
    )


def _generator(seed: int, number: int, stream: int) -> Generator:
    return Generator(PCG64(SeedSequence((seed, number, stream))))


def _expose(layers: Layers, rng: Generator) -> NDArray[np.uint16]:
    """The film: vessels, blur, window, gamma, noise, marker, collimation, 12 bits.

    Every draw here is independent of the findings.
    """
    px = layers.canvas.px
    layers.add(layers.vessels, rng.uniform(0.09, 0.14))
    film: Density = cv2.GaussianBlur(
        layers.density, (0, 0), max(rng.uniform(0.002, 0.004) * px, 0.3)
    )
    low, high = rng.uniform(-0.04, 0.06), rng.uniform(0.85, 1.05)
    film -= np.float32(low)
    film *= np.float32(1 / (high - low))
    np.clip(film, 0.0, 1.0, out=film)
    # a film's shoulder: dense tissue is compressed towards white
    bend = rng.uniform(0.5, 1.9)
    film *= np.float32(-bend)
    cv2.exp(film, dst=film)
    np.subtract(np.float32(1), film, out=film)
    film *= np.float32(rng.uniform(0.86, 1.0) / (1 - np.exp(-bend)))
    noise = rng.standard_normal((px, px), np.float32)
    film += np.float32(rng.uniform(0.010, 0.024)) * noise
    if rng.random() < 0.5:
        _mark_left(film, rng)
    if rng.random() < 0.15:
        border = round(rng.uniform(0.01, 0.035) * px)
        film[:border] = film[-border:] = 0.0
        film[:, :border] = film[:, -border:] = 0.0
    np.clip(film, 0.0, 1.0, out=film)
    return np.left_shift((film * np.float32(4095.0)).astype(np.uint16), 4)


def _mark_left(film: Density, rng: Generator) -> None:
    """The technologist's lead letter L in the upper corner on the patient's left."""
    px = film.shape[0]
    corner = np.array([rng.uniform(0.87, 0.91), rng.uniform(0.03, 0.10)]) * px
    tall = 0.05 * px
    strokes = np.rint(corner + [(0, 0), (0, tall), (0.55 * tall, tall)]).astype(np.int32)
    cv2.polylines(film, [strokes], False, 0.95, max(1, round(0.009 * px)))
