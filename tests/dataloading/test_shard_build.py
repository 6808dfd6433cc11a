"""Building shards: killed, damaged, full, repeated or shared out, the same bytes come out.

Oracle: one uninterrupted run, byte for byte. A bad file is counted with its reason, and no good one
is lost beside it.
"""

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet
import pydicom
import pytest

from mlip.dataloading import shards as shard_files
from mlip.dataloading.datasets.rows import Row
from mlip.dataloading.dicom.radiograph import write_radiograph
from mlip.dataloading.prepare import shard_build
from mlip.dataloading.prepare.shard_build import Plan, build_shards
from mlip.dataloading.prepare.shard_worker import ImageSettings
from mlip.dataloading.shards import ShardError, read_bytes
from tests.dataloading.shard_sources import contents, picture, plan_for, source


def test_a_second_run_makes_nothing_and_changes_nothing(copied_shards):
    folder, rows, expected = copied_shards
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
def test_a_damaged_shard_is_found_and_made_again_alone(copied_shards, damage):
    folder, rows, expected = copied_shards
    damage(folder / "out" / "shards" / "train-00001.tar")
    result = build_shards(rows, plan_for(folder))
    assert result.made == 1 and result.complete
    assert contents(folder / "out") == expected


def test_a_flipped_bit_is_found_by_verify_and_by_the_readers_hash(copied_shards):
    folder, rows, expected = copied_shards
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


def test_a_changed_source_or_setting_remakes_what_depends_on_it(copied_shards):
    folder, rows, _ = copied_shards
    cv2.imwrite(str(folder / "raw" / "001.png"), picture(99))
    assert build_shards(rows, plan_for(folder)).made == 1
    smaller = ImageSettings(side_px=32, codec="png")
    assert build_shards(rows, plan_for(folder, settings=smaller)).made == 5
    shorter = build_shards(rows[:5], plan_for(folder, settings=smaller))
    assert shorter.images == 5
    assert len(list((folder / "out" / "shards").glob("*.tar"))) == 3  # the others are gone


def test_parts_in_any_order_and_any_number_of_workers_give_the_same_bytes(built_shards, tmp_path):
    folder, rows, expected = built_shards
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
from mlip.dataloading.prepare.shard_build import Plan, build_shards
from mlip.dataloading.prepare.shard_worker import ImageSettings
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


def test_a_killed_run_is_finished_by_the_next_one(tmp_path, built_shards):
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
    assert tars == {name: data for name, data in built_shards[2].items() if name.endswith("tar")}


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


def test_files_of_a_folder_that_went_away_are_taken_when_it_is_back(tmp_path):
    # a network's mount that was lost for a minute left an empty folder, and 22 of 24 films for good
    rows, raw = source(tmp_path / "raw", 12), tmp_path / "raw"

    def unmount(done, total):
        if done == 1:
            raw.rename(tmp_path / "elsewhere")
            raw.mkdir()

    lost = build_shards(rows, plan_for(tmp_path), unmount).refused["missing"]
    raw.rmdir()
    (tmp_path / "elsewhere").rename(raw)
    again = build_shards(rows, plan_for(tmp_path))
    assert lost > 0 and again.made > 0 and again.images == 12
    assert build_shards(rows, plan_for(tmp_path)).made == 0


def test_a_folder_of_images_that_is_gone_ends_the_run(tmp_path):
    rows, raw = source(tmp_path / "raw", 12), tmp_path / "raw"
    with pytest.raises(ShardError, match="is gone: mount or restore it"):
        build_shards(rows, plan_for(tmp_path), lambda *_: raw.exists() and raw.rename(f"{raw}-"))
    (tmp_path / "raw-").rename(raw)
    assert build_shards(rows, plan_for(tmp_path)).images == 12


def test_a_full_disk_gives_a_clear_message_and_leaves_finished_shards_whole(copied_shards):
    folder, rows, expected = copied_shards
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


def test_doubled_image_ids_are_refused(tmp_path):
    rows = source(tmp_path / "raw", 3)
    rows[2].image_id = rows[0].image_id
    with pytest.raises(ShardError, match="more than once"):
        build_shards(rows, plan_for(tmp_path))


def noted_films(root: Path) -> list[Row]:
    """A picture and films: without a window, with one that is none, two, a good one; cut off."""
    rows = source(root, 1)
    windows = [(None, None), (100, -5), ([30000, 20000], [60000, 900]), (30000, 60000), (100, -5)]
    for i, (centre, width) in enumerate(windows):
        path = root / f"film{i}.dcm"
        write_radiograph(path, picture(i, 64, 80, np.uint16), patient_id="P", study_id="S")
        dataset = pydicom.dcmread(path)
        dataset.WindowCenter, dataset.WindowWidth = centre, width
        if centre is None:
            del dataset.WindowCenter, dataset.WindowWidth
        pydicom.dcmwrite(path, dataset)
        rows.append(Row(path.name, "P", "S", path.name, "train"))
    path.write_bytes(path.read_bytes()[:-500])
    return rows


def test_what_was_noted_of_films_is_counted_and_kept(tmp_path):
    """How many films had no window, or one that could not be used, was thrown away."""
    rows = noted_films(tmp_path / "raw")
    first, again = (build_shards(rows, plan_for(tmp_path, shard_images=3)) for _ in range(2))
    assert (first.made, again.made) == (2, 0) and first.refused == {"pixel_length": 1}
    counts = {"own_range": 2, "unusable_window": 1, "first_of_several_windows": 1}
    assert first.noted == again.noted == counts
    index = pyarrow.parquet.read_table(tmp_path / "out" / "index.parquet").to_pylist()
    assert index[2]["notes"] == ["own_range", "unusable_window"] and index[0]["notes"] == []


def test_shards_of_a_version_that_read_films_otherwise_are_made_again(tmp_path, monkeypatch):
    """They held white frames of padding and grey of cut streams, and stayed."""
    rows = noted_films(tmp_path / "raw")
    plan = plan_for(tmp_path, shard_images=3)
    with monkeypatch.context() as earlier:
        earlier.setattr(shard_build, "FORMAT", shard_build.FORMAT - 1)
        build_shards(rows, plan)
    assert [build_shards(rows, plan).made for _ in range(2)] == [2, 0]


def test_pixels_that_change_raise_the_format(tmp_path):
    """Where this fails and the change is meant: raise FORMAT, then write the new hash here.

    A second prepare keeps whatever shard has the fingerprint of its FORMAT.
    """
    rows = noted_films(tmp_path / "raw")[1:]
    film = pydicom.dcmread(tmp_path / "raw" / "film3.dcm")
    film.PhotometricInterpretation = "MONOCHROME1"
    film.add_new("PixelPaddingValue", "US", 0)
    film.add_new("PixelPaddingRangeLimit", "US", 20000)
    pydicom.dcmwrite(tmp_path / "raw" / "film3.dcm", film)
    build_shards(rows, plan_for(tmp_path, settings=ImageSettings(bits=16, codec="png")))
    index = pyarrow.parquet.read_table(tmp_path / "out" / "index.parquet").to_pylist()
    digest = hashlib.sha256()
    for entry in index:
        digest.update(entry["reason"].encode())
        if not entry["reason"]:
            place = shard_files.Reference(entry["shard"], entry["offset"], entry["size"])
            content = np.frombuffer(read_bytes(str(tmp_path / "out"), place), np.uint8)
            digest.update(cv2.imdecode(content, cv2.IMREAD_UNCHANGED).tobytes())
    assert (shard_build.FORMAT, digest.hexdigest()[:16]) == (3, "9df51d09dfcf3e06")
