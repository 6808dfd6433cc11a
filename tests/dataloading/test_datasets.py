"""Each data set's collector on a ten-row fake of its publisher's exact layout.

Oracle: the fakes are written here from the published layouts, and what must come out of each is
stated beside it by hand. The Open-i archive and ../shared/data are the real ones.
"""

import io
import json
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mlip.dataloading.datasets.covidx import parse_line
from mlip.dataloading.datasets.mimic_cxr import report_sections
from mlip.dataloading.datasets.object_cxr import parse_annotation
from mlip.dataloading.datasets.open_i import plain_name, read_reports
from mlip.dataloading.datasets.rle import decode_masks
from mlip.dataloading.datasets.rows import DatasetError
from mlip.dataloading.datasets.sections import joined_report
from mlip.settings.config import ConfigError
from tests.raw_layouts import (
    REPORT,
    by_id,
    collect,
    encode_mask,
    image,
    make_chexpert,
    make_covidx,
    make_mimic,
    make_ms_cxr,
    make_nih,
    make_object_cxr,
    make_padchest,
    make_rsna,
    make_siim,
    make_vindr,
    table,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")


@pytest.mark.parametrize("suffix, zipped", [("jpg", True), ("dcm", False)])
def test_mimic_cxr(tmp_path, suffix, zipped):
    make_mimic(tmp_path, suffix, zipped)
    collected = collect("mimic_cxr", tmp_path, files=suffix)
    rows = by_id(collected)
    assert len(rows) == 9 and collected.excluded == {"view_not_frontal": 1}
    assert Counter(row.split for row in rows.values()) == {"train": 5, "val": 2, "test": 2}
    first = rows["00000000-aaaa"]
    assert (first.patient_id, first.study_id, first.view) == ("10000000", "50000000", "AP")
    assert (first.labels, first.uncertain, first.negative) == ("Edema", "Pneumonia", "Fracture")
    # the impression first: what a long report loses at data.max_tokens is the end of its findings
    expected = (
        "IMPRESSION: No acute process.\nFINDINGS: Heart size is normal. No effusion of 1.5 cm."
    )
    assert first.report == expected and rows["00000005-aaaa"].report == ""
    sectioned = collected.files["mimic_cxr_sectioned.csv"]
    assert sectioned[0] == ["study", "impression", "findings", "last_paragraph", "comparison"]
    assert sectioned[1][0] == "s50000000" and len(sectioned) == 10
    assert len(collect("mimic_cxr", tmp_path, files=suffix, views="all").rows) == 10


def test_ms_cxr_boxes_are_test_and_their_patients_leave_training(tmp_path):
    make_mimic(tmp_path)
    listed = make_ms_cxr(tmp_path / "MS_CXR_Local_Alignment_v1.1.0.csv")
    collected = collect("mimic_cxr", tmp_path, ms_cxr=str(listed))
    rows = by_id(collected)
    row = rows["00000000-aaaa"]
    assert (row.split, row.subset) == ("test", "ms_cxr")
    assert json.loads(row.boxes) == [
        [2.0, 6.0, 30.0, 20.0, "Pleural Effusion", "small left effusion"],
        [40.0, 30.0, 10.0, 20.0, "Pleural Effusion", "small left effusion"],
        [5.0, 5.0, 9.0, 9.0, "Edema", "mild edema"],
    ]
    # 0 and 1 are one patient's, 8 and 9 another's, who was in test before
    assert "00000001-aaaa" not in rows and collected.excluded["other_image_of_ms_cxr_patient"] == 1
    assert rows["00000008-aaaa"].subset == "ms_cxr" and rows["00000009-aaaa"].split == "test"
    assert {row.subset for row in rows.values()} == {"", "ms_cxr"}
    assert "MS-CXR: boxes of 2 images" in collected.notes[1] and "1 others" in collected.notes[1]
    listed.write_text(listed.read_text().replace("40", "forty"))
    with pytest.raises(DatasetError, match="MS_CXR.*x, y, w, h: expected numbers"):
        collect("mimic_cxr", tmp_path, ms_cxr=str(listed))
    with pytest.raises(DatasetError, match="none.csv: no such file. It is part of MS-CXR"):
        collect("mimic_cxr", tmp_path, ms_cxr=str(tmp_path / "none.csv"))
    listed.write_text(make_ms_cxr(listed).read_text().replace("-aaaa", "-AAAA"))
    with pytest.raises(DatasetError, match="MS_CXR.*names no image of .*metadata.csv"):
        collect("mimic_cxr", tmp_path, ms_cxr=str(listed))


def test_mimic_cxr_names_what_is_missing_and_where_it_comes_from(tmp_path):
    with pytest.raises(DatasetError, match="metadata.csv.*physionet.org/content/mimic-cxr-jpg"):
        collect("mimic_cxr", tmp_path)
    make_mimic(tmp_path)
    (tmp_path / "mimic-cxr-reports.zip").write_bytes(b"no zip")
    with pytest.raises(DatasetError, match="fetch it again"):
        collect("mimic_cxr", tmp_path)
    (tmp_path / "mimic-cxr-reports.zip").unlink()
    with pytest.raises(DatasetError, match="mimic-cxr-reports.zip of https://physionet.org"):
        collect("mimic_cxr", tmp_path)
    base = tmp_path / "physionet.org" / "files" / "mimic-cxr-jpg" / "2.1.0"
    make_mimic(tmp_path)
    assert not any("no labels" in note for note in collect("mimic_cxr", tmp_path).notes)
    (base / "mimic-cxr-2.0.0-chexpert.csv.gz").unlink()
    assert (
        "no mimic-cxr-2.0.0-chexpert.csv(.gz) beside the metadata: no labels"
        in collect("mimic_cxr", tmp_path).notes
    )
    (base / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    with pytest.raises(DatasetError, match="split.csv.gz or mimic-cxr-2.0.0-split.csv"):
        collect("mimic_cxr", tmp_path)


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            REPORT,
            {
                "findings": "Heart size is normal. No effusion of 1.5 cm.",
                "impression": "No acute process.",
                "comparison": "___.",
            },
        ),
        ("\n CONCLUSION: Clear.\n", {"impression": "Clear."}),
        ("\n FINDINGS AND IMPRESSION: Clear.\n", {"impression": "Clear."}),
        ("\n CHEST, PA AND LATERAL: Clear.\n", {"findings": "Clear."}),
        ("\n IMPRESSION: First.\n IMPRESSION: Second.\n", {"impression": "Second."}),
        ("\n IMPRESSION: \n\n FINDINGS: Kept.\n", {"findings": "Kept."}),
        (
            "\n HISTORY: Cough.\n\n Portable view shows\n clear lungs.\n",
            {"last_paragraph": "Portable view shows clear lungs."},
        ),
        ("No header at all.\n\n Lungs are clear.", {"last_paragraph": "Lungs are clear."}),
        (
            "\n IMPRESSION: Ratio 1:2 at 10:30, NOTE: stays.\n",
            {"impression": "Ratio 1:2 at 10:30, NOTE: stays."},
        ),
        ("", {}),
    ],
)
def test_report_sections(text, expected):
    sections = report_sections(text)
    assert {name: body for name, body in sections.items() if body} == expected
    joined = joined_report(sections["impression"], sections["findings"])
    assert all(
        body in joined for name, body in expected.items() if name in ("findings", "impression")
    )


