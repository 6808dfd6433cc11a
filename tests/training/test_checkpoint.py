"""Checkpoints: what comes back, what is refused, and what damage does not get through."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

from mlip.settings.config import load, to_dict
from mlip.training import checkpoint
from mlip.training.lifecycle import CheckpointError
from mlip.training.step import TrainingState

FILES = (
    "parameters.safetensors",
    "exp_avg.safetensors",
    "exp_avg_sq.safetensors",
    "buffers.safetensors",
    "state.json",
    "SHA256SUMS",
    "COMPLETE",
)


def _training(seed: int = 0, rows: int = 5) -> TrainingState:
    generator = torch.Generator().manual_seed(seed)

    def make() -> dict[str, torch.Tensor]:
        return {n: torch.randn(rows, 3, generator=generator) for n in ("model.a", "losses.b")}

    return TrainingState(
        parameters=make(),
        moments={"exp_avg": make(), "exp_avg_sq": make()},
        buffers={"count": torch.tensor(7), "flags": torch.tensor([True, False])},
        optimizer_steps=11,
    )


def _state(step: int, *overrides: str) -> dict:
    config = load([], overrides)
    return {"format": checkpoint.FORMAT, "step": step, "config": to_dict(config), "rng": [{}]}


def _save(run_dir: Path, step: int, keep: int = 5, **training) -> Path:
    return checkpoint.save(run_dir, _training(step, **training), _state(step), keep=keep)


def _config(run_dir: Path, *overrides: str):
    return load([], [f"run.dir={run_dir}", *overrides])


def test_a_damaged_newer_one_pushes_out_no_good_one(tmp_path):
    # resumed from 8 because 12 was damaged, stopped at 9: with keep=1 only 12 would be left
    for step in (8, 12):
        _save(tmp_path, step)
    (tmp_path / "checkpoints" / "step_00000012" / "COMPLETE").unlink()
    _save(tmp_path, 9, keep=1)
    newest, problems = checkpoint.find_newest(tmp_path)
    assert newest is not None and newest.name == "step_00000009" and len(problems) == 1
    _save(tmp_path, 12, keep=1)
    assert [p.name for p in checkpoint.checkpoints_of(tmp_path)] == ["step_00000012"]
    assert checkpoint.find_newest(tmp_path)[1] == []


def test_a_damaged_one_that_a_resume_passed_over_never_counts_among_those_kept(tmp_path):
    _save(tmp_path, 2)
    older, bad = _save(tmp_path, 1), _save(tmp_path, 3)
    (bad / "state.json").write_bytes(b"x")
    resumed = checkpoint.load_newest(_config(tmp_path))
    assert resumed is not None and resumed.step == 2
    assert (bad / "PASSED_OVER").exists() and not (older / "PASSED_OVER").exists()
    _save(tmp_path, 4, keep=4)
    assert bad.exists()  # room enough: kept for who wants to look
    _save(tmp_path, 6, keep=2)
    kept = [p.name for p in checkpoint.checkpoints_of(tmp_path)]
    assert kept == ["step_00000006", "step_00000004"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    # a loss of power keeps what was synced alone: files, their folder, then the new name
    order: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        order.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    _save(tmp_path, 1)
    # the marker after all that it vouches for
    assert sorted(order[:6]) == sorted(FILES[:6])
    assert order[6:] == ["COMPLETE", ".writing-step_00000001", "renamed", "checkpoints"]


def test_what_a_killed_save_left_is_deleted_whatever_it_is(tmp_path):
    folder = _save(tmp_path, 1).parent
    (folder / ".writing-file").write_text("x")
    (folder / ".writing-link").symlink_to(tmp_path)
    checkpoint.remove_leftovers(tmp_path)
    assert [p.name for p in folder.iterdir()] == ["step_00000001"] and tmp_path.exists()


@pytest.mark.parametrize("key", ["transfer.epochs=3", "data.columns.labels=null"])
def test_settings_that_move_no_number_of_training_may_change(tmp_path, key):
    _save(tmp_path, 1)
    assert checkpoint.load_newest(_config(tmp_path, key)) is not None


@pytest.mark.parametrize("content", ["[]", "{}", '"x"', '{"format": 1}', "null"])
def test_a_state_that_is_json_but_none_of_ours_is_a_checkpoint_error(tmp_path, content):
    folder = _save(tmp_path, 1)
    (folder / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match="step_00000001: "):
        checkpoint.read(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", None),
        ("step", "7"),
        ("config", []),
        ("loader", 3),
        ("rng", {}),
        ("step", -3),
        ("step", True),
        ("skipped_steps", -1),
        ("threads", 10**9),  # torch ends the process at it
        ("optimizer_steps", 2.5),
        ("ema_updates", "2"),
        ("tokenizer", 5),
        ("loader", {"step": 2}),
        ("rng", []),
    ],
)
def test_an_entry_of_another_kind_is_a_checkpoint_error_that_names_it(tmp_path, key, value):
    """A TypeError or KeyError of whoever took it out."""
    folder = _save(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, key: value}))
    with pytest.raises(CheckpointError, match=rf"not of a checkpoint: .*{key}(\.step)?: expected"):
        checkpoint.read(folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_state_with_a_number_that_json_lacks_is_refused(tmp_path, number):
    """The next save failed of it, hours later and in its own name."""
    folder = _save(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "rng": [{"numpy": number}]}))
    with pytest.raises(CheckpointError, match=r"step_00000001: cannot be read: state\.json holds"):
        checkpoint.read(folder)


def test_everything_comes_back_bit_for_bit(tmp_path):
    folder = _save(tmp_path, 3)
    read = checkpoint.load_newest(_config(tmp_path))
    assert read is not None and read.folder == folder and read.step == 3
    want, got = _training(3), read.training
    assert got.optimizer_steps == 11
    groups = [(want.parameters, got.parameters), (want.buffers, got.buffers)]
    groups += [(want.moments[k], got.moments[k]) for k in want.moments]
    for left, right in groups:
        assert left.keys() == right.keys()
        for name in left:
            assert left[name].dtype == right[name].dtype
            assert torch.equal(left[name], right[name])


def test_a_user_can_check_the_hashes_by_hand(tmp_path):
    folder = _save(tmp_path, 1)
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert sorted(line.split("  ")[1] for line in lines) == sorted(FILES[:5])
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_no_checkpoint_is_no_error(tmp_path):
    assert checkpoint.load_newest(_config(tmp_path)) is None


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_falls_back_to_the_previous(tmp_path, name):
    # oracle: the SHA-256 list; safetensors and JSON themselves notice few of these
    good, bad = _save(tmp_path, 1), _save(tmp_path, 2)
    original = (bad / name).read_bytes()
    draw = random.Random(name)
    for _ in range(15):
        damaged = bytearray(original)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        (bad / name).write_bytes(damaged)
        # a marker is compared without the newline behind it
        if bytes(damaged).strip() == original.strip() and name == "COMPLETE":
            continue
        found, problems = checkpoint.find_newest(tmp_path)
        assert found == good and len(problems) == 1 and str(bad) in problems[0]


@pytest.mark.parametrize("name", FILES)
def test_truncated_or_missing_files_fall_back_to_the_previous(tmp_path, name):
    good, bad = _save(tmp_path, 1), _save(tmp_path, 2)
    original = (bad / name).read_bytes()
    for cut in sorted({0, 1, len(original) // 3, len(original) // 2, len(original) - 2}):
        (bad / name).write_bytes(original[:cut])
        assert checkpoint.find_newest(tmp_path)[0] == good, cut
    (bad / name).unlink()
    found, problems = checkpoint.find_newest(tmp_path)
    assert found == good and f"{name} is missing" in problems[0]


def test_with_no_intact_checkpoint_nothing_starts_over_silently(tmp_path):
    (_save(tmp_path, 1) / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="no intact checkpoint is left: .*COMPLETE") as caught:
        checkpoint.load_newest(_config(tmp_path))
    assert caught.value.exit_code == 4
    assert "copy it again" in str(caught.value)  # before it speaks of deleting
    assert str(caught.value).index("copy it again") < str(caught.value).index("delete")


def test_one_that_this_user_may_not_read_is_not_called_damaged(tmp_path, monkeypatch):
    # a colleague was told to delete the folder of checkpoints; an older one was taken instead
    _save(tmp_path, 1), _save(tmp_path, 2)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "file_sha256", refuse)
    with pytest.raises(CheckpointError, match="step_00000002.*cannot be read: Permission") as told:
        checkpoint.find_newest(tmp_path)
    assert "mlip export" in str(told.value) and "delete" not in str(told.value)


def test_one_that_a_limit_keeps_from_being_read_is_not_called_damaged(tmp_path, monkeypatch):
    # too many open files on a shared node: an older one would be taken, and this one marked
    _save(tmp_path, 1), _save(tmp_path, 2)

    def refuse(path):
        raise OSError(errno.ENFILE, "Too many open files in system", str(path))

    monkeypatch.setattr(checkpoint, "file_sha256", refuse)
    with pytest.raises(CheckpointError, match="step_00000002: cannot be read: too many files"):
        checkpoint.find_newest(tmp_path)


def test_a_passed_over_checkpoint_is_replaced_when_its_step_comes_again(tmp_path):
    bad = _save(tmp_path, 2)
    (bad / "state.json").write_text("{}")
    _save(tmp_path, 2)
    assert checkpoint.find_newest(tmp_path) == (bad, [])


def test_saving_an_intact_step_again_touches_nothing(tmp_path):
    folder = _save(tmp_path, 2)
    before = (folder / "COMPLETE").stat().st_mtime_ns
    _save(tmp_path, 2)
    assert (folder / "COMPLETE").stat().st_mtime_ns == before


def test_only_the_newest_are_kept(tmp_path):
    for step in (9, 10, 100):
        _save(tmp_path, step, keep=2)
    names = [path.name for path in checkpoint.checkpoints_of(tmp_path)]
    assert names == ["step_00000100", "step_00000010"]


def test_what_a_killed_save_leaves_is_ignored_and_removed(tmp_path):
    good = _save(tmp_path, 1)
    leftover = tmp_path / "checkpoints" / ".writing-step_00000002"
    shutil.copytree(good, leftover)
    assert checkpoint.find_newest(tmp_path) == (good, [])
    _save(tmp_path, 2)  # in nobody's way: a save that failed within the run leaves one too
    assert not leftover.exists() and good.exists()


def test_a_link_is_no_checkpoint_of_the_run_and_what_it_leads_to_is_kept(tmp_path):
    others = _save(tmp_path / "other", 9)
    good = _save(tmp_path, 1)
    (good.parent / "step_00000002").symlink_to(others)
    assert checkpoint.find_newest(tmp_path) == (good, [])
    _save(tmp_path, 3, keep=1)
    assert checkpoint.find_newest(tmp_path / "other") == (others, [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["parameters", "exp_avg", "exp_avg_sq"])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, where, value):
    good = _save(tmp_path, 1)
    training = _training()
    group = training.parameters if where == "parameters" else training.moments[where]
    group["model.a"][2, 1] = value
    with pytest.raises(CheckpointError, match=f"{where} model.a .*not finite"):
        checkpoint.save(tmp_path, training, _state(2), keep=2)
    assert checkpoint.find_newest(tmp_path) == (good, [])


@pytest.mark.parametrize("free, rows", [(4096, 5), (3 * 2**20, 2**17)])  # 9 MiB of tensors
def test_a_full_disk_is_named_before_anything_is_written(tmp_path, monkeypatch, free, rows):
    good = _save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"checkpoints: a checkpoint needs .* MiB, .* free"):
        _save(tmp_path, 2, rows=rows)
    assert checkpoint.find_newest(tmp_path) == (good, [])


def test_a_disk_that_does_not_tell_its_room_is_written_to(tmp_path, monkeypatch):
    """A program's file system (FUSE) may say 0 bytes of 0: no run could save there."""
    usage = shutil.disk_usage(tmp_path)._replace(total=0, used=0, free=0)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    saved = _save(tmp_path, 1)
    assert checkpoint.find_newest(tmp_path) == (saved, [])


