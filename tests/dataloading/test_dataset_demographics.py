"""Sex and age of each data set's tables, on fakes of the publishers' layouts.

Oracle: the cells that the fakes were made with.
"""

from __future__ import annotations

import csv
import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from mlip.cli import main
from mlip.dataloading.datasets.rows import Collected, DatasetError
from tests import raw_layouts
from tests.raw_layouts import by_id, collect, image


def told(collected: Collected) -> dict[str, tuple[str, str]]:
    return {key: (row.sex, row.age) for key, row in by_id(collected).items()}


def without_columns(path: Path, *names: str) -> None:
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    kept = [place for place, name in enumerate(rows[0]) if name not in names]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([row[place] for place in kept] for row in rows)


def test_nih_tells_both_in_the_words_of_either_table(tmp_path: Path) -> None:
    raw_layouts.make_nih(tmp_path)
    collected = collect("nih_cxr14", tmp_path)
    assert list(told(collected).values()) == [
        *(("M", "58"), ("F", "58"), ("M", "58"), ("F", "1"), ("M", "")),
        *(("F", ""), ("M", "89"), ("F", "90"), ("M", "90")),
    ]
    assert collected.notes == ["cells not read, so not stated: age 1"]
    without_columns(tmp_path / "Data_Entry_2017_v2020.csv", "Patient Age", "Patient Gender")
    assert set(told(collect("nih_cxr14", tmp_path)).values()) == {("", "")}


def test_chexpert_tells_both_and_an_age_of_0_is_none(tmp_path: Path) -> None:
    raw_layouts.make_chexpert(tmp_path)
    collected = collect("chexpert", tmp_path, views="all")
    assert list(told(collected).values()) == [
        *(("M", ""), ("F", "90"), ("M", "20"), ("F", "21"), ("", "22")),
        *(("F", "23"), ("M", "24"), ("F", "25"), ("M", "26"), ("F", "27")),
    ]
    assert not [note for note in collected.notes if "not read" in note]
    for name in ("train", "valid"):
        without_columns(tmp_path / "CheXpert-v1.0" / f"{name}.csv", "Sex", "Age")
    assert set(told(collect("chexpert", tmp_path)).values()) == {("", "")}


def test_padchest_tells_sex_and_the_year_of_birth(tmp_path: Path) -> None:
    raw_layouts.make_padchest(tmp_path)
    found = told(collect("padchest", tmp_path))
    assert [found[f"2168{i}_02-094-10{i}.png"] for i in range(8)] == [
        *(("M", "90"), ("F", "84"), ("O", "74"), ("", "64")),
        *(("F", "54"), ("F", "44"), ("F", "34"), ("F", "24")),
    ]


def test_mimic_takes_both_from_the_table_of_patients_at_the_year_of_the_study(
    tmp_path: Path,
) -> None:
    raw_layouts.make_mimic(tmp_path)
    for option in ("", "none"):  # "none": of --no-demographics
        collected = collect("mimic_cxr", tmp_path, views="all", patients=option)
        assert set(told(collected).values()) == {("", "")}
    patients = raw_layouts.make_mimic_iv(tmp_path / "hosp" / "patients.csv.gz")
    collected = collect("mimic_cxr", tmp_path, views="all", patients=str(patients))
    assert list(told(collected).values()) == [
        *(("F", "51"), ("F", "53")),  # 52 in 2151; studies of 2150 and 2152
        *(("M", "89"), ("M", "90")),  # 88 in 2153; 2154 and 2156, where they are 91
        *(("M", ""), ("M", "90")),  # over 89 in 2159: of 2158 nobody can tell
        *(("F", "12"), ("F", "14")),
        *(("", ""), ("", "")),  # not in the table
    ]
    assert "sex and age of 4 patients from --option patients, 1 are not in it" in collected.notes


def test_mimic_refuses_a_table_of_other_patients(tmp_path: Path) -> None:
    raw_layouts.make_mimic(tmp_path)
    other = tmp_path / "patients.csv"
    raw_layouts.table(other, "subject_id,gender,anchor_age,anchor_year", [["7", "F", 5, 2150]])
    with pytest.raises(DatasetError, match="names none of the 5 patients"):
        collect("mimic_cxr", tmp_path, patients=str(other))
    raw_layouts.table(other, "subject_id,gender", [["10000000", "F"]])
    with pytest.raises(DatasetError, match="missing columns anchor_age, anchor_year"):
        collect("mimic_cxr", tmp_path, patients=str(other))


