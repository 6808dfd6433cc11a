"""What a user gets wrong, through the real command: one line with file, reason and remedy.

Oracle: the exit codes of mlip/training/lifecycle.py, and that neither a report's words nor a
patient's id ever come out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlip.cli import main
from tests import raw_layouts
from tests.small_run import small_export
from tests.transfer.small_manifest import (
    BOXES,
    LABELS,
    MASKS,
    ROWS,
    evaluate,
    pictures,
    require_silence,
    write,
)

BAD: dict[str, tuple[dict[str, Any], list[str], int, tuple[str, ...]]] = {
    "label column missing": (
        {},
        [*LABELS, "data.columns.labels=lables"],
        3,
        ("'lables' (data.columns.labels, nearest is 'labels')",),
    ),
    "class misspelt": ({}, [*LABELS, "transfer.classes={Edma: zero}"], 3, ("classes Edma", "'|'")),
    "labels are numbers": (
        {"labels": lambda i: f"{i % 2}.0"},
        LABELS,
        3,
        ("the manifest has: 0.0, 1.0; expected finding names joined by '|'",),
    ),
    "labels are accession numbers": (
        {"labels": lambda i: f"Secretword{i:05d}"},
        LABELS,
        3,
        ("the manifest has: no label of two patients; expected finding names",),
    ),
    "labels are reports": ({}, [*LABELS, "data.columns.labels=report"], 3, ("columns.report",)),
    "labels are patients": ({}, ["data.columns.labels=patient_id"], 3, ("columns.patient_id",)),
    "labels are sentences": (
        {"labels": "Secretword and " * 9},
        [],
        3,
        ("texts of up to 134 characters",),
    ),
    "labels are lists": (
        {"labels": "['Edema', 'Secretword']"},
        LABELS,
        3,
        ("holds lists in brackets", "expected finding names joined by '|'"),
    ),
    "policy outside the range": (
        {},
        [*LABELS, "transfer.classes={Edema: 2}"],
        2,
        ("expected what an uncertain label counts as: one, zero, ignore",),
    ),
    "label stated both ways": (
        {"negative": "Edema"},
        [*LABELS, "transfer.columns.negative=negative"],
        3,
        ("states 'Edema' in two",),
    ),
    "mask of another size": (
        {"mask": lambda i: "small.png" if i == 7 else "mask.png"},
        MASKS,
        3,
        ("data row 8: mask file is 10 x 10 px, its image 60 x 40 px",),
    ),
    "mask file missing": ({"mask": "no.png"}, MASKS, 3, ("mask file cannot be read: missing",)),
    "no mask holds anything": (
        {"mask": ""},
        MASKS,
        3,
        ("training images drawn (100 %, seed 1) has a mask",),
    ),
    "mask is a sentence": (
        {"mask": "Secretword left lower lobe"},
        MASKS,
        3,
        ("run lengths: expected whole numbers, or -1 for no object",),
    ),
    "mask outside its image": ({"mask": "5 9999"}, MASKS, 3, ("leave the image of 60 x 40",)),
    "masks of phantoms that are none": (
        {},
        ["transfer.task=segmentation", "transfer.mask_source=phantom"],
        3,
        ("is no generated data set",),
    ),
    "size is no number": (
        {"boxes": '[[5, 10, 30, 5, "n"]]', "high": "forty", "wide": "60"},
        [
            *BOXES,
            "transfer.columns.source_height=high",
            "transfer.columns.source_width=wide",
        ],
        3,
        ("data row 1: transfer.columns.source_height", "whole numbers of px"),
    ),
    "box outside its image": (
        {"boxes": '[[50, 10, 30, 5, "n"]]'},
        BOXES,
        3,
        (
            "data row 1: a box (x=50 y=10 w=30 h=5) does not lie inside its 60 x 40 image",
            "name transfer.columns.source_height and source_width",
        ),
    ),
    "box outside its image, grounding": (
        {"boxes": '[[50, 10, 30, 5, "n"]]'},
        ["transfer.columns.boxes=boxes"],
        3,
        ("a box (x=50 y=10 w=30 h=5) does not lie inside its 60 x 40 image",),
    ),
    "box is none": ({"boxes": '{"x": 1}'}, BOXES, 3, ("expected JSON [[x, y, width, height",)),
    "class of boxes misspelt": (
        {"boxes": '[[5, 10, 30, 5, "Nodule"]]'},
        [*BOXES, "transfer.classes={Nodule: zero, Nodul: zero}"],
        3,
        ("no box is named Nodul (transfer.classes); the boxes have: Nodule",),
    ),
    "class of filled boxes misspelt": (
        {"boxes": '[[5, 10, 30, 5, "Nodule"]]'},
        [
            *("transfer.task=segmentation", "transfer.mask_source=boxes"),
            *("transfer.columns.boxes=boxes", "transfer.classes={Nodul: zero}"),
        ],
        3,
        ("no box is named Nodul (transfer.classes); the boxes have: Nodule",),
    ),
    "no box of the class": (
        {"boxes": "[]"},
        BOXES,
        3,
        ("training images drawn (100 %, seed 1) has a box",),
    ),
    "no boxes at all": ({}, ["transfer.task=detection"], 3, ("set transfer.columns.boxes", "put")),
    "balance without a positive": (
        {"labels": lambda i: "Edema" if i % 5 > 1 and i % 2 else "Mass"},
        [*LABELS, "transfer.balance=true"],
        3,
        ("transfer.balance=true takes all positives", "none of the 12 training images"),
    ),
    "one patient in test": (
        {"patient_id": lambda i: "the same" if i % 5 >= 3 else f"p{i}"},
        LABELS,
        3,
        ("split 'test' has 1 usable patients: expected at least 2",),
    ),
    "no val": (
        {"split": lambda i: ("train", "test")[i % 2]},
        LABELS,
        3,
        ("split 'val' has 0 usable patients", "set transfer.val_share"),
    ),
    "wrong root": (
        {},
        [*LABELS, f"data.root={Path(__file__).parent}"],
        3,
        ("could not be read: missing 30 (data.root is", "manifest.csv"),
    ),
    "wrong root, nothing trained": (
        {},
        [f"data.root={Path(__file__).parent}"],
        3,
        ("none of the images could be read", "check data.root"),
    ),
    "another preprocessing": (
        {},
        ["data.crop_px=64"],
        4,
        ("data.crop_px (trained with 96, asked 64); add data.crop_px=96",),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_that_names_it_and_nothing_is_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns, settings, code, parts = BAD[case]
    assert evaluate(tmp_path, [*write(tmp_path, **columns), *settings]) == code
    said = capsys.readouterr()
    line = said.err.splitlines()[-1]
    assert line.startswith("mlip evaluate: ")
    for part in parts:
        assert part in line
    assert not (tmp_path / "out").exists()
    require_silence(tmp_path, said.out + said.err)


@pytest.mark.parametrize("task", [["transfer.task=detection"], []], ids=["detection", "grounding"])
@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"path,label,x,y,w,h\n3.png,Edema,1,2,3\n", "line 2: expected numbers for x, y, w and h"),
        (b"path,label,x,y,w,h\n3.png,Edema,1,2,nan,4\n", "line 2: expected numbers"),
        (b"path,label,x,y,w,h\n3.png,Edema,1,2,0,4\n", "width and height above 0"),
        (b"path,label,x,y,w,h\n3.png,\xff\xfe,1,2,3,4\n", "not UTF-8"),
        (b"path,x,y,w,h,label\n3.png,1,2,3,4\n", "line 2: cut off before its end"),
        (b"path,label,x,y\n3.png,Edema,1,2\n", "missing columns h, w"),
        (
            b"path,label,x,y,w,h\n" + b"".join(b"%d.png,Edema,1,2,99,4\n" % i for i in range(ROWS)),
            "does not lie inside its 60 x 40 image",
        ),
    ],
    ids=["cut off", "nan", "flat", "latin", "unlabelled", "columns", "outside"],
)
def test_a_file_of_boxes_that_cannot_be_used_is_named(
    task: list[str], content: bytes, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*write(tmp_path), *task]
    (tmp_path / "boxes.csv").write_bytes(content)
    assert evaluate(tmp_path, settings) == 3
    said = capsys.readouterr().err
    assert part in said and "csv" in said and said.count("\n") == 1


def test_a_place_that_cannot_be_written_to_is_found_out_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a file"
    file.write_text("precious")
    settings, model = write(tmp_path), str(small_export())
    image = str(pictures() / "0.png")
    below, nowhere = str(file / "deeper"), "/proc/nowhere/at-all"
    for command in (
        ["evaluate", *settings, f"checkpoint={model}"],
        ["evaluate", *settings, *LABELS, f"checkpoint={model}"],
        ["embed", *settings, f"checkpoint={model}"],
        ["ground", image, "edema", "--checkpoint", model],
        ["export", f"checkpoint={model}"],
    ):
        for place in (below, nowhere):
            out = f"{place}/map.png" if command[0] == "ground" else f"{place}/x"
            assert main([*command, "--out", out]) == 2, (command, out)
            said = capsys.readouterr()
            assert "cannot be written to" in said.err and "--out" in said.err and not said.out
    assert file.read_text() == "precious"
    for out in (str(tmp_path), str(tmp_path / "map.jpg")):
        assert main(["ground", image, "edema", "--checkpoint", model, "--out", out]) == 2
        assert "expected the name of a PNG or DICOM file" in capsys.readouterr().err
    assert main(["evaluate", *settings, "--device", "tpu"]) == 2
    assert "expected cpu, cuda" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["2.0", "nan", "yes"])
def test_a_label_outside_the_range_ends_prepare_with_file_and_label(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw_layouts.make_chexpert(tmp_path)
    table = tmp_path / "CheXpert-v1.0" / "train.csv"
    lines = table.read_text().splitlines()
    lines[4] = ",".join([*lines[4].split(",")[:-1], value])
    table.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    code = main(["prepare", "chexpert", "--root", str(tmp_path), "--out", str(out)])
    said = capsys.readouterr().err
    assert code == 3 and "train.csv: label Support Devices: expected 1 (present)" in said
    assert not (out / "manifest.parquet").exists()


def test_a_draw_without_truth_is_found_before_the_first_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fits of other seeds and fractions used to be lost with it."""
    drawn = [*BOXES, "transfer.fractions=[10,100]", "transfer.seeds=[1,2,3,4,5,6]"]

    def boxes(i: int) -> str:
        return '[[5, 10, 30, 5, "n"]]' if i in (0, 3, 5) else "[]"

    assert evaluate(tmp_path, [*write(tmp_path, boxes=boxes), *drawn]) == 3
    said = capsys.readouterr()
    assert "best epoch" not in said.out
    assert "training images drawn (10 %, seed " in said.err and "has a box" in said.err


def test_a_page_that_cannot_be_drawn_loses_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(*_: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("mlip.commands.evaluate_transfer.write_transfer_page", draw)
    with pytest.raises(RuntimeError, match="no font"):
        evaluate(tmp_path, [*write(tmp_path), *LABELS])
    assert (tmp_path / "out" / "results.json").is_file()
