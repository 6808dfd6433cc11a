"""Reading shards: what went in comes out by offset and hash, and damage is named, never read.

Oracles: tarfile for the format, direct decoding for the pixels, the parsed path for a reference.
"""

import hashlib
import io
import os
import resource
import socket
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pyarrow.parquet
import pytest

from mlip.dataloading import shards as shard_files
from mlip.dataloading.ledger import BadSample, DataError
from mlip.dataloading.manifest import load_manifest
from mlip.dataloading.pipelines.samples import SampleReader
from mlip.dataloading.prepare.shard_worker import ImageSettings, make_member
from mlip.dataloading.shards import (
    References,
    ShardWriter,
    parse_reference,
    read_bytes,
    synced_file,
)
from mlip.settings import config


def test_a_shard_is_a_plain_tar_and_every_member_is_found_by_its_reference(built_shards):
    folder, rows, _ = built_shards
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


def test_a_shard_gets_its_name_once_its_bytes_are_on_the_disk(tmp_path, monkeypatch):
    steps, replace = [], os.replace

    def synced(descriptor):
        steps.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("named"), replace(a, b)))
    with synced_file(tmp_path / "a.tar") as file:
        writer = ShardWriter(file)
        writer.add("1.png", b"x")
        size = writer.finish()
    assert size == (tmp_path / "a.tar").stat().st_size
    partial = f".a.tar.{socket.gethostname()}.{os.getpid()}.part"
    assert steps == [partial, "named", tmp_path.name]


def test_the_manifest_of_shards_loads_as_a_manifest(built_shards):
    data = config.Data(
        manifest=str(built_shards[0] / "out" / "manifest.parquet"),
        columns=config.Columns(image_id="image_id", sha256="sha256", labels="labels"),
    )
    manifest = load_manifest(data)
    assert [len(manifest.rows(split)) for split in ("train", "val", "test")] == [12, 4, 4]
    assert manifest.image_path(0).startswith("shards/train-00000.tar#")
    dicom = [row for row in range(20) if manifest.text(row) == "Report 3."]
    assert len(dicom) == 1


def test_the_loaders_reader_takes_shards_checks_their_hash_and_sees_damage(copied_shards):
    folder, rows, _ = copied_shards
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


def test_views_of_dicom_files_reach_the_manifest(built_shards):
    table = pyarrow.parquet.read_table(built_shards[0] / "out" / "manifest.parquet").to_pylist()
    assert {row["image_id"]: row["view"] for row in table if row["view"]} == {
        f"IMG{i}": "AP" for i in range(3, 20, 4)
    }


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


def test_reading_says_what_is_wrong_with_a_reference(built_shards, tmp_path):
    root = str(built_shards[0] / "out")
    shard = "shards/val-00000.tar"
    size = (built_shards[0] / "out" / shard).stat().st_size
    for reference, reason in (
        ("shards/none.tar#512+10", "missing"),
        (f"{shard}#{size - 4}+10", "truncated"),
        (f"{shard}#512+{1 << 30}", "too_large"),
        (f"{shard}#512+10", "not_in_place"),
        (f"{shard}#0+10", "not_in_place"),
        (f"{shard}#700+10", "not_in_place"),
        ("plain.png", "unsupported"),
    ):
        with pytest.raises(BadSample) as caught:
            read_bytes(root, reference)
        assert caught.value.reason == reason
    (tmp_path / "link.tar").symlink_to(built_shards[0] / "out" / shard)
    with pytest.raises(DataError, match="link"):
        read_bytes(str(tmp_path), "link.tar#512+10")
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(BadSample, match="not_a_file"):
        read_bytes(str(tmp_path), "folder.tar#0+10")
    with pytest.raises(DataError, match="gone"):
        read_bytes(str(tmp_path / "gone"), "a.tar#0+10")


def test_a_shard_made_anew_before_its_first_read_is_not_read_at_the_places_of_before(tmp_path):
    contents = [bytes([i]) * (3000 + 700 * i) for i in range(6)]

    def write(order: list[int]) -> dict[int, str]:
        with synced_file(tmp_path / "a.tar") as file:
            writer = ShardWriter(file)
            members = {i: writer.add(f"{i}.bin", contents[i]) for i in order}
            writer.finish()
        return {i: f"a.tar#{m.offset}+{m.size}" for i, m in members.items()}

    before = write([0, 1, 2, 3, 4, 5])
    now = write([0, 3, 1, 5, 4])
    assert read_bytes(str(tmp_path), before[0]) == contents[0]  # where it was
    for i in range(1, 5):
        with pytest.raises(BadSample, match="not_in_place"):
            read_bytes(str(tmp_path), before[i])
    assert all(read_bytes(str(tmp_path), place) == contents[i] for i, place in now.items())
    with pytest.raises(BadSample, match="truncated"):
        read_bytes(str(tmp_path), before[5])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_tars_that_others_wrote_are_read(tmp_path, form):
    names = ["a.jpg", "b" * 120 + ".jpg", "\u00e9.jpg"]
    with tarfile.open(tmp_path / "theirs.tar", "w", format=form) as archive:
        for i, name in enumerate(names[:1] if form == tarfile.USTAR_FORMAT else names):
            member = tarfile.TarInfo(name)
            member.size = 1000 + i
            archive.addfile(member, io.BytesIO(bytes([i]) * member.size))
    with tarfile.open(tmp_path / "theirs.tar") as archive:
        for i, member in enumerate(archive):
            reference = f"theirs.tar#{member.offset_data}+{member.size}"
            assert read_bytes(str(tmp_path), reference) == bytes([i]) * (1000 + i)


def test_threads_share_few_descriptors_and_read_the_right_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files._descriptors, "_most", 2)
    references, expected = [], []
    for i in range(6):
        content = bytes([i]) * (3000 + i)
        with synced_file(tmp_path / f"{i}.tar") as file:
            member = ShardWriter(file).add("a.bin", content)
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


@pytest.mark.parametrize(
    ("allowed", "most"), [(1024, 256), (64, 16), (3, 1), (1 << 20, 4096), (-1, 4096)]
)
def test_shards_stay_open_as_far_as_the_limit_of_files_goes(monkeypatch, tmp_path, allowed, most):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (allowed, allowed))
    descriptors = shard_files._Descriptors()
    assert descriptors._most == most
    opened = []
    real = shard_files._open_inside
    monkeypatch.setattr(shard_files, "_open_inside", lambda *a: opened.append(a) or real(*a))
    # 245 shards are a million images, read in any order
    names = [f"{i}.tar" for i in range(min(245, most))]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    for name in names * 2:
        assert descriptors.read((1, str(tmp_path), name), 0, 1) == (b"", b"x")
    assert len(opened) == len(names)
