"""A run whose towers began with folders needs none of them again: it is copied, opened, resumed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

import train
from mlip import cli
from mlip.commands.evaluate_transfer import open_vision
from mlip.dataloading.reports.tokenizer import train_tokenizer
from mlip.encoders import pretrained_tower
from mlip.pretrained import PretrainedError, from_pretrained, open_checkpoint
from mlip.ranks import distributed, process_group
from mlip.saved import resumed_run, run_vocabulary
from mlip.settings.config import load, read
from mlip.settings.given import given
from mlip.system.output_file import file_sha256
from mlip.training import checkpoint, faults
from mlip.training.lifecycle import CheckpointError
from tests import rank_farm
from tests.own_process import leave_the_process_as_it_was  # noqa: F401
from tests.saved.test_pretrained_weights import Drawn
from tests.small_run import small_run

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CLASSES: dict[str, Any] = {
    "id2label": {0: "a", 1: "b", 2: "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
}
SHORT = (
    *("batch.global_pairs=4", "train.checkpoint_steps=1", "train.warmup_steps=0", "run.threads=1"),
    *("loss.category.prototypes=8", "evaluate.after_training=false", "data.phantom.studies=0"),
    *("model.heads.hidden=16", "model.embed_dim=16", "knowledge.vectors=text_tower"),
    *("knowledge.dim=16", "data.pipeline=torch", "data.max_tokens=32", "data.resize_px=64"),
    *("data.crop_px=48", "model.vision.kind=vit", "train.keep_checkpoints=3"),
)


def _sources(folder: Path, eps: float = 1e-6, **bert: Any) -> None:
    """As published ones: of an image size of their own, with a head's classes, more words."""
    run = small_run()
    vit = ViTConfig(
        **SMALL, **CLASSES, intermediate_size=16, image_size=32, patch_size=16, layer_norm_eps=eps
    )
    ViTModel(vit).save_pretrained(folder / "vit")
    words = run.tokenizer.vocab_size + 7
    text = SMALL | {"intermediate_size": 24, "hidden_dropout_prob": 0.2, "vocab_size": words} | bert
    BertModel(BertConfig(**text)).save_pretrained(folder / "bert")
    shutil.copytree(run.folder / "run" / "tokenizer", folder / "bert", dirs_exist_ok=True)


