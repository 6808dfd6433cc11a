"""What collectors leave out and count, and whose split and label a row gets.

Oracle: the shares that each collector's docstring states; fakes of the published layouts.
"""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from mlip.dataloading.datasets import DATASETS
from mlip.dataloading.datasets.open_i import parse_report, read_reports
from mlip.dataloading.datasets.rows import Collected, DatasetError
from tests import raw_layouts, report_layouts
from tests.raw_layouts import by_id, collect, image, table

FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")


def make_siim(root: Path) -> None:
    raw_layouts.make_siim(root, 2)


def make_open_i(root: Path) -> None:
    (root / "ecgen-radiology").mkdir()
    image(root / "NLMCXR_png" / "CXR1_1_IM-0001-1001.png")
    for i, names in enumerate(([], ["CXR1_1_IM-0001-1001"], ["CXR2_1_IM-0002-1001"])):
        parents = "".join(f'<parentImage id="{name}"/>' for name in names)
        text = f'<eCitation><uId id="CXR{i}"/>{parents}</eCitation>'
        (root / "ecgen-radiology" / f"{i}.xml").write_text(text)


def make_mimic(root: Path, place: str, inside: str, image_id: str = "a") -> None:
    base = root / place / "2.0.0"
    folder = "files/p10/p10000000/s50000000"
    metadata = [[name, "10000000", "50000000", "PA"] for name in (image_id, "b")]
    image(base / folder / f"{image_id}.jpg")
    header = "dicom_id,subject_id,study_id,ViewPosition"
    table(base / "mimic-cxr-2.0.0-metadata.csv", header, metadata)
    listed = [[image_id, "50000000", "train"]]
    table(base / "mimic-cxr-2.0.0-split.csv", "dicom_id,study_id,split", listed)
    with zipfile.ZipFile(root / "mimic-cxr-reports.zip", "w") as archive:
        archive.writestr(f"{inside}{folder}.txt", "\n FINDINGS: Clear.\n")


def make_own(root: Path) -> None:
    for i in range(3):
        image(root / f"patient{i}" / "a.png", i)
    rows: list[list[object]] = [[f"patient{i}/a.png", f"p{i}", "Clear."] for i in range(3)]
    table(root / "manifest.csv", "image,patient_id,report", rows)


SHARES: dict[str, tuple[Callable[[Path], None], float, float]] = {  # share of val and of test
    "chexpert": (raw_layouts.make_chexpert, 5_000 / 223_414, 0.0),
    "chexpert_plus": (report_layouts.make_chexpert_plus, 5_000 / 223_414, 0.0),
    "covidx": (raw_layouts.make_covidx, 0.2, 0.0),
    "folder": (make_own, 0.1, 0.1),
    "manifest": (make_own, 0.1, 0.1),
    "nih_cxr14": (raw_layouts.make_nih, 0.1, 0.0),
    "object_cxr": (raw_layouts.make_object_cxr, 0.2, 0.0),
    "open_i": (make_open_i, 0.1, 0.1),
    "padchest": (raw_layouts.make_padchest, 0.1, 0.1),
    "rsna_pneumonia": (raw_layouts.make_rsna, 0.2, 0.2),
    "siim_pneumothorax": (make_siim, 0.15, 0.15),
    "vindr_cxr": (raw_layouts.make_vindr, 0.1, 0.0),
}


