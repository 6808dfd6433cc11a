"""A folder of phantom studies: images, manifest.csv, boxes.csv, truth.jsonl and meta.json.

The folder appears whole or not at all: it is written under a temporary name beside its place and
renamed. Generation lives in study.py.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mlip.dataloading.phantom import study as phantom
from mlip.dataloading.phantom.study_types import PhantomStudy, mask_from_runs, mask_to_runs
from mlip.settings.config import Phantom
from mlip.system.folder_lock import is_alive
from mlip.system.machine import usable_cores

logger = logging.getLogger("mlip")

MANIFEST_COLUMNS = (
    "image",
    "report",
    "patient_id",
    "study_id",
    "image_id",
    "split",
    "view",
    "labels",
)
BOX_COLUMNS = ("image_id", "path", "kind", "label", "x", "y", "w", "h", "side")
_CHUNK = 64  # studies a worker makes per step: small enough to balance two workers
_PNG = [
    *(cv2.IMWRITE_PNG_COMPRESSION, 1),
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP),
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY),
]
MARK = "mlip phantom studies"
_PERIOD = 8  # val starts at a multiple: no patient's two studies straddle it (study.patient_of)


@dataclass(frozen=True)
class _Job:
    split: str
    seed: int
    index: int

    @property
    def image_id(self) -> str:
        return f"s{self.seed}-{self.index:06d}"


def write_dataset(folder: Path | str, settings: Phantom, *, workers: int | None = None) -> Path:
    """Path of the manifest of the phantom studies that `settings` asks for, made if need be.

    A complete folder with the same fingerprint is reused, one with another replaced; of a link the
    folder that it leads to. `workers` None = one per core.

    Raises:  ValueError where the settings contradict each other, or where `folder` holds
             something that is no phantom data set, or cannot be replaced; OSError where the studies
             cannot be written; RuntimeError where a worker failed otherwise.
    """
    given = Path(folder)
    folder = Path(os.path.realpath(given))
    _check(settings)
    mark = fingerprint(settings)
    if is_complete(folder, mark):
        return given / "manifest.csv"
    if os.path.lexists(folder) and _read_meta(folder) is None:  # a link to itself, too
        if not folder.is_dir() or any(folder.iterdir()):
            raise ValueError(
                f"{given}: expected no folder, an empty one or generated phantom studies; it is "
                "or holds other files, so nothing was written; name another folder"
            )
    if folder.is_dir() and (Path.cwd().is_relative_to(folder) or folder.is_mount()):
        raise ValueError(
            f"{given}: is the folder that this runs in, one above it or a whole disk, and cannot "
            "be replaced by one with the studies, so nothing was written; name a folder below it"
        )
    found = _read_meta(folder) or {}
    if found.get("settings") == dataclasses.asdict(settings) and found.get("fingerprint") != mark:
        # a run that goes on over them would not notice: its manifest has their names and reports
        logger.warning(
            "%s: made by another version of the generator; made anew by this one, and its pixels "
            "may differ",
            given,
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}@{socket.gethostname()}"
    # of a killed process: in a container the next one has its number, and is alive
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _fill(partial, settings, mark, workers or usable_cores())
        if is_complete(folder, mark):  # another process was faster
            return given / "manifest.csv"
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return given / "manifest.csv"


def fingerprint(settings: Phantom) -> str:
    """SHA-256 over the settings and the generator's own source."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(settings), sort_keys=True).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def is_complete(folder: Path, mark: str) -> bool:
    """Whether the folder's marker has this fingerprint and every file it counts is there."""
    meta = _read_meta(folder)
    if meta is None or meta.get("fingerprint") != mark:
        return False
    sums = meta.get("sha256")
    if not isinstance(sums, dict) or not sums.keys() >= {"manifest.csv", "truth.jsonl"}:
        return False
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            return False
    images = sum(1 for path in (folder / "images").rglob("*") if path.is_file())
    return bool(images == meta.get("studies"))


