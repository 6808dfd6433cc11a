"""A RIS table joined to DICOM files: no image gets another study's or another patient's report.

Oracles: the tables and headers that were written; every file and every row is joined or counted.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pydicom
import pytest

from mlip.cli import main
from mlip.dataloading.datasets.rows import Collected, DatasetError
from mlip.dataloading.dicom.radiograph import write_radiograph
from mlip.dataloading.reports.text import choose_sections
from mlip.dataloading.tables.table import ManifestError
from mlip.settings.config import ConfigError
from tests.raw_layouts import collect, table


def film(path: Path, patient: str, study: str, **changes: Any) -> str:
    """One file with accession number `study`; its StudyInstanceUID is returned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (np.arange(480, dtype=np.uint16) * 130).reshape(24, 20)
    write_radiograph(path, pixels, patient_id=patient, study_id=study, image_id=path.name)
    dataset = pydicom.dcmread(path)
    dataset.AccessionNumber = study
    for name, value in changes.items():
        setattr(dataset, name, value)
    pydicom.dcmwrite(path, dataset)
    return str(dataset.StudyInstanceUID)


def joined(root: Path, reports: Path, **options: str) -> tuple[dict[str, str], Collected]:
    collected = collect("folder", root, reports=str(reports), **options)
    return {row.image: row.report for row in collected.rows}, collected


def test_reports_follow_the_accession_number_and_all_is_counted(tmp_path: Path) -> None:
    root, ris = tmp_path / "pacs", tmp_path / "ris.csv"
    film(root / "a1.dcm", "P1", "A1")
    film(root / "a1b.dcm", "P1", "A1")
    film(root / "a2.dcm", "P2", "A2 ")
    film(root / "a9.dcm", "P3", "A9")
    film(root / "none.dcm", "P3", "")
    assert cv2.imwrite(str(root / "scan.png"), np.zeros((9, 9), np.uint8))
    (root / "a9.txt").write_text("Not of the table.")
    rows: list[list[object]] = [
        [" A1", "Effusion."],
        ["A2", ""],
        ["A7", "Nobody's."],
        ["", "Lost."],
    ]
    table(ris, "Accession No.,Report Text", rows)
    texts, collected = joined(root, ris)
    assert texts == {
        "a1.dcm": "Effusion.",
        "a1b.dcm": "Effusion.",
        "a2.dcm": "",
        "a9.dcm": "",
        "none.dcm": "",
        "scan.png": "",
    }
    assert collected.notes == [
        "reports of column Report Text joined by AccessionNumber = column Accession No.",
        "images with a report 2, with a blank one 1, not in the table 1, without AccessionNumber 2",
        "studies of the table: 3, 1 without an image; rows without key or patient: 1",
        "1 of the .txt files are not read: the table has the reports",
    ]


def test_a_column_of_uids_is_joined_by_the_study_uid_whatever_its_name(tmp_path: Path) -> None:
    uids = [film(tmp_path / "pacs" / f"{i}.dcm", f"P{i}", f"A{i}") for i in range(2)]
    rows: list[list[object]] = [[uid, f"Report {i}."] for i, uid in enumerate(uids)]
    table(tmp_path / "ris.csv", "study_id,text", rows)
    texts, collected = joined(tmp_path / "pacs", tmp_path / "ris.csv")
    assert texts == {"0.dcm": "Report 0.", "1.dcm": "Report 1."}
    said = "reports of column text joined by StudyInstanceUID = column study_id"
    assert collected.notes[0] == said


def test_a_column_of_uids_may_hold_a_word_for_none(tmp_path: Path) -> None:
    uids = [film(tmp_path / "pacs" / f"{i}.dcm", f"P{i}", f"A{i}") for i in range(3)]
    rows: list[list[object]] = [[uids[0], "Zero."], [uids[1], "One."], ["pending", "Nobody's."]]
    table(tmp_path / "ris.csv", "StudyInstanceUID,report", rows)
    texts, collected = joined(tmp_path / "pacs", tmp_path / "ris.csv")
    assert texts == {"0.dcm": "Zero.", "1.dcm": "One.", "2.dcm": ""}
    assert collected.notes[2].startswith("studies of the table: 3, 1 without an image")


