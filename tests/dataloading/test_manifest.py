"""Manifests: what is read, what is refused and how it is named, pair ids against a slow oracle."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from mlip.dataloading.manifest import Manifest, ManifestError, load_manifest
from mlip.dataloading.tables.table import column_names
from mlip.settings import config
from mlip.system.machine import LimitError

HEADER = "image,report,patient_id,study_id,split"
GOOD = [
    "a.png,The lungs are clear.,p1,s1,train",
    "b.png,No effusion is seen.,p1,s1,train",
    "c.png,the lungs are CLEAR,p2,s1,train",
    "d.png,Small nodule here.,p3,s3,val",
    "e.png,Heart is large.,p4,s4,test",
]


def write(folder: Path, lines: list[str], name: str = "m.csv", header: str = HEADER) -> Path:
    path = folder / name
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def load(path: Path, *overrides: str) -> Manifest:
    return load_manifest(config.load([], [f"data.manifest={path}", *overrides]).data)


def test_rows_follow_the_split_column_and_its_usual_spellings(tmp_path: Path) -> None:
    lines = [
        f"{i}.png,Two words.,p{i},s{i},{split}"
        for i, split in enumerate(
            ["train", "Training", "valid", "validate", "VAL", "dev", "test", ""]
        )
    ]
    manifest = load(write(tmp_path, lines))
    assert manifest.rows("train").tolist() == [0, 1]
    assert manifest.rows("val").tolist() == [2, 3, 4, 5]
    assert manifest.rows("test").tolist() == [6]
    assert manifest.excluded("train") == {
        "other_split_val": 4,
        "other_split_test": 1,
        "no_split": 1,
    }


def test_csv_parquet_and_jsonl_give_the_same_manifest(tmp_path: Path) -> None:
    table = [dict(zip(HEADER.split(","), line.split(","), strict=True)) for line in GOOD]
    pa.parquet.write_table(pa.Table.from_pylist(table), tmp_path / "m.parquet")
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, table)) + "\n")
    csv = load(write(tmp_path, GOOD))
    for name in ("m.parquet", "m.jsonl"):
        other = load(tmp_path / name)
        assert other.image.equals(csv.image) and list(other.report) == list(csv.report)
        assert (other.split == csv.split).all() and (other.pair_id == csv.pair_id).all()
        assert (other.rule == csv.rule).all()


def test_byte_order_mark_carriage_returns_semicolons_and_quoted_line_breaks(tmp_path: Path) -> None:
    text = "\ufeff" + HEADER.replace(",", ";") + "\r\n"
    text += 'a.png;"Two\r\nlines; and a ""quote""";0012;s1;train\r\n'
    path = tmp_path / "m.csv"
    path.write_bytes(text.encode())
    manifest = load(path)
    assert manifest.text(0) == 'Two\r\nlines; and a "quote"'
    assert manifest.patient[0].as_py() == "0012"  # a number would have lost its zeros


def test_numeric_ids_of_parquet_become_text(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image": ["a.png", "b.png"],
            "report": ["Two words.", "Other words."],
            "patient_id": pa.array([7, 8], pa.int64()),
            "study_id": pa.array([1, 2], pa.int32()),
            "split": ["train", "train"],
        }
    )
    pa.parquet.write_table(table, tmp_path / "m.parquet")
    assert load(tmp_path / "m.parquet").patient.to_pylist() == ["7", "8"]
    floats = table.set_column(2, "patient_id", pa.array([7.0, 8.0]))
    pa.parquet.write_table(floats, tmp_path / "f.parquet")
    with pytest.raises(ManifestError, match="patient_id.*expected text or integers, got double"):
        load(tmp_path / "f.parquet")


def test_all_missing_columns_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, ["a.png,x,y"], header="path,patientid,reports")
    with pytest.raises(ManifestError) as caught:
        load(path)
    message = str(caught.value)
    for name in ("'image'", "'report'", "'patient_id'", "'study_id'", "'split'"):
        assert name in message
    assert "nearest is 'patientid'" in message
    assert caught.value.exit_code == 3


def faulty(lines: list[str], **kw: str) -> Callable[[Path], Path]:
    return lambda folder: write(folder, lines, **kw)