def read_truth(
    folder: Path | str, only: Container[str] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """image_id -> findings with concept_id, side, zone, size, contrast, box and mask.

    only     image_ids to read: a mask of bools takes 20 KB, all of a large folder hundreds of MiB
    Shapes:  mask [H, W] bool; box x, y, w, h in pixels
    """
    truth: dict[str, list[dict[str, Any]]] = {}
    with (Path(folder) / "truth.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if only is not None and row["image_id"] not in only:
                continue
            shape = (row["image_px"], row["image_px"])
            for finding in row["findings"]:
                finding["mask"] = mask_from_runs(finding.pop("mask_runs"), shape)
                finding["box"] = tuple(finding["box"])
            truth[row["image_id"]] = row["findings"]
    return truth


def _check(settings: Phantom) -> None:
    if min(settings.studies, settings.val_studies, settings.test_studies) < 0:
        raise ValueError("data.phantom: expected numbers of studies of 0 or more")
    if settings.seed == settings.test_seed:
        raise ValueError(
            f"data.phantom.seed and data.phantom.test_seed are both {settings.seed}: test patients "
            f"need a stream of their own; change one of them"
        )


def _jobs(settings: Phantom) -> list[_Job]:
    start = -(-settings.studies // _PERIOD) * _PERIOD
    train = [_Job("train", settings.seed, k) for k in range(settings.studies)]
    val = [_Job("val", settings.seed, start + k) for k in range(settings.val_studies)]
    test = [_Job("test", settings.test_seed, k) for k in range(settings.test_studies)]
    return train + val + test


def _read_meta(folder: Path) -> dict[str, Any] | None:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return meta if isinstance(meta, dict) and meta.get("kind") == MARK else None


def _remove_leftovers(folder: Path) -> None:
    """Removes temporary folders of this host's processes that are gone."""
    host = f"@{socket.gethostname()}"  # of another's nobody knows here whether they are alive
    for leftover in folder.parent.glob(f".{folder.name}.partial-*{host}"):
        pid = leftover.name.removesuffix(host).rsplit("-", 1)[-1]
        if not pid.isdecimal() or not is_alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _fill(partial: Path, settings: Phantom, mark: str, workers: int) -> None:
    jobs = _jobs(settings)
    for split in ("train", "val", "test"):
        (partial / "images" / split).mkdir(parents=True)
    (partial / "parts").mkdir()
    chunks = -(-len(jobs) // _CHUNK)
    workers = max(1, min(workers, chunks))
    arguments = [
        json.dumps([str(partial), dataclasses.asdict(settings), worker, workers])
        for worker in range(workers)
    ]
    # A fresh interpreter per worker: forking a process with threads is unsafe, and
    # multiprocessing's spawn would import the caller's whole main module (torch) again.
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = (
        "import os, sys; parent = os.getppid(); "
        "from mlip.dataloading.phantom.dataset import _work; _work(sys.argv[1], parent)"
    )
    helpers = [
        subprocess.Popen(
            [sys.executable, "-c", command, argument],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for argument in arguments[1:]
    ]
    try:
        _work(arguments[0])
        for helper in helpers:
            _, errors = helper.communicate()
            if helper.returncode != 0:
                last = (errors.strip().splitlines() or ["no message"])[-1]
                if found := re.match(r"\w+Error: \[Errno (\d+)\]", last):  # a full disk, say
                    raise OSError(int(found[1]), os.strerror(int(found[1])), str(partial))
                raise RuntimeError(f"a phantom worker ended with {helper.returncode}: {last}")
    finally:
        for helper in helpers:
            if helper.poll() is None:
                helper.kill()
                helper.communicate()
    _merge(partial, settings, mark, jobs)


def _work(argument: str, parent: int | None = None) -> None:
    """One worker: every `workers`-th chunk of the jobs; the rows of a chunk go to a part file.

    parent  a helper's: without it nobody wants its chunks, and it ends
    """
    name, fields, worker, workers = json.loads(argument)
    partial, settings = Path(name), Phantom(**fields)
    jobs = _jobs(settings)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        for chunk in range(worker, -(-len(jobs) // _CHUNK), workers):
            if parent is not None and os.getppid() != parent:
                return
            rows = [
                _write_study(partial, settings, job)
                for job in jobs[chunk * _CHUNK : (chunk + 1) * _CHUNK]
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (partial / "parts" / f"{chunk:06d}.jsonl").write_text(text, encoding="utf-8")
    finally:
        cv2.setNumThreads(threads)


def _write_study(partial: Path, settings: Phantom, job: _Job) -> dict[str, Any]:
    study = phantom.generate_study(job.seed, job.index, settings.image_px)
    suffix = "png" if settings.file_format == "png" else "dcm"
    path = f"images/{job.split}/{job.image_id}.{suffix}"
    patient_id = f"p{job.seed}-{study.patient:06d}"
    if settings.file_format == "png":
        write_png(partial / path, study.image)
    else:
        from mlip.dataloading.dicom.radiograph import write_radiograph

        write_radiograph(
            partial / path, study.image, patient_id=patient_id, study_id=job.image_id, view="PA"
        )
    return {
        "image": path,
        "report": study.report,
        "patient_id": patient_id,
        "study_id": job.image_id,
        "image_id": job.image_id,
        "split": job.split,
        "view": "PA",
        "labels": "|".join(study.labels),
        "image_px": settings.image_px,
        "anatomy": study.anatomy,
        "claims": [vars(claim) for claim in study.claims],
        "findings": list(_truths(study)),
    }


def _truths(study: PhantomStudy) -> Iterator[dict[str, Any]]:
    for finding in study.findings:
        yield {
            "concept_id": finding.concept_id,
            "side": finding.side,
            "zone": finding.zone,
            "size": round(float(finding.size), 4),
            "size_word": finding.size_word,
            "contrast": round(float(finding.contrast), 4),
            "is_faint": bool(finding.is_faint),
            "variant": finding.variant,
            "box": list(finding.box),
            "mask_runs": mask_to_runs(finding.mask),
        }


def write_png(path: Path, image: NDArray[np.uint16]) -> None:
    """A 16-bit grey PNG, 0.3 ms at 144 px.

    Row differences with Huffman codes only: a quarter of the time of OpenCV's own choice, and
    smaller, because noise has no repeats that level 1's search could find.

    Raises:  OSError if the file cannot be written.
    """
    encoded, data = cv2.imencode(".png", image, _PNG)
    if not encoded:
        raise OSError(f"{path}: the image could not be encoded as PNG")
    path.write_bytes(data.tobytes())


def _merge(partial: Path, settings: Phantom, mark: str, jobs: list[_Job]) -> None:
    parts = sorted((partial / "parts").iterdir())
    rows = []
    for part in parts:
        with part.open(encoding="utf-8") as lines:
            rows += [json.loads(line) for line in lines]
    if [row["image_id"] for row in rows] != [job.image_id for job in jobs]:
        raise RuntimeError(f"{len(rows)} of {len(jobs)} phantom studies were written")
    with (partial / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        manifest = csv.DictWriter(file, MANIFEST_COLUMNS, extrasaction="ignore")
        manifest.writeheader()
        manifest.writerows(rows)
    with (partial / "boxes.csv").open("w", newline="", encoding="utf-8") as file:
        boxes = csv.writer(file)
        boxes.writerow(BOX_COLUMNS)
        for row in rows:
            for finding in row["findings"]:
                boxes.writerow(
                    [row["image_id"], row["image"], "finding", finding["concept_id"]]
                    + [float(value) for value in finding["box"]]
                    + [finding["side"] or ""]
                )
    with (partial / "truth.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            kept = {k: row[k] for k in ("image_id", "image_px", "anatomy", "claims", "findings")}
            file.write(json.dumps(kept) + "\n")
    shutil.rmtree(partial / "parts")
    names = ("manifest.csv", "boxes.csv", "truth.jsonl")
    meta = {
        "kind": MARK,
        "fingerprint": mark,
        "settings": dataclasses.asdict(settings),
        "studies": len(rows),
        "sha256": {n: hashlib.sha256((partial / n).read_bytes()).hexdigest() for n in names},
    }
    (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