def test_no_image_gets_the_report_of_another_patient(tmp_path: Path) -> None:
    """Two sites number their orders alike: A1 is a study of each."""
    root, ris = tmp_path / "pacs", tmp_path / "ris.csv"
    film(root / "one.dcm", "P1", "A1")
    film(root / "two.dcm", "P2", "A1")
    film(root / "other.dcm", "P3", "A1")
    film(root / "nobody.dcm", "", "A1")
    table(ris, "accession,MRN,report", [["A1", "P2", "Two's."], ["A1", "P1", "One's."]])
    texts, collected = joined(root, ris)
    assert texts == {"one.dcm": "One's.", "two.dcm": "Two's."}
    assert collected.excluded == {"report_of_another_patient": 1, "report_patient_unknown": 1}
    assert "patients compared with column MRN" in collected.notes[0]
    with pytest.raises(DatasetError, match="data rows 1 and 2"):
        joined(root, ris, report_patient="none")  # without patients they are one study's two texts
    table(ris, "accession,pseudonym,report", [["A1", "x9", "One."]])
    with pytest.raises(DatasetError, match="4 images are of studies in it, none of the patient"):
        joined(root, ris, report_patient="pseudonym")


def test_files_of_two_patients_that_share_a_key_get_no_report_without_patients(
    tmp_path: Path,
) -> None:
    """Two sites number their orders alike and the table is of one: nobody can tell of which."""
    root, ris = tmp_path / "pacs", tmp_path / "ris.csv"
    uid = film(root / "one.dcm", "P1", "A1")
    film(root / "two.dcm", "P2", "A1")
    film(root / "nobody.dcm", "", "A1")
    film(root / "three.dcm", "P3", "A3")
    film(root / "third.dcm", "P3", "A3")
    table(ris, "accession,report", [["A1", "One's."], ["A3", "Three's."]])
    texts, collected = joined(root, ris)
    assert texts == {"three.dcm": "Three's.", "third.dcm": "Three's."}
    assert collected.excluded == {"report_of_several_patients": 3}
    table(ris, "accession,report", [["A1", "One's."], ["A7", "Nobody's."]])
    with pytest.raises(DatasetError, match="3 images share their AccessionNumber with"):
        joined(root, ris)
    table(ris, "study,report", [[uid, "One's."]])
    texts, collected = joined(root, ris, report_key="study")
    assert texts.pop("one.dcm") == "One's." and set(texts.values()) == {""}
    assert not collected.excluded


def test_repeated_rows_are_refused_or_put_together(tmp_path: Path) -> None:
    root, ris = tmp_path / "pacs", tmp_path / "ris.csv"
    film(root / "a.dcm", "P1", "A1")
    rows: list[list[object]] = [["A1", ""], ["A1", "First."], ["A1", "First."]]
    table(ris, "accession,report", rows)
    assert joined(root, ris)[0] == {"a.dcm": "First."}
    table(ris, "accession,report", [*rows, ["A1", "Addendum: more."], ["A1", "First."]])
    with pytest.raises(DatasetError, match="1 rows repeat .* data rows 2 and 4.*=join"):
        joined(root, ris)
    texts, collected = joined(root, ris, report_repeats="join")
    assert texts == {"a.dcm": "First.\n\nAddendum: more."}
    assert collected.notes[-1] == "studies whose several texts were put together: 1"
    with pytest.raises(ConfigError, match="refuse or join"):
        joined(root, ris, report_repeats="last")


def test_words_that_programs_write_for_an_empty_cell_are_blank(tmp_path: Path) -> None:
    root, ris = tmp_path / "pacs", tmp_path / "ris.csv"
    film(root / "a.dcm", "P1", "A1")
    film(root / "b.dcm", "P2", "A2")
    rows: list[list[object]] = [["A1", "nan", "Clear."], ["A2", "NA", "N/A"], ["NULL", "x", "y"]]
    table(ris, "accession,findings,impression", [*rows, ["#N/A", "other", "texts"]])
    texts, collected = joined(root, ris)
    assert texts == {"a.dcm": "IMPRESSION: Clear.", "b.dcm": ""}
    assert "images with a report 1, with a blank one 1," in collected.notes[1]
    assert collected.notes[2].endswith("rows without key or patient: 2")
    cells: list[list[object]] = [["a.dcm", "P1", "None"], ["b.dcm", "P2", "None seen."]]
    table(ris, "image,patient_id,report", cells)
    assert [row.report for row in collect("manifest", root, file=str(ris)).rows] == [
        "",
        "None seen.",
    ]


