"""A model's folder round-trips, notices damage, and stands alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mlip import pretrained_weights
from mlip.pretrained import (
    PretrainedError,
    from_pretrained,
    open_checkpoint,
    save_pretrained,
)
from tests.small_run import small_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = small_run()
    out = tmp_path_factory.mktemp("export") / "model"
    return save_pretrained(out, run.model, run.config, run.tokenizer, run.table, facts={"step": 7})


def copy_of(folder: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, to / "copy"))


def test_every_tensor_comes_back_bit_for_bit_and_so_do_the_features(folder: Path) -> None:
    run = small_run()
    opened = from_pretrained(folder)
    state = opened.model.state_dict()
    assert state.keys() == run.model.state_dict().keys()
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    image = torch.randn(2, 1, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = run.model.encode_image(image).embedding
        after = opened.model.encode_image(image).embedding
    assert torch.equal(before, after)
    assert not opened.model.training
    assert opened.table.fingerprint == run.table.fingerprint
    assert opened.facts["step"] == 7


def test_what_was_trained_by_xformers_is_opened_where_there_is_none(tmp_path: Path) -> None:
    run = small_run()
    towers = dataclasses.replace(run.config.model, attention="xformers")
    config = dataclasses.replace(run.config, model=towers)
    out = save_pretrained(tmp_path / "model", run.model, config, run.tokenizer, run.table)
    assert from_pretrained(out).config.model == run.config.model


def test_tokens_are_those_of_training(folder: Path) -> None:
    run = small_run()
    text = "There is a small left pleural effusion."
    before = run.tokenizer.encode_batch([text])[0].ids
    assert from_pretrained(folder).tokenizer.encode_batch([text])[0].ids == before


def test_the_folder_holds_no_pickle_and_no_path_of_this_machine(folder: Path) -> None:
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {"model.safetensors", "config.json", "preprocessing.json", "SHA256SUMS"} <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt"))]
    contract = json.loads((folder / "preprocessing.json").read_text())
    assert (contract["resize_px"], contract["crop_px"], contract["mean"]) == (112, 96, 0.5)
    assert str(small_run().folder / "run") not in (folder / "config.json").read_text()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer/tokenizer.json"])
def test_a_flipped_bit_is_noticed_and_the_file_named(
    folder: Path, tmp_path: Path, name: str
) -> None:
    damaged = copy_of(folder, tmp_path)
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / name).write_bytes(content)
    with pytest.raises(PretrainedError, match=f"{name}: damaged"):
        from_pretrained(damaged)


@pytest.mark.parametrize("left", ["", "model.safetensors", "config.json"])
def test_a_list_of_hashes_that_was_cut_is_refused(folder: Path, tmp_path: Path, left: str) -> None:
    damaged = copy_of(folder, tmp_path)
    lines = (damaged / "SHA256SUMS").read_text().splitlines()
    (damaged / "SHA256SUMS").write_text("\n".join(x for x in lines if left and left in x))
    with pytest.raises(PretrainedError, match="SHA256SUMS: does not list"):
        from_pretrained(damaged)


@pytest.mark.parametrize("name", ["/proc/self/maps", "tokenizer/../../other", "../other"])
def test_a_list_of_hashes_reaches_no_file_outside(folder: Path, tmp_path: Path, name: str) -> None:
    changed = copy_of(folder, tmp_path)
    with (changed / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(PretrainedError, match="names a file outside"):
        from_pretrained(changed)


def test_the_settings_of_an_export_do_not_open_the_network(folder: Path, tmp_path: Path) -> None:
    """A stranger's run.offline=false beside a hub id would have it fetched at the opening."""
    changed = copy_of(folder, tmp_path)
    settings = json.loads((changed / "config.json").read_text())
    settings["config"]["run"]["offline"] = False
    (changed / "config.json").write_text(json.dumps(settings))
    digest = hashlib.sha256((changed / "config.json").read_bytes()).hexdigest()
    lines = (changed / "SHA256SUMS").read_text().splitlines()
    kept = [f"{digest}  config.json" if line.endswith("  config.json") else line for line in lines]
    (changed / "SHA256SUMS").write_text("\n".join(kept) + "\n")
    assert from_pretrained(changed).config.run.offline


