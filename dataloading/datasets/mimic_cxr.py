"""MIMIC-CXR and MIMIC-CXR-JPG as PhysioNet lays them out, reports cut into sections here.

Licence: PhysioNet Credentialed Health Data License 1.5.0. Access: credentialed account, CITI
course, signed agreement; https://physionet.org/content/mimic-cxr-jpg/ (images, metadata, split,
labels) and https://physionet.org/content/mimic-cxr/ (DICOM, mimic-cxr-reports.zip). Its tables have
neither sex nor age: those come from MIMIC-IV, with the StudyDate (YYYYMMDD) of its metadata.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mlip.dataloading.datasets.mimic_iv import Patients
from mlip.dataloading.datasets.ms_cxr import read_boxes
from mlip.dataloading.datasets.rows import (
    Collected,
    Dataset,
    DatasetError,
    Row,
    first_of,
    label_states,
    read_csv,
    require_choice,
)
from mlip.dataloading.datasets.sections import joined_report
from mlip.dataloading.splits import SPLIT_OF
from mlip.dataloading.view_position import is_frontal

ACCESS = (
    "MIMIC-CXR-JPG, https://physionet.org/content/mimic-cxr-jpg/ (credentialed account and signed "
    "agreement); reports: mimic-cxr-reports.zip of https://physionet.org/content/mimic-cxr/"
)
_MAX_REPORT_BYTES = 1 << 20

# A section opens with a line of capitals that ends in a colon.
_HEADER = re.compile(r"(?:^|\n)[ ]{0,8}([A-Z][A-Z ()/,&'-]{2,60}):(?=\s|$)")
_VIEW_HEADER = re.compile(
    r"^(?:chest|portable|ap|pa|single|two|frontal|views?|radiograph|exam)\b", re.IGNORECASE
)
_MISSPELT = {
    "impresson": "impression",
    "imression": "impression",
    "impresion": "impression",
    "impressoin": "impression",
    "finidngs": "findings",
    "findngs": "findings",
    "finding": "findings",
    "conclusion": "impression",
    "conclusions": "impression",
    "wet read": "impression",
}


def report_sections(text: str) -> dict[str, str]:
    """findings, impression, comparison and last_paragraph of one report, "" where absent.

    A header is a line of capitals before a colon. Misspelt and combined headers count as what they
    mean, a header that names the view ("CHEST, PA AND LATERAL:") opens findings, and of a repeated
    section the last one is taken. Without findings and impression, last_paragraph is what follows
    the last blank line of the last section.
    Source:  the published rules of MIT-LCP/mimic-cxr, written anew; its list of 54 hand-corrected
             studies is not reproduced.
    """
    found: list[tuple[str, str]] = []
    name, start = "preamble", 0
    for match in _HEADER.finditer(text):
        found.append((name, text[start : match.start()].strip()))
        name, start = _canonical(match.group(1)), match.end()
    found.append((name, text[start:].strip()))
    sections = dict.fromkeys(("findings", "impression", "comparison", "last_paragraph"), "")
    for section, body in found:
        if section in sections and body:
            sections[section] = " ".join(body.split())
    if not sections["findings"] and not sections["impression"]:
        bodies = [body for section, body in found if body and section != "comparison"]
        if bodies:
            paragraph = re.split(r"\n[ \t]*\n", bodies[-1])[-1]
            sections["last_paragraph"] = " ".join(paragraph.split())
    return sections


def _canonical(header: str) -> str:
    name = " ".join(header.lower().split())
    if name in _MISSPELT:
        return _MISSPELT[name]
    for section in ("impression", "findings", "history", "comparison", "addendum"):
        if section in name:
            return section
    return "findings" if _VIEW_HEADER.match(name) else name


def collect(root: Path, options: dict[str, str]) -> Collected:
    """One row an image, official split, views as asked; a study without a report keeps its rows."""
    require_choice(options, "files", ("jpg", "dcm"))
    require_choice(options, "views", ("frontal", "all"))
    base = _base(root)
    names = {
        kind: first_of(
            base, [f"mimic-cxr-2.0.0-{kind}.csv.gz", f"mimic-cxr-2.0.0-{kind}.csv"], ACCESS
        )
        for kind in ("metadata", "split")
    }
    split_of = {
        row["dicom_id"]: SPLIT_OF.get(row["split"], "")
        for row in read_csv(names["split"], ["dicom_id", "study_id", "split"], ACCESS)
    }
    labels = _labels(base)
    boxes_of = read_boxes(options["ms_cxr"])
    columns = ["dicom_id", "subject_id", "study_id", "ViewPosition"]
    patients = _patients(options["patients"], names["metadata"])
    boxed = {  # image -> patient
        row["dicom_id"]: row["subject_id"]
        for row in (read_csv(names["metadata"], columns, ACCESS) if boxes_of else ())
        if row["dicom_id"] in boxes_of
    }
    if options["ms_cxr"] and not boxed:  # its images would be trained on
        raise DatasetError(
            f"{options['ms_cxr']}: names no image of {names['metadata']}: expected dicom_id as "
            "MIMIC-CXR writes it"
        )
    boxed_patients = set(boxed.values())
    suffix = options["files"]
    text_of = _reports(root, base, options["reports"])
    excluded: Counter[str] = Counter()
    rows: list[Row] = []
    sections_of: dict[str, dict[str, str]] = {}
    for row in read_csv(names["metadata"], columns, ACCESS):
        subject, study, view = row["subject_id"], row["study_id"], row["ViewPosition"].upper()
        is_boxed = row["dicom_id"] in boxed
        split = "test" if is_boxed else split_of.get(row["dicom_id"], "")
        if not split:
            excluded["not_in_split_file"] += 1
            continue
        if options["views"] == "frontal" and not is_frontal(view):
            excluded["view_not_frontal"] += 1
            continue
        if split != "test" and subject in boxed_patients:
            excluded["other_image_of_ms_cxr_patient"] += 1
            continue
        folder = f"files/p{subject[:2]}/p{subject}/s{study}"
        if study not in sections_of:
            sections_of[study] = report_sections(text_of(f"{folder}.txt"))
        said = sections_of[study]
        positive, uncertain, negative = labels.get(study, ("", "", ""))
        sex, age = patients.sex_and_age(subject, row.get("StudyDate", ""))
        rows.append(
            Row(
                image=f"{_prefix(base, root)}{folder}/{row['dicom_id']}.{suffix}",
                patient_id=subject,
                study_id=study,
                image_id=row["dicom_id"],
                split=split,
                view=view,
                sex=sex,
                age=age,
                report=joined_report(said["impression"], said["findings"])
                or said["last_paragraph"],
                labels=positive,
                uncertain=uncertain,
                negative=negative,
                boxes=json.dumps(boxes_of[row["dicom_id"]]) if is_boxed else "",
                subset="ms_cxr" if is_boxed else "",
            )
        )
    empty = sum(not any(sections.values()) for sections in sections_of.values())
    header = ["study", "impression", "findings", "last_paragraph", "comparison"]
    table = [header] + [
        [f"s{study}", *(sections[name] for name in header[1:])]
        for study, sections in sections_of.items()
    ]
    notes = [f"{len(sections_of)} studies, {empty} of them without any usable report text"]
    if boxes_of:
        notes.append(
            f"MS-CXR: boxes of {len(boxed)} images, which are test (subset ms_cxr); "
            f"{len(boxes_of) - len(boxed)} others of its list are not in the metadata"
        )
    if not labels:
        notes.append("no mimic-cxr-2.0.0-chexpert.csv(.gz) beside the metadata: no labels")
    notes += patients.notes()
    return Collected(rows, excluded, notes, {"mimic_cxr_sectioned.csv": table})


def _patients(option: str, metadata: Path) -> Patients:
    if option in ("", "none"):
        return Patients("", ())
    table = read_csv(metadata, ["subject_id", "StudyDate"], ACCESS)
    return Patients(option, {row["subject_id"] for row in table})


def _base(root: Path) -> Path:
    """The folder that holds the tables: the root or PhysioNet's own folders below it."""
    below = sorted(root.glob("physionet.org/files/mimic-cxr-jpg/*"), reverse=True)
    for folder in [root, *below, *sorted(root.glob("mimic-cxr-jpg/*"), reverse=True)]:
        if list(folder.glob("mimic-cxr-2.0.0-metadata.csv*")):
            return folder
    raise DatasetError(
        f"{root}: no mimic-cxr-2.0.0-metadata.csv(.gz) here, nor below "
        f"physionet.org/files/mimic-cxr-jpg/. It is part of {ACCESS}"
    )


