"""A tower's weights come from a folder of that kind of model, whole, or the setting is named.

transformers itself warns and goes on with random weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from mlip.encoders.pretrained_tower import load_tower

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 16}
BERT: dict[str, Any] = {**SMALL, "vocab_size": 50}
VIT: dict[str, Any] = {**SMALL, "image_size": 32, "patch_size": 16}
RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
RESNET |= {"layer_type": "basic"}


def _load(kind: Any, folder: Path) -> Any:
    given = {} if kind is ResNetModel else {"add_pooling_layer": False}
    return load_tower(kind, "model.x.source", str(folder), offline=True, **given)


@pytest.mark.parametrize(
    ("kind", "saved", "inside"),
    [
        (BertModel, lambda: BertForMaskedLM(BertConfig(**BERT)), "bert"),
        (ResNetModel, lambda: ResNetForImageClassification(ResNetConfig(**RESNET)), "resnet"),
        (
            ViTModel,
            lambda: ViTMAEForPreTraining(
                ViTMAEConfig(**VIT, decoder_hidden_size=16, decoder_num_hidden_layers=1,
                             decoder_num_attention_heads=2, decoder_intermediate_size=16)
            ),
            "vit",
        ),
    ],
    ids=["masked language model", "classifier", "masked autoencoder"],
)  # fmt: skip
def test_the_tower_inside_a_larger_model_is_taken(
    tmp_path: Path, kind: Any, saved: Any, inside: str
) -> None:
    model = saved()
    model.save_pretrained(tmp_path)
    expected, taken = getattr(model, inside).state_dict(), _load(kind, tmp_path).state_dict()
    assert len(taken) > 10
    for name, weight in taken.items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize(
    ("kind", "saved", "held"),
    [
        (ResNetModel, lambda: ViTModel(ViTConfig(**VIT)), "vit"),
        (ViTModel, lambda: ResNetModel(ResNetConfig(**RESNET)), "resnet"),
        # its names are BERT's, its positions begin at another number
        (BertModel, lambda: RobertaModel(RobertaConfig(**BERT)), "roberta"),
    ],
)
def test_another_kind_of_model_is_refused(tmp_path: Path, kind: Any, saved: Any, held: str) -> None:
    saved().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^model.x.source=.*type {held}, expected .* type "):
        _load(kind, tmp_path)


def test_a_folder_that_does_not_say_its_type_is_judged_by_its_weights(tmp_path: Path) -> None:
    def forget(folder: Path) -> None:
        file = folder / "config.json"
        described = json.loads(file.read_text())
        del described["model_type"]
        file.write_text(json.dumps(described))

    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path / "bert")
    forget(tmp_path / "bert")
    assert _load(BertModel, tmp_path / "bert").config.hidden_size == 16
    ViTModel(ViTConfig(**VIT)).save_pretrained(tmp_path / "vit")
    forget(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"^model.x.source=.*: its files lack \d+ weights"):
        _load(BertModel, tmp_path / "vit")


def test_missing_weights_are_named_and_missing_counters_are_not(tmp_path: Path) -> None:
    ResNetModel(ResNetConfig(**RESNET)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {k: v for k, v in load_file(file).items() if not k.endswith("batches_tracked")}
    save_file(weights, file, metadata={"format": "pt"})
    _load(ResNetModel, tmp_path)
    del weights["embedder.embedder.convolution.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack 1 weights .*embedder.embedder.convolution.weight"):
        _load(ResNetModel, tmp_path)


def test_weights_that_are_no_safetensors_come_with_the_line_that_makes_them_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BertModel(BertConfig(**BERT))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="^model.x.source=.*no model.safetensors") as caught:
        _load(BertModel, tmp_path)
    line = str(caught.value).split('python -c "')[1].removesuffix('"')
    exec(line)  # oracle: what the message prints
    assert torch.equal(
        _load(BertModel, tmp_path).embeddings.word_embeddings.weight,
        model.embeddings.word_embeddings.weight,
    )


def test_damaged_weights_and_settings_name_the_setting(tmp_path: Path) -> None:
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(ValueError, match="^model.x.source=.*cannot be read"):
        _load(BertModel, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="^model.x.source=.*cannot be read"):
        _load(BertModel, tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"vocab_size": 40},
            r"1 weights have other sizes .*word_embeddings.weight .*\[50, 16\], not \[40",
        ),
        ({"num_attention_heads": 0}, "no tower can be built with these values: ZeroDivision"),
        ({"is_decoder": True}, "is_decoder=true: .*expected a model that reads both ways"),
        ({"hidden_size": "wide"}, "no tower can be built with these values: (?s:.)*expected int"),
        ({"hidden_size": 15}, "no tower can be built with these values: ValueError"),
        ([], "cannot be read"),
        (3, "cannot be read"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_names_the_setting(
    tmp_path: Path, changed: Any, message: str
) -> None:
    """A config.json of another size ended in a traceback that named neither folder nor setting."""
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    described = json.loads(file.read_text())
    file.write_text(json.dumps({**described, **changed} if isinstance(changed, dict) else changed))
    with pytest.raises(ValueError, match=f"^model.x.source={tmp_path}: {message}"):
        _load(BertModel, tmp_path)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_trained_in_float32(tmp_path: Path, half: Any) -> None:
    """A run's tower had the file's own precision, and no checkpoint of it could be read."""
    model = BertModel(BertConfig(**BERT)).to(half)
    model.save_pretrained(tmp_path)
    taken, expected = _load(BertModel, tmp_path).state_dict(), model.state_dict()
    assert {weight.dtype for weight in taken.values()} == {torch.float32}
    assert all(torch.equal(weight, expected[name].float()) for name, weight in taken.items())
