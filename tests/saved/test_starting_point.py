"""A run that begins with a trained model: what it takes from it, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import train
from mlip import cli
from mlip.knowledge.concepts import ConceptTable
from mlip.pretrained import from_pretrained, open_checkpoint, save_pretrained
from mlip.saved import starting_point
from mlip.saved.model_facts import start_of
from mlip.saved.starting_point import _require_its_own
from mlip.settings.config import ConfigError, load
from mlip.training import checkpoint
from tests.own_process import leave_the_process_as_it_was  # noqa: F401
from tests.small_run import small_run

SHORT = (
    "batch.global_pairs=8",
    "train.max_steps=1",
    "train.warmup_steps=0",
    "run.threads=1",
    "loss.category.prototypes=8",
    "evaluate.after_training=false",
    "data.phantom.studies=0",
)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export of the small run's model, none of whose weights is what a fresh run would draw."""
    run = small_run()
    parts = (run.model, run.config, run.tokenizer, run.table)
    return Path(save_pretrained(tmp_path / "export", *parts))


def _train(folder: Path, start: Path, *more: str) -> int:
    """As the documentation says: the settings of the start, then one's own."""
    manifest = f"data.manifest={small_run().config.data.manifest}"
    own = [manifest, f"run.dir={folder}", f"train.start={start}", *SHORT, *more]
    return train.main(["--config", str(start), *own])


def _trained(folder: Path) -> dict[str, torch.Tensor]:
    parameters = checkpoint.read(checkpoint.checkpoints_of(folder)[0]).training.parameters
    return {n.removeprefix("model."): t for n, t in parameters.items() if n.startswith("model.")}


def test_a_run_begins_with_the_weights_the_words_and_the_concepts_of_an_export(tmp_path, export):
    # oracle: a first step at lr 0 leaves every weight where it was
    assert _train(tmp_path / "run", export, "train.lr=0") == 0
    first = dict(from_pretrained(export).model.named_parameters())
    trained = _trained(tmp_path / "run")
    assert set(trained) == set(first)
    assert all(torch.equal(trained[name], first[name]) for name in first)
    opened = open_checkpoint(tmp_path / "run")
    assert torch.equal(opened.model.concept_vectors, from_pretrained(export).model.concept_vectors)
    vocabulary = (export / "tokenizer" / "tokenizer.json").read_bytes()
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").read_bytes() == vocabulary
    assert opened.table.fingerprint == small_run().table.fingerprint


def test_it_learns_from_there_and_goes_on_without_its_start(tmp_path, export):
    assert _train(tmp_path / "run", export, "train.max_steps=2", "train.checkpoint_steps=1") == 0
    first = dict(from_pretrained(export).model.named_parameters())
    moved = [
        name
        for name, tensor in _trained(tmp_path / "run").items()
        if not torch.equal(tensor, first[name])
    ]
    assert len(moved) > len(first) // 2
    whole = _trained(tmp_path / "run")
    # the last checkpoint is lost, and so is the start: its settings are the run's own by now
    shutil.rmtree(checkpoint.checkpoints_of(tmp_path / "run")[0])
    settings = tmp_path / "run" / "config.yaml"
    shutil.rmtree(export)
    assert train.main(["--config", str(settings)]) == 0
    again = _trained(tmp_path / "run")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_run_and_a_checkpoint_can_be_the_start_as_well(tmp_path, export, capsys, monkeypatch):
    assert _train(tmp_path / "first", export) == 0
    for number, start in enumerate(
        (tmp_path / "first", checkpoint.checkpoints_of(tmp_path / "first")[0])
    ):
        folder = tmp_path / f"second_{number}"
        own = [f"run.dir={folder}", f"train.start={start}", "train.lr=0"]
        assert train.main(["--config", str(tmp_path / "first"), *own]) == 0
        before, after = _trained(tmp_path / "first"), _trained(folder)
        assert all(torch.equal(before[name], after[name]) for name in before)
        # its settings where they lie: a checkpoint alone is no folder for --config
        own = [f"run.dir={tmp_path / 'wrong'}", own[1], "model.embed_dim=16"]
        assert train.main(["--config", str(tmp_path / "first"), *own]) == 2
        said = capsys.readouterr().err
        assert f": --config {tmp_path / 'first'}, and yours" in said and f"{start}: " in said
    monkeypatch.chdir(start.parent)  # by a name that says nothing of the run
    assert starting_point._with_settings(Path(start.name)) == tmp_path / "first"


def test_the_card_says_where_the_weights_began_and_names_no_place(tmp_path, export):
    assert _train(tmp_path / "run", export) == 0
    out = tmp_path / "second_export"
    assert cli.main(["export", f"checkpoint={tmp_path / 'run'}", "--out", str(out)]) == 0
    assert "pre-trained, from a folder named export" in (out / "README.md").read_text()
    assert str(tmp_path) not in (out / "config.json").read_text()
    assert json.loads((out / "config.json").read_text())["config"]["train"]["start"] is None
    assert from_pretrained(out).origin["start"]["image"] == {"kind": "folder", "name": "export"}