def test_what_joins_nothing_stops_and_names_the_likely_reason(tmp_path: Path) -> None:
    root, ris = tmp_path / "pacs", tmp_path / "ris.csv"
    film(root / "a.dcm", "P1", "0066042")
    table(ris, "accession,report", [["66042", "CANARY one."], ["0077", "CANARY two."]])
    with pytest.raises(DatasetError, match="no image gets a report.*leading zeros") as caught:
        joined(root, ris)
    assert "CANARY" not in str(caught.value) and "66042" not in str(caught.value)
    table(ris, "accession,report", [["1.23E+11", "CANARY."]])
    with pytest.raises(ManifestError, match="spreadsheet has rounded"):
        joined(root, ris)
    film(root / "a.dcm", "P1", "AX-042")
    table(ris, "accession,report", [['="ax-042"', "CANARY."]])
    with pytest.raises(DatasetError, match="1 images have a key that stands .* in another writing"):
        joined(root, ris)
    numbers = pa.table({"AccessionNumber": [42, 7], "report": ["Whole number.", "No."]})
    pa.parquet.write_table(numbers, tmp_path / "ris.parquet")
    film(root / "a.dcm", "P1", "42")
    assert joined(root, tmp_path / "ris.parquet")[0] == {"a.dcm": "Whole number."}


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("order,report", {}, "report_key=<column>; the file has order, report"),
        (
            "order,befund",
            {},
            "for accession numbers or study UIDs and for reports: give "
            "--option report_key=<column> --option report_text=<column>; the file has order, b",
        ),
        ("accession,letter", {}, "report_text=<column>; the file has accession, letter"),
        ("accession,findings", {}, "report_text=<column>"),  # alone it may be labels
        ("accession,report", {"report_key": "order"}, "report_key=order: no such column"),
        ("accession,report", {"report_text": "a,b"}, "missing: a, b"),
        ("accession,report", {"report_patient": "mrn"}, "report_patient=mrn: no such column"),
    ],
)
def test_columns_that_are_not_there_are_named(
    tmp_path: Path, header: str, options: dict[str, str], message: str
) -> None:
    film(tmp_path / "pacs" / "a.dcm", "P1", "A1")
    table(tmp_path / "ris.csv", header, [["A1", "Text."]])
    with pytest.raises(DatasetError, match=message):
        joined(tmp_path / "pacs", tmp_path / "ris.csv", **options)
    with pytest.raises(ConfigError, match="give --option reports too"):
        collect("folder", tmp_path / "pacs", report_key="accession")


def test_a_report_is_neither_an_identifier_nor_a_state(tmp_path: Path) -> None:
    root, ris = tmp_path / "pacs", tmp_path / "ris.csv"
    film(root / "a.dcm", "P1", "A1")
    cells: list[object] = ["A1", "P1", "Final", "Clear lungs.", "a.dcm"]
    table(ris, "accession,patient_id,Report,Report Text,image", [cells])
    texts, collected = joined(root, ris)
    assert texts == {"a.dcm": "Clear lungs."}
    assert collect("manifest", root, file=str(ris)).rows[0].report == "Clear lungs."
    assert collected.notes[0].startswith("reports of column Report Text joined by")
    for named in ("accession", "patient_id", "Report Text,patient_id"):
        with pytest.raises(DatasetError, match=r"holds identifiers .* --option report_text"):
            joined(root, ris, report_text=named)
    for named in ("image", "Report Text,patient_id"):
        with pytest.raises(DatasetError, match="(image|patient_id) holds identifiers"):
            collect("manifest", root, file=str(ris), report=named)