def _train(folder: Path, sources: Path, *more: str) -> int:
    manifest = f"data.manifest={small_run().config.data.manifest}"
    towers = [f"model.{x}.source={sources / y}" for x, y in (("vision", "vit"), ("text", "bert"))]
    own = [f"run.dir={folder}", "data.columns.labels=labels", manifest, *towers]
    return train.main([*own, *SHORT, *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run/ of one step, and whole/ of two, over sources/."""
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(3)
    _sources(folder / "sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "_fired", set())
        assert _train(folder / "whole", folder / "sources", "train.max_steps=2") == 0
    run = Path(shutil.copytree(folder / "whole", folder / "run"))
    shutil.rmtree(run / "checkpoints" / "step_00000002")
    return folder


@pytest.fixture
def away(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """run/ and whole/ where the folders that the towers began with are not."""
    for name in ("run", "whole"):
        shutil.copytree(made / name, tmp_path / name)
    (made / "sources").rename(made / "gone")
    yield tmp_path
    (made / "gone").rename(made / "sources")


def _weights(folder: Path, step: int = 2) -> dict[str, torch.Tensor]:
    """With moments, which tell gradients apart: the rate of a last step, and its move, are 0."""
    training = checkpoint.read(checkpoint.folder_of(folder, step)).training
    moments = {f"{k} {n}": x for k, held in training.moments.items() for n, x in held.items()}
    return {**training.parameters, **training.buffers, **moments}


def _same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def _rewrite(run: Path, change: Any) -> None:
    """state.json of each checkpoint changed, and its hashes again those of the files."""
    for folder in checkpoint.checkpoints_of(run):
        state = json.loads((folder / "state.json").read_text())
        change(state)
        (folder / "state.json").write_text(json.dumps(state))
        lines = [line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
        sums = "".join(f"{file_sha256(folder / name)}  {name}\n" for name in lines)
        (folder / "SHA256SUMS").write_text(sums)
        (folder / "COMPLETE").write_text(file_sha256(folder / "SHA256SUMS") + "\n")


def _of_an_earlier_version(run: Path) -> None:
    _rewrite(run, lambda state: [state.pop(key) for key in ("towers", "start")])
    shutil.rmtree(run / "tokenizer")


def _features(opened: Any) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, 9, 2]])
    yes = torch.ones(1, 4, dtype=torch.bool)
    with torch.no_grad():
        return (
            opened.model.encode_image(image).embedding,
            opened.model.encode_text(ids, yes, yes).embedding,
        )


def test_it_is_opened_without_them_and_gives_what_it_gave_with_them(made, away):
    # oracle: the same checkpoint of an earlier version, whose towers are read from the folders
    earlier = Path(shutil.copytree(away / "run", away / "earlier"))
    _of_an_earlier_version(earlier)
    (made / "gone").rename(made / "sources")
    before = open_checkpoint(earlier)
    (made / "sources").rename(made / "gone")
    opened = open_checkpoint(away / "run")
    assert all(torch.equal(a, b) for a, b in zip(_features(opened), _features(before), strict=True))
    assert opened.model.text.backbone.config.hidden_dropout_prob == 0.2
    assert opened.config.model.vision.source is opened.config.model.text.source is None
    words = "there is a small left pleural effusion"
    ids = [x.tokenizer.encode_batch([words])[0].ids for x in (opened, before)]
    assert ids[0] == ids[1]


def test_no_weight_of_them_is_read_where_they_are_still_there(made, monkeypatch):
    def fail(*arguments: Any, **named: Any) -> None:
        raise AssertionError("a source was read")

    for kind in (BertModel, ViTModel):
        monkeypatch.setattr(kind, "from_pretrained", fail)
    assert open_checkpoint(made / "run").facts["step"] == 1


def test_it_goes_on_without_them_to_the_weights_of_a_run_that_was_not_stopped(away, capsys):
    assert train.main(["--config", str(away / "run"), "train.max_steps=2"]) == 0
    assert _same(_weights(away / "run"), _weights(away / "whole"))
    # and what it writes needs them no more either, nor says that they were of the Hub
    opened = open_checkpoint(away / "run")
    assert opened.facts["step"] == 2
    assert opened.origin["start"]["image"] == {"kind": "folder", "name": "vit"}


def test_a_relative_name_of_a_folder_that_is_gone_is_no_model_of_the_hub(made, away):
    """weights/vit of the configs: the card of a copied run linked to huggingface.co/weights/vit."""
    run = away / "run"
    _rewrite(run, lambda s: s["config"]["model"]["vision"].update(source="weights/vit"))
    assert open_checkpoint(run).origin["start"]["image"] == {"kind": "folder", "name": "vit"}
    assert cli.main(["export", f"checkpoint={run}", "--out", str(away / "model")]) == 0
    assert "huggingface.co/weights" not in (away / "model" / "README.md").read_text()
    # nor does the run that goes on say so: what it began with is its checkpoint's word
    given = ["model.vision.source=weights/vit", "train.max_steps=2"]
    assert train.main(["--config", str(run), *given]) == 0
    opened = open_checkpoint(run)
    assert opened.facts["step"] == 2
    assert opened.origin["start"]["image"] == {"kind": "folder", "name": "vit"}


def test_an_export_of_it_is_opened_and_names_no_class_of_a_head(away):
    assert cli.main(["export", f"checkpoint={away / 'run'}", "--out", str(away / "model")]) == 0
    first, second = open_checkpoint(away / "run"), from_pretrained(away / "model")
    assert all(torch.equal(a, b) for a, b in zip(_features(first), _features(second), strict=True))
    assert "id2label" not in (away / "model" / "config.json").read_text()


def test_a_name_that_the_system_does_not_even_look_up_is_a_folder_that_is_gone(away):
    """As one in another user's closed home is: Path.is_dir and is_file raise of both."""

    def rename(state: dict[str, Any]) -> None:
        for tower in ("vision", "text"):
            state["config"]["model"][tower]["source"] = "x" * 5000

    _rewrite(away / "run", rename)
    assert open_checkpoint(away / "run").facts["step"] == 1
    sources = [f"model.{tower}.source={'x' * 5000}" for tower in ("vision", "text")]
    assert train.main(["--config", str(away / "run"), *sources, "train.max_steps=2"]) == 0
    assert _same(_weights(away / "run"), _weights(away / "whole"))


def test_other_weights_in_a_source_change_nothing(made, tmp_path):
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    shutil.copytree(made / "sources", made / "kept")
    try:
        torch.manual_seed(77)
        shutil.rmtree(made / "sources")
        _sources(made / "sources")
        assert train.main(["--config", str(run), "train.max_steps=2"]) == 0
    finally:
        shutil.rmtree(made / "sources")
        (made / "kept").rename(made / "sources")
    assert _same(_weights(run), _weights(made / "whole"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"eps": 1e-3}, "model.vision.source=.*layer_norm_eps 0.001 .saved 1e-06."),
        ({"hidden_dropout_prob": 0.4}, r"text.source=\S*bert has hidden_dropout_prob 0.4"),
        ({"hidden_size": 32}, "hidden_size 32 .saved 16."),
        ({"vocab_size": 999}, "vocab_size 999 .saved"),
    ],
)
def test_a_source_of_another_shape_ends_a_resume_and_no_opening(
    made, tmp_path, capsys, given, told
):
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    shutil.copytree(made / "sources", made / "kept")
    try:
        shutil.rmtree(made / "sources")
        _sources(made / "sources", **given)
        assert train.main(["--config", str(run), "train.max_steps=2"]) == 4
        said = capsys.readouterr().err
        assert open_checkpoint(run).model.text.backbone.config.hidden_dropout_prob == 0.2
    finally:
        shutil.rmtree(made / "sources")
        (made / "kept").rename(made / "sources")
    assert re.search(told, said) and "restore the folder" in said
    assert not (run / "checkpoints" / "step_00000002").exists()


