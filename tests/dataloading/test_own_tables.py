"""A folder or a table of one's own as `mlip prepare` reads it."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from mlip.cli import main
from mlip.dataloading.datasets.rows import DatasetError
from mlip.dataloading.tables.table import ManifestError
from mlip.settings.config import ConfigError
from tests.raw_layouts import (
    by_id,
    collect,
    image,
    table,
)


def test_folder_groups_by_dicom_ids_or_folders_and_leaves_links_alone(tmp_path):
    for i in range(4):
        image(tmp_path / "raw" / f"x{i}.dcm", i)
    for i in range(4):
        image(tmp_path / "raw" / f"p{i // 2}" / f"s{i}" / "a.png", i)
    (tmp_path / "raw" / "p0" / "s0" / "a.txt").write_text("Clear.")
    (tmp_path / "raw" / "p0" / "s1.txt").write_text("Effusion.\n")
    (tmp_path / "raw" / "x0.txt").write_text("Dicom report.")
    (tmp_path / "raw" / "link.png").symlink_to(tmp_path / "raw" / "p0" / "s0" / "a.png")
    (tmp_path / "raw" / "readme.md").write_text("no image")
    collected = collect("folder", tmp_path / "raw")
    rows = {row.image: row for row in collected.rows}
    assert len(rows) == 8
    assert collected.excluded == {"link_or_special_file": 1, "no_image": 1}
    assert rows["x0.dcm"].patient_id == rows["x1.dcm"].patient_id == "MRN0"
    assert rows["p0/s0/a.png"].patient_id == rows["p0/s1/a.png"].patient_id == "p0"
    assert rows["p0/s0/a.png"].report == "Clear." and rows["p0/s1/a.png"].report == "Effusion."
    assert rows["x0.dcm"].report == "Dicom report."
    with pytest.raises(DatasetError, match="no DICOM, JPEG or PNG"):
        (tmp_path / "empty").mkdir()
        collect("folder", tmp_path / "empty")


def test_manifest_finds_usual_columns_and_names_missing_ones(tmp_path):
    for i in range(10):
        image(tmp_path / f"{i}.png", i)
    lines = [
        [f"{i}.png", i // 2, f"Text {i}.", "validate" if i < 2 else "train"] for i in range(10)
    ]
    table(tmp_path / "manifest.csv", "Path,subject_id,text,split", lines)
    rows = by_id(collect("manifest", tmp_path))
    assert rows["0.png"].split == "val" and rows["0.png"].report == "Text 0."
    assert rows["9.png"].patient_id == "4" and rows["9.png"].study_id == ""
    free = collect("manifest", tmp_path, split="none", report="none")
    assert {row.report for row in free.rows} == {""} and "report" not in free.notes[0]
    table(tmp_path / "other.csv", "film,subject_id", [["0.png", 1]])
    with pytest.raises(DatasetError, match="no column for image: give .*film, subject_id"):
        collect("manifest", tmp_path, file=str(tmp_path / "other.csv"))
    named = collect("manifest", tmp_path, file=str(tmp_path / "other.csv"), image="film")
    assert [row.image for row in named.rows] == ["0.png"]
    told = "no column of reports was found: name one with --option report=COLUMN"
    assert told in named.notes and told not in free.notes


def test_manifest_reads_names_whatever_their_case_and_marks_and_tells_what_it_leaves(tmp_path):
    """A table of a RIS was refused for its image's column, then again for its patient's; what of a
    table was not read, its labels for one, was not said."""
    image(tmp_path / "0.png")
    table(
        tmp_path / "manifest.csv", "File Name,MRN,Report-Text,Finding", [["0.png", 1, "A b.", "x"]]
    )
    collected = collect("manifest", tmp_path)
    assert [(row.image, row.patient_id, row.report) for row in collected.rows] == [
        ("0.png", "1", "A b.")
    ]
    assert collected.notes[1] == "columns not read: Finding"
    labelled = collect("manifest", tmp_path, labels="Finding")
    assert labelled.rows[0].labels == "x" and "not read" not in " ".join(labelled.notes)
    table(tmp_path / "manifest.csv", "film,who", [["0.png", 1]])
    told = "no column for image, patient_id: give --option image=<column> --option patient_id=<co"
    with pytest.raises(DatasetError, match=re.escape(told)):
        collect("manifest", tmp_path)


@pytest.mark.parametrize("ours_first", [True, False])
def test_of_columns_that_differ_by_case_or_marks_the_one_of_our_pages_is_read(tmp_path, ours_first):
    """Patient_ID before patient_id was taken for it: another patient, so perhaps another split."""
    for name in ("0.png", "1.png"):
        image(tmp_path / name)
    ours = ("image", "patient_id", "split", "report")
    theirs = ("Image", "Patient ID", "SPLIT", "Report")
    names = [*ours, *theirs] if ours_first else [*theirs, *ours]
    cells = [
        dict.fromkeys(theirs, "7") | dict(zip(ours, row, strict=True))
        for row in (
            ("0.png", "a", "train", "Clear lungs."),
            ("1.png", "b", "test", "Effusion."),
        )
    ]
    table(tmp_path / "manifest.csv", ",".join(names), [[row[n] for n in names] for row in cells])
    collected = collect("manifest", tmp_path)
    assert [(row.image, row.patient_id, row.split, row.report) for row in collected.rows] == [
        ("0.png", "a", "train", "Clear lungs."),
        ("1.png", "b", "test", "Effusion."),
    ]
    assert collected.notes[1] == f"columns not read: {', '.join(theirs)}"


def test_columns_that_are_not_read_are_told_by_name_where_these_may_be(tmp_path):
    """Row numbers of pandas were "no columns"; beside a name with a year no name was told, but that
    the header, which had been read, looks like data and a header is expected."""
    image(tmp_path / "0.png")
    table(tmp_path / "manifest.csv", ",image,patient_id,report", [[0, "0.png", 1, "A b."]])
    assert "not read" not in " ".join(collect("manifest", tmp_path).notes)
    more = ["Finding", "score_2019", *(f"x{n:02d}" for n in range(60))]
    header = ",".join(["", "image", "patient_id", "report", *more])
    table(tmp_path / "manifest.csv", header, [[0, "0.png", 1, "A b.", *more]])
    shown = ", ".join(["Finding", *more[2:41]])
    assert collect("manifest", tmp_path).notes[1] == f"columns not read: {shown}, 22 others"


def test_a_usual_name_that_holds_something_else_is_named_where_it_fails(tmp_path):
    """A column Set of study arms left no row, and File of kinds was "rows 1 and 2 name the same
    image": neither said of which column, and the option that leaves it out."""
    for name in ("0.png", "1.png"):
        image(tmp_path / name)
    head = "Set,image,patient_id,report"
    table(
        tmp_path / "manifest.csv", head, [["A", "0.png", 1, "B c."], ["test", "1.png", 2, "D e."]]
    )
    told = "rows with another word than train, val or test in column 'Set': 1 (--option split=none "
    assert any(note.startswith(told) for note in collect("manifest", tmp_path).notes)
    freed = collect("manifest", tmp_path, split="none")
    assert len(freed.rows) == 2 and "another word" not in " ".join(freed.notes)
    head = "File,film,patient_id,report"
    table(tmp_path / "manifest.csv", head, [["x", "0.png", 1, "B c."], ["x", "1.png", 2, "D e."]])
    told = "same image (column 'File'; --option image=COLUMN names another)"
    with pytest.raises(DatasetError, match=re.escape(told)):
        collect("manifest", tmp_path)
    table(tmp_path / "manifest.csv", head, [["../x", "0.png", 1, "B c."]])
    with pytest.raises(DatasetError, match=re.escape("may lead out of --root (column 'File');")):
        collect("manifest", tmp_path)