def test_a_column_without_a_name_is_no_report(tmp_path: Path) -> None:
    """pandas writes row numbers under an empty name, spreadsheets a delimiter behind each row."""
    root, ris = tmp_path / "pacs", tmp_path / "ris.csv"
    film(root / "a.dcm", "P1", "A1")
    for header in (",accession,image,patient_id,report", ",accession,image,patient_id,letter"):
        table(ris, header, [[7, "A1", "a.dcm", "P1", "Clear."]])
        if header.endswith("report"):
            assert joined(root, ris)[0] == {"a.dcm": "Clear."}
            assert collect("manifest", root, file=str(ris)).rows[0].report == "Clear."
        else:
            with pytest.raises(DatasetError, match="report_text=<column>"):
                joined(root, ris)
            assert collect("manifest", root, file=str(ris)).rows[0].report == ""


def test_sections_in_columns_become_sections_of_the_report(tmp_path: Path) -> None:
    root, ris = tmp_path / "pacs", tmp_path / "ris.csv"
    film(root / "a.dcm", "P1", "A1")
    cells: list[object] = ["A1", "Fever.", "Large effusion.", "Effusion, new.", "a.dcm", "P1"]
    table(ris, "accession,History,Findings,impression_text,image,patient_id", [cells])
    manifest = collect("manifest", root, file=str(ris)).rows[0].report
    text = joined(root, ris)[0]["a.dcm"]
    assert text == manifest == "FINDINGS: Large effusion.\nIMPRESSION: Effusion, new."
    assert choose_sections(text, "impression") == "Effusion, new."
    whole = joined(root, ris, report_text="History,Findings")[0]["a.dcm"]
    assert whole == "HISTORY: Fever.\nFINDINGS: Large effusion."
    assert choose_sections(whole, "all") == "Large effusion."
    assert collect("manifest", root, file=str(ris), report="none").rows[0].report == ""


