"""`--check-phi` of a folder: what was not checked is counted, and nothing checked is no success."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from mlip.cli import main
from mlip.dataloading.dicom.radiograph import write_radiograph


def film(path: Path, with_preamble: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.arange(1600, dtype=np.uint16).reshape(40, 40)
    write_radiograph(path, cells, patient_id="MRN1", study_id="S1")
    if not with_preamble:
        path.write_bytes(path.read_bytes()[132:])
    return path


def clean(path: Path) -> Path:
    dataset = pydicom.dcmread(film(path))
    dataset.PatientID = dataset.StudyID = ""
    pydicom.dcmwrite(path, dataset)
    return path


def checked(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str], str]:
    code = main(["prepare", "--check-phi", str(path)])
    captured = capsys.readouterr()
    return code, [" ".join(line.split()) for line in captured.out.splitlines()], captured.err


def test_files_without_preamble_are_not_passed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ "0 DICOM files checked" and exit code 0 for a folder full of names."""
    film(tmp_path / "a.dcm", with_preamble=False)
    film(tmp_path / "b.IMA", with_preamble=False)
    (tmp_path / "marked").write_bytes(bytes(128) + b"DICM and no more")
    (tmp_path / "readme.md").write_text("no image")
    code, lines, error = checked(tmp_path, capsys)
    assert code == 3 and "no DICOM file could be checked" in error
    assert lines[1:] == [
        "1 other files were not checked: no DICOM by name or content",
        "file cannot be checked not_dicom 3 files",
    ]
    clean(tmp_path / "c.dcm")
    assert checked(tmp_path, capsys)[0] == 1  # one is clean, of three nobody knows


def test_a_clean_folder_ends_with_0_and_tells_what_else_lies_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean(tmp_path / "p" / "a")
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / ".keep").touch()
    (tmp_path / "link").symlink_to("/etc")
    code, lines, error = checked(tmp_path, capsys)
    assert (code, error) == (0, "")
    assert lines[0].startswith("1 DICOM files checked") and lines[1].startswith("3 other files")


def test_a_folder_that_may_not_be_read_is_no_clean_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clean(tmp_path / "a.dcm")
    film(tmp_path / "locked" / "b.dcm")
    scandir = os.scandir

    def locked(path: Any) -> Iterator[Any]:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    code, lines, _ = checked(tmp_path, capsys)
    assert code == 1 and lines[1:] == ["folder cannot be read unreadable_folder 1 folders"]


def test_nothing_to_check_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(tmp_path, capsys)[0] == 3
    code, _, error = checked(tmp_path / "nowhere", capsys)
    assert code == 2 and "no such file or folder" in error