def test_chexpert(tmp_path):
    make_chexpert(tmp_path)
    collected = collect("chexpert", tmp_path)
    rows = by_id(collected)
    assert len(rows) == 9 and collected.excluded == {"view_not_frontal": 1}
    first = rows["train/patient00000/study0/view1_frontal.jpg"]
    assert (
        first.image.startswith("CheXpert-v1.0/train/") and first.study_id == "patient00000/study0"
    )
    assert (first.labels, first.uncertain, first.negative) == (
        "Atelectasis",
        "Pneumonia",
        "Support Devices",
    )
    assert {row.split for row in rows.values() if row.subset == "valid"} == {"test"}
    assert sum(row.subset == "valid" for row in rows.values()) == 2
    assert len(collect("chexpert", tmp_path / "CheXpert-v1.0", views="all").rows) == 10


def test_chexpert_5x200_list_leaves_no_image_of_its_patients_in_training(tmp_path):
    make_chexpert(tmp_path)
    listed = ["CheXpert-v1.0/train/patient00001/study2/view1_frontal.jpg"]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    collected = collect("chexpert", tmp_path, five_by_200=str(tmp_path / "list.json"))
    rows = [row for row in collected.rows if row.patient_id == "patient00001"]
    assert [(row.split, row.subset) for row in rows] == [("test", "5x200")]
    assert collected.excluded["other_image_of_5x200_patient"] == 1
    assert "SHA-256" in collected.notes[0]
    (tmp_path / "list.csv").write_text("Path\nCheXpert-v1.0/train/patient00009/study2/x/a.jpg\n")
    with pytest.raises(DatasetError, match="1 of 1 paths"):
        collect("chexpert", tmp_path, five_by_200=str(tmp_path / "list.csv"))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(DatasetError, match="deep.json: expected JSON with paths"):
        collect("chexpert", tmp_path, five_by_200=str(tmp_path / "deep.json"))
    with pytest.raises(DatasetError, match="only . images show"):
        collect("chexpert", tmp_path, five_by_200="rule")