def test_with_allow_mismatch_the_shape_of_the_folder_is_taken_and_kept(made, tmp_path, capfd):
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    (made / "sources").rename(made / "kept")
    try:
        _sources(made / "sources", hidden_dropout_prob=0.4)
        given = ["--config", str(run), "--allow-mismatch", "train.max_steps=2"]
        assert train.main(given) == 0
    finally:
        shutil.rmtree(made / "sources")
        (made / "kept").rename(made / "sources")
    assert "hidden_dropout_prob 0.4 (saved 0.2)" in capfd.readouterr().err
    opened = open_checkpoint(run)
    assert opened.facts["step"] == 2
    assert opened.model.text.backbone.config.hidden_dropout_prob == 0.4


def test_another_vocabulary_in_a_source_ends_a_resume_and_no_opening(made, tmp_path, capsys):
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    train_tokenizer(["heart and lungs"] * 9, 60, tmp_path / "other")
    shutil.copytree(made / "sources", made / "kept")
    try:
        shutil.copytree(tmp_path / "other", made / "sources" / "bert", dirs_exist_ok=True)
        assert train.main(["--config", str(run), "train.max_steps=2"]) == 4
        opened = open_checkpoint(run)
    finally:
        shutil.rmtree(made / "sources")
        (made / "kept").rename(made / "sources")
    assert "was trained with other content: tokenizer" in capsys.readouterr().err
    assert opened.tokenizer.vocab_size == small_run().tokenizer.vocab_size


def test_a_run_of_an_earlier_version_needs_them_says_so_and_keeps_them_from_then_on(
    made, tmp_path, capsys
):
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    _of_an_earlier_version(run)
    (made / "sources").rename(made / "gone")
    try:
        with pytest.raises(PretrainedError, match=r"expected its vocabulary in .*sources/bert"):
            open_checkpoint(run)
        shutil.copytree(made / "run" / "tokenizer", run / "tokenizer")
        with pytest.raises(PretrainedError, match=r"kept no shape .*source=.*/vit, .*/bert\)"):
            open_checkpoint(run)
        assert train.main(["--config", str(run), "train.max_steps=2"]) != 0
        assert "model.vision.source=" in capsys.readouterr().err
        shutil.rmtree(run / "tokenizer")
    finally:
        (made / "gone").rename(made / "sources")
    assert open_checkpoint(run).facts["step"] == 1
    assert train.main(["--config", str(run), "train.max_steps=2"]) == 0
    assert _same(_weights(run), _weights(made / "whole"))
    (made / "sources").rename(made / "gone")
    try:
        assert open_checkpoint(run).facts["step"] == 2
    finally:
        (made / "gone").rename(made / "sources")


