"""`mlip prepare` as a command: arguments, splits, and what it prints."""

import argparse
import csv
import json
import os
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pydicom
import pytest

from mlip.dataloading.datasets import DATASETS
from mlip.dataloading.datasets.rows import DatasetError, Row, split_by_patient
from mlip.dataloading.dicom.notes import NOTES
from mlip.dataloading.prepare import command as prepare
from mlip.settings.config import ConfigError
from tests.raw_layouts import (
    collect,
    image,
    make_rsna,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")


def test_every_data_set_states_licence_and_access_and_refuses_an_empty_folder(tmp_path):
    for name, dataset in DATASETS.items():
        assert dataset.licence and dataset.access and dataset.title
        with pytest.raises(DatasetError) as caught:
            collect(name, tmp_path)
        assert str(tmp_path) in str(caught.value)
        if name not in ("folder", "manifest"):
            assert dataset.access in str(caught.value)


def test_splits_follow_the_patient_in_the_asked_shares():
    splits = Counter(split_by_patient(str(i), "x", val=0.1, test=0.2) for i in range(20_000))
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        # 5 standard deviations of a binomial draw
        assert abs(splits[split] - 20_000 * share) < 5 * (20_000 * share * (1 - share)) ** 0.5
    assert split_by_patient("7", "x", 0.1) == split_by_patient("7", "x", 0.1)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([Row("a", "p", "", "1", "train"), Row("b", "p", "", "2", "test")], "more than one split"),
        ([Row("a", "p", "", "1", "train"), Row("a", "q", "", "2", "train")], "repeat an image"),
        ([Row("a", "p", "", "1", "train"), Row("b", "q", "", "1", "train")], "repeat an image_id"),
        ([Row("../a", "p", "", "1", "train")], "out of the root"),
        ([Row("/a", "p", "", "1", "train")], "out of the root"),
        ([Row("a\0b", "p", "", "1", "train")], "out of the root"),
        ([Row("a//b", "p", "", "1", "train")], "out of the root"),
    ],
)
def test_rows_that_leak_patients_or_leave_the_root_are_refused(rows, message):
    with pytest.raises(DatasetError, match=message):
        prepare.check_rows(rows)


def mlip_prepare(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args([str(argument) for argument in arguments]))