def test_rsna_pneumonia(tmp_path):
    make_rsna(tmp_path)
    rows = by_id(collect("rsna_pneumonia", tmp_path))
    assert len(rows) == 10
    assert json.loads(rows["id2"].boxes) == [
        [0.0, 20.0, 30.0, 40.5, "Lung Opacity"],
        [10.0, 20.0, 30.0, 40.5, "Lung Opacity"],
    ]
    assert rows["id2"].labels == "Pneumonia" and rows["id0"].negative == "Pneumonia"
    lists = tmp_path / "lists"
    for name, ids in (("train", "012345"), ("validation", "67"), ("test", "8")):
        table(lists / f"{name}.csv", "ID", [[f"id{i}"] for i in ids])
    collected = collect("rsna_pneumonia", tmp_path, split_lists=str(lists))
    assert Counter(row.split for row in collected.rows) == {"train": 6, "val": 2, "test": 1}
    assert collected.excluded == {"not_in_split_lists": 1} and "SHA-256" in collected.notes[0]
    table(tmp_path / "patients.csv", "image_id,patient_id", [[f"id{i}", "same"] for i in range(10)])
    one = collect("rsna_pneumonia", tmp_path, patients=str(tmp_path / "patients.csv"))
    assert len({row.split for row in one.rows}) == 1


@pytest.mark.parametrize("stage", [1, 2])
def test_siim_pneumothorax_groups_masks_by_image_in_both_stages(tmp_path, stage):
    make_siim(tmp_path, stage)
    collected = collect("siim_pneumothorax", tmp_path)
    rows = by_id(collected)
    assert len(rows) == 10 and collected.excluded == {}
    assert rows["1.2.276.0"].mask == "" and rows["1.2.276.0"].negative == "Pneumothorax"
    assert rows["1.2.276.9"].mask == "5 3|100 7" and rows["1.2.276.9"].labels == "Pneumothorax"
    (tmp_path / rows["1.2.276.4"].image).unlink()
    assert collect("siim_pneumothorax", tmp_path).excluded == {"label_without_image": 1}
    shutil.rmtree(tmp_path / ("dicom-images-train" if stage == 1 else "stage_2_images"))
    with pytest.raises(DatasetError, match="kaggle.com/c/siim-acr"):
        collect("siim_pneumothorax", tmp_path)


