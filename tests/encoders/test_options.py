"""Options handed to transformers: what it would keep silently or refuse unnamed is said by key."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import BertConfig, BertModel, PretrainedConfig, ResNetConfig, ViTConfig, ViTModel

from mlip.encoders.options import build_tower, tower_config, tower_shape


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (ResNetConfig, {"hidden_size": 12}, "no option 'hidden_size'; the nearest is 'hidden_s"),
        (BertConfig, {"hiden_size": 12}, "no option 'hiden_size'; the nearest is 'hidden_size'"),
        (ViTConfig, {"drop_path_rate": 0.1}, "no option 'drop_path_rate'"),
        (ViTConfig, {"num_channels": 3}, "num_channels follows from data.channels"),
        (BertConfig, {"vocab_size": 30522}, "vocab_size follows from the tokenizer"),
        (ResNetConfig, {"layer_type": "wide"}, "refuses these values"),
        (BertConfig, {"hidden_size": "wide"}, "refuses these values"),
        (BertConfig, {"num_hidden_layers": 0}, "num_hidden_layers=0: expected 1 or more"),
        (BertConfig, {"type_vocab_size": 0}, "type_vocab_size=0: expected 1 or more"),
        (ViTConfig, {"hidden_size": -8}, "hidden_size=-8: expected 1 or more"),
        (ViTConfig, {"hidden_size": 770}, "hidden_size=770: expected a multiple of 12 heads"),
        (ResNetConfig, {"embedding_size": 0}, "embedding_size=0: expected 1 or more"),
        (ResNetConfig, {"depths": [3, 4, -1, 3]}, "depths=.*: expected 1 or more"),
        (BertConfig, {"layer_norm_eps": -1e-12}, "layer_norm_eps=-1e-12: expected 0 or more"),
        (ViTConfig, {"layer_norm_eps": math.nan}, "layer_norm_eps=nan: expected 0 or more"),
        (BertConfig, {"layer_norm_eps": math.inf}, "layer_norm_eps=inf: expected 0 or more"),
        (BertConfig, {"is_decoder": True}, "is_decoder=true: .*expected a model that reads both"),
    ],
)
def test_an_option_that_cannot_be_honoured_names_the_setting(
    kind: type[PretrainedConfig], options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=f"model.text.options: .*{expected}"):
        tower_config(kind, "model.text.options", options)


@pytest.mark.parametrize(
    ("model", "kind", "options"),
    [
        (ViTModel, ViTConfig, {"hidden_act": "nope"}),
        (BertModel, BertConfig, {"pad_token_id": 100000}),
    ],
)
def test_values_that_no_tower_can_have_name_the_setting(
    model: Any, kind: type[PretrainedConfig], options: dict[str, Any]
) -> None:
    given = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1} | options
    with pytest.raises(ValueError, match="^model.x.options: "):
        build_tower(lambda: model(tower_config(kind, "model.x.options", given)), "model.x.options")


def test_options_win_over_defaults_and_keep_their_values() -> None:
    made = tower_config(ViTConfig, "key", {"hidden_size": 48, "patch_size": 8}, num_channels=1)
    assert (made.hidden_size, made.patch_size, made.num_channels) == (48, 8, 1)


PUBLISHED: dict[str, Any] = {
    "architectures": ["WithAHead"],
    "id2label": {0: "tench", 1: "goldfish", 2: "great white shark"},
    "label2id": {"tench": 0, "goldfish": 1, "great white shark": 2},
    "gradient_checkpointing": False,
    "position_embedding_type": "absolute",
    "directionality": "bidi",
    "pooler_fc_size": 768,
    "finetuning_task": "nli",
    "torch_dtype": "float32",
    "num_channels": 3,
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (BertConfig, {"hidden_size": 24, "layer_norm_eps": 1e-5, "hidden_dropout_prob": 0.3}),
        (ViTConfig, {"hidden_size": 24, "patch_size": 8, "qkv_bias": False, "image_size": 64}),
        (ResNetConfig, {"hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}),
    ],
)
def test_the_shape_of_a_published_tower_is_one_that_can_be_built(kind: Any, options: Any) -> None:
    """An export of a run that began with one named ImageNet classes: it could not be opened."""
    shape = tower_shape(kind(**PUBLISHED, **options))
    made = tower_config(kind, "key", shape)
    assert not PUBLISHED.keys() & shape.keys()
    assert {name: getattr(made, name) for name in options} == options
    assert tower_shape(made) == shape