def test_a_write_that_fails_half_way_leaves_the_previous_and_names_the_path(tmp_path):
    # RLIMIT_FSIZE stands for a disk that fills while the file is written
    good = _save(tmp_path, 1)
    before = hashlib.sha256((good / "parameters.safetensors").read_bytes()).hexdigest()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(CheckpointError, match="step_00000002.*cannot be written"):
            _save(tmp_path, 2, rows=20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.find_newest(tmp_path) == (good, [])
    assert hashlib.sha256((good / "parameters.safetensors").read_bytes()).hexdigest() == before


def test_other_settings_are_refused_with_every_key_that_differs(tmp_path, caplog):
    _save(tmp_path, 1)
    other = _config(tmp_path, "run.seed=5", "loss.matching.weight=0.25", "model.embed_dim=64")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_newest(other)
    text = str(caught.value)
    assert "run.seed (saved 1, now 5)" in text and "--allow-mismatch" in text
    assert "loss.matching.weight (saved 0.5, now 0.25)" in text and "model.embed_dim" in text
    assert checkpoint.load_newest(other, allow_mismatch=True) is not None
    assert "resuming although settings differ: " in caplog.text
    assert "run.seed (saved 1, now 5)" in caplog.text


def test_settings_that_this_version_does_not_know_name_the_checkpoint(tmp_path):
    state = _state(1)
    state["config"]["train"]["unheard_of"] = 3
    checkpoint.save(tmp_path, _training(), state, keep=2)
    with pytest.raises(CheckpointError, match=r"step_00000001: its settings .*unheard_of"):
        checkpoint.load_newest(_config(tmp_path))


def test_settings_that_change_no_number_may_differ(tmp_path):
    _save(tmp_path, 1)
    free = ["train.zero_stage=3", "train.log_steps=3", "data.workers=4", "evaluate.bootstrap=7"]
    assert checkpoint.load_newest(_config(tmp_path, *free)) is not None


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", [*FILES[:5], "extra.pt"])
def test_a_planted_pickle_with_matching_hashes_is_never_executed(tmp_path, name):
    folder, marker = _save(tmp_path, 1), tmp_path / "executed"
    (folder / name).write_bytes(pickle.dumps(_Payload(marker)))
    names = sorted({*FILES[:5], name})
    sums = "".join(f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names)
    (folder / "SHA256SUMS").write_text(sums)
    (folder / "COMPLETE").write_text(hashlib.sha256(sums.encode()).hexdigest() + "\n")
    if name == "extra.pt":
        assert checkpoint.load_newest(_config(tmp_path)) is not None  # nobody opens it
    else:
        with pytest.raises(CheckpointError, match="cannot be read"):
            checkpoint.load_newest(_config(tmp_path))
    assert not marker.exists()


def test_the_hash_list_names_all_that_is_read_and_nothing_outside_the_folder(tmp_path):
    folder = _save(tmp_path, 1)
    (tmp_path / "outside").write_text("x")
    line = f"{hashlib.sha256(b'x').hexdigest()}  ../../outside\n"
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    for listed, said in (([*lines, line], "a file outside"), (lines[1:], "lacks ['parameters.")):
        sums = "".join(listed)
        (folder / "SHA256SUMS").write_text(sums)
        (folder / "COMPLETE").write_text(hashlib.sha256(sums.encode()).hexdigest() + "\n")
        found = pytest.raises(CheckpointError, checkpoint.find_newest, tmp_path)
        assert said in str(found.value)


def test_a_number_that_json_does_not_know_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(tmp_path, _training(), {**_state(1), "loader": float("nan")}, keep=2)


def test_a_newer_format_is_refused_by_its_number(tmp_path):
    state = {**_state(1), "format": 99}
    checkpoint.save(tmp_path, _training(), state, keep=2)
    with pytest.raises(CheckpointError, match="format 99, this version reads format 1"):
        checkpoint.load_newest(_config(tmp_path))
