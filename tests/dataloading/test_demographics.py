"""Sex and age: what is read of the words of publishers and headers, and how it travels.

Oracles: the values that were put into tables and headers, by hand; for an older version's folder
the columns that it had.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pydicom
import pytest

from mlip.cli import main
from mlip.dataloading.datasets.rows import Row
from mlip.dataloading.demographics import PatientCells, age_between, differs, read_age, read_sex
from mlip.dataloading.dicom.radiograph import read_radiograph, write_radiograph
from mlip.dataloading.prepare import shard_build
from mlip.dataloading.prepare.shard_build import build_shards
from mlip.dataloading.prepare.shard_worker import ImageSettings
from tests.dataloading.shard_sources import contents, plan_for

BIRTH = "19540713"  # stands in no file that is written
OLD_MANIFEST = (  # of the versions before there were sex and age
    "image image_id patient_id study_id split view report labels uncertain negative boxes mask "
    "subset sha256 height width bits source_height source_width"
).split()


def film(path: Path, seed: int = 0, **tags: object) -> None:
    cells = np.random.default_rng(seed).integers(0, 65536, (48, 40)).astype(np.uint16)
    write_radiograph(path, cells, patient_id=f"MRN{seed}", study_id=f"ACC{seed}")
    dataset = pydicom.dcmread(path)
    for name, value in tags.items():
        if name == "PatientAge" and isinstance(value, int):
            dataset.add_new(name, "IS", value)  # not the kind that the standard wants
        elif isinstance(value, str) and name == "PatientAge":
            # as a sender would have written it: pydicom refuses what is no age string
            element = pydicom.DataElement(name, "AS", None)
            element._value = value
            dataset[name] = element
        else:
            setattr(dataset, name, value)
    dataset.save_as(path)


def prepared(out: Path) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(out / "manifest.parquet").to_pylist()


def prepare(root: Path, out: Path, *more: object) -> int:
    command = ["prepare", "folder", "--root", root, "--out", out, "--side", 32, "--workers", 1]
    return main([str(word) for word in (*command, "--keep-ids", *more)])


@pytest.mark.parametrize(
    ("text", "sex"),
    [
        *((word, "F") for word in ("F", "f", "Female", "FEMALE", " female ")),
        *((word, "M") for word in ("M", "m", "Male")),
        *((word, "O") for word in ("O", "Other")),
        *((word, "") for word in ("", " ", "U", "Unknown", "None", "nan", "N/A")),
        *((word, "") for word in ("NA", "null", "unk", "not stated")),
        *((word, None) for word in ("1", "Ms", "MALE 60", "F/M")),
    ],
)
def test_sex_is_one_of_three_letters_or_nothing(text: str, sex: str | None) -> None:
    assert read_sex(text) == sex


@pytest.mark.parametrize(
    ("sex", "words"),
    [
        ("F", "w|W|weiblich|Femenino|feminino|femminile|F\u00e9minin|mujer|femme"),
        ("M", "m\u00e4nnlich|ma\u0308nnlich|maennlich|MASCULINO|maschile|masculin|hombre|homme"),
        ("O", "d|divers"),
        (None, "H|x|frau doe"),
    ],
)
def test_sexes_are_read_in_the_words_of_other_departments(sex: str | None, words: str) -> None:
    assert {read_sex(word) for word in words.split("|")} == {sex}


def test_m_beside_h_may_be_mujer_and_is_no_man() -> None:
    """A Spanish list of H and M made men of all women. In a French one H stands beside F."""
    for column, expected in (
        (["H", "M", "h ", "F", None], ["M", "", "M", "F", ""]),
        (["H", "F"], ["M", "F"]),
        (["M", "F"], ["M", "F"]),
    ):
        cells = PatientCells(column)
        assert [cells.sex(cell or "") for cell in column] == expected
        unread = ["cells not read, so not stated: sex 1"] if "M" in column and "H" in column else []
        assert cells.notes() == unread


@pytest.mark.parametrize(
    ("text", "age"),
    [
        *(
            ("58", "58"),
            ("58.0", "58"),
            ("58.9", "58"),
            ("058Y", "58"),
            ("58 y", "58"),
            *(("58 years", "58"), ("58yrs.", "58"), ("58 Y/O", "58"), ("58yo", "58")),
            *(("18 months", "1"), ("18mo", "1"), ("1 year", "1"), ("9 days", "0")),
            (" 7 ", "7"),
        ),
        *(("003M", "0"), ("011M", "0"), ("018M", "1"), ("012W", "0"), ("104W", "2"), ("010D", "0")),
        *(("012M", "1"), ("051W", "0"), ("052W", "1"), ("364D", "0"), ("365D", "1")),
        *(("0", "0"), ("000Y", "0"), ("0.5", "0"), ("89", "89"), ("90", "90"), ("091Y", "90")),
        *(
            ("120", "90"),
            (">89", "90"),
            ("> 90", "90"),
            ("90+", "90"),
            ("90+ years", "90"),
            ("> 89 y/o.", "90"),
            (">88 years", None),  # of 89 or more nobody knows which
            ("90+ months", None),
            (">=90", "90"),
            ("", ""),
            ("nan", ""),
        ),
        *(("121", None), ("414Y", None), ("-3", None), ("old", None), ("58 or so", None)),
        *(
            ("1954", None),
            ("58Q", None),
            ("12 May", None),
            ("1 Dec", None),
            ("58 yes", None),
            ("\u0665\u0668", None),
        ),
    ],
)
def test_age_is_whole_years_and_all_over_89_are_one_class(text: str, age: str | None) -> None:
    assert read_age(text) == age


def test_two_sources_differ_from_two_years_on_and_where_both_tell() -> None:
    ages = [("58", "59"), ("59", "58"), ("58", "60"), ("60", "58"), ("58", ""), ("", "58")]
    assert [differs("age", *told) for told in ages] == [False, False, True, True, False, False]
    assert differs("sex", "F", "M") and not differs("sex", "F", "F")


def test_an_age_of_0_years_may_stand_for_a_gap_and_one_in_days_does_not() -> None:
    told = {text: read_age(text, zero_years="") for text in ("0", "0.0", "000Y", "003D", "0.4")}
    assert told == {"0": "", "0.0": "", "000Y": "", "003D": "0", "0.4": "0"}


@pytest.mark.parametrize(
    ("birth", "study", "age"),
    [
        ("19540713", "20140712", "59"),
        ("19540713", "20140713", "60"),
        ("1954-07-13", "2014.07.14", "60"),
        ("20000229", "20010228", "0"),
        ("1930", "20140915", "84"),
        ("1930.0", "20140915.0", "84"),
        ("19200101", "20140915", "90"),
        ("", "20140915", ""),
        ("19540713", "", ""),
        ("None", "20140915", ""),
        ("20150101", "20140915", None),
        ("18000101", "20140915", None),
        ("19000101", "20140915", None),  # a dummy
        ("1900", "20140915", None),
        ("19541350", "20140915", None),
        ("195407", "20140915", None),
        ("someday", "20140915", None),
    ],
)
def test_age_between_two_dates(birth: str, study: str, age: str | None) -> None:
    assert age_between(birth, study) == age


def test_what_cannot_be_read_is_counted_and_not_told() -> None:
    cells = PatientCells()
    assert [cells.sex(word) for word in ("F", "ZELDA", "")] == ["F", "", ""]
    assert cells.notes() == ["cells not read, so not stated: sex 1"]
    assert [cells.age("414Y"), cells.age_between("x", "y"), cells.age("5")] == ["", "", "5"]
    assert cells.notes() == ["cells not read, so not stated: sex 1, age 2"]
    assert PatientCells().notes() == []


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"PatientSex": "F", "PatientAge": "058Y"}, ("F", "58", set())),
        ({"PatientSex": "M", "PatientAge": "51"}, ("M", "51", set())),  # as RSNA and SIIM write
        ({"PatientAge": "094Y"}, ("", "90", set())),
        ({"PatientBirthDate": BIRTH, "StudyDate": "20140712"}, ("", "59", set())),
        (
            {"PatientAge": "031Y", "PatientBirthDate": BIRTH, "StudyDate": "20140712"},
            ("", "31", ()),
        ),
        (
            {"PatientAge": "000Y", "PatientBirthDate": BIRTH, "StudyDate": "20140712"},
            ("", "59", ()),
        ),
        ({"PatientAge": "148", "PatientBirthDate": BIRTH, "StudyDate": "20140712"}, ("", "59", ())),
        ({"PatientAge": "000Y"}, ("", "", set())),
        ({"PatientAge": "003D"}, ("", "0", set())),
        ({"PatientBirthDate": BIRTH}, ("", "", set())),
        ({"PatientAge": "148"}, ("", "", {"unread_age"})),
        ({"PatientSex": "X", "PatientAge": "CANARY"}, ("", "", {"unread_sex", "unread_age"})),
        ({"PatientBirthDate": "19000101", "StudyDate": "20140712"}, ("", "", {"unread_age"})),
        ({"PatientAge": 51}, ("", "51", set())),
        (
            {"PatientSex": ["M", "F"], "PatientAge": ["051Y", "052Y"]},
            ("", "", {"unread_sex", "unread_age"}),
        ),
        ({"PatientBirthDate": [BIRTH] * 2, "StudyDate": "20140712"}, ("", "", {"unread_age"})),
        ({}, ("", "", set())),
    ],
)
def test_a_header_tells_sex_and_age(
    tmp_path: Path, tags: dict[str, Any], expected: tuple[str, str, set[str]]
) -> None:
    film(tmp_path / "a.dcm", **tags)
    _, info = read_radiograph(tmp_path / "a.dcm")
    assert (info.sex, info.age, set(info.notes)) == (*expected[:2], set(expected[2]))
    assert BIRTH not in repr(info)


def test_the_header_speaks_where_the_table_does_not(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for i in range(4):
        film(tmp_path / "raw" / f"{i}.dcm", i, PatientSex="F", PatientAge="040Y")
    said = [("M", "30"), ("", ""), ("O", ""), ("", "0")]
    rows = [
        Row(f"{i}.dcm", f"p{i}", "", f"i{i}", "train", sex=sex, age=age)
        for i, (sex, age) in enumerate(said)
    ]
    build_shards(rows, plan_for(tmp_path))
    found = [(row["sex"], row["age"]) for row in prepared(tmp_path / "out")]
    assert found == [("M", "30"), ("F", "40"), ("O", "40"), ("F", "0")]


def test_prepare_writes_sex_and_age_beside_the_view_and_no_date(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "raw", tmp_path / "out"
    root.mkdir()
    film(root / "a.dcm", 0, PatientSex="F", PatientBirthDate=BIRTH, StudyDate="20140712")
    film(root / "b.dcm", 1, PatientSex="M", PatientAge="97")
    film(root / "c.dcm", 2, PatientSex="CANARY", PatientAge="CANARY")
    assert prepare(root, out) == 0
    told = capfd.readouterr()
    rows = {row["patient_id"]: (row["sex"], row["age"]) for row in prepared(out)}
    assert rows == {"MRN0": ("F", "59"), "MRN1": ("M", "90"), "MRN2": ("", "")}
    names = pyarrow.parquet.read_schema(out / "manifest.parquet").names
    assert names[names.index("view") :][:4] == ["view", "sex", "age", "report"]
    assert "noted, unread_age: 1 (" in told.out and "noted, unread_sex: 1 (" in told.out
    assert json.loads((out / "prepared.json").read_text())["settings"]["demographics"] is True
    for text in (told.out, told.err, *map(repr, contents(out).values())):
        assert BIRTH not in text and "CANARY" not in text


def test_without_demographics_a_folder_is_as_it_was_before_there_were_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "raw", tmp_path / "out"
    root.mkdir()
    film(root / "a.dcm", 0, PatientSex="F", PatientAge="051Y")
    film(root / "b.dcm", 1, PatientSex="CANARY", PatientAge="CANARY")
    assert prepare(root, out, "--no-demographics") == 0
    assert "unread" not in capsys.readouterr().out
    assert pyarrow.parquet.read_schema(out / "manifest.parquet").names == OLD_MANIFEST
    for path in (out / "index.parquet", *(out / "shards").glob("*.parquet")):
        table = pyarrow.parquet.read_table(path)
        assert not {"sex", "age"} & set(table.column_names)
        assert {note for notes in table["notes"].to_pylist() for note in notes} == set()
    assert "demographics" not in json.loads((out / "prepared.json").read_text())["settings"]


def test_a_folder_of_the_version_before_goes_on_without_or_is_remade(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = tmp_path / "raw", tmp_path / "out"
    root.mkdir()
    for i in range(4):
        film(root / f"{i}.dcm", i, PatientSex="F", PatientAge="051Y")
    small = ("--shard-images", 1)
    assert prepare(root, out, *small, "--no-demographics") == 0
    whole = contents(out)
    # what the version before leaves that is killed half-way
    settings = json.loads((out / "settings.json").read_text())
    assert settings.pop("demographics") is False
    (out / "settings.json").write_text(json.dumps(settings))
    for name in shard_build.OUTPUTS:
        (out / name).unlink()
    gone, *kept = sorted((out / "shards").glob("*.tar"))
    gone.unlink()
    before = {path: path.stat().st_mtime_ns for path in kept}
    capsys.readouterr()

    assert prepare(root, out, *small) == 2
    told = capsys.readouterr().err
    assert "demographics (there False, asked True)" in told and "--no-demographics" in told
    assert {path: path.stat().st_mtime_ns for path in kept} == before

    assert prepare(root, out, *small, "--no-demographics") == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    now = contents(out)
    assert now.keys() == whole.keys()
    assert [name for name in now if now[name] != whole[name]] == ["settings.json"]

    assert prepare(root, out, *small, "--overwrite") == 0
    assert [(row["sex"], row["age"]) for row in prepared(out)] == [("F", "51")] * 4
    capsys.readouterr()
    assert prepare(root, out, *small, "--no-demographics") == 2
    told = capsys.readouterr().err
    assert "demographics (there True, asked False)" in told
    assert "--no-demographics to go on" not in told


def test_a_run_that_was_stopped_ends_with_the_bytes_of_one_that_was_not(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    rows = []
    for i in range(6):
        film(tmp_path / "raw" / f"{i}.dcm", i, PatientSex="MF"[i % 2], PatientAge=f"0{30 + i}Y")
        rows.append(Row(f"{i}.dcm", f"p{i}", "", f"i{i}", "train"))
    settings = ImageSettings(side_px=32, codec="png")
    whole = plan_for(tmp_path, "whole", shard_images=2, settings=settings)
    build_shards(rows, whole)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    stopped = plan_for(tmp_path, "stopped", shard_images=2, settings=settings)
    with pytest.raises(KeyboardInterrupt):
        build_shards(rows, stopped, stop)
    assert len(list((stopped.out / "shards").glob("*.tar"))) == 1
    assert build_shards(rows, stopped).made == 2
    files = sorted(path.relative_to(whole.out) for path in whole.out.rglob("*.*"))
    assert [path.relative_to(stopped.out) for path in sorted(stopped.out.rglob("*.*"))] == files
    for name in files:
        assert (whole.out / name).read_bytes() == (stopped.out / name).read_bytes(), name
    assert [row["age"] for row in prepared(stopped.out)] == [str(30 + i) for i in range(6)]


def test_prepare_ends_with_what_evaluations_may_group_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table of splits is printed before a header is read: of DICOM files it knows no view."""
    root = tmp_path / "raw"
    root.mkdir()
    tags = ({"PatientSex": "F", "PatientAge": "058Y"}, {"PatientSex": "F"}, {"PatientSex": ""})
    for i, (view, own) in enumerate(zip(("PA", "PA", "AP"), tags, strict=True)):
        film(root / f"{i}.dcm", i, ViewPosition=view, **own)
    assert prepare(root, tmp_path / "out") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-5:-3] == ["view: PA 2, AP 1", "projections: PA 2, AP 1"]
    assert said[-3:-1] == ["sex: F 2, not stated 1", "age: stated for 1 of 3"]
    assert prepare(root, tmp_path / "without", "--no-demographics") == 0
    assert capsys.readouterr().out.splitlines()[-2] == "projections: PA 2, AP 1"


def test_a_column_has_h_however_it_is_written() -> None:
    cells = PatientCells([" h ", None, "m"])
    assert [cells.sex(cell) for cell in ("h", "M", "F")] == ["M", "", "F"]
