"""What every data set collects: rows, rules that left rows out, and where to get what is missing.

Splits are by patient, never by image. A data set without an official split gets one from a hash of
the patient id, so the same patient falls on the same side in every copy of the data.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_TABLE_BYTES = 2 << 30  # MIMIC-CXR's largest table is 200 MB unpacked
SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "dcm", "dicom"})
FRONTAL = frozenset({"PA", "AP", "FRONTAL"})


class DatasetError(ValueError):
    """A raw data set that is not as its publisher lays it out; says what is missing and whence."""

    exit_code = 3


@dataclass(slots=True)
class Row:
    """One image before it is prepared; texts are empty where the data set has none."""

    image: str  # path relative to the root, "/" between folders
    patient_id: str
    study_id: str
    image_id: str
    split: str  # "train", "val" or "test"
    view: str = ""
    report: str = ""
    labels: str = ""  # names of what is there, "|" between them
    uncertain: str = ""
    negative: str = ""
    boxes: str = ""  # JSON [[x, y, width, height, name], ...] in px of the source image
    mask: str = ""  # run lengths of datasets/rle.py, "|" between objects
    subset: str = ""  # name of a published list that holds the image
    sha256: str = ""  # of the source file, where its publisher states it


@dataclass
class Collected:
    """The rows of a data set and the account of what was left out."""

    rows: list[Row]
    excluded: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    files: dict[str, list[list[str]]] = field(default_factory=dict)  # further CSVs to write


@dataclass(frozen=True)
class Dataset:
    """One entry of the table in datasets/__init__.py."""

    title: str
    licence: str
    access: str  # where its files come from and what that takes
    collect: Any  # (root: Path, options: dict[str, str]) -> Collected
    options: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # name: default, help
    keeps_ids: bool = True  # False where ids may be those of patients, not pseudonyms


def require(path: Path, access: str, *, folder: bool = False) -> Path:
    """The path, or DatasetError naming it and where it comes from."""
    if not (path.is_dir() if folder else path.is_file()):
        raise DatasetError(
            f"{path}: no such {'folder' if folder else 'file'}. It is part of {access}"
        )
    return path


def first_of(root: Path, names: list[str], access: str) -> Path:
    """The first of several accepted names below root."""
    for name in names:
        if (root / name).exists():
            return root / name
    raise DatasetError(f"{root}: expected {' or '.join(names)}. It is part of {access}")


def read_csv(path: Path, columns: list[str], access: str) -> Iterator[dict[str, str]]:
    """Rows of a CSV (also .gz) as text, header names stripped of blanks; extra columns are kept.

    Raises:  DatasetError naming every missing column, or the line of a ragged row.
    """
    try:
        with open(path, "rb") as raw:
            packed = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else None
            stream = io.TextIOWrapper(packed or raw, encoding="utf-8-sig", newline="")
            reader = csv.reader(_capped(stream, path))
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in columns if name not in header]
            if missing:
                raise DatasetError(
                    f"{path}: missing columns {', '.join(missing)}; expected the file of {access}"
                )
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DatasetError(
                        f"{path}: line {reader.line_num} has {len(cells)} cells, the header "
                        f"{len(header)}: fetch the file again"
                    )
                yield dict(zip(header, (cell.strip() for cell in cells), strict=True))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: cannot be read ({type(error).__name__})") from None


def _capped(stream: io.TextIOWrapper, path: Path) -> Iterator[str]:
    """Lines, refused past MAX_TABLE_BYTES: a .gz may hold far more than its size says."""
    total = 0
    for line in stream:
        total += len(line)
        if total > MAX_TABLE_BYTES:
            raise DatasetError(f"{path}: unpacks to more than {MAX_TABLE_BYTES} bytes")
        yield line


def patient_share(patient_id: str, salt: str) -> float:
    """A number in [0, 1) that follows from the patient id alone."""
    digest = hashlib.sha256(f"{salt}\0{patient_id}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56


def split_by_patient(patient_id: str, salt: str, val: float, test: float = 0.0) -> str:
    """train, val or test in the given shares of patients, by hash."""
    share = patient_share(patient_id, salt)
    return "test" if share < test else "val" if share < test + val else "train"


def read_split_lists(folder: Path) -> tuple[dict[str, str], str]:
    """Image id -> split from published lists, and their joint SHA-256.

    A list is {train,validation,test}.csv or .txt, one id a line, in the first column; a header
    line named id, ID, image_id, patientId, ImageId or image_name is skipped.
    """
    split_of: dict[str, str] = {}
    digest = hashlib.sha256()
    for split, names in (
        ("train", ("train",)),
        ("val", ("validation", "valid", "val")),
        ("test", ("test",)),
    ):
        paths = [folder / f"{n}{suffix}" for n in names for suffix in (".csv", ".txt")]
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            raise DatasetError(f"{folder}: expected split lists train, validation and test")
        content = path.read_bytes()
        digest.update(content)
        for cells in csv.reader(io.StringIO(content.decode("utf-8-sig"))):
            name = cells[0].strip() if cells else ""
            if not name or name in ("id", "ID", "image_id", "patientId", "ImageId", "image_name"):
                continue
            if split_of.setdefault(name, split) != split:
                raise DatasetError(f"{folder}: an id stands in two of the lists")
    return split_of, digest.hexdigest()


def assign_split(
    lists: str, salt: str, val: float, test: float = 0.0
) -> tuple[Callable[[str, str], str], list[str]]:
    """A function (image id, patient id) -> split, and notes: from lists, or by hash of the patient.

    Lists may leave out the suffix of a file's name. An id that stands in no list has split "".
    """
    if not lists:
        return lambda image, patient: split_by_patient(patient, salt, val, test), []
    split_of, digest = read_split_lists(Path(lists))
    note = f"split lists: {len(split_of)} ids, SHA-256 {digest}"

    def listed(image: str, patient: str) -> str:
        stem, dot, suffix = image.rpartition(".")
        bare = stem if dot and suffix.lower() in _IMAGE_SUFFIXES else image
        return split_of.get(image) or split_of.get(bare, "")

    return listed, [note]


def read_patients(path: Path) -> dict[str, str]:
    """image_id -> patient_id from a user's CSV, for data sets that publish no patient ids."""
    rows = read_csv(path, ["image_id", "patient_id"], "your own table of patients")
    return {row["image_id"]: row["patient_id"] for row in rows}


def relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
