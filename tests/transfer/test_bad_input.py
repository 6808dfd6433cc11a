"""What a user gets wrong, through the real command: one line with file, reason and remedy, or n/a.

Oracle: the exit codes of mlip/training/lifecycle.py, and that neither a report's words nor a
patient's id ever come out.
"""

from __future__ import annotations

import copy
import csv
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from mlip.cli import main
from mlip.pretrained import save_pretrained
from tests import raw_layouts
from tests.small_run import small_export, small_run

ROWS, HEIGHT, WIDTH = 30, 40, 60
SPLITS = ("train", "train", "val", "test", "test")
SECRETS = ("PATIENT-SECRET", "Secretword")
SMALL = [
    *("data.resize_px=112", "data.crop_px=96", "data.channels=1", "data.max_tokens=64"),
    *("data.columns.study_id=null", "data.columns.labels=labels"),
    *("transfer.fractions=[100]", "transfer.seeds=[1]", "transfer.epochs=1", "transfer.batch=8"),
    *("transfer.decoder_width=4", "transfer.image_px=32"),
    *("evaluate.bootstrap=20", "evaluate.examples=1"),
]
LABELS = ["transfer.task=classification", "transfer.classes={Edema: zero}"]
MASKS = ["transfer.task=segmentation", "transfer.columns.mask=mask"]
BOXES = ["transfer.task=detection", "transfer.columns.boxes=boxes"]


@cache
def _pictures() -> Path:
    folder = Path(mkdtemp(prefix="mlip-bad-input-"))
    generator = np.random.default_rng(0)
    for i in range(ROWS):
        pixels = generator.integers(0, 255, (HEIGHT, WIDTH)).astype(np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), pixels)
    cv2.imwrite(str(folder / "mask.png"), (generator.random((HEIGHT, WIDTH)) < 0.3) * 255)
    cv2.imwrite(str(folder / "small.png"), np.zeros((10, 10), np.uint8))
    return folder


def write(folder: Path, **columns: Any) -> list[str]:
    """A manifest of thirty patients in `folder`, and the settings that lead to it.

    A column is row -> cell, or a cell for all rows.
    """
    rows = []
    for i in range(ROWS):
        row: dict[str, Any] = {
            "image": f"{i}.png",
            "patient_id": f"PATIENT-SECRET-{i:03d}",
            "split": SPLITS[i % 5],
            "report": f"Secretword {i}. " + ("There is edema." if i % 3 else "No edema."),
            "labels": "Edema" if i % 3 else "Mass",
        }
        for name, cell in columns.items():
            row[name] = cell(i) if callable(cell) else cell
        rows.append(row)
    path = folder / "manifest.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return [*SMALL, f"data.manifest={path}", f"data.root={_pictures()}"]


def evaluate(folder: Path, settings: list[str], checkpoint: Path | None = None) -> int:
    where = f"checkpoint={checkpoint or small_export()}"
    return main(["evaluate", *settings, where, "--out", str(folder / "out")])


def require_silence(folder: Path, said: str) -> None:
    texts = [said, *(p.read_text() for p in (folder / "out").glob("*") if p.is_file())]
    for secret in SECRETS:
        assert not [text for text in texts if secret in text], secret


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
        ("data row 1: a box (x=50 y=10 w=30 h=5) does not lie inside its 60 x 40 image",),
    ),
    "box outside its image, grounding": (
        {"boxes": '[[50, 10, 30, 5, "n"]]'},
        ["transfer.columns.boxes=boxes"],
        3,
        ("a box (x=50 y=10 w=30 h=5) does not lie inside its 60 x 40 image",),
    ),
    "box is none": ({"boxes": '{"x": 1}'}, BOXES, 3, ("expected JSON [[x, y, width, height",)),
    "no box of the class": ({"boxes": "[]"}, BOXES, 3, ("training images drawn has a box",)),
    "no boxes at all": ({}, ["transfer.task=detection"], 3, ("set transfer.columns.boxes", "put")),
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