def test_runs_of_this_and_of_an_earlier_version_are_of_one_design(made, tmp_path):
    """One names the folder that its towers began with, the other their shape."""
    for seed in (1, 2):
        shutil.copytree(made / "run", tmp_path / str(seed))
    _of_an_earlier_version(tmp_path / "1")
    seeds = ["transfer.seeds=[1,2]", f"evaluate.checkpoint={tmp_path / '{seed}'}"]
    named = given(read([str(made / "run")], seeds, takes_exports=True))
    assert open_vision(named, "cpu")[1].keys() == {1, 2}
    other = {"hidden_dropout_prob": 0.3}
    _rewrite(tmp_path / "2", lambda state: state["towers"]["vision"].update(other))
    with pytest.raises(PretrainedError, match="seeds 1 and 2 differ"):
        open_vision(named, "cpu")


@pytest.mark.parametrize(
    "towers",
    [
        {"vision": {"hidden_size": "wide"}},
        {"vision": {"no_such": 1}},
        {"vision": {"hidden_size": 32, "num_attention_heads": 2}},
        {"vision": [1]},
        {"audio": {}},
        [1],
    ],
)
def test_shapes_that_are_none_are_one_clear_error(away, towers):
    _rewrite(away / "run", lambda state: state.update(towers=towers))
    with pytest.raises((PretrainedError, CheckpointError), match=r"step_00000001: "):
        open_checkpoint(away / "run")
    assert train.main(["--config", str(away / "run"), "train.max_steps=2"]) in (2, 4)


def test_a_state_whose_hash_does_not_hold_describes_no_model(away):
    """The older checkpoint is the one that is resumed: its shapes are taken, not those."""
    newest = checkpoint.folder_of(away / "whole", 2)
    text = (newest / "state.json").read_text()
    (newest / "state.json").write_text(
        text.replace('"layer_norm_eps": 1e-06', '"layer_norm_eps": 9.0')
    )
    assert text != (newest / "state.json").read_text()
    assert train.main(["--config", str(away / "whole")]) == 0
    state = json.loads((newest / "state.json").read_text())
    assert state["towers"]["vision"]["layer_norm_eps"] == 1e-06


def test_a_damaged_name_of_a_tensor_costs_one_checkpoint_and_not_the_run(away):
    """The file's header can be read then: it was taken for a checkpoint of no text tower."""
    whole = _weights(away / "whole")
    weights = checkpoint.folder_of(away / "whole", 2) / "parameters.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content.replace(b"word_embeddings.weight", b"word_embeddings.weighs"))
    assert content != weights.read_bytes()
    assert train.main(["--config", str(away / "whole")]) == 0
    assert _same(_weights(away / "whole"), whole)


def test_a_run_of_which_no_checkpoint_is_intact_begins_by_no_means_anew(away):
    config = load([away / "run"], [f"run.dir={away / 'run'}"], takes_exports=True)
    assert resumed_run.open_resumed(config) is not None
    (weights,) = (x / "parameters.safetensors" for x in checkpoint.checkpoints_of(away / "run"))
    for damage in (lambda: weights.write_bytes(b""), weights.unlink):
        damage()
        with pytest.raises(CheckpointError, match="no intact checkpoint is left"):
            resumed_run.open_resumed(config)
    shutil.rmtree(away / "run" / "checkpoints")
    assert resumed_run.open_resumed(config) is None


@pytest.mark.parametrize(
    "shapes",
    [
        {"model.concept_vectors": (3, 2)},
        {"model.text.word_embeddings.weight": (7, 2)},
        {"model.text.word_embeddings.weight": (7, 2), "model.concept_vectors": (3,)},
    ],
)
def test_an_intact_checkpoint_of_another_kind_of_model_is_refused(made, monkeypatch, shapes):
    monkeypatch.setattr(resumed_run, "_tensor_shapes", lambda folder: shapes)
    config = load([made / "run"], [f"run.dir={made / 'run'}"], takes_exports=True)
    with pytest.raises(CheckpointError, match="step_00000001: .* no text tower or no concept"):
        resumed_run.open_resumed(config)


def test_a_library_s_own_error_is_one_that_can_be_sent_to_other_ranks(monkeypatch):
    """Theirs may want more than a text to be made again of, and the ranks waited for it."""

    class Theirs(ValueError):
        def __init__(self, field: str, cause: str) -> None:
            super().__init__(f"{field}: {cause}")

    def refuse(config: Any, allow_mismatch: bool) -> None:
        raise Theirs("hidden_size", "not a number")

    monkeypatch.setattr(resumed_run, "_read", refuse)
    with pytest.raises(ValueError, match="hidden_size: not a number") as told:
        resumed_run.open_resumed(small_run().config)
    assert type(told.value) is ValueError


