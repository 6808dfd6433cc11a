"""Shards: what goes in comes out by offset and hash, whatever is killed, damaged or repeated.

Oracles: tarfile for the format, an uninterrupted run for every interrupted one (byte for byte),
direct decoding for the pixels.
"""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet
import pytest

from mlip import config
from mlip.dataloading import shards as shard_files
from mlip.dataloading.datasets.rows import Row
from mlip.dataloading.dicom import read_radiograph, write_radiograph
from mlip.dataloading.ledger import BadSample, DataError
from mlip.dataloading.manifest import load_manifest
from mlip.dataloading.samples import SampleReader
from mlip.dataloading.shard_build import Plan, build_shards
from mlip.dataloading.shard_worker import ImageSettings, convert, make_member, scaled_size
from mlip.dataloading.shards import (
    References,
    ShardError,
    ShardWriter,
    parse_reference,
    read_bytes,
)
from mlip.dataloading.transforms import Transform

SPLITS = ("train", "train", "val", "train", "test")


def picture(seed: int, height: int = 90, width: int = 70, kind: type = np.uint8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = cv2.resize(rng.random((6, 6)), (width, height), interpolation=cv2.INTER_CUBIC)
    return (smooth.clip(0, 1) * np.iinfo(kind).max).astype(kind)


def source(root: Path, count: int = 20, **changes: object) -> list[Row]:
    """Rows over JPEG, 8-bit and 16-bit PNG and DICOM files below root."""
    root.mkdir(exist_ok=True)
    rows = []
    for i in range(count):
        name = f"{i:03d}.{('jpg', 'png', 'png', 'dcm')[i % 4]}"
        image = picture(i, 90 + i, 70, np.uint16 if i % 4 == 2 else np.uint8)
        if name.endswith("dcm"):
            wide = picture(i, 64, 80, np.uint16)
            write_radiograph(root / name, wide, patient_id=f"MRN{i}", study_id=str(i), view="AP")
        else:
            cv2.imwrite(str(root / name), image)
        rows.append(
            Row(
                image=name,
                patient_id=f"MRN{i}",
                study_id=f"ACC{i}",
                image_id=f"IMG{i}",
                split=SPLITS[i % 5],
                report=f"Report {i}.",
            )
        )
    return rows


def plan_for(tmp_path: Path, out: str = "out", **changes: object) -> Plan:
    plan = Plan(
        root=tmp_path / "raw",
        out=tmp_path / out,
        settings=ImageSettings(side_px=64, codec="png"),
        salt="s",
        keep_ids=True,
        shard_images=4,
        workers=1,
    )
    return replace(plan, **changes)


def contents(out: Path) -> dict[str, bytes]:
    """Everything a finished run leaves, Parquet by its table (its file may hold a version)."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
            found[str(path.relative_to(out))] = repr(table.to_pylist()).encode()
        elif path.is_file():
            found[str(path.relative_to(out))] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(folder, rows, contents) of one uninterrupted run; never changed by a test."""
    folder = tmp_path_factory.mktemp("built")
    rows = source(folder / "raw")
    result = build_shards(rows, plan_for(folder))
    assert result.complete and result.images == 20 and not result.refused
    return folder, rows, contents(folder / "out")


@pytest.fixture
def copy(built, tmp_path):
    """A copy of the finished run that a test may damage; times are kept, so it counts as done."""
    shutil.copytree(built[0], tmp_path, dirs_exist_ok=True, copy_function=shutil.copy2)
    return tmp_path, built[1], built[2]


def test_a_shard_is_a_plain_tar_and_every_member_is_found_by_its_reference(built):
    folder, rows, _ = built
    manifest = pyarrow.parquet.read_table(folder / "out" / "manifest.parquet").to_pylist()
    index = pyarrow.parquet.read_table(folder / "out" / "index.parquet").to_pylist()
    assert len(manifest) == len(index) == len(rows)
    by_key = {}
    for shard in sorted((folder / "out" / "shards").glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                stem, _, suffix = member.name.partition(".")
                assert suffix == "png" and member.isreg() and (member.uid, member.mtime) == (0, 0)
                by_key[stem] = archive.extractfile(member).read()
    assert set(by_key) == {entry["key"] for entry in index}
    for row, entry in zip(manifest, index, strict=True):
        content = read_bytes(str(folder / "out"), row["image"])
        assert content == by_key[entry["key"]]
        assert hashlib.sha256(content).hexdigest() == row["sha256"] == entry["sha256"]
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        assert image.shape == (entry["height"], entry["width"]) == (row["height"], row["width"])
        assert image.dtype == np.uint8 and row["bits"] == 8
        raw = folder / "raw" / rows[int(row["image_id"][3:])].image
        assert entry["source_sha256"] == hashlib.sha256(raw.read_bytes()).hexdigest()


def test_the_manifest_of_shards_loads_as_a_manifest(built):
    data = config.Data(
        manifest=str(built[0] / "out" / "manifest.parquet"),
        columns=config.Columns(image_id="image_id", sha256="sha256", view="view", labels="labels"),
    )
    manifest = load_manifest(data)
    assert [len(manifest.rows(split)) for split in ("train", "val", "test")] == [12, 4, 4]
    assert manifest.image_path(0).startswith("shards/train-00000.tar#")
    dicom = [row for row in range(20) if manifest.text(row) == "Report 3."]
    assert len(dicom) == 1


def test_the_loaders_reader_takes_shards_checks_their_hash_and_sees_damage(copy):
    folder, rows, _ = copy
    data = config.Data(
        manifest=str(folder / "out" / "manifest.parquet"),
        columns=config.Columns(sha256="sha256"),
        verify="hash",
    )
    reader = SampleReader(load_manifest(data), data)
    table = pyarrow.parquet.read_table(data.manifest).to_pylist()
    for place, row in enumerate(table):
        item = {"image": rows[int(row["image_id"][3:])].image}
        _, member = make_member(str(folder / "raw"), item, ImageSettings(side_px=64, codec="png"))
        expected = cv2.imdecode(np.frombuffer(member, np.uint8), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(reader.pixels(place, 0), expected)
    first = parse_reference(table[0]["image"])
    path = folder / "out" / first.shard
    damaged = bytearray(path.read_bytes())
    damaged[first.offset + first.size // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(BadSample, match="hash_mismatch"):
        reader.pixels(0, 0)
    assert reader.pixels(1, 0).shape == (table[1]["height"], table[1]["width"])


def test_views_of_dicom_files_reach_the_manifest(built):
    table = pyarrow.parquet.read_table(built[0] / "out" / "manifest.parquet").to_pylist()
    assert {row["image_id"]: row["view"] for row in table if row["view"]} == {
        f"IMG{i}": "AP" for i in range(3, 20, 4)
    }


def test_a_second_run_makes_nothing_and_changes_nothing(copy):
    folder, rows, expected = copy
    times = {p: p.stat().st_mtime_ns for p in (folder / "out" / "shards").iterdir()}
    result = build_shards(rows, plan_for(folder, verify=True))
    assert (result.made, result.complete, result.images) == (0, True, 20)
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert contents(folder / "out") == expected


def damage_truncate(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


def damage_remove(shard: Path) -> None:
    shard.unlink()


def damage_index(shard: Path) -> None:
    path = shard.with_suffix(".parquet")
    path.write_bytes(path.read_bytes()[:100])


def damage_leftover(shard: Path) -> None:
    """What kill -9 leaves: a half-written file of a process that is gone, no finished shard."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    partial = shard.with_name(f".{shard.name}.{shard_files.socket.gethostname()}.{dead.pid}.part")
    shard.rename(partial)
    os.truncate(partial, 700)


@pytest.mark.parametrize(
    "damage",
    [damage_truncate, damage_remove, damage_index, damage_leftover],
    ids=lambda f: f.__name__,
)
def test_a_damaged_shard_is_found_and_made_again_alone(copy, damage):
    folder, rows, expected = copy
    damage(folder / "out" / "shards" / "train-00001.tar")
    result = build_shards(rows, plan_for(folder))
    assert result.made == 1 and result.complete
    assert contents(folder / "out") == expected


def test_a_flipped_bit_is_found_by_verify_and_by_the_readers_hash(copy):
    folder, rows, expected = copy
    path = folder / "out" / "shards" / "val-00000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    table = pyarrow.parquet.read_table(folder / "out" / "manifest.parquet").to_pylist()
    row = next(r for r in table if r["image"].startswith("shards/val-00000.tar#512+"))
    content = read_bytes(str(folder / "out"), row["image"])
    assert hashlib.sha256(content).hexdigest() != row["sha256"]
    assert build_shards(rows, plan_for(folder)).made == 0
    assert build_shards(rows, plan_for(folder, verify=True)).made == 1
    assert contents(folder / "out") == expected


def test_a_changed_source_or_setting_remakes_what_depends_on_it(copy):
    folder, rows, _ = copy
    cv2.imwrite(str(folder / "raw" / "001.png"), picture(99))
    assert build_shards(rows, plan_for(folder)).made == 1
    smaller = ImageSettings(side_px=32, codec="png")
    assert build_shards(rows, plan_for(folder, settings=smaller)).made == 5
    shorter = build_shards(rows[:5], plan_for(folder, settings=smaller))
    assert shorter.images == 5
    assert len(list((folder / "out" / "shards").glob("*.tar"))) == 3  # the others are gone


def test_parts_in_any_order_and_any_number_of_workers_give_the_same_bytes(built, tmp_path):
    folder, rows, expected = built
    for place, (part, workers) in enumerate([((2, 3), 1), ((0, 3), 2), ((1, 3), 1)]):
        plan = replace(plan_for(folder), out=tmp_path / "out", part=part, workers=workers)
        result = build_shards(rows, plan)
        assert result.complete == (place == 2)
        assert (tmp_path / "out" / "manifest.parquet").exists() == (place == 2)
    assert contents(tmp_path / "out") == expected


# a build in a process of its own, which imports as little as the command does
BUILD = """
import json, signal, sys
from pathlib import Path
from mlip.dataloading.datasets.rows import Row
from mlip.dataloading.shard_build import Plan, build_shards
from mlip.dataloading.shard_worker import ImageSettings
from mlip.dataloading.shards import ShardError

job = json.loads(sys.argv[1])
if job["file_limit"]:
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"],) * 2)
plan = job["plan"]
plan.update(
    root=Path(plan["root"]),
    out=Path(plan["out"]),
    settings=ImageSettings(**plan["settings"]),
    part=tuple(plan["part"]),
)
try:
    build_shards([Row(**row) for row in job["rows"]], Plan(**plan))
except ShardError as error:
    print(error)
"""


def build_command(rows: list[Row], plan: Plan, file_limit: int = 0) -> list[str]:
    job = {"rows": [asdict(row) for row in rows], "plan": asdict(plan), "file_limit": file_limit}
    return [sys.executable, "-c", BUILD, json.dumps(job, default=str)]


def test_a_killed_run_is_finished_by_the_next_one(tmp_path, built):
    rows = source(tmp_path / "raw")
    process = subprocess.Popen(build_command(rows, plan_for(tmp_path)))
    first = tmp_path / "out" / "shards" / "train-00000.parquet"
    deadline = time.monotonic() + 600
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert first.exists()
    result = build_shards(rows, plan_for(tmp_path))
    assert result.complete and result.images == 20
    assert not list((tmp_path / "out").rglob("*.part"))
    tars = {name: data for name, data in contents(tmp_path / "out").items() if name.endswith("tar")}
    assert tars == {name: data for name, data in built[2].items() if name.endswith("tar")}


def test_every_bad_file_is_counted_with_its_reason_and_no_good_one_is_lost(tmp_path):
    rows = source(tmp_path / "raw", 12)
    raw = tmp_path / "raw"
    (raw / "000.jpg").write_bytes((raw / "000.jpg").read_bytes()[:200])
    (raw / "001.png").write_bytes(b"")
    (raw / "002.png").write_bytes(b"not an image at all" * 20)
    (raw / "003.dcm").write_bytes((raw / "003.dcm").read_bytes()[:-50])
    (raw / "004.jpg").unlink()
    (raw / "005.png").unlink()
    (raw / "005.png").mkdir()
    (raw / "006.png").unlink()
    os.mkfifo(raw / "006.png")
    (tmp_path / "secret.png").write_bytes((raw / "009.png").read_bytes())
    (raw / "007.dcm").unlink()
    (raw / "007.dcm").symlink_to(tmp_path / "secret.png")
    rows[8].sha256 = "0" * 64
    result = build_shards(rows, plan_for(tmp_path))
    with open(tmp_path / "out" / "refused.csv", newline="") as file:
        refused = list(csv.DictReader(file))
    keys = pyarrow.parquet.read_table(tmp_path / "out" / "index.parquet").to_pylist()
    assert result.images + len(refused) == len(rows) == len(keys)
    assert dict(result.refused) == {
        "truncated": 1,
        "empty_file": 1,
        "unsupported": 1,
        "pixel_length": 1,
        "missing": 1,
        "not_a_file": 2,
        "outside_root": 1,
        "hash_mismatch": 1,
    }
    kept = pyarrow.parquet.read_table(tmp_path / "out" / "manifest.parquet").column("image_id")
    assert sorted(kept.to_pylist()) == ["IMG10", "IMG11", "IMG9"]


def test_a_full_disk_gives_a_clear_message_and_leaves_finished_shards_whole(copy):
    folder, rows, expected = copy
    for name in ("train-00001", "test-00000"):
        (folder / "out" / "shards" / f"{name}.tar").unlink()
    before = {p: p.read_bytes() for p in (folder / "out" / "shards").glob("*.tar")}
    command = build_command(rows, plan_for(folder), file_limit=6_000)
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "full" in run.stdout and "run the same command again" in run.stdout
    assert {p: p.read_bytes() for p in before} == before
    assert not list((folder / "out").rglob("*.part"))
    assert build_shards(rows, plan_for(folder)).made == 2
    assert contents(folder / "out") == expected


def test_sixteen_bits_are_exact_where_nothing_is_scaled(tmp_path):
    rows = source(tmp_path / "raw", 4)
    settings = ImageSettings(side_px=200, bits=16, codec="png")
    build_shards(rows, plan_for(tmp_path, settings=settings))
    table = pyarrow.parquet.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    for row in table:
        content = read_bytes(str(tmp_path / "out"), row["image"])
        stored = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        path = tmp_path / "raw" / rows[int(row["image_id"][3:])].image
        if path.suffix == ".dcm":
            expected = read_radiograph(path)[0]
        else:
            expected = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH)
            if expected.dtype == np.uint8:
                expected = expected.astype(np.uint16) * 257
        np.testing.assert_array_equal(stored, expected)
        assert row["bits"] == 16


@pytest.mark.parametrize("shape", [(2500, 3000), (3000, 2500), (257, 13), (256, 256), (40, 30)])
def test_stored_size_is_the_size_the_loader_would_scale_to(shape):
    height, width = scaled_size(*shape, 256)
    if max(shape) > 256:
        place = Transform(config.Data(resize_px=256), train=False, seed=0).placement(*shape)
        assert (height, width) == (place.height, place.width)
    else:
        assert (height, width) == shape


def test_eight_bits_are_the_nearest_step_of_sixteen():
    wide = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    eight = convert(wide, ImageSettings(side_px=256))
    assert np.abs(eight.astype(float) - wide / 257).max() <= 0.5 + 1e-9
    back = convert(np.arange(256, dtype=np.uint8).reshape(16, 16), ImageSettings(bits=16))
    assert back.reshape(-1).tolist() == [257 * i for i in range(256)]


def test_area_average_keeps_the_mean_and_jpeg_stays_close(tmp_path):
    image = picture(3, 1000, 800)
    cv2.imwrite(str(tmp_path / "a.png"), image)
    item = {"image": "a.png"}
    fields, member = make_member(str(tmp_path), item, ImageSettings(side_px=250))
    stored = cv2.imdecode(np.frombuffer(member, np.uint8), cv2.IMREAD_UNCHANGED)
    blocks = image.reshape(250, 4, 200, 4).mean(axis=(1, 3))
    assert (fields["height"], fields["width"]) == stored.shape == (250, 200)
    assert np.abs(stored - blocks).mean() < 1.0  # quality 95 on a smooth picture


def test_no_metadata_of_a_source_file_survives(tmp_path):
    good, data = cv2.imencode(".jpg", picture(1))
    comment = b"\xff\xfe" + (2 + 6).to_bytes(2, "big") + b"CANARY"
    (tmp_path / "a.jpg").write_bytes(data.tobytes()[:2] + comment + data.tobytes()[2:])
    _, member = make_member(str(tmp_path), {"image": "a.jpg"}, ImageSettings())
    assert good and member and b"CANARY" not in member


def test_hashed_ids_leave_no_identifier_in_any_output(tmp_path):
    rows = source(tmp_path / "raw", 8)
    (tmp_path / "raw" / "001.png").write_bytes(b"")
    build_shards(rows, plan_for(tmp_path, keep_ids=False))
    table = pyarrow.parquet.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert len({row["patient_id"] for row in table}) == 7
    for path in (tmp_path / "out").rglob("*"):
        text = path.name.encode() + (path.read_bytes() if path.is_file() else b"")
        if path.suffix == ".parquet":
            text += repr(pyarrow.parquet.read_table(path).to_pylist()).encode()
        for canary in (b"MRN", b"ACC", b"IMG"):
            assert canary not in text, path


def test_deidentification_can_be_required(tmp_path):
    rows = source(tmp_path / "raw", 4)
    import pydicom

    dataset = pydicom.dcmread(tmp_path / "raw" / "003.dcm")
    settings = ImageSettings(side_px=64, require_deid=True)
    assert make_member(str(tmp_path / "raw"), {"image": "003.dcm"}, settings)[0]["reason"] == ""
    dataset.PatientName = "CANARY"
    dataset.save_as(tmp_path / "raw" / "003.dcm")
    fields, _ = make_member(str(tmp_path / "raw"), {"image": rows[3].image}, settings)
    assert fields == {"reason": "not_deidentified"}


def test_reference_has_one_form_and_any_other_path_is_none():
    reference = parse_reference("shards/train-00012.tar#1536+10234")
    assert reference is not None and str(reference) == "shards/train-00012.tar#1536+10234"
    for text in ("a.png", "a.tar#1", "a.tar#1+", "a.tar#-1+5", "a.tar#1+5x", "a#b.tar#1+2"):
        assert parse_reference(text) is None


def test_references_by_row_are_the_parsed_paths_and_each_path_is_looked_at_once():
    paths = [f"shards/{'train' if i % 3 else 'val'}-{i % 5}.tar#{i * 512}+{i}" for i in range(200)]
    paths[7], paths[8] = "images/7.png", "shards/a.tar#5+12x"
    looked: list[int] = []
    references = References(lambda row: looked.append(row) or paths[row], len(paths))
    order = np.random.default_rng(0).permutation(400).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda row: references[row % 200], order))
    assert found == [parse_reference(paths[row % 200]) for row in order]
    assert found.count(None) == 4 and set(looked) == set(range(200))
    looked.clear()
    assert [references[row] for row in range(200)] == [parse_reference(path) for path in paths]
    assert not looked


def test_reading_says_what_is_wrong_with_a_reference(built, tmp_path):
    root = str(built[0] / "out")
    shard = "shards/val-00000.tar"
    size = (built[0] / "out" / shard).stat().st_size
    for reference, reason in (
        ("shards/none.tar#512+10", "missing"),
        (f"{shard}#{size - 4}+10", "truncated"),
        (f"{shard}#512+{1 << 30}", "too_large"),
        ("plain.png", "unsupported"),
    ):
        with pytest.raises(BadSample) as caught:
            read_bytes(root, reference)
        assert caught.value.reason == reason
    (tmp_path / "link.tar").symlink_to(built[0] / "out" / shard)
    with pytest.raises(DataError, match="link"):
        read_bytes(str(tmp_path), "link.tar#512+10")
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(BadSample, match="not_a_file"):
        read_bytes(str(tmp_path), "folder.tar#0+10")
    with pytest.raises(DataError, match="gone"):
        read_bytes(str(tmp_path / "gone"), "a.tar#0+10")


def test_threads_share_few_descriptors_and_read_the_right_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "_OPEN_SHARDS", 2)
    references, expected = [], []
    for i in range(6):
        writer = ShardWriter(tmp_path / f"{i}.tar")
        content = bytes([i]) * (3000 + i)
        member = writer.add("a.bin", content)
        writer.finish()
        references.append(f"{i}.tar#{member.offset}+{member.size}")
        expected.append(content)
    wrong: list[int] = []

    def work(start: int) -> None:
        for step in range(300):
            i = (start + step * 5) % 6
            if read_bytes(str(tmp_path), references[i]) != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    held = [os.readlink(link) for link in links if os.path.islink(link)]
    assert sum(name.startswith(str(tmp_path)) for name in held) <= 2


def test_doubled_image_ids_are_refused(tmp_path):
    rows = source(tmp_path / "raw", 3)
    rows[2].image_id = rows[0].image_id
    with pytest.raises(ShardError, match="more than once"):
        build_shards(rows, plan_for(tmp_path))
