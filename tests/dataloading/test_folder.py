"""A folder as it comes from a PACS: reports in any encoding, links, locked folders, odd names.

Oracles: the texts and files that were written; every file below the root is a row or counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest

from mlip.dataloading.datasets import DATASETS, folder
from mlip.dataloading.datasets.rows import Collected, DatasetError
from mlip.dataloading.dicom.radiograph import write_radiograph
from mlip.dataloading.images.image_file import read_bytes
from mlip.dataloading.prepare.command import check_rows
from mlip.settings.config import ConfigError


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.arange(1600, dtype=np.uint8).reshape(40, 40))
    return path


def film(path: Path, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40
    write_radiograph(path, image, patient_id="P1", study_id="S1", image_id=path.name)
    dataset = pydicom.dcmread(path)
    for name, value in changes.items():
        setattr(dataset, name, value)
    pydicom.dcmwrite(path, dataset)
    return path


def collect(root: Path, **options: str) -> Collected:
    dataset = DATASETS["folder"]
    usual = {name: text for name, (text, _) in dataset.options.items()}
    collected = dataset.collect(root, usual | options)
    assert isinstance(collected, Collected)
    return collected


def reports(root: Path) -> dict[str, str]:
    return {row.image: row.report for row in collect(root).rows}


def test_a_report_is_read_in_its_encoding_or_leaves_its_image_out(tmp_path: Path) -> None:
    """A text in another encoding became replacement characters, and was learnt from."""
    text = "Kein Erguß, Herz mäßig groß."
    encodings = {
        "utf8": text.encode(),
        "bom": text.encode("utf-8-sig"),
        "utf16": text.encode("utf-16"),
        "latin1": text.encode("latin-1"),
        "utf16_without_mark": "No effusion.".encode("utf-16-le"),
        "long": b"x" * ((1 << 20) + 1),
    }
    for name, content in encodings.items():
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(content)
    assert reports(tmp_path) == {f"{n}.png": text for n in ("bom", "utf16", "utf8")}
    assert collect(tmp_path).excluded == {"report_not_utf8": 2, "report_too_large": 1}


def test_a_text_is_found_whatever_its_case_and_never_outside_the_root(tmp_path: Path) -> None:
    """root.txt beside the root once became the report of every image that lay in it directly."""
    root = tmp_path / "root"
    picture(root / "a.png")
    picture(root / "b.PNG")
    picture(root / "p" / "s" / "c.png")
    (tmp_path / "root.txt").write_text("Somebody else's.")
    (root / "b.TXT").write_text("Upper case.")
    (root / "p" / "s.TXT").write_text("Of the study.")
    (root / "lost.txt").write_text("Of no image.")
    assert reports(root) == {"a.png": "", "b.PNG": "Upper case.", "p/s/c.png": "Of the study."}
    collected = collect(root)
    assert "1 of the .txt files belong to no image" in collected.notes
    assert collected.left_out == [("lost.txt", "report_text")]  # all that are read were told too


def test_the_disk_is_asked_of_files_that_are_there_once_and_of_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [picture(tmp_path / f"p{i}" / f"s{k}" / "a.png") for i in range(3) for k in range(2)]
    (tmp_path / "p1" / "s1.txt").write_text("Of the study.")
    asked: list[Path] = []
    real = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: asked.append(path) or real(path))
    assert sum(bool(text) for text in reports(tmp_path).values()) == 1
    assert sorted(asked) == sorted([*paths, tmp_path / "p1" / "s1.txt"])


def test_what_is_not_looked_into_is_counted_by_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    picture(root / "good.png")
    picture(root / "locked" / "x.png")
    picture(root / "secret.png")
    picture(tmp_path / "elsewhere" / "y.png")
    os.symlink(tmp_path / "elsewhere", root / "linked")
    os.symlink(root, root / "loop")
    os.symlink("itself", root / "itself")
    picture(root / ".thumbs" / "t.png")
    (root / "._good.png").write_bytes(b"AppleDouble")
    (root / "empty.dcm").write_bytes(b"")
    film(root / "bare.dcm").write_bytes((root / "bare.dcm").read_bytes()[132:])
    film(root / "DICOMDIR")
    picture(root / "latin.png").rename(os.fsdecode(os.fsencode(root) + b"/r\xf6ntgen.png"))

    scandir = os.scandir

    def locked_scandir(path: Any) -> Iterator[Any]:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    def locked_open(path: Any, *arguments: Any, **named: Any) -> Any:
        if str(path).endswith("secret.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *arguments, **named)

    monkeypatch.setattr(os, "scandir", locked_scandir)
    monkeypatch.setattr(folder, "open", locked_open, raising=False)
    collected = collect(root)
    assert [row.image for row in collected.rows] == ["good.png"]
    assert collected.excluded == {
        "link_or_special_file": 3,
        "hidden": 2,
        "unreadable_folder": 1,
        "unreadable_file": 1,
        "empty_file": 1,
        "not_dicom": 1,
        "dicomdir": 1,
        "name_not_utf8": 1,
    }


def test_a_copy_that_was_cut_off_does_not_hide_the_whole_one(tmp_path: Path) -> None:
    """The first copy by path was taken, then refused as too short: the film was lost."""
    uid = pydicom.uid.generate_uid()
    for place in ("a", "b", "c"):
        film(tmp_path / place / "x.dcm", SOPInstanceUID=uid)
    film(tmp_path / "d" / "y.dcm", SOPInstanceUID=pydicom.uid.generate_uid())
    cut = tmp_path / "a" / "x.dcm"
    cut.write_bytes(cut.read_bytes()[:-500])
    cut.with_suffix(".txt").write_text("Clear lungs.")
    collected = collect(tmp_path)
    assert {row.image: row.report for row in collected.rows} == {
        "b/x.dcm": "Clear lungs.",
        "d/y.dcm": "",
    }
    assert collected.excluded == {"duplicate_image": 2}


def test_scanned_forms_and_screenshots_are_no_films(tmp_path: Path) -> None:
    """A requisition with the patient's name on it got the report of its study's film."""
    capture, true_colour = "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.5.1.4.1.1.7.4"
    kinds = {
        "form": {"SOPClassUID": capture, "Modality": "OT", "BurnedInAnnotation": "YES"},
        "screen": {"SOPClassUID": true_colour, "Modality": "OT", "BurnedInAnnotation": "NO"},
        "named film": {"Modality": "CR", "BurnedInAnnotation": "YES"},
        # as RSNA and SIIM store their films
        "film as capture": {"SOPClassUID": capture, "Modality": "CR", "BurnedInAnnotation": ""},
        "other": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.4", "Modality": "OT"},
        "film": {"Modality": "DX"},
    }
    for name, changes in kinds.items():
        film(tmp_path / name, SOPInstanceUID=pydicom.uid.generate_uid(), **changes)
    films = {"film as capture", "other", "film"}
    assert reports(tmp_path).keys() == films
    assert collect(tmp_path).excluded == {"burned_in": 2, "secondary_capture": 1}
    kept = {row.image for row in collect(tmp_path, keep="burned_in").rows}
    assert kept == films | {"named film"}  # the form is a capture besides
    assert len(collect(tmp_path, keep="burned_in, secondary_capture").rows) == len(kinds)
    with pytest.raises(ConfigError, match="burned_in, secondary_capture"):
        collect(tmp_path, keep="burnt_in")
    for name in films:
        (tmp_path / name).unlink()
    with pytest.raises(DatasetError, match="burned_in 2, secondary_capture 1.*see --option keep"):
        collect(tmp_path)


def test_files_without_a_patient_are_said_to_be_grouped_by_folder(tmp_path: Path) -> None:
    film(tmp_path / "p1" / "a.dcm", PatientID="")
    film(tmp_path / "p2" / "s2" / "c.dcm", StudyInstanceUID="", SOPInstanceUID="")
    study = pydicom.dcmread(film(tmp_path / "b.dcm")).StudyInstanceUID
    collected = collect(tmp_path)
    assert {row.image: (row.patient_id, row.study_id) for row in collected.rows} == {
        "p1/a.dcm": ("p1", study),
        "p2/s2/c.dcm": ("P1", "p2/s2"),
        "b.dcm": ("P1", study),
    }
    assert any(note.startswith("1 DICOM files state no patient") for note in collected.notes)


def test_a_report_that_may_not_be_read_leaves_its_image_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("Clear lungs.")
    read_bytes = Path.read_bytes

    def locked(path: Path) -> bytes:
        if path.suffix == ".txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", locked)
    assert reports(tmp_path) == {"b.png": ""}
    assert collect(tmp_path).excluded == {"report_unreadable": 1}


def test_files_of_one_image_uid_and_several_patients_are_all_left_out(tmp_path: Path) -> None:
    """The larger was taken, under its own patient, and the other called a copy of it."""
    film(tmp_path / "a.dcm", SOPInstanceUID="1.2.3", PatientID="P1")
    film(tmp_path / "b.dcm", SOPInstanceUID="1.2.3", PatientID="P2", ImageComments="longer")
    film(tmp_path / "c.dcm", SOPInstanceUID="1.2.4", PatientID="P3")
    film(tmp_path / "d.dcm", SOPInstanceUID="1.2.4", PatientID="")  # says nothing against P3
    collected = collect(tmp_path)
    assert [row.image for row in collected.rows] == ["c.dcm"]
    assert collected.excluded == {"image_of_several_patients": 2, "duplicate_image": 1}


def test_a_copy_that_names_no_patient_is_of_the_one_that_another_names(tmp_path: Path) -> None:
    """The larger one is taken, and its patient's films must not fall into two splits."""
    film(tmp_path / "a" / "small.dcm", SOPInstanceUID="1.2.3", PatientID="P1")
    film(
        tmp_path / "b" / "large.dcm", SOPInstanceUID="1.2.3", PatientID="", ImageComments="x" * 999
    )
    film(tmp_path / "c" / "other.dcm", SOPInstanceUID="1.2.4", PatientID="P1")
    rows = collect(tmp_path).rows
    assert [row.image for row in rows] == ["b/large.dcm", "c/other.dcm"]
    assert rows[0].patient_id == rows[1].patient_id


