"""A model's folder round-trips, notices damage, and stands alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mlip import pretrained
from mlip.knowledge.concept_files import load_concepts
from mlip.model import MLIPModel
from mlip.pretrained import (
    PretrainedError,
    from_pretrained,
    open_checkpoint,
    save_pretrained,
)
from mlip.saved import weights as pretrained_weights
from mlip.settings.typed_tree import ConfigError
from mlip.system.output_file import only_writer
from mlip.transfer.fingerprint import (
    hash_of,
    hash_of_vocabulary,
    hash_of_weights,
    preprocessing,
)
from tests.small_run import small_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = small_run()
    out = tmp_path_factory.mktemp("export") / "model"
    return save_pretrained(out, run.model, run.config, run.tokenizer, run.table, facts={"step": 7})


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


def _export(to: Path, **named: Any) -> Path:
    run = small_run()
    return save_pretrained(to, run.model, run.config, run.tokenizer, run.table, **named)


def _list_again(folder: Path) -> None:
    """SHA256SUMS of what the files hold now."""
    names = [line.partition("  ")[2] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    hashes = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
    lines = [f"{digest}  {name}\n" for digest, name in zip(hashes, names, strict=True)]
    (folder / "SHA256SUMS").write_text("".join(lines))


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
    assert str(small_run().folder) not in (folder / "config.json").read_text()


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


@pytest.mark.parametrize("left", ["\xff", "model.safetensors", "config.json"])
def test_a_list_of_hashes_that_was_cut_is_refused(folder: Path, tmp_path: Path, left: str) -> None:
    damaged = copy_of(folder, tmp_path)
    lines = (damaged / "SHA256SUMS").read_text().splitlines()
    kept = "\n".join(x for x in lines if left in x) or left
    (damaged / "SHA256SUMS").write_text(kept, encoding="latin-1")  # \xff is no UTF-8
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
    _list_again(changed)
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


@pytest.mark.parametrize(
    ("beside", "name"),
    [
        ("nothing", "thesis.txt"),
        ("nothing", "config.json"),
        ("nothing", "SHA256SUMS"),
        ("an export", "thesis.txt"),
        ("an export", "tokenizer/notes.txt"),
        ("a data set with its list", "scan.dcm"),
    ],
)
def test_an_export_never_overwrites_what_is_not_an_export(
    folder: Path, tmp_path: Path, beside: str, name: str
) -> None:
    """A BERT's folder has a config.json as well: it was gone, and all that lay beside it."""
    out = copy_of(folder, tmp_path) if beside == "an export" else tmp_path / "out"
    out.mkdir(exist_ok=True)
    (out / name).write_text("precious")
    if beside == "a data set with its list":
        (out / "SHA256SUMS").write_text("0  scan.dcm\n")
    with pytest.raises(PretrainedError, match="holds other files"):
        _export(out)
    assert (out / name).read_text() == "precious"