@pytest.mark.parametrize("probe", ["adamw", "logistic"])
@pytest.mark.parametrize(
    ("split", "reason"),
    [
        ("test", "0 of 12 test rows carry the class"),
        ("train", "the training draw shows the class in one kind of rows only"),
        ("val", "no row of val carries the class: there is no threshold"),
    ],
)
def test_a_class_without_positives_is_stated_and_never_one_half(
    probe: str, split: str, reason: str, tmp_path: Path
) -> None:
    without = {"labels": lambda i: "Edema" if SPLITS[i % 5] != split and i % 2 else "Mass"}
    settings = [*write(tmp_path, **without), *LABELS, f"transfer.probe={probe}"]
    assert evaluate(tmp_path, settings) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (fraction,) = results["fractions"]
    (row,) = fraction["scores"]["classes"]
    for key in ("f1", "accuracy") if split == "val" else ("auroc", "auprc", "f1", "ece"):
        assert row[key]["value"] is None and row[key]["reason"] == reason
    macro = fraction["scores"]["macro"]["f1"]
    assert macro["value"] is None and macro["reason"] == reason
    assert (row["auroc"]["value"] is not None) == (split == "val")
    assert np.isfinite(fraction["fits"][0]["val_loss"]).all()
    assert reason in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_scores_of_one_patient_have_no_interval_and_nothing_private_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = write(tmp_path, patient_id=lambda i: SECRETS[0] if i % 5 >= 3 else f"p{i}")
    assert evaluate(tmp_path, same) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    seen = 0

    def walk(value: object) -> None:
        nonlocal seen
        if isinstance(value, dict):
            if {"value", "low", "high", "n"} <= value.keys() and value["value"] is not None:
                seen += 1
                assert value["low"] is None and value["high"] is None, value
            for child in value.values():
                walk(child)

    walk(results)
    assert results["data"]["patients"] == 1 and seen > 20
    said = capsys.readouterr()
    require_silence(tmp_path, said.out + said.err)


def test_labels_of_one_patient_alone_are_counted_and_not_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = {"labels": lambda i: f"{'Edema' if i % 3 else 'Rarity'}|Secretword{i:05d}"}
    assert evaluate(tmp_path, write(tmp_path, **mixed)) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    left = results["zero_shot"]["labels_without_concept"]
    assert left == ["Rarity", "12 more, each of one patient alone"]
    said = capsys.readouterr()
    require_silence(tmp_path, said.out + said.err)


def test_rows_that_say_two_things_at_once_are_left_out_and_counted(tmp_path: Path) -> None:
    both = {"labels": lambda i: "Edema|Mass" if i < 5 else ("Edema", "Mass", "")[i % 3]}
    exclusive = ["transfer.classes={Edema: zero, Mass: zero}", "transfer.exclusive=true"]
    assert evaluate(tmp_path, [*write(tmp_path, **both), *LABELS, *exclusive]) == 0
    data = json.loads((tmp_path / "out" / "results.json").read_text())["data"]
    blank = [SPLITS[i % 5] for i in range(5, ROWS) if i % 3 == 2]
    wanted = {s: SPLITS.count(s) + blank.count(s) for s in ("train", "val", "test")}
    assert data["unused"] == wanted
    kept = {split: entry["images"] for split, entry in data["splits"].items()}
    assert {s: kept[s] + wanted[s] for s in kept} == {"train": 12, "val": 6, "test": 12}
    assert "has no truth for" in (tmp_path / "out" / "report.html").read_text()


@cache
def _broken() -> Path:
    """An export whose image tower holds NaN."""
    run = small_run()
    model = copy.deepcopy(run.model)
    with torch.no_grad():
        next(model.vision.parameters()).fill_(torch.nan)
    return save_pretrained(run.folder / "broken", model, run.config, run.tokenizer, run.table)


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ([], 2),
        (LABELS, 2),
        ([*LABELS, "transfer.encoder=tuned"], 5),
        (MASKS, 5),
        (BOXES, 5),
    ],
    ids=["nothing trained", "probe", "tuned", "masks", "boxes"],
)
def test_nan_features_end_an_evaluation(
    settings: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = write(tmp_path, mask="mask.png", boxes='[[5, 10, 30, 5, "n"]]')
    assert evaluate(tmp_path, [*drawn, *settings], _broken()) == code
    said = capsys.readouterr().err
    assert "features" in said and said.count("\n") == 1
    assert not (tmp_path / "out" / "results.json").exists()


def test_nan_features_are_neither_embedded_nor_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["embed", *write(tmp_path), f"checkpoint={_broken()}", "--out", str(out)]
    assert main(command) == 2
    assert "features hold NaN" in capsys.readouterr().err and not list(out.glob("part*"))
    picture = str(tmp_path / "map.png")
    image = str(_pictures() / "0.png")
    assert main(["ground", image, "edema", "--checkpoint", str(_broken()), "--out", picture]) == 2
    assert "features hold NaN" in capsys.readouterr().err and not Path(picture).exists()


def test_a_place_that_cannot_be_written_to_is_found_out_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a file"
    file.write_text("precious")
    settings, model = write(tmp_path), str(small_export())
    image = str(_pictures() / "0.png")
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
        assert "expected the name of a PNG file" in capsys.readouterr().err
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
