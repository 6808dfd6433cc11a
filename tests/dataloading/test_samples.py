"""Reading rows from files and shards, and filling the place of a bad row."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mlip.dataloading.images.image_file import read_header
from mlip.dataloading.ledger import BadSample, DataError
from mlip.dataloading.manifest import load_manifest
from mlip.dataloading.pipelines.sampler import SequentialOrder, TrainingOrder
from mlip.dataloading.pipelines.samples import REPLACEMENT_ATTEMPTS, SampleReader, fill_place
from mlip.dataloading.shards import ShardWriter, synced_file
from mlip.settings import config

ROWS = np.arange(10)


def test_members_of_a_shard_read_like_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    images = [rng.integers(0, 65536, (40, 50)).astype(np.uint16) for _ in range(5)]
    (tmp_path / "shards").mkdir()
    lines = ["image,report,patient_id,study_id,split,sha256"]
    with synced_file(tmp_path / "shards" / "train-00000.tar") as file:
        writer = ShardWriter(file)
        for i, image in enumerate(images):
            content = cv2.imencode(".png", image)[1].tobytes()
            member = writer.add(f"{i}.png", content)
            assert member.sha256 == hashlib.sha256(content).hexdigest()
            place = f"shards/train-00000.tar#{member.offset}+{member.size}"
            lines.append(f"{place},No effusion {i}.,p{i},s{i},train,{member.sha256}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n")
    override = [f"data.manifest={tmp_path / 'manifest.csv'}", "data.columns.sha256=sha256"]
    data = config.load([], [*override, "data.verify=hash"]).data
    reader = SampleReader(load_manifest(data), data)
    for i, image in enumerate(images):
        assert (reader.pixels(i, epoch=0) == image).all()
    path = tmp_path / "shards" / "train-00000.tar"
    damaged = bytearray(path.read_bytes())
    damaged[member.offset + 40] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(BadSample, match="hash_mismatch"):
        reader.pixels(4, epoch=0)


def _as_shard(folder: Path, grey: int) -> SampleReader:
    folder.mkdir(exist_ok=True)
    content = cv2.imencode(".png", np.full((8, 8), grey, np.uint8))[1].tobytes()
    with synced_file(folder / "a.tar") as file:
        member = ShardWriter(file).add("0.png", content)
    place = f"a.tar#{member.offset}+{member.size}"
    (folder / "m.csv").write_text(f"image,report,patient_id,study_id,split\n{place},No.,p,s,val\n")
    data = config.load([], [f"data.manifest={folder / 'm.csv'}"]).data
    return SampleReader(load_manifest(data), data)


def test_a_folder_that_is_made_anew_is_read_anew_in_the_same_process(tmp_path: Path) -> None:
    """A notebook got the pictures of before by the manifest of now."""
    first = _as_shard(tmp_path / "a", 10)
    assert (first.pixels(0, 0) == 10).all()
    second = _as_shard(tmp_path / "a", 20)
    assert (second.pixels(0, 0) == 20).all()
    assert (first.pixels(0, 0) == 10).all()  # while it holds them open


def test_a_shard_that_leads_out_of_the_root_is_told_by_the_row(tmp_path: Path) -> None:
    """In a manifest of one's own the path of a shard may name a patient as any other path."""
    root = tmp_path / "root"
    root.mkdir()
    with synced_file(tmp_path / "elsewhere.tar") as file:
        member = ShardWriter(file).add("0.png", b"content")
    (root / "DOE_JANE.tar").symlink_to(tmp_path / "elsewhere.tar")
    place = f"DOE_JANE.tar#{member.offset}+{member.size}"
    (root / "m.csv").write_text(f"image,report,patient_id,study_id,split\n{place},No.,p,s,train\n")
    data = config.load([], [f"data.manifest={root / 'm.csv'}"]).data
    with pytest.raises(DataError, match="image of data row 1 .* leads outside") as caught:
        SampleReader(load_manifest(data), data).read(0, 0)
    assert "DOE" not in str(caught.value)


def use_all_but(bad: set[int]) -> Any:
    def use(row: int, epoch: int) -> str:
        if row in bad:
            raise BadSample("truncated")
        return f"image {row}"

    return use


def test_a_good_row_is_used_itself() -> None:
    order = TrainingOrder(ROWS, seed=1, global_pairs=4)
    plan = order.plan(2)
    for place in range(4):
        result, row, bad = fill_place(order, plan, place, use_all_but(set()))
        assert row == plan.rows[place] and result == f"image {row}" and bad == []


def test_replacements_are_other_rows_and_their_own_faults_are_kept() -> None:
    order = TrainingOrder(ROWS, seed=1, global_pairs=10)
    plan = order.plan(0)
    bad_rows = {0, 1, 2, 3, 4, 5}
    met_outside = 0
    for place in range(10):
        result, row, bad = fill_place(order, plan, place, use_all_but(bad_rows))
        assert row not in bad_rows and result == f"image {row}"
        planned = int(plan.rows[place])
        assert [b for b in bad if b[3]] == (
            [(0, planned, "truncated", True)] * (planned in bad_rows)
        )
        assert all(b[1] in bad_rows - {planned} for b in bad if not b[3])
        met_outside += sum(not b[3] for b in bad)
    assert met_outside > 0


def test_the_draw_of_a_replacement_is_even_over_the_rows() -> None:
    # chi-square over 10 rows, 99.9 % point for 9 degrees is 27.9
    order = TrainingOrder(ROWS, seed=1, global_pairs=10)
    draws = [order.replacements(g, 0, REPLACEMENT_ATTEMPTS)[0] for g in range(2000)]
    counts = np.bincount(draws, minlength=10)
    assert ((counts - 200.0) ** 2 / 200.0).sum() < 27.9


def test_evaluation_replaces_nothing() -> None:
    order = SequentialOrder(ROWS, global_pairs=4)
    result, row, bad = fill_place(order, order.plan(0), 2, use_all_but({2}))
    assert result is None and row == 2 and bad == [(0, 2, "truncated", True)]


def test_a_folder_without_any_good_image_stops_the_run() -> None:
    order = TrainingOrder(ROWS, seed=1, global_pairs=4)
    with pytest.raises(DataError, match="no readable image found for a row after .*truncated"):
        fill_place(order, order.plan(0), 0, use_all_but(set(range(10))))


def test_sampled_verification_visits_every_row_within_a_hundred_epochs(
    corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlip.dataloading.pipelines import samples

    data = corpus("data.verify=sample").data
    reader = SampleReader(load_manifest(data), data)
    hashed: list[str] = []
    monkeypatch.setattr(samples, "check_hash", lambda content, expected: hashed.append(expected))
    for epoch in range(100):
        for row in (0, 7):
            reader.read(row, epoch)
    assert sorted(hashed) == sorted(reader.manifest.sha256_of(row) for row in (0, 7))


@pytest.mark.parametrize("refuses_dark", [False, True])
def test_a_dark_film_is_refused_only_where_it_is_asked_about(refuses_dark: bool) -> None:
    """Training reads what was prepared, or what nobody said is wrong."""
    content = cv2.imencode(".png", np.full((40, 40), 7, np.uint16))[1].tobytes()
    reader = object.__new__(SampleReader)
    reader.refuses_dark = refuses_dark
    if not refuses_dark:
        assert int(reader.decode(content, read_header(content)).max()) == 7
        return
    with pytest.raises(BadSample, match="too_dark"):
        reader.decode(content, read_header(content))
