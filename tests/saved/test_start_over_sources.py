"""A run that begins with one whose towers began with folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import train
from mlip import cli
from mlip.dataloading.reports.tokenizer import train_tokenizer
from mlip.pretrained import open_checkpoint
from mlip.training import faults
from tests.own_process import leave_the_process_as_it_was  # noqa: F401
from tests.small_run import small_run
from tests.test_sources import _sources, _train, _weights


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/ of one step over sources/."""
    folder = tmp_path_factory.mktemp("first")
    _sources(folder / "sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "_fired", set())
        assert _train(folder / "run", folder / "sources", "train.max_steps=1") == 0
    return folder


def _start(start: Path, folder: Path, *more: str) -> int:
    own = [f"train.start={start}", f"run.dir={folder}", "train.max_steps=1", *more]
    return train.main(["--config", str(start), *own])


def test_it_begins_with_the_run_and_not_with_another_source(first, tmp_path, capsys):
    """Settings with a source were refused: only an export of the run was a start."""
    run, second = tmp_path / "run", tmp_path / "second"
    shutil.copytree(first / "run", run)
    assert _start(run, tmp_path / "wrong", f"model.text.source={tmp_path}") == 2
    assert f"model.text.source={tmp_path} would bring others" in capsys.readouterr().err
    (first / "sources").rename(first / "gone")
    try:
        assert _start(run, second, "train.lr=0") == 0
        opened = open_checkpoint(second)
        # what began so is a start too, of a checkpoint as of a run
        assert _start(second, tmp_path / "third", f"train.start={opened.facts['checkpoint']}") == 0
    finally:
        (first / "gone").rename(first / "sources")
    began, given = _weights(second, 1), _weights(run, 1)
    names = [name for name in given if name.startswith("model.")]
    assert names and all(torch.equal(began[name], given[name]) for name in names)
    assert opened.tokenizer.vocab_size == small_run().tokenizer.vocab_size
    assert opened.model.text.backbone.config.hidden_dropout_prob == 0.2
    assert opened.origin["start"]["image"] == {"kind": "folder", "name": "run"}


def test_its_memory_is_planned_without_them(first, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(first / "run", run)
    (first / "sources").rename(first / "gone")
    try:
        assert cli.main(["doctor", "--plan", str(run), "--ranks", "1", "--memory-gib", "8"]) == 0
    finally:
        (first / "gone").rename(first / "sources")
    model = open_checkpoint(run).model
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M" in capsys.readouterr().out


def test_it_does_not_begin_under_another_vocabulary_of_its_source(first, tmp_path, capsys):
    train_tokenizer(["heart and lungs"] * 9, 60, tmp_path / "other")
    shutil.copytree(first / "sources" / "bert", tmp_path / "bert")
    try:
        shutil.copytree(tmp_path / "other", first / "sources" / "bert", dirs_exist_ok=True)
        assert _start(first / "run", tmp_path / "second") == 2
    finally:
        shutil.copytree(tmp_path / "bert", first / "sources" / "bert", dirs_exist_ok=True)
    said = capsys.readouterr().err
    assert "model.text.source=" in said and "is not the vocabulary of train.start=" in said
