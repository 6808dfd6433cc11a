"""PadChest-GR on a fake of its layout: sentences, labels, boxes in px, splits, odd entries.

Oracle: the shares and sentences that the fake was made with; 24 x 20 px films.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mlip.dataloading.datasets.padchest_gr import png_size
from mlip.dataloading.datasets.rows import DatasetError
from mlip.settings.config import ConfigError
from tests.raw_layouts import HEIGHT, WIDTH, by_id, collect, table
from tests.report_layouts import (
    GR_TABLE,
    gr_finding,
    gr_rows,
    gr_study,
    grey_png,
    make_padchest_gr,
)

REPORTS = "grounded_reports_20240819.json"


def write(root: Path, studies: list[dict[str, Any]], splits: str = "", **given: object) -> None:
    """Studies of a patient each, all of train unless said otherwise, with films."""
    (root / REPORTS).write_text(json.dumps(studies))
    lines: list[list] = []
    for i, study in enumerate(studies):
        split = {"v": "validation", "t": "test"}.get(splits[i : i + 1], "train")
        lines += gr_rows(study, split, f"p{i}", **given)
        grey_png(root / "Padchest_GR_files" / study["ImageID"], i, (HEIGHT, WIDTH))
    table(root / "master_table.csv", GR_TABLE, lines)


def test_padchest_gr(tmp_path: Path) -> None:
    make_padchest_gr(tmp_path)
    collected = collect("padchest_gr", tmp_path)
    rows = by_id(collected)
    assert len(rows) == 8 and collected.excluded == {}
    splits = Counter(row.split for row in rows.values())
    assert splits == {"train": 4, "val": 1, "test": 3}
    first = rows["25140_pic.png"]
    assert first.image == "Padchest_GR_files/PadChest_GR/25140_pic.png"
    assert (first.patient_id, first.study_id, first.view) == ("p0", "2510", "FRONTAL")
    assert (first.sex, first.age) == ("F", "63")
    assert (first.report, first.labels) == ("Small left effusion.", "pleural effusion")
    # (0.5, 0.5, 0.9, 1.0) of 20 x 24 px
    effusion = [10.0, 12.0, 8.0, 12.0, "pleural effusion", "Small left effusion."]
    assert json.loads(first.boxes) == [effusion]
    assert rows["25143_pic.png"].report == "Small left effusion. No pneumothorax."
    normal = rows["25147_pic.png"]
    assert (normal.labels, normal.boxes, normal.sex) == ("normal", "", "M")
    assert collected.notes == ["8 films, 6 of them with boxes for 6 sentences"]
    # earlier films of the same patients may have a film's name: they are never taken for it
    (tmp_path / "Padchest_GR_files").rename(tmp_path / "A")
    assert by_id(collect("padchest_gr", tmp_path))["25140_pic.png"].image.startswith("A/")
    (tmp_path / "grounded_reports_20230101.json").write_text("of an older release")
    spanish = by_id(collect("padchest_gr", tmp_path, language="es"))["25140_pic.png"]
    assert spanish.report == "ES Small left effusion." == json.loads(spanish.boxes)[0][5]
    with pytest.raises(ConfigError, match="language=English: expected en or es"):
        collect("padchest_gr", tmp_path, language="English")


def test_a_box_of_two_labels_answers_both_names_and_its_sentence_once(tmp_path: Path) -> None:
    make_padchest_gr(tmp_path)
    row = by_id(collect("padchest_gr", tmp_path))["25142_pic.png"]
    places = [[5.0, 6.0, 10.0, 6.0], [0.0, 12.0, 5.0, 12.0]]
    sentence = "Heart is large, with effusion."  # with the full stop that it lacked
    assert row.report == sentence and row.labels == "cardiomegaly|pleural effusion"
    assert json.loads(row.boxes) == [
        *([*place, "cardiomegaly", sentence] for place in places),
        *([*place, "pleural effusion", ""] for place in places),
    ]


def test_odd_findings_are_counted(tmp_path: Path) -> None:
    edge = gr_finding("Nodule.", ["nodule", " nodule "], [[-0.004, 0.5, 1.2, 0.75]])
    flat = gr_finding("Scar.", ["scar"], [[0.5, 0.5, 0.5, 0.9], [0.4, 0.9, 0.6, 0.1]])
    gap = gr_finding("Line.", ["line"], [[float("nan"), 0.1, 0.2, 0.2]])
    unnamed = {**gr_finding("Shadow.", ["x"], [[0.1, 0.1, 0.2, 0.2]]), "labels": []}
    blank = {**gr_finding("", ["goitre"], [[0.1, 0.1, 0.2, 0.2]]), "sentence_en": None}
    unboxed = {**gr_finding("Scoliosis.", ["scoliosis"], []), "boxes": None}
    write(tmp_path, [gr_study(0, [edge, flat, gap, unnamed, blank, unboxed]), gr_study(1, [])])
    collected = collect("padchest_gr", tmp_path)
    first, second = collected.rows
    assert json.loads(first.boxes) == [
        [0.0, 12.0, 20.0, 6.0, "nodule", "Nodule."],
        [2.0, 2.4, 2.0, 2.4, "goitre", ""],
    ]
    assert first.report == "Nodule. Scar. Line. Shadow. Scoliosis."
    assert first.labels == "nodule|scar|line|goitre|scoliosis"
    assert (second.report, second.labels) == ("", "normal")
    assert collected.notes == [
        "2 films, 1 of them with boxes for 1 sentences",
        "1 findings have no sentence in that language: they stand in no report",
        "1 sentences with boxes have no label: their boxes are left out",
        "3 boxes are not x1 < x2 and y1 < y2 within the film: left out",
    ]


def test_odd_studies_are_counted(tmp_path: Path) -> None:
    found = [gr_finding("Nodule.", ["nodule"], [[0.1, 0.1, 0.2, 0.2]])]
    studies = [gr_study(i, found) for i in range(9)]
    write(tmp_path, studies, "......vtt")
    lines = [line for i in range(9) if i != 1 for line in gr_rows(studies[i], "train", f"p{i}")]
    lines[1] = gr_rows(studies[2], "", "p2")[0]
    lines[2] = gr_rows(studies[3], "train", "")[0]
    lines[6] = gr_rows(studies[7], "test", "p0")[0]
    lines[5] = gr_rows(studies[6], "validation", "p8")[0]
    table(tmp_path / "master_table.csv", GR_TABLE, lines)
    folder = tmp_path / "Padchest_GR_files"
    (folder / studies[4]["ImageID"]).unlink()
    (folder / studies[5]["ImageID"]).write_bytes(b"no picture")
    (tmp_path / REPORTS).write_text(json.dumps([*studies, studies[7]]))
    collected = collect("padchest_gr", tmp_path)
    assert collected.excluded == {
        **{"not_in_master_table": 2, "no_split": 1, "listed_but_not_there": 1},
        **{"no_readable_png": 1, "repeated_image": 1, "patient_in_test": 1, "patient_in_val": 1},
    }
    assert {row.study_id: row.split for row in collected.rows} == {"2516": "val", "2517": "test"}


def test_age_is_of_the_dates_where_the_table_has_none(tmp_path: Path) -> None:
    write(tmp_path, [gr_study(0, [])], PatientAge="", PatientSex_DICOM="")
    (row,) = collect("padchest_gr", tmp_path).rows
    assert (row.sex, row.age) == ("", "63")


def test_what_is_missing_or_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"expected {REPORTS}. It is part of PadChest-GR"):
        collect("padchest_gr", tmp_path)
    study = gr_study(0, [gr_finding("CANARY.", ["nodule"], [[0.1, 0.1, 0.2, 0.2]])])
    write(tmp_path, [study])
    (tmp_path / "Padchest_GR_files" / study["ImageID"]).unlink()
    (tmp_path / "PadChest_GR.zip.001").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"no .png here or below.*cat PadChest_GR.zip.\*"):
        collect("padchest_gr", tmp_path)
    (tmp_path / "PadChest_GR.zip.001").unlink()
    with pytest.raises(DatasetError, match=r"no .png here or below.*agreement\)$"):
        collect("padchest_gr", tmp_path)
    write(tmp_path, [study])
    for change, message in (
        ({"StudyID": None}, "entry 1: expected StudyID and ImageID as texts"),
        ({"findings": {"a": "CANARY"}}, "entry 1: expected StudyID and ImageID as texts"),
        ({"findings": [{"sentence_en": "CANARY"}]}, "entry 1: .* with abnormal"),
        ({"findings": [{**study["findings"][0], "abnormal": "no"}]}, "entry 1: .* with abnormal"),
        ({"findings": ["CANARY"]}, "entry 1: expected StudyID and ImageID as texts"),
        ({"findings": [{**study["findings"][0], "boxes": "CANARY"}]}, "boxes: expected a list"),
        ({"findings": [{**study["findings"][0], "boxes": [[1, 2]]}]}, "boxes: expected .x1, y1"),
        ({"findings": [{**study["findings"][0], "boxes": [0.5]}]}, "boxes: expected .x1, y1"),
        (
            {"findings": [{**study["findings"][0], "boxes": [[10**400, 0, 1, 1]]}]},
            "boxes: expected .x1, y1",
        ),
        ({"findings": [{**study["findings"][0], "labels": "CANARY"}]}, "labels: expected a list"),
        ({"findings": [{**study["findings"][0], "labels": ["a|b"]}]}, "labels: expected a list"),
    ):
        (tmp_path / REPORTS).write_text(json.dumps([{**study, **change}]))
        with pytest.raises(DatasetError, match=f"20240819.json: {message}") as caught:
            collect("padchest_gr", tmp_path)
        assert "CANARY" not in str(caught.value)
    for content in ("{}", "[]", "[CANARY"):
        (tmp_path / REPORTS).write_text(content)
        with pytest.raises(DatasetError, match="20240819.json: .*expected a list with") as caught:
            collect("padchest_gr", tmp_path)
        assert "CANARY" not in str(caught.value)
    write(tmp_path, [study])
    lines = [*gr_rows(study, "train", "p0"), *gr_rows(study, "test", "p0")]
    table(tmp_path / "master_table.csv", GR_TABLE, lines)
    with pytest.raises(DatasetError, match="master_table.csv: a StudyID has two patients or"):
        collect("padchest_gr", tmp_path)
    table(tmp_path / "master_table.csv", "StudyID,ImageID,label", [])
    with pytest.raises(DatasetError, match="master_table.csv: missing columns split, PatientID"):
        collect("padchest_gr", tmp_path)
    (tmp_path / "master_table.csv").rename(tmp_path / "elsewhere.csv")
    with pytest.raises(DatasetError, match="master_table.csv: no such file.*padchest-gr/"):
        collect("padchest_gr", tmp_path)


def test_the_size_of_a_png_is_that_of_its_header(tmp_path: Path) -> None:
    grey_png(tmp_path / "a.png", 0, (7, 11))
    assert png_size(tmp_path / "a.png") == (7, 11)
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:20])
    assert png_size(tmp_path / "b.png") is None and png_size(tmp_path / "c.png") is None


def test_the_table_may_lie_in_a_folder_of_its_name_or_be_packed(tmp_path: Path) -> None:
    make_padchest_gr(tmp_path)
    table_file = tmp_path / "master_table.csv"
    table_file.rename(tmp_path / "a.csv")
    (tmp_path / "master_table.csv.zip").write_bytes(b"")
    with pytest.raises(DatasetError, match="master_table.csv: no such file. Unzip master_table"):
        collect("padchest_gr", tmp_path)
    table_file.mkdir()
    (tmp_path / "a.csv").rename(table_file / "master_table.csv")
    assert len(collect("padchest_gr", tmp_path).rows) == 8