def test_no_weight_is_drawn_that_the_engine_fills():
    run = small_run()
    words, (concepts, dim) = run.tokenizer.vocab_size, run.model.concept_vectors.shape
    resumed = resumed_run.Resumed(run.config, words, (concepts, dim), None)
    with Drawn() as building:
        resumed.build_model(words=words, concepts=concepts)
    assert building.count == 0


@pytest.mark.parametrize(
    ("words", "concepts", "is_refused"), [(7, 3, False), (6, 3, False), (8, 3, True), (7, 4, True)]
)
def test_weights_of_other_words_or_other_concepts_are_refused(
    words, concepts, is_refused, monkeypatch
):
    """A vocabulary may have fewer words than a tower that came with rows for more."""
    monkeypatch.setattr(resumed_run, "MLIPModel", lambda config, **sizes: sizes["vocab_size"])
    resumed = resumed_run.Resumed(small_run().config, 7, (3, 2), None)
    if not is_refused:
        assert resumed.build_model(words=words, concepts=concepts) == 7
        return
    with pytest.raises(CheckpointError, match=f"7 words and 3 .* there are {words} and {concepts}"):
        resumed.build_model(words=words, concepts=concepts)


def test_a_copy_of_the_vocabulary_in_other_bytes_is_a_copy(made, tmp_path, capfd):
    """As another version of the library writes it: none was said to be kept."""
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    copy = run / "tokenizer" / "tokenizer.json"
    copy.write_text(json.dumps(json.loads(copy.read_text())))
    assert train.main(["--config", str(run), "train.max_steps=2"]) == 0
    assert "no copy of it is kept" not in capfd.readouterr().err
    assert _same(_weights(run), _weights(made / "whole"))


def _open_on_a_node_that_lags(run: str, damaged: str) -> None:
    """Rank 1 does not see the checkpoints, as for a minute on a network's disk."""
    process_group.start(60.0)
    if distributed.rank() == 1:
        resumed_run.checkpoints_of = run_vocabulary.checkpoints_of = lambda folder: []
    root = f"/films/{distributed.rank()}"  # a node may have its data elsewhere
    config = load([run], [f"run.dir={run}", f"data.root={root}"], takes_exports=True)
    resumed = resumed_run.open_resumed(config)
    assert resumed is not None and resumed.config.model.vision.source is None
    assert resumed.config.data.root == root
    words = run_vocabulary.open_tokenizer(config, None).vocab_size
    assert distributed.gather_objects(words) == [words] * 2
    with pytest.raises(CheckpointError, match="towers: expected"):
        resumed_run.open_resumed(load([damaged], [f"run.dir={damaged}"], takes_exports=True))
    distributed.barrier()


def test_all_ranks_go_on_where_one_does_not_see_the_checkpoints_yet(made, tmp_path):
    """It would have begun, and waited in the concepts' broadcast for the others."""
    damaged = Path(shutil.copytree(made / "run", tmp_path / "damaged"))
    _rewrite(damaged, lambda state: state.update(towers={"audio": {}}))
    rank_farm.run(_open_on_a_node_that_lags, 2, str(made / "run"), str(damaged), timeout_s=90.0)


def test_a_vocabulary_that_was_given_alone_is_kept_too(tmp_path):
    from tests.saved.test_starting_point import SHORT as SMALLEST

    run, given = small_run(), tmp_path / "given"
    shutil.copytree(run.folder / "run" / "tokenizer", given)
    own = [item for item in run.settings if not item.startswith("data.vocab_size")]
    own += [*SMALLEST, f"run.dir={tmp_path / 'run'}", "train.checkpoint_steps=1"]
    own += [f"model.text.tokenizer={given}"]
    assert train.main([*own, "train.max_steps=2"]) == 0
    whole = _weights(tmp_path / "run")
    shutil.rmtree(checkpoint.folder_of(tmp_path / "run", 2))
    shutil.rmtree(given)
    assert open_checkpoint(tmp_path / "run").tokenizer.vocab_size == run.tokenizer.vocab_size
    assert train.main(["--config", str(tmp_path / "run")]) == 0
    assert _same(_weights(tmp_path / "run"), whole)


def test_the_loading_of_weights_is_not_needed_to_know_a_shape(tmp_path):
    """A source whose weights were deleted to make room is as good as none."""
    _sources(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    pretrained_tower.check_kind(ViTModel, "key", str(tmp_path / "vit"), offline=True)