def test_the_command_joins_a_ris_table_and_writes_no_identifier(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(4):
        film(tmp_path / "pacs" / f"f{i}.dcm", f"CANARYMRN{i}", f"CANARYACC{i}")
    rows: list[list[object]] = [[f"CANARYACC{i}", f"CANARYMRN{i}", f"Text {i}."] for i in range(3)]
    table(tmp_path / "ris.csv", "accession_number,patient_id,report", rows)
    out = tmp_path / "out"
    arguments = ["--root", str(tmp_path / "pacs"), "--out", str(out), "--workers", "1"]
    assert main(["prepare", "folder", *arguments, "--option", f"reports={tmp_path}/ris.csv"]) == 0
    printed = capsys.readouterr()
    assert "images with a report 3" in printed.out and "lost 0" in printed.out
    written = pyarrow.parquet.read_table(out / "manifest.parquet").to_pylist()
    assert sorted(row["report"] for row in written) == ["", "Text 0.", "Text 1.", "Text 2."]
    for text in (printed.out, printed.err, str(written)):
        assert "CANARY" not in text
    assert main(["prepare", "folder", *arguments, "--option", "reports="]) == 2
    assert "--option reports=: expected a value" in capsys.readouterr().err
    assert main(["prepare", "folder", *arguments, "--option", "reports=nowhere.csv"]) == 3
    assert "nowhere.csv: cannot be read" in capsys.readouterr().err


def test_one_key_of_thousands_of_texts_takes_no_longer_than_its_length(tmp_path: Path) -> None:
    """An accession number of "UNKNOWN" or 0: put together anew for each row, 20,000 took 18 s."""
    film(tmp_path / "raw" / "a.dcm", "p1", "UNKNOWN")
    count = 30_000
    texts = [["UNKNOWN", f"No effusion, number {i}. " + "Clear. " * 20] for i in range(count)]
    table(tmp_path / "reports.csv", "accession,report text", texts)
    begin = time.process_time()
    reports, _ = joined(tmp_path / "raw", tmp_path / "reports.csv", report_repeats="join")
    assert time.process_time() - begin < 6
    assert reports["a.dcm"].count("No effusion, number") == count


def prepared(root: Path, out: Path, *options: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(sex, age) of each row of the prepared manifest, by image; what was noted."""
    status = main(
        ["prepare", "folder", "--root", str(root), "--out", str(out), "--keep-ids", *options]
    )
    assert status == 0
    read = pa.parquet.read_table(out / "manifest.parquet")
    assert list(read.column("patient_id").unique().to_pylist())
    rows = sorted(read.to_pylist(), key=lambda row: row["image_id"])
    noted = json.loads((out / "prepared.json").read_text())["noted"]
    noted.pop("own_range", None)
    return [(row.get("sex", "-"), row.get("age", "-")) for row in rows], noted


def test_sex_and_age_of_the_list_stand_in_where_the_header_tells_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, ris = tmp_path / "pacs", tmp_path / "ris.csv"
    header = {"PatientSex": "F", "PatientAge": "058Y"}
    for i, told in enumerate([{}, header, header, {}, {}]):
        film(root / f"{i}.dcm", f"P{i}", f"A{i}", SOPInstanceUID=f"1.2.{i}", **told)
    table(
        ris,
        "accession,report,Gender,Age at study",
        [
            ["A0", "Clear.", "male", "97"],
            ["A1", "Clear.", "M", "40"],
            ["A2", "Clear.", "F", "59"],  # a birthday since the study
            ["A3", "Clear.", "M", "2020-01-31"],
            ["A4", "Clear.", "F", 30],
            ["A4", "Clear.", "M", 30],
            ["A4", "Clear.", "M", ""],
        ],
    )
    given = ["--option", f"reports={ris}"]
    found, noted = prepared(root, tmp_path / "out", *given)
    assert found == [("M", "90"), ("F", "58"), ("F", "58"), ("M", ""), ("", "30")]
    assert noted == {"sex_unlike_table": 1, "age_unlike_table": 1}
    printed = capsys.readouterr().out
    assert "noted, sex_unlike_table: 1 (header and table differ" in printed
    assert "cells not read, so not stated: age 1\n" in printed
    assert "sexes or ages that rows of one study tell otherwise: 1\n" in printed
    without, noted = prepared(root, tmp_path / "none", *given, "--no-demographics")
    assert set(without) == {("-", "-")} and noted == {}
    unread, _ = prepared(root, tmp_path / "sex", *given, "--option", "report_age=none")
    assert [age for _, age in unread] == ["", "58", "58", "", ""]


def test_demographics_may_be_left_out_without_a_list_too(tmp_path: Path) -> None:
    film(tmp_path / "pacs" / "a.dcm", "P1", "A1")
    found, _ = prepared(tmp_path / "pacs", tmp_path / "out", "--no-demographics")
    assert found == [("-", "-")]


def test_a_patient_whose_leading_zeros_a_spreadsheet_took_is_said_to_be_one(
    tmp_path: Path,
) -> None:
    for i, patient in enumerate(["0007", "0017", "0027"]):
        film(tmp_path / "pacs" / f"{i}.dcm", patient, f"A{i}")
    ris = tmp_path / "ris.csv"
    table(ris, "accession,MRN,report", [["A0", "7", "a."], ["A1", "0017", "b."], ["A2", "9", "c."]])
    texts, collected = joined(tmp_path / "pacs", ris)
    assert texts == {"1.dcm": "b."} and collected.excluded == {"report_of_another_patient": 2}
    said = "1 images were left out whose patient stands beside their study in another writing only"
    assert collected.notes[-1].startswith(said)
    table(ris, "accession,MRN,report", [["A0", "7.0", "a."]])
    with pytest.raises(DatasetError, match=said):
        joined(tmp_path / "pacs", ris)


def test_a_list_with_h_for_men_makes_no_men_of_its_m(tmp_path: Path) -> None:
    root, ris = tmp_path / "pacs", tmp_path / "ris.csv"
    for number in (1, 2):
        film(root / f"{number}.dcm", f"P{number}", f"A{number}")
    table(ris, "Accession No.,Report,Sex", [["A1", "Clear.", "H"], ["A2", "Clear.", "M"]])
    collected = joined(root, ris)[1]
    assert [row.sex for row in collected.rows] == ["M", ""]
    assert "cells not read, so not stated: sex 1" in collected.notes
