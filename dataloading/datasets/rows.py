"""What every data set collects: rows, rules that left rows out, and where to get what is missing.

Splits are by patient, never by image. A data set without an official split gets one from a hash of
the patient id, so the same patient falls on the same side in every copy of the data.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import math
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlip.settings.config import ConfigError

MAX_LINE = 1 << 24
MAX_TABLE_BYTES = 2 << 30  # MIMIC-CXR's largest table is 200 MB unpacked
# header names of the column of ids in lists that go round
_ID_NAMES = frozenset({"id", "ID", "image_id", "patientId", "ImageId", "image_name"})
_IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "dcm", "dicom"})
# options of a data set whose publisher gives neither splits nor patients
PLACING: dict[str, tuple[str, str]] = {
    "split_lists": ("", "folder of train, validation and test .csv of ids; empty = by hash"),
    "patients": ("", "CSV image_id,patient_id of your own; empty = an image a patient"),
}


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
    sex: str = ""  # "F", "M" or "O", as demographics.py reads them
    age: str = ""  # whole years at the study, "90" for all over 89
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
    # (path, rule) of files that a rule left out, for --id-map alone: a path may name a patient
    left_out: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Dataset:
    """One entry of the table in datasets/__init__.py."""

    title: str
    licence: str
    access: str  # where its files come from and what that takes
    collect: Callable[[Path, dict[str, str]], Collected]  # of the root and the options below
    options: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # name: default, help
    keeps_ids: bool = True  # False where ids may be those of patients, not pseudonyms
    demographics: tuple[str, ...] = ()  # options that say where sex and age are; "none" = nowhere
    header_first: bool = False  # DICOM headers tell sex and age before its table does


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


def newest(root: Path, patterns: Iterable[str], example: str, access: str) -> Path:
    """The newest of the files in root whose names end in the day of their release."""
    found = [path for pattern in patterns for path in root.glob(pattern)]
    if not found:
        raise DatasetError(f"{root}: expected {example}. It is part of {access}")
    return max(found, key=lambda path: path.name)


def read_csv(path: Path, columns: list[str], access: str) -> Iterator[dict[str, str]]:
    """Rows of a CSV (also .gz) as text, stripped of blanks, names too; extra columns are kept.

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
    except UnicodeDecodeError:
        raise _no_text(path, access) from None
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        # of a damaged .gz it has none
        reason = getattr(error, "strerror", None) or "damaged; fetch the file again"
        raise DatasetError(f"{path}: cannot be read: {reason}") from None


def _no_text(path: Path, access: str) -> DatasetError:
    return DatasetError(f"{path}: is not UTF-8 text; expected the file of {access}")


