"""`mlip prepare` as a hospital meets it: mixed exports, second runs, Ctrl-C, identifiers.

Oracles: the source files' own hashes for which report belongs to which image; planted canaries
for what must never be written.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet
import pydicom
import pytest

from mlip.cli import main
from mlip.dataloading.datasets import DATASETS
from mlip.dataloading.datasets.chexpert import FIVE
from mlip.dataloading.datasets.rows import DatasetError, Row, assign_split
from mlip.dataloading.dicom.radiograph import DicomError, explain, write_radiograph
from mlip.dataloading.loader import build_loader, listed_bad
from mlip.dataloading.manifest import load_manifest
from mlip.dataloading.prepare import shard_build
from mlip.dataloading.prepare.shard_build import OUTPUTS, Plan, build_shards
from mlip.dataloading.prepare.shard_worker import ImageSettings
from mlip.dataloading.shards import parse_reference
from mlip.settings import config

COMMAND = [sys.executable, "-m", "mlip.cli", "prepare"]


def picture(seed: int) -> np.ndarray:
    smooth = np.random.default_rng(seed).random((6, 6))
    wide = cv2.resize(smooth, (70, 80), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    return (wide * 65535).astype(np.uint16)


def make_rows(root: Path, count: int) -> list[Row]:
    root.mkdir(exist_ok=True)
    rows = []
    for i in range(count):
        if not (root / f"{i}.png").exists():
            cv2.imwrite(str(root / f"{i}.png"), picture(i))
        split = "train" if i % 3 else "test"
        rows.append(Row(f"{i}.png", f"p{i}", f"s{i}", f"i{i}", split, report=f"Report {i}."))
    return rows


def plan_for(folder: Path, **changes: Any) -> Plan:
    settings = ImageSettings(side_px=64, codec="png")
    plan = Plan(folder / "raw", folder / "out", settings, "s", keep_ids=True, shard_images=4)
    return replace(plan, **changes)


def prepare(*arguments: object) -> int:
    return main(["prepare", *(str(argument) for argument in arguments)])


def test_a_row_more_in_one_split_moves_no_report_to_another_image(tmp_path: Path) -> None:
    """Shards of later splits stay as they are; their rows' places in the list do not."""
    for count in (9, 10, 14, 12):
        rows = make_rows(tmp_path / "raw", count)
        assert build_shards(rows, plan_for(tmp_path)).images == count
        index = pyarrow.parquet.read_table(tmp_path / "out" / "index.parquet").to_pylist()
        source_of = {entry["sha256"]: entry["source_sha256"] for entry in index}
        table = pyarrow.parquet.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
        for row in table:
            number = row["report"].removeprefix("Report ").rstrip(".")
            source = (tmp_path / "raw" / f"{number}.png").read_bytes()
            assert source_of[row["sha256"]] == hashlib.sha256(source).hexdigest()
            assert (row["patient_id"], row["image_id"]) == (f"p{number}", f"i{number}")


def test_a_run_stopped_while_it_remakes_leaves_no_manifest_of_older_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(tmp_path / "raw", 12)
    build_shards(rows, plan_for(tmp_path))
    other = plan_for(tmp_path, settings=ImageSettings(side_px=32, codec="png"))
    done: list[int] = []

    def stop(made: int, total: int) -> None:
        done.append(made)
        if made == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards(rows, other, stop)
    assert not [name for name in OUTPUTS if (tmp_path / "out" / name).exists()]
    assert not list((tmp_path / "out").rglob("*.part"))
    assert build_shards(rows, other).made == 2  # of three: the first was whole
    assert (tmp_path / "out" / "manifest.parquet").exists()


def test_an_output_made_with_other_settings_is_refused_unless_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_rows(tmp_path / "raw", 6)
    arguments = ["folder", "--root", tmp_path / "raw", "--out", tmp_path / "out", "--workers", 1]
    assert prepare(*arguments, "--side", 64) == 0
    before = (tmp_path / "out" / "manifest.parquet").read_bytes()
    capsys.readouterr()
    assert prepare(*arguments, "--side", 32, "--bits", 16) == 2
    error = capsys.readouterr().err
    assert "side_px (there 64, asked 32)" in error and "--overwrite" in error
    assert (tmp_path / "out" / "manifest.parquet").read_bytes() == before
    assert prepare(*arguments, "--side", 32, "--bits", 16, "--overwrite") == 0
    table = pyarrow.parquet.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert {row["bits"] for row in table} == {16}
    assert max(max(row["height"], row["width"]) for row in table) == 32
    for path in (tmp_path / "out").rglob("*"):
        if path.suffix in (".parquet", ".tar"):
            assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("out", ["/proc/no_folder", "a_file", "a_file/below"])
