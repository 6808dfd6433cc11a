"""`mlip export --transformers`: what transformers opens is the tower that was trained.

Oracle: the model's own towers; every tower shape that the settings allow.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from markdown_it import MarkdownIt
from transformers.utils import logging as hub_logging

from mlip.cli import main
from mlip.model import MLIPModel
from mlip.pretrained import from_pretrained, save_pretrained
from mlip.saved import transformers_folders
from mlip.saved.weights import PretrainedError
from mlip.settings.config import Config, load
from tests.small_run import SETTINGS, small_export, small_run

BERT = "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"
VIT = BERT.replace("{", "{patch_size: 16, ")
RESNET = "{embedding_size: 8, hidden_sizes: [8, 16, 24], depths: [1, 1, 1], layer_type: basic}"
TOWERS = {
    "vit": [f"model.vision.options={VIT}", "model.vision.kind=vit"],
    "vit, bf16 residual, packed": [f"model.vision.options={VIT}", "model.vision.kind=vit"]
    + ["train.precision=bf16", "train.residual=bf16", "model.text.packed=true"],
    "resnet": [f"model.vision.options={RESNET}", "model.vision.patch_stage=1"]
    + ["model.vision.pool=tower"],
    "resnet that ends at its patches": [f"model.vision.options={RESNET}"]
    + ["model.vision.patch_stage=1", "model.vision.pool=attention"],
    "resnet, frozen statistics": [f"model.vision.options={RESNET}", "model.vision.norm=frozen"]
    + ["model.vision.patch_stage=2", "model.vision.patch_pool=2"],
}


def _model(*changes: str) -> tuple[MLIPModel, Config]:
    run = small_run()
    kept = [s for s in SETTINGS if not s.startswith(("model.vision", "model.text"))]
    config = load([], [*kept, f"model.text.options={BERT}", *changes])
    torch.manual_seed(0)
    model = MLIPModel(
        config, vocab_size=run.tokenizer.vocab_size, concept_vectors=run.model.concept_vectors
    )
    for name, tensor in model.named_buffers():
        # those of a trained tower are not 0 and 1; means far from 0 would leave no channel alive
        if name.endswith("running_mean"):
            tensor.uniform_(-0.1, 0.1)
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    return model.eval(), config


def _written(folder: Path, model: MLIPModel, config: Config) -> Path:
    run = small_run()
    return save_pretrained(folder, model, config, run.tokenizer, run.table, transformers=True)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_each_tower_is_what_was_trained(name: str, tmp_path: Path) -> None:
    model, config = _model(*TOWERS[name])
    out = _written(tmp_path / "m", model, config)
    image = torch.randn(2, 1, 96, 96, generator=torch.Generator().manual_seed(1))
    opened = transformers.AutoModel.from_pretrained(out / "image_tower").eval()
    states = opened(image).last_hidden_state
    pooled, patches, _ = model.float().vision.tower(image)
    assert pooled.abs().max() > 0.01 and patches.abs().max() > 0.01
    if "vit" in name:
        assert torch.allclose(states[:, 0], pooled, atol=1e-5)
        assert torch.allclose(states[:, 1:], patches, atol=1e-5)
    else:
        assert torch.allclose(states.mean(dim=(2, 3)), pooled, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "text_tower")
    words = tokenizer(["left pleural effusion", "no edema"], padding=True, return_tensors="pt")
    bert = transformers.AutoModel.from_pretrained(out / "text_tower").eval()
    found = bert(
        input_ids=words["input_ids"], attention_mask=words["attention_mask"]
    ).last_hidden_state
    mask = words["attention_mask"].bool()
    own = model.text(words["input_ids"], mask)[1]
    assert torch.allclose(found[mask], own[mask], atol=1e-5)


def _refuse(*given: object, **named: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_the_command_writes_them_and_the_export_is_read_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = _model(*TOWERS["vit"])
    source, out = _written(tmp_path / "a", model, config), tmp_path / "b"
    assert main(["export", f"checkpoint={source}", "--out", str(out), "--transformers"]) == 0
    facts = json.loads((out / "config.json").read_text())["transformers"]
    assert facts["version"] == transformers.__version__
    assert set(facts["largest_difference"]) == {"image_tower", "text_tower"}
    assert all(0.0 <= off < 1e-5 for off in facts["largest_difference"].values())
    sums = (out / "SHA256SUMS").read_text()
    for name in ("image_tower", "text_tower"):
        weights = out / name / "model.safetensors"
        assert f"{name}/model.safetensors" in sums and weights.stat().st_mode & 0o077 == 0
        written = (out / name / "config.json").read_text()
        assert str(tmp_path) not in written and "mlip" not in written
    assert from_pretrained(out).model.vision.tower is not None
    # a disk whose files all have one mode (exFAT) refuses to change it
    monkeypatch.setattr(Path, "chmod", _refuse)
    # an export with them is an export: written over like any other
    assert main(["export", f"checkpoint={source}", "--out", str(out), "--transformers"]) == 0
    assert main(["export", f"checkpoint={source}", "--out", str(out)]) == 0
    assert not (out / "image_tower").exists()


def test_the_lines_of_the_card_run_and_a_text_is_cut_as_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = _model(*TOWERS["resnet"])
    card = (_written(tmp_path / "model", model, config) / "README.md").read_text(encoding="utf-8")
    blocks = [t.content for t in MarkdownIt("commonmark").parse(card) if t.info == "python"]
    (lines,) = (block for block in blocks if "transformers" in block)
    monkeypatch.chdir(tmp_path)
    named: dict[str, Any] = {}
    exec(lines, named)
    assert named["image_states"].shape == (1, 24, 6, 6)
    run = small_run()
    text, most = "no pneumothorax, left pleural effusion and " * 20, config.data.max_tokens
    (ids,) = named["tokenizer"]([text], truncation=True)["input_ids"]
    own = run.tokenizer.encode_batch([text])[0].ids[: most - 2]
    assert ids == [run.tokenizer.cls_id, *own, run.tokenizer.sep_id] and len(ids) == most


@pytest.mark.parametrize(
    "setting", ["model.vision.stem=deep", "model.vision.norm=group"], ids=["deep", "group"]
)
def test_towers_that_transformers_does_not_have_are_refused(setting: str, tmp_path: Path) -> None:
    model, config = _model(*TOWERS["resnet"], setting)
    with pytest.raises(PretrainedError, match=setting.replace(".", r"\.") + ": transformers'"):
        _written(tmp_path / "m", model, config)
    assert not list(tmp_path.iterdir())


def test_towers_that_transformers_does_not_have_are_refused_before_onnx_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal came after the minute that two ONNX files take."""
    run, (model, config) = small_run(), _model(*TOWERS["resnet"], "model.vision.stem=deep")
    began: list[Path] = []
    monkeypatch.setattr("mlip.pretrained.write_onnx", lambda folder, *_: began.append(folder))
    parts = (model, config, run.tokenizer, run.table)
    with pytest.raises(PretrainedError, match="no such tower"):
        save_pretrained(tmp_path / "m", *parts, onnx=True, transformers=True)
    assert not began


