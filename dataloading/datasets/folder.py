"""`folder`: any tree of DICOM, JPEG and PNG files; reports as .txt beside them or in a table.

Licence and access: whatever the user's own data stand under.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from mlip.dataloading.datasets.rows import (
    Collected,
    Dataset,
    DatasetError,
    Row,
    relative,
    require_choice,
    split_by_patient,
)
from mlip.dataloading.datasets.study_reports import DEMOGRAPHICS, StudyReports
from mlip.dataloading.datasets.study_reports import OPTIONS as STUDY_REPORTS
from mlip.dataloading.dicom.radiograph import SUFFIXES, DicomError, Identity, read_identity
from mlip.dataloading.images.image_file import PNG_SIGNATURE
from mlip.dataloading.ledger import listed
from mlip.dataloading.name_forms import as_utf8, by_composed, composed
from mlip.dataloading.progress import Progress
from mlip.dataloading.view_position import FRONTAL, projection
from mlip.settings.config import ConfigError

_MAX_REPORT_BYTES = 1 << 20
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and its kinds below it, PS3.4 B.5
_KEEPABLE = ("burned_in", "secondary_capture")
_TEXT = (".txt", ".TXT")
# the first attribute of a data set without preamble: its group and length, or one of group 8
_GROUP_2_OR_8 = (b"\x02\0\0\0", b"\x08\0\0\0", b"\x08\0\x05\0", b"\x08\0\x08\0", b"\x08\0\x16\0")
_ARCHIVES = (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"7z\xbc\xaf\x27\x1c", b"Rar!")

_Image = tuple[Path, Identity | None]  # a file and what its header says, of a picture nothing


@dataclass(frozen=True)
class _Rules:
    """What the options say of the files to take."""

    level: int  # folder level that names a patient
    kept: set[str]  # rules of _KEEPABLE that leave nothing out
    modalities: set[str]
    frontal: bool  # frontal views alone

    @classmethod
    def of(cls, options: dict[str, str]) -> _Rules:
        level = int(options["patient_level"]) if options["patient_level"].isdecimal() else 0
        if level < 1:
            raise ConfigError("--option patient_level: expected a folder level of 1 or more")
        kept = {word.strip() for word in options["keep"].split(",")} - {""}
        if not kept <= set(_KEEPABLE):
            raise ConfigError(
                f"--option keep: expected some of {', '.join(_KEEPABLE)}, commas between"
            )
        require_choice(options, "views", ("frontal", "all"))
        # a file that states no modality may be a radiograph: it stays
        modalities = {"", *options["modalities"].upper().replace(" ", "").split(",")}
        return cls(level, kept, modalities, options["views"] == "frontal")


@dataclass
class _Sorted:
    """The files below the root that no rule left out."""

    images: list[_Image] = field(default_factory=list)
    texts: set[Path] = field(default_factory=set)
    viewless: int = 0  # taken as frontal ones


def collect(root: Path, options: dict[str, str]) -> Collected:
    """One row an image, in the order of paths; of several copies of one the largest is taken.

    Patient and study: of a DICOM file its own ids; of others the folder of `patient_level`, counted
    from the root, and the image's folder. Report: <image>.txt, <stem>.txt or <image's folder>.txt,
    UTF-8 or marked UTF-16; with option reports, of the table's row of the DICOM study.
    """
    table = StudyReports(options) if options["reports"] else None
    unsaid = {
        name: (default, "none" if name in DEMOGRAPHICS else default)
        for name, (default, _) in STUDY_REPORTS.items()
    }
    if table is None and (given := [n for n in unsaid if options[n] not in unsaid[n]]):
        raise ConfigError(
            f"--option {given[0]} says something of a table: give --option reports too"
        )
    rules = _Rules.of(options)
    left_out: list[tuple[str, str]] = []

    def leave(path: Path, rule: str) -> None:
        left_out.append((as_utf8(relative(path, root)), rule))

    files = _files(root, leave)
    taken = _sort(files, root, rules, leave)
    groups = _copies(taken.images, leave)
    there = {str(path): path for path in files if path.suffix in _TEXT} if table is None else {}
    in_form = by_composed(there)
    rows: list[Row] = []
    identities: list[Identity | None] = []
    used: set[Path] = set()
    told = Progress("images joined with reports")
    for place, copies in enumerate(groups):
        told(place, len(groups))
        row = _row(*copies[0], root, rules.level)
        for copy, _ in copies[1:]:
            leave(copy, "duplicate_image")
        beside = (_text_beside(copy, root, there, in_form) for copy, _ in copies)
        if text := next(filter(None, beside), None):
            used.add(text)
            row.report, fault = _read_text(text)
            if fault:
                leave(copies[0][0], fault)
                continue
        rows.append(row)
        identities.append(copies[0][1])
    notes = []
    for text in sorted(taken.texts - used):  # a report that an image has is taken, not left out
        leave(text, "report_text")
    if table is not None:
        rows, unfit = table.join(rows, identities)
        left_out += unfit
        notes = table.account(Counter(rule for _, rule in unfit))
    excluded = Counter(rule for _, rule in left_out)
    if not rows:
        raise DatasetError(
            f"{root}: no DICOM, JPEG or PNG file below it that can be taken (left out: "
            f"{listed(excluded) or 'nothing, it is empty'})"
            + (": unpack the archives first" if excluded["archive"] else "")
            + ("; see --option keep" if any(excluded[rule] for rule in _KEEPABLE) else "")
        )
    if nameless := sum(known is not None and not known.patient for (_, known), *_ in groups):
        notes.append(
            f"{nameless} DICOM files state no patient: the folder of --option patient_level, or "
            "the file's name, stands for it"
        )
    if taken.viewless:
        notes.append(
            f"{taken.viewless} DICOM files state no view, or a frontal and a lateral one: they "
            "are taken as frontal ones"
        )
    if count := len(taken.texts - used):
        why = "belong to no image" if table is None else "are not read: the table has the reports"
        notes.append(f"{count} of the .txt files {why}")
    return Collected(rows, excluded, notes, left_out=left_out)


def _sort(
    files: list[Path], root: Path, rules: _Rules, leave: Callable[[Path, str], None]
) -> _Sorted:
    """The files by kind; each other one is left by the first rule that it meets."""
    found = _Sorted()
    told = Progress("files looked at")
    for place, path in enumerate(files):
        told(place, len(files))
        if not _is_unicode(as_utf8(relative(path, root))):
            leave(path, "name_not_utf8")
            continue
        kind = _kind(path)
        identity = None
        if kind == "dicom":
            try:
                identity = read_identity(path)
                kind = _left_out(identity, rules) or kind
            except DicomError as error:
                kind = error.code
        if kind == "report_text":
            found.texts.add(path)
        elif kind in ("dicom", "picture"):
            found.images.append((path, identity))
            is_viewless = identity is not None and not projection(identity.view)
            found.viewless += rules.frontal and is_viewless
        else:
            leave(path, kind)
    return found


def _row(path: Path, identity: Identity | None, root: Path, level: int) -> Row:
    """The row of an image, without its report."""
    name = as_utf8(relative(path, root))
    *folders, _ = name.split("/")
    stem = as_utf8(path.stem)
    patient = folders[level - 1] if len(folders) >= level else stem
    study, image = "/".join(folders) or stem, name
    if identity is not None:
        patient = identity.patient or patient
        study, image = identity.study or study, identity.image or image
    patient = composed(patient)  # one patient's folders of two systems
    return Row(
        image=name,
        patient_id=patient,
        study_id=study,
        image_id=image,
        split=split_by_patient(patient, "folder", 0.1, 0.1),
    )


def _files(root: Path, leave: Callable[[Path, str], None]) -> list[Path]:
    """Regular files below root; what is not looked into is counted and left alone."""

    def leave_folder(error: OSError) -> None:
        leave(Path(error.filename), "unreadable_folder")

    found: list[Path] = []
    told = Progress("files found")
    for folder, names, files in os.walk(root, onerror=leave_folder):
        told(len(found))
        for name in names:
            # os.walk does not follow a link to a folder, and does not say so
            if Path(folder, name).is_symlink():
                leave(Path(folder, name), "link_or_special_file")
            if name.startswith("."):
                leave(Path(folder, name), "hidden")
        names[:] = sorted(n for n in names if not n.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if name.startswith("."):
                leave(path, "hidden")
            elif path.is_symlink() or not path.is_file():
                leave(path, "link_or_special_file")
            else:
                found.append(path)
    return found


def _is_unicode(name: str) -> bool:
    """Whether a name's bytes were UTF-8: no table of ours could hold another one."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(path: Path) -> str:
    """dicom or picture, else the rule that leaves the file out."""
    suffix = path.suffix.lower()
    try:
        with open(path, "rb") as file:
            head = file.read(262)
    except OSError:
        return "unreadable_file"
    if head[128:132] == b"DICM":
        return "dicom" if path.name.upper() != "DICOMDIR" else "dicomdir"
    if head.startswith(_ARCHIVES) or head[257:262] == b"ustar":
        return "archive"
    if head.startswith((PNG_SIGNATURE, b"\xff\xd8\xff")):
        return "picture"
    if suffix == ".txt":
        return "report_text"
    if not head:
        return "empty_file"
    # an old archive's files without preamble: said apart, they may be the whole export
    is_bare = head.startswith(_GROUP_2_OR_8)
    return "not_dicom" if suffix in SUFFIXES or is_bare else "no_image"


