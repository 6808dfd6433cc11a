"""ReXGradient-160K: studies of 109,487 patients of three US health systems, reports in sections.

Licence: ReXGradient-160K Non-Commercial Data Access and Use Agreement. Access: accepted terms,
https://huggingface.co/datasets/rajpurkarlab/ReXGradient-160K. Source: Zhang et al. 2025 (arXiv
2505.00228). Its table has a row a study and names no image: read is the JSON of each split beside
it, one entry a study with lists of images and views. Images are a quarter of their original width
and height. There are no labels; sex and age (007Y, 002D) are of the DICOM headers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlip.dataloading.datasets.json_file import read_json
from mlip.dataloading.datasets.rows import (
    Collected,
    Dataset,
    DatasetError,
    Row,
    first_of,
    keep_apart,
    relative,
    require_choice,
)
from mlip.dataloading.datasets.sections import cell_text, joined_sections
from mlip.dataloading.demographics import PatientCells
from mlip.dataloading.view_position import is_frontal, projection

ACCESS = (
    "ReXGradient-160K, https://huggingface.co/datasets/rajpurkarlab/ReXGradient-160K (accepted "
    "terms)"
)
_SPLITS = {"train": "train", "valid": "val", "test": "test"}
_IMAGES = "deid_png"
_PLACES = ("", "metadata/", "download/metadata/")
_IDS = ("PatientID", "StudyInstanceUid")
_EXPECTED = (
    "an object with an entry a study: PatientID, StudyInstanceUid, ImagePath and ImageViewPosition "
    "(lists), Findings and Impression"
)


def collect(root: Path, options: dict[str, str]) -> Collected:
    """Official splits. An image of the asked views is a row, with the report of its study."""
    require_choice(options, "views", ("frontal", "frontal_or_unstated", "all"))
    images = _images(root)
    paths = {name: _metadata(root, name) for name in _SPLITS}
    cells = PatientCells()
    excluded: Counter[str] = Counter()
    rows: list[Row] = []
    seen: set[str] = set()
    studies = empty = unaligned = 0
    for name, split in _SPLITS.items():
        for study in _studies(paths[name]):
            studies += 1
            report = joined_sections(study.get("Impression"), study.get("Findings"))
            empty += not report
            sex = cells.sex(cell_text(study.get("PatientSex")))
            age = cells.age(cell_text(study.get("PatientAge")))
            listed, views = study["ImagePath"], study.get("ImageViewPosition")
            if not isinstance(views, list) or len(views) != len(listed):
                unaligned += bool(views)
                views = [None] * len(listed)
            if not listed:
                excluded["study_without_image"] += 1
            for image, stated in zip(listed, views, strict=True):
                view = cell_text(stated)
                if reason := _reason(view, options["views"]):
                    excluded[reason] += 1
                    continue
                path = f"{images}/{_below(image, paths[name])}"
                image_id = path.rpartition("/")[2].removesuffix(".png")
                if image_id in seen:
                    excluded["repeated_image"] += 1
                    continue
                seen.add(image_id)
                if not (root / path).is_file():
                    excluded["listed_but_not_there"] += 1
                    continue
                rows.append(
                    Row(
                        image=path,
                        patient_id=study["PatientID"],
                        study_id=study["StudyInstanceUid"],
                        image_id=image_id,
                        split=split,
                        view=view,
                        sex=sex,
                        age=age,
                        report=report,
                    )
                )
    notes = [f"{studies} studies, {empty} of them without impression and findings"]
    if unaligned:
        notes.append(
            f"{unaligned} studies have more or fewer views than images: theirs count as not stated"
        )
    return Collected(keep_apart(rows, excluded), excluded, notes + cells.notes())


def _reason(view: str, wanted: str) -> str | None:
    """Why an image of this view is left out. 16 of 100 state none; most of those are frontal."""
    if wanted == "all" or is_frontal(view):
        return None
    if projection(view):
        return "view_not_frontal"
    return "view_not_stated" if wanted == "frontal" else None


def _metadata(root: Path, name: str) -> Path:
    # the file without views came first: of its images none is stated to be frontal
    files = [f"{name}_metadata_view_position.json", f"{name}_metadata.json"]
    return first_of(root, [f"{place}{file}" for file in files for place in _PLACES], ACCESS)


def _images(root: Path) -> str:
    """The folder of images, below the root."""
    for place in ("", "images/", "download/"):
        if (root / place / _IMAGES).is_dir():
            return relative(root / place / _IMAGES, root)
    hint = ""
    if any(next(folder.glob(f"{_IMAGES}.part*"), None) for folder in (root, root / "download")):
        hint = f". Join its parts: cat {_IMAGES}.part* > {_IMAGES}.tar, then tar -xf {_IMAGES}.tar"
    raise DatasetError(f"{root}: expected {_IMAGES}/ with the images. It is part of {ACCESS}{hint}")


def _studies(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of one split.

    Raises:  DatasetError naming the file, by an entry's place where it lacks what a row needs.
    """
    entries = read_json(path, _EXPECTED, ACCESS)
    if not isinstance(entries, dict) or not entries:
        raise DatasetError(f"{path}: expected {_EXPECTED}; fetch the file again")
    for number, study in enumerate(entries.values(), start=1):
        is_whole = (
            isinstance(study, dict)
            and all(study.get(k) and isinstance(study[k], str) for k in _IDS)
            and isinstance(study.get("ImagePath"), list)
            and all(isinstance(image, str) for image in study["ImagePath"])
        )
        if not is_whole:
            raise DatasetError(
                f"{path}: entry {number}: expected PatientID and StudyInstanceUid as texts and "
                "ImagePath as a list of texts; fetch the file again"
            )
        yield study


def _below(image: str, path: Path) -> str:
    """../deid_png/PATIENT/ACCESSION/studies/... without what stands before the patient."""
    before, separator, below = image.partition(f"{_IMAGES}/")
    if not separator or before not in ("", "../", "./"):
        raise DatasetError(
            f"{path}: ImagePath: expected ../{_IMAGES}/<patient>/<accession>/studies/... in every "
            "study"
        )
    return below


DATASET = Dataset(
    title="ReXGradient-160K",
    licence="ReXGradient-160K Non-Commercial Data Access and Use Agreement",
    access=ACCESS,
    collect=collect,
    options={
        "views": (
            "frontal",
            "frontal, frontal_or_unstated (those whose view nobody states too), or all",
        ),
    },
)