@pytest.mark.parametrize("factor", [1.001, float("nan")])
@pytest.mark.parametrize(
    ("tower", "name"), [("vit", "image_tower"), ("vit", "text_tower"), ("resnet", "image_tower")]
)
def test_other_numbers_are_refused_and_nothing_is_left(
    tower: str, name: str, factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = _model(*TOWERS[tower])
    opened = transformers_folders._opened

    def broken(folder: Path) -> Any:
        other = opened(folder)
        for parameter in other.parameters() if folder.name == name else ():
            parameter.data.mul_(factor)
        return other

    monkeypatch.setattr(transformers_folders, "_opened", broken)
    with pytest.raises(PretrainedError, match=rf"{name}: transformers .* differs from the"):
        _written(tmp_path / "m", model, config)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def talkative() -> Iterator[None]:
    """transformers at a level that no check sets, its bars drawn."""
    started = hub_logging.get_verbosity(), hub_logging.is_progress_bar_enabled()
    hub_logging.set_verbosity_info()
    hub_logging.enable_progress_bar()
    yield
    hub_logging.set_verbosity(started[0])
    (hub_logging.enable_progress_bar if started[1] else hub_logging.disable_progress_bar)()


@pytest.mark.parametrize("draws_bars", [True, False])
def test_what_transformers_tells_a_user_is_as_before_a_check(
    draws_bars: bool, talkative: None
) -> None:
    if not draws_bars:
        hub_logging.disable_progress_bar()
    before = hub_logging.get_verbosity(), hub_logging.is_progress_bar_enabled()
    with pytest.raises(RuntimeError), transformers_folders._quiet():
        assert hub_logging.get_verbosity() != before[0]
        assert not hub_logging.is_progress_bar_enabled()
        raise RuntimeError
    assert (hub_logging.get_verbosity(), hub_logging.is_progress_bar_enabled()) == before


@torch.no_grad()
def test_another_pre_training_starts_from_them(tmp_path: Path) -> None:
    model, config = _model(*TOWERS["vit"])
    out = _written(tmp_path / "m", model, config)
    changed = [
        f"model.{kind}.source={out / f'{name}_tower'}"
        for kind, name in (("vision", "image"), ("text", "text"))
    ]
    later, _ = _model("model.vision.kind=vit", *changed)
    image = torch.randn(2, 1, 96, 96)
    assert torch.allclose(later.vision.tower(image)[1], model.vision.tower(image)[1], atol=1e-6)
    ids, mask = torch.randint(0, 100, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    assert torch.allclose(later.text(ids, mask)[1], model.text(ids, mask)[1], atol=1e-6)


def test_a_plain_export_holds_none_of_them() -> None:
    assert not (small_export() / "image_tower").exists()