def test_films_without_preamble_are_told_from_other_files_whatever_they_are_called(
    tmp_path: Path,
) -> None:
    """An old archive whose files have no suffix was so many files that are no image."""
    whole = film(tmp_path / "a").read_bytes()
    (tmp_path / "a").unlink()
    (tmp_path / "IM000001").write_bytes(whole[132:])  # with its group 2
    (tmp_path / "IM000002").write_bytes(whole[whole.index(b"\x08\x00\x16\x00UI") :])
    (tmp_path / "x.ico").write_bytes(b"\0\0\1\0")
    (tmp_path / "notes.doc").write_bytes(b"\x08 some other file")
    picture(tmp_path / "p.png")
    assert collect(tmp_path).excluded == {"not_dicom": 2, "no_image": 2}


def test_frontal_films_alone_are_taken_where_that_is_asked(tmp_path: Path) -> None:
    """Oracle: the views that were written. A file that states none may be frontal and stays."""
    views = ["PA", "AP", "LL", "LATERAL", ["AP", "LLD"], "LAO", "", ["PA", "LL"]]
    for i, view in enumerate(views):
        film(tmp_path / f"{i}.dcm", ViewPosition=view, SOPInstanceUID=f"1.2.{i}")
    picture(tmp_path / "p.png")
    assert len(collect(tmp_path).rows) == 9 and not collect(tmp_path).excluded
    frontal = collect(tmp_path, views="frontal")
    assert [row.image for row in frontal.rows] == ["0.dcm", "1.dcm", "6.dcm", "7.dcm", "p.png"]
    assert frontal.excluded == {"view_not_frontal": 4}
    told = "2 DICOM files state no view, or a frontal and a lateral one: they are taken as frontal"
    assert f"{told} ones" in frontal.notes
    with pytest.raises(ConfigError, match="expected frontal or all"):
        collect(tmp_path, views="lateral")


def test_a_name_that_begins_with_a_tilde_stops_no_folder(tmp_path: Path) -> None:
    """One such file among thousands was "data row 78: its image path may lead out of the root"."""
    for name in ("~home/a.png", "~$b.png"):
        picture(tmp_path / name)
    rows = collect(tmp_path).rows
    check_rows(rows)
    for row in rows:
        assert read_bytes(str(tmp_path), row.image) == (tmp_path / row.image).read_bytes()
    assert [row.image for row in rows] == ["~$b.png", "~home/a.png"]