def _left_out(identity: Identity, rules: _Rules) -> str:
    """The rule that leaves a DICOM file out by its header, "" for none.

    A scanned requisition or a screenshot lies in the study of its film and would get its report.
    Films are stored as secondary captures too, by public sets for one, with a modality of theirs.
    """
    modality = identity.modality.upper()
    if modality not in rules.modalities:
        return f"modality_{_word(modality)}"
    if identity.burned_in.upper() == "YES" and "burned_in" not in rules.kept:
        return "burned_in"
    is_capture = f"{identity.sop_class}.".startswith(f"{_SECONDARY_CAPTURE}.")
    if is_capture and modality == "OT" and "secondary_capture" not in rules.kept:
        return "secondary_capture"
    if rules.frontal and projection(identity.view) not in ("", *FRONTAL):
        return "view_not_frontal"
    return ""


def _copies(files: list[_Image], leave: Callable[[Path, str], None]) -> list[list[_Image]]:
    """The files of each image, largest first: a copy that was cut off is smaller than a whole one.

    DICOM files of one SOPInstanceUID are one image, every other file is one of its own. Where they
    name several patients a header is wrong, and nobody can tell which: all are left out, counted.
    A copy that names none is of the one that the others name.
    """
    groups: dict[str | Path, list[_Image]] = {}
    for path, identity in files:
        uid = identity.image if identity is not None else ""
        groups.setdefault(uid or path, []).append((path, identity))
    found = []
    for group in groups.values():
        patients = {identity.patient for _, identity in group if identity is not None} - {""}
        if len(patients) > 1:
            for path, _ in group:
                leave(path, "image_of_several_patients")
            continue
        for patient in patients:
            group = [(path, known and replace(known, patient=patient)) for path, known in group]
        if len(group) > 1:
            group.sort(key=lambda copy: -copy[0].stat().st_size)
        found.append(group)
    return found