@pytest.mark.parametrize("name", SHARES)
def test_splits_by_hash_have_the_stated_shares(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, val, test = SHARES[name]
    make(tmp_path)

    def splits(share: float) -> Counter[str]:
        where = "mlip.dataloading.datasets.rows.patient_share"
        monkeypatch.setattr(where, lambda patient_id, salt: share)
        return Counter(row.split for row in collect(name, tmp_path).rows)

    official = splits(0.999)["test"]
    for share, split in ((test - 1e-4, "test"), (test, "val"), (val + test - 1e-4, "val")):
        found = splits(share)
        assert found.pop("test", 0) == official or split == "test", share
        assert set(found) == ({split} - {"test"}), share
    assert "val" not in splits(val + test + 1e-4)


def test_a_patient_keeps_its_split_from_one_release_to_the_next(tmp_path: Path) -> None:
    raw_layouts.make_rsna(tmp_path)
    digests = [hashlib.sha256(f"rsna\0id{i}".encode()).digest() for i in range(10)]
    shares = [int.from_bytes(digest[:7], "big") / 2**56 for digest in digests]
    wanted = ["test" if s < 0.2 else "val" if s < 0.4 else "train" for s in shares]
    rows = by_id(collect("rsna_pneumonia", tmp_path))
    assert [rows[f"id{i}"].split for i in range(10)] == wanted and len(set(wanted)) > 1


@pytest.mark.parametrize("name", ["siim_pneumothorax", "object_cxr"])
def test_an_image_in_no_list_is_left_out(name: str, tmp_path: Path) -> None:
    SHARES[name][0](tmp_path)
    ids = sorted(by_id(collect(name, tmp_path)))
    for split, chosen in (("train", ids[:6]), ("valid", ids[6:7]), ("test", ids[7:9])):
        table(tmp_path / "lists" / f"{split}.csv", "image_id", [[i] for i in chosen])
    collected = collect(name, tmp_path, split_lists=str(tmp_path / "lists"))
    assert Counter(row.split for row in collected.rows) == {"train": 6, "val": 1, "test": 2}
    assert collected.excluded == {"not_in_split_lists": 1}
    assert "split lists: 9 ids, SHA-256" in collected.notes[0]


@pytest.mark.parametrize(
    ("place", "inside"),
    [("mimic-cxr-jpg", "mimic-cxr-reports/"), ("physionet.org/files/mimic-cxr-jpg", "")],
)
def test_mimic_reads_either_archive_and_the_newest_release(
    tmp_path: Path, place: str, inside: str
) -> None:
    make_mimic(tmp_path, place, inside)
    collected = collect("mimic_cxr", tmp_path)
    assert [row.report for row in collected.rows] == ["FINDINGS: Clear."]
    assert collected.excluded == {"not_in_split_file": 1}
    (tmp_path / place / "2.0.0").rename(tmp_path / place / "2.1.0")
    make_mimic(tmp_path, place, inside, image_id="old")
    assert [row.image_id for row in collect("mimic_cxr", tmp_path).rows] == ["a"]


def test_open_i_counts_what_it_leaves_out(tmp_path: Path) -> None:
    make_open_i(tmp_path)
    collected = collect("open_i", tmp_path)
    assert collected.excluded == {"report_without_image": 1, "listed_but_not_there": 1}
    assert len(collected.rows) == 1 and collected.notes[0] == "3 reports"
    assert "not told apart" in collected.notes[1]
    study = b'<eCitation><uId id="CXR1"/></eCitation>'
    assert parse_report(study, "a.xml").study_id == "CXR1"
    with pytest.raises(DatasetError, match=r"^a\.xml: declares a document type"):
        parse_report(b"<!DOCTYPE eCitation>" + study, "a.xml")
    # each read with all within it took 20 s a file of 0.9 MB
    nested = study.replace(b"</e", b"<AbstractText>x" * 65 + b"</AbstractText>" * 65 + b"</e")
    with pytest.raises(DatasetError, match=r"^a\.xml: has 65 sections"):
        parse_report(nested, "a.xml")


@pytest.mark.parametrize("kind", ["large header", "many headers", "large member", "many members"])
def test_an_open_i_archive_that_unpacks_to_more_than_it_should_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A further header of some kB was taken whole into memory, as many GB as it stated."""
    monkeypatch.setattr("mlip.dataloading.datasets.open_i._MAX_TOTAL_BYTES", 4 << 20)
    monkeypatch.setattr("mlip.dataloading.datasets.open_i._MAX_MEMBERS", 3)
    size = (8 << 20) if kind.startswith("large") else 512
    member = tarfile.TarInfo("a.txt")
    member.type = tarfile.XHDTYPE if kind.endswith("header") else tarfile.REGTYPE
    member.type = tarfile.GNUTYPE_LONGNAME if kind == "many headers" else member.type
    member.size = size
    count = {"many headers": 3000, "many members": 9}.get(kind, 1)
    with gzip.open(tmp_path / "NLMCXR_reports.tgz", "wb") as file:
        file.write((member.tobuf() + bytes(size)) * count)
        file.write(bytes(1024))
    told = r"damaged \(" if kind == "many headers" else "more or larger members"
    with pytest.raises(DatasetError, match=f"NLMCXR_reports.tgz: {told}"):
        list(read_reports(tmp_path))


def test_labels_without_boxes_and_boxes_without_labels(tmp_path: Path) -> None:
    raw_layouts.make_object_cxr(tmp_path / "object")
    rows = by_id(collect("object_cxr", tmp_path / "object"))
    assert (rows["train1.jpg"].labels, rows["train1.jpg"].negative) == ("Foreign Object", "")
    assert (rows["train0.jpg"].labels, rows["train0.jpg"].negative) == ("", "Foreign Object")
    raw_layouts.make_nih(tmp_path / "nih")
    (tmp_path / "nih" / "BBox_List_2017.csv").unlink()  # not all copies have it
    rows = by_id(collect("nih_cxr14", tmp_path / "nih"))
    assert {row.boxes for row in rows.values()} == {""} and len(rows) == 9


@pytest.mark.parametrize(
    ("name", "path", "line", "message"),
    [
        ("rsna_pneumonia", "stage_2_train_labels.csv", "id7,,,,,2", "Target: expected 0 or 1"),
        (
            "vindr_cxr",
            "annotations/image_labels_test.csv",
            "test1,2,0,0",
            "column Nodule/Mass: expected 0 or 1",
        ),
        (
            "nih_cxr14",
            "Data_Entry_2017_v2020.csv",
            "00000000_000.png,Masses,0,0,60,M,PA,2500,2048,0.1,0.1",
            "unknown finding 'Masses'",
        ),
    ],
)
def test_a_label_that_is_none_is_refused(
    name: str, path: str, line: str, message: str, tmp_path: Path
) -> None:
    SHARES[name][0](tmp_path)
    with (tmp_path / path).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DatasetError, match=message):
        collect(name, tmp_path)


def test_the_rule_of_5x200_takes_200_of_each_in_an_order_of_its_own(tmp_path: Path) -> None:
    lines = []
    for i, _ in enumerate(FIVE * 201):
        path = f"CheXpert-v1.0/train/patient{i:05d}/study1/view1_frontal.jpg"
        states = ["1.0" if i % 5 == k else "" for k in range(5)]
        lines.append([path, "Frontal", "AP", *states, ""])
    several = ["1.0", "1.0", "", "", "", ""]
    doubtful = ["1.0", "", "", "", "", "-1.0"]
    for i, states in enumerate((several, doubtful)):
        path = f"CheXpert-v1.0/train/patient9{i:04d}/study1/view1_frontal.jpg"
        lines.append([path, "Frontal", "AP", *states])
    header = f"Path,Frontal/Lateral,AP/PA,{','.join(FIVE)},Pneumonia"
    table(tmp_path / "valid.csv", header, [])

    def collected(rows: list[list[str]]) -> Collected:
        table(tmp_path / "train.csv", header, [list(row) for row in rows])
        options = {"views": "frontal", "five_by_200": "rule"}
        return DATASETS["chexpert"].collect(tmp_path, options)

    forward, backward = collected(lines), collected(lines[::-1])
    chosen = [row for row in forward.rows if row.subset == "5x200"]
    assert Counter(row.labels for row in chosen) == dict.fromkeys(FIVE, 200)
    assert {row.split for row in chosen} == {"test"}
    assert {row.view for row in forward.rows} == {"AP"}
    assert {r.image for r in chosen} == {r.image for r in backward.rows if r.subset == "5x200"}
    digest = hashlib.sha256("\n".join(sorted(row.image for row in chosen)).encode()).hexdigest()
    note = f"5x200 by rule: 1000 images, SHA-256 of the sorted list {digest}"
    assert forward.notes == backward.notes == [note]
    # by hash of the path, not by its name: else the last patients would always be left
    left = {row.image for row in forward.rows} - {row.image for row in chosen}
    ends = {line[0].split("/", 1)[1] for line in lines[-7:]}
    assert len(left) == 7 and left != ends
