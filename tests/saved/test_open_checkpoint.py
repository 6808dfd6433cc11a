"""A checkpoint of a run is opened with what it was trained with, or not at all."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mlip.dataloading.reports.tokenizer import train_tokenizer
from mlip.knowledge import concept_files
from mlip.knowledge.concept_files import write_table
from mlip.pretrained import PretrainedError, open_checkpoint, save_pretrained
from mlip.settings.config import to_dict
from mlip.training import checkpoint
from mlip.training.lifecycle import CheckpointError
from mlip.training.step import TrainingState
from mlip.transfer.fingerprint import hash_of_vocabulary
from tests.small_run import small_export, small_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return _write_run(tmp_path / "run")


def _write_run(folder: Path, **more: Any) -> Path:
    """A run folder with the checkpoints of steps 1 and 2, told apart by one weight."""
    small = small_run()
    shutil.copytree(small.folder / "run" / "tokenizer", folder / "tokenizer")
    named = {f"model.{name}": p.detach() for name, p in small.model.named_parameters()}
    whole = {f"model.{name}": tensor for name, tensor in small.model.state_dict().items()}
    buffers = {name: tensor for name, tensor in whole.items() if name not in named}
    buffers["losses.category.prototypes"] = torch.full((3, 32), 0.5)
    state = {
        "format": checkpoint.FORMAT,
        "config": to_dict(small.config),
        "tokenizer": hash_of_vocabulary(small.tokenizer),
        "concept_table": small.table.fingerprint,
        **more,
    }
    for step in (1, 2):
        moved = named | {"model.image_head.second.bias": torch.full((32,), float(step))}
        moments = {key: dict.fromkeys(moved, torch.zeros(1)) for key in checkpoint.MOMENTS}
        training = TrainingState(moved, moments, buffers, optimizer_steps=step)
        checkpoint.save(folder, training, {**state, "step": step}, keep=3)
    return folder


def test_the_newest_is_opened_and_a_damaged_one_is_named(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_checkpoint(run)
    assert opened.facts["step"] == 2
    assert opened.facts["checkpoint"] == str(checkpoint.folder_of(run, 2))
    assert opened.model.image_head.second.bias.unique().tolist() == [2.0]
    weights = run / "checkpoints" / "step_00000002" / "parameters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "mlip"):
        assert open_checkpoint(run).facts["step"] == 1
    (said,) = caplog.messages
    assert "step_00000002: parameters.safetensors is not what was written" in said
    assert said.endswith("step_00000001 is used")


def test_what_is_known_of_the_training_comes_with_the_model(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run / "checkpoints" / "step_00000001"
    known = {"step": 1, "pairs_seen": small_run().config.batch.global_pairs}
    opened = open_checkpoint(folder)
    assert opened.facts == known | {"checkpoint": str(folder), "weights": "trained"}
    assert opened.prototypes is not None and opened.prototypes.unique().tolist() == [0.5]
    assert not opened.model.training
    # of a version that kept no hashes of vocabulary and concepts; sizes of a batch that changed
    earlier = _write_run(tmp_path / "earlier", tokenizer=None, concept_table=None, pairs_seen=5)
    assert open_checkpoint(earlier).facts["pairs_seen"] == 5
    monkeypatch.chdir(run / "checkpoints")  # by a name that says nothing of the run
    assert open_checkpoint("step_00000001").facts["step"] == 1
    put = open_checkpoint(earlier, device="meta")
    assert {p.device.type for p in put.model.parameters()} == {"meta"}


@pytest.mark.parametrize("towers", [{"x": {}}, {"vision": 5}])
def test_shapes_of_towers_that_are_none_are_refused(towers: Any, tmp_path: Path) -> None:
    other = _write_run(tmp_path / "other", towers=towers)
    with pytest.raises(PretrainedError, match=r"state\.json is not of a checkpoint: towers.*: exp"):
        open_checkpoint(other)


def test_a_run_without_a_checkpoint_is_told_from_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(PretrainedError, match="its folder checkpoints is empty"):
        open_checkpoint(tmp_path)


def test_a_table_of_another_length_is_refused_where_no_hash_was_kept(tmp_path: Path) -> None:
    earlier = _write_run(tmp_path / "earlier", concept_table=None)
    (tmp_path / "own.yaml").write_text(
        "category: x\nsemantic_type: finding\nconcepts: {one: {name: one}}\n"
    )
    with pytest.raises(PretrainedError, match=r"knows \d+ concepts, the concept table has 1;"):
        open_checkpoint(earlier, lexicon=str(tmp_path / "own.yaml"))


def test_another_vocabulary_than_that_of_the_training_is_refused(run: Path) -> None:
    """Its ids mean other words, in features that look like any other."""
    texts = ["the heart is large", "both lungs are clear", "no effusion"]
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(PretrainedError, match=r"expected its vocabulary in .*tokenizer, there is"):
        open_checkpoint(run)
    train_tokenizer(texts, 60, run / "tokenizer", min_patients=1)
    with pytest.raises(PretrainedError, match=r"trained with the vocabulary \w{12}, .*restore"):
        open_checkpoint(run)


def test_a_vocabulary_cut_short_is_named(run: Path) -> None:
    file = run / "tokenizer" / "tokenizer.json"
    whole = file.read_text()
    for content in (whole[: len(whole) // 2], "{}"):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be read .*; restore"):
            open_checkpoint(run)


def test_only_the_two_kinds_of_weights_can_be_asked_for(run: Path) -> None:
    for kind in ("EMA", "average", ""):
        with pytest.raises(PretrainedError, match=f"expected 'trained' or 'ema', got {kind!r}"):
            open_checkpoint(run, weights_of=kind)


def test_where_there_is_no_average_of_the_weights_none_is_taken_for_it(run: Path) -> None:
    for path in (run, run / "checkpoints" / "step_00000002"):
        with pytest.raises(PretrainedError, match="holds no average of the weights"):
            open_checkpoint(path, weights_of="ema")


def test_an_export_is_of_the_average_or_it_is_not(tmp_path: Path) -> None:
    with pytest.raises(PretrainedError, match="was exported without the average of the weights"):
        open_checkpoint(small_export(), weights_of="ema")
    run = small_run()
    parts = (run.model, run.config, run.tokenizer, run.table)
    average = save_pretrained(tmp_path / "average", *parts, facts={"weights": "ema"})
    assert open_checkpoint(average, weights_of="ema").facts["weights"] == "ema"


@pytest.mark.parametrize("key", ["config", "facts", "fingerprints", "vocab_size"])
def test_an_export_with_something_else_in_a_field_is_refused(key: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_export(), tmp_path / "copy"))
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {key: [1]}))
    with pytest.raises(PretrainedError, match=rf"config\.json: lacks \['{key}'\]; copy"):
        open_checkpoint(folder)


def test_a_run_is_opened_with_the_lexicon_that_it_kept_when_ours_has_changed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = tmp_path / "lexicon"
    later.mkdir()
    (later / "one.yaml").write_text(
        "category: later\nsemantic_type: finding\nconcepts: {one: {name: one, synonyms: [a one]}}\n"
    )
    write_table(small_run().table, tmp_path / "kept.jsonl")
    monkeypatch.setattr(concept_files, "LEXICON_DIR", later)
    with pytest.raises(PretrainedError, match=r"or put concepts.jsonl of an .* into .*/run$"):
        open_checkpoint(run)
    with pytest.raises(PretrainedError, match=r"trained it \(commit 0123abc\) into "):
        open_checkpoint(_write_run(tmp_path / "known", commit="0123abc"))
    shutil.copy(tmp_path / "kept.jsonl", run / "concepts.jsonl")
    assert open_checkpoint(run).table.fingerprint == small_run().table.fingerprint


def test_a_damaged_one_that_is_named_itself_is_refused(run: Path) -> None:
    """safetensors would read its wrong weights without a word."""
    folder = run / "checkpoints" / "step_00000002"
    weights = folder / "parameters.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 0x40
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"2: parameters\.safetensors is not .*copy it again"):
        open_checkpoint(folder)
    assert open_checkpoint(run / "checkpoints" / "step_00000001").facts["step"] == 1
    (run / "checkpoints" / "step_00000001" / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="step_00000001: COMPLETE is missing"):
        open_checkpoint(run / "checkpoints" / "step_00000001")


def test_the_best_by_its_weights_is_not_taken_for_the_best_by_their_average(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for watched, warns in (("ema", True), ("trained", False), ("unsaid", False)):
        kept = {"monitor": "loss", "weights": watched, "best_step": 1}
        if watched == "unsaid":  # by a version that scored the trained ones alone
            del kept["weights"]
        run = _write_run(tmp_path / watched, validation=kept)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "mlip"):
            assert open_checkpoint(run).facts["step"] == 1
        assert ("may be the best" in caplog.text) == warns
        best, other = (open_checkpoint(checkpoint.folder_of(run, step)).facts for step in (1, 2))
        assert best["is_best_on_val"] is True and "is_best_on_val" not in other


def test_a_table_that_is_named_now_goes_before_the_one_of_the_training(tmp_path: Path) -> None:
    """The run's own may lie elsewhere by now."""
    small, table = small_run(), tmp_path / "here.jsonl"
    write_table(small.table, table)
    config = to_dict(small.config)
    config["knowledge"]["lexicon"] = str(tmp_path / "gone.jsonl")
    run = _write_run(tmp_path / "run", config=config)
    assert open_checkpoint(run, lexicon=str(table)).table.fingerprint == small.table.fingerprint
    with pytest.raises(ValueError, match=r"gone\.jsonl: does not exist"):
        open_checkpoint(run)
