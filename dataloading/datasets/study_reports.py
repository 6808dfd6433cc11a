"""A table of reports, one row a study as a RIS exports it, joined to DICOM files by their headers.

A report on the wrong patient's image is the worst that this step can do, and nothing later could
see it: where the table names patients, the file must name the same one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from mlip.dataloading.datasets.report_columns import (
    find_report,
    joined_texts,
    said,
    usual_column,
)
from mlip.dataloading.datasets.rows import DatasetError, Row
from mlip.dataloading.demographics import PatientCells, differs
from mlip.dataloading.dicom.radiograph import Identity
from mlip.dataloading.tables.csv_text import shown
from mlip.dataloading.tables.table import check_identifiers, column_names, read_table
from mlip.settings.config import ConfigError

# usual names as plain_name writes them, tried in this order
_KEYS = (
    "accessionnumber accessionno accessionnr accession accno studyinstanceuid studyuid studyid"
).split()
_PATIENTS = "patientid patientnumber patientno mrn subjectid patid patient".split()
_SEXES = "sex gender patientsex patientgender".split()
_AGES = "age patientage ageatstudy ageatexam ageyears".split()
_UNSURE = "?"
_OTHERWISE = (
    "in another writing only: leading zeros, case, blanks or marks differ, which spreadsheets "
    "change: export that column as text"
)
_UID = r"^\d+(\.\d+){3,}$"  # PS3.5 9.1; an accession number of four dots is not known
DEMOGRAPHICS = ("report_sex", "report_age")  # options; "none" = not read
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
    "report_sex": ("", "its column of sex, for films whose header tells none; none = do not read"),
    "report_age": ("", "its column of age, as report_sex"),
    "report_repeats": (
        "refuse",
        "several rows of one study with different texts: refuse, or join in the order of rows",
    ),
}


class StudyReports:
    """Reports by the key that stands in a DICOM header; counts what was found and what was not."""

    def __init__(self, options: dict[str, str]) -> None:
        """Reads the table that OPTIONS name.

        Raises:  DatasetError (ManifestError) for a table that cannot be used; ConfigError for an
                 option's value that is none of its words.
        """
        path = Path(options["reports"])
        if options["report_repeats"] not in ("refuse", "join"):
            raise ConfigError("--option report_repeats: expected refuse or join")
        names = column_names(path)
        key = _column(path, names, options, "report_key", _KEYS)
        texts = find_report(path, names, options["report_text"], "report_text")
        patient, sex, age = (
            _column(path, names, options, option, usual)
            for option, usual in (
                ("report_patient", _PATIENTS),
                ("report_sex", _SEXES),
                ("report_age", _AGES),
            )
        )
        needed = (
            ("report_key", "accession numbers or study UIDs", key),
            ("report_text", "reports", texts),
        )
        if missing := {option: what for option, what, found in needed if not found}:
            how = " ".join(f"--option {option}=<column>" for option in missing)
            raise DatasetError(
                f"{path}: no column of a usual name for {' and for '.join(missing.values())}: "
                f"give {how}; the file has {shown(names)}"
            )
        if ids := {key, patient} & set(texts):
            raise DatasetError(
                f"{path}: {', '.join(sorted(ids))} holds identifiers and cannot be a report: name "
                "other columns with --option report_text"
            )
        wanted = {"key": key, **{f"text {name}": name for name in texts}}
        told = {"patient": patient, "sex": sex, "age": age}
        wanted |= {field: name for field, name in told.items() if name}
        read = read_table(path, wanted, anything={"sex", "age"} & wanted.keys())[0]
        for field in ("key", "patient"):
            if field in read:
                check_identifiers(read[field], wanted[field], path)
        self._path, self._key, self._patient, self._columns = path, key, patient, texts
        self._is_uid = _holds_uids(read["key"])
        self._counts: Counter[str] = Counter()
        self._found: set[str] = set()
        self._rewritten = self._patient_rewritten = 0
        sexes = read["sex"].to_pylist() if "sex" in read else ()
        self._cells, self._told_twice = PatientCells(sexes), 0
        # "sex", "age" -> (key, patient) -> what is told
        self._sex_and_age: dict[str, dict[tuple[str, str], str]] = {"sex": {}, "age": {}}
        self._texts = self._index(read, texts, options["report_repeats"] == "join")

    @property
    def attribute(self) -> str:
        """The DICOM attribute that the key column holds."""
        return "StudyInstanceUID" if self._is_uid else "AccessionNumber"

    def _index(
        self, read: dict[str, pa.ChunkedArray], texts: Sequence[str], joins: bool
    ) -> dict[str, dict[str, str]]:
        """key -> patient ("" where none is compared) -> report."""
        keys = [said(cell) for cell in read["key"].to_pylist()]
        patients = (
            [said(cell) for cell in read["patient"].to_pylist()]
            if "patient" in read
            else [""] * len(keys)
        )
        readers = {"sex": self._cells.sex, "age": lambda cell: self._cells.age(cell, zero_years="")}
        told = {n: (of, read[n].to_pylist()) for n, of in readers.items() if n in read}
        # the texts are keys: an accession number of "UNKNOWN" may have a hundred thousand
        texts_of: dict[str, dict[str, dict[str, None]]] = {}
        first: dict[tuple[str, str], int] = {}
        repeats = []
        joined = joined_texts({name: read[f"text {name}"].to_pylist() for name in texts})
        for place, (key, patient, text) in enumerate(zip(keys, patients, joined, strict=True)):
            if not key or (self._patient and not patient):
                self._counts["row without key or patient"] += 1
                continue
            for name, (reader, cells) in told.items():
                self._tell(name, (key, patient), reader(cells[place] or ""))
            there = texts_of.setdefault(key, {}).setdefault(patient, {})
            if not text or text in there:
                continue
            if there:
                repeats.append((first[key, patient], place))
            first.setdefault((key, patient), place)
            there[text] = None
        if repeats and not joins:
            one, other = repeats[0]
            raise DatasetError(
                f"{self._path}: {len(repeats)} rows repeat a study with another text, the first "
                f"in data rows {one + 1} and {other + 1}: expected one report a study; give "
                "--option report_repeats=join where they are addenda, which puts them together"
            )
        self._put_together = len({one for one, _ in repeats})
        return {
            key: {patient: "\n\n".join(there) for patient, there in of_patient.items()}
            for key, of_patient in texts_of.items()
        }

    def _tell(self, name: str, study: tuple[str, str], told: str) -> None:
        """Remembers what a row tells; of rows of one study that tell different things none."""
        known = self._sex_and_age[name]
        before = known.get(study, "")
        if before != _UNSURE and differs(name, before, told):
            self._told_twice += 1
            known[study] = _UNSURE
        elif told and not before:
            known[study] = told

    def _told(self, name: str, study: tuple[str, str]) -> str:
        told = self._sex_and_age[name].get(study, "")
        return "" if told == _UNSURE else told

    def join(
        self, rows: Sequence[Row], identities: Sequence[Identity | None]
    ) -> tuple[list[Row], list[tuple[str, str]]]:
        """The rows with the reports of their files' studies, and (image, rule) of those left out.

        identities  what stands in the header of each row's file, None where there is no header
        """
        patients: dict[str, set[str]] = {}
        if not self._patient:
            for identity in identities:
                if identity is not None and identity.patient:
                    patients.setdefault(self._key_of(identity), set()).add(identity.patient)
        # accession numbers of two sites, or studies that somebody numbered alike
        shared = {key for key, names in patients.items() if len(names) > 1}
        kept: list[Row] = []
        left_out = []
        for row, identity in zip(rows, identities, strict=True):
            row.report, rule = self._find(row, identity, shared)
            if rule:
                left_out.append((row.image, rule))
            else:
                kept.append(row)
        return kept, left_out

    def _key_of(self, identity: Identity) -> str:
        return identity.study if self._is_uid else identity.accession

    def _find(self, row: Row, identity: Identity | None, shared: set[str]) -> tuple[str, str]:
        """The report of a file's study ("" where there is none), or the rule to leave it out by.

        The row gets what the table tells of the patient's sex and age.
        """
        key = "" if identity is None else self._key_of(identity)
        if identity is None or not key:
            self._counts["image without key"] += 1
            return "", ""
        of_patient = self._texts.get(key)
        if of_patient is None:
            self._counts["image not in table"] += 1
            self._rewritten += _bare(key) in self._bare_keys
            return "", ""
        self._found.add(key)
        if key in shared:
            return "", "report_of_several_patients"
        if not self._patient:
            text = of_patient[""]
        elif not identity.patient:
            return "", "report_patient_unknown"
        elif identity.patient not in of_patient:
            self._patient_rewritten += _bare(identity.patient) in map(_bare, of_patient)
            return "", "report_of_another_patient"
        else:
            text = of_patient[identity.patient]
        study = key, identity.patient if self._patient else ""
        row.sex, row.age = self._told("sex", study), self._told("age", study)
        self._counts["image with report" if text else "image with blank report"] += 1
        return text, ""

    @cached_property
    def _bare_keys(self) -> set[str]:
        return {_bare(key) for key in self._texts} - {""}

    def account(self, excluded: Counter[str]) -> list[str]:
        """What was joined to what, for the user to read.

        Raises:  DatasetError where not one image got a report: the columns are not what they seem.
        """
        count = self._counts
        if not count["image with report"]:
            raise DatasetError(f"{self._path}: {self._why_none(excluded)}")
        compared = f", patients compared with column {self._patient}" if self._patient else ""
        notes = [
            f"reports of column {', '.join(self._columns)} joined by {self.attribute} = column "
            f"{self._key}{compared}"
        ]
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
        notes += self._cells.notes()
        if self._told_twice:
            notes.append(f"sexes or ages that rows of one study tell otherwise: {self._told_twice}")
        if self._put_together:
            notes.append(f"studies whose several texts were put together: {self._put_together}")
        if self._rewritten:
            notes.append(self._other_writing())
        if self._patient_rewritten:
            notes.append(self._other_patient_writing())
        return notes

    def _why_none(self, excluded: Counter[str]) -> str:
        count = self._counts
        if others := excluded["report_of_another_patient"] + excluded["report_patient_unknown"]:
            told = (
                f"{others} images are of studies in it, none of the patient that its column "
                f"{self._patient} names: expected the files' PatientID, leading zeros included; "
                "where it holds pseudonyms give --option report_patient=none"
            )
            return f"{told}. {self._other_patient_writing()}" if self._patient_rewritten else told
        if shared := excluded["report_of_several_patients"]:
            return (
                f"{shared} images share their {self.attribute} with images of another patient, so "
                "nobody can tell whose report it is: give the column of patient ids with --option "
                "report_patient, or join by StudyInstanceUID"
            )
        reason = (
            f"no image gets a report: {count['image without key']} files have no "
            f"{self.attribute}, {count['image not in table']} have one that its column "
            f"{self._key} does not hold, {count['image with blank report']} a blank report; "
            "name the column with --option report_key"
        )
        return f"{reason}. {self._other_writing()}" if self._rewritten else reason

    def _other_writing(self) -> str:
        return f"{self._rewritten} images have a key that stands in the table {_OTHERWISE}"

    def _other_patient_writing(self) -> str:
        return (
            f"{self._patient_rewritten} images were left out whose patient stands beside their "
            f"study {_OTHERWISE}"
        )


def _bare(key: str) -> str:
    """A key without what spreadsheets and pandas take away or add: ="0042", 42 and 42.0 are one."""
    return re.sub(r"[\W_]+", "", re.sub(r"\.0$", "", key.lower())).lstrip("0")


def _column(
    path: Path, names: list[str], options: dict[str, str], option: str, usual: Sequence[str]
) -> str:
    """The column an option names, else the first of a usual name, else ""; "none" names none."""
    given = options[option]
    if given == "none" and option in ("report_patient", *DEMOGRAPHICS):
        return ""
    if given and given not in names:
        raise DatasetError(
            f"{path}: --option {option}={given}: no such column; the file has {shown(names)}"
        )
    return given or usual_column(names, usual)


def _holds_uids(column: pa.ChunkedArray) -> bool:
    """Whether most keys are UIDs, so the column is of StudyInstanceUIDs; words stand in some."""
    texts = pc.utf8_trim_whitespace(pc.fill_null(column, ""))
    keys = pc.filter(texts, pc.not_equal(texts, ""))
    found = pc.sum(pc.match_substring_regex(keys, _UID)).as_py() or 0
    return bool(2 * found > len(keys))