def test_an_output_that_cannot_be_made_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    out: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_rows(tmp_path / "raw", 2)
    (tmp_path / "a_file").write_text("x")
    assert prepare("folder", "--root", tmp_path / "raw", "--out", out) == 2
    error = capsys.readouterr().err
    assert f"--out {out}: cannot be used" in error and error.count("\n") == 1


def test_ctrl_c_says_what_to_do_and_the_same_command_makes_the_rest(tmp_path: Path) -> None:
    make_rows(tmp_path / "raw", 24)
    command = [*COMMAND, "folder", "--root", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]
    command += ["--workers", "1", "--shard-images", "1", "--side", "64"]
    # a terminal sends Ctrl-C to the whole group, workers too
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # tests that a shell started in the background inherit an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 300
    while not list((tmp_path / "out").glob("shards/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "the same command makes the rest" in error and "Traceback" not in error
    assert not list((tmp_path / "out").rglob("*.part"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "rows 24 = images 24 + refused 0 + lost 0" in done.stdout
    assert "24 shards, 24 of them made now" not in done.stdout  # the first one was kept


def write_dicom(path: Path, number: int, **changes: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_radiograph(path, picture(number), patient_id=f"p{number}", study_id=f"s{number}")
    dataset = pydicom.dcmread(path)
    for name, value in changes.items():
        setattr(dataset, name, value)
    pydicom.dcmwrite(path, dataset)


def test_a_mixed_export_gives_its_radiographs_and_names_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "Röntgen export 2026"
    write_dicom(root / "größe" / "Aufnahme ä 1.dcm", 1)
    write_dicom(root / "no suffix", 2, Modality="CR")
    write_dicom(root / "states no modality.dcm", 3, Modality="")
    write_dicom(root / "ct.dcm", 4, Modality="CT")
    write_dicom(root / "report.dcm", 5, Modality="SR")
    write_dicom(root / "odd.dcm", 6, Modality="ZELDA SMITH")
    write_dicom(root / "palette.dcm", 7, PhotometricInterpretation="PALETTE COLOR")
    with zipfile.ZipFile(root / "more.zip", "w") as archive:
        archive.write(root / "ct.dcm", "../../escape.dcm")
    (root / "notes.docx").write_bytes(b"no image")
    out = tmp_path / "out put"
    assert prepare("folder", "--root", root, "--out", out, "--workers", 1) == 0
    printed = capsys.readouterr().out
    assert "rows 4 = images 3 + refused 1 + lost 0" in printed
    assert "refused, unsupported_photometric: 1" in printed
    for rule in ("archive: 1", "modality_ct: 1", "modality_sr: 1", "modality_other: 1"):
        assert f"left out by rule {rule}" in printed
    assert "ZELDA" not in printed and not list(tmp_path.rglob("escape.dcm"))
    # and where nothing is left, the message says why
    (tmp_path / "zipped").mkdir()
    (root / "more.zip").rename(tmp_path / "zipped" / "all.zip")
    assert prepare("folder", "--root", tmp_path / "zipped", "--out", tmp_path / "x") == 3
    assert "archive 1): unpack the archives first" in capsys.readouterr().err


def test_a_colour_file_is_refused_by_the_name_of_its_kind(tmp_path: Path) -> None:
    for value, named in (("PALETTE COLOR", "PALETTE COLOR"), ("Zelda Smith", "another value")):
        write_dicom(tmp_path / "a.dcm", 1, PhotometricInterpretation=value)
        with pytest.raises(DicomError, match=f"MONOCHROME2; {named}, 1 samples") as error:
            explain(tmp_path / "a.dcm")
        assert "Zelda" not in str(error.value)


CANARIES = [f"Zq{i:02d}canary" for i in range(50)]


def forms(word: str) -> list[bytes]:
    """A word as it might stand in a file: UTF-8, UTF-16, base64 in its three alignments."""
    plain = word.encode()
    packed = [base64.b64encode(b"_" * shift + plain + b"__")[4:-4] for shift in range(3)]
    return [plain, plain.lower(), word.encode("utf-16-le"), word.encode("utf-16-be"), *packed]


def test_fifty_planted_identifiers_reach_no_output_of_prepare_or_of_the_loader(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tokenizer: Any,
    linker: Any,
    concepts: Any,
) -> None:
    """Names, numbers, dates, comments, paths, private tags, damaged files; reports stay in one."""
    free = iter(CANARIES)
    root = tmp_path / "raw"
    tags = (
        "PatientName PatientID OtherPatientIDs PatientAddress AccessionNumber StudyID ProtocolName "
        "InstitutionName ReferringPhysicianName StationName PatientComments StudyDescription"
    ).split()
    for i in range(4):
        path = root / next(free) / f"{next(free)}.dcm"
        write_dicom(path, i, **{tag: next(free)[:16] for tag in tags[i * 3 :]})
        if i == 1:
            dataset = pydicom.dcmread(path)
            dataset.private_block(0x11, "M", create=True).add_new(1, "LO", next(free))
            pydicom.dcmwrite(path, dataset)
        if i == 2:
            path.write_bytes(path.read_bytes()[:-500])
        if i == 3:
            path.write_bytes(path.read_bytes().replace(b"MONOCHROME2", b"Zq49canary "))
    report = f"No effusion in {next(free)} of {next(free)}. Seen by {next(free)}."
    for i in range(6):
        path = root / next(free) / "x.png"
        path.parent.mkdir()
        cv2.imwrite(str(path), picture(20 + i))
        path.with_suffix(".txt").write_text(f"{report} Film {i}.")
    used = [word for word in CANARIES if word not in set(free)]
    assert len(used) >= 45
    out = tmp_path / "out"
    assert prepare("folder", "--root", root, "--out", out, "--workers", 1) == 0
    assert prepare("--check-phi", root) == 1
    for path in root.rglob("*.dcm"):
        prepare("--explain", path.rename(root / "plain.dcm"))
    settings = config.load(
        [],
        [
            f"data.manifest={out / 'manifest.parquet'}",
            "data.pipeline=torch",
            "data.columns.sha256=sha256",
            "data.verify=hash",
            "data.bad_share=1.0",
            "batch.global_pairs=2",
        ],
    )
    manifest = load_manifest(settings.data)
    splits = {split: manifest.rows(split) for split in ("train", "val", "test")}
    split = max(splits, key=lambda name: len(splits[name]))
    reference = parse_reference(manifest.image_path(int(splits[split][0])))
    assert reference is not None
    broken = bytearray((out / reference.shard).read_bytes())
    broken[reference.offset + 200] ^= 1  # no longer its hash: to be quarantined and logged
    (out / reference.shard).write_bytes(bytes(broken))
    parts = {"tokenizer": tokenizer, "linker": linker, "table": concepts}
    loader = build_loader(settings, manifest, split=split, train=True, **parts)
    for _ in range(4):
        next(loader)
    written = json.dumps(
        [loader.state_dict(), listed_bad(manifest, loader.ledger), loader.ledger.summary()]
    )
    loader.close()
    assert loader.ledger.bad
    captured = capsys.readouterr()
    places = {"printed": captured.out + captured.err, "logged": caplog.text, "state": written}
    contents = {name: text.encode() for name, text in places.items()}
    for path in out.rglob("*"):
        if path.is_file() and path.name != "manifest.parquet":
            contents[str(path.relative_to(out))] = path.read_bytes()
            if path.suffix == ".parquet":
                table = pyarrow.parquet.read_table(path)
                contents[f"{path.name} as text"] = repr(table.to_pylist()).encode()
    columns = pyarrow.parquet.read_table(out / "manifest.parquet").drop(["report"])
    contents["manifest without reports"] = repr(columns.to_pylist()).encode()
    hits = {
        (word, name)
        for word in CANARIES
        for name, content in contents.items()
        for form in forms(word)
        if form in content
    }
    assert hits == set()
    # the search itself finds what it looks for
    assert all(form in b"__" + form for form in forms("Zq00canary"))
    assert any(f in base64.b64encode(b"ab Zq00canary cd") for f in forms("Zq00canary"))


def test_an_index_of_other_rows_is_an_error_and_no_silent_mix_up(tmp_path: Path) -> None:
    rows = make_rows(tmp_path / "raw", 6)
    build_shards(rows, plan_for(tmp_path))
    first = next((tmp_path / "out" / "shards").glob("train-*.parquet"))
    table = pyarrow.parquet.read_table(first)
    keys = table.column("key").to_pylist()[::-1]
    place = table.schema.get_field_index("key")
    mixed = table.set_column(place, table.schema.field(place), pyarrow.array(keys))
    pyarrow.parquet.write_table(mixed.replace_schema_metadata(table.schema.metadata), first)
    with pytest.raises(shard_build.ShardError, match="not the index of its shard"):
        build_shards(rows, plan_for(tmp_path))


def write_chexpert(root: Path) -> list[str]:
    """train.csv of 6 frontal images with one finding each (the last has two), no pixels."""
    columns = "Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(FIVE)
    paths, lines = [], [columns]
    for i in range(6):
        labels = ["1.0" if j == i % 5 or (i == 5 and j == 1) else "" for j in range(5)]
        paths.append(f"train/patient{i:05d}/study1/view1_frontal.jpg")
        lines.append(f"CheXpert-v1.0/{paths[-1]},Male,60,Frontal,AP,{','.join(labels)}")
    (root / "train.csv").write_text("\n".join(lines) + "\n")
    valid = "CheXpert-v1.0/valid/patient64541/study1/view1_frontal.jpg,Male,60,Frontal,AP,1,,,,"
    (root / "valid.csv").write_text(f"{columns}\n{valid}\n")
    return paths


@pytest.mark.parametrize("form", ["by_row", "by_finding", "list", "csv"])
def test_5x200_lists_are_read_in_every_published_form(tmp_path: Path, form: str) -> None:
    paths = write_chexpert(tmp_path)
    content: Any = {
        # the form of the list that papers share: row number -> path and one-hot label
        "by_row": {str(7 * i): {"image_path": p, "label": [0, 1]} for i, p in enumerate(paths)},
        "by_finding": {"Edema": paths[:2], "Consolidation": paths[2:]},
        "list": [f"CheXpert-v1.0/{path}" for path in paths],
    }.get(form)
    file = tmp_path / ("list.csv" if form == "csv" else "list.json")
    file.write_text(json.dumps(content) if content else "Path\n" + "\n".join(paths))
    collected = DATASETS["chexpert"].collect(
        tmp_path, {"views": "frontal", "five_by_200": str(file)}
    )
    listed = [row for row in collected.rows if row.subset == "5x200"]
    assert sorted(row.image for row in listed) == paths
    assert {row.split for row in listed} == {"test"}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert collected.notes[0] == f"5x200 list: 6 images, SHA-256 {digest}"
    # five show one finding alone; the sixth, with two, is named by its absence
    assert collected.notes[1].endswith(", ".join(f"{name} 1" for name in FIVE))


@pytest.mark.parametrize("text", ['{"a": {"file": 1}}', "[]", "", "\n"])
def test_a_list_that_is_no_list_is_refused(tmp_path: Path, text: str) -> None:
    write_chexpert(tmp_path)
    file = tmp_path / ("list.json" if text.strip() else "list.csv")
    file.write_text(text)
    with pytest.raises(DatasetError, match="expected (JSON with )?paths"):
        DATASETS["chexpert"].collect(tmp_path, {"views": "frontal", "five_by_200": str(file)})


def test_split_lists_may_leave_out_the_suffix_but_never_a_part_of_an_id(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("ID,boxes,classes\n05677,693;43;626;305,1\n1.2.3.4,,\n")
    (tmp_path / "validation.csv").write_text("ID,boxes,classes\n05677.5,,\n")
    (tmp_path / "test.csv").write_text("ID\na.jpg\n")
    split_of, notes = assign_split(str(tmp_path), "x", 0.2)
    assert [split_of(name, "p") for name in ("05677.jpg", "05677", "1.2.3.4", "a.jpg")] == [
        "train",
        "train",
        "train",
        "test",
    ]
    # a UID's last number is no suffix
    assert [split_of(name, "p") for name in ("1.2.3.4.99", "a", "b.png")] == ["", "", ""]
    assert "4 ids, SHA-256" in notes[0]


def test_rules_that_leave_nothing_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "raw"
    root.mkdir()
    (root / "manifest.csv").write_text("image,patient_id,split\na.png,p1,later\n")
    assert prepare("manifest", "--root", root, "--out", tmp_path / "out") == 3
    assert "no image is left (left out: unknown_split 1)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
