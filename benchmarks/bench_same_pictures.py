"""How surely one film stored in two ways is found by its picture, and two films are kept apart.

    python benchmarks/bench_same_pictures.py [--write]

On the real radiographs of the manifest: how many bits differ between films of different patients
(all pairs; 150 of them again behind one shutter), of one patient, and between each film and itself
stored anew in known ways. How many
false matches a large comparison would give is extrapolated: a generalised Pareto distribution
through the nearest 1 in 500 pairs, its spread over draws of the patients with replacement. Pairs
that match count as none of the different ones: of the real films they were looked at by eye and
are the same ones.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.stats import genpareto

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.harness import RESULTS, environment, write_rows
from mlip.dataloading.images.perceptual_hash import BITS, perceptual_hashes
from mlip.dataloading.images.same_pictures import SAME_BITS, PictureHashes, same_pictures
from mlip.dataloading.phantom.dataset import write_dataset
from mlip.settings.config import Phantom
from mlip.transfer.array import Array

ROWS = RESULTS / "same_pictures.json"
LARGE = 200_000 * 25_000  # comparisons
_DRAWS = 20


def jpeg(film: Array, quality: int) -> Array:
    content = cv2.imencode(".jpg", film, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(content, cv2.IMREAD_GRAYSCALE))


def longest(film: Array, side: int, way: int = cv2.INTER_AREA) -> Array:
    scale = side / max(film.shape)
    size = (round(film.shape[1] * scale), round(film.shape[0] * scale))
    return np.asarray(cv2.resize(film, size, interpolation=way))


def window(film: Array, percent: float) -> Array:
    low, high = np.percentile(film, [percent, 100 - percent])
    return (255 * (film - low) / max(high - low, 1)).clip(0, 255).astype(np.uint8)


def gamma(film: Array, power: float) -> Array:
    return (255 * (film / 255.0) ** power).astype(np.uint8)


def clahe(film: Array, limit: float) -> Array:
    return np.asarray(cv2.createCLAHE(limit, (8, 8)).apply(film))


def framed(film: Array, value: int) -> Array:
    """On a square a tenth larger than its longest side."""
    side = max(film.shape) * 11 // 10
    down, across = (side - n for n in film.shape)
    ends = (down // 2, down - down // 2, across // 2, across - across // 2)
    return np.asarray(cv2.copyMakeBorder(film, *ends, cv2.BORDER_CONSTANT, value=value))


def cut(film: Array, share: float) -> Array:
    down, across = (round(n * share) for n in film.shape)
    return film[down : film.shape[0] - down, across : film.shape[1] - across]


def turned(film: Array, degrees: float) -> Array:
    height, width = film.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    return np.asarray(cv2.warpAffine(film, matrix, (width, height)))


def square(film: Array) -> Array:
    side = min(film.shape)
    top, left = ((n - side) // 2 for n in film.shape)
    return film[top : top + side, left : left + side]


def shuttered(film: Array, share: float, degrees: float, value: int) -> Array:
    """A square of that share of its sides, turned; the rest plain."""
    side = max(film.shape)
    corners = cv2.boxPoints(((side / 2, side / 2), (side * share, side * share), degrees))
    out = np.full((side, side), value, np.uint8)
    kept = cv2.fillPoly(np.zeros((side, side), np.uint8), [corners.astype(np.int32)], 1) > 0
    out[kept] = cv2.resize(film, (side, side))[kept]
    return out


def noisy(film: Array, share: float) -> Array:
    noise = np.random.default_rng(0).normal(0, 255 * share, film.shape)
    return (film + noise).clip(0, 255).astype(np.uint8)


def marked(film: Array) -> Array:
    out, width = film.copy(), film.shape[1]
    cv2.putText(out, "PORTABLE 12:30", (10, 40), 0, width / 500, 255, 2)
    cv2.putText(out, "R", (width // 12, film.shape[0] // 5), 0, width / 250, 255, 4)
    return out


WAYS: dict[str, Callable[[Array], Array]] = {
    "JPEG of quality 95": lambda f: jpeg(f, 95),
    "JPEG of quality 50": lambda f: jpeg(f, 50),
    "JPEG of quality 20": lambda f: jpeg(f, 20),
    "256 px, JPEG of quality 90": lambda f: jpeg(longest(f, 256), 90),
    "1024 px, cubic": lambda f: longest(f, 1024, cv2.INTER_CUBIC),
    "128 px": lambda f: longest(f, 128),
    "squeezed to 224 x 224 px, linear": lambda f: np.asarray(cv2.resize(f, (224, 224))),
    "12 bits in a 16-bit file": lambda f: f.astype(np.uint16) * 16,
    "5 bits (dark)": lambda f: f // 8,
    "gamma 0.5": lambda f: gamma(f, 0.5),
    "gamma 2.2": lambda f: gamma(f, 2.2),
    "window that clips 5 % at each end": lambda f: window(f, 5),
    "window that clips 15 % at each end": lambda f: window(f, 15),
    "inverted": lambda f: 255 - f,
    "histogram equalised": lambda f: np.asarray(cv2.equalizeHist(f)),
    "CLAHE, limit 2": lambda f: clahe(f, 2),
    "CLAHE, limit 4": lambda f: clahe(f, 4),
    "CLAHE, limit 40": lambda f: clahe(f, 40),
    "noise of 10 %": lambda f: noisy(f, 0.1),
    "text and a side mark burnt in": marked,
    "gamma 0.5, window 5 %, 224 x 224 px, JPEG 50": lambda f: jpeg(
        cv2.resize(window(gamma(f, 0.5), 5), (224, 224)), 50
    ),
    "in a black square, JPEG of quality 75": lambda f: jpeg(framed(f, 0), 75),
    "in a white square": lambda f: framed(f, 255),
    "turned by 1 degree": lambda f: turned(f, 1),
    "turned by 2 degrees": lambda f: turned(f, 2),
    "1 % cut off each side": lambda f: cut(f, 0.01),
    "2 % cut off each side": lambda f: cut(f, 0.02),
    "3 % cut off each side": lambda f: cut(f, 0.03),
    "5 % cut off each side": lambda f: cut(f, 0.05),
    "the square in its middle": square,
    "left and right exchanged": lambda f: f[:, ::-1].copy(),
}


def hashed(films: list[Array]) -> list[Array]:
    return [np.unpackbits(perceptual_hashes(film), axis=1) for film in films]


def apart(one: Array, other: Array) -> int:
    bits = (one[:, None] != other[None]).sum(axis=2)
    return int(np.minimum(bits, BITS - bits).min(initial=BITS))


def all_pairs(hashes: list[Array]) -> Array:
    """[N, N] bits between the nearest hashes of two films, either way round."""
    flat = np.concatenate(hashes).astype(np.float32)
    bits = flat @ (1 - flat).T
    bits = bits + bits.T
    bits = np.minimum(bits, BITS - bits)
    starts = np.cumsum([0, *(len(found) for found in hashes)])[:-1]
    rows = np.minimum.reduceat(bits, starts, axis=0)
    return np.minimum.reduceat(rows, starts, axis=1)


def expected_matches(bits: Array) -> float:
    """False ones among LARGE comparisons, by the tail of these distances."""
    count = max(len(bits) // 500, 50)
    kept = np.sort(np.partition(bits, count)[:count])
    shape, _, scale = genpareto.fit(kept[-1] - kept[:-1], floc=0)
    beyond = genpareto.sf(kept[-1] - SAME_BITS, shape, 0, scale)
    return float(LARGE * beyond * len(kept) / len(bits))


def between(bits: Array, patients: Array, draws: int) -> dict[str, Any]:
    """Of films of different patients, upper triangle."""
    i, j = np.triu_indices(len(bits), 1)
    is_other = (patients[i] != patients[j]) & (bits[i, j] > SAME_BITS)
    far = bits[i, j][is_other]
    rng, names, found = np.random.default_rng(0), np.unique(patients), []
    for _ in range(draws):
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)))
        weight = times[np.searchsorted(names, patients)]
        found.append(expected_matches(np.repeat(far, (weight[i] * weight[j])[is_other])))
    ends = np.percentile(found, [2.5, 97.5]) if found else [None, None]
    return {
        "pairs": len(far),
        "mean": float(far.mean()) / BITS,
        "degrees_of_freedom": float(0.25 / np.square(far / BITS - 0.5).mean()),
        "nearest": float(far.min()) / BITS,
        "expected": expected_matches(far),
        "expected_low": ends[0],
        "expected_high": ends[1],
    }


def behind_shutters(films: list[Array], patients: Array) -> dict[str, Any]:
    """Of films of different patients that lie behind the same one of 18 shutters."""
    i, j = np.triu_indices(len(films), 1)
    is_other = patients[i] != patients[j]
    found = []
    for share, degrees, value in itertools.product((0.9, 0.75, 0.6), (1, 5, 20), (0, 255)):
        bits = all_pairs(hashed([shuttered(film, share, degrees, value) for film in films]))
        found.append(bits[i, j][is_other])
    bits = np.concatenate(found)
    return {
        "films": len(films),
        "pairs": len(bits),
        "same": int((bits <= SAME_BITS).sum()),
        "same_of_a_quarter": int((bits <= BITS // 4).sum()),
        "nearest": float(bits.min()) / BITS,
    }


def speed(films: list[Array]) -> dict[str, float]:
    cv2.setNumThreads(0)
    small = [jpeg(longest(film, 256), 95) for film in films]
    begun = time.process_time()
    for film in small:
        perceptual_hashes(film)
    hashing = (time.process_time() - begun) / len(small)
    drawn = np.random.default_rng(0).integers(0, 2**63, (225_000, BITS // 64), dtype=np.uint64)
    own = PictureHashes(drawn[:25_000], np.arange(25_000))
    other = PictureHashes(drawn[25_000:], np.arange(200_000))
    same_pictures(own.of(np.arange(25_000) < 2), other)  # compiles
    begun, clock = time.process_time(), time.monotonic()
    same_pictures(own, other)
    return {
        "hash_us": 1e6 * hashing,
        "compare_processor_s": time.process_time() - begun,
        "compare_clock_s": time.monotonic() - clock,
    }


def phantoms(count: int) -> tuple[list[Array], Array]:
    with tempfile.TemporaryDirectory() as folder:
        asked = Phantom(studies=count, val_studies=0, test_studies=0, image_px=256)
        manifest = write_dataset(folder, asked, workers=1)
        with manifest.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        root = manifest.parent
        films = [cv2.imread(str(root / row["image"]), cv2.IMREAD_GRAYSCALE) for row in rows]
        return films, np.array([row["patient_id"] for row in rows])


def page_table(rows: list[dict[str, Any]]) -> str:
    """The tables of docs/datasets.md: films of different patients, and each way of storing anew."""
    lines = ["| films of different patients | pairs | bits that differ, mean | nearest two |"]
    lines[0] += f" false matches expected of {LARGE:.0e} comparisons (95 % over patients) |"
    lines.append("|---" * 5 + "|")
    for row in (r for r in rows if r["measure"] == "between"):
        expected = "-"
        if row["expected_low"] is not None:
            ends = f"{row['expected_low']:.2g} to {row['expected_high']:.2g}"
            expected = f"{row['expected']:.2g} ({ends})"
        lines.append(
            f"| {row['films']} | {row['pairs']:,} | {100 * row['mean']:.1f} % "
            f"| {100 * row['nearest']:.1f} % | {expected} |"
        )
    lines += [
        "",
        "| one film, stored anew as | found | bits that differ, median | 99 of 100 below |",
    ]
    lines.append("|---" * 4 + "|")
    for row in (r for r in rows if r["measure"] == "way"):
        lines.append(
            f"| {row['way']} | {100 * row['found']:.1f} % | {100 * row['median']:.1f} % "
            f"| {100 * row['q99']:.1f} % |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--manifest", default="../shared/data/manifest.csv", help="real images")
    parser.add_argument("--phantoms", type=int, default=400, help="generated films (400)")
    parser.add_argument("--every", type=int, default=6, help="store every N-th film anew (6)")
    parser.add_argument("--write", action="store_true", help="keep the rows below results/")
    arguments = parser.parse_args()
    root = Path(arguments.manifest).parent
    with open(arguments.manifest, encoding="utf-8", newline="") as stream:
        listed = list(csv.DictReader(stream))
    films = [cv2.imread(str(root / row["path"]), cv2.IMREAD_GRAYSCALE) for row in listed]
    patients = np.array([row["patient_id"] for row in listed])
    hashes = hashed(films)
    bits = all_pairs(hashes)
    is_nih_pa = np.array([r["dataset"].startswith("nih") and r["view"] == "PA" for r in listed])
    made, owners = phantoms(arguments.phantoms)
    rows: list[dict[str, Any]] = [
        {"measure": "between", "films": "all", **between(bits, patients, _DRAWS)},
        {
            "measure": "between",
            "films": "NIH, PA",
            **between(bits[np.ix_(is_nih_pa, is_nih_pa)], patients[is_nih_pa], _DRAWS),
        },
        {"measure": "between", "films": "phantoms", **between(all_pairs(hashed(made)), owners, 0)},
    ]
    i, j = np.triu_indices(len(bits), 1)
    own = patients[i] == patients[j]
    rows.append(
        {
            "measure": "one patient",
            "pairs": int(own.sum()),
            "same": int((bits[i, j][own] <= SAME_BITS).sum()),
            "same_of_other_patients": int((bits[i, j][~own] <= SAME_BITS).sum()),
            "nearest_others": (
                np.sort(bits[i, j][own & (bits[i, j] > SAME_BITS)])[:5] / BITS
            ).tolist(),
        }
    )
    some_pa = np.flatnonzero(is_nih_pa)[:150]
    behind = behind_shutters([films[place] for place in some_pa], patients[some_pa])
    rows.append({"measure": "shutter", **behind})
    some = list(zip(hashes, films, strict=True))[:: arguments.every]
    for name, way in WAYS.items():
        counts = []
        for found, film in some:
            (anew,) = hashed([np.ascontiguousarray(way(film))])
            counts.append(apart(found, anew))
        differ = np.array(counts) / BITS
        rows.append(
            {
                "measure": "way",
                "way": name,
                "films": len(some),
                "found": float((differ <= SAME_BITS / BITS).mean()),
                "median": float(np.median(differ)),
                "q99": float(np.quantile(differ, 0.99)),
            }
        )
    rows.append({"measure": "speed", **speed([film for _, film in some])})
    facts = environment("cpu")
    rows = [{**row, **facts} for row in rows]
    for row in rows:
        print({k: v for k, v in row.items() if k not in facts})
    if arguments.write:
        print(write_rows("same_pictures", rows, ROWS))
    print(page_table(rows))


if __name__ == "__main__":
    main()
