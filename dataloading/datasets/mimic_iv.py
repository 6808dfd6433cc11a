"""MIMIC-IV's table of patients, for the sex and age that MIMIC-CXR's own tables do not have.

Licence and access as MIMIC-CXR; https://physionet.org/content/mimiciv/ (hosp/patients.csv.gz,
columns subject_id, gender, anchor_age, anchor_year). Source of the rules:
https://mimic.mit.edu/docs/iv/modules/hosp/patients/.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from mlip.dataloading.datasets.rows import DatasetError, read_csv, require
from mlip.dataloading.demographics import PatientCells

ACCESS = "MIMIC-IV, https://physionet.org/content/mimiciv/ (credentialed account, agreement)"
_COLUMNS = ["subject_id", "gender", "anchor_age", "anchor_year"]
_OVER_89 = "91"  # what anchor_age says of all who were over 89 in anchor_year


class Patients:
    """Sex and age by MIMIC's subject_id; those of nobody where the option names no file."""

    def __init__(self, option: str, subjects: Collection[str]) -> None:
        """Reads the table for these subjects.

        Raises:  DatasetError where it names none of them, or columns are missing.
        """
        self._cells = PatientCells()
        self._of: dict[str, dict[str, str]] = {}
        self._notes: list[str] = []
        if not option:
            return
        path = require(Path(option), ACCESS)
        wanted = set(subjects)
        for row in read_csv(path, _COLUMNS, ACCESS):
            if row["subject_id"] in wanted:
                self._of[row["subject_id"]] = row
        if not self._of:
            raise DatasetError(
                f"{path}: names none of the {len(wanted)} patients: expected subject_id as "
                "MIMIC-CXR writes it"
            )
        self._notes.append(
            f"sex and age of {len(self._of)} patients from --option patients, "
            f"{len(wanted) - len(self._of)} are not in it"
        )

    def sex_and_age(self, subject: str, study_date: str) -> tuple[str, str]:
        """At the study; study_date YYYYMMDD, shifted as the patient's anchor_year is.

        The age of who was over 89 in a later year is not known: it may have been 89 or less.
        """
        row = self._of.get(subject)
        if row is None:
            return "", ""
        sex = self._cells.sex(row["gender"])
        age, year = row["anchor_age"], row["anchor_year"]
        if not all(cell.isdecimal() for cell in (age, year, study_date[:4])):
            return sex, self._cells.counted("age", None)
        if age == _OVER_89 and study_date[:4] < year:
            return sex, ""
        return sex, self._cells.age_between(str(int(year) - int(age)), study_date[:4])

    def notes(self) -> list[str]:
        return self._notes + self._cells.notes()
