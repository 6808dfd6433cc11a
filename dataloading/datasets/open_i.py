"""Open-i (Indiana University chest X-rays): XML reports with MeSH terms, PNG or DICOM images.

Licence: CC BY-NC-ND 4.0 (stated in each report). Access: open, https://openi.nlm.nih.gov/faq:
NLMCXR_reports.tgz, NLMCXR_png.tgz, NLMCXR_dcm.tgz.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import xml.etree.ElementTree as ET
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

from mlip.dataloading.datasets.rows import (
    Collected,
    Dataset,
    DatasetError,
    Row,
    read_csv,
    relative,
    require_choice,
    split_by_patient,
)
from mlip.dataloading.view_position import is_frontal

ACCESS = (
    "the Open-i collection, https://openi.nlm.nih.gov/faq (NLMCXR_reports.tgz and NLMCXR_png.tgz)"
)
_STUDY = re.compile(r"^(?:CXR)?(\d+)_(?:\d+_)?")
_MAX_XML_BYTES = 1 << 20
_MAX_SECTIONS = 64  # real ones have four; nested ones would each be read with all within them
_MAX_MEMBERS = 100_000
_MAX_TOTAL_BYTES = 1 << 28  # of 4,000 reports of some kB, headers of members included


@dataclass(frozen=True)
class Report:
    """One XML report; texts are as published, XXXX standing for what was removed."""

    study_id: str  # CXR1
    findings: str
    impression: str
    mesh: tuple[str, ...]  # major MeSH headings, as published
    images: tuple[str, ...]  # CXR1_1_IM-0001-3001


def parse_report(content: bytes, name: str) -> Report:
    """The report of one XML file.

    Raises:  DatasetError naming the file where it is no XML, declares entities, names no study, or
             has more sections than any report.
    """
    try:
        _refuse_document_type(content, name)
        tree = ET.fromstring(content)
    except DatasetError:
        raise
    except (ET.ParseError, expat.ExpatError, ValueError, LookupError):  # two of the encoding's name
        raise DatasetError(f"{name}: no well-formed XML: fetch it again") from None
    study = tree.find("uId")
    if study is None or not study.get("id"):
        raise DatasetError(f"{name}: has no uId: expected a report of Open-i")
    sections = list(tree.iter("AbstractText"))
    if len(sections) > _MAX_SECTIONS:
        raise DatasetError(f"{name}: has {len(sections)} sections: no report of Open-i does")
    text: dict[str, str] = {}
    for node in sections:
        text[node.get("Label", "").upper()] = " ".join("".join(node.itertext()).split())
    return Report(
        study_id=study.get("id", ""),
        findings=text.get("FINDINGS", ""),
        impression=text.get("IMPRESSION", ""),
        mesh=tuple(node.text.strip() for node in tree.iter("major") if node.text),
        images=tuple(node.get("id", "") for node in tree.iter("parentImage") if node.get("id")),
    )


def _refuse_document_type(content: bytes, name: str) -> None:
    """By the parser, before it reads any entity: in UTF-16 no search for the word finds it."""

    def refuse(*_: object) -> None:
        raise DatasetError(f"{name}: declares a document type: no report of Open-i does")

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.Parse(content, True)


class _Capped(gzip.GzipFile):
    """A stream that ends in an error: tarfile takes a member's further headers whole into memory,
    whatever size they state."""

    def __init__(self, path: Path, error: Exception) -> None:
        super().__init__(path)
        self._error, self._left = error, _MAX_TOTAL_BYTES

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self._left -= len(content)
        if self._left < 0:
            raise self._error
        return content


def read_reports(root: Path) -> Iterator[Report]:
    """Reports of the unpacked ecgen-radiology/, by file name, or of NLMCXR_reports.tgz, as there.

    The archive is read as a stream: links and devices are skipped, sizes and counts are capped.
    """
    archive = root / "NLMCXR_reports.tgz"
    folder = root / "ecgen-radiology"
    if folder.is_dir():
        for path in sorted(folder.glob("*.xml")):
            try:
                with open(path, "rb") as file:
                    content = file.read(_MAX_XML_BYTES + 1)
            except OSError as error:
                raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None
            yield parse_report(content, str(path))
        return
    if not archive.is_file():
        raise DatasetError(
            f"{root}: neither NLMCXR_reports.tgz nor ecgen-radiology/ found. It is part of {ACCESS}"
        )
    too_much = DatasetError(
        f"{archive}: more or larger members than it should hold: fetch it again"
    )
    try:
        with (
            _Capped(archive, too_much) as unpacked,
            tarfile.open(fileobj=unpacked, mode="r|") as stream,
        ):
            for count, member in enumerate(stream):
                if count > _MAX_MEMBERS:
                    raise too_much
                if not member.isreg() or not member.name.endswith(".xml"):
                    continue
                if member.size > _MAX_XML_BYTES:
                    raise DatasetError(
                        f"{archive}: {member.name} has {member.size} bytes, a report of Open-i "
                        "less than a MiB: fetch the archive again"
                    )
                inside = stream.extractfile(member)
                assert inside is not None
                yield parse_report(inside.read(), f"{archive}: {member.name}")
    # a member may have a thousand headers, each read within the one before
    except (tarfile.TarError, OSError, EOFError, zlib.error, RecursionError) as error:
        raise DatasetError(f"{archive}: damaged ({type(error).__name__}): fetch it again") from None


def collect(root: Path, options: dict[str, str]) -> Collected:
    """One row an image of a report; 80/10/10 by study, the only grouping that is published.

    Views come from indiana_projections.csv (filename, projection) where that file is present.
    """
    require_choice(options, "views", ("frontal", "all"))
    path_of = {
        plain_name(path.name): relative(path, root)
        for folder in ("NLMCXR_png", "NLMCXR_dcm", "images", "images_normalized")
        for path in sorted((root / folder).rglob("*"))
        if path.suffix in (".png", ".dcm")
    }
    if not path_of:
        raise DatasetError(
            f"{root}: no .png or .dcm below NLMCXR_png/, NLMCXR_dcm/ or images/. Unpack "
            f"NLMCXR_png.tgz there; it is part of {ACCESS}"
        )
    views = _views(root)
    excluded: Counter[str] = Counter()
    rows: list[Row] = []
    reports = 0
    for report in read_reports(root):
        reports += 1
        parts = (("FINDINGS", report.findings), ("IMPRESSION", report.impression))
        text = "\n".join(f"{name}: {body}" for name, body in parts if body)
        if not report.images:
            excluded["report_without_image"] += 1
        for image in report.images:
            if plain_name(image) not in path_of:
                excluded["listed_but_not_there"] += 1
                continue
            view = views.get(plain_name(image), "")
            if options["views"] == "frontal" and view and not is_frontal(view):
                excluded["view_not_frontal"] += 1
                continue
            rows.append(
                Row(
                    image=path_of[plain_name(image)],
                    patient_id=report.study_id,
                    study_id=report.study_id,
                    image_id=image,
                    split=split_by_patient(report.study_id, "open-i", 0.1, 0.1),
                    view=view,
                    report=text,
                    labels="|".join(dict.fromkeys(term.split("/")[0] for term in report.mesh)),
                )
            )
    notes = [f"{reports} reports"]
    if not views:
        notes.append(
            "no indiana_projections.csv in the root: frontal and lateral images are not told apart"
        )
    return Collected(rows, excluded, notes)


def _views(root: Path) -> dict[str, str]:
    """Image -> FRONTAL or LATERAL from the commonly shared table of projections."""
    path = root / "indiana_projections.csv"
    if not path.is_file():
        return {}
    rows = read_csv(path, ["filename", "projection"], "the Kaggle copy of Open-i")
    return {plain_name(row["filename"]): row["projection"].upper() for row in rows}


def plain_name(name: str) -> str:
    """An image's id in the form that reports, files and Kaggle's copy share.

    CXR1_1_IM-0001-4001 of a report is CXR1_1_IM-0001-4001.png at the source and
    1_IM-0001-4001.dcm.png in the copy.
    """
    return _STUDY.sub(r"\1_", name.split(".")[0])


DATASET = Dataset(
    title="Open-i, Indiana University chest X-rays",
    licence="CC BY-NC-ND 4.0",
    access=ACCESS,
    collect=collect,
    options={"views": ("frontal", "frontal (needs indiana_projections.csv) or all")},
)