@needs_shared
def test_real_radiographs_are_prepared_end_to_end(tmp_path, capsys):
    assert mlip_prepare("manifest", "--root", SHARED, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "rows 1108 = images 1108 + refused 0 + lost 0" in printed
    counts = next(line for line in printed.splitlines() if line.startswith("val"))
    assert counts.split(maxsplit=5) == (
        ["val", "154", "90", "90", "30", "AP 74, PA 66, not stated 7, AP Supine 5, L 2"]
    )
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    with open(SHARED / "manifest.csv", newline="", encoding="utf-8") as file:
        raw = list(csv.DictReader(file))
    assert Counter(row["split"] for row in rows) == Counter(row["split"] for row in raw)
    assert sorted(row["report"] for row in rows) == sorted(row["text"].strip() for row in raw)
    assert all(max(row["height"], row["width"]) <= 256 for row in rows)
    assert not {row["patient_id"] for row in rows} & {row["patient_id"] for row in raw}
    assert json.loads((tmp_path / "out" / "prepared.json").read_text())["ids"] == "hashed"


def test_prepare_makes_dicom_shards_of_a_public_set_and_says_what_it_did(tmp_path, capsys):
    make_rsna(tmp_path / "raw")
    (tmp_path / "raw" / "stage_2_train_images" / "id3.dcm").write_bytes(b"\0" * 300)
    out = tmp_path / "out"
    settings = ["--bits", 16, "--side", 64, "--workers", 1]
    assert mlip_prepare("rsna_pneumonia", "--root", tmp_path / "raw", "--out", out, *settings) == 0
    printed = capsys.readouterr().out
    assert (
        "refused, unsupported: 1 (the file is no JPEG, PNG or DICOM" in printed
        and "lost 0" in printed
        and "Licence" in printed
    )
    rows = pyarrow.parquet.read_table(out / "manifest.parquet").to_pylist()
    assert {row["patient_id"] for row in rows} == {f"id{i}" for i in range(10) if i != 3}
    assert {row["bits"] for row in rows} == {16}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["folder"], "--root DIR --out DIR"),
        (["folder", "--root", "nowhere", "--out", "x"], "no such folder"),
        (["folder", "--root", ".", "--out", "./x"], "lies inside"),
        (["folder", "--root", "/etc", "--out", "x", "--option", "a=b"], "patient_level"),
        (
            ["folder", "--root", "/etc", "--out", "x"]
            + ["--option", "reports=a.csv", "--option", "reports=b.csv"],
            "--option reports: given as a.csv and as b.csv: expected one of them",
        ),
        (["folder", "--root", "/etc", "--out", "x", "--part", "0/3"], "I from 1 to N"),
        (["folder", "--root", "/etc", "--out", "x", "--part", "4/3"], "I from 1 to N"),
        # a digit to isdigit and no number to int
        (["folder", "--root", "/etc", "--out", "x", "--part", "\u00b2/3"], "I from 1 to N"),
        (["folder", "--root", "/etc", "--out", "x", "--bits", "16", "--codec", "jpeg"], "8 bits"),
        (
            ["folder", "--root", "/etc", "--out", "x", "--codec", "png", "--quality", "90"],
            "of JPEG",
        ),
        (["folder", "--root", "/etc", "--out", "x", "--bits", "16", "--quality", "95"], "of JPEG"),
        (["folder", "--root", "/etc", "--out", "x", "--quality", "101"], "1 to 100"),
        (["folder", "--root", "/etc", "--out", "x", "--side", "9"], "32 to 4096"),
        (["folder", "--root", "/etc", "--out", "x", "--option", "patient_level=0"], "1 or more"),
        (["--explain", "nowhere.dcm"], "no such file"),
        (["--check-phi", ".", "--out", "x"], "--check-phi prepares nothing .* read --out"),
        (["--explain", "a.dcm", "--require-deid"], "does not read --require-deid"),
        (["folder", "--explain", "a.dcm"], "does not read the data set folder"),
        (["--list", "--check-phi", "."], "--list prepares nothing"),
    ],
)
def test_arguments_that_cannot_be_honoured_are_errors(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        mlip_prepare(*arguments)
    assert not (tmp_path / "x").exists()


def test_hashed_ids_can_be_mapped_back_by_a_secret_file_alone(tmp_path):
    for i in range(4):
        image(tmp_path / "raw" / f"MRN{i}" / "a.png", i)
    arguments = ["folder", "--root", tmp_path / "raw", "--out", tmp_path / "out", "--workers", 1]
    with pytest.raises(ConfigError, match="outside --out"):
        mlip_prepare(*arguments, "--id-map", tmp_path / "out" / "ids.csv")
    mlip_prepare(*arguments, "--id-map", tmp_path / "ids.csv")
    assert (tmp_path / "ids.csv").stat().st_mode & 0o777 == 0o600
    with open(tmp_path / "ids.csv", newline="") as file:
        back = {row["patient_hash"]: row["patient_id"] for row in csv.DictReader(file)}
    table = pyarrow.parquet.read_table(tmp_path / "out" / "manifest.parquet")
    hashed = table.column("patient_id").to_pylist()
    assert sorted(back[name] for name in hashed) == [f"MRN{i}" for i in range(4)]
    assert not any("MRN" in str(value) for row in table.to_pylist() for value in row.values())


def test_the_secret_file_alone_names_the_files_that_were_left_out(tmp_path, capsys):
    """ "left out by rule malformed: 2": which of 200,000 nobody could tell."""
    raw = tmp_path / "raw"
    for i in range(3):
        image(raw / f"MRN{i}" / "a.dcm", i)
    (raw / "MRN1" / "cut.dcm").write_bytes((raw / "MRN1" / "a.dcm").read_bytes()[:150])
    (raw / "MRN2" / "copy.dcm").write_bytes((raw / "MRN2" / "a.dcm").read_bytes())
    (raw / "MRN2" / "link.dcm").symlink_to(raw / "MRN2" / "a.dcm")
    (raw / "MRN2" / "empty.dcm").touch()
    (raw / ".MRN").touch()
    with open(os.fsencode(raw / "MRN2") + b"/\xe9.dcm", "wb") as file:
        file.write(b"x")
    ids = tmp_path / "ids.csv"
    arguments = ["folder", "--root", raw, "--out", tmp_path / "out", "--workers", 1]
    assert mlip_prepare(*arguments, "--id-map", ids) == 0
    printed = "".join(capsys.readouterr())
    with open(ids, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    left_out = {row["image"]: row["left_out"] for row in rows if row["left_out"]}
    assert left_out == {
        ".MRN": "hidden",
        "MRN1/cut.dcm": "not_dicom",
        "MRN2/copy.dcm": "duplicate_image",
        "MRN2/empty.dcm": "empty_file",
        "MRN2/link.dcm": "link_or_special_file",
        "MRN2/\\udce9.dcm": "name_not_utf8",
    }
    for rule in left_out.values():
        assert f"left out by rule {rule}: 1" in printed
    assert len(rows) == 3 + len(left_out) and "MRN" not in printed
    assert "which files a rule left out: --id-map FILE lists them" in printed
    assert "which files were refused" not in printed


def test_it_is_said_where_the_names_of_refused_files_stand(tmp_path, capsys):
    for i in range(2):
        image(tmp_path / "raw" / f"MRN{i}" / "a.png", i)
    cut = tmp_path / "raw" / "MRN0" / "a.png"
    cut.write_bytes(cut.read_bytes()[:-20])
    folder = ["folder", "--root", tmp_path / "raw", "--workers", 1]
    assert mlip_prepare(*folder, "--out", tmp_path / "a", "--id-map", tmp_path / "ids.csv") == 0
    told = "which files were refused: refused.csv by key; --id-map FILE lists the name of each key"
    assert f"{told}\nrows 2 = images 1" in capsys.readouterr().out
    with open(tmp_path / "ids.csv", newline="", encoding="utf-8") as file:
        name_of = {row["key"]: row["image"] for row in csv.DictReader(file)}
    with open(tmp_path / "a" / "refused.csv", newline="", encoding="utf-8") as file:
        (refused,) = csv.DictReader(file)
    assert refused["image"] == "" and name_of[refused["key"]] == "MRN0/a.png"
    assert mlip_prepare(*folder, "--out", tmp_path / "b", "--keep-ids") == 0
    assert "which files were refused: refused.csv\nrows 2" in capsys.readouterr().out
    with open(tmp_path / "b" / "refused.csv", newline="", encoding="utf-8") as file:
        assert [row["image"] for row in csv.DictReader(file)] == ["MRN0/a.png"]


def test_what_was_noted_of_films_is_printed_and_recorded(tmp_path, capsys):
    image(tmp_path / "raw" / "a.dcm")
    dataset = pydicom.dcmread(tmp_path / "raw" / "a.dcm")
    del dataset.WindowCenter, dataset.WindowWidth
    pydicom.dcmwrite(tmp_path / "raw" / "a.dcm", dataset)
    out = tmp_path / "out"
    assert mlip_prepare("folder", "--root", tmp_path / "raw", "--out", out, "--workers", 1) == 0
    assert (
        f"noted, own_range: 1 ({NOTES['own_range']})\nrows 1 = images 1" in capsys.readouterr().out
    )
    assert json.loads((out / "prepared.json").read_text())["noted"] == {"own_range": 1}


def test_list_explain_and_check_phi_print(tmp_path, capsys):
    image(tmp_path / "a.dcm")
    assert mlip_prepare("--list") == mlip_prepare("folder", "--list") == 0
    assert "physionet.org" in capsys.readouterr().out
    assert mlip_prepare("--explain", tmp_path / "a.dcm") == 0
    assert "VOI linear" in capsys.readouterr().out
    assert mlip_prepare("--check-phi", tmp_path) == 1
    printed = capsys.readouterr().out
    assert "PatientID" in printed and "MRN" not in printed and "1 DICOM files" in printed


def test_what_a_set_was_made_of_names_no_file_of_its_source(tmp_path, monkeypatch):
    # one without a folder in its name was taken for a column's
    image(tmp_path / "raw" / "a.png")
    (tmp_path / "doe.csv").write_text("image,patient_id,Report\na.png,p,Clear lungs.\n")
    monkeypatch.chdir(tmp_path)
    more = ("--option", "file=doe.csv", "--option", "report=Report")
    assert mlip_prepare("manifest", "--root", "raw", "--out", "out", *more) == 0
    options = json.loads((tmp_path / "out" / "prepared.json").read_text())["options"]
    assert "file" not in options and options["report"] == "Report"


def test_what_is_asked_of_the_command_reaches_the_shards(tmp_path, capsys):
    """With --require-deid or --verify ignored all tests stayed green: parts were tried alone."""
    for i in range(4):
        image(tmp_path / "raw" / f"p{i}" / ("a.dcm" if i == 0 else "a.png"), i, (64, 60))
    dataset = pydicom.dcmread(tmp_path / "raw" / "p0" / "a.dcm")
    dataset.PatientName = "Doe^Jane"
    pydicom.dcmwrite(tmp_path / "raw" / "p0" / "a.dcm", dataset)
    folder = ["folder", "--root", tmp_path / "raw", "--workers", 1, "--shard-images", 1, "--out"]

    def said(*arguments: object) -> str:
        assert mlip_prepare(*folder, *arguments) == 0
        return capsys.readouterr().out

    plain = said(tmp_path / "a")
    assert "4 shards, 4 of them made now" in plain and "refused 0" in plain
    strict = [tmp_path / "b", "--require-deid", "--quality", 5, "--timeout", 7]
    assert "not complete" in said(*strict, "--part", "2/2")
    assert (
        "2 of them made now" in (told := said(*strict)) and "refused, not_deidentified: 1" in told
    )
    tables = [
        pyarrow.parquet.read_table(path) for path in sorted(tmp_path.glob("b/shards/*.parquet"))
    ]
    assert {table.schema.metadata[b"timeout_s"] for table in tables} == {b"7.0"}
    indexes = [pyarrow.parquet.read_table(tmp_path / x / "index.parquet") for x in "ab"]
    sizes = [sorted(index.column("size").to_pylist()) for index in indexes]
    assert sizes[1][0] == 0 and max(sizes[1]) < min(sizes[0])  # that of the refused one
    shard = max(tmp_path.glob("a/shards/*.tar"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[700] ^= 1  # within the member
    shard.write_bytes(content)
    assert "0 of them made now" in said(tmp_path / "a")
    assert "1 of them made now" in said(tmp_path / "a", "--verify")