@pytest.mark.parametrize(
    "make, words",
    [
        (faulty([*GOOD, "f.png,Two words.,p1,s9,test"]), "1 patients occur in more than one split"),
        (faulty([*GOOD, "f.png,Two words., p1\t,s9,test"]), "1 patients occur in more than one"),
        (faulty([*GOOD, GOOD[0]]), "1 image paths occur more than once.*data row 1"),
        (faulty([*GOOD, "f.png,Two words.,p9"]), "1 rows do not have the header's 5.*lines 7"),
        (
            faulty([*GOOD, "f.png,Two words.,,s9,train"]),
            "'patient_id'.*is blank.*in 1 rows.*data row 6",
        ),
        (  # what R, pandas and databases write for a gap: unlike people would be one patient
            faulty([*GOOD, "f.png,Two words.,NA,s9,train", "g.png,Three words.,nan,s8,train"]),
            "'patient_id'.*says none.*in 2 rows.*data row 6",
        ),
        (faulty([*GOOD, "f.png,Two words.,p9,s9,trian"]), "1 unknown values: 'trian'"),
        (faulty([*GOOD, ",Two words.,p9,s9,train"]), "blank or could lead outside.*data row 6"),
        (faulty([]), "no rows"),
        (faulty(GOOD, name="m.txt"), "got suffix '.txt'"),
        (faulty(GOOD, header=HEADER + ",split"), "do not have the header's 6|occur twice: split"),
        (lambda folder: folder / "none.csv", "cannot be read: No such file"),
    ],
)
def test_faults_are_refused_by_name(
    tmp_path: Path, make: Callable[[Path], Path], words: str
) -> None:
    with pytest.raises(ManifestError, match=f"(?s){words}"):
        load(make(tmp_path))


def test_a_relative_manifest_that_is_not_there_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ManifestError, match=rf"none\.csv.*\(looked for below {tmp_path}\)"):
        load(Path("none.csv"))


