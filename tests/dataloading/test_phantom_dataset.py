"""Folders of phantom studies: whole or absent, reused or remade, patients in one split only."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from mlip.dataloading.dicom import radiograph as dicom
from mlip.dataloading.phantom import dataset as phantom_dataset
from mlip.dataloading.phantom.dataset import (
    MANIFEST_COLUMNS,
    fingerprint,
    is_complete,
    read_truth,
    write_dataset,
    write_png,
)
from mlip.dataloading.phantom.study import generate_study
from mlip.dataloading.phantom.study_types import CONCEPT_IDS
from mlip.settings.config import Phantom

SMALL = Phantom(studies=143, val_studies=17, test_studies=9, image_px=96, seed=4, test_seed=77)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("phantoms") / "data", SMALL, workers=1).parent


def _rows(folder: Path, name: str = "manifest.csv") -> list[dict[str, str]]:
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_manifest_tells_every_study(made: Path) -> None:
    rows = _rows(made)
    assert tuple(rows[0]) == MANIFEST_COLUMNS
    counts = {s: sum(r["split"] == s for r in rows) for s in ("train", "val", "test")}
    assert counts == {"train": 143, "val": 17, "test": 9}
    assert len({r["image_id"] for r in rows}) == len({r["image"] for r in rows}) == len(rows)
    for row in rows:
        assert (made / row["image"]).is_file()
        assert set(row["labels"].split("|")) - {""} <= set(CONCEPT_IDS)


def test_patients_have_up_to_two_studies_and_one_split(made: Path) -> None:
    splits: dict[str, list[str]] = {}
    for row in _rows(made):
        splits.setdefault(row["patient_id"], []).append(row["split"])
    assert all(len(set(of)) == 1 for of in splits.values())
    assert {len(of) for of in splits.values()} == {1, 2}


def test_images_reports_and_labels_are_the_generators(made: Path) -> None:
    for row in _rows(made)[::13]:
        seed, index = (int(part) for part in row["image_id"][1:].split("-"))
        assert seed == (77 if row["split"] == "test" else 4)
        study = generate_study(seed, index, 96)
        image = cv2.imread(str(made / row["image"]), cv2.IMREAD_UNCHANGED)
        assert image.dtype == np.uint16 and np.array_equal(image, study.image)
        assert row["report"] == study.report
        assert row["labels"] == "|".join(study.labels)


def test_boxes_and_truth_agree_with_each_other_and_the_generator(made: Path) -> None:
    truth, boxes = read_truth(made), _rows(made, "boxes.csv")
    assert set(truth) == {row["image_id"] for row in _rows(made)}
    assert len(boxes) == sum(len(findings) for findings in truth.values())
    told = [(i, f) for i, findings in truth.items() for f in findings]
    for box, (image_id, finding) in zip(boxes, told, strict=True):
        assert (box["image_id"], box["label"]) == (image_id, finding["concept_id"])
        assert tuple(float(box[k]) for k in "xywh") == finding["box"]
        assert box["side"] == (finding["side"] or "")
    study = generate_study(4, 12, 96)
    for made_again, saved in zip(study.findings, truth["s4-000012"], strict=True):
        assert np.array_equal(saved["mask"], made_again.mask)


def test_two_workers_write_what_one_writes(made: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "data", SMALL, workers=2).parent
    assert _bytes(other) == _bytes(made)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_complete_folder_is_reused_and_another_settings_is_not(tmp_path: Path) -> None:
    few = dataclasses.replace(SMALL, studies=3, val_studies=1, test_studies=1)
    manifest = write_dataset(tmp_path / "data", few)
    before = manifest.stat().st_ino, manifest.stat().st_mtime_ns
    assert write_dataset(tmp_path / "data", few) == manifest
    assert (manifest.stat().st_ino, manifest.stat().st_mtime_ns) == before
    more = dataclasses.replace(few, studies=5)
    assert fingerprint(more) != fingerprint(few)
    assert len(_rows(write_dataset(tmp_path / "data", more).parent)) == 7


# of meta.json: 'unexpected error: KeyError', though the studies can be made again
def test_studies_of_another_generator_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line in any of its files; the glob that found them once named their place of before."""
    folder = shutil.copytree(
        Path(phantom_dataset.__file__).parent,
        tmp_path / "phantom",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    monkeypatch.setattr(phantom_dataset, "__file__", str(folder / "dataset.py"))
    before = fingerprint(Phantom(studies=3))
    sources = sorted(file.stem for file in folder.glob("*.py"))
    assert {"anatomy", "body", "canvas", "findings", "reports", "study"} < set(sources)
    for source in sources:
        text = (folder / f"{source}.py").read_text(encoding="utf-8")
        (folder / f"{source}.py").write_text(f"{text}# another\n", encoding="utf-8")
        assert fingerprint(Phantom(studies=3)) != before, source
        (folder / f"{source}.py").write_text(text, encoding="utf-8")
    assert fingerprint(Phantom(studies=3)) == before


def test_that_another_generator_makes_them_anew_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    few = dataclasses.replace(SMALL, studies=2, val_studies=0, test_studies=0)
    for settings in (few, dataclasses.replace(few, seed=5), few):
        write_dataset(tmp_path / "data", settings, workers=1)  # asked for, so no word
    (tmp_path / "data" / "boxes.csv").unlink()
    write_dataset(tmp_path / "data", few, workers=1)  # damaged
    assert caplog.messages == []
    monkeypatch.setattr(phantom_dataset, "fingerprint", lambda settings: "another")
    write_dataset(tmp_path / "data", few, workers=1)
    write_dataset(tmp_path / "data", few, workers=1)
    (told,) = caplog.messages
    assert told.startswith(f"{tmp_path / 'data'}: made by another version of the generator")


ENTRIES = ("fingerprint", "sha256", "studies")
DAMAGE = ("image gone", "manifest cut", "marker cut", "truth gone", *ENTRIES, "no sums")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_remade(tmp_path: Path, damage: str) -> None:
    few = dataclasses.replace(SMALL, studies=3, val_studies=1, test_studies=1)
    folder = write_dataset(tmp_path / "data", few).parent
    whole = _bytes(folder)
    if damage == "image gone":
        next((folder / "images" / "train").iterdir()).unlink()
    elif damage == "truth gone":
        (folder / "truth.jsonl").unlink()
    elif damage == "manifest cut":
        (folder / "manifest.csv").write_bytes(whole["manifest.csv"][:-20])
    else:
        meta = json.loads(whole["meta.json"])
        if damage in ENTRIES:
            del meta[damage]
        else:
            meta |= {"fingerprint": "0"} if damage == "marker cut" else {"sha256": {}}
        (folder / "meta.json").write_text(json.dumps(meta))
    assert not is_complete(folder, fingerprint(few))
    write_dataset(folder, few)
    assert _bytes(folder) == whole


def test_a_killed_run_leaves_nothing_that_looks_like_data(tmp_path: Path) -> None:
    # a process dies by SIGKILL after its first image
    code = (
        "import os, signal, sys\n"
        "from mlip.settings.config import Phantom\n"
        "from mlip.dataloading.phantom import dataset as d\n"
        "plain = d.write_png\n"
        "def dying(path, image):\n"
        "    plain(path, image)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "d.write_png = dying\n"
        "d.write_dataset(sys.argv[1], Phantom(studies=3, image_px=96), workers=1)\n"
    )
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    folder = tmp_path / "data"
    dead = subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, check=False)
    assert dead.returncode == -9
    assert not folder.exists() and len(list(tmp_path.iterdir())) == 1
    few = dataclasses.replace(SMALL, studies=3, val_studies=1, test_studies=1)
    write_dataset(folder, few)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_another_host_is_writing_is_left_alone(tmp_path: Path) -> None:
    """Two jobs of an array, one disk: the second removed what the first was filling."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ours, other = (
        tmp_path / f".data.partial-{dead.pid}@{host}" for host in (socket.gethostname(), "another")
    )
    # of this number, as a pod has that was killed and started again
    again = tmp_path / f".data.partial-{os.getpid()}@{socket.gethostname()}"
    for folder in (ours, other, again):
        folder.mkdir()
    (again / "images").mkdir()
    write_dataset(tmp_path / "data", Phantom(studies=1, val_studies=0, test_studies=0), workers=1)
    assert other.is_dir() and not ours.exists() and not again.exists()


def test_a_helper_whose_parent_is_gone_writes_no_more(tmp_path: Path) -> None:
    """It went on by itself, for as long as the rest took, into a folder that nobody finishes."""
    (tmp_path / "parts").mkdir()
    argument = json.dumps([str(tmp_path), dataclasses.asdict(SMALL), 0, 1])
    phantom_dataset._work(argument, parent=os.getpid())  # of another process than ours
    assert not list((tmp_path / "parts").iterdir())


def test_a_folder_of_other_files_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="name another folder"):
        write_dataset(tmp_path, SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("is_there", [True, False])
def test_studies_behind_a_link_are_in_the_folder_that_it_leads_to(
    is_there: bool, tmp_path: Path
) -> None:
    """To a larger disk, say: all was made, and lost where the link was to be replaced."""
    few = dataclasses.replace(SMALL, studies=2, val_studies=1, test_studies=1)
    (tmp_path / "here").mkdir()
    link, big = tmp_path / "here" / "data", tmp_path / "big"
    link.symlink_to(big)
    if is_there:
        big.mkdir()
    for studies in (2, 3):  # made, then replaced
        wanted = dataclasses.replace(few, studies=studies)
        assert write_dataset(link, wanted) == link / "manifest.csv"
        assert link.is_symlink() and is_complete(big, fingerprint(wanted))
    assert {path.name for path in tmp_path.rglob("*") if path.name.startswith(".")} == set()


def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(phantom_dataset, "_fill", None)
    with pytest.raises(ValueError, match=r"^\.: is the folder that this runs in.*below it"):
        write_dataset(".", SMALL)
    monkeypatch.chdir("/")
    with pytest.raises(ValueError, match="or a whole disk, and cannot be"):
        monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
        write_dataset(tmp_path, SMALL)
    assert not list(tmp_path.iterdir())


def test_studies_are_not_replaced_below_the_feet_of_who_asks_nor_put_behind_a_link_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """'mlip phantoms --out ..' in images/ removed the studies, and had no place for others."""
    few = dataclasses.replace(SMALL, studies=2, val_studies=1, test_studies=1)
    write_dataset(tmp_path / "data", few)
    kept = _bytes(tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data" / "images")
    for given in ("..", "../../data"):
        with pytest.raises(ValueError, match=rf"^{given}: .* one above it .* name a folder below"):
            write_dataset(given, SMALL)
    assert _bytes(tmp_path / "data") == kept
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="name another folder"):
        write_dataset(tmp_path / "loop", SMALL)


def test_settings_that_would_mix_patients_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="test_seed are both 4"):
        write_dataset(tmp_path / "data", dataclasses.replace(SMALL, test_seed=4))
    with pytest.raises(ValueError, match="0 or more"):
        write_dataset(tmp_path / "data", dataclasses.replace(SMALL, studies=-1))
    assert not list(tmp_path.iterdir())


def test_a_failing_worker_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    tiny = dataclasses.replace(SMALL, image_px=32)
    for workers in (1, 2):
        with pytest.raises((ValueError, RuntimeError), match="image_px of 96"):
            write_dataset(tmp_path / "data", tiny, workers=workers)
        assert not list(tmp_path.iterdir())


def test_dicom_files_hold_the_same_pixels(tmp_path: Path) -> None:
    few = dataclasses.replace(SMALL, studies=2, val_studies=1, test_studies=1, file_format="dicom")
    folder = write_dataset(tmp_path / "data", few, workers=1).parent
    row = _rows(folder)[1]
    assert row["image"].endswith(".dcm")
    image = dicom.read_radiograph(folder / row["image"])[0]
    assert np.array_equal(image, generate_study(4, 1, 96).image)


def test_png_of_any_noise_comes_back_unchanged(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 1 << 16, (31, 47)).astype(np.uint16)
    write_png(tmp_path / "x.png", image)
    assert np.array_equal(cv2.imread(str(tmp_path / "x.png"), cv2.IMREAD_UNCHANGED), image)
