"""What of a source's folder is held against the shape that a run has kept of it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BertConfig, ResNetConfig, ViTConfig

from mlip.encoders.options import tower_shape
from mlip.encoders.source_shape import changed_options, told
from mlip.settings.config import Text, Vision

KINDS: dict[str, Any] = {
    "bert": (BertConfig, Text),
    "vit": (ViTConfig, lambda source: Vision(kind="vit", source=source)),
    "resnet": (ResNetConfig, lambda source: Vision(kind="resnet", source=source)),
}
SIZES = {"bert": {"vocab_size": 30522}, "vit": {"num_channels": 3}, "resnet": {"num_channels": 3}}
NOTHING = [
    ("bert", {"use_cache": False, "classifier_dropout": 0.3, "initializer_range": 0.5}),
    ("vit", {"pooler_act": "relu", "pooler_output_size": 5, "encoder_stride": 8, "image_size": 32}),
    ("resnet", {"out_features": ["stage2"]}),
]
SHAPE = [
    ("bert", "is_decoder", True, False),
    ("bert", "pad_token_id", 3, 0),
    ("vit", "qkv_bias", False, True),
    ("vit", "patch_size", 8, 16),
    ("resnet", "hidden_act", "gelu", "relu"),
]


def _changed(folder: Any, kind: str, now: dict[str, Any], **other: int) -> Any:
    config, settings = KINDS[kind]
    config(**now).save_pretrained(folder)
    return changed_options(settings(source=str(folder)), tower_shape(config()), SIZES[kind] | other)


@pytest.mark.parametrize(("kind", "now"), NOTHING)
def test_what_no_number_of_a_tower_follows_from_is_no_change(tmp_path, kind, now):
    """A source that was saved again with another head or pooler ended a resume."""
    assert _changed(tmp_path, kind, now) == {}


@pytest.mark.parametrize(("kind", "name", "now", "kept"), SHAPE)
def test_an_option_of_the_tower_is(tmp_path, kind, name, now, kept):
    changed = _changed(tmp_path, kind, {name: now})
    assert changed == {name: (kept, now)}
    assert told(changed, "saved") == f"{name} {now!r} (saved {kept!r})"


def test_sizes_that_other_settings_decide_are_held_against_those_of_the_tower(tmp_path):
    assert _changed(tmp_path, "vit", {}, num_channels=1) == {"num_channels": (1, 3)}
    assert _changed(tmp_path, "bert", {}, vocab_size=7) == {"vocab_size": (7, 30522)}


def test_without_a_folder_there_nothing_is(tmp_path):
    shape = tower_shape(ViTConfig())
    for source in (None, str(tmp_path / "gone"), "x" * 5000, "google/vit"):
        assert changed_options(Vision(kind="vit", source=source), shape, {}) == {}
