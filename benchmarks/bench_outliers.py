"""How well `mlip outliers` tells films that are not as they should be, on real radiographs.

    python benchmarks/bench_outliers.py --checkpoint DIR [--write]

The reference is made of NIH ChestX-ray14's frontal films of the manifest's train split; its other
frontal films are "like it". Against them stand other films (laterals; those of case reports, other
scanners and publishers), the same films spoilt in known ways, and what is no radiograph. Beside the
checkpoint's features the same distance on an untrained tower's, and on 80 numbers of the pixels
alone (8 x 8 thumbnail, 16 bins of grey): what needs no model. AUROC with 95 % intervals over
patients; `flagged` is the share with p <= 0.05, which should be 0.05 of films like the reference.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from sklearn.datasets import load_sample_images

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.harness import RESULTS, environment, table, write_rows
from mlip.batch import ImageFeatures
from mlip.pretrained import open_checkpoint
from mlip.transfer.array import Array
from mlip.transfer.films.outliers import Reference, fit_reference
from mlip.transfer.films.own_inputs import encode_pixels, model_input
from mlip.transfer.measures.auroc import auroc_estimate
from mlip.transfer.measures.interval import (
    patient_resamples,
)

RESAMPLES = 1000
ROWS = RESULTS / "outliers.json"
_AT_ONCE = 64


def spoilt(film: Array, kind: str, rng: np.random.Generator) -> Array:
    """One film [H, W] uint8 with one thing wrong."""
    height, width = film.shape
    ways: dict[str, Callable[[], Array]] = {
        "inverted (MONOCHROME1 unread)": lambda: 255 - film,
        "turned by 90 degrees": lambda: np.rot90(film).copy(),
        "upside down": lambda: film[::-1].copy(),
        "left and right exchanged": lambda: film[:, ::-1].copy(),
        "a quarter of the film": lambda: film[: height // 2, : width // 2].copy(),
        "dark (30 % of the scale)": lambda: (film * 0.3).astype(np.uint8),
        "gamma 2.2": lambda: (255 * (film / 255.0) ** 2.2).astype(np.uint8),
        "noise of 15 %": lambda: (
            (film + rng.normal(0, 38, film.shape)).clip(0, 255).astype(np.uint8)
        ),
        "blurred": lambda: cv2.GaussianBlur(film, (0, 0), max(height, width) / 40),
    }
    return ways[kind]()


SPOILT = (
    *("inverted (MONOCHROME1 unread)", "turned by 90 degrees", "upside down"),
    *("a quarter of the film", "dark (30 % of the scale)", "gamma 2.2", "noise of 15 %"),
    *("blurred", "left and right exchanged"),
)


def photographs(count: int, rng: np.random.Generator) -> list[Array]:
    """Cut-outs of the two photographs that scikit-learn brings."""
    made = []
    for i in range(count):
        photo = cv2.cvtColor(load_sample_images().images[i % 2], cv2.COLOR_RGB2GRAY)
        y, x = (int(rng.integers(0, side - 200)) for side in photo.shape)
        made.append(photo[y : y + 200, x : x + 200].copy())
    return made


def numbers_of(film: Array) -> Array:
    """80 numbers of the pixels: 8 x 8 thumbnail and 16 bins of grey."""
    small = cv2.resize(film, (8, 8), interpolation=cv2.INTER_AREA).ravel() / 255.0
    return np.concatenate([small, np.histogram(film, 16, (0, 256))[0] / film.size])


def by_tower(opened: Any) -> Callable[[list[Array]], ImageFeatures]:
    def encode(films: list[Array]) -> ImageFeatures:
        means = []
        for start in range(0, len(films), _AT_ONCE):
            some = films[start : start + _AT_ONCE]
            pixels = torch.cat([model_input(film, opened.config) for film in some])
            means.append(encode_pixels(opened, pixels).patches.mean(dim=1, keepdim=True))
        return ImageFeatures(torch.cat(means)[:, 0], torch.cat(means), (1, 1))

    return encode


def by_pixels(films: list[Array]) -> ImageFeatures:
    numbers = torch.from_numpy(np.stack([numbers_of(film) for film in films]))[:, None]
    return ImageFeatures(numbers[:, 0], numbers, (1, 1))


def untrained(opened: Any) -> Any:
    fresh = copy.copy(opened)
    model = copy.deepcopy(opened.model)
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    object.__setattr__(fresh, "model", model)
    return fresh


def measure(
    reference: Reference,
    encode: Callable[[list[Array]], ImageFeatures],
    like: tuple[list[Array], list[str]],
    others: dict[str, tuple[list[Array], list[str]]],
) -> dict[str, dict[str, Any]]:
    """kind -> AUROC of its distances against those of `like`, and the share with p <= 0.05."""
    usual = reference.distances(encode(like[0]))
    result: dict[str, dict[str, Any]] = {
        "like the reference": {"flagged": float((reference.share_as_far(usual) <= 0.05).mean())}
    }
    for kind, (films, patients) in others.items():
        found = reference.distances(encode(films))
        weights = patient_resamples([*like[1], *patients], RESAMPLES, 0)
        is_other = np.repeat([False, True], [len(usual), len(found)])
        estimate = auroc_estimate(np.concatenate([usual, found]), is_other, weights)
        flagged = float((reference.share_as_far(found) <= 0.05).mean())
        result[kind] = {"n": len(found), "auroc": dict(estimate), "flagged": flagged}
    return result


def page_table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/evaluation.md: AUROC (interval) and flagged share of each kind."""
    features = list(dict.fromkeys(row["features"] for row in rows))
    lines = ["| films | " + " | ".join(features) + " |", "|---" * (1 + len(features)) + "|"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        cells = []
        for row in (r for r in rows if r["kind"] == kind):
            value, low, high = (row[f"auroc_{key}"] for key in ("value", "low", "high"))
            ranked = "-" if value is None else f"{value:.3f} ({low:.3f} to {high:.3f})"
            cells.append(f"{ranked}, {100 * row['flagged']:.0f} %")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint or export")
    parser.add_argument("--manifest", default="../shared/data/manifest.csv", help="real images")
    parser.add_argument("--write", action="store_true", help="keep the rows below results/")
    arguments = parser.parse_args()
    root = Path(arguments.manifest).parent
    with open(arguments.manifest, encoding="utf-8", newline="") as stream:
        listed = list(csv.DictReader(stream))

    def films_of(keep: Callable[[dict[str, str]], bool]) -> tuple[list[Array], list[str]]:
        rows = [row for row in listed if keep(row)]
        films = [cv2.imread(str(root / row["path"]), cv2.IMREAD_GRAYSCALE) for row in rows]
        return films, [row["patient_id"] for row in rows]

    def is_nih(row: dict[str, str]) -> bool:
        return row["dataset"].startswith("nih") and row["projection"] == "frontal"

    known = films_of(lambda row: is_nih(row) and row["split"] == "train")
    like = films_of(lambda row: is_nih(row) and row["split"] != "train")
    rng = np.random.default_rng(0)
    others = {
        "lateral": films_of(lambda row: row["projection"] == "lateral"),
        "frontal films of case reports": films_of(
            lambda row: not row["dataset"].startswith("nih") and row["projection"] == "frontal"
        ),
    }
    for kind in SPOILT:
        others[kind] = ([spoilt(film, kind, rng) for film in like[0]], like[1])
    count = len(like[0])
    # cut-outs of one photograph are no more apart than films of one patient
    others["photographs"] = (photographs(count, rng), [f"photo {i % 2}" for i in range(count)])
    opened = open_checkpoint(arguments.checkpoint)
    rows = []
    for name, encode in (
        ("checkpoint", by_tower(opened)),
        ("untrained tower", by_tower(untrained(opened))),
        ("pixels, no model", by_pixels),
    ):
        reference = fit_reference(encode(known[0]), np.array(known[1]), made_of={})
        for kind, found in measure(reference, encode, like, others).items():
            auroc = found.pop("auroc", {"value": None, "low": None, "high": None})
            told = {f"auroc_{key}": auroc[key] for key in ("value", "low", "high")}
            rows.append({"features": name, "kind": kind, **found, **told, **environment("cpu")})
    print(
        table(rows, ["features", "kind", "n", "auroc_value", "auroc_low", "auroc_high", "flagged"])
    )
    if arguments.write:
        print(write_rows("outliers", rows, ROWS))
    print(page_table(rows))


if __name__ == "__main__":
    main()