def test_a_missing_file_is_named(folder: Path, tmp_path: Path) -> None:
    damaged = copy_of(folder, tmp_path)
    (damaged / "concepts.jsonl").unlink()
    with pytest.raises(PretrainedError, match=r"concepts\.jsonl: missing"):
        from_pretrained(damaged)


def test_another_concept_table_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("category: x\nsemantic_type: finding\nconcepts:\n  xyz: {name: xyz}\n")
    with pytest.raises(PretrainedError, match=r"trained with the concept table.*other\.yaml"):
        from_pretrained(folder, lexicon=str(other))


def test_another_kind_of_model_and_another_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(PretrainedError, match="another kind of model"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mlip", "format": 99}')
    with pytest.raises(PretrainedError, match="format 99, this version reads format 1"):
        from_pretrained(tmp_path)


def test_an_export_never_overwrites_what_is_not_an_export(tmp_path: Path) -> None:
    run = small_run()
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(PretrainedError, match="holds other files"):
        save_pretrained(tmp_path, run.model, run.config, run.tokenizer, run.table)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_an_export_to_a_link_goes_where_it_leads(tmp_path: Path) -> None:
    """It ended in a traceback: a link is no folder that can be removed."""
    run = small_run()
    (tmp_path / "current").symlink_to("model")
    for _ in range(2):
        save_pretrained(tmp_path / "current", run.model, run.config, run.tokenizer, run.table)
    assert (tmp_path / "current").is_symlink() and not (tmp_path / "model").is_symlink()
    from_pretrained(tmp_path / "current")


def test_towers_that_came_from_a_folder_are_described_by_their_size(tmp_path: Path) -> None:
    """The source may be gone when the export is read: here it is deleted."""
    import shutil

    from mlip.model import MLIPModel

    run = small_run()
    source = tmp_path / "bert"
    run.model.text.backbone.save_pretrained(source)
    text = dataclasses.replace(run.config.model.text, source=str(source), options={})
    config = dataclasses.replace(run.config, model=dataclasses.replace(run.config.model, text=text))
    model = MLIPModel(
        config,
        vocab_size=run.tokenizer.vocab_size,
        concept_vectors=run.model.concept_vectors,
    )
    out = save_pretrained(tmp_path / "out", model, config, run.tokenizer, run.table)
    shutil.rmtree(source)
    opened = from_pretrained(out)
    assert opened.config.model.text.source is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, opened.model.state_dict()[name]), name


def test_open_checkpoint_reads_an_export_and_says_what_it_expects(
    folder: Path, tmp_path: Path
) -> None:
    assert open_checkpoint(folder).facts["checkpoint"] == str(folder)
    with pytest.raises(PretrainedError, match="expected a run folder"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_tensor_that_both_towers_share_is_written_once_and_stays_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tied(pretrained_weights.MLIPModel):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.token_head.second.weight = self.patch_head.second.weight

    monkeypatch.setattr(pretrained_weights, "MLIPModel", Tied)
    names = [f"{head}_head.second.weight" for head in ("patch", "token")]
    whole = small_run().model.state_dict()
    once = {name: tensor for name, tensor in whole.items() if name != names[1]}
    rows = small_run().tokenizer.vocab_size
    model = pretrained_weights.model_with(small_run().config, rows, once, "here")
    patch, token = (model.get_parameter(name) for name in names)
    assert token is patch and torch.equal(patch, whole[names[0]])
    both = once | {names[1]: whole[names[0]]}  # as an export writes it
    assert (
        pretrained_weights.model_with(small_run().config, rows, both, "here")
        .get_parameter(names[1])
        .equal(whole[names[0]])
    )
    with pytest.raises(PretrainedError, match="are one tensor in this model and differ"):
        pretrained_weights.model_with(small_run().config, rows, whole, "here")