def _prefix(base: Path, root: Path) -> str:
    return "" if base == root else base.relative_to(root).as_posix() + "/"


def _labels(base: Path) -> dict[str, tuple[str, str, str]]:
    for name in ("mimic-cxr-2.0.0-chexpert.csv.gz", "mimic-cxr-2.0.0-chexpert.csv"):
        if (base / name).is_file():
            return {
                row["study_id"]: label_states(row, ("subject_id", "study_id"), base / name)
                for row in read_csv(base / name, ["subject_id", "study_id"], ACCESS)
            }
    return {}


def _reports(root: Path, base: Path, given: str) -> Callable[[str], str]:
    """A function from `files/p10/p10000032/s50414267.txt` to that report's text, "" if absent."""
    places = [Path(given)] if given else []
    places += [base, base / "mimic-cxr-reports", root, root / "mimic-cxr-reports"]
    zips = [p for p in places if p.suffix == ".zip"]
    zips += [p / "mimic-cxr-reports.zip" for p in places if p.suffix != ".zip"]
    zips += sorted(root.glob("physionet.org/files/mimic-cxr/*/mimic-cxr-reports.zip"))
    archive_path = next((path for path in zips if path.is_file()), None)
    if archive_path is not None:
        return _from_zip(archive_path)
    for folder in places:
        if next((folder / "files").glob("p1*/p*/s*.txt"), None) is not None:
            return lambda name: _read_text(folder / name)
    raise DatasetError(
        f"{root}: neither mimic-cxr-reports.zip nor files/p10/p*/s*.txt found. The reports are "
        "mimic-cxr-reports.zip of https://physionet.org/content/mimic-cxr/; put the file into the "
        "root or give --option reports=<path>"
    )