HEAD = "image,patient_id,study,view,labels,report"


def _films(tmp_path, **cells):
    """20 films of 10 patients; a cell is a text or made of the film's number."""
    rows = []
    for i in range(20):
        row = {"study": i, "view": "PA", "labels": "edema|nodule", "report": f"Text {i}."}
        row |= {name: cell(i) if callable(cell) else cell for name, cell in cells.items()}
        image(tmp_path / f"{i}.png")
        rows.append([f"{i}.png", i // 2, *row.values()])
    table(tmp_path / "manifest.csv", HEAD, rows)
    return tmp_path


def test_each_column_is_told_with_how_many_values_it_holds(tmp_path):
    notes = collect("manifest", _films(tmp_path, view=lambda i: ("PA", "AP", "")[i % 3])).notes
    assert notes == [
        "columns, with how many different values each holds: image = image (20), patient_id = "
        "patient_id (10), study_id = study (20), view = view (2), labels = labels (1), report = "
        "report (20)"
    ]


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("chronic cough trial", "1 value"),
        (lambda i: ("arm A", "arm B", "NA")[i % 3], "2 values"),
        (lambda i: i % 3, ""),  # numbers of visits
        ("", ""),
        (lambda i: f"arm {i // 2}", ""),  # a patient's own
        (lambda i: f"study {i if i > 3 else 0}", ""),  # one of them is of two patients
    ],
)
def test_a_study_that_many_patients_share_is_told(tmp_path, cell, told):
    """The name of a trial made one study of all films of a patient, without a word."""
    collected = collect("manifest", _films(tmp_path, study=cell))
    notes = [note for note in collected.notes[1:] if "'study' (study_id)" in note]
    assert len(collected.rows) == 20 and len(notes) == bool(told)
    if told:
        assert told in notes[0] and "--option study_id=none" in notes[0]
        free = collect("manifest", tmp_path, study_id="none")
        assert "(study_id)" not in " ".join(free.notes)