def test_bytes_that_are_no_utf8_are_refused_without_quoting_them(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_bytes(f"{HEADER}\n".encode() + b"a.png,Canary \xe9\xff text,p1,s1,train\n")
    with pytest.raises(ManifestError, match="not UTF-8") as caught:
        load(path)
    assert "Canary" not in str(caught.value)


@pytest.mark.parametrize("most", [0, 1])
def test_a_limit_on_threads_is_no_fault_of_the_file(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow, which needs two, said "damaged" where it got none, and hung where it got one."""
    started: list[threading.Thread] = []
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if len(started) == most:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(LimitError, match="ulimit -u"):
        load(write(tmp_path, GOOD))


def test_what_arrow_says_of_a_limit_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **named: object) -> None:
        raise pa.ArrowException("Unknown error: Failed to launch worker thread: Resource temp")

    monkeypatch.setattr(pa.parquet, "ParquetFile", refuse)
    path = tmp_path / "m.parquet"
    path.touch()
    with pytest.raises(LimitError, match=r"m\.parquet: cannot be read: .*ulimit -u"):
        load(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(b"")
    with pytest.raises(ManifestError, match="empty"):
        load(tmp_path / "m.csv")
    (tmp_path / "m.parquet").write_bytes(b"PAR1 no table")
    with pytest.raises(ManifestError, match="damaged"):
        load(tmp_path / "m.parquet")


def test_a_damaged_parquet_file_is_called_damaged(tmp_path: Path) -> None:
    """Arrow raises an OSError without a number for much of it: "cannot be read: None" was told."""
    path = tmp_path / "m.parquet"
    pa.parquet.write_table(pa.table({"image": ["a.png"]}), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * (len(whole) - 12) + whole[-8:])  # the footer's bytes
    for read in (load, column_names):
        with pytest.raises(ManifestError, match=r"m\.parquet: cannot be read as parquet: damaged"):
            read(path)


def test_errors_never_hold_report_text_or_a_patient_id(tmp_path: Path) -> None:
    canary, patient = "Xylophone shadow canary", "patient-canary-77"
    rows = [
        [f"a.png,{canary},{patient},s1,train", f"b.png,{canary},{patient},s2,test"],
        [f"a.png,{canary},{patient},s1,train,{canary}"],
        [f"a.png,{canary},{patient},s1,train", f"a.png,{canary},{patient},s1,train"],
        [f"../a.png,{canary},{patient},s1,train"],
        [f"a.png,{canary},{patient},s1,{patient}", *(f"{i}.png,x y,q{i},s,{i}" for i in range(4))],
    ]
    for lines in rows:
        with pytest.raises(ManifestError) as caught:
            load(write(tmp_path, lines))
        assert canary not in str(caught.value) and patient not in str(caught.value)


@pytest.mark.parametrize(
    "path",
    ["../x.png", "a/../../x.png", "/etc/x.png", "~/x.png", "file://x.png", "//host/x.png",
     "a\\..\\x.png", "%2e%2e/x.png", "a%2Fx.png", "C:/x.png", "a/.."],
)  # fmt: skip
def test_a_path_that_could_leave_the_root_refuses_the_manifest(tmp_path: Path, path: str) -> None:
    with pytest.raises(ManifestError, match="could lead outside the root"):
        load(write(tmp_path, [f"{path},Two words.,p1,s1,train"]))


def test_a_nul_in_a_path_refuses_the_manifest(tmp_path: Path) -> None:
    table = pa.table({k: ["x\0y.png" if k == "image" else "two words"] for k in HEADER.split(",")})
    pa.parquet.write_table(table.set_column(4, "split", [["train"]]), tmp_path / "m.parquet")
    with pytest.raises(ManifestError, match="could lead outside the root"):
        load(tmp_path / "m.parquet")


def test_a_folder_link_out_of_the_root_refuses_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "root").mkdir()
    os.symlink(tmp_path / "outside", tmp_path / "root" / "images")
    path = write(tmp_path / "root", ["images/x.png,Two words.,p1,s1,train"])
    with pytest.raises(ManifestError, match="data row 1 leads.*through a link") as caught:
        load(path)
    assert "images" not in str(caught.value).replace("holds all images", "")


def test_dots_inside_a_name_are_no_escape(tmp_path: Path) -> None:
    manifest = load(write(tmp_path, ["a..b/c...png,Two words.,p1,s1,train"]))
    assert manifest.image_path(0) == "a..b/c...png"


@pytest.mark.parametrize(
    "report, rule",
    [
        ("", "no_report"),
        ("   ", "blank_report"),
        (" ___ . ___", "blank_report"),
        ("nan", "nan_report"),
        ("NaN", "nan_report"),
        ("None", "nan_report"),
        ("N/A", "nan_report"),
        ("null.", "nan_report"),
        ("Normal.", "one_word_report"),
    ],
)
def test_reports_without_content_are_left_out_by_a_counted_rule(
    tmp_path: Path, report: str, rule: str
) -> None:
    path = write(tmp_path, [*GOOD, f"f.png,{report},p9,s9,train"])
    manifest = load(path)
    assert 5 not in manifest.rows("train")
    assert manifest.excluded("train")[rule] == 1
    assert manifest.text(5) == ""
    kept = load(path, "data.empty_report=image_only")
    assert 5 not in kept.rows("train")
    assert 5 in kept.rows("train", with_report=False)
    counts = kept.excluded("train", with_report=False)
    assert rule not in counts
    assert len(kept.rows("train", with_report=False)) + sum(counts.values()) == len(kept)


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_a_report_of_megabytes_is_one_row_like_any_other(tmp_path: Path, name: str) -> None:
    text = "effusion " * 400_000
    row = {"image": "a.png", "report": text, "patient_id": "p", "study_id": "s", "split": "train"}
    if name == "m.csv":
        path = write(tmp_path, [",".join(row.values()), GOOD[0].replace("a.png", "b.png")])
    else:
        path = tmp_path / name
        path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "image": "b.png"}) + "\n")
    manifest = load(path)
    assert len(manifest.rows("train")) == 2 and manifest.text(0) == text


def test_a_manifest_without_report_column_serves_image_only_tasks(tmp_path: Path) -> None:
    path = write(tmp_path, ["a.png,p1,train", "b.png,p2,test"], header="image,patient_id,split")
    overrides = ["data.columns.report=null", "data.columns.study_id=null"]
    manifest = load(path, *overrides, "data.empty_report=image_only")
    assert len(manifest.rows("train")) == 0
    assert manifest.rows("train", with_report=False).tolist() == [0]


def test_pair_ids_join_studies_and_equal_texts_transitively(tmp_path: Path) -> None:
    lines = [
        "a.png,The lungs are clear.,p1,s1,train",
        "b.png,No effusion is seen.,p1,s1,train",  # study of a
        "c.png,THE LUNGS  are clear,p2,s1,train",  # words of a; its study s1 is another patient's
        "d.png,Other finding here.,p2,s1,train",  # study of c
        "e.png,nothing in common,p3,,train",
        "f.png,,p4,,train",
        "g.png,,p5,,train",  # two empty texts are no equal texts
        "h.png,Size 1.5 cm.,p6,s6,train",
        "i.png,Size 15 cm.,p7,s7,train",
    ]
    manifest = load(write(tmp_path, lines), "data.empty_report=image_only")
    assert manifest.pair_id.tolist() == [0, 0, 0, 0, 4, 5, 6, 7, 8]


def test_without_a_split_column_patients_fall_by_hash_and_stay_together(tmp_path: Path) -> None:
    lines = [f"{i}.png,Report number {i}.,p{i // 2},s{i}" for i in range(4000)]
    header = HEADER.removesuffix(",split")
    manifest = load(write(tmp_path, lines, header=header), "data.columns.split=null")
    split = manifest.split.reshape(-1, 2)
    assert (split[:, 0] == split[:, 1]).all()
    shares = np.bincount(split[:, 0], minlength=3) / 2000
    assert np.abs(shares - [0.8, 0.1, 0.1]).max() < 0.03  # 4 standard errors of 2,000 patients
    fewer = write(tmp_path, lines[:100], name="fewer.csv", header=header)
    fewer_split = load(fewer, "data.columns.split=null").split
    assert (fewer_split == manifest.split[:100]).all()


def test_white_space_around_an_id_makes_no_other_patient_and_no_other_study(tmp_path: Path) -> None:
    lines = ["a.png,One text.,000077,s1,train", "b.png,Another text., 000077 ,s1 ,train"]
    manifest = load(write(tmp_path, lines))
    assert manifest.patient_key[0] == manifest.patient_key[1]
    assert manifest.pair_id.tolist() == [0, 0]
    drawn = load(write(tmp_path, lines), "data.columns.split=null").split
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("gap", ["", "NA", "nan", "<NA>", "-"])
def test_a_gap_in_place_of_a_study_joins_no_rows(tmp_path: Path, gap: str) -> None:
    """Two studies of a patient were never each other's negatives where R had written NA."""
    lines = [f"a.png,One text.,p1,{gap},train", f"b.png,Another text.,p1,{gap},train"]
    assert load(write(tmp_path, lines)).pair_id.tolist() == [0, 1]


def test_messages_name_an_image_by_its_row_and_never_by_its_path(tmp_path: Path) -> None:
    """Folders are often named after patients; the patient's number need not stand in them."""
    lines = ["DOE_JANE/x.png,Two words.,10000032,s1,train", "b.png,Two words.,77,s2,train"]
    manifest = load(write(tmp_path, lines))
    for row in (0, 1):
        name = manifest.image_name(row)
        assert name == f"of data row {row + 1} (hashed {manifest.image_hash(row)})"
        # results.json, which is passed on, holds the fingerprint: no guess can be tested with it
        guess = hashlib.sha256(f"{manifest.fingerprint}\0{manifest.image_path(row)}".encode())
        assert guess.hexdigest()[:12] != manifest.image_hash(row)
    assert len({manifest.image_hash(row) for row in (0, 1)}) == 2
    assert manifest.salt not in repr(manifest)


@pytest.mark.parametrize(
    "sections, expected",
    [
        ("findings", {0: "Small effusion on the left.", 2: "No headings at all here."}),
        ("impression", {0: "Effusion is present.", 1: "Normal chest film.",
                        2: "No headings at all here."}),
        ("all", {0: "Small effusion on the left.\n\nEffusion is present.", 1: "Normal chest film.",
                 2: "No headings at all here.", 3: "HISTORY: cough for days"}),
    ],
)  # fmt: skip
def test_sections_are_chosen_at_load(tmp_path: Path, sections: str, expected: dict) -> None:
    reports = [
        "HISTORY: cough FINDINGS: Small effusion on the left. IMPRESSION: Effusion is present.",
        "EXAM: chest. IMPRESSION: Normal chest film.",
        "No headings at all here.",
        "HISTORY: cough for days",
    ]
    lines = [f'{i}.png,"{text}",p{i},s{i},train' for i, text in enumerate(reports)]
    manifest = load(write(tmp_path, lines), f"data.sections={sections}")
    assert {row: manifest.text(row) for row in manifest.rows("train").tolist()} == expected
    left_out = 4 - len(expected)
    assert manifest.excluded("train") == ({"no_section": left_out} if left_out else {})


def test_the_real_manifest_loads_as_it_lies() -> None:
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "manifest.csv"
    if not path.is_file():
        pytest.skip("../shared/data is not there")
    manifest = load(
        path,
        "data.columns.image=path",
        "data.columns.report=text",
        "data.columns.study_id=null",
        "data.columns.image_id=image_id",
        "data.columns.sha256=sha256",
        "data.columns.labels=findings",
    )
    for split in ("train", "val", "test"):
        assert len(manifest.rows(split)) + sum(manifest.excluded(split).values()) == 1108
    assert len(manifest.rows("train")) > 100


def test_what_a_notebook_shows_of_a_manifest_names_nobody(tmp_path: Path) -> None:
    rows = [f"anna_{i}.png,Canary {i} is clear.,meier-{i},s{i},train" for i in range(40)]
    manifest = load(write(tmp_path, rows))
    assert not any(word in repr(manifest) for word in ("anna", "Canary", "meier"))
    assert "m.csv" in repr(manifest)
    for made in (copy.deepcopy(manifest), pickle.loads(pickle.dumps(manifest))):
        assert [made.text(i) for i in range(40)] == [manifest.text(i) for i in range(40)]
        assert made.image_path(3) == "anna_3.png" and len(made.rows("train")) == 40
    for ask in (manifest.rows, manifest.excluded):
        with pytest.raises(ValueError, match="split: expected one of train, val, test, got 'vali"):
            ask("validation")
