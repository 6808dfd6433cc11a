"""`folder`: any tree of DICOM, JPEG and PNG files, with reports as .txt files beside them.

Licence and access: whatever the user's own data stand under.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from mlip.dataloading.datasets.rows import (
    Collected,
    Dataset,
    DatasetError,
    Row,
    relative,
    split_by_patient,
)
from mlip.dataloading.dicom import DicomError, read_identity
from mlip.dataloading.image_file import PNG_SIGNATURE

_MAX_REPORT_BYTES = 1 << 20
_ARCHIVES = (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"7z\xbc\xaf\x27\x1c", b"Rar!")


def collect(root: Path, options: dict[str, str]) -> Collected:
    """One row a recognised image file, in the order of paths.

    Patient and study: of a DICOM file its own ids; of others the folder named by `patient_level`,
    counted from the root. Report: <image>.txt, <stem>.txt or <study folder>.txt.
    """
    level = int(options["patient_level"]) if options["patient_level"].isdigit() else 0
    if level < 1:
        raise DatasetError("option patient_level: expected a folder level of 1 or more")
    # a file that states no modality may be a radiograph: it stays
    modalities = {"", *options["modalities"].upper().replace(" ", "").split(",")}
    excluded: Counter[str] = Counter()
    rows: list[Row] = []
    seen: set[str] = set()
    for path in _files(root, excluded):
        kind = _kind(path)
        if kind is None or kind == "archive":
            excluded[kind or ("no_image" if path.suffix != ".txt" else "report_text")] += 1
            continue
        name = relative(path, root)
        parts = name.split("/")
        patient = parts[level - 1] if len(parts) > level else path.stem
        study, image = "/".join(parts[:-1]) or path.stem, name
        if kind == "dicom":
            try:
                identity = read_identity(path)
            except DicomError as error:
                excluded[error.code] += 1
                continue
            if identity.modality.upper() not in modalities:
                excluded[f"modality_{_word(identity.modality)}"] += 1
                continue
            patient = identity.patient or patient
            study, image = identity.study or study, identity.image or image
            if image in seen:
                excluded["duplicate_image"] += 1
                continue
            seen.add(image)
        rows.append(
            Row(
                image=name,
                patient_id=patient,
                study_id=study,
                image_id=image,
                split=split_by_patient(patient, "folder", 0.1, 0.1),
                report=_report(path),
            )
        )
    if not rows:
        left_out = ", ".join(f"{rule} {count}" for rule, count in sorted(excluded.items()))
        raise DatasetError(
            f"{root}: no DICOM, JPEG or PNG file below it that can be taken (left out: "
            f"{left_out or 'nothing, it is empty'})"
            + (": unpack the archives first" if excluded["archive"] else "")
        )
    return Collected(rows, excluded, keeps_ids=False)


def _files(root: Path, excluded: Counter[str]) -> list[Path]:
    """Regular files below root; links, pipes and devices are counted and left alone."""
    found = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if not n.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if name.startswith("."):
                continue
            if path.is_symlink() or not path.is_file():
                excluded["link_or_special_file"] += 1
            else:
                found.append(path)
    return found


def _kind(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            head = file.read(262)
    except OSError:
        return None
    if head[128:132] == b"DICM":
        return "dicom"
    if head.startswith(_ARCHIVES) or head[257:262] == b"ustar":
        return "archive"
    return "picture" if head.startswith((PNG_SIGNATURE, b"\xff\xd8\xff")) else None


def _word(text: str) -> str:
    """A modality fit for a message; anything that is no code of the standard is not shown."""
    return text.lower() if text.isalpha() and text.isascii() and len(text) <= 4 else "other"


def _report(path: Path) -> str:
    for text in (
        path.with_name(path.name + ".txt"),
        path.with_suffix(".txt"),
        path.parent.with_name(path.parent.name + ".txt"),
    ):
        if text.is_file() and not text.is_symlink() and text.stat().st_size <= _MAX_REPORT_BYTES:
            return text.read_text(encoding="utf-8", errors="replace").strip()
    return ""


DATASET = Dataset(
    title="a folder of your own",
    licence="your own",
    access="you: DICOM, JPEG or PNG files in any tree, reports as .txt beside them",
    collect=collect,
    options={
        "patient_level": ("1", "folder level that names the patient of files that are no DICOM"),
        "modalities": (
            "CR,DX,DR,RG,XR,OT",
            "DICOM modalities to take; files that state none are taken too",
        ),
    },
)