def test_a_view_that_names_none_is_told_and_one_that_cannot_is_refused(tmp_path):
    """Addresses of a viewer went to the terminal and hid what the DICOM headers tell."""
    for view in ("PA", "AP supine", "Th.1 seitl.", "portable", "", lambda i: ("odd", "AP")[i % 2]):
        assert "(view)" not in " ".join(collect("manifest", _films(tmp_path, view=view)).notes)
    told = [n for n in collect("manifest", _films(tmp_path, view="site 2")).notes if "(view)" in n]
    assert len(told) == 1 and "--option view=none" in told[0] and "site 2" not in told[0]
    assert "holds 1 different value, hardly" in told[0]
    # long, and holds the word PA
    address = "https://viewer.example.org/studies/PA/open?name=Doe&from=list-of-studies&film="
    _films(tmp_path, view=lambda i: f"{address}{i}" if i else "PA room 1")
    with pytest.raises(DatasetError, match=r"'view' \(view\) .* 20 .*--option view=none") as error:
        collect("manifest", tmp_path)
    assert "Doe" not in str(error.value)
    assert collect("manifest", tmp_path, view="none").rows[0].view == ""


def test_the_count_lines_name_no_cell_that_is_no_view(tmp_path, capsys):
    """Of up to eight addresses, each with a patient in it, all were printed, and twice."""
    views = ("PA", "AP supine", "", "http://pacs/PA/4711", "Doe, Jane PA", "AP4711", "room 4711")
    _films(tmp_path, view=lambda i: views[i % 7])
    given = ["prepare", "manifest", "--root", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*given, "--side", "32", "--workers", "1"]) == 0
    said = "".join(capsys.readouterr())
    assert "view: other names 11, PA 3, AP supine 3, not stated 3\n" in said
    assert re.search(r"^train .* other names \d+,.* not stated \d", said, re.MULTILINE)
    assert "4711" not in said and "Doe" not in said
    _films(tmp_path / "b", view=lambda i: f"http://pacs/{i % 5}")
    assert "is kept as it stands: with --option view=none" in str(
        collect("manifest", tmp_path / "b")
    )


def test_labels_that_are_text_are_told(tmp_path):
    text = "The patient was seen for a cough of three weeks, and a film of the chest was asked for."
    told = "(labels)"
    notes = collect("manifest", _films(tmp_path, labels=text)).notes
    (note,) = [note for note in notes if told in note]
    assert "20 of 20" in note and "--option labels=none" in note and "cough" not in note
    for labels in ("edema|nodule", "", "|".join(["calcified pleural plaques"] * 9)):
        assert told not in " ".join(collect("manifest", _films(tmp_path, labels=labels)).notes)


def test_manifest_takes_what_programs_write_for_a_gap_as_no_id(tmp_path):
    """R's NA in two rows was one patient with one study."""
    image(tmp_path / "0.png")
    lines = [["0.png", "p1", "NA"], ["1.png", "NA", "s1"], ["2.png", "nan", "s2"]]
    table(tmp_path / "manifest.csv", "image,patient_id,study_id", lines)
    collected = collect("manifest", tmp_path)
    assert [(row.image, row.study_id) for row in collected.rows] == [("0.png", "")]
    assert collected.excluded == {"no_image_or_patient": 2}


def test_a_table_of_another_suffix_is_refused_by_it_before_its_columns_are_read(tmp_path):
    """A JSON list was read as a CSV, and its first cells shown as column names."""
    image(tmp_path / "raw" / "a.dcm")
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"image": "a.dcm", "patient_id": "7", "report": "Clear."}]))
    for name, option in (("manifest", "file"), ("folder", "reports")):
        with pytest.raises(ManifestError, match=r"parquet or .jsonl table, got suffix '.json'$"):
            collect(name, tmp_path / "raw", **{option: str(path)})