def _word(text: str) -> str:
    """A modality fit for a message; anything that is no code of the standard is not shown."""
    return text.lower() if text.isalpha() and text.isascii() and len(text) <= 4 else "other"


def _text_beside(
    path: Path, root: Path, there: dict[str, Path], in_form: dict[str, list[str]]
) -> Path | None:
    """The report's file among those that are there: to ask the disk for six names of each image
    takes longer than all else.

    in_form  names in two forms of Unicode: an image's and its report's may be of two systems
    """
    if not there:
        return None
    stems = [path, path.with_suffix("")]
    # the root's own neighbours are no part of the data set
    stems += [path.parent] if path.parent != root else []
    for stem in stems:
        for suffix in _TEXT:
            text = str(stem.with_name(stem.name + suffix))
            if text in there:
                return there[text]
            if len(others := in_form.get(composed(text), [])) == 1:
                return there[others[0]]
    return None


def _read_text(path: Path) -> tuple[str, str]:
    """The report, or the rule that leaves its image out: a garbled text would be learnt from."""
    try:
        if path.stat().st_size > _MAX_REPORT_BYTES:
            return "", "report_too_large"
        content = path.read_bytes()
    except OSError:
        return "", "report_unreadable"
    marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError:
        return "", "report_not_utf8"
    return (text.strip(), "") if "\0" not in text else ("", "report_not_utf8")


DATASET = Dataset(
    title="a folder of your own",
    licence="your own",
    access="you: DICOM, JPEG or PNG files in any tree, reports as .txt beside them or in a table",
    collect=collect,
    keeps_ids=False,
    demographics=DEMOGRAPHICS,
    header_first=True,
    options={
        "patient_level": ("1", "folder level that names the patient of files that are no DICOM"),
        "modalities": (
            "CR,DX,DR,RG,XR,OT",
            "DICOM modalities to take; files that state none are taken too",
        ),
        "views": ("all", "all, or frontal: PA, AP and DICOM files that state no view"),
        "keep": (
            "",
            "take DICOM files that these rules leave out, commas between: burned_in "
            "(BurnedInAnnotation is YES), secondary_capture (one of modality OT)",
        ),
        **STUDY_REPORTS,
    },
)