def test_run_lengths_go_down_the_columns_and_come_back():
    mask = decode_masks("5 3 1 2", 4, 4)
    expected = np.zeros((4, 4), np.uint8)
    for position in (5, 6, 7, 9, 10):  # 5..7, then one on from 8
        expected[position % 4, position // 4] = 1
    np.testing.assert_array_equal(mask, expected)
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (7, 5), (64, 48)):
        for density in (0.0, 0.3, 1.0):
            mask = (rng.random(shape) < density).astype(np.uint8)
            np.testing.assert_array_equal(decode_masks(encode_mask(mask), *shape), mask)
    both = decode_masks("0 2|1 3", 4, 1)
    assert both.reshape(-1).tolist() == [1, 1, 1, 1]
    for bad in ("5", "14 3", "-2 4"):
        with pytest.raises(ValueError, match="run lengths"):
            decode_masks(bad, 4, 4)


def test_object_cxr(tmp_path):
    make_object_cxr(tmp_path)
    rows = by_id(collect("object_cxr", tmp_path))
    assert len(rows) == 10 and {rows[f"dev{i}.jpg"].split for i in range(3)} == {"test"}
    assert "test" not in {rows[f"train{i}.jpg"].split for i in range(7)}
    assert json.loads(rows["train1.jpg"].boxes) == [
        [10.0, 20.0, 20.0, 40.0, "rectangle"],
        [1.0, 1.0, 4.0, 8.0, "polygon"],
    ]
    assert rows["dev0.jpg"].negative == "Foreign Object"
    for bad in ("3 1 2 3 4", "0 1 2 3", "0", "0 a 2 3 4"):
        with pytest.raises(ValueError, match="annotation"):
            parse_annotation(bad)


def test_covidx_keeps_a_test_patient_out_of_training(tmp_path):
    make_covidx(tmp_path)
    collected = collect("covidx", tmp_path)
    rows = by_id(collected)
    assert len(rows) == 9 and collected.excluded == {"patient_in_test": 1}
    assert rows["train/a 2 (copy).jpg"].labels == "COVID-19"
    assert rows["test/a9.png"].split == "test" and rows["test/a8.png"].patient_id == "rsna:p1"
    assert parse_line("12 my file .png normal cohen") == ("12", "my file .png", "normal", "cohen")
    (tmp_path / "train_COVIDx9A.txt").write_text("1 a1.png positive rsna\n")
    with pytest.raises(DatasetError, match="line 1"):
        collect("covidx", tmp_path)


def test_nih_cxr14(tmp_path):
    make_nih(tmp_path)
    collected = collect("nih_cxr14", tmp_path)
    rows = by_id(collected)
    assert len(rows) == 9 and collected.excluded == {"not_in_split_lists": 1}
    assert rows["00000000_000.png"].labels == "Mass|Pleural_Thickening"
    assert json.loads(rows["00000000_000.png"].boxes) == [[1.5, 2.5, 3.5, 4.5, "Infiltration"]]
    assert (
        rows["00000000_001.png"].labels == ""
        and len(rows["00000000_001.png"].negative.split("|")) == 14
    )
    boxes = tmp_path / "BBox_List_2017.csv"
    assert boxes.read_text().startswith("Image Index,Finding Label,Bbox [x,y,w,h],,,\n")
    boxes.write_text(boxes.read_text().replace("Bbox [x,y,w,h]", '"Bbox [x,y,w,h]"'))
    lines = boxes.read_text().splitlines()
    boxes.write_text("\n".join([lines[0], lines[1].removesuffix(",,,")]))
    with pytest.raises(DatasetError, match="without quotation marks"):
        collect("nih_cxr14", tmp_path)
    boxes.unlink()
    assert not any("no boxes" in note for note in collected.notes)
    assert "no BBox_List_2017.csv in the root: no boxes" in collect("nih_cxr14", tmp_path).notes
    listed = (tmp_path / "test_list.txt").read_text().split()
    assert len(listed) == 3 and {rows[name].split for name in listed} == {"test"}
    (tmp_path / "test_list.txt").unlink()
    with pytest.raises(DatasetError, match="test_list.txt.*nihcc.app.box.com"):
        collect("nih_cxr14", tmp_path)