def test_a_file_in_the_folders_place_stays(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("precious")
    with pytest.raises(PretrainedError, match="it is or holds other files"):
        _export(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "precious"


def test_nothing_of_a_killed_export_or_of_the_one_before_is_in_the_next(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "a" / "b" / ".model.partial").mkdir(parents=True)
    (tmp_path / "a" / "b" / ".model.partial" / "half").touch()
    out = copy_of(folder, tmp_path).rename(tmp_path / "a" / "b" / "model")
    (out / "image.onnx").touch()  # of an export with --onnx, which the next one is not
    with (out / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  image.onnx\n")
    for place in (out, tmp_path / "c" / "d" / "model"):
        _export(place)
        assert [p.name for p in place.parent.iterdir()] == ["model"]
        assert {p.name for p in place.iterdir()} == {p.name for p in folder.iterdir()}


def test_an_export_is_on_the_disk_before_the_one_before_it_goes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copy_of(folder, tmp_path).rename(tmp_path / "model")
    old = {path.stat().st_ino for path in (*out.rglob("*"), out)}
    synced, fsync, rename = set[int](), os.fsync, Path.rename

    def look(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def move(path: Path, target: Path) -> Path:
        if path == out:
            new = tmp_path / ".model.partial"
            assert {p.stat().st_ino for p in (*new.rglob("*"), new)} <= synced - old
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", look)
    monkeypatch.setattr(Path, "rename", move)
    _export(out)


def test_two_exports_at_once_into_one_folder_do_not_become_one(tmp_path: Path) -> None:
    """One's weights beside the other's settings would have a list of hashes that holds."""
    theirs = tmp_path / ".model.partial"
    theirs.mkdir()
    (theirs / "model.safetensors").touch()
    with (
        only_writer(tmp_path / ".model.lock", "theirs"),
        pytest.raises(ConfigError, match="another process is writing there"),
    ):
        _export(tmp_path / "model")
    assert list(tmp_path.iterdir()) == [theirs] and (theirs / "model.safetensors").exists()


def test_an_export_that_fails_leaves_the_one_before_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    out = copy_of(folder, tmp_path)
    monkeypatch.setattr(pretrained, "write_onnx", fail)
    with pytest.raises(OSError, match="No space left"):
        _export(out, onnx=True)
    assert list(tmp_path.iterdir()) == [out]
    assert from_pretrained(out).facts["step"] == 7


def test_an_export_that_cannot_be_moved_leaves_the_one_before_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that a kill between the two moves left aside."""
    out, move = copy_of(folder, tmp_path), Path.rename

    def fail(path: Path, to: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return move(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    for lies in (out, tmp_path / f".{out.name}.previous"):
        if lies != out:
            move(out, lies)
        with pytest.raises(OSError, match="Input/output"):
            _export(out)
        assert list(tmp_path.iterdir()) == [out]
        assert from_pretrained(out).facts["step"] == 7


def test_every_file_but_the_list_itself_is_listed_as_sha256sum_writes_it(folder: Path) -> None:
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert lines == [
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}"
        for name in sorted(files - {"SHA256SUMS"}, key=Path)
    ]


def test_the_settings_say_what_the_model_is(folder: Path) -> None:
    run = small_run()
    described = json.loads((folder / "config.json").read_text())
    assert (described["model_type"], described["format"]) == ("mlip", 1)
    assert described["vocab_size"] == run.tokenizer.vocab_size and described["facts"] == {"step": 7}
    assert described["fingerprints"] == {
        "weights": hash_of_weights(run.model),
        "preprocessing": hash_of(preprocessing(run.config)),
        "vocabulary": hash_of_vocabulary(run.tokenizer),
        "concept_table": run.table.fingerprint,
    }
    assert json.loads((folder / "preprocessing.json").read_text()) == preprocessing(run.config)


def test_a_model_is_put_where_it_is_asked_for(folder: Path) -> None:
    for opened in (from_pretrained(folder, device="meta"), open_checkpoint(folder, device="meta")):
        assert {p.device.type for p in opened.model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "another kind of model"),
        ('{"model_type": "mlip"}', "format None, this version reads format 1"),
        ('{"model_type": "mlip", "format": 1}', r"lacks \['config', 'vocab_size', 'fingerprints'"),
    ],
)
def test_settings_that_are_none_are_refused(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(PretrainedError, match=rf"config\.json: .*{said}"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("model", {"embed_dim": -1}, "embed_dim"), ("model", {"depth": 1}, "depth")],
)
def test_settings_out_of_range_or_unknown_are_refused(
    folder: Path, tmp_path: Path, key: str, value: Any, said: str
) -> None:
    changed = copy_of(folder, tmp_path)
    described = json.loads((changed / "config.json").read_text())
    described["config"][key] |= value
    (changed / "config.json").write_text(json.dumps(described))
    _list_again(changed)
    with pytest.raises(PretrainedError, match=rf"config\.json: .*{said}"):
        from_pretrained(changed)


def test_settings_that_lack_a_section_take_its_defaults(folder: Path, tmp_path: Path) -> None:
    changed = copy_of(folder, tmp_path)
    described = json.loads((changed / "config.json").read_text())
    del described["config"]["knowledge"]
    (changed / "config.json").write_text(json.dumps(described))
    (changed / "concepts.jsonl").unlink()  # then the default is asked for the table
    lines = (changed / "SHA256SUMS").read_text().splitlines(keepends=True)
    (changed / "SHA256SUMS").write_text("".join(x for x in lines if "concepts" not in x))
    _list_again(changed)
    assert from_pretrained(changed).table.fingerprint == small_run().table.fingerprint


@pytest.mark.parametrize("given", [7, {"a": 1}, ["x"]])
def test_a_fingerprint_that_is_no_text_is_another_one(
    folder: Path, tmp_path: Path, given: object
) -> None:
    changed = copy_of(folder, tmp_path)
    described = json.loads((changed / "config.json").read_text())
    described["fingerprints"]["concept_table"] = given
    (changed / "config.json").write_text(json.dumps(described))
    _list_again(changed)
    with pytest.raises(PretrainedError, match="was trained with the concept table"):
        from_pretrained(changed)


def test_weights_that_are_no_safetensors_are_refused(folder: Path, tmp_path: Path) -> None:
    changed = copy_of(folder, tmp_path)
    (changed / "model.safetensors").write_bytes(b"pickle")
    _list_again(changed)
    with pytest.raises(PretrainedError, match=r"model\.safetensors: cannot be read"):
        from_pretrained(changed)


def test_a_table_of_another_source_stays_out_and_is_asked_for(tmp_path: Path) -> None:
    """Its licence may not let it travel; `lexicon` goes before what the settings name."""
    lexicon = tmp_path / "own.yaml"
    lexicon.write_text("category: x\nsemantic_type: finding\nconcepts:\n  xyz: {name: xyz}\n")
    run, table = small_run(), load_concepts(str(lexicon))
    knowledge = dataclasses.replace(run.config.knowledge, lexicon=str(lexicon))
    config = dataclasses.replace(run.config, knowledge=knowledge)
    words = run.tokenizer.vocab_size
    model = MLIPModel(config, vocab_size=words, concept_vectors=torch.zeros(len(table), 16))
    parts = (model, config, run.tokenizer, table)
    kept = save_pretrained(tmp_path / "kept", *parts, include_concepts=True)
    out = save_pretrained(tmp_path / "out", *parts)
    assert (kept / "concepts.jsonl").is_file() and not (out / "concepts.jsonl").exists()
    lexicon.rename(tmp_path / "moved.yaml")
    assert from_pretrained(kept).table.fingerprint == table.fingerprint
    with pytest.raises(ValueError, match="own.yaml"):
        from_pretrained(out)
    for opened in (
        from_pretrained(out, lexicon=str(tmp_path / "moved.yaml")),
        open_checkpoint(out, lexicon=str(tmp_path / "moved.yaml")),
    ):
        assert opened.table.fingerprint == table.fingerprint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("concept_vectors"), "holds no concept_vectors; it is no MLIP model"),
        (lambda w: w.pop("image_head.second.bias"), "1 names, for example image_head.second.bias"),
        (lambda w: w.update(other=torch.zeros(1)), "1 names, for example other"),
        (
            lambda w: w.update({"image_head.second.bias": torch.zeros(31)}),
            r"image_head.second.bias has shape \(31,\), the settings ask for \(32,\)",
        ),
        # as a broadcast would take it
        (lambda w: w.update({"image_head.second.bias": torch.zeros(1)}), r"has shape \(1,\)"),
    ],
)
def test_weights_of_another_model_are_refused(change: Any, said: str) -> None:
    run = small_run()
    weights = dict(run.model.state_dict())
    change(weights)
    with pytest.raises(PretrainedError, match=f"^here: .*{said}"):
        pretrained_weights.model_with(run.config, run.tokenizer.vocab_size, weights, "here")


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
    run = small_run()
    source = tmp_path / "source"
    run.model.text.backbone.save_pretrained(source / "text")
    run.model.vision.tower.backbone.save_pretrained(source / "vision")
    towers = run.config.model
    own: dict[str, Any] = {
        "source": str(source / "text"),
        "tokenizer": str(source / "words"),
        "options": {},
    }
    text = dataclasses.replace(towers.text, **own)
    vision = dataclasses.replace(towers.vision, source=str(source / "vision"), options={})
    towers = dataclasses.replace(towers, text=text, vision=vision)
    config = dataclasses.replace(run.config, model=towers)
    model = MLIPModel(
        config,
        vocab_size=run.tokenizer.vocab_size,
        concept_vectors=run.model.concept_vectors,
    )
    out = save_pretrained(tmp_path / "out", model, config, run.tokenizer, run.table)
    shutil.rmtree(source)
    assert str(source) not in (out / "config.json").read_text()
    opened = from_pretrained(out)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, opened.model.state_dict()[name]), name


def test_open_checkpoint_reads_an_export_and_says_what_it_expects(
    folder: Path, tmp_path: Path
) -> None:
    opened = open_checkpoint(folder)
    assert opened.facts["checkpoint"] == str(folder)
    assert opened.linker is small_run().linker  # of the same table: built once
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
    other = {name: tensor for name, tensor in whole.items() if name != names[0]}
    with pytest.raises(PretrainedError, match=rf"disagree about 1 names, for example {names[0]}"):
        pretrained_weights.model_with(small_run().config, rows, other, "here")


def test_words_are_counted_in_the_weights() -> None:
    name = "text.backbone.embeddings.word_embeddings.weight"
    assert pretrained_weights.embedding_rows({"x": (1,), name: (7, 3)}) == 7
    assert pretrained_weights.embedding_rows({"x": (1,)}) is None