def _from_zip(path: Path) -> Callable[[str], str]:
    """Members are read in memory by name, at most 1 MiB each; nothing is unpacked."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile):
        raise DatasetError(f"{path}: no readable zip file: fetch it again") from None
    sizes = {info.filename: info.file_size for info in archive.infolist()}
    prefix = "" if any(name.startswith("files/") for name in sizes) else "mimic-cxr-reports/"

    def read(name: str) -> str:
        member = prefix + name
        if sizes.get(member, _MAX_REPORT_BYTES + 1) > _MAX_REPORT_BYTES:
            return ""
        try:
            with archive.open(member) as file:
                # the size in the directory is a claim: never read past the limit
                return file.read(_MAX_REPORT_BYTES).decode("utf-8", "replace")
        except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, ValueError):
            raise DatasetError(f"{path}: a report in it is damaged: fetch it again") from None

    return read


def _read_text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_REPORT_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except OSError as error:  # the name alone: the folders around it are a patient's
        raise DatasetError(f"{path.name}: cannot be read: {error.strerror}") from None


DATASET = Dataset(
    title="MIMIC-CXR (JPG or DICOM) with reports",
    licence="PhysioNet Credentialed Health Data License 1.5.0",
    access=ACCESS,
    collect=collect,
    demographics=("patients",),
    options={
        "files": ("jpg", "jpg or dcm"),
        "views": ("frontal", "frontal (PA and AP) or all"),
        "reports": ("", "mimic-cxr-reports.zip or the folder that holds files/; empty = look"),
        "patients": ("", "patients.csv.gz of MIMIC-IV, for sex and age; empty = neither"),
        "ms_cxr": ("", "MS_CXR_Local_Alignment_v1.1.0.csv: its images are test, with boxes"),
    },
)
