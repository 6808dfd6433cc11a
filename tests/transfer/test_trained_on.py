"""Films and patients of an evaluation that its model was trained on, counted by what tables say.

Oracle: tables written here, row by row; no id of theirs may be in what is told.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlip.cli import main
from mlip.dataloading.film_keys import read_film_keys
from mlip.dataloading.images import same_pictures
from mlip.dataloading.images.perceptual_hash import BITS
from mlip.dataloading.images.same_pictures import HASHES_FILE, hash_table
from mlip.dataloading.manifest import ManifestError, load_manifest
from mlip.pretrained import from_pretrained
from mlip.settings.config import Columns, Data, load
from mlip.transfer.readiness import check_evaluation
from mlip.transfer.table import seen_text
from mlip.transfer.trained_on import Training, find_seen
from tests.small_run import small_export, small_run

NAMES = "image,patient_id,image_id,split,sha256"


def write(path: Path, rows: Sequence[tuple[str, ...]], names: str = NAMES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names.split(","), *rows])
    return path


def told(own: Path, trained_on: list[Path], *trainings: Training) -> dict[str, Any]:
    """What is said of the test rows of a table."""
    columns = ["data.columns.report=null", "data.columns.study_id=null"]
    config = load([], [f"data.manifest={own}", *columns, "data.empty_report=image_only"])
    names = tuple(map(str, trained_on))
    config = dataclasses.replace(
        config, evaluate=dataclasses.replace(config.evaluate, trained_on=names)
    )
    manifest = load_manifest(config.data)
    rows = manifest.rows("test", with_report=False)
    return find_seen(config, manifest, trainings).of(rows)


def counts(found: dict[str, Any]) -> tuple[int, int, int, int]:
    keys = ("films", "films_of_patients", "patients", "patients_by_id_alone")
    return tuple(found[key] for key in keys)


# of three test patients A is in training with the same film, B with another one alone, C with none
GR = [
    ("a.png", "A", "f1", "test", "01"),
    ("a2.png", "A", "f2", "test", "02"),
    ("b.png", "B", "f3", "test", "03"),
    ("c.png", "C", "f4", "test", "04"),
    ("d.png", "D", "f5", "train", "05"),
]
PADCHEST = [
    ("x/1.png", "A", "f1", "train", "91"),
    ("x/2.png", "B", "g1", "train", "92"),
    ("x/3.png", "C", "f4", "test", "93"),
    ("x/4.png", "E", "g2", "train", "94"),
]


def test_a_set_and_its_part_share_patients_by_films_that_both_name(tmp_path: Path) -> None:
    own = write(tmp_path / "gr" / "manifest.csv", GR)
    found = told(own, [write(tmp_path / "padchest" / "manifest.csv", PADCHEST)])
    # both films of A, of which one is itself in training, and that of B; C's is of its test
    assert counts(found) == (1, 3, 2, 0) and found["unknown"] is None
    assert found["compared"] == ["image files", "image ids", "patient ids"]
    text = seen_text(found, 4, 3)
    assert "TRAINED ON" in text and "films of 2 of these 3 patients, 1 of these 4 images" in text
    # the training's own splits count, not those of the scored table
    elsewhere = [(*row[:3], "test", row[4]) for row in PADCHEST]
    found = told(own, [write(tmp_path / "held" / "manifest.csv", elsewhere)])
    assert counts(found) == (0, 0, 0, 0) and "none of these patients" in seen_text(found, 4, 3)


def test_equal_ids_of_two_sets_without_a_common_film_are_told_as_such(tmp_path: Path) -> None:
    own = write(tmp_path / "own.csv", [("a.png", "1", "n1", "test", "01")])
    found = told(own, [write(tmp_path / "nih.csv", [("b.png", "1", "n7", "train", "02")])])
    assert counts(found) == (0, 0, 0, 1)
    text = seen_text(found, 1, 1)
    assert "1 patients have the id of a patient in training" in text and "TRAINED ON" not in text


def test_ids_that_were_hashed_anew_are_found_by_files(tmp_path: Path) -> None:
    own = write(tmp_path / "own.csv", GR)
    hashed = [("2", "h2", "", "test", "03"), ("1", "h1", "", "train", "01")]
    hashed += [("3", "h2", "", "train", "77")]
    found = told(own, [write(tmp_path / "hashed.csv", hashed)])
    # A by its film; B by one of the training's test, whose patient has another film in training
    assert counts(found) == (1, 3, 2, 0)
    # image ids of one side alone are compared with none
    assert found["compared"] == ["image files", "patient ids"]
    scored = write(tmp_path / "scored.csv", hashed[:2])
    assert told(scored, [own])["compared"] == ["image files", "patient ids"]


def test_equal_ids_are_one_patient_s_where_most_common_films_have_them_too(tmp_path: Path) -> None:
    own, other = write(tmp_path / "own.csv", GR), tmp_path / "other.csv"
    c_again = ("q", "C", "", "train", "92")  # an id of both, without a common film
    one = [("p", "A", "", "test", "01"), c_again]
    assert counts(told(own, [write(other, one)])) == (0, 1, 1, 0)
    half = [("p2", "X", "", "test", "02"), *one]  # as often another
    assert counts(told(own, [write(other, half)])) == (0, 0, 0, 1)
    blank = [("p", "", "", "test", "01"), c_again]  # whose the common film is nobody says
    assert counts(told(own, [write(other, blank)])) == (0, 0, 0, 1)


def test_the_file_that_prepare_made_two_pictures_of_is_one_film(tmp_path: Path) -> None:
    tables = []
    for name, stored, patient, split, source in (
        ("own", "aa", "p", "test", "5e"),
        ("training", "bb", "q", "train", "5e"),
        ("unknown", "dd", "p2", "test", ""),
        ("also unknown", "ee", "q2", "train", ""),
    ):
        path = write(tmp_path / name / "m.csv", [(f"{name}.png", patient, "", split, stored)])
        index = {"sha256": [stored, "cc"], "source_sha256": [source, ""]}
        pq.write_table(pa.table(index), path.parent / "index.parquet")
        tables.append(path)
    assert counts(told(tables[0], tables[1:])) == (1, 1, 1, 0)
    assert counts(told(tables[2], tables[3:])) == (0, 0, 0, 0)


def hashed(path: Path, hashes: dict[str, int]) -> None:
    """Hashes of pictures beside a table: of films of the same number almost the same bits."""
    noise = np.random.default_rng(len(hashes))
    films = []
    for number in hashes.values():
        bits = np.random.default_rng(number).random(BITS) < 0.5
        bits[noise.choice(BITS, 70, replace=False)] ^= True
        films.append([np.packbits(bits).tobytes()])
    pq.write_table(hash_table(list(hashes), films), path.parent / HASHES_FILE)


def test_a_film_that_was_stored_anew_is_found_by_its_picture(tmp_path: Path) -> None:
    own = write(tmp_path / "rsna" / "m.csv", GR)
    nih = [("1.png", "7", "x1", "train", "91"), ("2.png", "8", "x2", "train", "92")]
    nih += [("3.png", "9", "x3", "test", "93"), ("4.png", "A", "f1", "train", "94")]
    other = write(tmp_path / "nih" / "m.csv", nih)
    numbers = {"a.png": 1, "a2.png": 2, "b.png": 3, "c.png": 4, "d.png": 5}
    hashed(own, numbers)
    assert "pictures" not in told(own, [other])["compared"]  # of one side alone
    # a2 of A, who is known by another film, and b are films of train; c is one of test, d no film
    # that is scored; a is known by its id already
    hashed(other, {"1.png": 2, "2.png": 3, "3.png": 4, "4.png": 1})
    found = told(own, [other])
    assert counts(found) == (1, 2, 1, 0)
    assert (found["films_by_picture"], found["patients_by_picture"]) == (2, 1)
    usual = told(own, [write(other, nih, NAMES.replace("image", "path", 1))])
    assert usual == {**found, "manifests": usual["manifests"]}
    # hashes are told apart by the images' names: of a table without them they are nobody's
    found = told(own, [write(other, [row[1:] for row in nih], NAMES.removeprefix("image,"))])
    assert found["films_by_picture"] == 0 and "pictures" not in found["compared"]
    found = told(own, [write(other, nih)])
    assert found["compared"][-1] == "pictures"
    text = seen_text(found, 4, 3)
    assert "SAME PICTURE: 2 more of these images look like films in training" in text
    assert "of 1 more patients" in text
    bare = write(tmp_path / "bare.csv", GR)  # of the training's side alone
    assert told(bare, [other])["films_by_picture"] == 0
    hashed(other, {"3.png": 3})
    found = told(own, [other])
    assert found["films_by_picture"] == 0 and "SAME PICTURE" not in seen_text(found, 4, 3)


def test_pictures_that_were_not_all_compared_are_not_called_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = write(tmp_path / "rsna" / "m.csv", GR)
    other = write(tmp_path / "nih" / "m.csv", [("1.png", "7", "x1", "train", "91")])
    hashed(own, dict.fromkeys(("a.png", "a2.png", "b.png", "c.png", "d.png"), 1))
    hashed(other, {"1.png": 1})
    assert told(own, [other])["unknown"] is None
    monkeypatch.setattr(same_pictures, "_MOST_PAIRS", 2)
    assert "more pairs of pictures" in str(told(own, [other])["unknown"])


def test_train_and_test_of_one_table_may_show_the_same_picture(tmp_path: Path) -> None:
    own = write(tmp_path / "own.csv", GR)
    hashed(own, {"a.png": 1, "a2.png": 2, "b.png": 5, "c.png": 4, "d.png": 5})
    found = told(own, [], training(own))
    assert counts(found) == (0, 0, 0, 0)
    assert (found["films_by_picture"], found["patients_by_picture"]) == (1, 1)


def test_the_training_s_own_rows_are_its_films_without_any_id_of_films(tmp_path: Path) -> None:
    own = write(tmp_path / "own.csv", [row[:2] + row[3:4] for row in GR], "image,patient_id,split")
    settings = [f"data.manifest={own}", "data.columns.report=null", "data.columns.study_id=null"]
    config = load([], settings)
    seen = find_seen(config, load_manifest(config.data), [training(own)])
    assert counts(seen.of(np.arange(5))) == (1, 1, 1, 0)


def test_an_image_id_is_one_of_its_patient_and_a_hash_of_either_case(tmp_path: Path) -> None:
    own = write(tmp_path / "own.csv", [("a.png", "P", "1", "test", "ab")])
    other = write(tmp_path / "other.csv", [("b.png", "Q", "1", "train", "cd")])
    assert counts(told(own, [other])) == (0, 0, 0, 0)
    assert counts(told(own, [write(other, [("b.png", "Q", "2", "train", "AB")])])) == (1, 1, 1, 0)


def test_blank_cells_are_no_common_film(tmp_path: Path) -> None:
    own = write(tmp_path / "own.csv", [("a.png", "1", "", "test", ""), ("b", "2", " ", "test", "")])
    other = write(
        tmp_path / "other.csv", [("c", "1", "", "train", ""), ("d", "9", "", "train", "")]
    )
    found = told(own, [other])
    assert counts(found) == (0, 0, 0, 1) and found["compared"] == ["patient ids"]


def test_columns_that_the_evaluation_does_not_ask_for_cannot_stop_it(tmp_path: Path) -> None:
    """Splits of other names, which data.columns.split=null passes over; ids that are none."""
    table = {"image": ["a.png", "b.png"], "patient_id": ["A", "B"], "split": ["fold 1", "fold 2"]}
    table["image_id"] = [["f1"], ["f1"]]
    own = tmp_path / "own.parquet"
    pq.write_table(pa.table(table), own)
    names = "report study_id split".split()
    settings = [f"data.manifest={own}", *(f"data.columns.{name}=null" for name in names)]
    other = write(tmp_path / "other.csv", [("c.png", "B", "f1", "train", "01")])
    config = load([], [*settings, f"evaluate.trained_on=[{other}]"])
    found = find_seen(config, load_manifest(config.data), []).of(np.arange(2))
    assert counts(found) == (0, 0, 0, 1) and found["compared"] == ["patient ids"]


def test_a_table_without_splits_is_trained_on_whole_and_usual_names_are_found(
    tmp_path: Path,
) -> None:
    own = write(tmp_path / "own.csv", GR)
    other = write(tmp_path / "t.csv", [("A", "f1"), ("C", "f4")], "subject_id,dicom_id")
    assert counts(told(own, [other])) == (2, 3, 2, 0)
    with pytest.raises(ManifestError, match="patient_id"):
        told(own, [write(tmp_path / "none.csv", [("1",)], "report")])
    run = small_run()  # a training refuses it before its first step, not after its last
    evaluate = dataclasses.replace(run.config.evaluate, trained_on=(str(tmp_path / "gone.csv"),))
    config = dataclasses.replace(run.config, evaluate=evaluate)
    with pytest.raises(ManifestError, match="evaluate.trained_on: .*gone.csv: cannot be read"):
        check_evaluation(config, run.manifest, run.linker, run.table)


def training(path: Path, sha256: str | None = None, **columns: Any) -> Training:
    data = dataclasses.replace(Data(), manifest=str(path), columns=Columns(**columns))
    known = sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
    return Training(data, known)


def test_the_training_s_own_manifest_is_asked_where_it_still_lies(tmp_path: Path) -> None:
    own = write(tmp_path / "own.csv", GR)
    other = write(tmp_path / "padchest.csv", PADCHEST)
    run = training(other, image_id="image_id")
    assert counts(told(own, [], run)) == (1, 3, 2, 0)
    assert told(own, [other], run)["manifests"] == told(own, [], run)["manifests"]  # once
    # of the very same table train and test share nobody
    same = training(own)
    assert counts(told(own, [], same)) == (0, 0, 0, 0)
    # an export does not say where the table lies
    nowhere = dataclasses.replace(same, data=dataclasses.replace(same.data, manifest=""))
    found = told(own, [], nowhere)
    assert counts(found) == (0, 0, 0, 0) and found["unknown"] is None
    # but for one file under two patients
    leaky = write(tmp_path / "leaky.csv", [*GR[:3], ("c.png", "C", "f4", "test", "05"), GR[4]])
    assert counts(told(leaky, [], training(leaky))) == (1, 1, 1, 0)
    with other.open("a") as file:
        file.write("x/5.png,F,g3,train,95\n")
    changed = dataclasses.replace(run)
    found = told(own, [], changed)
    assert found["manifests"] == [] and "has changed since" in found["unknown"]
    assert "is not known" in seen_text(found, 4, 3)
    other.unlink()
    found = told(own, [], run)
    assert "is not at hand (evaluate.trained_on=MANIFEST)" in found["unknown"]
    # a table that is not the training's leaves the rest open
    part = write(tmp_path / "part.csv", PADCHEST[:1])
    found = told(own, [part], run)
    assert counts(found) == (1, 2, 1, 0) and "nothing is known" in seen_text(found, 4, 3)


def told_of(own: Path, names: str, trained_on: list[Path], *trainings: Training) -> dict[str, Any]:
    """Of all rows of a table of few columns, those of `names` set to null."""
    nulls = [f"data.columns.{name}=null" for name in names.split()]
    asked = f"evaluate.trained_on=[{','.join(map(str, trained_on))}]"
    settings = [f"data.manifest={own}", *nulls, asked, "data.empty_report=image_only"]
    config = load([], settings)
    manifest = load_manifest(config.data)
    return find_seen(config, manifest, trainings).of(manifest.rows("test", with_report=False))


@pytest.mark.parametrize("blank", ["", " ", None])
def test_rows_without_a_patient_are_nobodys(tmp_path: Path, blank: str | None) -> None:
    own, other = write(tmp_path / "own.csv", GR), tmp_path / "other.parquet"
    table = {"patient_id": pa.array([blank] * 3, pa.string()), "split": ["train", "test", "train"]}
    pq.write_table(pa.table({**table, "sha256": ["77", "03", "01"]}), other)
    # A by its film; B's is of the training's test, and its blank no patient of the others
    assert counts(told(own, [other])) == (1, 2, 1, 0)


def test_a_named_table_has_the_splits_that_its_training_read(tmp_path: Path) -> None:
    """By hash, though a column of splits lies beside; and ids that its settings do not name."""
    rows = [(f"{i}.png", f"P{i}", f"f{i}", "train") for i in range(200)]
    own = write(tmp_path / "own.csv", rows, "image,patient_id,image_id,split")
    run = training(own, split=None)
    for named in ([], [own]):
        assert counts(told_of(own, "report study_id split", named, run)) == (0, 0, 0, 0)
    part = write(tmp_path / "part.csv", rows, "image,subject_id,dicom_id,set")
    run = training(part, patient_id="subject_id", split="set")
    found = told_of(own, "report study_id split", [], run)
    assert found["compared"] == ["image ids", "patient ids"] and found["films"] > 5


def test_a_patient_that_is_found_by_a_film_is_not_told_again_as_an_id(tmp_path: Path) -> None:
    own = write(tmp_path / "own.csv", GR)
    other = write(tmp_path / "padchest.csv", PADCHEST)
    strangers = [("x.png", "A", "n1", "train", "71"), ("y.png", "C", "n2", "train", "72")]
    nih = write(tmp_path / "nih.csv", strangers)
    found = told(own, [other, nih])
    assert counts(found) == (1, 3, 2, 1) and found == told(own, [nih, other])
    keys = read_film_keys(other, Columns(), splits_by_hash=False)
    assert '"A"' in str(keys.patient) and '"A"' not in repr(keys)


def test_one_training_of_several_that_is_not_known_is_told(tmp_path: Path) -> None:
    own = write(tmp_path / "own.csv", GR)
    other = write(tmp_path / "padchest.csv", PADCHEST)
    known, silent = training(other), Training(Data(), None)
    gone = Training(dataclasses.replace(Data(), manifest=str(tmp_path / "gone.csv")), "ab" * 32)
    assert "does not say what it was trained on" in told(own, [], silent)["unknown"]
    assert told(own, [other], silent)["unknown"] is None
    for trainings in ([known, gone], [gone, known], [gone, silent], [silent, gone]):
        assert "(SHA-256 abababababab) is not at hand" in told(own, [other], *trainings)["unknown"]
    for trainings in ([known, training(own)], [training(own), known]):
        began = dataclasses.replace(trainings[0], goes_on=True)
        assert "began with trained" in told(own, [], began, trainings[1])["unknown"]
    again = dataclasses.replace(gone, goes_on=True)  # the nearer reason
    assert "is not at hand" in told(own, [], again)["unknown"]
    assert (
        "is not at hand" in told(own, [], dataclasses.replace(known, goes_on=True), gone)["unknown"]
    )
    # of one that lies elsewhere by now the splits are still those that the training read
    rows = [(*row[:3], "test", row[4]) for row in GR]
    moved = write(tmp_path / "moved.csv", rows, f"{NAMES[:-13]},fold,sha256")
    run = training(moved, split="fold")
    elsewhere = dataclasses.replace(run, data=dataclasses.replace(run.data, manifest="gone.csv"))
    found = told(own, [moved], elsewhere)
    assert counts(found) == (0, 0, 0, 0) and found["unknown"] is None


def test_what_a_training_began_with_is_unknown_until_it_is_named(tmp_path: Path) -> None:
    own = write(tmp_path / "own.csv", GR)
    other = write(tmp_path / "padchest.csv", PADCHEST)
    run = dataclasses.replace(training(own), goes_on=True)
    for named in ([], [own]):
        found = told(own, named, run)
        assert counts(found) == (0, 0, 0, 0)
        text = seen_text(found, 4, 3)
        assert "nothing is known: its image tower began with trained weights (evaluate" in text
    found = told(own, [other], run)
    assert counts(found) == (1, 3, 2, 0) and found["unknown"] is None
    for start, goes_on in [
        ({"image": {"kind": "folder", "name": "x"}, "text": None}, True),
        ({"image": {"kind": "hub", "name": "a/b"}}, True),
        ({"image": {"kind": "random"}, "text": {"kind": "hub", "name": "a/b"}}, False),
        ({"image": None, "text": None}, False),
        (None, False),
    ]:
        opened = dataclasses.replace(
            from_pretrained(small_export()), origin={"manifest": "0", "start": start}
        )
        assert Training.of(opened) == Training(opened.config.data, "0", goes_on)


@pytest.mark.parametrize("rows", [None, GR[:3], GR[::-1]])
def test_a_scored_table_that_was_replaced_since_is_not_compared(
    tmp_path: Path, rows: list[tuple[str, ...]] | None
) -> None:
    own = write(tmp_path / "own.csv", GR)
    other = write(tmp_path / "padchest.csv", PADCHEST)
    nulls = ["data.columns.report=null", "data.columns.study_id=null"]
    settings = [f"data.manifest={own}", *nulls, "data.empty_report=image_only"]
    config = load([], [*settings, f"evaluate.trained_on=[{other}]"])
    manifest = load_manifest(config.data)
    own.unlink()
    if rows is not None:
        write(own, rows)
    found = find_seen(config, manifest, []).of(manifest.rows("test", with_report=False))
    why = "the table that is scored has changed since it was read"
    assert found == {"manifests": [], "unknown": why}  # no number of what was not compared


def test_an_evaluation_tells_of_patients_in_training_and_names_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run()
    manifest = run.manifest
    test = manifest.rows("test")
    patients = np.unique(manifest.patient.to_numpy(zero_copy_only=False)[test]).tolist()
    ids = [(patient, "another film") for patient in patients[:2]]
    trained = write(tmp_path / "trained.csv", ids, "patient_id,image_id")
    settings = [*run.settings, f"checkpoint={small_export()}", "evaluate.bootstrap=5"]
    classes = "transfer.classes={pleural_effusion: zero}"
    probe = ["transfer.task=classification", "transfer.probe=logistic", classes]
    probe += ["transfer.val_share=0.4", "transfer.fractions=[100]", "transfer.seeds=[1]"]
    for name, more in (("zero", []), ("probe", probe)):
        out = tmp_path / name
        assert main(["evaluate", *settings, *more, "--out", str(out)]) == 0
        assert "is not known" in capsys.readouterr().out
        more = [*more, f"evaluate.trained_on=[{trained}]"]
        assert main(["evaluate", *settings, *more, "--out", str(out)]) == 0
        assert "2 patients have the id of a patient in training" in capsys.readouterr().out
        page = (out / "report.html").read_text(encoding="utf-8")
        results = (out / "results.json").read_text(encoding="utf-8")
        assert json.loads(results)["data"]["trained_on"]["patients_by_id_alone"] == 2
        assert "2 patients have the id of a patient in training" in page
        assert not any(patient in results or patient in page for patient in patients)