def test_padchest(tmp_path):
    make_padchest(tmp_path)
    collected = collect("padchest", tmp_path)
    rows = {row.image_id.partition("_")[0]: row for row in collected.rows}
    assert len(rows) == 9 and collected.excluded == {"excluded_by_publisher": 1}
    assert rows["21680"].labels == "pleural effusion|cardiomegaly"
    assert rows["21680"].image == "0/21680_02-094-100.png" and rows["21680"].report == ""
    assert (rows["21683"].labels, rows["21683"].view) == ("pneumonia|cardiomegaly", "AP_horizontal")
    # unchanged says nothing of what is there, blank neither; unchanged from normal is normal
    found = [rows[name].labels for name in ("21681", "21682", "21684", "21687")]
    assert found == ["normal", "", "normal", ""]
    assert [rows[name].subset for name in ("21685", "21686")] == ["physician", ""]
    assert "by physicians: 6 images, by a network: 3; of all, 2 name" in collected.notes[0]
    stems = collect("padchest", tmp_path, report="stems")
    assert {row.report for row in stems.rows} == {"derram pleural ."}
    with pytest.raises(ConfigError, match="split=official: expected hash or physician"):
        collect("padchest", tmp_path, split="official")


def test_padchest_keeps_what_physicians_labelled_as_test_and_its_patients_out_of_training(tmp_path):
    make_padchest(tmp_path)
    collected = collect("padchest", tmp_path, split="physician")
    split = {row.image_id.partition("_")[0]: row.split for row in collected.rows}
    assert [split[f"2168{i}"] for i in range(6)] == ["test"] * 6
    # 7, 8 and 9 are patient 5's, too
    assert set(split) == {f"2168{i}" for i in range(7)} and split["21686"] != "test"
    assert collected.excluded["other_image_of_test_patient"] == 2


def test_padchest_leaves_out_what_is_wrong_of_its_own_and_says_what_is_no_list(tmp_path):
    make_padchest(tmp_path)
    path = tmp_path / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
    whole = path.read_text()
    (tmp_path / "0" / "21680_02-094-100.png").unlink()
    (tmp_path / "1" / "21681_02-094-101.png").rename(tmp_path / "21681_02-094-101.png")
    lines = whole.splitlines()
    lines[3] = lines[3].replace("MONOCHROME2", "MONOCHROME1")
    lines[4] = lines[4].replace("AP_horizontal", "L")
    lines[5] = lines[5].replace("8394", "")
    path.write_text("\n".join(lines))
    collected = collect("padchest", tmp_path)
    assert collected.excluded == {
        **{"listed_but_not_there": 1, "monochrome1": 1, "view_not_frontal": 1},
        **{"no_patient": 1, "excluded_by_publisher": 1},
    }
    assert "21681_02-094-101.png" in {row.image for row in collected.rows}
    assert len(collect("padchest", tmp_path, views="all").rows) == len(collected.rows) + 1
    for cell in ("normal", "['normal'", "[normal]"):
        path.write_text(whole.replace("['unchanged']", cell))
        with pytest.raises(DatasetError, match="column Labels of image 2168.*: expected a list as"):
            collect("padchest", tmp_path)
    path.write_text(whole.replace("['unchanged']", "\"['scoliosis', nan]\""))  # of pandas, no text
    assert "scoliosis" in {row.labels for row in collect("padchest", tmp_path).rows}
    path.unlink()
    with pytest.raises(DatasetError, match="bimcv.cipf.es"):
        collect("padchest", tmp_path)


def test_vindr_cxr(tmp_path):
    make_vindr(tmp_path)
    rows = by_id(collect("vindr_cxr", tmp_path))
    assert len(rows) == 10 and {rows[f"test{i}"].split for i in range(3)} == {"test"}
    row = rows["train1"]
    assert (row.labels, row.uncertain, row.negative) == ("Nodule/Mass", "Edema", "Other")
    assert json.loads(row.boxes) == [[1.0, 2.0, 10.0, 20.0, "Nodule/Mass"]]
    assert rows["train0"].boxes == ""