def test_texts_of_parquet_may_be_views(tmp_path):
    image(tmp_path / "0.png")
    frame = {"image": ["0.png"], "patient_id": ["7"], "report": ["Clear."]}
    views = {name: pyarrow.array(cells, pyarrow.string_view()) for name, cells in frame.items()}
    try:
        pyarrow.parquet.write_table(pyarrow.table(views), tmp_path / "manifest.parquet")
    except pyarrow.ArrowNotImplementedError:
        pytest.skip("this pyarrow reads views (as strings) and cannot write them: 18 for one")
    row = collect("manifest", tmp_path).rows[0]
    assert (row.image, row.patient_id, row.report) == ("0.png", "7", "Clear.")


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_manifest_reads_a_column_a_finding_by_its_state(tmp_path, suffix):
    frame = {
        "image": ["0.png", "1.png", "2.png"],
        "patient_id": ["a", "b", "c"],
        "Edema": [1.0, 0.0, None],
        "Pleural Effusion": [-1, 1, 1],
        "Fracture": [True, False, None],
        "Age": [61, 40, 39],
    }
    for i in range(3):
        image(tmp_path / f"{i}.png", i)
    path = tmp_path / f"manifest.{suffix}"
    lines = [dict(zip(frame, cells, strict=True)) for cells in zip(*frame.values(), strict=True)]
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.table(frame), path)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        table(path, ",".join(frame), [["" if v is None else v for v in x.values()] for x in lines])
    rows = by_id(collect("manifest", tmp_path, findings="Edema, Pleural Effusion,Fracture"))
    said = {key: (row.labels, row.uncertain, row.negative) for key, row in rows.items()}
    assert said == {
        "0.png": ("Edema|Fracture", "Pleural Effusion", ""),
        "1.png": ("Pleural Effusion", "", "Edema|Fracture"),
        "2.png": ("Pleural Effusion", "", ""),
    }


def test_manifest_names_what_is_wrong_with_a_finding_column(tmp_path):
    header = "image,patient_id,Edema,labels,a|b"
    table(tmp_path / "manifest.csv", header, [["0.png", "a", "yes", "Edema", 1]])
    for options, message in (
        ({"findings": "Edema"}, "manifest.csv: label Edema: expected 1"),
        ({"findings": "Edema,Oedema"}, "missing: Oedema; the file has image, patient_id, Edema"),
        ({"findings": "Edema,Edema"}, "one is named twice"),
        ({"findings": "a|b"}, "holds '|'"),
    ):
        with pytest.raises(DatasetError, match=re.escape(message)):
            collect("manifest", tmp_path, **options)
    with pytest.raises(ConfigError, match="labels=labels and findings both"):
        collect("manifest", tmp_path, findings="Edema", labels="labels")


@pytest.mark.parametrize("name", ["~/0.png", "~him/0.png", "/0.png", "../0.png", "a//0.png"])
def test_manifest_names_the_row_whose_path_may_lead_out_of_the_root(tmp_path, name):
    image(tmp_path / "0.png")
    # rows that a rule leaves out count: the number is the table's own
    lines = [["0.png", "a"], ["", "b"], [name, "c"]]
    table(tmp_path / "manifest.csv", "path,patient_id", lines)
    with pytest.raises(DatasetError, match=r"manifest\.csv: data row 3: its image path may lead"):
        collect("manifest", tmp_path)


def test_manifest_refuses_labels_that_are_lists_in_a_cell(tmp_path):
    # PadChest's way: "['cardiomegaly', 'pleural effusion']" would be one finding of that name
    image(tmp_path / "0.png")
    table(tmp_path / "manifest.csv", "path,patient_id,Labels", [["0.png", "a", "['Secret', 'b']"]])
    with pytest.raises(DatasetError, match=r"data row 1: column 'Labels' \(labels\) holds a list"):
        collect("manifest", tmp_path, labels="Labels")
    (row,) = collect("manifest", tmp_path, labels="none").rows
    assert row.labels == ""


def test_a_column_of_gaps_alone_is_blank_whatever_it_is_written_as(tmp_path: Path) -> None:
    """pandas writes texts that are all missing as numbers: "expected text, got double"."""
    image(tmp_path / "0.png")
    image(tmp_path / "1.png", 1)
    frame = {"image": ["0.png", "1.png"], "patient_id": ["7", "8"], "report": ["Clear.", ""]}
    for gaps in ([float("nan")] * 2, [None, None]):
        nothing = pa.array(gaps, pa.float64())
        cells = pa.table({**frame, "view": nothing, "labels": nothing, "study_id": nothing})
        pa.parquet.write_table(cells, tmp_path / "manifest.parquet")
        rows = collect("manifest", tmp_path).rows
        assert [(row.view, row.labels, row.study_id) for row in rows] == [("", "", "")] * 2
    for name in ("patient_id", "view"):
        some = {**frame, name: pa.array([7.0, None], pa.float64())}
        pa.parquet.write_table(pa.table(some), tmp_path / "manifest.parquet")
        message = f"column '{name}': expected text or integers, got double"
        with pytest.raises(ManifestError, match=message):
            collect("manifest", tmp_path)


def test_a_column_of_h_and_m_makes_no_man_of_a_woman(tmp_path: Path) -> None:
    for i in range(3):
        image(tmp_path / f"{i}.png", i)
    lines = [["0.png", "a", "H"], ["1.png", "b", "M"], ["2.png", "c", "mujer"]]
    table(tmp_path / "manifest.csv", "path,patient_id,sex", lines)
    collected = collect("manifest", tmp_path)
    assert [row.sex for row in collected.rows] == ["M", "", "F"]
    assert "cells not read, so not stated: sex 1" in collected.notes
