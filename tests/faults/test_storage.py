"""Kills inside a save, truncation, flipped bits, planted pointers (F03, F05, F06, F07)."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from mlip.settings.config import load, to_dict
from mlip.training import checkpoint
from mlip.training.optimizer import MOMENTS
from mlip.training.step import TrainingState
from tests import rank_farm

pytestmark = pytest.mark.long


def state_of(step: int, rows: int = 50) -> TrainingState:
    generator = torch.Generator().manual_seed(step)

    def make() -> dict[str, torch.Tensor]:
        return {n: torch.randn(rows, 100, generator=generator) for n in ("model.a", "losses.b")}

    return TrainingState(make(), {k: make() for k in MOMENTS}, {"count": torch.tensor(step)}, step)


def save(run_dir: Path, step: int, rows: int = 50) -> Path:
    state = {"format": checkpoint.FORMAT, "step": step, "config": to_dict(load([]))}
    return checkpoint.save(run_dir, state_of(step, rows), state, keep=3)


def save_for_ever(run_dir: str, first: int) -> None:
    for step in range(first, first + 10_000):
        save(Path(run_dir), step, rows=5_000)  # 12 MB: most of the time is inside a save


def test_a_hundred_kills_inside_a_save_leave_no_unreadable_checkpoint(tmp_path, record_property):
    draw = random.Random(3)
    interrupted = 0
    for number in range(100):
        checkpoint.remove_leftovers(tmp_path) if (tmp_path / "checkpoints").is_dir() else None
        before = len(checkpoint.checkpoints_of(tmp_path))
        newest = checkpoint.checkpoints_of(tmp_path)[0].name if before else "step_00000000"
        farm = rank_farm.start(save_for_ever, 1, str(tmp_path), int(newest[5:]) + 1)
        deadline = time.monotonic() + 60
        while not list((tmp_path / "checkpoints").glob(".writing-*")):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.08))
        farm.kill()
        interrupted += bool(list((tmp_path / "checkpoints").glob(".writing-*")))
        for folder in checkpoint.checkpoints_of(tmp_path):
            # a retention that was cut off leaves a folder without its marker: not a checkpoint
            if (folder / "COMPLETE").is_file():
                assert checkpoint._damage(folder) is None, (number, folder)
        found, _ = checkpoint.find_newest(tmp_path) if before else (None, [])
        if found is not None:
            read = checkpoint.read(found)
            expected = state_of(read.step, 5_000).parameters["losses.b"]
            assert torch.equal(read.training.parameters["losses.b"], expected)
    record_property("kills", 100)
    record_property("inside_a_save", interrupted)
    record_property("unreadable", 0)
    assert interrupted >= 30, "the kills did not hit the saves"


@pytest.fixture
def two_saves(tmp_path: Path) -> tuple[Path, Path]:
    return save(tmp_path, 1), save(tmp_path, 2)


def test_fifty_truncations_fall_back_to_the_previous(two_saves, tmp_path, record_property):
    good, bad = two_saves
    draw = random.Random(5)
    files = sorted(path for path in bad.iterdir())
    for number in range(50):
        path = files[number % len(files)]
        original = path.read_bytes()
        # a marker may lose the newline behind it
        path.write_bytes(original[: draw.randrange(len(original) - 1)])
        found, problems = checkpoint.find_newest(tmp_path)
        assert found == good and len(problems) == 1, path
        path.write_bytes(original)
    record_property("caught", 50)
    for path in files:
        kept = path.read_bytes()
        path.unlink()
        assert checkpoint.find_newest(tmp_path)[0] == good, path
        path.write_bytes(kept)
    assert checkpoint.find_newest(tmp_path) == (bad, [])


def test_a_hundred_flipped_bits_are_caught_in_every_file(two_saves, tmp_path, record_property):
    good, bad = two_saves
    draw = random.Random(6)
    files = sorted(path for path in bad.iterdir())
    for number in range(100):
        path = files[number % len(files)]
        original = path.read_bytes()
        damaged = bytearray(original)
        # the last byte of the marker is its newline
        damaged[draw.randrange(len(damaged) - 1)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        found, problems = checkpoint.find_newest(tmp_path)
        assert found == good and len(problems) == 1, (path, problems)
        path.write_bytes(original)
    record_property("caught", 100)


@pytest.mark.parametrize("content", ["", "step_00000001", "step_00000099", "../../outside"])
def test_a_pointer_leads_nowhere_because_none_is_read(two_saves, tmp_path, content):
    # the newest complete folder is found by looking; COMPLETE inside it is all the pointer there is
    _, newest = two_saves
    (tmp_path / "outside").mkdir()
    shutil.copytree(newest, tmp_path / "outside" / "step_00000050")
    for name in ("latest", "checkpoints/latest", "checkpoints/LATEST"):
        (tmp_path / name).write_text(content)
    assert checkpoint.find_newest(tmp_path) == (newest, [])


@pytest.mark.parametrize("content", ["", "0" * 64, "step_00000001", "../../outside"])
def test_a_marker_that_is_empty_stale_or_strange_falls_back(two_saves, tmp_path, content):
    good, newest = two_saves
    (newest / "COMPLETE").write_text(content)
    assert checkpoint.find_newest(tmp_path)[0] == good


def test_a_planted_link_in_a_checkpoints_place_changes_nothing_outside(two_saves, tmp_path):
    good, newest = two_saves
    outside = tmp_path / "outside"
    shutil.move(newest, outside)
    os.symlink(outside, newest)
    before = sorted(path.name for path in outside.iterdir())
    for step in range(3, 8):  # three are kept: retention comes past the link
        save(tmp_path, step)
    assert sorted(path.name for path in outside.iterdir()) == before
    assert not good.exists() and newest.is_symlink()