XML = """<?xml version="1.0" encoding="utf-8"?>
<eCitation><uId id="CXR{i}"/><MedlineCitation><Article><Abstract>
<AbstractText Label="FINDINGS">Heart {i} is normal.</AbstractText>
<AbstractText Label="IMPRESSION">{impression}</AbstractText>
</Abstract></Article></MedlineCitation>
<MeSH><major>Lung/hypoinflation</major><major>Lung/left</major><major>normal</major></MeSH>
<parentImage id="CXR{i}_1_IM-{i:04d}-1001"/><parentImage id="CXR{i}_1_IM-{i:04d}-2001"/></eCitation>
"""


def test_open_i(tmp_path):
    (tmp_path / "ecgen-radiology").mkdir()
    projections = []
    for i in range(5):
        text = XML.format(i=i, impression="" if i == 2 else "Clear & dry.".replace("&", "&amp;"))
        (tmp_path / "ecgen-radiology" / f"{i}.xml").write_text(text)
        for k, view in ((1, "Frontal"), (2, "Lateral")):
            image(tmp_path / "NLMCXR_png" / f"CXR{i}_1_IM-{i:04d}-{k}001.png", i)
            projections.append([i, f"{i}_1_IM-{i:04d}-{k}001.dcm.png", view])
    assert len(collect("open_i", tmp_path).rows) == 10
    table(tmp_path / "indiana_projections.csv", "uid,filename,projection", projections)
    collected = collect("open_i", tmp_path)
    rows = by_id(collected)
    assert len(rows) == 5 and collected.excluded == {"view_not_frontal": 5}
    row = rows["CXR1_1_IM-0001-1001"]
    assert row.report == "FINDINGS: Heart 1 is normal.\nIMPRESSION: Clear & dry."
    assert (row.patient_id, row.view, row.labels) == ("CXR1", "FRONTAL", "Lung|normal")
    assert rows["CXR2_1_IM-0002-1001"].report == "FINDINGS: Heart 2 is normal."
    bomb = b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><eCitation/>'
    for bad in (bomb, bomb.decode().encode("utf-16"), b"<open", b"<eCitation/>"):
        (tmp_path / "ecgen-radiology" / "3.xml").write_bytes(bad)
        with pytest.raises(DatasetError, match=r"ecgen-radiology/3\.xml: "):
            list(read_reports(tmp_path))


@needs_shared
def test_open_i_reads_the_real_archive():
    reports = list(read_reports(SHARED / "text"))
    # 3,955 reports and 7,470 images: Demner-Fushman et al., JAMIA 2016
    assert len(reports) == 3955 and len({report.study_id for report in reports}) == 3955
    images = [name for report in reports for name in report.images]
    assert len(images) == len({plain_name(name) for name in images}) == 7470
    assert sum(bool(report.findings or report.impression) for report in reports) == 3927
    first = next(report for report in reports if report.study_id == "CXR1")
    assert first.impression == "Normal chest x-XXXX." and first.mesh == ("normal",)


def test_hostile_archives_are_read_by_name_and_within_limits(tmp_path, monkeypatch):
    for name in ("normal", "link", "large", "many"):
        with tarfile.open(tmp_path / f"{name}.tgz", "w:gz") as archive:

            def add(path: str, content: bytes, archive: tarfile.TarFile = archive) -> None:
                member = tarfile.TarInfo(path)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))

            add(
                "../../escape.xml" if name == "link" else "a.xml",
                XML.format(i=1, impression="x").encode(),
            )
            if name == "link":
                member = tarfile.TarInfo("b.xml")
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(member)
            if name == "large":
                add("b.xml", b" " * (2 << 20))
            if name == "many":
                for i in range(60):
                    add(f"{i}.txt", b"")
    monkeypatch.setattr("mlip.dataloading.datasets.open_i._MAX_MEMBERS", 50)

    def read(name: str) -> int:
        folder = tmp_path / f"root_{name}"
        folder.mkdir()
        shutil.move(tmp_path / f"{name}.tgz", folder / "NLMCXR_reports.tgz")
        return len(list(read_reports(folder)))

    assert read("normal") == read("link") == 1  # nothing is unpacked, a link is no report
    for name in ("large", "many"):
        with pytest.raises(DatasetError, match="bytes|more or larger"):
            read(name)
    assert not (tmp_path.parent / "escape.xml").exists()
