"""CheXpert Plus and ReXGradient-160K on fakes of their layouts, odd rows included.

Oracle: the cells that the fakes were made with, and the counts stated beside them by hand.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mlip.assembly import open_corpus, open_loader
from mlip.cli import main
from mlip.dataloading.datasets.rows import DatasetError
from mlip.dataloading.manifest import load_manifest
from mlip.settings.config import ConfigError, load
from tests.raw_layouts import by_id, collect, image, make_chexpert, table
from tests.report_layouts import (
    PLUS_FOLDERS,
    make_chexpert_plus,
    make_rexgradient,
    plus_row,
    plus_states,
    rex_study,
    write_chexpert_plus,
    write_rexgradient,
)
from tests.small_run import SETTINGS

CONFIGS = Path(__file__).parents[2] / "configs"
THIRD = "train/patient00003/study1"


@pytest.mark.parametrize("files", PLUS_FOLDERS)
def test_chexpert_plus(tmp_path: Path, files: str) -> None:
    make_chexpert_plus(tmp_path, files)
    collected = collect("chexpert_plus", tmp_path, files=files)
    rows = by_id(collected)
    assert len(rows) == 9 and collected.excluded == {"view_not_frontal": 1}
    first = rows["train/patient00001/study1/view1_frontal.jpg"]
    path = f"{PLUS_FOLDERS[files]}/train/patient00001/study1/view1_frontal.{files}"
    assert (first.image, first.patient_id) == (path, "patient00001")
    assert (first.study_id, first.view) == ("patient00001/study1", "AP")
    assert (first.labels, first.uncertain, first.negative) == ("Edema", "Pneumonia", "Fracture")
    assert first.report == "IMPRESSION: 1. Edema."
    # what the publisher put out of the findings' and impression's own columns stays out
    assert not any("ABNORMAL" in row.report or "1 View" in row.report for row in rows.values())
    lines = rows["train/patient00004/study1/view1_frontal.jpg"]
    assert lines.report == "FINDINGS: LINES IN\nPLACE.\n2.NO EFFUSION."
    both = rows["train/patient00006/study2/view1_frontal.jpg"]
    assert both.report == "IMPRESSION: 1. Edema.\nFINDINGS: Clear lungs."
    assert rows["train/patient00005/study1/view1_frontal.jpg"].report == ""
    assert {r.split for r in rows.values() if r.subset == "valid"} == {"test"}
    assert [row.subset for row in rows.values()].count("valid") == 2
    every = by_id(collect("chexpert_plus", tmp_path, files=files, views="all"))
    assert len(every) == 10 and every[f"{THIRD}/view3_lateral.jpg"].view == "LATERAL"


def test_a_study_of_chexpert_plus_has_one_report_and_its_labels(tmp_path: Path) -> None:
    # dates were replaced image by image, so CheXbert read another text of the second film
    make_chexpert_plus(tmp_path)
    collected = collect("chexpert_plus", tmp_path, views="all")
    rows = [row for row in collected.rows if row.study_id == "patient00003/study1"]
    assert len(rows) == 3
    assert {row.report for row in rows} == {"IMPRESSION: 1. Edema, as on 3/4/2001."}
    assert {row.labels for row in rows} == {"Edema"}
    assert collected.notes[:2] == [
        "8 studies, 1 of them without impression and findings",
        "2 rows word the report otherwise than the first row of their study that has one, whose "
        "report and labels they have",
    ]


def test_a_blank_first_row_of_chexpert_plus_hides_no_report(tmp_path: Path) -> None:
    blank = {"section_impression": " \\n", "section_findings": ""}
    rows = [plus_row(1, 1, **blank), plus_row(1, 1, "view2_frontal"), plus_row(2, 1, **blank)]
    lines = [plus_states(row, Edema=1.0) for row in rows]
    write_chexpert_plus(tmp_path, rows, {"impression": lines})
    collected = collect("chexpert_plus", tmp_path)
    assert [row.report for row in collected.rows] == ["IMPRESSION: 1. Edema."] * 2 + [""]
    assert [row.labels for row in collected.rows] == ["Edema"] * 2 + [""]
    assert collected.notes[0] == "2 studies, 1 of them without impression and findings"
    assert collected.notes[1].startswith("1 rows word the report otherwise")
    assert "; 1 studies without that section have none" in collected.notes[2]


def test_labels_of_an_empty_section_are_none(tmp_path: Path) -> None:
    """CheXbert says No Finding of a section without a word."""
    make_chexpert_plus(tmp_path)
    rows = by_id(collect("chexpert_plus", tmp_path))
    # of 4 and 5 nothing is said under the impression
    for patient in (4, 5):
        row = rows[f"train/patient0000{patient}/study1/view1_frontal.jpg"]
        assert (row.labels, row.uncertain, row.negative) == ("", "", "")
    collected = collect("chexpert_plus", tmp_path, labels="findings")
    said = {row.image_id.split("/")[1] for row in collected.rows if row.labels}
    assert said == {"patient00004", "patient00006"}
    assert "labels: CheXbert's of findings_fixed.json; 6 studies without" in collected.notes[2]
    nothing = collect("chexpert_plus", tmp_path, labels="none")
    assert {row.labels for row in nothing.rows} == {""} and len(nothing.notes) == 2
    with pytest.raises(DatasetError, match=r"expected report_fixed.json or .*5158c524"):
        collect("chexpert_plus", tmp_path, labels="report")
    with pytest.raises(ConfigError, match="labels=Impression: expected impression or f"):
        collect("chexpert_plus", tmp_path, labels="Impression")
    (tmp_path / "chexbert_labels" / "impression_fixed.json").unlink()
    collected = collect("chexpert_plus", tmp_path)
    assert {row.labels for row in collected.rows} == {""}
    assert collected.notes[-1].startswith("no impression_fixed.json in the root")


def test_odd_labels_of_chexpert_plus_are_counted_or_named(tmp_path: Path) -> None:
    rows = [plus_row(i, 1) for i in (1, 2, 3)]
    lines = [
        plus_states(rows[0], Edema=1.0),
        plus_states(rows[0], Fracture=1.0),
        plus_states(rows[1], Edema=float("nan"), Fracture=1),
    ]
    write_chexpert_plus(tmp_path, rows, {"impression": lines})
    collected = collect("chexpert_plus", tmp_path)
    assert [row.labels for row in collected.rows] == ["Edema", "Fracture", ""]
    assert collected.notes[-1] == (
        "labels: CheXbert's of impression_fixed.json; 0 studies without that section have none, "
        "1 studies are not in it, 1 lines repeat an image: the first one counts"
    )
    path = tmp_path / "chexbert_labels" / "impression_fixed.json"
    whole = path.read_text()
    # equal states of other names, and of another type that is equal to 1
    named = [{"Edema": 1.0}, {"Fracture": 1.0}, {"Fracture": True}]
    said = [
        {"path_to_image": row["path_to_image"], **n} for row, n in zip(rows, named, strict=True)
    ]
    for lines in (said, said[::-1]):
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        found = [row.labels for row in collect("chexpert_plus", tmp_path).rows]
        assert found == ["Edema", "Fracture", "Fracture"]
    for broken in ('{"path_to_image": "CANARY', '["CANARY"]', '{"Edema": 1.0, "a": "CANARY"}'):
        path.write_text(f"{whole}\n{broken}\n")
        with pytest.raises(
            DatasetError, match="impression_fixed.json: line 5: expected a"
        ) as caught:
            collect("chexpert_plus", tmp_path)
        assert "CANARY" not in str(caught.value)
    for state in ("2.0", '"CANARY"', '["CANARY"]'):
        path.write_text(whole.replace("1.0", state))
        message = "impression_fixed.json: label Edema: expected 1"
        with pytest.raises(DatasetError, match=message) as caught:
            collect("chexpert_plus", tmp_path)
        assert "CANARY" not in str(caught.value)


def test_odd_rows_of_chexpert_plus_are_counted_or_named(tmp_path: Path) -> None:
    rows = [plus_row(i, 1) for i in range(1, 8)]
    rows[1]["ap_pa"] = "LL"
    rows[2]["deid_patient_id"] = ""
    rows[3]["ap_pa"] = ""
    rows.append(dict(rows[0]))
    rows.append(plus_row(5, 2, deid_patient_id="patient00005", split="valid"))
    write_chexpert_plus(tmp_path, rows, {})
    (tmp_path / "PNG" / "PNG" / "train/patient00007/study1/view1_frontal.png").unlink()
    collected = collect("chexpert_plus", tmp_path)
    assert collected.excluded == {
        **{"repeated_row": 1, "no_patient": 1, "listed_but_not_there": 1, "patient_in_test": 1},
    }
    assert [row.view for row in collected.rows] == ["AP", "FRONTAL", "FRONTAL", "AP", "AP"]
    for column, value in (
        ("split", "test"),
        ("path_to_image", "CheXpert/patient1.jpg"),
        ("path_to_image", "train/patient00001/study1/../../view1_frontal.jpg"),
    ):
        write_chexpert_plus(tmp_path, [plus_row(1, 1) | {column: value}], {}, images=False)
        with pytest.raises(DatasetError, match=f"240401.csv: column {column}: expected"):
            collect("chexpert_plus", tmp_path)
    table(tmp_path / "df_chexpert_plus_240401.csv", "path_to_image,split", [])
    with pytest.raises(DatasetError, match="missing columns path_to_dcm, frontal_lateral"):
        collect("chexpert_plus", tmp_path)


@pytest.mark.parametrize("layout", ["PNG/PNG/{}", "PNG/{}", "PNG_{}", "{}"])
def test_chexpert_plus_finds_its_images_by_how_they_were_unpacked(
    tmp_path: Path, layout: str
) -> None:
    rows = [plus_row(1, 1), plus_row(64541, 1, split="valid")]
    write_chexpert_plus(tmp_path, rows, {}, images=False)
    with pytest.raises(DatasetError, match=r"PNG/train/ or .*files=png.*files=jpg takes those"):
        collect("chexpert_plus", tmp_path)
    for split, patient in (("train", "patient00001"), ("valid", "patient64541")):
        image(tmp_path / layout.format(split) / patient / "study1" / "view1_frontal.png")
    assert Counter(row.split for row in collect("chexpert_plus", tmp_path).rows)["test"] == 1


def test_patients_are_on_the_same_side_in_chexpert_and_chexpert_plus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # nobody should watch val on films that the other set trained on
    monkeypatch.setattr("mlip.dataloading.datasets.chexpert.VAL_SHARE", 0.5)
    monkeypatch.setattr("mlip.dataloading.datasets.chexpert_plus.VAL_SHARE", 0.5)
    make_chexpert(tmp_path, 40)
    make_chexpert_plus(tmp_path)
    older = {r.patient_id: r.split for r in collect("chexpert", tmp_path).rows}
    newer = {r.patient_id: r.split for r in collect("chexpert_plus", tmp_path).rows}
    shared = {patient for patient in older if patient in newer and patient < "patient64541"}
    assert len(shared) >= 5 and {older[p] for p in shared} == {"train", "val"}
    assert all(older[patient] == newer[patient] for patient in shared)


def test_a_published_5x200_is_set_apart_from_chexpert_plus_with_its_patients(
    tmp_path: Path,
) -> None:
    make_chexpert_plus(tmp_path)
    listed = [f"CheXpert-v1.0/{THIRD}/view1_frontal.jpg", "CheXpert-v1.0/train/patient9/study1/a"]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    collected = collect("chexpert_plus", tmp_path, five_by_200=str(tmp_path / "list.json"))
    rows = [row for row in collected.rows if row.patient_id == "patient00003"]
    assert [(row.split, row.subset) for row in rows] == [("test", "5x200")]
    assert collected.excluded["other_image_of_5x200_patient"] == 1
    digest = hashlib.sha256((tmp_path / "list.json").read_bytes()).hexdigest()
    assert collected.notes[-1] == (
        f"5x200 list: 2 images, SHA-256 {digest}; 1 of them are not in the table"
    )
    (tmp_path / "list.json").write_text(json.dumps(listed[1:]))
    with pytest.raises(DatasetError, match="list.json: none of its 1 paths is in df_chexpert"):
        collect("chexpert_plus", tmp_path, five_by_200=str(tmp_path / "list.json"))
    with pytest.raises(DatasetError, match="rule: no such file"):
        collect("chexpert_plus", tmp_path, five_by_200="rule")


def test_the_newest_table_of_chexpert_plus_is_read(tmp_path: Path) -> None:
    make_chexpert_plus(tmp_path)
    older = tmp_path / "df_chexpert_plus_240401.csv"
    whole = older.read_text()
    (tmp_path / "df_chexpert_plus_250101.csv").write_text(whole)
    older.write_text(whole.splitlines()[0])
    assert len(collect("chexpert_plus", tmp_path).rows) == 9
    with gzip.open(tmp_path / "df_chexpert_plus_260101.csv.gz", "wt") as packed:
        packed.write(whole.splitlines()[0])
    assert collect("chexpert_plus", tmp_path).rows == []


def test_chexpert_plus_tells_sex_and_age(tmp_path: Path) -> None:
    make_chexpert_plus(tmp_path)
    found = {r.patient_id: (r.sex, r.age) for r in collect("chexpert_plus", tmp_path).rows}
    assert found["patient00001"] == ("M", "62") and found["patient00002"] == ("F", "62")
    assert found["patient00005"] == ("", "") and found["patient00006"] == ("F", "90")


def test_rexgradient(tmp_path: Path) -> None:
    make_rexgradient(tmp_path)
    collected = collect("rexgradient", tmp_path)
    assert collected.excluded == {"view_not_frontal": 3, "view_not_stated": 3}
    assert Counter(row.split for row in collected.rows) == {"train": 3, "val": 1, "test": 1}
    first, second, third, fourth, fifth = collected.rows
    study = "studies/1.2.826.1.1/series/1.2.826.1.1.1/instances/1.2.826.1.1.0.png"
    assert first.image == f"deid_png/GRDN000000000001/GRDNACC000000001/{study}"
    assert (first.patient_id, first.study_id) == ("GRDN000000000001", "1.2.826.1.1")
    assert (first.image_id, first.view, first.labels) == ("1.2.826.1.1.0", "PA", "")
    assert first.report == "IMPRESSION: No acute process.\nFINDINGS: Heart is normal."
    assert (second.report, third.report) == ("FINDINGS: Heart is large.", "")
    assert (third.view, fourth.view) == ("POSTERO_ANTERIOR", "ANTERO_POSTERIOR")
    assert [row.patient_id for row in (fourth, fifth)] == ["GRDN000000000004", "GRDN000000000005"]
    assert collected.notes == ["7 studies, 1 of them without impression and findings"]
    unstated = collect("rexgradient", tmp_path, views="frontal_or_unstated")
    assert unstated.excluded == {"view_not_frontal": 3}
    assert [row.view for row in unstated.rows][2:5] == ["UNKNOWN", "", ""]
    every = collect("rexgradient", tmp_path, views="all")
    assert len(every.rows) == 11 and every.excluded == {}
    ages = {row.patient_id[-1]: (row.sex, row.age) for row in every.rows if row.age != "58"}
    assert ages == {"1": ("F", "59"), "2": ("M", "0"), "4": ("", ""), "6": ("F", "90")}


def test_odd_studies_of_rexgradient_are_counted(tmp_path: Path) -> None:
    repeated = rex_study(1, 1, ["PA"])
    studies = {
        "train": [
            repeated,
            {**repeated, "StudyInstanceUid": "1.2.9"},
            rex_study(2, 2, []),
            rex_study(3, 3, ["PA", "AP"], ImageViewPosition=["PA"]),
            rex_study(3, 12, ["PA"], ImageViewPosition=None),
            rex_study(4, 4, ["PA"]),
            rex_study(5, 5, ["PA"]),
            rex_study(6, 6, ["AP"], PatientAge="old", PatientSex="X"),
        ],
        "valid": [rex_study(5, 7, ["PA"]), rex_study(7, 8, ["PA"])],
        "test": [rex_study(4, 9, ["PA"]), rex_study(7, 10, ["PA"]), rex_study(8, 11, ["PA"])],
    }
    studies["test"][0].update(PatientSex=float("nan"), PatientAge=float("nan"))
    write_rexgradient(tmp_path, studies)
    lost = studies["test"][2]["ImagePath"][0].removeprefix("../")
    (tmp_path / lost).unlink()
    collected = collect("rexgradient", tmp_path)
    assert collected.excluded == {
        **{"repeated_image": 1, "study_without_image": 1, "view_not_stated": 3},
        **{"listed_but_not_there": 1, "patient_in_test": 2, "patient_in_val": 1},
    }
    kept = [(row.patient_id[-1], row.split) for row in collected.rows]
    assert kept == [("1", "train"), ("6", "train"), ("5", "val"), ("4", "test"), ("7", "test")]
    assert collected.notes == [
        "13 studies, 0 of them without impression and findings",
        "1 studies have more or fewer views than images: theirs count as not stated",
        "cells not read, so not stated: sex 1, age 1",
    ]


def test_rexgradient_names_what_is_missing_or_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "deid_png.part00").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"expected deid_png/ .*cat deid_png.part\* >"):
        collect("rexgradient", tmp_path)
    make_rexgradient(tmp_path)
    path = tmp_path / "metadata" / "valid_metadata_view_position.json"
    older = tmp_path / "metadata" / "valid_metadata.json"
    # the file that came first is read where there is no other
    path.rename(older)
    assert Counter(r.split for r in collect("rexgradient", tmp_path).rows)["val"] == 1
    path.write_text(older.read_text())
    older.write_text("[]")
    assert Counter(r.split for r in collect("rexgradient", tmp_path).rows)["val"] == 1
    older.unlink()
    whole = json.loads(path.read_text())
    key = next(iter(whole))
    for change in (
        {"PatientID": None},
        {"PatientID": ""},  # all that have none would be one patient
        {"StudyInstanceUid": 7},
        {"ImagePath": "['CANARY.png']"},
        {"ImagePath": [None]},
    ):
        path.write_text(json.dumps({key: {**whole[key], **change}}))
        with pytest.raises(DatasetError, match="valid.*json: entry 1: expected") as caught:
            collect("rexgradient", tmp_path)
        assert "CANARY" not in str(caught.value)
    for content, message in (
        ("[]", "expected an object with an entry a study"),
        ("{}", "expected an object with an entry a study"),
        ('{"CANARY', "is no JSON: expected an object with an entry"),
    ):
        path.write_text(content)
        with pytest.raises(DatasetError, match=f"valid_metadata.*{message}") as caught:
            collect("rexgradient", tmp_path)
        assert "CANARY" not in str(caught.value)
    away = {
        **whole[key],
        "ImagePath": ["../../elsewhere/deid_png/a.png"],
        "ImageViewPosition": ["PA"],
    }
    path.write_text(json.dumps({key: away}))
    with pytest.raises(DatasetError, match="valid.*: ImagePath: expected ../deid_png/<patient>"):
        collect("rexgradient", tmp_path)
    path.unlink()
    with pytest.raises(DatasetError, match="valid_metadata_view_position.json.*huggingface"):
        collect("rexgradient", tmp_path)


@pytest.mark.parametrize("metadata", ["", "metadata", "download/metadata"])
@pytest.mark.parametrize("images", ["", "images", "download"])
def test_rexgradient_is_found_by_how_it_was_unpacked(
    metadata: str, images: str, tmp_path: Path
) -> None:
    make_rexgradient(tmp_path / "made")
    for name, place in (("metadata", metadata), ("deid_png", images)):
        for path in [*(tmp_path / "made" / name).iterdir()]:
            folder = tmp_path / "root" / place / ("deid_png" if name == "deid_png" else "")
            folder.mkdir(parents=True, exist_ok=True)
            path.rename(folder / path.name)
    collected = collect("rexgradient", tmp_path / "root")
    assert len(collected.rows) == 5
    assert collected.rows[0].image.startswith(f"{images}/deid_png/GRDN".lstrip("/"))


READ = {
    # data.sections -> texts of train that the loader gives, most of them first
    "chexpert_plus": (
        make_chexpert_plus,
        {
            "all": ["1. Edema.", "1. Edema, as on 3/4/2001.", "LINES IN\nPLACE.\n2.NO EFFUSION."],
            "findings": ["LINES IN\nPLACE.\n2.NO EFFUSION.", "Clear lungs."],
        },
    ),
    "rexgradient": (
        make_rexgradient,
        {
            "all": ["No acute process.\n\nHeart is normal.", "Heart is large."],
            "findings": ["Heart is normal.", "Heart is large."],
        },
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_prepared_is_read_by_the_loader_section_by_section(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, texts = READ[name]
    make(tmp_path / "raw")
    out = tmp_path / "out"
    command = ["prepare", name, "--root", str(tmp_path / "raw"), "--out", str(out)]
    assert main([*command, "--workers", "1", "--side", "64"]) == 0
    said = capsys.readouterr().out
    assert " + refused 0 + lost 0" in said and "Licence: " in said
    assert "Edema" not in said and "acute" not in said
    for sections, expected in texts.items():
        settings = [*SETTINGS, f"data.manifest={out / 'manifest.parquet'}", "data.workers=1"]
        settings += [
            f"data.sections={sections}",
            f"run.dir={tmp_path / sections}",
            "batch.global_pairs=2",
        ]
        config = load([CONFIGS / "prepared.yaml"], settings)
        manifest = load_manifest(config.data)
        read = Counter(manifest.text(row) for row in manifest.rows("train").tolist())
        assert {text for text in read if text in expected} == set(expected)
        if name == "chexpert_plus" and sections == "all":
            # two films of one study are one pair; the study without a text is left out
            assert sum(read.values()) == 6 and manifest.excluded("train")["blank_report"] == 1
            first, second = np.flatnonzero(np.array(manifest.patient) == "patient00003")
            assert manifest.pair_id[first] == manifest.pair_id[second]
        loader = open_loader(config, open_corpus(config))
        try:
            batch = next(iter(loader))
        finally:
            loader.close()
        assert batch.image.shape == (2, 1, 96, 96) and bool(batch.token_mask.any())
