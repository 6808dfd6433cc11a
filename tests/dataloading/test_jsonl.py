"""JSONL as programs write it: cells of several kinds, gaps, blank lines. Oracle: json and str."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlip.dataloading.datasets.manifest import DATASET
from mlip.dataloading.tables.table import ManifestError, column_names, read_table

WANTED = {"image": "image", "patient_id": "patient_id", "report": "report", "study_id": "study_id"}
ROW: dict[str, Any] = {
    "image": "a.png",
    "patient_id": 7,
    "report": "Clear lungs.",
    "study_id": "s1",
    "extra": None,
}


def read(folder: Path, *rows: dict[str, Any]) -> dict[str, list[str | None]]:
    path = folder / "m.jsonl"
    path.write_text("".join(json.dumps({**ROW, **row}) + "\n" for row in rows), encoding="utf-8")
    return {field: column.to_pylist() for field, column in read_table(path, WANTED)[0].items()}


def test_texts_beside_numbers_that_look_like_a_date_stay_texts(tmp_path: Path) -> None:
    """Arrow, left to find the types, made points in time of them, and the table was refused."""
    found = read(tmp_path, {"study_id": "2020-01-01"}, {"study_id": "2020-01-02 10:00:00"})
    assert found["study_id"] == ["2020-01-01", "2020-01-02 10:00:00"]
    assert found["patient_id"] == ["7", "7"]


def test_a_column_nobody_asked_for_may_hold_anything(tmp_path: Path) -> None:
    """With numbers as ids its changing kinds made the whole table "damaged"."""
    assert read(tmp_path, {"extra": {"a": [1]}}, {"extra": "x"})["patient_id"] == ["7", "7"]


@pytest.mark.parametrize(
    "ids",
    [
        ["007", 8],
        [1234567890123456789, "a"],
        [12345678901234567890123, 1],  # more than 64 bits, which were a rounded number to Arrow
        ["1e5", 100000],
        [None, 3],
    ],
)
def test_identifiers_are_the_text_of_what_stands_there(tmp_path: Path, ids: list[Any]) -> None:
    found = read(tmp_path, *({"patient_id": value} for value in ids))["patient_id"]
    assert found == [None if value is None else str(value) for value in ids]


def test_nan_where_a_report_is_missing_is_an_empty_cell(tmp_path: Path) -> None:
    """What json.dumps writes of a data frame's gaps."""
    assert read(tmp_path, {"report": float("nan")}, {})["report"] == [None, "Clear lungs."]


@pytest.mark.parametrize("value", [7.0, 1e5, True, ["x"], {"a": 1}])
@pytest.mark.parametrize("row", [0, 3])
def test_what_cannot_be_an_identifier_is_refused_with_its_line(
    tmp_path: Path, value: Any, row: int
) -> None:
    rows = [{}, {}, {}, {}, {"study_id": 4}]
    rows[row]["patient_id"] = value
    with pytest.raises(ManifestError, match="'patient_id': expected text or integers") as caught:
        read(tmp_path, *rows)
    assert f"line {row + 1}" in str(caught.value) and "Clear" not in str(caught.value)


def test_damage_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    line = json.dumps({**ROW, "patient_id": "7"}) + "\n"
    path.write_text(line * 150 + line[:40] + "\n" + line, encoding="utf-8")
    with pytest.raises(ManifestError, match="line 151 is not JSON"):
        read_table(path, WANTED)
    path.write_text(line.replace("Clear", "\\ud800"), encoding="utf-8")
    with pytest.raises(ManifestError, match="m.jsonl: a text holds half a surrogate"):
        read_table(path, WANTED)


def test_blank_lines_are_no_rows(tmp_path: Path) -> None:
    """Before a column that the first row lacks, one was "not JSON"."""
    path = tmp_path / "m.jsonl"
    first = {key: value for key, value in ROW.items() if key != "report"}
    path.write_text(f"{json.dumps(first)}\n\n{json.dumps(ROW)}\n\n", encoding="utf-8")
    assert "report" in column_names(path)
    columns = read_table(path, WANTED)[0]
    assert columns["report"].to_pylist() == [None, "Clear lungs."]


def test_findings_may_be_numbers_and_truth_values_beside_texts(tmp_path: Path) -> None:
    rows = [{**ROW, "Edema": 1.0}, {**ROW, "image": "b.png", "patient_id": "8", "Edema": False}]
    rows += [{**ROW, "image": "c.png", "Edema": float("nan")}]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {name: default for name, (default, _) in DATASET.options.items()}
    found = DATASET.collect(tmp_path, {**options, "findings": "Edema"}).rows
    said = {row.image: (row.patient_id, row.labels, row.negative) for row in found}
    assert said == {
        "a.png": ("7", "Edema", ""),
        "b.png": ("8", "", "Edema"),
        "c.png": ("7", "", ""),
    }