@pytest.mark.parametrize("names", [("sex", "age"), ("Gender", "Age"), ("PatientSex", "PatientAge")])
def test_a_manifest_of_ones_own_has_them_under_usual_names(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    said = [("f", "58"), ("Male", "61.0"), ("", ""), ("X", "old"), ("M", "0")]
    for i in range(len(said)):
        image(tmp_path / f"{i}.png", i)
    lines: list[list[object]] = [[f"{i}.png", f"p{i}", *cells] for i, cells in enumerate(said)]
    raw_layouts.table(tmp_path / "manifest.csv", f"image,patient_id,{','.join(names)}", lines)
    collected = collect("manifest", tmp_path)
    expected = [("F", "58"), ("M", "61"), ("", ""), ("", ""), ("M", "0")]
    assert list(told(collected).values()) == expected
    assert "cells not read, so not stated: sex 1, age 1" in collected.notes
    assert set(told(collect("manifest", tmp_path, sex="none", age="none")).values()) == {("", "")}


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_an_age_with_a_gap_is_a_number_with_a_point_to_pandas(tmp_path: Path, kind: str) -> None:
    rows = [
        {"image": f"{i}.png", "patient_id": f"p{i}", "age": age}
        for i, age in ((0, 58.0), (1, None))
    ]
    for i in range(2):
        image(tmp_path / f"{i}.png", i)
    if kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "manifest.parquet")
    else:
        (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(told(collect("manifest", tmp_path)).values()) == [("", "58"), ("", "")]


def test_an_age_of_a_data_base_is_a_decimal_number(tmp_path: Path) -> None:
    for i in range(2):
        image(tmp_path / f"{i}.png", i)
    ages = pa.array([Decimal("58.0"), None], pa.decimal128(4, 1))
    table = pa.table({"image": ["0.png", "1.png"], "patient_id": ["a", "b"], "age": ages})
    pa.parquet.write_table(table, tmp_path / "manifest.parquet")
    assert list(told(collect("manifest", tmp_path)).values()) == [("", "58"), ("", "")]


def test_where_they_are_is_not_said_of_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "raw"
    for i in range(3):
        image(root / f"{i}.png", i, (40, 40))
    lines: list[list[object]] = [[f"{i}.png", f"p{i}", "F", "CANARY"] for i in range(3)]
    raw_layouts.table(root / "manifest.csv", "image,patient_id,sex,age", lines)
    command = ["prepare", "manifest", "--root", str(root), "--out", str(tmp_path / "out")]
    command.append("--no-demographics")
    assert main([*command, "--option", "age=age"]) == 2
    assert "--option age=age" in capsys.readouterr().err
    assert main(command) == 0
    assert ": image = image (3), patient_id = patient_id (3)\n" in capsys.readouterr().out
    names = pyarrow.parquet.read_schema(tmp_path / "out" / "manifest.parquet").names
    assert not {"sex", "age"} & set(names)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("sexes", "ages", "unread"),
    [
        ([datetime.date(2020, 1, 31), None], [datetime.datetime(1961, 5, 4), None], (1, 1)),
        ([["F"], ["M"]], [{"years": 58}, None], (2, 1)),
        ([True, False], [datetime.timedelta(days=9), None], (2, 1)),
        ([b"F", None], [58.0, float("nan")], (1, 0)),
    ],
)
def test_columns_of_dates_lists_and_mixed_types_are_counted_and_stop_nothing(
    tmp_path: Path, kind: str, sexes: list[Any], ages: list[Any], unread: tuple[int, int]
) -> None:
    for i in range(2):
        image(tmp_path / f"{i}.png", i)
    names, path = [f"{i}.png" for i in range(2)], tmp_path / f"manifest.{kind}"
    columns = {"image": names, "patient_id": ["a", "b"], "sex": sexes, "age": ages}
    if kind == "parquet":
        pa.parquet.write_table(pa.table(columns), path)
    else:  # JSON has no dates and no bytes: lists stand for them
        rows = [
            dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)
        ]
        path.write_text("".join(json.dumps(row, default=lambda _: [0]) + "\n" for row in rows))
    collected = collect("manifest", tmp_path)
    assert [row.sex for row in collected.rows] == ["", ""]
    assert [row.age for row in collected.rows] == ["58" if ages[0] == 58.0 else "", ""]
    said = ", ".join(f"{n} {c}" for n, c in zip(("sex", "age"), unread, strict=True) if c)
    assert f"cells not read, so not stated: {said}" in collected.notes


def test_an_age_may_be_text_in_one_row_and_a_number_in_the_next(tmp_path: Path) -> None:
    cells: list[Any] = ["058Y", 58, 58.0, [58], None, True]
    for i in range(len(cells)):
        image(tmp_path / f"{i}.png", i)
    rows = ({"image": f"{i}.png", "patient_id": str(i), "age": c} for i, c in enumerate(cells))
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    collected = collect("manifest", tmp_path)
    assert [row.age for row in collected.rows] == ["58", "58", "58", "", "", ""]
    assert "cells not read, so not stated: age 2" in collected.notes
