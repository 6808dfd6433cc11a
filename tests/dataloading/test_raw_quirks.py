"""What public downloads and the tables that people keep beside them look like when they are odd."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import pytest

from mlip.dataloading.datasets.rows import DatasetError, read_csv
from mlip.settings.config import ConfigError
from tests import raw_layouts
from tests.raw_layouts import by_id, collect, image, table

IMAGES = [f"id{i}" for i in range(10)]


def test_siim_takes_the_labelled_images_of_stage_1s_test_folder(tmp_path: Path) -> None:
    raw_layouts.make_siim(tmp_path, 2)
    (tmp_path / "stage_2_images").rename(tmp_path / "dicom-images-train")
    for i in (6, 9):
        folder = tmp_path / "dicom-images-test" / "1.2.3" / "1.2.4"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"1.2.276.{i}.dcm"
        (tmp_path / "dicom-images-train" / name).rename(folder / name)
    image(tmp_path / "stage_2_images" / "ID_0011fe81e.dcm")  # stage 2's own test: never labelled
    collected = collect("siim_pneumothorax", tmp_path)
    assert len(collected.rows) == 10 and collected.excluded == {"image_without_label": 1}
    assert by_id(collected)["1.2.276.9"].image.startswith("dicom-images-test/")


def test_open_i_finds_the_images_of_kaggles_copy(tmp_path: Path) -> None:
    (tmp_path / "ecgen-radiology").mkdir()
    ids = ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001", "CXR10_IM-0002-1001"]
    for study, images in (("CXR1", ids[:2]), ("CXR10", ids[2:])):
        parents = "".join(f'<parentImage id="{name}"/>' for name in images)
        text = f'<eCitation><uId id="{study}"/>{parents}</eCitation>'
        (tmp_path / "ecgen-radiology" / f"{study}.xml").write_text(text)
    copy = ["1_IM-0001-3001.dcm.png", "1_IM-0001-4001.dcm.png", "10_IM-0002-1001.dcm.png"]
    for name in copy:
        image(tmp_path / "images" / "images_normalized" / name)
    views = zip((1, 1, 10), copy, ("Lateral", "Frontal", "Frontal"), strict=True)
    table(tmp_path / "indiana_projections.csv", "uid,filename,projection", [list(v) for v in views])
    collected = collect("open_i", tmp_path)
    assert {row.image_id: row.view for row in collected.rows} == dict.fromkeys(ids[1:], "FRONTAL")
    assert collected.excluded == {"view_not_frontal": 1}
    assert {row.image_id for row in collect("open_i", tmp_path, views="all").rows} == set(ids)


def test_chexpert_in_batches_says_how_they_make_one_folder(tmp_path: Path) -> None:
    for name in ("1 (validate & csv)", "2 (train 1)"):
        (tmp_path / f"CheXpert-v1.0 batch {name}").mkdir()
    with pytest.raises(DatasetError, match="batch 1 into CheXpert-v1.0/ and the patients of the"):
        collect("chexpert", tmp_path)


@pytest.mark.parametrize("name", ["chexpert", "open_i", "mimic_cxr"])
def test_a_choice_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    # it used to mean "all": laterals among the frontal images
    with pytest.raises(ConfigError, match="views=Frontal: expected frontal or all"):
        collect(name, tmp_path, views="Frontal")


def test_a_table_of_patients_that_names_no_image_is_refused(tmp_path: Path) -> None:
    raw_layouts.make_rsna(tmp_path)
    file = tmp_path / "patients.csv"

    def write(rows: list[list[object]]) -> str:
        table(file, "image_id,patient_id", rows)
        return str(file)

    # the suffix of the file's name, which the challenge's ids leave out
    given = write([[f"{name}.dcm", "p0"] for name in IMAGES[:8]])
    collected = collect("rsna_pneumonia", tmp_path, patients=given)
    assert Counter(row.patient_id for row in collected.rows) == {"p0": 8, "id8": 1, "id9": 1}
    assert "patients of 8 images" in collected.notes[0] and "2 images are not" in collected.notes[0]
    with pytest.raises(DatasetError, match="names none of the 10 images"):
        collect("rsna_pneumonia", tmp_path, patients=write([["00000001_000.png", 1]]))
    with pytest.raises(DatasetError, match="one image_id has two patients"):
        collect("rsna_pneumonia", tmp_path, patients=write([["id1", 1], ["id1", 2]]))
    # each image behind an open quotation mark was a patient of its own, in any split
    file.write_text('image_id,patient_id\nid1,"p1\nid2,p1\nid3,p1\n')
    with pytest.raises(DatasetError, match="patients.csv: a quoted cell does not end"):
        collect("rsna_pneumonia", tmp_path, patients=str(file))


def test_split_lists_may_have_the_row_numbers_that_pandas_writes(tmp_path: Path) -> None:
    raw_layouts.make_rsna(tmp_path)
    lists = tmp_path / "lists"
    for name, ids in (("train", IMAGES[:6]), ("valid", IMAGES[6:8]), ("test", IMAGES[8:])):
        rows = [[7 * i, 0, image_id] for i, image_id in enumerate(ids)]
        table(lists / f"{name}.csv", ",Target,patientId", rows)
    collected = collect("rsna_pneumonia", tmp_path, split_lists=str(lists))
    assert Counter(row.split for row in collected.rows) == {"train": 6, "val": 2, "test": 2}


def test_a_split_list_whose_quote_stays_open_is_no_list_of_its_first_ids(tmp_path: Path) -> None:
    # all lines behind it were one id, of which no image is: they left the set without an error
    raw_layouts.make_rsna(tmp_path)
    lists = tmp_path / "lists"
    for name, ids in (("train", IMAGES[:6]), ("valid", IMAGES[6:8]), ("test", IMAGES[8:])):
        table(lists / f"{name}.csv", "patientId", [[image_id] for image_id in ids])
    path = lists / "train.csv"
    path.write_text(path.read_text().replace(IMAGES[2], f'"{IMAGES[2]}'))
    with pytest.raises(DatasetError, match="train.csv: a quoted cell does not end"):
        collect("rsna_pneumonia", tmp_path, split_lists=str(lists))


BROKEN = {
    "rsna_pneumonia": (raw_layouts.make_rsna, "stage_2_train_labels.csv", "id7,,,,,1\n"),
    "vindr_cxr": (
        raw_layouts.make_vindr,
        "annotations/annotations_test.csv",
        "test1,Nodule/Mass,1,2,nan,22\n",
    ),
    "nih_cxr14": (raw_layouts.make_nih, "BBox_List_2017.csv", "a.png,Mass,a,2,3,4,,,\n"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_box_that_is_no_numbers_is_named_by_its_file(name: str, tmp_path: Path) -> None:
    make, path, line = BROKEN[name]
    make(tmp_path)
    with (tmp_path / path).open("a") as file:
        file.write(line)
    with pytest.raises(DatasetError, match=f"{Path(path).name}: .*expected numbers"):
        collect(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "make", "path", "options"),
    [
        ("nih_cxr14", raw_layouts.make_nih, "test_list.txt", {}),
        ("covidx", raw_layouts.make_covidx, "train_COVIDx9A.txt", {}),
        ("rsna_pneumonia", raw_layouts.make_rsna, "lists/train.csv", {"split_lists": "lists"}),
    ],
)
def test_a_list_that_is_no_utf8_is_named(
    name: str, make: object, path: str, options: dict[str, str], tmp_path: Path
) -> None:
    assert callable(make)
    make(tmp_path)
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_bytes("id1\n".encode("utf-16"))
    options = {key: str(tmp_path / value) for key, value in options.items()}
    with pytest.raises(DatasetError, match=f"{Path(path).name}: is not UTF-8"):
        collect(name, tmp_path, **options)


@pytest.mark.parametrize("damage", ["cut off", "a bit", "another encoding"])
def test_a_packed_table_that_is_damaged_or_no_text_is_named(damage: str, tmp_path: Path) -> None:
    """zlib's error is none of the operating system's: it ended in a traceback."""
    path = tmp_path / "table.csv.gz"
    text = "name,note\n" + "".join(f"{i},{i * i * 7919 % 65_537}\n" for i in range(9000))
    packed = bytearray(gzip.compress(text.encode()))
    if damage == "cut off":
        packed = packed[: len(packed) // 2]
    elif damage == "a bit":
        packed[10] = 0xFF  # the kind of the first block, of which there is none
    else:
        packed = bytearray(gzip.compress((text + "\u00e4,1\n").encode("latin-1")))
    path.write_bytes(packed)
    told = "is not UTF-8 text" if damage == "another encoding" else "damaged; fetch the file again"
    with pytest.raises(DatasetError, match=rf"table\.csv\.gz: .*{told}"):
        list(read_csv(path, ["name"], "a set"))


def test_a_table_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"own\.csv: cannot be read: No such file"):
        list(read_csv(tmp_path / "own.csv", ["name"], "a set"))
