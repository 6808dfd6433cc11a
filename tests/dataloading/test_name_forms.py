"""A name in a table and on the disk in different forms of Unicode is one file, never another one.

Oracle: unicodedata's NFC and NFD, and the bytes that were written under each name.
"""

from __future__ import annotations

import os
import tracemalloc
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest

from mlip.dataloading.datasets import DATASETS
from mlip.dataloading.datasets.rows import Row
from mlip.dataloading.images.image_file import read_bytes
from mlip.dataloading.ledger import BadSample, DataError
from mlip.dataloading.prepare.shard_build import Plan, build_shards
from mlip.dataloading.prepare.shard_worker import ImageSettings

NAME = "M\u00fcller/R\u00f6ntgen \u00e9\u0323.png"  # the last letter has marks in either order


@pytest.mark.parametrize(("told", "lies"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_file_is_found_in_the_other_form_of_its_name(
    tmp_path: Path, told: str, lies: str
) -> None:
    path = tmp_path / unicodedata.normalize(lies, NAME)  # type: ignore[arg-type]
    path.parent.mkdir()
    name = unicodedata.normalize(told, NAME)  # type: ignore[arg-type]
    with pytest.raises(BadSample) as caught:
        read_bytes(str(tmp_path), name)
    assert caught.value.reason == "missing"
    path.write_bytes(b"film")
    assert read_bytes(str(tmp_path), name) == b"film"
    with pytest.raises(BadSample):
        read_bytes(str(tmp_path), name.replace("R", "r"))


def test_of_two_files_whose_names_differ_in_form_alone_each_is_itself(tmp_path: Path) -> None:
    names = [
        "\u00e9\u0323.png",
        "\u1eb9\u0301.png",
        "e\u0301\u0323.png",
    ]  # one name, three writings
    assert len({unicodedata.normalize("NFC", name) for name in names}) == 1
    for name in names[:2]:
        (tmp_path / name).write_bytes(name.encode())
    for name in names[:2]:
        assert read_bytes(str(tmp_path), name) == name.encode()
    with pytest.raises(BadSample):
        read_bytes(str(tmp_path), names[2])


def test_a_folder_in_the_other_form_that_leads_outside_stays_closed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.png").write_bytes(b"other")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "o\u0308").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError):
        read_bytes(str(tmp_path / "root"), "\u00f6/x.png")


def test_a_film_that_changes_is_made_again_under_the_other_form_too(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    path = tmp_path / "raw" / "o\u0308.png"
    plan = Plan(
        root=tmp_path / "raw",
        out=tmp_path / "out",
        settings=ImageSettings(side_px=64, bits=8, codec="png", quality=0),
        salt="s",
        keep_ids=True,
    )
    rows = [Row(image="\u00f6.png", patient_id="p", study_id="s", image_id="i", split="train")]
    for value, made in ((40, 1), (40, 0), (80, 1)):
        if made:
            cv2.imwrite(str(path), np.full((64, 64), value, np.uint8))
        result = build_shards(rows, plan)
        assert (result.images, result.made) == (1, made)


def test_a_report_beside_its_image_is_found_in_the_other_form(tmp_path: Path) -> None:
    dataset = DATASETS["folder"]
    options = {name: text for name, (text, _) in dataset.options.items()}
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        folder = tmp_path / unicodedata.normalize(form, "J\u00f6rg")  # type: ignore[arg-type]
        folder.mkdir()
        cv2.imwrite(str(folder / f"{form}.png"), np.arange(1600, dtype=np.uint8).reshape(40, 40))
        image = folder / unicodedata.normalize(form, f"{form} \u00e4.png")  # type: ignore[arg-type]
        (folder / f"{form}.png").rename(image)
        text = unicodedata.normalize(other, f"{form} \u00e4.txt")  # type: ignore[arg-type]
        (folder / text).write_text(f"Report of {form}.")
    rows = dataset.collect(tmp_path, options).rows
    assert sorted(row.report for row in rows) == ["Report of NFC.", "Report of NFD."]
    # two systems' folders of one patient are one patient, who is in one split
    assert len({row.patient_id for row in rows}) == 1


def test_a_folder_that_files_still_come_into_is_held_once(tmp_path: Path) -> None:
    """It was held for each of its last 64 states: 5,000 such names took 91 MB in place of 1.4."""
    for number in range(200):
        (tmp_path / f"o\u0308{number}.png").write_bytes(b"film")
    read_bytes(str(tmp_path), "\u00f60.png")
    tracemalloc.start()
    for number in range(20):
        (tmp_path / f"a\u0308{number}.png").write_bytes(b"film")
        os.utime(tmp_path, ns=(0, number))  # a change, whatever the clock's steps are
        assert read_bytes(str(tmp_path), f"\u00e4{number}.png") == b"film"
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 200_000  # a listing has some 60,000 bytes