def read_text(path: Path, access: str) -> str:
    """A text file of the data set, UTF-8 with or without its mark.

    Raises:  DatasetError naming the file where it is something else.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _no_text(path, access) from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None


def csv_lines(text: str, name: object) -> list[list[str]]:
    """The cells of each line, stripped.

    Raises:  DatasetError where a quoted cell does not end as one: it would hold all behind it.
    """
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error:
        raise DatasetError(f"{name}: a quoted cell does not end as one: mend the list") from None
    return [[cell.strip() for cell in cells] for cells in lines]


def numbers_of(cells: Iterable[str], what: str, path: Path) -> list[float]:
    """The cells of a table as finite numbers; `what` they are stands in the error.

    Raises:  DatasetError naming the file: no cell is quoted, it may be of another column.
    """
    try:
        numbers = [float(cell) for cell in cells]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise DatasetError(f"{path}: {what}: expected numbers in every row that has a box")
    return numbers


def label_states(row: dict[str, str], other: tuple[str, ...], where: Path) -> tuple[str, str, str]:
    """Names of the columns that hold 1, -1 and 0, each joined by "|"; blank = not mentioned.

    Raises:  DatasetError naming file `where` and label for any other value.
    """
    names: dict[float, list[str]] = {1.0: [], -1.0: [], 0.0: []}
    for name, value in row.items():
        if name not in other and value:
            try:
                names[float(value)].append(name)
            except (ValueError, KeyError):
                raise DatasetError(
                    f"{where}: label {name}: expected 1 (present), 0 (absent), -1 (uncertain) or "
                    "blank in every row; mend the file"
                ) from None
    return "|".join(names[1.0]), "|".join(names[-1.0]), "|".join(names[0.0])


def require_choice(options: Mapping[str, str], name: str, choices: tuple[str, ...]) -> None:
    """Raises ConfigError for a value of an option that is none of the choices."""
    if options[name] not in choices:
        named = " or ".join(filter(None, choices))  # one may be left out
        raise ConfigError(f"--option {name}={options[name]}: expected {named}, in small letters")


def _capped(stream: io.TextIOWrapper, path: Path) -> Iterator[str]:
    """Lines, refused past MAX_TABLE_BYTES: a .gz may hold far more than its size says.

    One longer than MAX_LINE comes in pieces, which are no rows of the table: their reader refuses.
    """
    total = 0
    while line := stream.readline(MAX_LINE):
        total += len(line)
        if total > MAX_TABLE_BYTES:
            raise DatasetError(f"{path}: unpacks to more than {MAX_TABLE_BYTES} bytes")
        yield line


def patient_share(patient_id: str, salt: str) -> float:
    """A number in [0, 1) that follows from the data set's salt and the patient id alone."""
    digest = hashlib.sha256(f"{salt}\0{patient_id}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2.0**56


def split_by_patient(patient_id: str, salt: str, val: float, test: float = 0.0) -> str:
    """train, val or test in the given shares of patients, by hash."""
    share = patient_share(patient_id, salt)
    return "test" if share < test else "val" if share < test + val else "train"


def keep_apart(rows: Iterable[Row], excluded: Counter[str]) -> list[Row]:
    """The rows without those whose patient is in test too, or in val and in train.

    Counted as patient_in_test and patient_in_val: an official split of studies may part a patient.
    """
    rows = list(rows)
    patients = {name: {r.patient_id for r in rows if r.split == name} for name in ("val", "test")}
    kept = []
    for row in rows:
        if row.split != "test" and row.patient_id in patients["test"]:
            excluded["patient_in_test"] += 1
        elif row.split == "train" and row.patient_id in patients["val"]:
            excluded["patient_in_val"] += 1
        else:
            kept.append(row)
    return kept


def _read_split_lists(folder: Path) -> tuple[dict[str, str], str]:
    """Image id -> split from published lists, and their joint SHA-256.

    A list is {train,validation,test}.csv or .txt, one id a line, in the column that its header
    names id, ID, image_id, patientId, ImageId or image_name, else in the first one.
    Raises:  DatasetError for a list that is missing, no UTF-8 or CSV, or shares an id with another.
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
        text = read_text(path, "the project that published it")
        digest.update(path.read_bytes())
        lines = csv_lines(text, path)
        header = lines[0] if lines else []
        # pandas writes the numbers of its rows in front
        place = next((i for i, cell in enumerate(header) if cell in _ID_NAMES), None)
        for cells in lines if place is None else lines[1:]:
            name = cells[place or 0] if len(cells) > (place or 0) else ""
            if not name:
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
    split_of, digest = _read_split_lists(Path(lists))
    note = f"split lists: {len(split_of)} ids, SHA-256 {digest}"

    def listed(image: str, patient: str) -> str:
        return split_of.get(image) or split_of.get(_bare(image), "")

    return listed, [note]


def _bare(image: str) -> str:
    """An image's id without the suffix of its file, if it has one: SIIM's ids hold dots."""
    stem, dot, suffix = image.rpartition(".")
    return stem if dot and suffix.lower() in _IMAGE_SUFFIXES else image


def _read_patients(option: str, images: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Image id -> patient id from a user's CSV, and a note of the images that it does not name.

    For data sets that publish no patient ids. Ids may leave out the suffix of the file's name, or
    have one that the data set leaves out.

    option  path of the CSV, columns image_id and patient_id; "" = none
    images  ids of the data set's images
    Raises:  DatasetError where it names none of them, gives one image two patients, or has a quoted
             cell that goes over lines.
    """
    if not option:
        return {}, []
    path = Path(option)
    patient_of: dict[str, str] = {}
    for row in read_csv(path, ["image_id", "patient_id"], "your own table of patients"):
        image, patient = _bare(row["image_id"]), row["patient_id"]
        if "\n" in image or "\n" in patient:
            raise DatasetError(f"{path}: a quoted cell does not end as one: mend the table")
        if patient and patient_of.setdefault(image, patient) != patient:
            raise DatasetError(f"{path}: one image_id has two patients: expected one row an image")
    found = {image: patient_of[_bare(image)] for image in images if _bare(image) in patient_of}
    if not found:
        raise DatasetError(
            f"{path}: names none of the {len(images)} images: expected image_id as the data set "
            "writes it"
        )
    note = f"patients of {len(found)} images from --option patients"
    if without := len(images) - len(found):
        note += f"; {without} images are not in it, each counts as a patient"
    return found, [note]


def place_images(
    options: Mapping[str, str], images: Collection[str], salt: str, val: float, test: float = 0.0
) -> tuple[Callable[[str], tuple[str, str]], list[str]]:
    """A function image id -> (patient id, split) by the options of PLACING, and notes.

    An image whose patient nobody names is its own.
    """
    patients, notes = _read_patients(options["patients"], images)
    split_of, lists = assign_split(options["split_lists"], salt, val, test)

    def place(image: str) -> tuple[str, str]:
        patient = patients.get(image, image)
        return patient, split_of(image, patient)

    return place, [*notes, *lists]


def leads_out(image: str) -> bool:
    """Whether a path may lead out of the root it is below, by its words alone."""
    parts = image.split("/")
    return image.startswith("/") or "\0" in image or ".." in parts or "" in parts


def is_list_text(cell: str) -> bool:
    """Whether a cell of names is a list as Python or JSON write it: PadChest's ['a', 'b']."""
    return cell.lstrip().startswith("[") and cell.rstrip().endswith("]")


def relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