@pytest.mark.parametrize("start", ["exported", "runs/big", "/gone/big/"])
def test_a_start_that_is_gone_is_no_model_of_the_hub(start):
    """The card linked to huggingface.co/exported where the folder was not there any more."""
    found = start_of(load([], [f"train.start={start}"]))
    expected = {"kind": "folder", "name": Path(start).name}
    assert found == {"image": expected, "text": expected}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["model.embed_dim=16"], "take the settings of the model from its folder"),
        (["model.vision.source=weights/other"], "source=weights/other would bring others"),
        (["model.text.source=weights/other"], "source=weights/other would bring others"),
        (["knowledge.vectors=text_tower"], "set knowledge.vectors=tfidf"),
    ],
)
def test_settings_of_another_model_are_refused(tmp_path, export, capsys, more, says):
    assert _train(tmp_path / "run", export, *more) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.parametrize("source", ["lexicon", "umls"])
def test_concepts_of_ones_own_are_asked_for_by_their_name(source):
    run = small_run()
    table = ConceptTable(run.table.concepts[:-1], {"source": source})
    start: Any = SimpleNamespace(config=run.config, tokenizer=run.tokenizer, table=table)
    asked = load([], ["train.start=big", "knowledge.vectors=elsewhere/tfidf"])  # of the same name
    named = load([], ["train.start=big", "knowledge.lexicon=own.jsonl"])
    _require_its_own(named, start)
    if source == "lexicon":
        _require_its_own(asked, start)
        start.config = load([], ["knowledge.vectors=gone/tfidf"])  # by a path of its own
        _require_its_own(asked, start)
        return
    with pytest.raises(ConfigError, match="table of its own; name it with knowledge.lexicon"):
        _require_its_own(asked, start)


def test_the_start_is_opened_with_ones_own_table(tmp_path, monkeypatch):
    """An export holds no table of others: whoever has it names where it lies by now."""
    asked: list[tuple[str, str | None]] = []

    def opened(path: str, *, lexicon: str | None) -> Any:
        asked.append((str(path), lexicon))
        return SimpleNamespace(config=config)

    monkeypatch.setattr(starting_point, "open_checkpoint", opened)
    monkeypatch.setattr(starting_point, "_require_its_own", lambda config, start: None)
    own = ["train.start=big", "knowledge.lexicon=own.jsonl", f"run.dir={tmp_path}"]
    config = load([], own)
    starting_point.open_start(config)
    assert asked == [("big", "own.jsonl")]


def test_another_vocabulary_is_refused(tmp_path, export, capsys):
    from mlip.dataloading.reports.tokenizer import train_tokenizer

    train_tokenizer(["heart and lungs"] * 9, 60, tmp_path / "other")
    assert _train(tmp_path / "run", export, f"model.text.tokenizer={tmp_path / 'other'}") == 2
    assert "is not the vocabulary of" in capsys.readouterr().err


def test_a_tokenizer_goes_before_the_vocabulary_of_a_source(tmp_path):
    from mlip.dataloading.reports.tokenizer import train_tokenizer

    run = small_run()
    train_tokenizer(["heart and lungs"] * 9, 60, tmp_path)
    start: Any = SimpleNamespace(config=run.config, tokenizer=run.tokenizer, table=run.table)
    both = [f"model.text.source={tmp_path}"]
    with pytest.raises(ConfigError, match="model.text.source=.* is not the vocabulary of"):
        _require_its_own(load([], ["train.start=big", *both]), start)
    both.append(f"model.text.tokenizer={run.folder / 'run' / 'tokenizer'}")
    _require_its_own(load([], ["train.start=big", *both]), start)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_start_that_cannot_be_read_is_one_clear_line(tmp_path, export, capsys, damage):
    settings = tmp_path / "settings"
    shutil.copytree(export, settings)
    shutil.rmtree(export) if damage == "gone" else (export / "model.safetensors").write_bytes(b"")
    own = [
        f"data.manifest={small_run().config.data.manifest}",
        f"run.dir={tmp_path / 'run'}",
        *SHORT,
    ]
    assert train.main(["--config", str(settings), f"train.start={export}", *own]) == 4
    assert str(export) in capsys.readouterr().err


def test_other_preprocessing_is_said(tmp_path, export, capsys):
    assert _train(tmp_path / "run", export, "data.mean=0.4") == 0
    assert "other preprocessing" in capsys.readouterr().err


def test_settings_of_an_export_leave_its_generated_studies_behind(tmp_path, export):
    config = load([export], takes_exports=True)
    assert config.data.phantom.studies == 0 and small_run().config.data.phantom.studies > 0
    assert config.model.embed_dim == small_run().config.model.embed_dim
    with pytest.raises(ConfigError, match="an export or a checkpoint is named as checkpoint="):
        load([export])
    for other in ('{"model_type": "bert"}', '{"model_type": "bert", "config": {}}', "[]"):
        (export / "config.json").write_text(other)
        with pytest.raises(ConfigError, match="is not of an `mlip export`"):
            load([export], takes_exports=True)
