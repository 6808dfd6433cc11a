"""A table of reports, one row a study as a RIS exports it, joined to DICOM files by their headers.

A report on the wrong patient's image is the worst that this step can do, and nothing later could
see it: where the table names patients, the file must name the same one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from mlip.dataloading.csv_text import shown
from mlip.dataloading.datasets.report_columns import find_report, joined_texts, plain_name
from mlip.dataloading.datasets.rows import DatasetError
from mlip.dataloading.dicom import Identity
from mlip.dataloading.table import check_identifiers, column_names, read_table

# usual names as plain_name writes them, tried in this order
_KEYS = (
    "accessionnumber accessionno accessionnr accession accno studyinstanceuid studyuid studyid"
).split()
_PATIENTS = "patientid patientnumber patientno mrn subjectid patid patient".split()
_UID = r"^\d+(\.\d+){3,}$"  # PS3.5 9.1; an accession number of four dots is not known
OPTIONS = {
    "reports": ("", "CSV, TSV, Parquet or JSONL of reports, one row a study, in place of .txt"),
    "report_key": (
        "",
        "its column of accession numbers or of StudyInstanceUIDs; empty = a usual name",
    ),
    "report_text": ("", "its column of reports, or several, commas between; empty = usual names"),
    "report_patient": (
        "",
        "its column of patient ids, which must be the files'; empty = a usual name, none = "
        "do not compare",
    ),
    "report_repeats": (
        "refuse",
        "several rows of one study with different texts: refuse, or join in the order of rows",
    ),
}


class StudyReports:
    """Reports by the key that stands in a DICOM header; counts what was found and what was not."""

    def __init__(self, options: dict[str, str]) -> None:
        """Reads the table that OPTIONS name.

        Raises:  DatasetError (ManifestError) for a table that cannot be used.
        """
        path = Path(options["reports"])
        if options["report_repeats"] not in ("refuse", "join"):
            raise DatasetError("option report_repeats: expected refuse or join")
        names = column_names(path)
        key = _column(path, names, options, "report_key", _KEYS)
        texts = find_report(path, names, options["report_text"], "report_text")
        patient = ""
        if options["report_patient"] != "none":
            patient = _column(path, names, options, "report_patient", _PATIENTS)
        if not key or not texts:
            missing = "report_key" if not key else "report_text"
            raise DatasetError(
                f"{path}: no column of a usual name for it: give --option {missing}=<column>; "
                f"the file has {shown(names)}"
            )
        wanted = {"key": key, **{f"text {name}": name for name in texts}}
        if patient:
            wanted["patient"] = patient
        read = read_table(path, wanted)[0]
        for field in ("key", "patient"):
            if field in read:
                check_identifiers(read[field], wanted[field], path)
        self._path, self._key, self._patient = path, key, patient
        self.is_uid = _holds_uids(read["key"])
        self._counts: Counter[str] = Counter()
        self._found: set[str] = set()
        self._shortened = 0
        self._texts = self._index(read, texts, options["report_repeats"] == "join")

    @property
    def attribute(self) -> str:
        """The DICOM attribute that the key column holds."""
        return "StudyInstanceUID" if self.is_uid else "AccessionNumber"

    def _index(
        self, read: dict[str, pa.ChunkedArray], texts: Sequence[str], joins: bool
    ) -> dict[str, dict[str, str]]:
        """key -> patient ("" where none is compared) -> report."""
        keys = [(cell or "").strip() for cell in read["key"].to_pylist()]
        patients = (
            [(cell or "").strip() for cell in read["patient"].to_pylist()]
            if "patient" in read
            else [""] * len(keys)
        )
        index: dict[str, dict[str, str]] = {}
        texts_of: dict[tuple[str, str], list[str]] = {}
        first: dict[tuple[str, str], int] = {}
        repeats = []
        joined = joined_texts({name: read[f"text {name}"].to_pylist() for name in texts})
        for place, (key, patient, text) in enumerate(zip(keys, patients, joined, strict=True)):
            if not key or (self._patient and not patient):
                self._counts["row without key or patient"] += 1
                continue
            index.setdefault(key, {}).setdefault(patient, "")
            there = texts_of.setdefault((key, patient), [])
            if not text or text in there:
                continue
            if there:
                repeats.append((first[key, patient], place))
            first.setdefault((key, patient), place)
            there.append(text)
            index[key][patient] = "\n\n".join(there)
        if repeats and not joins:
            one, other = repeats[0]
            raise DatasetError(
                f"{self._path}: {len(repeats)} rows repeat a study with another text, the first "
                f"in data rows {one + 1} and {other + 1}: expected one report a study; give "
                "--option report_repeats=join where they are addenda, which puts them together"
            )
        return index

    def find(self, identity: Identity | None) -> tuple[str, str]:
        """The report of a file's study ("" where there is none), or the rule to leave it out by."""
        key = "" if identity is None else identity.study if self.is_uid else identity.accession
        if identity is None or not key:
            self._counts["image without key"] += 1
            return "", ""
        of_patient = self._texts.get(key)
        if of_patient is None:
            self._counts["image not in table"] += 1
            self._shortened += key.lstrip("0") != key and key.lstrip("0") in self._texts
            return "", ""
        self._found.add(key)
        if not self._patient:
            text = of_patient[""]
        elif not identity.patient:
            return "", "report_patient_unknown"
        elif identity.patient not in of_patient:
            return "", "report_of_another_patient"
        else:
            text = of_patient[identity.patient]
        self._counts["image with report" if text else "image with blank report"] += 1
        return text, ""

    def account(self, excluded: Counter[str]) -> list[str]:
        """What was joined to what, for the user to read.

        Raises:  DatasetError where not one image got a report: the columns are not what they seem.
        """
        count = self._counts
        if not count["image with report"]:
            raise DatasetError(f"{self._path}: {self._why_none(excluded)}")
        compared = f", patients compared with column {self._patient}" if self._patient else ""
        notes = [f"reports joined by {self.attribute} = column {self._key}{compared}"]
        notes.append(
            f"images with a report {count['image with report']}, with a blank one "
            f"{count['image with blank report']}, not in the table {count['image not in table']}, "
            f"without {self.attribute} {count['image without key']}"
        )
        lost = len(self._texts) - len(self._found)
        notes.append(
            f"studies of the table: {len(self._texts)}, {lost} without an image; rows without key "
            f"or patient: {count['row without key or patient']}"
        )
        if self._shortened:
            notes.append(self._zeros())
        return notes

    def _why_none(self, excluded: Counter[str]) -> str:
        count = self._counts
        if others := excluded["report_of_another_patient"] + excluded["report_patient_unknown"]:
            return (
                f"{others} images are of studies in it, none of the patient that its column "
                f"{self._patient} names: expected the files' PatientID, leading zeros included; "
                "where it holds pseudonyms give --option report_patient=none"
            )
        reason = (
            f"no image gets a report: {count['image without key']} files have no "
            f"{self.attribute}, {count['image not in table']} have one that its column "
            f"{self._key} does not hold, {count['image with blank report']} a blank report; "
            "name the column with --option report_key"
        )
        return f"{reason}. {self._zeros()}" if self._shortened else reason

    def _zeros(self) -> str:
        return (
            f"{self._shortened} accession numbers stand in the table without their leading zeros "
            "only, which spreadsheets take away: export that column as text"
        )


def _column(
    path: Path, names: list[str], options: dict[str, str], option: str, usual: Sequence[str]
) -> str:
    """The column an option names, else the first of a usual name, else ""."""
    given = options[option]
    if given and given not in names:
        raise DatasetError(
            f"{path}: --option {option}={given}: no such column; the file has {shown(names)}"
        )
    plain = {plain_name(name): name for name in reversed(names)}
    return given or next((plain[name] for name in usual if name in plain), "")


def _holds_uids(column: pa.ChunkedArray) -> bool:
    """Whether every key is a UID, so the column is of StudyInstanceUIDs."""
    texts = pc.utf8_trim_whitespace(pc.fill_null(column, ""))
    said = pc.filter(texts, pc.not_equal(texts, ""))
    return len(said) > 0 and bool(pc.all(pc.match_substring_regex(said, _UID)).as_py())
